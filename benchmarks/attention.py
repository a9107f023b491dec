"""Times of torch's exact attention backends and ours on every size of SDXL, and which of them ``auto`` takes.

Queries, keys and values are the views that merged layers give. A launch is timed in a CUDA graph, beside what
``mixdq_ao.compile`` measures to choose: the choice should be the same.

    python benchmarks/attention.py --out attention.json
"""

import json
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from gpu import Bench, environment
from rich.console import Console
from rich.table import Table
from sdxl_shapes import HEAD_CHANNELS, Attention, attentions

from mixdq_ao import attention
from mixdq_ao.files import write_text

CASES = {f"{pixels} px, batch {batch}": (pixels, batch) for pixels in (512, 1024) for batch in (1, 2, 4, 8)}
TORCH = "torch's choice"
COLUMNS = (*attention.BACKENDS[:-1], TORCH)
MERGED_TEXT_LAYERS = 20


def inputs(one: Attention) -> list[torch.Tensor]:
    """Q, K and V of one merged product, or Q, and K and V of the text among those of other blocks."""

    def product(tokens: int, layers: int) -> list[torch.Tensor]:
        shape = (one.batch, tokens, layers, one.heads, HEAD_CHANNELS)
        return [x.transpose(1, 2) for x in torch.randn(shape, dtype=torch.float16, device="cuda").unbind(2)]

    if one.tokens == one.keys:
        return product(one.tokens, 3)
    return product(one.tokens, 1) + product(one.keys, MERGED_TEXT_LAYERS)[:2]


def time_attention(bench: Bench, one: Attention) -> dict:
    """Microseconds in a graph by backend, and as ``auto`` measures them."""
    x = inputs(one)
    quick, auto = {name: 1e3 * ms for name, ms in attention.timings(*x).items()}, attention.fastest(*x)
    count = max(8, min(200, int(15_000 / (3 + one.flops / 300e6))))
    ours = torch.ops.mixdq_ao.attention
    us = {name: bench.time_us(lambda i, name=name: ours(*x, None, name), count) for name in {*quick, auto}}
    us[TORCH] = bench.time_us(lambda i: F.scaled_dot_product_attention(*x), count)
    return {"us": us, "measured_by_auto": quick, "auto": auto}


def sums(rows: list[dict]) -> dict:
    """Milliseconds of a step with one backend for all sizes, with what ``auto`` takes, and with the best."""
    found = {}
    for name in COLUMNS:
        if all(name in r["us"] for r in rows):
            found[name] = sum(r["count"] * r["us"][name] for r in rows) / 1e3
    found["auto"] = sum(r["count"] * r["us"][r["auto"]] for r in rows) / 1e3
    found["best"] = sum(r["count"] * min(r["us"].values()) for r in rows) / 1e3
    return found


def show(console: Console, results: dict) -> None:
    for case, found in results["cases"].items():
        total = {name: f"{ms:.3f} ms" for name, ms in found["sums"].items()}
        table = Table(title=f"{case}: microseconds of one launch", show_footer=True)
        table.add_column("attention", "all of a step")
        for heading in ("count", *COLUMNS, "TFLOPS"):
            table.add_column(heading, total.get(heading, ""), justify="right")
        table.add_column("auto", total["auto"])
        for row in found["attentions"]:
            us = [f"{row['us'][name]:.2f}" if name in row["us"] else "--" for name in COLUMNS]
            tflops = f"{row['flops'] / min(row['us'].values()) / 1e6:.0f}"
            table.add_row(row["attention"], str(row["count"]), *us, tflops, row["auto"])
        console.print(table)


def main(out: Annotated[Path, typer.Option(help="Where the JSON goes.")]) -> None:
    """Measure SDXL's attention on this GPU, print tables and write JSON."""
    if not torch.cuda.is_available():
        raise SystemExit("This benchmark needs a CUDA device.")
    torch.manual_seed(0)
    results = {**environment(), "cudnn": torch.backends.cudnn.version(), "cases": {}}
    with torch.inference_mode():
        bench = Bench()
        bench.warm_up()
        for case, size in CASES.items():
            rows = [
                {"attention": str(one), "count": count, "flops": one.flops, **time_attention(bench, one)}
                for one, count in attentions(*size).items()
            ]
            results["cases"][case] = {"sums": sums(rows), "attentions": rows}
            write_text(out, json.dumps(results, indent=1) + "\n")
            print(f"{case}: done", flush=True)
    show(Console(width=150), results)


if __name__ == "__main__":
    typer.run(main)
