"""CPU speed of W8A8 against fp32 and bf16: an SDXL-type UNet, its layers, and what a call costs beyond its arithmetic.

All of it in one process, one measurement of each in turn and then again, so that other load on the machine falls on
all alike. A baseline is the faster of its two memory formats.

    python benchmarks/cpu.py            a UNet of SDXL's blocks with fewer transformer layers, 512 px
    python benchmarks/cpu.py --full     the UNet of SDXL, 512 px (22 GB of memory)
"""

import copy
import json
import os
import platform
import statistics
import time
from datetime import date
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import nn

from mixdq_ao.bench.models import SDXL_CONFIG
from mixdq_ao.tensor import MixDQTensor

RESULTS = Path(__file__).parent / "results" / "cpu.json"
LINEARS = [(4096, 640, 640), (1024, 1280, 1280), (1024, 1280, 10240), (1024, 5120, 1280), (77, 2048, 1280)]
CONVS = [(320, 320, 64, 3), (640, 640, 32, 3), (1280, 1280, 16, 3), (960, 320, 64, 1)]
STATIC = {"act_scale": 8 / 255, "act_zero_point": 0.0}


def interleaved(calls: dict, repeats: int, progress=None) -> dict[str, float]:
    """Median milliseconds of each of ``calls``, measured in turn after one warm-up."""
    times = {name: [] for name in calls}
    for i in range(repeats + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if i:
                times[name].append((time.perf_counter() - start) * 1e3)
            if progress:
                progress()
    return {name: statistics.median(t) for name, t in times.items()}


def against_baselines(calls: dict, repeats: int, progress=None) -> dict:
    """Medians of fp32, bf16 (each in its better memory format) and W8A8, and the two ratios."""
    medians = interleaved(calls, repeats, progress)
    best = {}
    for name, value in medians.items():
        dtype = name.split()[0]
        best[dtype] = min(value, best.get(dtype, value))
    best["w8a8"] = min(best["w8a8-fp32"], best["w8a8-bf16"])
    return {
        "milliseconds": {name: round(value, 3) for name, value in medians.items()},
        "over_fp32": round(best["fp32"] / best["w8a8"], 2),
        "over_bf16": round(best["bf16"] / best["w8a8"], 2),
    }


def layer_rows(repeats: int, tick) -> list[dict]:
    rows = []
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16}
    for m, k, n in LINEARS:
        weight, x = torch.randn(n, k), torch.randn(m, k)
        quantized = MixDQTensor.from_float(weight, **STATIC)
        calls = {}
        for name, dtype in dtypes.items():
            a, b = x.to(dtype), weight.to(dtype)
            calls[name] = lambda a=a, b=b: F.linear(a, b)
            calls[f"w8a8-{name}"] = lambda a=a, w=quantized: F.linear(a, w)
        rows.append({"layer": f"linear {m} x {k} -> {n}", **against_baselines(calls, repeats)})
        tick()
    for c, k, size, r in CONVS:
        weight, x = torch.randn(k, c, r, r), torch.randn(1, c, size, size)
        quantized = MixDQTensor.from_float(weight, **STATIC)
        calls = {}
        for name, dtype in dtypes.items():
            for form in (torch.contiguous_format, torch.channels_last):
                a, b = (t.to(dtype).contiguous(memory_format=form) for t in (x, weight))
                layout = "nhwc" if form is torch.channels_last else "nchw"
                calls[f"{name} {layout}"] = lambda a=a, b=b, p=r // 2: F.conv2d(a, b, padding=p)
            calls[f"w8a8-{name}"] = lambda a=a, w=quantized, p=r // 2: F.conv2d(a, w, padding=p)
        rows.append({"layer": f"conv {r}x{r} {c} -> {k}, {size} x {size}", **against_baselines(calls, repeats)})
        tick()
    return rows


def unet_and_inputs(full: bool) -> tuple[nn.Module, dict]:
    """SDXL's UNet with cheap random weights: the time does not depend on their values."""
    from diffusers import UNet2DConditionModel

    config = SDXL_CONFIG if full else {**SDXL_CONFIG, "transformer_layers_per_block": (1, 2, 2)}
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(config)
    unet = unet.to_empty(device="cpu").eval().requires_grad_(False)
    for parameter in unet.parameters():
        # Uniform with the variance that keeps activations near one.
        width = (3 / max(1, parameter[0].numel())) ** 0.5 if parameter.dim() > 1 else 0.1
        parameter.uniform_(-width, width)
    inputs = {
        "sample": torch.randn(1, 4, 64, 64),
        "timestep": torch.tensor(999.0),
        "encoder_hidden_states": torch.randn(1, 77, 2048),
        "added_cond_kwargs": {"text_embeds": torch.randn(1, 1280), "time_ids": torch.full((1, 6), 512.0)},
    }
    return unet, inputs


def variant(unet: nn.Module, convert) -> nn.Module:
    """A copy with every parameter converted; what ``convert`` returns unchanged is shared and not copied."""
    return copy.deepcopy(unet, {id(p): nn.Parameter(convert(p.data), requires_grad=False) for p in unet.parameters()})


def in_dtype(inputs, dtype, form):
    if isinstance(inputs, dict):
        return {name: in_dtype(value, dtype, form) for name, value in inputs.items()}
    return inputs.to(dtype, memory_format=form) if inputs.dim() == 4 else inputs.to(dtype)


def unet_row(full: bool, repeats: int, tick) -> dict:
    unet, inputs = unet_and_inputs(full)
    quantized = {
        m.weight.data_ptr(): MixDQTensor.from_float(m.weight, **STATIC)
        for m in unet.modules()
        if isinstance(m, (nn.Linear, nn.Conv2d))
    }
    calls = {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        model = variant(unet, lambda p, d=dtype: p.to(d))
        for layout, form in (("nchw", torch.contiguous_format), ("nhwc", torch.channels_last)):
            model = variant(model, lambda p, f=form: p.contiguous(memory_format=f) if p.dim() == 4 else p)
            calls[f"{name} {layout}"] = partial(model, **in_dtype(inputs, dtype, form))
        model = variant(unet, lambda p, d=dtype: quantized[p.data_ptr()] if p.data_ptr() in quantized else p.to(d))
        calls[f"w8a8-{name}"] = partial(model, **in_dtype(inputs, dtype, torch.channels_last))
    return against_baselines(calls, repeats, tick)


def dispatch_overhead(repeats: int = 2000) -> dict:
    """Microseconds of a tiny quantized linear beyond the arithmetic it calls, which is written out here."""
    x, weight, bias = torch.randn(4, 16), torch.randn(16, 16), torch.randn(16)
    w = MixDQTensor.from_float(weight, **STATIC)

    def arithmetic():
        t = torch.nan_to_num_(x.float() / w.act_scale, nan=0.0).add_(w.act_zero_point).round_().clamp_(-128, 127)
        xq = torch.empty(x.shape, dtype=torch.int8).copy_(t)
        out = torch.empty(4, 16)
        return out.copy_(torch._int_mm(xq, w.qdata.t())).mul_(w.alpha).add_(w.beta + bias)

    assert torch.equal(F.linear(x, w, bias), arithmetic())
    calls = {"linear": lambda: F.linear(x, w, bias), "arithmetic": arithmetic, "floating": lambda: F.linear(x, weight)}
    microseconds = {name: round(value * 1e3, 1) for name, value in interleaved(calls, repeats).items()}
    return {**microseconds, "overhead": round(microseconds["linear"] - microseconds["arithmetic"], 1)}


def cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def show(console: Console, results: dict) -> None:
    table = Table(title=f"{results['cpu']}, {results['threads']} threads, torch {results['torch']}")
    for heading in ("", "fp32 ms", "bf16 ms", "W8A8 ms", "over fp32", "over bf16"):
        table.add_column(heading, justify="left" if not heading else "right")
    for row in [*results["layers"], {"layer": results["unet"]["name"], **results["unet"]}]:
        best = {
            prefix: min(v for n, v in row["milliseconds"].items() if n.startswith(prefix))
            for prefix in ("fp32", "bf16", "w8a8")
        }
        cells = [f"{best[p]:.1f}" for p in best]
        table.add_row(row["layer"], *cells, f"{row['over_fp32']:.2f}x", f"{row['over_bf16']:.2f}x")
    console.print(table)
    console.print(f"A quantized linear costs {results['dispatch_us']['overhead']} us beyond its arithmetic.")


def main(
    full: Annotated[bool, typer.Option(help="The true UNet of SDXL, at 512 px; needs 22 GB of memory.")] = False,
    repeats: Annotated[int, typer.Option(min=1, help="Measurements of each; the median counts.")] = 5,
    output: Annotated[Path, typer.Option(help="Where the JSON goes.")] = RESULTS,
) -> None:
    """Measure W8A8 on this CPU against fp32 and bf16, print a table and write JSON."""
    torch.manual_seed(0)
    console = Console()
    # Drawn between measurements only: a thread that draws takes the interpreter from what is measured.
    with torch.inference_mode(), Progress(console=console, auto_refresh=False) as progress:

        def tick():
            progress.update(task, advance=1, refresh=True)

        overhead = dispatch_overhead()
        task = progress.add_task("layers", total=len(LINEARS) + len(CONVS))
        layers = layer_rows(repeats, tick)
        task = progress.add_task("UNet", total=6 * (repeats + 1))
        unet = unet_row(full, repeats, tick)
    name = "SDXL UNet, 512 px" if full else "SDXL UNet with transformer layers (1, 2, 2), 512 px"
    results = {
        "date": date.today().isoformat(),
        "cpu": cpu_model(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "repeats": repeats,
        "load": round(os.getloadavg()[0], 2),
        "dispatch_us": overhead,
        "layers": layers,
        "unet": {"name": name, **unet},
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    part = output.with_suffix(".part")
    part.write_text(json.dumps(results, indent=2) + "\n")
    part.replace(output)
    show(console, results)


if __name__ == "__main__":
    typer.run(main)
