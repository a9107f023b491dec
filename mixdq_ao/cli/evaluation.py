"""The commands that compare quantized variants with the floating model."""

import json as jsonlib
from pathlib import Path
from typing import Annotated

import typer

from mixdq_ao.cli.options import (
    ALL_PROMPTS,
    BatchOption,
    DeviceOption,
    GuidanceOption,
    JsonOption,
    PipelineArgument,
    PromptsOption,
    SeedsOption,
    StepsOption,
    the_pipeline,
    the_prompts,
)
from mixdq_ao.cli.printing import console, print_evaluation
from mixdq_ao.errors import MixDQError

CountOption = Annotated[int | None, typer.Option(min=1, help="So many captions.", show_default=ALL_PROMPTS)]
ParamsOption = Annotated[Path | None, typer.Option(help="Quantization parameters, from calibrate or convert.")]
PlanOption = Annotated[list[Path] | None, typer.Option(help="A bit plan of the weights to evaluate; repeatable.")]
BitsOption = Annotated[list[int] | None, typer.Option(help="A uniform width of the weights; repeatable.")]
ModelOption = Annotated[list[Path] | None, typer.Option(help="A quantized model in one file; repeatable.")]
ActBitsOption = Annotated[
    int | None, typer.Option(help="Width of the activations, 8 or 4, with --params.", show_default="8")
]
ExtraOption = Annotated[
    list[str] | None, typer.Option(help="lpips, fid, clip_score or image_reward, whose network is here; repeatable.")
]


def evaluate(
    pipeline: PipelineArgument,
    params: ParamsOption = None,
    plan: PlanOption = None,
    bits: BitsOption = None,
    model: ModelOption = None,
    act_bits: ActBitsOption = None,
    captions: PromptsOption = None,
    count: CountOption = None,
    seeds: SeedsOption = 1,
    extra: ExtraOption = None,
    steps: StepsOption = 1,
    guidance_scale: GuidanceOption = 0.0,
    batch_size: BatchOption = 8,
    out: Annotated[Path | None, typer.Option(help="Folder that keeps what is done, to go on from.")] = None,
    device: DeviceOption = "",
    json: JsonOption = False,
) -> None:
    """Measure quantized variants against the floating pictures of the same captions and noise."""
    result = _evaluation(
        pipeline, params, plan, bits, model, act_bits, captions, count, seeds, extra, steps, guidance_scale, batch_size,
        out, device, False if json else None,
    )  # fmt: skip
    if json:
        print(jsonlib.dumps(result.to_json(), indent=1))
        return
    print_evaluation(result)


def compare(
    pipeline: PipelineArgument,
    out: Annotated[Path, typer.Argument(help="The HTML file to write.")],
    params: ParamsOption = None,
    plan: PlanOption = None,
    bits: BitsOption = None,
    model: ModelOption = None,
    act_bits: ActBitsOption = None,
    captions: PromptsOption = None,
    count: CountOption = None,
    seeds: SeedsOption = 1,
    extra: ExtraOption = None,
    steps: StepsOption = 1,
    guidance_scale: GuidanceOption = 0.0,
    batch_size: BatchOption = 8,
    device: DeviceOption = "",
) -> None:
    """Write one HTML file that shows the pictures of quantized variants beside the floating ones."""
    from mixdq_ao.extras import needed
    from mixdq_ao.files import writable_file
    from mixdq_ao.report import write_report

    needed("jinja2", "compare")
    writable_file(out)
    result = _evaluation(
        pipeline, params, plan, bits, model, act_bits, captions, count, seeds, extra, steps, guidance_scale, batch_size,
        None, device, None,
    )  # fmt: skip
    write_report(out, result, title=f"{pipeline}, quantized")
    print_evaluation(result)
    console().print(f"Pictures side by side: {out}", soft_wrap=True)


def _evaluation(
    pipeline, params, plan, bits, model, act_bits, captions, count, seeds, extra, steps, guidance_scale, batch_size,
    out, device, progress,
):  # fmt: skip
    from mixdq_ao.evaluate import evaluate as run
    from mixdq_ao.files import writable_folder

    variants = _variants(params, plan or (), bits or (), model or (), act_bits)
    if out is not None:
        writable_folder(out)
    return run(
        the_pipeline(pipeline, device),
        variants,
        the_prompts(pipeline, captions, count, held_out=True),
        seeds=range(seeds),
        num_inference_steps=steps,
        guidance_scale=guidance_scale,
        batch_size=batch_size,
        extras=extra or (),
        out=out,
        progress=progress,
    )


def _variants(params: Path | None, plans, widths, models, act_bits: int | None) -> dict:
    """What to evaluate, by the name of its row."""
    from mixdq_ao import MixDQConfig
    from mixdq_ao.evaluate import check_names

    if params is None and (plans or widths):
        raise MixDQError("--plan and --bits need --params, which has the scales; give both")
    if models and not (plans or widths):
        for option, value in (("--params", params), ("--act-bits", act_bits)):
            if value is not None:
                raise MixDQError(f"{option} {value} changes no --model; give --plan or --bits, too, or leave it out")
    source, act_bits = None if params is None else str(params), 8 if act_bits is None else act_bits
    found = [(path.stem, f"--plan {path}", MixDQConfig(source, str(path), act_bits)) for path in plans]
    found += [(f"W{b}A{act_bits}", f"--bits {b}", MixDQConfig(source, b, act_bits)) for b in widths]
    found += [(path.stem, f"--model {path}", path) for path in models]
    if params is not None and not found:
        found = [(params.stem, f"--params {params}", MixDQConfig(source, act_bits=act_bits))]
    if not found:
        raise MixDQError("nothing to evaluate: give --params, with --plan or --bits if you like, or --model")
    origins: dict[str, str] = {}
    for name, origin, _ in found:
        if name in origins:
            raise MixDQError(
                f"{origins[name]} and {origin} would both be the row '{name}'; rename one, or leave it out"
            )
        origins[name] = origin
    check_names(origins)
    return {name: recipe for name, _, recipe in found}
