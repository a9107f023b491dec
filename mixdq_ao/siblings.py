"""Layers that read the same tensor: which of them may share one quantized input, and their weights side by side.

Both are decided from values and addresses, outside of any graph: ``passes`` merges layers by the number given here,
which is a guard of the compiled graph, and the operator that runs merged layers looks itself whether they are adjacent.
"""

import torch
from torch import Tensor, nn

from mixdq_ao import families
from mixdq_ao.tensor import MixDQTensor

# As many layers run as one at most. Bounds the outputs that wait for their turn (all keys and values of the text in an
# SDXL UNet are 166,400 columns), and the memory that packing needs for a moment.
MAX_MERGED = 20

# Packed tensors start at multiples of this many bytes; Inductor would copy others at every call.
_ALIGNMENT = 16


def mark_shared(model: nn.Module) -> None:
    """Set ``act_group`` of every weight whose layer may have siblings, by comparing what would be shared.

    Numbers count from 0 within a set of siblings, so that equal blocks of a model get equal numbers and one compiled
    graph serves them. Call it again after changing activation parameters by hand.
    """
    for layers in families.siblings_of(model):
        numbers: dict[str, int] = {}
        for weight in _quantized(layers):
            known = weight.act_scale is not None and not weight.is_meta
            weight.act_group = numbers.setdefault(repr(weight._shared_values()), len(numbers)) if known else None


def pack_siblings_(model: nn.Module, max_merged: int = MAX_MERGED) -> int:
    """Make the weights of layers that will be merged adjacent in memory; returns how many sets were moved.

    Values, shapes, ``state_dict`` and files stay as they are. At any time one set at most is there twice; sets that are
    packed already stay where they are. Moving, casting or deep-copying a model unpacks it, which costs speed only.
    """
    moved = 0
    for layers in families.siblings_of(model):
        sets: dict[tuple, list[nn.Module]] = {}
        for layer in layers.values():
            if _is_mergeable(layer.weight):
                sets.setdefault(_merge_key(layer), []).append(layer)
        for found in sets.values():
            for first in range(0, len(found), max_merged):
                moved += _pack(found[first : first + max_merged])
    return moved


def _quantized(layers: dict[str, nn.Module]) -> list[MixDQTensor]:
    return [layer.weight for layer in layers.values() if isinstance(layer.weight, MixDQTensor)]


def _is_mergeable(weight: Tensor) -> bool:
    return isinstance(weight, MixDQTensor) and weight.act_group is not None and len(weight.input_groups) == 1


def _merge_key(layer: nn.Module) -> tuple:
    weight = layer.weight
    return weight.act_group, weight.bits, weight.qdata.shape[1], weight.qdata.device, layer.bias is None


def _pack(layers: list[nn.Module]) -> bool:
    weights = [layer.weight for layer in layers]
    moved = False
    for name in ("qdata", "alpha", "beta"):
        slices = _adjacent([getattr(weight, name) for weight in weights])
        for weight, part in zip(weights, slices, strict=True):
            moved |= part is not getattr(weight, name)
            setattr(weight, name, part)
    if layers[0].bias is not None:
        for layer, part in zip(layers, _adjacent([layer.bias.data for layer in layers]), strict=True):
            layer.bias.data = part
    return moved


def _adjacent(tensors: list[Tensor]) -> list[Tensor]:
    """The same values as slices of one new tensor, or the tensors themselves if nothing is to be done."""
    sizes = [t.nbytes for t in tensors]
    follow = all(
        a.data_ptr() + size == b.data_ptr() and a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
        for a, b, size in zip(tensors, tensors[1:], sizes, strict=False)
    )
    fits = all(t.is_contiguous() and size % _ALIGNMENT == 0 for t, size in zip(tensors, sizes, strict=True))
    if len(tensors) < 2 or follow or not fits or len({t.dtype for t in tensors}) > 1:
        return tensors
    parts = torch.cat([t.flatten() for t in tensors]).split([t.numel() for t in tensors])
    # As tensors of their own: Dynamo would trace the base of every view as well.
    return [part.view(t.shape).data for part, t in zip(parts, tensors, strict=True)]
