"""The demo: the same captions and seeds in floating point and quantized, side by side as a picture and a table."""

import copy
import json
import statistics
import textwrap
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from mixdq_ao import families
from mixdq_ao.calibrate import calibrate, generators
from mixdq_ao.checkpoint import QuantParams
from mixdq_ao.config import MixDQConfig, quantize_
from mixdq_ao.evaluate import mean_weight_bits, psnr, sqnr, ssim
from mixdq_ao.files import replacing, write_text
from mixdq_ao.memory import Memory, measure_memory
from mixdq_ao.pipelines import TINY, checked_device, load_pipeline
from mixdq_ao.progress import track
from mixdq_ao.prompts import built_in_prompts
from mixdq_ao.scene_reader import caption_accuracy
from mixdq_ao.scenes import parse_caption

CALIBRATION_PROMPTS = 16
BATCH_SIZE = 8
SHOWN = 16  # captions on the sheet: a file of captions may have thousands


@dataclass(frozen=True)
class Variant:
    """One row: a name, and how the UNet is quantized; ``config`` None leaves it floating in ``dtype``."""

    name: str
    dtype: torch.dtype
    config: Callable[[QuantParams, nn.Module], MixDQConfig] | None = None


@dataclass(frozen=True)
class Row:
    """What was measured of a variant. Ratios are against the float32 pictures of the same captions and seed.

    Memory in MiB of the UNet alone for the first batch (of 8 pictures, where there are as many), ``seconds`` for the
    whole pipeline and one picture, ``unet_ms`` the median of the UNet's calls, one for each batch and step; ``sqnr`` of
    the first UNet output in dB; ``accuracy`` None where the pictures cannot be read.
    """

    name: str
    mean_weight_bits: float
    static_mib: float
    activation_mib: float
    peak_mib: float
    unet_ms: float
    seconds: float
    sqnr: float
    ssim: float
    psnr: float
    accuracy: float | None


def _w8a8(params: QuantParams, unet: nn.Module) -> MixDQConfig:
    return MixDQConfig(params, weight_bits=8, act_bits=8)


def mixed_plan(unet: nn.Module) -> dict[str, int]:
    """4-bit weights for content layers, 8-bit for quality layers: the split that published MixDQ plans come to."""
    family = families.family_of(unet)
    return {name: 4 if family.is_content(name) else 8 for name in families.layers_of(unet)}


def _mixed(params: QuantParams, unet: nn.Module) -> MixDQConfig:
    return MixDQConfig(params, weight_bits=mixed_plan(unet), act_bits=8)


def _w4a8(params: QuantParams, unet: nn.Module) -> MixDQConfig:
    return MixDQConfig(params, weight_bits=4, act_bits=8)


def variants(device: torch.device, unet: nn.Module) -> list[Variant]:
    """The rows of the table; 16 bits are fp16 on a GPU and bf16 on a CPU, which is slow in fp16.

    Without the mixed plan where that gives all layers one width.
    """
    half = torch.float16 if device.type == "cuda" else torch.bfloat16
    mixed = [Variant("W4/8A8", half, _mixed)] if len(set(mixed_plan(unet).values())) > 1 else []
    return [Variant("W16A16", half), Variant("W8A8", half, _w8a8), *mixed, Variant("W4A8", half, _w4a8)]


@dataclass(frozen=True)
class Demo:
    """The rows, and where picture and JSON were written."""

    rows: list[Row]
    captions: list[str]
    steps: int
    device: str
    picture: Path
    json: Path


def run_demo(
    out: str | Path,
    *,
    model: str | None = None,
    prompts: Sequence[str] | None = None,
    pictures: int = 8,
    steps: int = 4,
    seed: int = 0,
    device: str = "cpu",
    progress: bool | None = None,
) -> Demo:
    """Calibrate, quantize, generate and compare; writes ``demo.png`` and ``demo.json`` into the folder ``out``.

    ``model`` is a diffusers pipeline folder, None for our own small model, whose pictures can be read back and
    compared with their captions. Without ``prompts`` those that come along are drawn, ``pictures`` of them. Pictures
    are drawn in batches, with the same noise for every variant; the picture that is written shows the first captions.
    What is drawn is never what was calibrated with.
    """
    where = checked_device(device)
    pipe = load_pipeline(model or TINY, device, torch.float32)
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    captions, calibration = _captions(prompts, pictures, readable=model is None, seed=seed)
    params = calibrate(pipe, calibration, num_inference_steps=steps, seed=seed + 1, progress=progress)
    part = families.denoiser_name(pipe)
    float_unet = getattr(pipe, part)
    reference = _generate(pipe, captions, steps, seed)
    rows, columns = [], {"float32": reference.images[:SHOWN]}
    todo = variants(where, float_unet)
    for variant in track(todo, "Generating", len(todo), progress):
        unet = copy.deepcopy(float_unet).to(variant.dtype)
        if variant.config is not None:
            quantize_(unet, variant.config(params, float_unet), progress=False)
        setattr(pipe, part, unet)
        drawn = _generate(pipe, captions, steps, seed)
        columns[variant.name] = drawn.images[:SHOWN]
        rows.append(
            Row(
                variant.name,
                mean_weight_bits(unet),
                *_unet_memory(unet, drawn).mib(),
                1e3 * statistics.median(drawn.unet_seconds),
                drawn.seconds,
                sqnr(reference.output, drawn.output),
                ssim(reference.images, drawn.images),
                psnr(reference.images, drawn.images),
                caption_accuracy(drawn.images, captions).overall if model is None else None,
            )
        )
    result = Demo(rows, captions, steps, device, out / "demo.png", out / "demo.json")
    _write_picture(result.picture, columns, captions[:SHOWN])
    write_text(result.json, json.dumps(_as_json(result, seed), indent=1) + "\n")
    return result


def _captions(prompts, pictures: int, readable: bool, seed: int) -> tuple[list[str], list[str]]:
    """Captions to draw, and others to calibrate with."""
    if prompts and readable:
        for prompt in prompts:
            parse_caption(prompt)  # raises for what the small model does not know, before anything is drawn
    drawn = list(prompts or built_in_prompts(pictures, scenes=readable, held_out=True, seed=seed))
    known = set(drawn)
    # A file of captions may hold some of those that come along: so many more are asked for, where there are more.
    others = built_in_prompts(CALIBRATION_PROMPTS + len(known) if readable else None, scenes=readable, seed=seed)
    return drawn, [caption for caption in others if caption not in known][:CALIBRATION_PROMPTS]


@dataclass
class _Drawn:
    """What the pipeline drew: pictures, seconds for each, the seconds of each UNet call, the arguments of the first,
    and as float32 the outputs of each batch's first call, put together."""

    images: list[Image.Image]
    seconds: float
    unet_seconds: list[float]
    call: tuple[tuple, dict]
    output: Tensor


@torch.no_grad()
def _generate(pipe, captions, steps: int, seed: int) -> _Drawn:
    unet, times, calls, outputs, images = families.denoiser_of(pipe), [], [], [], []

    # Only the UNet runs in its own dtype: the noise is drawn in float32, the same for every variant.
    def before(module, args, kwargs):
        args, kwargs = tree_map(lambda v: _cast(v, module.dtype), (args, kwargs))
        times.append(_now(module))
        return args, kwargs

    def after(module, args, kwargs, output):
        times[-1] = _now(module) - times[-1]
        output = tree_map(lambda v: _cast(v, torch.float32), output)
        if not calls:
            calls.append((args, kwargs))
        if len(outputs) * BATCH_SIZE <= len(images):  # the first call of this batch, whose pictures are not there yet
            outputs.append(output[0].cpu())
        return output

    hooks = [
        unet.register_forward_pre_hook(before, with_kwargs=True),
        unet.register_forward_hook(after, with_kwargs=True),
    ]
    start = time.perf_counter()
    try:
        for first in range(0, len(captions), BATCH_SIZE):
            batch = list(captions[first : first + BATCH_SIZE])
            images += pipe(
                prompt=batch,
                num_inference_steps=steps,
                guidance_scale=0.0,
                generator=generators(seed, range(first, first + len(batch))),
            ).images
    finally:
        for hook in hooks:
            hook.remove()
    seconds = (time.perf_counter() - start) / len(captions)
    return _Drawn(images, seconds, times, calls[0], torch.cat(outputs))


def _cast(value, dtype: torch.dtype):
    # Not timesteps, one for all pictures or for each: 999 would become 1000 in bf16.
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() and value.dim() > 1 else value


def _now(module: nn.Module) -> float:
    if next(module.parameters()).is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter()


@torch.no_grad()
def _unet_memory(unet: nn.Module, drawn: _Drawn) -> Memory:
    args, kwargs = drawn.call
    return measure_memory(unet, lambda: unet(*args, **kwargs))


def _as_json(result: Demo, seed: int) -> dict:
    return {
        "captions": result.captions,
        "steps": result.steps,
        "seed": seed,
        "device": result.device,
        "torch": torch.__version__,
        "rows": [asdict(row) for row in result.rows],
    }


HEADER = ("", "weight bits", "static", "activation", "peak MiB", "UNet ms", "s/picture", "SQNR dB", "SSIM", "PSNR dB",
          "captions")  # fmt: skip


def cells(row: Row) -> tuple[str, ...]:
    """The row as text, in the order of ``HEADER``."""
    return (
        row.name,
        f"{row.mean_weight_bits:.2f}",
        f"{row.static_mib:.2f}",
        f"{row.activation_mib:.2f}",
        f"{row.peak_mib:.2f}",
        f"{row.unet_ms:.0f}",
        f"{row.seconds:.3f}",
        f"{row.sqnr:.1f}",
        f"{row.ssim:.3f}",
        f"{row.psnr:.1f}",
        "-" if row.accuracy is None else f"{100 * row.accuracy:.1f} %",
    )


def _write_picture(path: Path, columns: dict[str, list[Image.Image]], captions: Sequence[str]) -> None:
    """One line of pictures for each variant, captions below."""
    side = 192 if next(iter(columns.values()))[0].width <= 192 else 320
    left, gap, foot = 96, 6, 64
    width = left + len(captions) * (side + gap) + gap
    height = gap + len(columns) * (side + gap) + foot
    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)
    font, small = ImageFont.load_default(16), ImageFont.load_default(11)
    for i, (name, images) in enumerate(columns.items()):
        y = gap + i * (side + gap)
        draw.text((gap, y + side // 2 - 10), name, fill="black", font=font)
        for j, image in enumerate(images):
            resample = Image.Resampling.NEAREST if image.width < side else Image.Resampling.LANCZOS
            sheet.paste(image.convert("RGB").resize((side, side), resample), (left + j * (side + gap), y))
    for j, caption in enumerate(captions):
        text = _wrapped(caption, 34)
        draw.multiline_text((left + j * (side + gap), height - foot + 2), text, fill="black", font=small)
    with replacing(path) as partial:
        sheet.save(partial, format="PNG")


def _wrapped(text: str, width: int, lines: int = 4) -> str:
    return "\n".join(textwrap.wrap(text, width, max_lines=lines, placeholder=" ..."))
