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


class _WatchedWeight(Tensor):
    """A weight that shows what it is multiplied with to ``self.note(x)``."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func not in (F.linear, F.conv2d):
            return super().__torch_function__(func, types, args, kwargs)
        x = args[0] if args else kwargs["input"]
        weight = args[1] if len(args) > 1 else kwargs["weight"]
        weight.note(x.detach())
        # The output is a plain tensor, so that only weights are of this class.
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)


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
