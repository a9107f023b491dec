"""Times of the CUDA kernels on every layer of SDXL, against torch's fp16, each layer by itself.

A launch's weights come from memory and not from the cache, as they do in a UNet. Attention, norms and everything else
that stays floating is not in the sums of a step; quantizers are a table of their own.

"best" is W8A8 with the kernel of the catalogue that is fastest for the layer by itself, as cuDNN's benchmark mode picks
fp16's. The library's own table is tuned in a whole step, where another kernel often is.

    python benchmarks/kernels.py --out kernels.json
"""

import itertools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from gpu import Bench, Progress, environment, forced, normal_codes, require_gpu
from rich.console import Console
from rich.table import Table
from sdxl_shapes import Layer, Linear, layers
from tune import Choice, measure

from mixdq_ao.files import write_text

CASES = {"512 px, batch 1": (512, 1), "1024 px, batch 1": (1024, 1), "1024 px, batch 4": (1024, 4)}
VARIANTS = ("w8a8", "best", "w4a8", "sm80")
HEADINGS, CHOSEN = {"w8a8": "W8A8", "w4a8": "W4A8"}, ("best", "sm80")
# [rows, channels] of SDXL's tokens, and [batch, channels, size] of its images.
TOKENS = [(256, 1280), (1024, 640), (1024, 1280), (4096, 640), (77, 2048), (16384, 640)]
# Of 512 px at batch 1, of 1024 px at batches 1 and 8.
FEED_FORWARDS = [(256, 1280), (1024, 640), (1024, 1280), (4096, 640), (8192, 1280), (32768, 640)]
IMAGES = [(1, 320, 64), (1, 640, 32), (1, 1280, 16), (1, 2560, 16), (1, 960, 64), (1, 320, 128), (4, 320, 128)]


def time_layer(bench: Bench, layer: Layer, in_time: Callable[[], bool]) -> dict:
    """Microseconds in fp16, and quantized: as the library selects, and with the best kernels of all and of sm80's."""
    call, count = bench.int8(layer, 8)
    hopper = torch.cuda.get_device_capability() == (9, 0)
    known = measure(bench, layer, 8, hopper, {}) if in_time() else {}
    best = {"best": known, "sm80": {choice: us for choice, us in known.items() if not choice[0].startswith("sm90")}}
    best = {name: min(times, key=times.get) for name, times in best.items() if times}

    def with_kernel(choice: Choice) -> Callable[[int], object]:
        def forced_call(i: int) -> object:
            with forced(*choice):
                return call(i)

        return forced_call

    calls = {"fp16": bench.float16(layer), "w8a8": (call, count)}
    calls |= {name: (with_kernel(choice), count) for name, choice in best.items()}
    if isinstance(layer, Linear):  # a plan of W4A8 leaves convolutions at 8 bits
        calls["w4a8"] = bench.int8(layer, 4)
    us = bench.try_in_turn(calls, f"{layer}, ")
    if not isinstance(layer, Linear) and "w8a8" in us:
        us["w4a8"] = us["w8a8"]
    return {"us": us, "kernels": {name: "{}:{}".format(*choice) for name, choice in best.items()}}


def sums(rows: list[dict]) -> dict:
    """Milliseconds of a step for linears, convolutions and all, and how many times faster than fp16.

    A layer that was not measured in a variant counts with its fp16 time, and ``missing`` says how many there are.
    """
    found = {}
    for kind in ("linear", "conv", "all"):
        own = [r for r in rows if kind in ("all", r["kind"])]
        total = found[kind] = {"fp16_ms": sum(r["count"] * r["us"]["fp16"] for r in own) / 1e3}
        for name in VARIANTS:
            total[f"{name}_ms"] = sum(r["count"] * r["us"].get(name, r["us"]["fp16"]) for r in own) / 1e3
            total[f"{name}_over_fp16"] = total["fp16_ms"] / total[f"{name}_ms"]
            total[f"{name}_missing"] = sum(r["count"] for r in own if name not in r["us"])
    return found


def quantizers(bench: Bench) -> list[dict]:
    """Microseconds of the quantizers, fused or not, and of the floating operation that each of them replaces."""
    ops, rows = torch.ops.mixdq_ao, []
    static = (torch.tensor([0.025], device="cuda"), torch.tensor([-11.0], device="cuda"), 8)

    def add(name: str, moved: int, ours: Callable, floating: Callable | None = None) -> None:
        count = max(8, min(100, int(15_000 / (3 + moved / 2e6))))
        us = bench.try_us(name, lambda i: ours(), count)
        other = None if floating is None else bench.time_us(lambda i: floating(), count)
        if us is not None:
            rows.append({"name": name, "us": us, "gb_per_s": moved / us / 1e3, "torch_fp16_us": other})

    def product(m: int, c: int) -> None:
        """A feed-forward's first layer with GEGLU at its end, and as two kernels."""
        f, x = 4 * c, normal_codes(m * c).view(m, c)
        weights = itertools.cycle(bench.weights(bench.codes, (2 * f, c), 100))
        alpha, bias = torch.full((1, 2 * f), 1e-4, device="cuda"), half(2 * f)
        rest = alpha, bias.float(), bias, 8, [c], torch.float16
        moved = m * (c + f) + 2 * f * c
        add(
            f"product with GEGLU {m} x {c} -> {f}",
            moved,
            lambda: ops.linear_int8_geglu(x, next(weights), *rest, *static),
        )
        add(
            f"product, then GEGLU {m} x {c} -> {f}",
            moved + 8 * m * f,
            lambda: ops.geglu_quantize(ops.linear_int8(x, next(weights), *rest), *static, [f]),
        )

    def half(*shape) -> torch.Tensor:
        return torch.randn(shape, dtype=torch.float16, device="cuda")

    for m, c in TOKENS:
        x, wide, weight, bias = half(m, c), half(m, 8 * c), half(c), half(c)
        act, f = (*static, [c]), 4 * c
        add(f"static {m} x {c}", 3 * m * c, lambda x=x, a=act: ops.quantize(x, *a, None))
        add(f"per token {m} x {c}", 3 * m * c, lambda x=x, c=c: ops.quantize_per_token(x, 8, [c]))
        add(
            f"LayerNorm {m} x {c}",
            3 * m * c,
            lambda x=x, w=weight, b=bias, a=act: ops.layer_norm_quantize(x, w, b, 1e-5, *a),
            lambda x=x, w=weight, b=bias: F.layer_norm(x, w.shape, w, b),
        )
        add(
            f"GEGLU {m} x {2 * f} -> {f}",
            m * f * 5,
            lambda x=wide, f=f: ops.geglu_quantize(x, *static, [f]),
            lambda x=wide, f=f: x[:, :f] * F.gelu(x[:, f:]),
        )
    for m, c in FEED_FORWARDS:
        product(m, c)
    for batch, c, size in IMAGES:
        x, weight, bias = half(batch, c, size, size).contiguous(memory_format=torch.channels_last), half(c), half(c)
        name, act, moved = f"{batch} x {c} x {size}^2", (*static, [c]), 3 * batch * c * size**2
        add(f"static, padded {name}", moved, lambda x=x, a=act: ops.quantize(x, *a, (1, 1, 1, 1)))
        add(
            f"GroupNorm, SiLU, padded {name}",
            moved + 2 * x.numel(),
            lambda x=x, w=weight, b=bias, a=act: ops.group_norm_quantize(x, 32, w, b, 1e-5, True, *a, (1, 1, 1, 1)),
            lambda x=x, w=weight, b=bias: F.silu(F.group_norm(x, 32, w, b, 1e-5)),
        )
    return rows


def show(console: Console, results: dict) -> None:
    for case, found in results["cases"].items():
        table = Table(title=f"{case}: microseconds of one launch")
        variants = [heading for name in VARIANTS for heading in (HEADINGS.get(name, name), "x")]
        chosen = [f"{name} kernel" for name in CHOSEN]
        for heading in ("layer", "count", "fp16", *variants, "TOPS", *chosen):
            table.add_column(heading, justify="left" if heading in ("layer", *chosen) else "right")
        for row in sorted(found["layers"], key=lambda r: -r["count"] * r["us"]["fp16"]):
            us = row["us"]
            cells = [v for n in VARIANTS for v in ((f"{us[n]:.2f}", f"{us['fp16'] / us[n]:.2f}") if n in us else "--")]
            tops = f"{row['flops'] / us['w8a8'] / 1e6:.0f}" if "w8a8" in us else "-"
            names = [row["kernels"].get(name, "-").removesuffix(":1") for name in CHOSEN]
            table.add_row(row["layer"], str(row["count"]), f"{us['fp16']:.2f}", *cells, tops, *names)
        console.print(table)
    table = Table(title="A quantizer's launch")
    for heading in ("quantizer", "us", "GB/s", "torch fp16 alone, us"):
        table.add_column(heading, justify="left" if heading == "quantizer" else "right")
    for row in results["quantizers"]:
        other = "" if row["torch_fp16_us"] is None else f"{row['torch_fp16_us']:.2f}"
        table.add_row(row["name"], f"{row['us']:.2f}", f"{row['gb_per_s']:.0f}", other)
    console.print(table)
    table = Table(title=f"A UNet step on {results['gpu']}: sums of the layers by themselves")
    for heading in ("case", "layers", "fp16 ms", *(t for n in VARIANTS for t in (f"{n} ms", "over fp16"))):
        table.add_column(heading, justify="left" if heading in ("case", "layers") else "right")
    for case, found in results["cases"].items():
        for kind, total in found["sums"].items():
            cells = [v for n in VARIANTS for v in (f"{total[f'{n}_ms']:.3f}", f"{total[f'{n}_over_fp16']:.2f}x")]
            table.add_row(case, kind, f"{total['fp16_ms']:.3f}", *cells)
    console.print(table)


def main(
    out: Annotated[Path, typer.Option(help="Where the JSON goes.")],
    seconds: Annotated[float, typer.Option(help="After that much time only the library's choice is measured.")] = 120,
) -> None:
    """Measure SDXL's layers and the quantizers on this GPU, print tables and write JSON."""
    require_gpu()
    torch.manual_seed(0)
    start = time.monotonic()
    results = {**environment(), "cases": {}, "quantizers": []}
    todo = {case: layers(*size) for case, size in CASES.items()}

    def save() -> None:
        for case, found in results["cases"].items():
            if len(found["layers"]) == len(todo[case]):  # a part of a step is no step
                found["sums"] = sums(found["layers"])
        results["seconds"] = round(time.monotonic() - start, 1)
        write_text(out, json.dumps(results, indent=1) + "\n")

    with torch.inference_mode():
        bench = Bench()
        bench.warm_up()
        progress = Progress(sum(map(len, todo.values())) + 1, save)
        results["quantizers"] = quantizers(bench)
        progress.step()
        known: dict[Layer, dict] = {}  # small layers are the same at every size
        for case, counts in todo.items():
            rows = results["cases"].setdefault(case, {"sums": {}, "layers": []})["layers"]
            for layer, count in counts.items():
                if layer not in known:
                    known[layer] = time_layer(bench, layer, lambda: time.monotonic() < start + seconds)
                kind = "linear" if isinstance(layer, Linear) else "conv"
                rows.append({"layer": str(layer), "kind": kind, "count": count, "flops": layer.flops, **known[layer]})
                progress.step()
    show(Console(width=180), results)


if __name__ == "__main__":
    typer.run(main)
