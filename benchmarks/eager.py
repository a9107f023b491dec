"""Eager calls without a CUDA graph, for which the host's time counts: SDXL's UNet and single layers, fp16 and W8A8.

    python benchmarks/eager.py --out eager.json

Hosts are noisy, by a factor over minutes. So calls of fp16 and of W8A8 take turns, and what counts is the median of the
ratios of neighbours; half of all ratios lie between the quartiles that are shown with it.
"""

import contextlib
import copy
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import typer
from gpu import environment, require_gpu
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from mixdq_ao.bench.run import warm_step
from mixdq_ao.bench.timing import timed
from mixdq_ao.files import write_text
from mixdq_ao.tensor import MixDQTensor

FLOAT, OURS = "fp16", "W8A8"
MODULE_CALLS = 300  # of a layer, behind one another: the GPU is done with one before the host has launched the next


def layers() -> dict[str, tuple[nn.Module, Tensor, bool]]:
    """Layers of SDXL at 512 px by what is shown, their inputs, and whether the first token's output is known."""

    def rows(m: int, k: int, n: int, bos: bool = False) -> tuple[nn.Module, Tensor, bool]:
        return nn.Linear(k, n, device="cuda", dtype=torch.float16), torch.randn(1, m, k, device="cuda").half(), bos

    conv = nn.Conv2d(640, 640, 3, padding=1, device="cuda", dtype=torch.float16)
    image = torch.randn(1, 640, 32, 32, device="cuda").half()
    last = torch.channels_last
    return {
        "linear, 256 x 1280 -> 1280": rows(256, 1280, 1280),
        "linear, 256 x 5120 -> 1280": rows(256, 5120, 1280),
        "linear, 256 x 1280 -> 10240": rows(256, 1280, 10240),
        "linear, 1024 x 640 -> 640": rows(1024, 640, 640),
        "linear of a text, 77 x 2048 -> 1280": rows(77, 2048, 1280, bos=True),
        "conv2d, 32^2 x 640 -> 640": (conv.to(memory_format=last), image.to(memory_format=last), False),
    }


def quantized(layer: nn.Module, bos: Tensor | None) -> nn.Module:
    """A copy with a W8A8 weight, and the output of a known token."""
    known = {} if bos is None else {"bos_input": bos, "bos_output": layer(bos)}
    weight = MixDQTensor.from_float(layer.weight, act_scale=0.03, act_zero_point=3.0, **known)
    ours = copy.deepcopy(layer)
    ours.weight = nn.Parameter(weight, requires_grad=False)
    return ours


def host_us(layer: nn.Module, x: Tensor) -> float:
    """Microseconds of the host for one call."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(MODULE_CALLS):
        layer(x)
    seconds = time.perf_counter() - start
    torch.cuda.synchronize()
    return 1e6 * seconds / MODULE_CALLS


def in_turn(calls: dict[str, Callable[[], float]], rounds: int) -> dict:
    """The median of each, and with quartiles that of fp16's over W8A8's of the same round. Who begins alternates."""
    times = {name: [] for name in calls}
    for i in range(rounds):
        for name in sorted(calls, reverse=i % 2 == 1):
            times[name].append(calls[name]())
    ratios = [a / b for a, b in zip(times[FLOAT], times[OURS], strict=True)]
    low, ratio, high = statistics.quantiles(ratios, method="inclusive")
    return {name: statistics.median(t) for name, t in times.items()} | {"ratio": ratio, "quartiles": [low, high]}


def unets(rounds: int, layers: int | None) -> dict:
    """Milliseconds of a call until the GPU is done."""
    device = torch.device("cuda")
    with contextlib.ExitStack() as stack:
        steps = {}
        for name, variant in ((FLOAT, "float"), (OURS, "w8a8-eager")):
            step = warm_step("sdxl", variant, 1, size=512, device="cuda", layers=layers)
            steps[name], _ = stack.enter_context(step)
        return in_turn({name: lambda s=s: timed(s, device)[0] for name, s in steps.items()}, rounds)


def show(console: Console, found: dict) -> None:
    table = Table("eager calls, batch 1", FLOAT, OURS, "over fp16", title="Time of the host")
    for column in table.columns[1:]:
        column.justify = "right"

    def add(name: str, times: dict, unit: str) -> None:
        low, high = times["quartiles"]
        spread = f"{times['ratio']:.2f}x ({low:.2f} to {high:.2f})"
        table.add_row(name, *(f"{times[v]:.1f} {unit}" for v in (FLOAT, OURS)), spread)

    for name, times in found["layers"].items():
        add(name, times, "us")
    add("SDXL's UNet, 512 px", found["unet"], "ms")
    console.print(table)


def main(
    out: Annotated[Path, typer.Option(help="Where the JSON goes.")],
    rounds: Annotated[int, typer.Option(min=2, help="Calls of each UNet; half as many rounds for each layer.")] = 100,
    unet_layers: Annotated[
        int | None, typer.Option(min=1, help="Transformer layers of each block of the UNet; all without.")
    ] = None,
) -> None:
    """Measure on this GPU and its host, print a table and write JSON."""
    require_gpu()
    found = {"environment": environment(), "layers": {}}
    with torch.no_grad():
        for name, (layer, x, bos) in layers().items():
            both = {FLOAT: layer, OURS: quantized(layer, x[0, 0] if bos else None)}
            for module in both.values():
                host_us(module, x)
            calls = {variant: lambda m=module, x=x: host_us(m, x) for variant, module in both.items()}
            found["layers"][name] = in_turn(calls, max(2, rounds // 2))
            # No bar, whose thread would take turns as well.
            print(f"{name}: {found['layers'][name]['ratio']:.2f}x", flush=True)
    print(f"SDXL's UNet, {rounds} calls in fp16 and as many in W8A8", flush=True)
    found["unet"] = unets(rounds, unet_layers)
    write_text(out, json.dumps(found, indent=1) + "\n")
    show(Console(width=100), found)


if __name__ == "__main__":
    typer.run(main)
