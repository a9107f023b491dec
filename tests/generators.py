"""Quantized layers and their inputs, drawn together with what the reference needs to know about them."""

from dataclasses import dataclass, field

import torch
from hypothesis import strategies as st
from reference import Layer, code_range
from torch import Tensor

from mixdq_ao.bits import ACT_BITS, WEIGHT_BITS
from mixdq_ao.packing import pack
from mixdq_ao.tensor import MixDQTensor

DTYPES = [torch.float32, torch.bfloat16, torch.float16]

channels = st.one_of(st.integers(1, 130), st.sampled_from([1, 2, 16, 17, 32, 64, 80, 128, 130]))


@dataclass
class Case:
    """A layer: the quantized ``weight``, its ``bias``, and the ``layer`` of the reference."""

    weight: MixDQTensor
    bias: Tensor | None
    layer: Layer
    groups: list[int]
    generator: torch.Generator = field(repr=False)

    def input(self, shape, dtype=torch.float32) -> Tensor:
        """Values that mostly fall inside the range of the activations, with some beyond both ends."""
        return (torch.randn(shape, generator=self.generator) * 1.5).to(dtype)


def make_case(out, groups, kernel=(), bits=8, act_bits=8, zero_points=None, bias=True, seed=0, **extra) -> Case:
    g = torch.Generator().manual_seed(seed)
    low, high = code_range(bits)
    shape = (out, sum(groups), *kernel)
    codes = torch.randint(low, high + 1, shape, dtype=torch.int8, generator=g)
    scale = torch.rand(len(groups), out, generator=g) * 0.02 + 1e-4
    a_low, a_high = code_range(act_bits)
    if zero_points is None:
        zero_points = torch.randint(a_low, a_high + 1, (len(groups),), generator=g).tolist()
    act_scale = (torch.rand(len(groups), generator=g) + 0.5) * 4 / 2**act_bits
    act_zero_point = torch.tensor(zero_points, dtype=torch.float32)
    bias = torch.randn(out, generator=g) if bias else None
    weight = MixDQTensor.from_codes(
        pack(codes, bits, groups),
        scale,
        bits=bits,
        shape=shape,
        dtype=torch.float32,
        input_groups=groups,
        act_bits=act_bits,
        act_scale=act_scale,
        act_zero_point=act_zero_point,
        **extra,
    )
    return Case(weight, bias, Layer(codes, scale, groups, act_scale, act_zero_point, act_bits, bias), groups, g)


@st.composite
def cases(draw, kernels=None) -> Case:
    """A layer of 1 to 3 input groups; linear without ``kernels``, a strategy for the kernel size."""
    total = draw(channels)
    cuts = draw(st.sets(st.integers(1, total - 1), max_size=2)) if total > 1 else set()
    edges = [0, *sorted(cuts), total]
    groups = [b - a for a, b in zip(edges, edges[1:], strict=False)]
    act_bits = draw(st.sampled_from(ACT_BITS))
    low, high = code_range(act_bits)
    zero = st.one_of(st.sampled_from([low, high, 0]), st.integers(low, high))
    return make_case(
        draw(channels),
        groups,
        () if kernels is None else draw(kernels),
        bits=draw(st.sampled_from(WEIGHT_BITS)),
        act_bits=act_bits,
        zero_points=[draw(zero) for _ in groups],
        bias=draw(st.booleans()),
        seed=draw(st.integers(0, 2**31)),
    )


# Each makes a view with the values of its argument, laid out in memory in another way.
def channel_slice(x: Tensor, dim: int) -> Tensor:
    wide = torch.full([n + 5 * (d == dim % x.dim()) for d, n in enumerate(x.shape)], float("nan"), dtype=x.dtype)
    view = wide.narrow(dim, 2, x.shape[dim])
    return view.copy_(x)


LINEAR_LAYOUTS = {
    "contiguous": lambda x: x,
    "channel slice": lambda x: channel_slice(x, -1),
    "token slice": lambda x: channel_slice(x, -2) if x.dim() > 1 else x,
    "batch-strided": lambda x: x.repeat_interleave(2, 0)[::2],
    "transposed": lambda x: x.mT.contiguous().mT if x.dim() > 1 else x,
}
IMAGE_LAYOUTS = {
    "contiguous": lambda x: x,
    "channels-last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "channel slice": lambda x: channel_slice(x, 1),
    "channel slice of channels-last": lambda x: channel_slice(x.permute(0, 2, 3, 1).contiguous(), -1).permute(
        0, 3, 1, 2
    ),
    "batch-strided": lambda x: x.repeat_interleave(2, 0)[::2],
    "transposed": lambda x: x.mT.contiguous().mT,
}
