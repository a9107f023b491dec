"""The original project's files, read safely: ``ckpt.pth``, ``new_ckpt.pth`` (as the public file) and the BOS file.

Its checkpoints map ``<layer>.weight_quantizer`` and ``<layer>.act_quantizer`` to scales and zero points for 2, 4 and 8
bits, stacked in that order; ``_0`` at the end is the second half of a split shortcut. The raw form keeps
``[buffers, parameters]`` with trailing axes of size 1, the converted form a plain dict in fp16. Zero points are
unsigned.
"""

import re

import torch
from torch import Tensor

from mixdq_ao.bits import ACT_BITS, WIDTHS
from mixdq_ao.checkpoint import BOS_OUTPUT, LayerParams, QuantParams
from mixdq_ao.errors import CheckpointError
from mixdq_ao.files import TensorFile, is_pickle, load_pickle

STACKED_BITS = (2, 4, 8)  # the leading axis of every list
_KEY = re.compile(r"(?P<layer>.+)\.(?P<kind>weight|act)_quantizer(?P<part>_0|_[qkv]|_softmax)?")
_UNUSED_PARTS = ("_q", "_k", "_v", "_softmax")  # attention's own quantizers, never used
_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def is_original(path) -> bool:
    """Whether the content of ``path``, not its name, is a pickle as the original wrote it."""
    return is_pickle(path)


def read_params(path) -> QuantParams:
    """Quantization parameters from our safetensors file or the original's checkpoint. Raises ``CheckpointError``."""
    return read_original(path) if is_original(path) else QuantParams.load(path)


def read_original(path) -> QuantParams:
    """Reads a raw or converted checkpoint of the original project.

    Scales become fp32, activation zero points signed, and the halves of a split shortcut two groups; activation
    entries for 2 bits and attention's unused quantizers are dropped. Raises ``CheckpointError`` naming file, key and
    rule for anything that does not fit, asymmetric weights among it.
    """
    content = load_pickle(path)
    if not isinstance(content, dict) or not content:
        raise CheckpointError(path, "", "must be a dict of quantizers", type(content).__name__)
    parts: dict[str, dict[tuple[str, str], tuple[Tensor, Tensor]]] = {}
    for key, value in content.items():
        match = _KEY.fullmatch(key) if isinstance(key, str) else None
        if match is None:
            rule = "keys must end in .weight_quantizer or .act_quantizer, with _0 for a second half"
            raise CheckpointError(path, str(key)[:200], rule)
        if match["part"] not in _UNUSED_PARTS:
            entry = parts.setdefault(match["layer"], {})
            entry[match["kind"], match["part"] or ""] = _quantizer(path, key, match["kind"], value)
    params = QuantParams(
        {layer: _layer(path, layer, entry) for layer, entry in parts.items()}, bos_aware=True, source=str(path)
    )
    params.validate(path)
    return params


def _quantizer(path, key: str, kind: str, value) -> tuple[Tensor, Tensor]:
    """Scales and zero points of one quantizer, fp32, ``[3, out]`` for a weight and ``[3]`` for an activation."""
    if isinstance(value, list | tuple) and len(value) == 2 and isinstance(value[0], dict):
        if value[1]:
            raise CheckpointError(path, key, "learned rounding parameters cannot be used", f"{len(value[1])} of them")
        value = value[0]
    if not isinstance(value, dict):
        raise CheckpointError(path, key, "must be a dict or [buffers, parameters]", type(value).__name__)
    scale, zero_point = (_stacked(path, key, kind, name, value.get(name)) for name in ("delta_list", "zero_point_list"))
    if zero_point.shape != scale.shape:
        shapes = f"{list(zero_point.shape)} and {list(scale.shape)}"
        raise CheckpointError(path, key, "zero_point_list must have the shape of delta_list", shapes)
    if not (torch.isfinite(scale) & (scale > 0)).all():
        rows = scale.reshape(len(STACKED_BITS), -1)
        bad = [b for b, row in zip(STACKED_BITS, rows, strict=True) if not (torch.isfinite(row) & (row > 0)).all()]
        advice = "An fp16 file cannot hold steps below 3e-8; convert the raw checkpoint instead."
        raise CheckpointError(
            path, f"{key}.delta_list", "scales must be finite and positive", f"others at {bad} bits", advice
        )
    if kind == "weight" and zero_point.count_nonzero():
        advice = "Only symmetric weights can be used; quantize the weights again with the symmetric setting."
        raise CheckpointError(
            path, f"{key}.zero_point_list", "weight zero points must be 0", "asymmetric weights", advice
        )
    return scale, zero_point


def _stacked(path, key: str, kind: str, name: str, value) -> Tensor:
    """One stacked list in fp32 without its axes of size 1."""
    place = f"{key}.{name}"
    _check_stored(path, place, value)
    if value.dim() == 0 or value.shape[0] != len(STACKED_BITS):
        rule = f"the first axis must hold {', '.join(map(str, STACKED_BITS))} bits"
        raise CheckpointError(path, place, rule, f"shape {list(value.shape)}")
    kept = 2 if kind == "weight" else 1
    if value.dim() < kept or value[0].numel() == 0 or any(size != 1 for size in value.shape[kept:]):
        rule = "shape must be [3, out] or [3, out, 1, ...]" if kind == "weight" else "shape must be [3] or [3, 1, ...]"
        raise CheckpointError(path, place, rule, f"shape {list(value.shape)}")
    return value.detach().float().reshape(value.shape[:kept])


def _check_stored(path, key: str, value) -> None:
    """Refuses what is no plain tensor, and one whose strides make it larger than its bytes in the file."""
    if type(value) is not Tensor or value.layout is not torch.strided or value.dtype not in _FLOATS:
        found = str(value.dtype) if isinstance(value, Tensor) else type(value).__name__
        raise CheckpointError(path, key, "must be a dense floating-point tensor", found)
    if value.device.type != "cpu" or value.numel() * value.element_size() > value.untyped_storage().nbytes():
        raise CheckpointError(path, key, "every element must be stored in the file", f"shape {list(value.shape)}")


def _layer(path, layer: str, entry: dict) -> LayerParams:
    """One layer from its one or two halves. The halves' weights are stacked to ``[groups, out]``."""
    halves = [""] if not any(part for _, part in entry) else ["", "_0"]
    for kind in ("weight", "act"):
        for half in halves:
            if (kind, half) not in entry:
                there = ", ".join(sorted(f"{k}_quantizer{p}" for k, p in entry))
                rule = "weight and activation quantizers must come in pairs, a second half with a first"
                raise CheckpointError(path, f"{layer}.{kind}_quantizer{half}", rule, f"only {there}")
    weights = [entry["weight", half][0] for half in halves]
    if len({len(w[0]) for w in weights}) != 1:
        found = " and ".join(str(len(w[0])) for w in weights)
        raise CheckpointError(
            path, f"{layer}.weight_quantizer_0", "both halves must have as many output channels", found
        )
    params = LayerParams({bits: torch.stack([w[i] for w in weights]) for i, bits in enumerate(STACKED_BITS)})
    for bits in ACT_BITS:
        i = STACKED_BITS.index(bits)
        params.act_scale[bits] = torch.stack([entry["act", half][0][i] for half in halves])
        params.act_zero_point[bits] = torch.stack([entry["act", half][1][i] for half in halves]) + WIDTHS[bits].qmin
    return params


def read_bos(path) -> dict[str, Tensor]:
    """BOS outputs, layer name -> ``[out]``, from the original's pickled dict or from the same as safetensors.

    Stored are ``[1, 1, out]`` or ``[out]``, floating. Raises ``CheckpointError`` naming file, key and rule.
    """
    if is_original(path):
        content = load_pickle(path)
    else:
        file = TensorFile(path)
        content = {name: file.read(name) for name in file.entries}
    if not isinstance(content, dict) or not content:
        raise CheckpointError(path, "", "must be a dict of BOS outputs with at least one layer")

    def fail(key, rule, found=""):
        raise CheckpointError(path, key, rule, found)

    for name, value in content.items():
        if not isinstance(name, str) or not name:
            fail(str(name)[:200], "a layer name must be a non-empty string", repr(name)[:80])
        _check_stored(path, name, value)
        if value.dim() not in (1, 3) or value.numel() != value.shape[-1]:
            fail(name, "shape must be [1, 1, out] or [out]", f"shape {list(value.shape)}")
        BOS_OUTPUT.check(fail, name, value.flatten(), {})
    return {name: value.detach().flatten() for name, value in content.items()}


def attach_bos(params: QuantParams, path) -> None:
    """Put the BOS outputs of ``path`` into ``params``. Raises ``CheckpointError``, before any change, for a layer that
    ``params`` lacks and for an output of another size."""
    outputs = read_bos(path)
    for name, output in outputs.items():
        layer = params.layers.get(name)
        if layer is None:
            raise CheckpointError(path, name, "must be a layer of the checkpoint", advice=f"It is {params.source}.")
        for scale in layer.weight_scale.values():
            if output.numel() != scale.shape[1]:
                raise CheckpointError(path, name, f"must have {scale.shape[1]} values", str(output.numel()))
    for name, output in outputs.items():
        params.layers[name].bos_output = output
