"""The whole method on the small model, with what each of its parts brings.

    python benchmarks/method.py

Runs ``auto`` with measured sensitivities and ablations, and writes method_tiny_sdxl.json and method_tiny_sdxl.html into
benchmarks/results. About ten minutes on two free cores; stopped at any point, the same command goes on where it was.
"""

from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from mixdq_ao.auto import RESULTS, Settings, auto
from mixdq_ao.files import write_text
from mixdq_ao.pipelines import TINY, load_pipeline
from mixdq_ao.prompts import built_in_prompts

ROOT = Path(__file__).resolve().parent.parent


def main(
    work: Annotated[Path, typer.Option(help="Folder for what is done so far.")] = ROOT / "build" / "method",
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = ROOT / "benchmarks" / "results",
    captions: Annotated[int, typer.Option(help="Held-out captions to evaluate on.")] = 256,
    prompts: Annotated[int, typer.Option(help="Captions to calibrate with.")] = 64,
    sensitivity_prompts: Annotated[int, typer.Option(help="Captions for each layer's sensitivity.")] = 4,
    seeds: Annotated[int, typer.Option(help="Seeds of the noise, 0, 1, ...")] = 3,
    budget: Annotated[float, typer.Option(help="Mean bits of the weights.")] = 4.0,
    threads: Annotated[int, typer.Option(help="Threads of torch.")] = 1,
) -> None:
    torch.set_num_threads(threads)
    result = auto(
        load_pipeline(TINY),
        built_in_prompts(prompts, scenes=True),
        built_in_prompts(captions, scenes=True, held_out=True),
        work,
        Settings(
            budget=budget,
            seeds=tuple(range(seeds)),
            cheap=False,
            sensitivity_prompts=sensitivity_prompts,
            ablations=True,
        ),
        title="The small SDXL model, quantized",
    )
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / "method_tiny_sdxl.json", (work / RESULTS).read_text(encoding="utf-8"))
    write_text(out / "method_tiny_sdxl.html", result.report.read_text(encoding="utf-8"))
    for line in result.findings:
        Console().print(line, soft_wrap=True)


if __name__ == "__main__":
    typer.run(main)
