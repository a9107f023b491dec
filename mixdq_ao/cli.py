"""The mixdq-ao command: parses, calls the library, prints."""

import json as jsonlib
import logging
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from typer.core import TyperGroup

from mixdq_ao.errors import MixDQError

_GOES_ON = "the same command goes on where it was"
AFTER_A_STOP = {
    "calibrate": _GOES_ON,
    "sensitivity": _GOES_ON,
    "auto": _GOES_ON,
    "evaluate": f"{_GOES_ON} if it has --out",
    "bench": f"{_GOES_ON} if it has --out, with --resume added",
}


class _Commands(TyperGroup):
    def invoke(self, ctx):
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            after = AFTER_A_STOP.get(ctx.invoked_subcommand)
            print(f"stopped: {after}" if after else "stopped", file=sys.stderr)
            raise typer.Exit(130) from None


app = typer.Typer(
    cls=_Commands,
    help="Few-step text-to-image diffusion models, quantized: the same pictures in half or a quarter of the memory.",
    no_args_is_help=True,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for programs instead of a table.")]
DeviceOption = Annotated[str, typer.Option(help="cpu or cuda.", show_default="cuda if there is one")]


@app.command()
def demo(
    model: Annotated[
        str | None, typer.Option(help="A diffusers pipeline folder.", show_default="the small model that comes along")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for demo.png and demo.json.")] = Path("mixdq-ao-demo"),
    prompts: Annotated[Path | None, typer.Option(help="A text file, one prompt a line, or COCO captions.")] = None,
    pictures: Annotated[
        int | None, typer.Option(min=1, help="Pictures for each variant.", show_default="8, or all of --prompts")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps.")] = 4,
    seed: Annotated[int, typer.Option(help="Seed of the noise.")] = 0,
    device: DeviceOption = "",
    json: JsonOption = False,
) -> None:
    """Draw the same pictures in floating point and quantized, and compare memory, time and quality."""
    import torch

    from mixdq_ao import demo as library
    from mixdq_ao._quiet import quiet_pipelines
    from mixdq_ao.files import writable_folder
    from mixdq_ao.prompts import read_prompts

    quiet_pipelines()
    writable_folder(out)
    texts = read_prompts(prompts, pictures) if prompts else None
    result = library.run_demo(
        out,
        model=model,
        prompts=texts,
        pictures=pictures or 8,
        steps=steps,
        seed=seed,
        device=device or ("cuda" if torch.cuda.is_available() else "cpu"),
        progress=False if json else None,
    )
    if json:
        print(result.json.read_text(), end="")
        return
    title = f"{len(result.captions)} pictures, {steps} steps, on {result.device}; quality against float32"
    _print_table(title, library.HEADER, [library.cells(row) for row in result.rows])
    _console().print(f"Pictures side by side: {result.picture}\nNumbers: {result.json}", soft_wrap=True)


@app.command()
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
    _console().print(f"{len(params.layers)} layers written to {out}", soft_wrap=True)


@app.command()
def inspect(
    file: Annotated[Path, typer.Argument(help="Quantization parameters, a quantized model, or an original file.")],
    json: JsonOption = False,
) -> None:
    """Show what a file holds: per layer bits and bytes, and totals."""
    from mixdq_ao.model_file import describe
    from mixdq_ao.summary import file_table

    description = describe(file)
    print(jsonlib.dumps(asdict(description), indent=1) if json else file_table(description))


@app.command()
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
    family: Annotated[str, typer.Option(help="Whose names tell content layers: sdxl, sd or generic.")] = "sdxl",
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
    _print_table("", library.HEADER, [library.cells(a, a is result.chosen) for a in result.points])
    _console().print(f"{len(result.chosen.plan)} layers written to {out}", soft_wrap=True)


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


@app.command()
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
        _pipeline(pipeline, device),
        _prompts(pipeline, prompts, count),
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
    state.unlink()
    _console().print(f"{len(params.layers)} layers written to {out}", soft_wrap=True)


@app.command()
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
    --num_processes N -m mixdq_ao.cli sensitivity ...
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
        _pipeline(pipeline, device, half),
        legacy.read_params(params),
        _prompts(pipeline, prompts, count, at_most=True),
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
    _print_table(title, ("", "metric", "layers", "lowest", "median", "highest", "noise floor"), rows)
    _console().print(f"Tables written to {out} after {result.seconds:.0f} s", soft_wrap=True)


def _spread(values: list[float]) -> tuple[float, float, float]:
    import statistics

    return min(values), statistics.median(values), max(values)


@app.command()
def evaluate(
    pipeline: PipelineArgument,
    params: ParamsOption = None,
    plan: PlanOption = None,
    bits: BitsOption = None,
    model: ModelOption = None,
    act_bits: ActBitsOption = None,
    captions: PromptsOption = None,
    count: Annotated[int | None, typer.Option(min=1, help="So many captions.", show_default=ALL_PROMPTS)] = None,
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
        out, device, None if not json else False,
    )  # fmt: skip
    if json:
        print(jsonlib.dumps(result.to_json(), indent=1))
        return
    _print_evaluation(result)


@app.command()
def compare(
    pipeline: PipelineArgument,
    out: Annotated[Path, typer.Argument(help="The HTML file to write.")],
    params: ParamsOption = None,
    plan: PlanOption = None,
    bits: BitsOption = None,
    model: ModelOption = None,
    act_bits: ActBitsOption = None,
    captions: PromptsOption = None,
    count: Annotated[int | None, typer.Option(min=1, help="So many captions.", show_default=ALL_PROMPTS)] = None,
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
    _print_evaluation(result)
    _console().print(f"Pictures side by side: {out}", soft_wrap=True)


@app.command()
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
        _pipeline(pipeline, device),
        _prompts(pipeline, prompts, prompt_count),
        _prompts(pipeline, captions, caption_count, held_out=True),
        out,
        settings,
        title=f"{pipeline} at {budget:g} bits",
    )
    _print_evaluation(result.evaluation)
    for finding in result.findings:
        _console().print(finding, soft_wrap=True)
    _console().print(f"Model: {result.model}\nReport: {result.report}", soft_wrap=True)


def _pipeline(name: str, device: str, dtype=None):
    import torch

    from mixdq_ao._quiet import quiet_pipelines
    from mixdq_ao.pipelines import load_pipeline

    quiet_pipelines()
    options = {} if dtype is None else {"dtype": dtype}
    return load_pipeline(name, device or ("cuda" if torch.cuda.is_available() else "cpu"), **options)


def _prompts(
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
        _pipeline(pipeline, device),
        variants,
        _prompts(pipeline, captions, count, held_out=True),
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
    return {name: recipe for name, _, recipe in found}


def _print_evaluation(result) -> None:
    title = f"{len(result.captions)} captions, {len(result.seeds)} seeds; against the floating pictures"
    _print_table(title, result.header(), result.table())


@app.command()
def bench(
    model: Annotated[
        str,
        typer.Argument(help="sdxl or a UNet's config.json (random weights), tiny-sdxl, or a pipeline or UNet folder."),
    ] = "sdxl",
    size: Annotated[int, typer.Option(min=1, help="Side of the pictures in pixels.")] = 512,
    batch: Annotated[
        list[int] | None, typer.Option(min=1, help="Pictures at a time; repeatable.", show_default="1")
    ] = None,
    variants: Annotated[
        str, typer.Option(help="Names with commas between: float, w8a8, ...", show_default="all but max-autotune")
    ] = "",
    repeats: Annotated[int, typer.Option(min=1, help="Measurements of each; the median counts.")] = 20,
    warmup: Annotated[int, typer.Option(min=0, help="Calls or replays before them.")] = 3,
    out: Annotated[Path | None, typer.Option(help="JSON file, written after each variant.")] = None,
    plot: Annotated[Path | None, typer.Option(help="PNG file.")] = None,
    plan: Annotated[Path | None, typer.Option(help="A bit plan of the weights, as one more variant.")] = None,
    device: DeviceOption = "",
    dtype: Annotated[str, typer.Option(help="fp16, bf16 or fp32.", show_default="fp16 on a GPU, fp32 on a CPU")] = "",
    compile: Annotated[bool, typer.Option(help="Compile quantized variants.")] = True,
    layers: Annotated[
        int | None, typer.Option(min=1, help="At most so many transformer layers in each block, for a quick look.")
    ] = None,
    channels_last: Annotated[bool, typer.Option(help="Memory format of convolutions, for all variants.")] = True,
    cold: Annotated[bool, typer.Option(help="Compile each variant with empty caches.")] = True,
    seed: Annotated[int, typer.Option(help="Seed of weights and inputs.")] = 0,
    jobs: Annotated[
        int,
        typer.Option(min=1, help="Compile as many variants side by side (slower each), then measure one at a time."),
    ] = 1,
    compile_limit: Annotated[
        float | None, typer.Option(help="Seconds; a variant that takes longer to compile is left out.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Keep the rows that OUT has.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace OUT if it exists.")] = False,
    profile: Annotated[
        Path | None, typer.Option(help="Folder for a trace of one step of each variant; calls nsys and ncu if there.")
    ] = None,
    memory_snapshot: Annotated[
        Path | None, typer.Option(help="Pickle of CUDA's allocations; a variant's name is put before the suffix.")
    ] = None,
    step_only: Annotated[bool, typer.Option("--step-only", hidden=True)] = False,
    json: JsonOption = False,
) -> None:
    """Measure latency and memory of a UNet, floating and quantized, one variant after the other.

    Latencies are a CUDA graph's replays on a GPU and calls on a CPU. A variant that cannot run is a row with its
    reason. Stopped at any point, the same command with --resume goes on where it was.
    """
    import torch

    from mixdq_ao import bench as library
    from mixdq_ao._quiet import quiet_pipelines

    quiet_pipelines()
    where = device or ("cuda" if torch.cuda.is_available() else "cpu")
    names = [name.strip() for name in variants.split(",") if name.strip()]
    options = {"size": size, "device": where, "dtype": dtype or None, "plan": plan, "compile": compile,
               "layers": layers, "channels_last": channels_last, "seed": seed}  # fmt: skip
    if step_only:
        library.run_step(model, names[0], (batch or [1])[0], **options)
        return
    if out is not None and out.is_file() and not (resume or force):
        raise MixDQError(f"{out} exists; give --resume to go on from it, or --force to replace it")
    if resume and force:
        raise MixDQError("--resume keeps the rows of OUT and --force replaces them; give one of the two")
    if plot is not None:
        library.check_plot(plot)
        if out is not None and plot.resolve() == out.resolve():
            raise MixDQError(f"{out}: the plot would replace the results; give --plot another file")
    result = library.run_bench(
        model,
        batches=batch or [1],
        variants=names if variants else None,
        repeats=repeats,
        warmup=warmup,
        cold=cold,
        jobs=jobs,
        compile_limit=compile_limit,
        out=out,
        resume=resume,
        profile=profile,
        memory_snapshot=memory_snapshot,
        progress=False if json else None,
        **options,
    )
    _print_bench(result, json)
    # After the numbers, which a plot that fails must not take along.
    if all(row.error for row in result.rows):
        if plot is not None:
            print(f"nothing was measured, so {plot} is not written", file=sys.stderr)
        raise typer.Exit(1)
    if plot is not None:
        library.write_plot(result, plot)


def _print_bench(result, json: bool) -> None:
    from mixdq_ao.bench import table

    if json:
        print(jsonlib.dumps(result.to_json(), indent=1))
        return
    title, header, rows, lines = table(result)
    _print_table(title, header, rows)
    for line in lines:
        _console().print(escape(line), soft_wrap=True, highlight=False)


@app.command()
def doctor(
    layer: Annotated[
        str, typer.Option(help="M,N,K[,TAPS]: which kernel runs a layer of m rows, n outputs and k = channels x taps.")
    ] = "",
    bits: Annotated[
        int | None, typer.Option(help="With --layer: bits of its weight, 8, 4 or 2.", show_default="8")
    ] = None,
    arch: Annotated[
        int | None, typer.Option(help="With --layer: 80, 86, 89 or 90.", show_default="this machine's GPU, or 90")
    ] = None,
    json: JsonOption = False,
) -> None:
    """Say what this machine can run, and why not more; with --layer, which CUDA kernel runs a layer of that size."""
    from mixdq_ao import doctor as library

    if layer:
        found = library.layer_kernels(*library.parse_layer(layer), bits=8 if bits is None else bits, arch=arch)
        if json:
            print(jsonlib.dumps(asdict(found), indent=1))
        else:
            _print_table(f"{found.problem}, on sm_{found.arch}", ("kernel", ""), library.layer_table(found))
        return
    for option, value in (("--bits", bits), ("--arch", arch)):
        if value is not None:
            raise MixDQError(f"{option} {value} says something about a layer; give --layer, too")
    findings = library.examine()
    if json:
        print(jsonlib.dumps(library.as_json(findings), indent=1))
        return
    _print_table("", ("", "found", ""), [(f.name, f.value, "ok" if f.ok else "!") for f in findings])


def _console() -> Console:
    # A pipe gets the whole table, not one folded to 80 columns.
    return Console(width=None if sys.stdout.isatty() else 200)


def _print_table(title: str, header, rows) -> None:
    table = Table(title=title or None, title_justify="left")
    for i, name in enumerate(header):
        numbers = all(row[i][:1].isdigit() or row[i][:1] == "-" for row in rows)
        table.add_column(name, justify="right" if numbers else "left")
    for row in rows:
        table.add_row(*row)
    _console().print(table)


def main() -> None:
    """Run the command; an error of ours, or of the system, is one line on stderr and exit code 2, not a traceback."""
    # The libraries below print notes that a user of this command can do nothing about.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    logging.getLogger("torchao").setLevel(logging.ERROR)
    try:
        try:
            app(standalone_mode=True)
        finally:
            _flush()
    except BrokenPipeError:  # a reader such as head that has seen enough
        raise SystemExit(1) from None
    except MixDQError as error:
        text = str(error)
    except OSError as error:
        where = error.filename2 or error.filename
        text = f"{where}: {error.strerror}" if where else error.strerror or str(error)
    else:
        return
    Console(stderr=True).print(f"[bold red]error:[/] {escape(text)}", soft_wrap=True, highlight=False)
    raise SystemExit(2)


def _flush() -> None:
    """A disk that is full is found here, and not by Python after the last line of the command."""
    try:
        if sys.stdout is not None:  # the shell's >&-
            sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python tries once more at its end
        raise


if __name__ == "__main__":
    main()
