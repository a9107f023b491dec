"""Storage of 8, 4 and 2 bit codes.

Codes are packed along dimension 1, the input channels, each input group on its own, so that every group starts on a
byte. Within a byte the first code takes the lowest bits; codes are two's complement.
"""

import torch
from torch import Tensor

from mixdq_ao.bits import width


def packed_channels(bits: int, input_groups: list[int]) -> int:
    """Length of dimension 1 of the packed tensor for groups of that many input channels."""
    return sum(width(bits).packed_size(c) for c in input_groups)


def pack(codes: Tensor, bits: int, input_groups: list[int]) -> Tensor:
    """int8 codes ``[out, in, ...]`` to their stored form ``[out, packed, ...]`` (int8, or uint8 below 8 bits).

    A convolution's result is channels-last. Codes must lie in the range of ``bits``.
    """
    w = width(bits)
    rows = _channels_last(codes)
    if w.values_per_byte > 1:
        rows = torch.cat([_pack_rows(r, w) for r in rows.split(input_groups, dim=-1)], dim=-1)
    return _channels_first(rows.contiguous())


def unpack(qdata: Tensor, bits: int, input_groups: list[int]) -> Tensor:
    """The inverse of :func:`pack`: int8 codes ``[out, in, ...]``. For 8 bits this is ``qdata`` itself."""
    w = width(bits)
    if w.values_per_byte == 1:
        return qdata
    sizes = [w.packed_size(c) for c in input_groups]
    parts = _channels_last(qdata).split(sizes, dim=-1)
    rows = [_unpack_rows(p, w)[..., :c] for p, c in zip(parts, input_groups, strict=True)]
    return _channels_first(torch.cat(rows, dim=-1) if len(rows) > 1 else rows[0].contiguous())


def _channels_last(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1) if x.dim() == 4 else x


def _channels_first(x: Tensor) -> Tensor:
    return x.permute(0, 3, 1, 2) if x.dim() == 4 else x


def _pack_rows(rows: Tensor, w) -> Tensor:
    per = w.values_per_byte
    pad = -rows.shape[-1] % per
    fields = torch.nn.functional.pad(rows, (0, pad)).view(torch.uint8) & (2**w.bits - 1)
    fields = fields.unflatten(-1, (-1, per))
    packed = fields[..., 0]
    for i in range(1, per):
        packed = packed | (fields[..., i] << (i * w.bits))
    return packed


def _unpack_rows(packed: Tensor, w) -> Tensor:
    signed = packed.view(torch.int8)
    # Shift the wanted field to the top, then arithmetically back down: that extends the sign.
    fields = [(signed << (8 - w.bits - i * w.bits)) >> (8 - w.bits) for i in range(w.values_per_byte)]
    return torch.stack(fields, dim=-1).flatten(-2)
