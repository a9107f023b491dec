"""Simulated quantization of any W{2,4,8,16}A{4,8,16} mix: floating arithmetic on values that were rounded to codes.

For studies, on any device and in any floating dtype, where what counts is the error and not the speed: sensitivity of
single layers, plans that no kernel runs. Each simulated weight is a tensor subclass of the floating one; no module is
replaced. In float32 it agrees with ``MixDQTensor`` to rounding; in half precision it multiplies rounded operands where
the kernels have one rounding at the end.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from mixdq_ao import families, ops
from mixdq_ao.bits import ACT_BITS, FLOAT_BITS, WEIGHT_BITS, act_width, width
from mixdq_ao.checkpoint import QuantParams
from mixdq_ao.errors import MixDQError, PlanError, name_list
from mixdq_ao.plan import BitPlan
from mixdq_ao.watching import LayerWeight

Mix = Mapping[str, tuple[int, int]]  # layer -> bits of weight and activations; 16 = floating

# A floating weight has no quantizer of its own to say how its layer's input is split.
FLOATING = (FLOAT_BITS, FLOAT_BITS)


class ActQuantizer:
    """Rounds a layer's input to codes and back: ``(clamp(rint(x / s + z)) - z) * s`` for each input group.

    ``scale`` and ``zero_point``: float32 ``[groups]``, or None for a dynamic range, per token of a linear layer and per
    tensor of a convolution. ``channel_dim``: 1 for images, -1 else.
    """

    def __init__(self, bits: int, groups: list[int], channel_dim: int, scale: Tensor | None, zero_point: Tensor | None):
        act_width(bits)
        self.bits, self.groups, self.channel_dim = bits, list(groups), channel_dim
        self.scale, self.zero_point = scale, zero_point

    def __call__(self, x: Tensor) -> Tensor:
        parts = x.split(self.groups, dim=self.channel_dim)
        rounded = [self._part(part, g) for g, part in enumerate(parts)]
        return torch.cat(rounded, dim=self.channel_dim) if len(rounded) > 1 else rounded[0]

    def _part(self, x: Tensor, group: int) -> Tensor:
        if self.scale is None:
            scale, zero_point = ops.dynamic_range(x, self.bits, per_token=self.channel_dim == -1)
        else:
            scale, zero_point = self.scale[group], self.zero_point[group]
        return (ops.codes(x, scale, zero_point, self.bits) - zero_point).mul_(scale).to(x.dtype)


class SimulatedWeight(LayerWeight):
    """A weight whose layer computes as if it were quantized. Made by :func:`simulated_weight`.

    The tensor itself holds the rounded weight; ``act`` rounds the layer's input (None: floating), and where ``act`` is
    there ``bos_output`` takes the first token's row, as in ``MixDQTensor``.
    """

    def run(self, func, x, *rest):
        if self.act is None:
            return super().run(func, x, *rest)
        y = super().run(func, self.act(x), *rest)
        if self.bos_output is None:
            return y
        first = self.bos_output.to(y).expand_as(y[:, 0])
        y[:, 0] = torch.where(is_bos(x, self.bos_input), first, y[:, 0])
        return y


def is_bos(x: Tensor, bos_input: Tensor | None) -> Tensor:
    """Which samples of ``x [batch, tokens, in]`` begin with the token ``bos_input [in]``: bool ``[batch, 1]``.

    All of them without ``bos_input``; none where ``x`` has no tokens.
    """
    if bos_input is None:
        return torch.ones(x.shape[0], 1, dtype=torch.bool, device=x.device)
    bos = bos_input.to(x.device).float()
    distance = (x[:, 0].float() - bos).abs().amax(-1, keepdim=True)
    return distance <= ops.BOS_TOLERANCE * bos.abs().amax()


def rounded_weight(weight: Tensor, bits: int, scale: Tensor | None = None, groups: list[int] | None = None) -> Tensor:
    """The floating weight that ``bits``-bit codes stand for, ``clamp(rint(w / s)) * s``; ``weight`` itself for 16 bits.

    ``scale``: float32 ``[groups, out]``; None = ``max|w| / qmax`` of each output channel and group. The same as
    ``MixDQTensor.from_float(...).dequantize()``, without packing codes and checking what is known to fit.
    """
    weight = weight.detach()
    if bits == FLOAT_BITS:
        return weight
    w = width(bits)
    rows = (-1, *(1,) * (weight.dim() - 1))
    parts = []
    for g, part in enumerate(weight.float().split(groups or [weight.shape[1]], dim=1)):
        if scale is None:
            high = part.flatten(1).abs().amax(1)
            s = torch.where(high > 0, high / w.qmax, 1.0)
        else:
            s = scale[g].to(weight.device)
        s = s.view(rows)
        parts.append((part / s).round_().clamp_(w.qmin, w.qmax).mul_(s))
    return (torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]).to(weight.dtype)


def act_quantizer(name: str, module: nn.Module, bits: int, params: QuantParams | None, groups) -> ActQuantizer | None:
    """How ``module``'s input is rounded with the parameters of layer ``name``; None for 16 bits."""
    if bits == FLOAT_BITS:
        return None
    channel_dim = 1 if isinstance(module, nn.Conv2d) else -1
    if params is None:
        return ActQuantizer(bits, groups, channel_dim, None, None)
    p, device = params.layers[name], module.weight.device
    scale = params.scale(name, "act", bits)
    return ActQuantizer(bits, groups, channel_dim, scale.to(device), p.act_zero_point[bits].to(device))


def input_groups(
    name: str, module: nn.Module, params: QuantParams | None, points: Mapping[str, list[int]]
) -> list[int]:
    """Input channels of each group of a layer: split where its parameters are, or may be where there are none."""
    whole = [module.weight.shape[1]]
    if params is None:
        return points.get(name, whole)
    found = params.layer(name).groups
    groups = whole if found == 1 else points.get(name, whole)
    if found != len(groups):
        raise MixDQError(
            f"{name}: checkpoint {params.source} has {found} input groups, but the model joins {len(groups)}"
        )
    return groups


def weight_scale(name: str, bits: int, params: QuantParams | None) -> Tensor | None:
    """Scale float32 ``[groups, out]`` of layer ``name`` at ``bits``; None = by the largest weight, or 16 bits."""
    if params is None or bits == FLOAT_BITS:
        return None
    return params.scale(name, "weight", bits)


def simulated_weight(
    name: str,
    module: nn.Module,
    weight_bits: int,
    act_bits: int,
    params: QuantParams | None = None,
    points: Mapping[str, list[int]] | None = None,
) -> nn.Parameter:
    """A parameter for ``module.weight`` that makes the layer compute as if quantized; 16 bits stay floating.

    ``params`` gives scales, zero points and BOS outputs of layer ``name``; without it weights are scaled by their
    largest value and activations dynamically. ``points``: input groups by layer, of ``families.split_points``.
    """
    _check_bits(name, weight_bits, act_bits)
    if type(module.weight.data) is not Tensor or not module.weight.is_floating_point():
        raise MixDQError(f"{name}: only a plain floating weight can be simulated; found {type(module.weight).__name__}")
    groups = input_groups(name, module, params, points or {})
    rounded = rounded_weight(module.weight, weight_bits, weight_scale(name, weight_bits, params), groups)
    weight = nn.Parameter(rounded.as_subclass(SimulatedWeight), requires_grad=False)
    weight.act = act_quantizer(name, module, act_bits, params, groups)
    bos = None if params is None else params.layers[name]
    weight.bos_output = None if bos is None or bos.bos_output is None else bos.bos_output.to(module.weight.device)
    weight.bos_input = None if bos is None else bos.bos_input
    return weight


def _check_bits(name: str, weight_bits: int, act_bits: int) -> None:
    for what, bits, known, check in (
        ("weight", weight_bits, WEIGHT_BITS, width),
        ("activation", act_bits, ACT_BITS, act_width),
    ):
        if bits != FLOAT_BITS:
            try:
                check(bits)
            except PlanError:
                raise PlanError(f"{name}: {what} bits must be one of {(*known, FLOAT_BITS)}; found {bits!r}") from None


@contextmanager
def simulated(model: nn.Module, params: QuantParams | None, mix: Mix | tuple[int, int]) -> Iterator[None]:
    """While the block runs, layers of a floating ``model`` compute as if quantized; weights are as before afterwards.

    ``mix`` maps layer -> (weight bits, activation bits), with 16 for floating, or is one pair for all layers but
    grouped convolutions; layers that it does not name stay floating. ``params`` as for :func:`simulated_weight`. A
    rounded copy of each weight below 16 bits is kept meanwhile.
    """
    layers = families.layers_of(model)
    grouped = families.grouped_convolutions(model)
    mix = mix if isinstance(mix, Mapping) else {name: mix for name in layers if name not in grouped}
    if unknown := [name for name in mix if name not in layers]:
        raise PlanError(f"{len(unknown)} names are not layers of the model: {name_list(unknown)}")
    points = families.split_points(model)
    weights = {
        name: simulated_weight(name, layers[name], *bits, params, points)
        for name, bits in mix.items()
        if tuple(bits) != FLOATING
    }
    originals = {name: layers[name].weight for name in weights}
    try:
        for name, weight in weights.items():
            layers[name].weight = weight
        yield
    finally:
        for name, weight in originals.items():
            layers[name].weight = weight


def mix_of(weight_plan: BitPlan, act_plan: BitPlan | None = None) -> dict[str, tuple[int, int]]:
    """The mix that ``MixDQConfig`` makes of two plans: a layer that is missing or None in the plan of activations, or
    None in that of weights, as there; without ``act_plan`` activations stay floating.
    """
    mix = {}
    for name, bits in weight_plan.items():
        act = None if act_plan is None else act_plan.get(name)
        floating = bits is None or (act_plan is not None and name not in act_plan)
        mix[name] = FLOATING if floating else (bits, FLOAT_BITS if act is None else act)
    return mix
