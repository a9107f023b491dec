"""What the results on a GPU say of each goal of the project: measured, needed, and whether that is reached.

    python benchmarks/claims.py                      of benchmarks/results
    python benchmarks/claims.py --results results    of a folder that run_all.py wrote

Ratios are taken within one file, so within one run.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from mixdq_ao.bench.results import Results, Row
from mixdq_ao.errors import CheckpointError, MixDQError
from mixdq_ao.files import parse_json, read_text
from mixdq_ao.summary import MIB

RESULTS = Path(__file__).resolve().parent / "results"
SIZES = ((512, 1), (1024, 1), (512, 8), (1024, 8))  # px, batch
SPEEDUPS = {(512, 1): 1.5, (1024, 1): 1.4, (512, 8): 1.4, (1024, 8): 1.7}


@dataclass(frozen=True)
class Claim:
    """``measured`` is to be at least, or with ``most`` at most, ``needed``; None where nothing was measured."""

    what: str
    measured: float | None
    needed: float
    unit: str = "x"
    most: bool = False

    @property
    def holds(self) -> bool | None:
        if self.measured is None:
            return None
        return self.measured <= self.needed if self.most else self.measured >= self.needed


def kernel_claims(kernels: dict | None) -> Iterator[Claim]:
    """Sums of a step's layers, from ``kernels.py``."""
    cases = {} if kernels is None else kernels["cases"]

    def total(case: str, kind: str, name: str) -> float | None:
        sums = cases[case]["sums"] if case in cases else {}  # none as long as layers are missing
        return sums[kind][name] if sums else None

    small, large = "512 px, batch 1", "1024 px, batch 4"
    goals = ((small, "linear", 1.45), (small, "conv", 2.0), (large, "linear", 1.9), (large, "conv", 2.6))
    for case, kind, needed in goals:
        yield Claim(f"{kind} layers, W8A8, over fp16, {case}", total(case, kind, "w8a8_over_fp16"), needed)
    layers = [layer for case in cases.values() for layer in case["layers"]]
    slowest = min((layer["us"]["fp16"] / layer["us"].get("w8a8", float("inf")) for layer in layers), default=None)
    yield Claim("the slowest layer of all, W8A8, over fp16", slowest, 1.0)
    yield Claim(f"all layers, W4A8, over fp16, {large}", total(large, "all", "w4a8_over_fp16"), 1.0)
    both = [total(small, "all", name) for name in ("w4a8_ms", "w8a8_ms")]
    yield Claim(f"all layers, time of W4A8 over W8A8, {small}", _ratio(*both), 1.15, most=True)


def unet_claims(results: dict[str, Results]) -> Iterator[Claim]:
    """SDXL's UNet, from ``mixdq-ao bench``; ``results`` by the end of the file's name."""

    def row(name: str, variant: str, batch: int = 1) -> Row | None:
        found = results[name].row(variant, batch) if name in results else None
        return None if found is None or found.error or found.nonfinite else found

    def seconds(name: str, variant: str) -> float | None:
        found = row(name, variant)
        return found and found.compile_s

    for variant, needed in (("w8a8", SPEEDUPS), ("w4a8", dict.fromkeys(SIZES, 1.25))):
        for size, batch in SIZES:
            name = f"{size}px_batch{batch}"
            found = row(name, variant, batch)
            speedup = None if found is None else results[name].speedup(found)
            yield Claim(f"UNet {variant} over compiled fp16, {size} px, batch {batch}", speedup, needed[size, batch])
    small = "512px_batch1"
    floating = row(small, "fp16")
    for variant, label in (("w8a8-no-inductor", "eager, rewritten (backend='eager')"), ("w8a8-eager", "plain eager")):
        older = row("sm80", variant)
        ms = older and older.latency.median
        yield Claim(f"UNet W8A8 {label}, kernels of older GPUs", ms, 12.0, "ms", most=True)
    compiled, w8a8, mixed = (row(small, variant) for variant in ("fp16-compiled", "w8a8", "weight_4.00"))
    for label, found, static, peak in (("W8A8", w8a8, 2500, 0.51), ("weight_4.00", mixed, 1260, 0.27)):
        yield Claim(f"static memory of {label}", found and found.static / MIB, static, "MiB", most=True)
        of_peak = _ratio(found and found.peak, floating and floating.peak)
        yield Claim(f"peak memory of {label}, of fp16's, 512 px, batch 1", of_peak, peak, most=True)
    activation = _ratio(w8a8 and w8a8.activation, compiled and compiled.activation)
    yield Claim("activation memory of W8A8, of compiled fp16's", activation, 1.0, most=True)
    # Each by itself or, where that was not measured, side by side, which slows both.
    ratios = [_ratio(seconds(name, "w8a8"), seconds(name, "fp16-compiled")) for name in ("cold", "1024px_batch1")]
    yield Claim("compile time of W8A8, of fp16's", next(filter(None, ratios), None), 1.5, most=True)
    again = _ratio(seconds("warm", "w8a8"), seconds("cold", "w8a8"))
    yield Claim("warm start of W8A8, of its compile time", again, 1 / 3, most=True)


def eager_claims(found: dict | None) -> Iterator[Claim]:
    """Calls that took turns, from ``eager.py``."""
    ratio = found and found["unet"]["ratio"]
    yield Claim("UNet W8A8 eager without a graph, over fp16, 512 px, batch 1", ratio, 1.0)


def sensitivity_claims(found: dict | None) -> Iterator[Claim]:
    """The sensitivity stage, from ``sensitivity.py``."""
    processes = {} if found is None else found["processes"]
    cheap = processes.get("1", {}).get("cheap")
    minutes = cheap and max(cheap["estimated_s"].values()) / 60
    yield Claim("sensitivity of SDXL's 794 layers, predicted, 512 prompts", minutes, 60, "min", most=True)
    rates = {} if found is None else found["layers_per_s"]
    yield Claim("the same on two GPUs, layers a second", _ratio(rates.get("2"), rates.get("1")), 1.8)


def _ratio(a: float | None, b: float | None) -> float | None:
    return a / b if a is not None and b else None


def claims(folder: Path) -> list[Claim]:
    """All of them. Raises ``MixDQError`` for files that are none of ours."""

    def read(name: str, found_in: Callable[[dict | None], Iterator[Claim]]) -> list[Claim]:
        path = folder / name
        content = parse_json(path, "", read_text(path)) if path.exists() else None
        try:
            return list(found_in(content))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(path, "", f"must be what benchmarks/{path.stem}.py writes ({error!r})") from error

    benches = {path.stem.removeprefix("bench_"): Results.read(path) for path in sorted(folder.glob("bench_*.json"))}
    return [
        *read("kernels.json", kernel_claims),
        *unet_claims(benches),
        *read("eager.json", eager_claims),
        *read("sensitivity.json", sensitivity_claims),
    ]


def table(found: list[Claim]) -> Table:
    table = Table("goal", "needed", "measured", "reached", title="Goals, set for an H200")
    for column in table.columns[1:3]:
        column.justify = "right"
    for c in found:
        needed = f"{'<=' if c.most else '>='} {_number(c.needed)} {c.unit}"
        measured = "not measured" if c.measured is None else f"{_number(c.measured)} {c.unit}"
        table.add_row(c.what, needed, measured, {None: "", True: "yes", False: "no"}[c.holds])
    return table


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def main(
    results: Annotated[
        Path, typer.Option(exists=True, file_okay=False, help="Folder with the JSON files of the benchmarks.")
    ] = RESULTS,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Compare results on a GPU with the project's goals; ends with 1 where one that was measured is not reached."""
    try:
        found = claims(results)
    except MixDQError as error:
        raise SystemExit(f"error: {error}") from None
    if as_json:
        print(json.dumps([{**vars(c), "holds": c.holds} for c in found], indent=1))
    else:
        Console(width=130).print(table(found))
    if any(c.holds is False for c in found):
        raise SystemExit(1)


if __name__ == "__main__":
    typer.run(main)
