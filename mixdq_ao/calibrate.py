"""Calibration: run a pipeline, watch what enters each layer, and write down scales and zero points."""

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixdq_ao import families
from mixdq_ao.bits import ACT_BITS, WEIGHT_BITS, width
from mixdq_ao.checkpoint import LayerParams, QuantParams, check_format, model_hash
from mixdq_ao.errors import MixDQError, name_list
from mixdq_ao.files import TensorFile, first_line, parse_json, write_tensors
from mixdq_ao.fingerprints import arguments_digest, digest, fingerprints
from mixdq_ao.ops import BOS_TOLERANCE
from mixdq_ao.progress import track
from mixdq_ao.ranges import METHODS, InputRange, scale_and_zero_point
from mixdq_ao.tensor import MixDQTensor
from mixdq_ao.watching import watching

WEIGHT_METHODS = ("minmax", "mse")
STATE_FORMAT = "mixdq_ao.calibration_state"
STATE_VERSION = "1"
# Of max|W|: what the search for a weight's scale tries. With 2 bits the best lies near 0.4, with 8 bits near 1.
_WEIGHT_FRACTIONS = [f / 100 for f in range(100, 24, -3)]


class _Watch:
    """What was seen of one layer's input: the range of each input group, with and without token 0, and token 0."""

    KINDS = ("all", "without_bos")
    KEYS = ("all.numbers", "all.counts", "without_bos.numbers", "without_bos.counts", "bos", "bos_is_constant")

    def __init__(self, groups: list[int], channel_dim: int, sees_text: bool, histogram: bool):
        self.groups, self.channel_dim, self.sees_text = groups, channel_dim, sees_text
        self.ranges = {kind: [InputRange(histogram) for _ in groups] for kind in self.KINDS}
        self.bos: Tensor | None = None
        self.bos_is_constant = True

    def note(self, x: Tensor) -> None:
        self._extend("all", x)
        if self.sees_text and x.dim() == 3 and x.shape[1] > 1:
            self._extend("without_bos", x[:, 1:])
            self._note_bos(x[:, 0].float())

    def _extend(self, kind: str, x: Tensor) -> None:
        for group, part in zip(self.ranges[kind], x.split(self.groups, dim=self.channel_dim), strict=True):
            group.note(part)

    def _note_bos(self, tokens: Tensor) -> None:
        # SDXL's pipelines give a row of zeros for an empty negative prompt: it is no token, and it is computed as is.
        tokens = tokens[tokens.abs().amax(-1) > 0]
        if len(tokens) == 0:
            return
        if self.bos is None:
            self.bos = tokens[0].clone()
        same = (tokens - self.bos).abs().amax() <= BOS_TOLERANCE * self.bos.abs().amax()
        self.bos_is_constant = self.bos_is_constant and bool(same)

    @property
    def seen(self) -> bool:
        return self.ranges["all"][0].seen

    @property
    def has_bos(self) -> bool:
        """Whether token 0 was the same in every sample, as a causal text encoder's is."""
        return self.bos is not None and self.bos_is_constant

    def state(self) -> dict[str, Tensor]:
        """Everything, as tensors; :meth:`restore` takes it back."""
        tensors = {}
        for kind, ranges in self.ranges.items():
            numbers = [[getattr(r, name) for name in InputRange.FIELDS] for r in ranges]
            tensors[f"{kind}.numbers"] = torch.tensor(numbers, dtype=torch.float64)
            if ranges[0].counts is not None:
                tensors[f"{kind}.counts"] = torch.stack([r.counts for r in ranges])
        if self.bos is not None:
            tensors["bos"] = self.bos
            tensors["bos_is_constant"] = torch.tensor([self.bos_is_constant])
        return tensors

    def restore(self, tensors: dict[str, Tensor], device: torch.device) -> None:
        for kind, ranges in self.ranges.items():
            for i, (group, numbers) in enumerate(zip(ranges, tensors[f"{kind}.numbers"].tolist(), strict=True)):
                for name, value in zip(InputRange.FIELDS, numbers, strict=True):
                    setattr(group, name, value)
                if group.counts is not None:
                    group.counts = tensors[f"{kind}.counts"][i].clone()
        if "bos" in tensors:
            self.bos = tensors["bos"].to(device)
            self.bos_is_constant = bool(tensors["bos_is_constant"])


class Recorder:
    """What was seen of every layer, from :func:`observe`; :meth:`params` turns it into ``QuantParams``."""

    def __init__(self, model: nn.Module, method: str = "minmax", weight_method: str = "minmax"):
        check_methods(method, weight_method)
        self._model, self._method, self._weight_method = model, method, weight_method
        family, self._points = families.family_of(model), families.split_points(model)
        self.watches: dict[str, _Watch] = {}
        for name, module in families.layers_of(model).items():
            is_conv = isinstance(module, nn.Conv2d)
            channels = module.in_channels if is_conv else module.in_features  # a grouped convolution's weight has fewer
            channel_dim = 1 if is_conv else -1
            groups = self._points.get(name, [channels])
            self.watches[name] = _Watch(groups, channel_dim, family.sees_text(name), method in ("percentile", "mse"))

    def params(self, bos: bool = True, progress: bool | None = False) -> QuantParams:
        """Scales and zero points of all layers, from what was seen so far; grouped convolutions, which cannot be
        quantized, are named in ``protect``.

        ``bos``: leave a constant first token out of the ranges and keep its input and output. Raises ``MixDQError``
        for layers that were never run.
        """
        unseen = [name for name, w in self.watches.items() if not w.seen]
        if unseen:
            raise MixDQError(
                f"{len(unseen)} layers were never run while calibrating: {name_list(unseen)}. Calibrate with "
                "arguments of the pipeline that make it use them"
            )
        layers = families.layers_of(self._model)
        return QuantParams(
            layers={
                name: self._layer(name, layers[name], bos and watch.has_bos)
                for name, watch in track(self.watches.items(), "Scales", len(self.watches), progress)
            },
            bos_aware=bos and any(w.has_bos for w in self.watches.values()),
            model_hash=model_hash(families.layer_shapes(self._model)),
            protect=families.grouped_convolutions(self._model),
            source="calibration",
        )

    def _layer(self, name: str, module: nn.Module, bos: bool) -> LayerParams:
        watch = self.watches[name]
        weight = module.weight.detach().as_subclass(Tensor)  # while it is watched, too
        ranges = watch.ranges["without_bos" if bos else "all"]
        act = {b: scale_and_zero_point([r.ends(self._method, b) for r in ranges], b) for b in ACT_BITS}
        groups = self._points.get(name, [weight.shape[1]])
        token = watch.bos.to(weight) if bos else None
        return LayerParams(
            weight_scale={b: weight_scale(weight, b, groups, self._weight_method).cpu() for b in WEIGHT_BITS},
            act_scale={b: scale for b, (scale, _) in act.items()},
            act_zero_point={b: zero_point for b, (_, zero_point) in act.items()},
            bos_input=token.cpu() if bos else None,
            bos_output=F.linear(token, weight, module.bias).cpu() if bos else None,
        )


def weight_scale(weight: Tensor, bits: int, input_groups: list[int], method: str = "minmax") -> Tensor:
    """Scales float32 ``[groups, out]`` of a weight ``[out, in, ...]``, symmetric.

    ``minmax``: ``max|W| / qmax`` of each output channel and group. ``mse``: that times the fraction, from 1 to 0.25,
    with the least squared rounding error of the channel.
    """
    full = MixDQTensor.from_float(weight, bits, input_groups=input_groups).scale
    if method == "minmax":
        return full
    w = width(bits)
    parts = weight.detach().float().split(input_groups, dim=1)
    best = []
    for part, scale in zip(parts, full, strict=True):
        rows = part.flatten(1)
        candidates = scale * torch.tensor(_WEIGHT_FRACTIONS, device=scale.device)[:, None]
        errors = torch.stack([_rounding_error(rows, c[:, None], w.qmin, w.qmax) for c in candidates])
        best.append(candidates.gather(0, errors.argmin(0, keepdim=True))[0])
    return torch.stack(best)


def _rounding_error(rows: Tensor, scale: Tensor, qmin: int, qmax: int) -> Tensor:
    return ((rows / scale).round_().clamp_(qmin, qmax).mul_(scale).sub_(rows)).square_().sum(1)


@contextmanager
def observe(model: nn.Module, method: str = "minmax", weight_method: str = "minmax") -> Iterator[Recorder]:
    """Watch the inputs of a floating model's layers while the block runs; weights are as before afterwards.

    ``method`` is how ranges of activations are found, see ``ranges``; ``weight_method`` see :func:`weight_scale`.
    """
    recorder = Recorder(model, method, weight_method)
    with watching(model, {name: watch.note for name, watch in recorder.watches.items()}):
        yield recorder


def calibrate(
    pipe,
    prompts: Sequence[str],
    *,
    method: str = "minmax",
    weight_method: str = "mse",
    num_inference_steps: int = 1,
    guidance_scale: float = 0.0,
    batch_size: int = 8,
    seed: int = 0,
    bos: bool = True,
    state: str | os.PathLike | None = None,
    progress: bool | None = None,
    **pipe_kwargs,
) -> QuantParams:
    """Run a diffusers pipeline on ``prompts`` and derive quantization parameters for its UNet, or its transformer, from
    what enters it.

    Activations: one asymmetric range per layer and input group, by ``method``: ``"minmax"``, ``"ema"``,
    ``"percentile"`` or ``"mse"`` (see ``ranges``). Weights: symmetric scales per output channel for 8, 4 and 2 bits,
    by ``weight_method``: ``"minmax"`` or ``"mse"``. ``bos`` treats the text encoders' first token apart.

    ``state`` is a file that is written, whole, after each batch: the same call, made again after it was stopped, goes
    on from there and gives the very same parameters. The noise of a picture depends on ``seed`` and its number alone.
    ``pipe_kwargs`` go to the pipeline.

    Raises ``MixDQError`` without prompts, for a layer whose input is not finite, for a layer that never ran, and for a
    ``state`` that belongs to another call.
    """
    prompts, model = checked_prompts(prompts, "calibrate()"), families.denoiser_of(pipe)
    settings = {
        "method": method,
        "steps": num_inference_steps,
        "guidance_scale": guidance_scale,
        "batch_size": batch_size,
        "seed": seed,
        "prompts": digest(prompts),
        "pipe_kwargs": arguments_digest(pipe_kwargs),
        **(fingerprints(pipe) if state is not None else {}),  # which reads every weight
    }
    with observe(model, method, weight_method) as recorder:
        done = _restore(state, recorder, settings, _device(model))
        runs = run_batches(
            pipe,
            prompts,
            skip=done,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            batch_size=batch_size,
            seed=seed,
            progress=progress,
            **pipe_kwargs,
        )
        for batches in runs:
            if state is not None:
                _write_state(state, recorder, settings, batches)
    return recorder.params(bos, progress)


def run_batches(
    pipe,
    prompts: Sequence[str],
    *,
    skip: int = 0,
    num_inference_steps: int = 1,
    guidance_scale: float = 0.0,
    batch_size: int = 8,
    seed: int = 0,
    text: str = "Calibrating",
    progress: bool | None = None,
    **pipe_kwargs,
) -> Iterator[int]:
    """Run the pipeline up to the latents, batch by batch, from batch ``skip`` on; yields the batches done so far."""
    starts = range(skip * batch_size, len(prompts), batch_size)
    for start in track(starts, text, len(starts), progress):
        batch = list(prompts[start : start + batch_size])
        run_pipeline(
            pipe,
            prompt=batch,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            generator=generators(seed, range(start, start + len(batch))),
            output_type="latent",
            **pipe_kwargs,
        )
        yield start // batch_size + 1


@torch.no_grad()
def run_pipeline(pipe, **arguments):
    """What a call of ``pipe`` gives. Raises ``MixDQError`` where the pipeline does not take the arguments."""
    try:
        return pipe(**arguments)
    except MixDQError:
        raise
    except (TypeError, ValueError) as error:
        raise MixDQError(
            f"{type(pipe).__name__} does not take this call ({first_line(error)}). What it needs besides prompts, such "
            "as an image, can be given in Python: further arguments of calibrate(), sensitivity() and evaluate() go to "
            "the pipeline"
        ) from error


def generators(seed: int, numbers: range) -> list[torch.Generator]:
    """One generator for each picture, so that its noise does not depend on the batch it is in."""
    # The CPU's generator looks at the lower 32 bits of a seed only.
    return [torch.Generator("cpu").manual_seed((seed * 1_000_003 + number) % 2**32) for number in numbers]


def checked_prompts(prompts: Sequence[str], who: str) -> list[str]:
    """``prompts`` as a list. Raises ``MixDQError`` unless it holds strings, at least one."""
    if isinstance(prompts, str) or not prompts or not all(isinstance(p, str) for p in prompts):
        raise MixDQError(f"{who} needs a list of prompts; found {prompts!r}")
    return list(prompts)


def check_methods(method: str, weight_method: str) -> None:
    """Raises ``MixDQError`` for rules that :func:`calibrate` does not know."""
    for what, value, known in (("method", method, METHODS), ("weight_method", weight_method, WEIGHT_METHODS)):
        if value not in known:
            raise MixDQError(f"{what} must be one of {', '.join(known)}; found {value!r}")


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _write_state(path, recorder: Recorder, settings: dict, batches: int) -> None:
    tensors = {f"{name}.{key}": t for name, w in recorder.watches.items() for key, t in w.state().items()}
    values = {"format": STATE_FORMAT, "format_version": STATE_VERSION, "batches": str(batches)}
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_tensors(path, tensors, values | {"settings": json.dumps(settings)})


def _restore(path, recorder: Recorder, settings: dict, device) -> int:
    """Take a state file in, and return how many batches it stands for; 0 where there is none."""
    if path is None or not Path(path).exists():
        return 0
    file = TensorFile(path)
    check_format(file, STATE_FORMAT, STATE_VERSION)
    found = parse_json(path, "settings", file.metadata.get("settings", "{}"))
    different = [key for key, value in settings.items() if found.get(key) != value]
    if different:
        raise MixDQError(
            f"{path}: this state belongs to a calibration with other {', '.join(different)}. Give the same arguments "
            "to go on with it, or delete it to start anew"
        )
    for name, watch in recorder.watches.items():
        keys = [key for key in _Watch.KEYS if f"{name}.{key}" in file.entries]
        watch.restore({key: file.read(f"{name}.{key}") for key in keys}, device)
    return int(file.metadata["batches"])
