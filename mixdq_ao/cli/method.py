"""The commands of the method's stages, and the one that runs them all."""

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
from mixdq_ao.cli.printing import console, print_evaluation, print_table
from mixdq_ao.errors import MixDQError


def auto(
    pipeline: PipelineArgument,
    out: Annotated[Path, typer.Option(help="Folder for everything; the same command goes on from it.")],
    budget: Annotated[float, typer.Option(help="Mean bits of the weights.")] = 4.0,
    prompts: PromptsOption = None,
    prompt_count: Annotated[
        int | None, typer.Option(min=1, help="So many calibration prompts.", show_default=ALL_PROMPTS)
    ] = None,
    captions: PromptsOption = None,
    caption_count: Annotated[
        int | None, typer.Option(min=1, help="So many captions to evaluate on.", show_default=ALL_PROMPTS)
    ] = None,
    seeds: SeedsOption = 3,
    steps: StepsOption = 1,
    guidance_scale: GuidanceOption = 0.0,
    batch_size: BatchOption = 8,
    method: Annotated[str, typer.Option(help="Activation ranges: minmax, ema, percentile or mse.")] = "minmax",
    full_sensitivity: Annotated[
        bool, typer.Option("--full-sensitivity", help="Measure each layer by itself instead of predicting it.")
    ] = False,
    rounding: Annotated[bool, typer.Option(help="Round weights below 8 bits by GPTQ.")] = True,
    ablations: Annotated[
        bool, typer.Option("--ablations", help="Measure what each part of the method brings.")
    ] = False,
    device: DeviceOption = "",
) -> None:
    """Do everything: calibrate, sensitivity, allocate, choose, evaluate, save the quantized model, write a report.

    Stopped at any point, the same command goes on where it was.
    """
    from mixdq_ao.auto import Settings
    from mixdq_ao.auto import auto as run
    from mixdq_ao.extras import needed
    from mixdq_ao.files import writable_folder

    for package in ("scipy", "jinja2", "matplotlib"):
        needed(package, "auto")
    writable_folder(out)
    settings = Settings(
        budget=budget,
        seeds=tuple(range(seeds)),
        num_inference_steps=steps,
        guidance_scale=guidance_scale,
        batch_size=batch_size,
        method=method,
        cheap=not full_sensitivity,
        rounding=rounding,
        ablations=ablations,
    )
    result = run(
        the_pipeline(pipeline, device),
        the_prompts(pipeline, prompts, prompt_count),
        the_prompts(pipeline, captions, caption_count, held_out=True),
        out,
        settings,
        title=f"{pipeline} at {budget:g} bits",
    )
    print_evaluation(result.evaluation)
    for finding in result.findings:
        console().print(finding, soft_wrap=True)
    console().print(f"Model: {result.model}\nReport: {result.report}", soft_wrap=True)


def calibrate(
    pipeline: PipelineArgument,
    out: Annotated[Path, typer.Argument(help="The safetensors file of parameters to write.")],
    prompts: PromptsOption = None,
    count: Annotated[int | None, typer.Option(min=1, help="So many prompts.", show_default=ALL_PROMPTS)] = None,
    method: Annotated[str, typer.Option(help="Activation ranges: minmax, ema, percentile or mse.")] = "minmax",
    weight_method: Annotated[str, typer.Option(help="Weight scales: minmax or mse.")] = "mse",
    steps: StepsOption = 1,
    guidance_scale: GuidanceOption = 0.0,
    batch_size: BatchOption = 8,
    seed: Annotated[int, typer.Option(help="Seed of the noise.")] = 0,
    bos: Annotated[bool, typer.Option(help="Treat the text encoders' first token apart.")] = True,
    device: DeviceOption = "",
) -> None:
    """Run a pipeline, watch what enters each layer, and write scales and zero points for every width.

    Stopped at any point, the same command goes on where it was: OUT.state holds what was seen so far.
    """
    from mixdq_ao.calibrate import calibrate as run
    from mixdq_ao.files import writable_file

    state = writable_file(f"{out}.state")
    writable_file(out)
    params = run(
        the_pipeline(pipeline, device),
        the_prompts(pipeline, prompts, count),
        method=method,
        weight_method=weight_method,
        num_inference_steps=steps,
        guidance_scale=guidance_scale,
        batch_size=batch_size,
        seed=seed,
        bos=bos,
        state=state,
    )
    params.save(out)
    state.unlink(missing_ok=True)  # the same command, run twice at one time, removes it twice
    console().print(f"{len(params.layers)} layers written to {out}", soft_wrap=True)


def sensitivity(
    pipeline: PipelineArgument,
    params: Annotated[Path, typer.Option(help="Quantization parameters, from calibrate or convert.")],
    out: Annotated[Path, typer.Option(help="Folder for the tables, and for what is done so far.")],
    prompts: PromptsOption = None,
    count: Annotated[int, typer.Option(min=1, help="At most so many prompts.")] = 16,
    cheap: Annotated[bool, typer.Option("--cheap", help="Predict from gradients instead of measuring.")] = False,
    weights: Annotated[bool, typer.Option(help="Measure weights, with floating activations.")] = True,
    acts: Annotated[bool, typer.Option(help="Measure activations, with floating weights.")] = True,
    both_metrics: Annotated[bool, typer.Option("--both-metrics", help="SSIM of quality layers, too.")] = False,
    probes: Annotated[int, typer.Option(min=1, help="Random directions for each prompt, with --cheap.")] = 4,
    steps: StepsOption = 1,
    guidance_scale: GuidanceOption = 0.0,
    batch_size: BatchOption = 8,
    seed: Annotated[int, typer.Option(help="Seed of the noise.")] = 0,
    device: DeviceOption = "",
) -> None:
    """Measure what quantizing each layer alone does, at every width, and write score and size tables for allocate.

    Stopped at any point, the same command goes on where it was. On several GPUs: accelerate launch --multi_gpu
    --num_processes N -m mixdq_ao sensitivity ...
    """
    import torch

    from mixdq_ao import legacy
    from mixdq_ao.files import writable_folder
    from mixdq_ao.sensitivity import sensitivity as run

    kinds = [kind for kind, wanted in (("weight", weights), ("act", acts)) if wanted]
    if not kinds:
        raise MixDQError("nothing to measure: leave out --no-weights or --no-acts")
    writable_folder(out)
    # The gradients of the cheap mode leave the range of float16.
    half = torch.bfloat16 if cheap and device != "cpu" and torch.cuda.is_available() else None
    result = run(
        the_pipeline(pipeline, device, half),
        legacy.read_params(params),
        the_prompts(pipeline, prompts, count, at_most=True),
        out,
        kinds=kinds,
        metrics="both" if both_metrics else "decoupled",
        cheap=cheap,
        probes=probes,
        num_inference_steps=steps,
        guidance_scale=guidance_scale,
        batch_size=batch_size,
        seed=seed,
    )
    rows = [
        (kind, metric, str(len(scores)), *(f"{v:.4g}" for v in spread), f"{result.noise_floor[metric]:.6g}")
        for kind, metrics in result.scores.items()
        for metric, scores in metrics.items()
        for spread in [_spread([min(by_bits.values()) for by_bits in scores.values()])]
    ]
    title = "Scores of layers, at the worst width of each"
    print_table(title, ("", "metric", "layers", "lowest", "median", "highest", "noise floor"), rows)
    console().print(f"Tables written to {out} after {result.seconds:.0f} s", soft_wrap=True)


def _spread(values: list[float]) -> tuple[float, float, float]:
    import statistics

    return min(values), statistics.median(values), max(values)


def allocate(
    quality_scores: Annotated[Path, typer.Option(help="Score table of the quality layers: SQNR in dB.")],
    sizes: Annotated[Path, typer.Option(help="Size table of the layers to allocate.")],
    out: Annotated[Path, typer.Option(help="The plan to write, .yaml or .json.")],
    content_scores: Annotated[
        Path | None, typer.Option(help="Score table of the content layers: SSIM of pictures.")
    ] = None,
    content_bits: Annotated[float | None, typer.Option(help="Upper edge of the content layers' mean bits.")] = None,
    quality_bits: Annotated[float | None, typer.Option(help="Upper edge of the quality layers' mean bits.")] = None,
    budget: Annotated[float | None, typer.Option(help="Mean bits of all layers.")] = None,
    budget_mib: Annotated[float | None, typer.Option(help="MiB for all codes, scales and biases not counted.")] = None,
    size_unit: Annotated[
        float | None, typer.Option(help="Weights that a size of 1 stands for: 11520 in the original's tables.")
    ] = None,
    joint: Annotated[bool, typer.Option("--joint", help="One program for all layers instead of one a group.")] = False,
    kind: Annotated[str, typer.Option(help="weight or act.")] = "weight",
    family: Annotated[
        str, typer.Option(help="Whose names tell content layers: sdxl or sd; generic has none.")
    ] = "sdxl",
    protect: Annotated[Path | None, typer.Option(help="List of layers that stay floating.")] = None,
    pareto: Annotated[Path | None, typer.Option(help="PNG of the sweep's allocations.")] = None,
    json: JsonOption = False,
) -> None:
    """Choose a width for each layer from score tables, within a budget.

    Give --content-bits and --quality-bits, or --budget, or --budget-mib. The last two try many ratios of the groups'
    budgets and take the plan with the least summed error energy.
    """
    from mixdq_ao import allocate as library
    from mixdq_ao import families
    from mixdq_ao.extras import needed
    from mixdq_ao.files import writable_file
    from mixdq_ao.plan import read_names
    from mixdq_ao.tables import read_scores, read_sizes

    needed("scipy", "allocate")
    writable_file(out)
    if pareto:
        needed("matplotlib", "--pareto")
        writable_file(pareto)
    if size_unit is not None and budget_mib is None:
        raise MixDQError("--size-unit turns the MiB of --budget-mib into mean bits; give --budget-mib, too, or neither")
    if family not in families.FAMILIES:
        raise MixDQError(f"--family must be one of {', '.join(families.FAMILIES)}; found {family!r}")
    result = library.run(
        library.problem(
            read_scores(content_scores) if content_scores else None,
            read_scores(quality_scores),
            read_sizes(sizes),
            kind=kind,
            family=families.FAMILIES[family],
            protect=read_names(protect) if protect else (),
        ),
        group_bits={
            name: bits
            for name, bits in ((library.CONTENT, content_bits), (library.QUALITY, quality_bits))
            if bits is not None
        },
        budget=budget,
        budget_bytes=None if budget_mib is None else budget_mib * 2**20,
        size_unit=size_unit,
        one_scale=joint,
        progress=False if json else None,
    )
    result.chosen.plan.write(out)
    if pareto:
        library.plot_front(result.points, pareto, result.chosen)
    if json:
        print(jsonlib.dumps(library.as_json(result), indent=1))
        return
    print_table("", library.HEADER, [library.cells(a, a is result.chosen) for a in result.points])
    console().print(f"{len(result.chosen.plan)} layers written to {out}", soft_wrap=True)
