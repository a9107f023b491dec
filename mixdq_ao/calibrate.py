"""Calibration: run a pipeline, watch what enters each layer, and write down scales and zero points.

Observers are tensor subclasses: while a model is watched, each weight is a ``_WatchedWeight`` that shares the weight's
storage, notes the range of the layer's input, and computes as before. No module is replaced.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixdq_ao import families, ops
from mixdq_ao.bits import ACT_BITS, WEIGHT_BITS
from mixdq_ao.checkpoint import LayerParams, QuantParams, model_hash
from mixdq_ao.errors import MixDQError, name_list
from mixdq_ao.progress import track
from mixdq_ao.tensor import BOS_TOLERANCE, MixDQTensor


@dataclass
class _Watch:
    """What was seen of one layer's input: lowest and highest value of each input group, with and without token 0."""

    groups: list[int]
    channel_dim: int
    sees_text: bool
    ranges: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    bos: Tensor | None = None
    bos_is_constant: bool = True

    def note(self, x: Tensor) -> None:
        x = x.detach()
        self._extend("all", x)
        if self.sees_text and x.dim() == 3 and x.shape[1] > 1:
            self._extend("without_bos", x[:, 1:])
            self._note_bos(x[:, 0].float())

    def _extend(self, kind: str, x: Tensor) -> None:
        parts = x.split(self.groups, dim=self.channel_dim)
        ends = torch.stack([torch.stack(torch.aminmax(p)) for p in parts]).float()
        if not bool(ends.isfinite().all()):
            raise MixDQError(f"a layer's input is not finite (lowest and highest per group: {ends.tolist()})")
        low, high = self.ranges.get(kind, (ends[:, 0], ends[:, 1]))
        self.ranges[kind] = torch.minimum(low, ends[:, 0]), torch.maximum(high, ends[:, 1])

    def _note_bos(self, tokens: Tensor) -> None:
        if self.bos is None:
            self.bos = tokens[0].clone()
        same = (tokens - self.bos).abs().amax() <= BOS_TOLERANCE * self.bos.abs().amax()
        self.bos_is_constant = self.bos_is_constant and bool(same)

    @property
    def has_bos(self) -> bool:
        """Whether token 0 was the same in every sample, as a causal text encoder's is."""
        return self.bos is not None and self.bos_is_constant


class _WatchedWeight(Tensor):
    """A weight that notes the input it is multiplied with."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func not in (F.linear, F.conv2d):
            return super().__torch_function__(func, types, args, kwargs)
        x = args[0] if args else kwargs["input"]
        weight = args[1] if len(args) > 1 else kwargs["weight"]
        weight.watch.note(x)
        # The output is a plain tensor, so that only weights are of this class.
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)


class Recorder:
    """The watches of a model's layers, from :func:`observe`; :meth:`params` turns them into ``QuantParams``."""

    def __init__(self, model: nn.Module):
        self._model = model
        family, points = families.family_of(model), families.split_points(model)
        self.watches: dict[str, _Watch] = {}
        for name, module in families.layers_of(model).items():
            is_conv = isinstance(module, nn.Conv2d)
            groups = points.get(name, [module.weight.shape[1]])
            self.watches[name] = _Watch(groups, 1 if is_conv else -1, family.sees_text(name))

    def params(self, bos: bool = True) -> QuantParams:
        """Scales and zero points of all layers, from the ranges seen so far.

        ``bos``: leave a constant first token out of the ranges and keep its input and output. Raises ``MixDQError``
        for layers that were never run.
        """
        unseen = [name for name, w in self.watches.items() if not w.ranges]
        if unseen:
            raise MixDQError(f"{len(unseen)} layers were never run while calibrating: {name_list(unseen)}")
        layers = families.layers_of(self._model)
        return QuantParams(
            layers={name: _layer_params(layers[name], w, bos and w.has_bos) for name, w in self.watches.items()},
            bos_aware=bos and any(w.has_bos for w in self.watches.values()),
            model_hash=model_hash(families.layer_shapes(self._model)),
            source="calibration",
        )


def _layer_params(module: nn.Module, watch: _Watch, bos: bool) -> LayerParams:
    weight = module.weight.detach()
    low, high = watch.ranges["without_bos" if bos else "all"]
    ends = torch.stack([low, high])
    act = {bits: ops.dynamic_range(ends, bits, 0) for bits in ACT_BITS}
    token = watch.bos.to(weight) if bos else None
    return LayerParams(
        weight_scale={b: MixDQTensor.from_float(weight, b, input_groups=watch.groups).scale.cpu() for b in WEIGHT_BITS},
        act_scale={b: scale.reshape(-1).cpu() for b, (scale, _) in act.items()},
        act_zero_point={b: zero_point.reshape(-1).cpu() for b, (_, zero_point) in act.items()},
        bos_input=token.cpu() if bos else None,
        bos_output=F.linear(token, weight, module.bias).cpu() if bos else None,
    )


@contextmanager
def observe(model: nn.Module) -> Iterator[Recorder]:
    """Watch the inputs of a floating model's layers while the block runs; weights are as before afterwards."""
    recorder = Recorder(model)
    layers = families.layers_of(model)
    originals = {name: layers[name].weight for name in recorder.watches}
    quantized = [name for name, w in originals.items() if isinstance(w, MixDQTensor)]
    if quantized:
        raise MixDQError(f"only a floating model can be calibrated; {len(quantized)} layers are quantized already")
    try:
        for name, watch in recorder.watches.items():
            watched = nn.Parameter(originals[name].detach().as_subclass(_WatchedWeight), requires_grad=False)
            watched.watch = watch
            layers[name].weight = watched
        yield recorder
    finally:
        for name, weight in originals.items():
            layers[name].weight = weight


def calibrate(
    pipe,
    prompts: Sequence[str],
    *,
    num_inference_steps: int = 1,
    guidance_scale: float = 0.0,
    batch_size: int = 8,
    seed: int = 0,
    bos: bool = True,
    progress: bool | None = None,
    **pipe_kwargs,
) -> QuantParams:
    """Run a diffusers pipeline on ``prompts`` and derive quantization parameters for its UNet from what enters it.

    Activation ranges are the lowest and highest value seen, asymmetric, one per layer and input group; weight scales
    are symmetric per output channel for 8, 4 and 2 bits. ``bos`` treats the text encoders' first token apart.
    ``pipe_kwargs`` go to the pipeline. Raises ``MixDQError`` without prompts and for inputs that are not finite.
    """
    if isinstance(prompts, str) or not prompts:
        raise MixDQError(f"calibrate() needs a list of prompts; found {prompts!r}")
    batches = [list(prompts[i : i + batch_size]) for i in range(0, len(prompts), batch_size)]
    generator = torch.Generator("cpu").manual_seed(seed)
    with observe(pipe.unet) as recorder, torch.no_grad():
        for batch in track(batches, "Calibrating", len(batches), progress):
            pipe(
                prompt=batch,
                num_inference_steps=num_inference_steps,
                guidance_scale=guidance_scale,
                generator=generator,
                output_type="latent",
                **pipe_kwargs,
            )
        return recorder.params(bos)
