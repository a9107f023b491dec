"""Options that several commands share, and what they stand for."""

from pathlib import Path
from typing import Annotated

import typer

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for programs instead of a table.")]
DeviceOption = Annotated[str, typer.Option(help="cpu or cuda.", show_default="cuda if there is one")]
PipelineArgument = Annotated[
    str, typer.Argument(help="A diffusers pipeline folder, or tiny-sdxl: the small model that comes along.")
]
PromptsOption = Annotated[
    Path | None,
    typer.Option(help="A text file, one prompt a line, or a COCO captions JSON.", show_default="what is built in"),
]
ALL_PROMPTS = "all, or 64 of tiny-sdxl's"
StepsOption = Annotated[int, typer.Option(min=1, help="Denoising steps.")]
GuidanceOption = Annotated[float, typer.Option(help="Guidance scale; 0 for few-step models.")]
BatchOption = Annotated[int, typer.Option(min=1, help="Pictures at a time.")]
SeedsOption = Annotated[int, typer.Option(min=1, help="Evaluate at seeds 0, 1, ... up to so many.")]


def the_pipeline(name: str, device: str, dtype=None):
    import torch

    from mixdq_ao._quiet import quiet_pipelines
    from mixdq_ao.pipelines import load_pipeline

    quiet_pipelines()
    options = {} if dtype is None else {"dtype": dtype}
    return load_pipeline(name, device or ("cuda" if torch.cuda.is_available() else "cpu"), **options)


def the_prompts(
    pipeline: str, path: Path | None, count: int | None, held_out: bool = False, at_most: bool = False
) -> list[str]:
    """The first ``count`` prompts; with ``at_most`` it is no error that there are fewer."""
    from mixdq_ao.pipelines import TINY
    from mixdq_ao.prompts import built_in_prompts, read_prompts

    scenes = path is None and pipeline == TINY  # of which there are as many as are asked for
    asked = None if at_most and not scenes else count
    if path is not None:
        return read_prompts(path, asked)[:count]
    return built_in_prompts(asked or (64 if scenes else None), scenes=scenes, held_out=held_out)[:count]
