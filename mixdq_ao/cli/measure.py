"""The commands that try and measure a machine."""

import json as jsonlib
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from mixdq_ao.cli.options import DeviceOption, JsonOption
from mixdq_ao.cli.printing import console, print_table
from mixdq_ao.errors import MixDQError


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
    print_table(title, library.HEADER, [library.cells(row) for row in result.rows])
    console().print(f"Pictures side by side: {result.picture}\nNumbers: {result.json}", soft_wrap=True)


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
        Path | None, typer.Option(help="Folder for traces of one step of each variant; calls nsys and ncu if there.")
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
    print_table(title, header, rows)
    for line in lines:
        console().print(escape(line), soft_wrap=True, highlight=False)


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
            print_table(f"{found.problem}, on sm_{found.arch}", ("kernel", ""), library.layer_table(found))
        return
    for option, value in (("--bits", bits), ("--arch", arch)):
        if value is not None:
            raise MixDQError(f"{option} {value} says something about a layer; give --layer, too")
    findings = library.examine()
    if json:
        print(jsonlib.dumps(library.as_json(findings), indent=1))
        return
    print_table("", ("", "found", ""), [(f.name, f.value, "ok" if f.ok else "!") for f in findings])
