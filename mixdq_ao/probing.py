"""How much of each layer's rounding error reaches the UNet's output, by one backward pass for all layers.

A layer's rounding error d, at its output, reaches the UNet output as J d, J the Jacobian of what follows. For a probe
v of independent standard normal values, ``E (v . J d)^2 = |J d|^2``, and ``v . J d`` is the product of d with the
gradient of ``v . output`` at the layer's output, which backward passes by anyway.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from mixdq_ao import families
from mixdq_ao.bits import KINDS
from mixdq_ao.checkpoint import QuantParams
from mixdq_ao.errors import MixDQError, name_list
from mixdq_ao.simulate import act_quantizer, input_groups, is_bos, rounded_weight, weight_scale
from mixdq_ao.watching import LayerWeight


@dataclass
class Call:
    """One call of the UNet: its arguments, and its output, detached."""

    args: tuple
    kwargs: dict
    output: Tensor

    @property
    def batch(self) -> int:
        return self.output.shape[0]

    def on_batch(self, change) -> tuple[tuple, dict]:
        """The arguments with ``change`` made to every tensor that has the batch as its first dimension."""

        def each(t: Tensor) -> Tensor:
            return change(t) if t.dim() and t.shape[0] == self.batch else t

        return tree_map_only(Tensor, each, (self.args, self.kwargs))


class _ProbedWeight(LayerWeight):
    """A weight whose layer's output hands its gradient, with the layer's input, to ``self.probe``."""

    def run(self, func, x, *rest):
        y = super().run(func, x, *rest)
        if not y.requires_grad:
            y.requires_grad_()  # no other layer is before this one: what enters the UNet has no gradient
        y.register_hook(partial(self.probe, func, x.detach(), rest[1:]))
        return y


class _Probe:
    """Products of a layer's rounding errors with the gradients of each probe, summed over the layer's calls.

    ``shape`` of the batch: probes, how often the pipeline repeats the prompts (twice with guidance), prompts.
    """

    def __init__(self, name: str, module: nn.Module, params: QuantParams | None, points, kinds, shape: tuple):
        self._weight, self._shape = module.weight.detach(), shape
        groups = input_groups(name, module, params, points)
        p = None if params is None else params.layers[name]
        self._bos = p if p is not None and p.bos_output is not None else None
        self._scales = {b: weight_scale(name, b, params) for b in KINDS["weight"] if "weight" in kinds}
        self._groups = groups
        self._acts = {b: act_quantizer(name, module, b, params, groups) for b in KINDS["act"] if "act" in kinds}
        self.products: dict[tuple[str, int], Tensor] = {}

    @torch.no_grad()
    def __call__(self, func, x: Tensor, rest, gradient: Tensor) -> None:
        # Probes repeat the batch: the first of them has the inputs of all.
        x = x.unflatten(0, self._shape)[0].flatten(0, 1)
        gradient = gradient.unflatten(0, self._shape).float()
        for bits, scale in self._scales.items():
            change = rounded_weight(self._weight, bits, scale, self._groups).sub_(self._weight)
            self._add("weight", bits, func(x, change, None, *rest), gradient)
        for bits, act in self._acts.items():
            change = act(x).sub_(x)
            if self._bos is not None:
                change[:, 0].masked_fill_(is_bos(x, self._bos.bos_input), 0.0)
            self._add("act", bits, func(change, self._weight, None, *rest), gradient)

    def _add(self, kind: str, bits: int, error: Tensor, gradient: Tensor) -> None:
        error = error.unflatten(0, self._shape[1:]).float()
        product = (gradient * error).flatten(3).sum((1, 3)).double()
        before = self.products.get((kind, bits))
        self.products[kind, bits] = product if before is None else before + product

    def noise(self, kind: str) -> Tensor:
        """Estimated energy that reaches the UNet output, at each width, summed over the prompts."""
        return torch.stack([self.products[kind, bits].square().mean(0).sum() for bits in KINDS[kind]])


@contextmanager
def _probing(model: nn.Module, probes: dict[str, _Probe]) -> Iterator[None]:
    """While the block runs, backward passes every layer's gradient to its probe, and stops at the parameters."""
    layers = families.layers_of(model)
    originals = {name: layers[name].weight for name in probes}
    flags = {p: p.requires_grad for p in model.parameters()}
    try:
        for p in flags:
            p.requires_grad_(False)
        for name, probe in probes.items():
            weight = nn.Parameter(originals[name].detach().as_subclass(_ProbedWeight), requires_grad=False)
            weight.probe = probe
            layers[name].weight = weight
        yield
    finally:
        for name, weight in originals.items():
            layers[name].weight = weight
        for p, flag in flags.items():
            p.requires_grad_(flag)


def probe_call(unet: nn.Module, params: QuantParams | None, call: Call, kinds, names, probes: int, generators) -> dict:
    """Energies that one UNet call's output has, and that each layer's rounding adds to it, to first order.

    ``generators``: of torch, one for each prompt, so that its directions do not depend on the prompts beside it.
    """
    layers, points, prompts = families.layers_of(unet), families.split_points(unet), len(generators)
    shape = probes, call.batch // prompts, prompts
    made = {name: _Probe(name, layers[name], params, points, kinds, shape) for name in names}
    args, kwargs = call.on_batch(lambda t: t.repeat(probes, *(1,) * (t.dim() - 1)))
    with _probing(unet, made), torch.enable_grad():
        output = unet(*args, **{**kwargs, "return_dict": False})[0]
        directions = [torch.randn((probes * shape[1], *output.shape[1:]), generator=g) for g in generators]
        output.backward(torch.stack(directions, 1).flatten(0, 1).to(output))
    if idle := [name for name, probe in made.items() if not probe.products]:
        raise MixDQError(f"{len(idle)} layers do not reach the UNet's output: {name_list(idle)}")
    noise = {}
    for kind in kinds:
        values = torch.stack([made[name].noise(kind) for name in names]).tolist()  # one wait for all layers
        noise[kind] = dict(zip(names, values, strict=True))
        if wrong := [name for name, v in noise[kind].items() if not all(map(math.isfinite, v))]:
            raise MixDQError(f"{wrong[0]}: the gradient is not finite; run the UNet in float32 or bfloat16")
    return {"signal": float(call.output.double().square().sum()), "noise": noise}
