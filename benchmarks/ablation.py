"""What each part of the method brings on the small model: naive, with BOS handling, with mixed precision.

    python benchmarks/ablation.py

Writes benchmarks/results/ablation.json and prints it as a table. Quality is against the float32 pictures of the same
captions and seeds; `accuracy` is that of captions read back from the pictures.
"""

import datetime
import json
import platform
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from mixdq_ao import MixDQConfig, calibrate
from mixdq_ao.demo import mixed_plan
from mixdq_ao.evaluate import evaluate
from mixdq_ao.files import write_text
from mixdq_ao.prompts import built_in_prompts
from mixdq_ao.scenes import held_out_captions
from mixdq_ao.tiny_model import load_tiny_sdxl

RESULTS = Path(__file__).parent / "results"


def main(
    captions: Annotated[int, typer.Option(help="Held-out captions to draw.")] = 64,
    calibration: Annotated[int, typer.Option(help="Captions to calibrate with.")] = 32,
    steps: Annotated[int, typer.Option(help="Denoising steps.")] = 4,
    seeds: Annotated[int, typer.Option(help="Seeds to draw each caption with.")] = 1,
    out: Annotated[Path, typer.Option(help="JSON file to write.")] = RESULTS / "ablation.json",
) -> None:
    """Measure the ablation and write it down."""
    pipe = load_tiny_sdxl()
    prompts = built_in_prompts(calibration, scenes=True)
    naive = calibrate(pipe, prompts, num_inference_steps=steps, bos=False)
    aware = calibrate(pipe, prompts, num_inference_steps=steps)
    mixed = mixed_plan(pipe.unet)
    variants = {
        "W8A8 naive": MixDQConfig(naive),
        "W8A8 + BOS": MixDQConfig(aware),
        "W4A8 naive": MixDQConfig(naive, weight_bits=4),
        "W4A8 + BOS": MixDQConfig(aware, weight_bits=4),
        "W4/8A8 naive": MixDQConfig(naive, weight_bits=mixed),
        "W4/8A8 + BOS": MixDQConfig(aware, weight_bits=mixed),
        "W8A4 naive": MixDQConfig(naive, act_bits=4),
        "W8A4 + BOS": MixDQConfig(aware, act_bits=4),
    }
    result = evaluate(
        pipe, variants, held_out_captions(captions), seeds=range(seeds), num_inference_steps=steps, pictures=0
    )
    content = {
        "command": f"python benchmarks/ablation.py --captions {captions} --calibration {calibration} --steps {steps} "
        f"--seeds {seeds}",
        "date": datetime.date.today().isoformat(),
        "machine": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        **result.to_json(),
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, json.dumps(content, indent=1) + "\n")
    table = Table(*result.header())
    for row in result.table():
        table.add_row(*row)
    Console().print(table)
    print(f"written to {out}")


if __name__ == "__main__":
    typer.run(main)
