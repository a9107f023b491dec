"""The commands that turn one file into another, or show what it holds."""

import json as jsonlib
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from mixdq_ao.cli.options import JsonOption
from mixdq_ao.cli.printing import console
from mixdq_ao.errors import MixDQError


def convert(
    source: Annotated[Path, typer.Argument(help="The original project's ckpt.pth or new_ckpt.pth.")],
    out: Annotated[Path, typer.Argument(help="The safetensors file to write.")],
    weight_plan: Annotated[Path | None, typer.Option(help="Bit plan of the weights to carry along.")] = None,
    act_plan: Annotated[Path | None, typer.Option(help="Bit plan of the activations to carry along.")] = None,
    protect: Annotated[Path | None, typer.Option(help="List of layers that stay floating.")] = None,
    bos: Annotated[Path | None, typer.Option(help="The original's bos_pre_computed.pt.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace OUT if it exists.")] = False,
) -> None:
    """Turn the original project's pickled files into one safetensors file for MixDQConfig.

    Pickles are read as plain data only; nothing in them is run.
    """
    from mixdq_ao import legacy
    from mixdq_ao.files import writable_file
    from mixdq_ao.plan import BitPlan, read_names

    if out.is_file() and not force:
        raise MixDQError(f"{out} exists; give --force to replace it")
    writable_file(out)
    params = legacy.read_params(source)
    params.weight_plan = BitPlan.read(weight_plan) if weight_plan else params.weight_plan
    params.act_plan = BitPlan.read(act_plan) if act_plan else params.act_plan
    params.protect = read_names(protect) if protect else params.protect
    if bos:
        legacy.attach_bos(params, bos)
    params.save(out)
    console().print(f"{len(params.layers)} layers written to {out}", soft_wrap=True)


def inspect(
    file: Annotated[Path, typer.Argument(help="Quantization parameters, a quantized model, or an original file.")],
    json: JsonOption = False,
) -> None:
    """Show what a file holds: per layer bits and bytes, and totals."""
    from mixdq_ao.model_file import describe
    from mixdq_ao.summary import file_table

    description = describe(file)
    print(jsonlib.dumps(asdict(description), indent=1) if json else file_table(description))
