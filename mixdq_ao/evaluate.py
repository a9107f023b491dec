"""How close a quantized model's pictures are to the floating ones, at equal captions and seeds."""

import copy
import json
import math
import os
import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from mixdq_ao import extras as extra_metrics
from mixdq_ao import families
from mixdq_ao.calibrate import checked_prompts, generators, run_pipeline
from mixdq_ao.config import MixDQConfig, quantize_
from mixdq_ao.errors import MixDQError, UnsupportedError
from mixdq_ao.files import TensorFile, parse_json, read_text, write_tensors, write_text
from mixdq_ao.fingerprints import arguments_digest, digest, fingerprint, fingerprints
from mixdq_ao.model_file import load
from mixdq_ao.progress import track
from mixdq_ao.scene_reader import ATTRIBUTES, judge, read_picture
from mixdq_ao.scenes import parse_caption
from mixdq_ao.summary import MIB, storage_bytes

FLOATING = "floating"
TITLES = {"sqnr": "SQNR", "psnr": "PSNR", "ssim": "SSIM", "accuracy": "captions", "lpips": "LPIPS", "fid": "FID"}
UNITS = {"sqnr": "dB", "psnr": "dB", "accuracy": "%"}
LOWER_IS_BETTER = ("lpips", "fid")
_AGAINST_FLOATING = ("sqnr", "psnr", "ssim", "lpips", "fid")
# Of LPIPS, as vllm-omni and nunchaku draw the lines in their tests.
LPIPS_BANDS = ((0.10, "same picture"), (0.15, "like fp8"), (0.30, "like 4 bits"), (0.50, "other picture"))


def sqnr(reference: Tensor, value: Tensor) -> float:
    """Signal to quantization noise ratio in dB: ``10 log10(sum ref^2 / sum (value - ref)^2)``; inf where equal.

    -inf where ``value`` is not finite: nothing is left of the signal. Any shape and floating dtype, computed in
    float64. Raises ``MixDQError`` for different shapes.
    """
    if reference.shape != value.shape:
        raise MixDQError(f"sqnr() needs equal shapes; found {list(reference.shape)} and {list(value.shape)}")
    reference, value = reference.double(), value.double()
    noise = (value - reference).square().sum()
    if not noise.isfinite():
        return -math.inf
    return float(10 * torch.log10(reference.square().sum() / noise))


def picture_batch(pictures: Sequence) -> Tensor:
    """PIL pictures of one size, or arrays uint8 ``[h, w, 3]``, as float32 ``[n, 3, h, w]`` in 0..1."""
    arrays = [np.asarray(p) for p in pictures]
    if not arrays or any(a.shape != arrays[0].shape or a.ndim != 3 or a.shape[2] != 3 for a in arrays):
        raise MixDQError(f"pictures must be RGB and of one size; found shapes {sorted({a.shape for a in arrays})}")
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() / 255


def pictures_of(pipe, output):
    """The pictures that a call of ``pipe`` gave, as it gives them. Raises ``UnsupportedError`` for one of video."""
    if not hasattr(output, "images"):
        raise UnsupportedError(
            f"{type(pipe).__name__} makes no pictures that could be compared; found {type(output).__name__}. "
            "calibrate() and quantize_() need none"
        )
    return output.images


def ssim(reference: Sequence, pictures: Sequence) -> float:
    """Mean structural similarity of pictures to reference pictures (torchmetrics, data range 1); 1 where equal."""
    return float(ssim_of_each(*_pair(reference, pictures)).mean())


def ssim_of_each(pictures: Tensor, reference: Tensor, batch: int = 32) -> Tensor:
    """Structural similarity of each picture, float32 ``[n]``, of batches ``[n, 3, h, w]`` in 0..1."""
    from torchmetrics.functional.image import structural_similarity_index_measure

    parts = zip(pictures.split(batch), reference.split(batch), strict=True)
    values = [structural_similarity_index_measure(p, r, data_range=1.0, reduction="none") for p, r in parts]
    return torch.cat([v.reshape(-1) for v in values])


def psnr(reference: Sequence, pictures: Sequence) -> float:
    """Peak signal to noise ratio in dB over all pictures (torchmetrics, data range 1); inf where equal."""
    from torchmetrics.functional.image import peak_signal_noise_ratio

    return float(peak_signal_noise_ratio(*_pair(reference, pictures), data_range=1.0))


def _pair(reference, pictures) -> tuple[Tensor, Tensor]:
    reference, pictures = picture_batch(reference), picture_batch(pictures)
    if reference.shape != pictures.shape:
        raise MixDQError(f"need equal pictures; found {list(reference.shape)} and {list(pictures.shape)}")
    return pictures, reference


def lpips_band(value: float) -> str:
    """What an LPIPS distance to the floating picture means in words."""
    return next((name for edge, name in LPIPS_BANDS if value <= edge), "broken")


# --- many captions, seeds and variants --------------------------------------------------------------------------------

# How a variant's UNet is made from a copy of the floating one: a config, a file of mixdq_ao.save(), a function that
# changes the copy in place, or None: as it is.
Recipe = MixDQConfig | str | os.PathLike | Callable[[nn.Module], None] | None


@dataclass(frozen=True)
class Row:
    """What was measured of a variant.

    ``values`` maps a metric to its value at each seed: ``sqnr`` of the first UNet output and ``psnr`` in dB (inf: no
    difference; -inf: the output is not finite), ``ssim``, ``accuracy`` of captions in 0..1, and the extras.
    ``weight_bits`` is the mean over weights of linear and convolution layers, ``mib`` the size of the UNet.
    """

    name: str
    weight_bits: float
    mib: float
    values: dict[str, list[float]]

    def mean(self, metric: str) -> float:
        mean = statistics.fmean(self.values[metric])
        return -math.inf if math.isnan(mean) else mean  # equal at one seed, without a finite output at another

    def spread(self, metric: str) -> float | None:
        """Standard deviation over seeds; None with one seed or infinite values."""
        values = self.values[metric]
        return statistics.stdev(values) if len(values) > 1 and all(map(math.isfinite, values)) else None


@dataclass(frozen=True)
class Evaluation:
    """``rows``, one for each variant, the floating model first; ``pictures`` are uint8 ``[k, h, w, 3]`` by variant."""

    rows: list[Row]
    captions: list[str]
    seeds: list[int]
    settings: dict
    pictures: dict[str, Tensor] = field(repr=False)

    @property
    def metrics(self) -> list[str]:
        return list(self.rows[0].values)

    def row(self, name: str) -> Row:
        return next(row for row in self.rows if row.name == name)

    def header(self) -> list[str]:
        metrics = [f"{TITLES.get(metric, metric)} {UNITS.get(metric, '')}".strip() for metric in self.metrics]
        return ["", "weight bits", "UNet MiB", *metrics]

    def table(self) -> list[list[str]]:
        """Cells of text in the order of :meth:`header`: means, and ± the standard deviation over seeds."""
        return [
            [row.name, f"{row.weight_bits:.2f}", f"{row.mib:.2f}", *(self._cell(row, m) for m in self.metrics)]
            for row in self.rows
        ]

    def _cell(self, row: Row, metric: str) -> str:
        value, spread = row.mean(metric), row.spread(metric)
        if row.name == FLOATING and metric in _AGAINST_FLOATING:
            return "-"
        if not math.isfinite(value):
            return "equal" if value > 0 else "not finite"
        factor, digits = (100, 1) if metric == "accuracy" else (1, 1 if metric in UNITS else 4)
        text = f"{factor * value:.{digits}f}" + ("" if spread is None else f" ± {factor * spread:.{digits}f}")
        return f"{text} ({lpips_band(value)})" if metric == "lpips" else text

    def to_json(self) -> dict:
        """For ``json.dumps``: null is inf, no difference; "-inf" an output that is not finite."""
        rows = [
            {
                "name": row.name,
                "weight_bits": row.weight_bits,
                "mib": row.mib,
                **{
                    metric: {
                        "mean": _finite(row.mean(metric)),
                        "spread": row.spread(metric),
                        "seeds": [_finite(v) for v in values],
                    }
                    for metric, values in row.values.items()
                },
            }
            for row in self.rows
        ]
        return {"settings": self.settings, "seeds": self.seeds, "captions": len(self.captions), "rows": rows}


def _finite(value: float) -> float | str | None:
    """JSON has no infinity."""
    if math.isfinite(value):
        return value
    return None if value > 0 else "-inf"


def _infinite(value: float | str | None) -> float:
    return math.inf if value is None else float(value)


def evaluate(
    pipe,
    variants: Mapping[str, Recipe],
    captions: Sequence[str],
    *,
    seeds: Sequence[int] = (0,),
    num_inference_steps: int = 1,
    guidance_scale: float = 0.0,
    batch_size: int = 8,
    extras: Sequence[str] = (),
    out: str | os.PathLike | None = None,
    pictures: int = 8,
    progress: bool | None = None,
    **pipe_kwargs,
) -> Evaluation:
    """Draw ``captions`` at each of ``seeds`` with every variant of the UNet, and compare with the floating pictures.

    Args:
        pipe: a diffusers pipeline whose ``unet``, or ``transformer``, is floating; it is the same afterwards.
        variants: name to a ``MixDQConfig``, a file that ``mixdq_ao.save`` wrote, a function that changes a copy of the
            UNet in place, or None.
        extras: of ``extras.EXTRAS``: "lpips", "fid", "clip_score", "image_reward".
        out: a folder for what is done: one file for each variant and seed, written whole. The same call goes on from
            there; what was measured of other weights, captions or settings is measured again.
        pictures: of so many captions, at the first seed, the pictures are kept.

    Captions of our own scenes are read back from the pictures (accuracy). Raises ``MixDQError`` without captions or
    seeds, for names that are taken, and for extras whose packages or networks are not on this machine.
    """
    captions = checked_prompts(captions, "evaluate()")
    seeds = list(seeds)
    if not seeds or len(set(seeds)) != len(seeds):
        raise MixDQError(f"evaluate() needs different seeds, at least one; found {seeds}")
    check_names(variants)
    scorers = extra_metrics.scorers(extras)
    settings = {
        "captions": digest(captions),
        "num_inference_steps": num_inference_steps,
        "guidance_scale": guidance_scale,
        "batch_size": batch_size,  # a dynamic range is that of a batch
        **fingerprints(pipe),
        "pipe_kwargs": arguments_digest(pipe_kwargs),
        "pictures": min(pictures, len(captions)),
        "extras": list(extras),
    }
    call = {"num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale, **pipe_kwargs}
    run = _Run(pipe, captions, batch_size, call, settings, scorers, None if out is None else Path(out), progress)
    part = families.denoiser_name(pipe)
    floating_unet = getattr(pipe, part)
    references = {seed: run.reference(seed) for seed in seeds}
    rows, kept = [run.floating_row(references)], {FLOATING: references[seeds[0]]["pictures"][:pictures]}
    try:
        for name, recipe in variants.items():
            setattr(pipe, part, _make_unet(floating_unet, recipe))
            row, kept[name] = run.row(name, references)
            rows.append(row)
    finally:
        setattr(pipe, part, floating_unet)
    return Evaluation(rows, captions, seeds, settings, kept)


def _make_unet(floating_unet: nn.Module, recipe: Recipe) -> nn.Module:
    unet = copy.deepcopy(floating_unet)
    if isinstance(recipe, (str, os.PathLike)):  # of any class, while a file builds few
        parameter = next(unet.parameters())
        load(recipe, model=unet, device=parameter.device).to(parameter.dtype)  # as the rest of the pipeline computes
    elif isinstance(recipe, MixDQConfig):
        quantize_(unet, recipe, progress=False)
    elif recipe is not None:
        recipe(unet)
    return unet


def mean_weight_bits(unet: nn.Module) -> float:
    """Mean over the weights of linear and convolution layers; a floating weight counts its own bits."""
    weights = [module.weight for module in families.layers_of(unet).values()]
    bits = [getattr(w, "bits", 8 * w.element_size()) for w in weights]
    sizes = [w.numel() for w in weights]
    return sum(b * n for b, n in zip(bits, sizes, strict=True)) / sum(sizes)


def check_names(names: Iterable[str]) -> None:
    """Raises ``MixDQError`` for names of variants that have one name as files, or that of the floating model."""
    taken = {_slug(FLOATING): f"{FLOATING}, the model as it is"}
    for name in names:
        slug = _slug(name)
        if slug in taken:
            raise MixDQError(
                f"variants need different names; '{name}' and '{taken[slug]}' are both '{slug}' as files; rename one"
            )
        taken[slug] = name


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-")


@dataclass
class _Run:
    """One call of :func:`evaluate`: draws, measures, and keeps both on disk."""

    pipe: object
    captions: list[str]
    batch_size: int
    call: dict
    settings: dict
    scorers: dict[str, Callable]
    out: Path | None
    progress: bool | None

    def __post_init__(self):
        try:
            self.scenes = [parse_caption(c) for c in self.captions]
        except MixDQError:
            self.scenes = None
        if self.out is not None:
            self.out.mkdir(parents=True, exist_ok=True)

    def reference(self, seed: int) -> dict[str, Tensor]:
        """``pictures`` uint8 ``[n, h, w, 3]`` and ``output``, the first UNet output, of the floating model."""
        path = None if self.out is None else self.out / f"{FLOATING}-{seed}.safetensors"
        if path is not None and path.exists():
            file = TensorFile(path)
            if file.metadata.get("settings") == json.dumps(self.settings):
                return {name: file.read(name) for name in ("pictures", "output")}
        drawn = self._draw(seed, f"{FLOATING}, seed {seed}")
        if not drawn["output"].isfinite().all():
            raise MixDQError("the floating UNet's output is not finite; run it in float32 or bfloat16")
        if path is not None:
            write_tensors(path, drawn, {"settings": json.dumps(self.settings)})
        return drawn

    def floating_row(self, references: dict[int, dict[str, Tensor]]) -> Row:
        values: dict[str, list[float]] = {}
        for reference in references.values():
            for metric, value in self._measure(reference, reference).items():
                values.setdefault(metric, []).append(value)
        return self._row(FLOATING, values)

    def row(self, name: str, references) -> tuple[Row, Tensor]:
        """The row of the pipeline's present UNet, and its pictures at the first seed."""
        key = {"weights": fingerprint(families.denoiser_of(self.pipe)), **self.settings}
        values: dict[str, list[float]] = {}
        kept = None
        for seed, reference in references.items():
            done = self._done(name, seed, key)
            if done is None:
                drawn = self._draw(seed, f"{name}, seed {seed}")
                done = self._measure(reference, drawn), drawn["pictures"][: self.settings["pictures"]]
                self._write(name, seed, key, *done)
            kept = done[1] if kept is None else kept
            for metric, value in done[0].items():
                values.setdefault(metric, []).append(value)
        return self._row(name, values), kept

    def _row(self, name: str, values) -> Row:
        unet = families.denoiser_of(self.pipe)
        nbytes = storage_bytes([*unet.parameters(), *unet.buffers()])
        return Row(name, mean_weight_bits(unet), nbytes / MIB, values)

    def _done(self, name: str, seed: int, key: dict):
        if self.out is None:
            return None
        path = self.out / f"{_slug(name)}-{seed}.json"
        if not path.exists():
            return None
        content = parse_json(path, "", read_text(path))
        if not isinstance(content, dict) or content.get("key") != key:
            return None  # measured of something else: again
        pictures = TensorFile(path.with_suffix(".safetensors"))
        if pictures.metadata.get("key") != json.dumps(key):
            return None  # of a later call that was stopped before its JSON
        return {metric: _infinite(value) for metric, value in content["values"].items()}, pictures.read("pictures")

    def _write(self, name: str, seed: int, key: dict, values: dict[str, float], pictures: Tensor) -> None:
        if self.out is None:
            return
        path = self.out / f"{_slug(name)}-{seed}.json"
        # The pictures first: a result is there once its JSON is.
        write_tensors(path.with_suffix(".safetensors"), {"pictures": pictures}, {"key": json.dumps(key)})
        content = {"key": key, "values": {metric: _finite(value) for metric, value in values.items()}}
        write_text(path, json.dumps(content, indent=1) + "\n")

    @torch.no_grad()
    def _draw(self, seed: int, text: str) -> dict[str, Tensor]:
        unet, pictures, outputs = families.denoiser_of(self.pipe), [], []
        first: list[Tensor] = []

        def keep_first(module, args, output):
            if not first:
                first.append(output[0].detach().float().cpu())

        hook = unet.register_forward_hook(keep_first)
        starts = range(0, len(self.captions), self.batch_size)
        try:
            for start in track(starts, text, len(starts), self.progress):
                batch = self.captions[start : start + self.batch_size]
                noise = generators(seed, range(start, start + len(batch)))
                drawn = run_pipeline(self.pipe, prompt=batch, generator=noise, output_type="np", **self.call)
                images = pictures_of(self.pipe, drawn)
                pictures.append(torch.from_numpy(np.rint(255 * images).astype(np.uint8)))
                outputs.append(first.pop())
        finally:
            hook.remove()
        return {"pictures": torch.cat(pictures), "output": torch.cat(outputs)}

    def _measure(self, reference: dict[str, Tensor], drawn: dict[str, Tensor]) -> dict[str, float]:
        before, after = (picture_batch(list(d["pictures"])) for d in (reference, drawn))
        error = float((after - before).double().square().mean())
        values = {
            "sqnr": sqnr(reference["output"], drawn["output"]),
            "psnr": -10 * math.log10(error) if error > 0 else math.inf,
            "ssim": float(ssim_of_each(after, before).mean()),
        }
        if self.scenes is not None:
            values["accuracy"] = self._accuracy(drawn["pictures"].numpy())
        for name, score in self.scorers.items():
            values[name] = score(before, after, self.captions)
        return values

    def _accuracy(self, pictures: np.ndarray) -> float:
        hits = asked = 0
        for picture, scene in zip(pictures, self.scenes, strict=True):
            counts = judge(read_picture(picture), scene)
            hits += sum(counts[name][0] for name in ATTRIBUTES)
            asked += sum(counts[name][1] for name in ATTRIBUTES)
        return hits / asked
