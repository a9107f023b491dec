"""Find the fastest kernel for every layer of SDXL, and write the table that the library selects by.

    python benchmarks/tune.py                              on the GPU that the table is for; then build the library
    python benchmarks/tune.py --table t.inc --out t.json   write elsewhere; MIXDQ_TUNING_TABLE=t.inc uses it unbuilt

Rows of other architectures, and of shapes that were not measured this time, stay in the table.
"""

import json
import re
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated

import torch
import typer
from gpu import KERNELS, Bench, Progress, environment, forced, launches, require_gpu
from sdxl_shapes import Layer, layers, merged

from mixdq_ao.files import write_text

TABLE = Path(__file__).resolve().parents[1] / "csrc" / "tuning_table.inc"
HEADER = "// Written by benchmarks/tune.py: arch, m, n, k, taps, bits, kernel, splits. Do not edit.\n"
ROW = re.compile(r'\{(\d+), (\d+), (\d+), (\d+), (\d+), (\d+), "(\w+)", (\d+)\},')
# In this order, so that what is left out when time runs short is the least common.
SIZES = [(pixels, batch) for batch in (1, 2, 4, 8) for pixels in (512, 1024, 768)]
BITS = (8, 4)
MULTIPROCESSORS = 132  # of an H100 or H200

# A choice is (kernel, splits); a key is what the library looks a shape up by: m, n, k, taps, bits.
Choice = tuple[str, int]
Key = tuple[int, int, int, int, int]


def problems() -> dict[Key, set[Layer]]:
    """Shapes of a table row: a convolution of stride 2 may share one with another of stride 1."""
    found: dict[Key, set[Layer]] = {}
    for pixels, batch in SIZES:
        for layer in [*layers(pixels, batch), *merged(pixels, batch)]:
            for bits in BITS:
                found.setdefault((layer.m, layer.columns, layer.k, layer.taps, bits), set()).add(layer)
    return found


def candidates(layer: Layer, bits: int, sm90: bool) -> list[Choice]:
    names = [k for k in KERNELS if sm90 or not k.name.startswith("sm90")]
    able = [(k.name, splits) for k in names for splits in k.splits(layer, bits)]
    # Not worth their time: `direct`, many times slower than anything else; large tiles in one part, which persistent
    # kernels do as well, or in more than the GPU has multiprocessors for.
    return [c for c in able if c[0] != "direct" and (not c[0].endswith("_split") or fills_a_wave(*c, layer))] or able


def fills_a_wave(name: str, splits: int, layer: Layer) -> bool:
    """Whether a kernel of that tile has a block for half of the multiprocessors or more, and none that waits."""
    rows, columns = (int(v) for v in re.search(r"(\d+)x(\d+)", name).groups())
    blocks = -(-layer.m // rows) * -(-layer.columns // columns) * splits
    return splits > 1 and MULTIPROCESSORS / 2 <= blocks <= MULTIPROCESSORS


def fastest(
    options: Iterable[Choice], quick: Callable[[Choice], float | None], thorough: Callable[[Choice], float | None]
) -> dict[Choice, float]:
    """Microseconds of each option, measured thoroughly for those that come near the best at first sight; without those
    that fail."""
    times = {option: us for option in options if (us := quick(option)) is not None}
    near = 1.2 * min(times.values(), default=0.0)
    return times | {option: min(us, thorough(option) or us) for option, us in times.items() if us <= near}


def best_of(timings: list[dict[Choice, float]]) -> Choice | None:
    """The least total among what can do all the layers of a row."""
    shared = set.intersection(*(set(t) for t in timings))
    return min(sorted(shared), key=lambda choice: sum(t[choice] for t in timings), default=None)


def read_table(path: Path) -> dict[tuple[int, Key], Choice]:
    rows = {}
    for match in ROW.finditer(path.read_text() if path.exists() else ""):
        arch, *key = (int(v) for v in match.groups()[:6])
        rows[arch, tuple(key)] = match[7], int(match[8])
    return rows


def write_table(path: Path, rows: dict[tuple[int, Key], Choice]) -> None:
    lines = [
        "{" + ", ".join(str(v) for v in (arch, *key)) + f', "{name}", {splits}}},\n'
        for (arch, key), (name, splits) in sorted(rows.items())
    ]
    part = path.with_suffix(".part")
    part.write_text(HEADER + "".join(lines))
    part.replace(path)


def measure(bench: Bench, layer: Layer, bits: int, sm90: bool, known: dict[Choice, float]) -> dict[Choice, float]:
    """Microseconds of every choice; ``known`` are those with 8 bits."""
    call, count = bench.int8(layer, bits)
    options = candidates(layer, bits, sm90)
    unpacking = {c: us for c, us in known.items() if c in options and c[0] != "few_rows"}
    if bits != 8 and unpacking:
        # Kernels that read unpacked weights keep their order: what unpacking adds is the same for all of them.
        kept = sorted(unpacking, key=unpacking.get)[:2]
        options = [c for c in options if c not in unpacking or c in kept]

    def timed(choice: Choice, count: int, repeats: int) -> float | None:
        with forced(*choice):
            return bench.try_us("{}:{}, {}, {} bits".format(*choice, layer, bits), call, count, repeats)

    few = min(count, launches(layer, 8 << 20))
    return fastest(options, lambda c: timed(c, max(4, few // 2), 1), lambda c: timed(c, few, 3))


def main(
    table: Annotated[Path, typer.Option(help="The table to update.")] = TABLE,
    out: Annotated[Path | None, typer.Option(help="Write every timing as JSON here.")] = None,
    seconds: Annotated[float, typer.Option(help="Stop when that much time has passed.")] = 200,
) -> None:
    """Time every kernel on every layer of SDXL at 512, 768 and 1024 px and batches of 1, 2, 4 and 8."""
    require_gpu()
    deadline = time.monotonic() + seconds
    major, minor = torch.cuda.get_device_capability()
    arch, todo = 10 * major + minor, problems()
    before, facts = read_table(table), environment()
    timings: dict[Key, list[dict[Choice, float]]] = {}

    def save() -> None:
        choices = {key: choice for key, found in timings.items() if (choice := best_of(found))}
        write_table(table, before | {(arch, key): choice for key, choice in choices.items()})
        if out:
            rows = [
                {
                    **dict(zip(("m", "n", "k", "taps", "bits"), key, strict=True)),
                    "layers": [str(layer) for layer in sorted(todo[key], key=str)],
                    "chosen": "{}:{}".format(*choice),
                    "microseconds": [{f"{n}:{s}": round(us, 2) for (n, s), us in t.items()} for t in timings[key]],
                }
                for key, choice in choices.items()
            ]
            write_text(out, json.dumps({**facts, "rows": rows}, indent=1) + "\n")

    with torch.inference_mode():
        bench = Bench()
        bench.warm_up()
        progress = Progress(len(todo), save)
        known: dict[Layer, dict[Choice, float]] = {}
        for key, members in todo.items():
            if time.monotonic() > deadline:
                break
            found = {
                layer: measure(bench, layer, key[-1], arch == 90, known.get(layer, {}))
                for layer in sorted(members, key=str)
            }
            if key[-1] == 8:
                known |= found
            timings[key] = list(found.values())
            progress.step()
    save()
    print(f"{len(timings)} rows for sm_{arch} in {table}; {len(todo) - len(timings)} shapes left out")
    if len(todo) > len(timings):
        print("More --seconds measure them all.")


if __name__ == "__main__":
    typer.run(main)
