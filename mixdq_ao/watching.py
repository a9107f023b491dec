"""Watch what enters the layers of a floating model, by tensor subclass: no module is replaced.

While a model is watched, each weight is a ``_WatchedWeight`` that shares the weight's storage, hands the layer's input
to a function, and computes as before.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixdq_ao import families
from mixdq_ao.errors import MixDQError
from mixdq_ao.tensor import MixDQTensor


class LayerWeight(Tensor):
    """A weight that runs its own layer: ``F.linear`` and ``F.conv2d`` become ``weight.run(func, x, bias, ...)``.

    What ``run`` returns stays a plain tensor, so that only weights are of this class.
    """

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func not in (F.linear, F.conv2d):
            return super().__torch_function__(func, types, args, kwargs)
        x, weight, *rest = bind(func, *args, **kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            return weight.run(func, x, *rest)

    def run(self, func, x: Tensor, *rest) -> Tensor:
        """The layer's output; ``rest`` are the arguments after the weight, all positional."""
        return func(x, self, *rest)


def bind(func, input, weight, bias=None, *rest, **kwargs) -> tuple:
    """The arguments of a call of ``F.linear`` or ``F.conv2d``, all positional: input, weight, bias, stride, ..."""
    if func is F.conv2d:
        names, defaults = ("stride", "padding", "dilation", "groups"), (1, 0, 1, 1)
        rest += tuple(kwargs.get(n, d) for n, d in list(zip(names, defaults, strict=True))[len(rest) :])
    return input, weight, bias, *rest


class _WatchedWeight(LayerWeight):
    """A weight that shows what it is multiplied with to ``self.note(x)``."""

    def run(self, func, x, *rest):
        self.note(x.detach())
        return super().run(func, x, *rest)


@contextmanager
def watching(model: nn.Module, notes: Mapping[str, Callable[[Tensor], None]]) -> Iterator[None]:
    """While the block runs, call ``notes[layer](x)`` with each input of each of these layers; a ``MixDQError`` that it
    raises gets the layer's name in front. Weights are as before afterwards.
    """
    layers = families.layers_of(model)
    originals = {name: layers[name].weight for name in notes}
    quantized = [name for name, w in originals.items() if isinstance(w, MixDQTensor)]
    if quantized:
        raise MixDQError(
            f"only a floating model can be calibrated; {len(quantized)} layers are quantized already, first "
            f"{quantized[0]}"
        )
    try:
        for name, note in notes.items():
            watched = nn.Parameter(originals[name].detach().as_subclass(_WatchedWeight), requires_grad=False)
            watched.note = _named(name, note)
            layers[name].weight = watched
        yield
    finally:
        for name, weight in originals.items():
            layers[name].weight = weight


def _named(name: str, note: Callable[[Tensor], None]) -> Callable[[Tensor], None]:
    def named(x: Tensor) -> None:
        try:
            note(x)
        except MixDQError as error:
            raise MixDQError(f"{name}: {error}") from None

    return named
