"""The operators of mixdq_ao: schemas, fake implementations, and one implementation for any device.

Schemas are defined here and not in C++, so that every operator exists, can be traced and runs on a CPU where the CUDA
library is absent. The implementations below use ``torch._int_mm``, true int8 arithmetic with int32 accumulation, on
any device that has it; the CUDA library replaces them for CUDA tensors where it could be loaded.

Shapes: ``x`` is ``[..., in]`` for linear and ``[batch, in, height, width]`` for conv2d. ``qdata`` is a packed weight
(see ``packing``), ``scale`` and ``alpha`` are float32 ``[groups, out]``, ``beta`` float32 ``[out]``, ``bias``
``[out]`` of any floating dtype, ``weight_sum`` int32 ``[groups, out]``, ``act_scale`` and ``act_zero_point`` float32
``[groups]``. Convolution outputs are channels-last. ``residual`` has the shape of the output, or for a
convolution ``[batch, out, 1, 1]``, and any floating dtype; it is added in float32, before the one rounding.
``bos_input [in]`` and ``bos_output [out]``, of any floating dtype, are a first token and what a layer makes of it: see
``with_bos_row``.
"""

import glob
import os
import warnings

import torch
import torch.nn.functional as F
from torch import Tensor

from mixdq_ao.bits import act_width
from mixdq_ao.errors import MixDQError, UnsupportedError
from mixdq_ao.packing import unpack

# On a CPU the operators work in blocks whose temporaries stay in its cache, instead of on whole tensors: fresh memory
# costs more than the arithmetic. Elements that are quantized at a time, rows that are multiplied at a time, and bytes
# of an im2col block.
_QUANTIZE_BLOCK = 2**18
_ROW_BLOCK = 512
_IM2COL_BYTES = 2**22

# How near the first token must be to bos_input, relative to the largest |bos_input|: text encoders in fp16 and bf16
# round differently from run to run, while another token or a zeroed prompt is far away.
BOS_TOLERANCE = 2**-6

_lib = torch.library.Library("mixdq_ao", "DEF")


def define(schema: str):
    """Define an operator and register the decorated function for every backend."""
    name = schema.partition("(")[0]
    _lib.define(schema, tags=(torch.Tag.pt2_compliant_tag,))

    def register(fn):
        _lib.impl(name, fn, "CompositeExplicitAutograd")
        return fn

    return register


def fake(name: str):
    """Register the decorated function as what ``name`` gives while it is traced: shapes and dtypes alone."""
    return torch.library.register_fake(f"mixdq_ao::{name}", lib=_lib)


# --- quantizers -------------------------------------------------------------------------------------------------------


def per_channel(values: Tensor, input_groups: list[int]) -> Tensor:
    """``[groups]`` to something that broadcasts over channels in the last dimension: ``[1]``, or ``[in]``."""
    if len(input_groups) == 1:
        return values
    return torch.cat([values[g].expand(c) for g, c in enumerate(input_groups)])


def codes(x: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    """``clamp(rint(x / scale + zero_point))`` in float32, not cast to int8 yet; a NaN becomes the zero point.

    Plain aten arithmetic: Inductor fuses it with whatever produced ``x``.
    """
    w = act_width(bits)
    return torch.nan_to_num_(x.float() / scale, nan=0.0).add_(zero_point).round_().clamp_(w.qmin, w.qmax)


def quantize_traced(x: Tensor, scale: Tensor, zero_point: Tensor, bits: int, input_groups, pad=None) -> Tensor:
    """The same as the operator ``quantize``, as aten arithmetic for tracing."""
    scale, zero_point = per_channel(scale, input_groups), per_channel(zero_point, input_groups)
    if pad is None:
        return codes(x, scale, zero_point, bits).to(torch.int8).contiguous()
    # A padded real zero has the code of the zero point, so padding first is exact.
    q = codes(F.pad(x, pad) if any(pad) else x, _over_image(scale), _over_image(zero_point), bits)
    return q.to(torch.int8).contiguous(memory_format=torch.channels_last)


def _over_image(values: Tensor) -> Tensor:
    return values.view(-1, 1, 1)


# pad: None for channels in the last dimension; for an image [batch, in, height, width] left, right, top, bottom.
@define("quantize(Tensor x, Tensor scale, Tensor zero_point, int bits, int[] input_groups, SymInt[]? pad) -> Tensor")
def _quantize(x, scale, zero_point, bits, input_groups, pad):
    scale, zero_point = per_channel(scale, input_groups), per_channel(zero_point, input_groups)
    if pad is None:
        if x.is_cuda or x.numel() <= _QUANTIZE_BLOCK:
            return codes(x, scale, zero_point, bits).to(torch.int8, memory_format=torch.contiguous_format)
        out = torch.empty(x.shape, dtype=torch.int8, device=x.device)
        rows = x.reshape(-1, x.shape[-1])
        _quantize_into(out.view(rows.shape), rows, 0, scale, zero_point, bits)
        return out
    scale, zero_point = _over_image(scale), _over_image(zero_point)
    out = _empty_image(_padded_shape(x, pad), torch.int8, x.device)
    inside = out
    if any(pad):
        left, _, top, _ = pad
        out.copy_(zero_point)
        inside = out[:, :, top : top + x.shape[2], left : left + x.shape[3]]
    for image, codes_of_image in zip(x, inside, strict=True):
        _quantize_into(codes_of_image, image, 1, scale, zero_point, bits)
    return out


def _quantize_into(out: Tensor, x: Tensor, dim: int, scale: Tensor, zero_point: Tensor, bits: int) -> None:
    """Fill int8 ``out`` with the codes of ``x``, on a CPU in blocks along ``dim``."""
    step = x.shape[dim] if x.is_cuda else max(1, _QUANTIZE_BLOCK * x.shape[dim] // max(1, x.numel()))
    for part, out_part in zip(x.split(step, dim), out.split(step, dim), strict=True):
        q = codes(part, scale, zero_point, bits)
        # Where the layouts differ it is cheaper to transpose bytes than floats.
        out_part.copy_(q if q.stride(0) == out_part.stride(0) else q.to(torch.int8))


@fake("quantize")
def _(x, scale, zero_point, bits, input_groups, pad):
    if pad is None:
        return torch.empty(x.shape, dtype=torch.int8, device=x.device)
    return _empty_image(_padded_shape(x, pad), torch.int8, x.device)


def _padded_shape(x: Tensor, pad) -> tuple:
    left, right, top, bottom = pad
    return x.shape[0], x.shape[1], x.shape[2] + top + bottom, x.shape[3] + left + right


def _empty_image(shape, dtype, device) -> Tensor:
    n, c, h, w = shape
    return torch.empty((n, h, w, c), dtype=dtype, device=device).permute(0, 3, 1, 2)


def dynamic_range(x: Tensor, bits: int, per_token: bool) -> tuple[Tensor, Tensor]:
    """Scale and signed zero point, float32, of the range of ``x``, which always includes 0.

    ``[..., 1]`` of each token (last dimension), or ``[1]`` of an image ``[batch, channels, height, width]``:
    ``scale = (max - min) / (2^bits - 1)``, and 1 where the range is empty; ``zero_point = rint(-min / scale) -
    2^(bits-1)``.
    """
    w = act_width(bits)
    x = torch.nan_to_num(x, nan=0.0)
    if per_token:
        low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    else:  # The 0 of one more sample gives an empty batch a range and changes no other.
        low, high = F.pad(x.amin((1, 2, 3)), (0, 1)).amin(0, True), F.pad(x.amax((1, 2, 3)), (0, 1)).amax(0, True)
    low, high = low.float().clamp(max=0), high.float().clamp(min=0)
    # Divided one by one, since max - min may overflow where the ends do not.
    span = high / (w.qmax - w.qmin) - low / (w.qmax - w.qmin)
    scale = torch.where(span > 0, span, 1.0)
    return scale, (torch.round(-low / scale) + w.qmin).clamp(w.qmin, w.qmax)


def quantize_per_token_traced(x: Tensor, bits: int, input_groups) -> tuple[Tensor, Tensor, Tensor]:
    """The same as the operator ``quantize_per_token``, as aten arithmetic for tracing."""
    parts = x.split(input_groups, dim=-1)
    ranges = [dynamic_range(p, bits, per_token=True) for p in parts]
    rows = torch.contiguous_format
    xq = [codes(p, s, z, bits).to(torch.int8, memory_format=rows) for p, (s, z) in zip(parts, ranges, strict=True)]
    scale, zero_point = (torch.cat(v, dim=-1) for v in zip(*ranges, strict=True))
    return torch.cat(xq, dim=-1) if len(xq) > 1 else xq[0], scale, zero_point


@define("quantize_per_token(Tensor x, int bits, int[] input_groups) -> (Tensor, Tensor, Tensor)")
def _quantize_per_token(x, bits, input_groups):
    return quantize_per_token_traced(x, bits, input_groups)


@fake("quantize_per_token")
def _(x, bits, input_groups):
    scale = torch.empty((*x.shape[:-1], len(input_groups)), dtype=torch.float32, device=x.device)
    return torch.empty(x.shape, dtype=torch.int8, device=x.device), scale, torch.empty_like(scale)


# --- quantizers fused with what comes before them, in float32: nothing is rounded to the dtype of x in between --------


@define(
    "layer_norm_quantize(Tensor x, Tensor? weight, Tensor? bias, float eps, Tensor scale, Tensor zero_point, int bits, "
    "int[] input_groups) -> Tensor"
)
def _layer_norm_quantize(x, weight, bias, eps, scale, zero_point, bits, input_groups):
    """LayerNorm over the last dimension; ``weight`` and ``bias`` are ``[in]``."""
    y = F.layer_norm(x.float(), x.shape[-1:], _float(weight), _float(bias), eps)
    return _quantize(y, scale, zero_point, bits, input_groups, None)


@fake("layer_norm_quantize")
def _(x, weight, bias, eps, scale, zero_point, bits, input_groups):
    return torch.empty(x.shape, dtype=torch.int8, device=x.device)


@define("geglu_quantize(Tensor x, Tensor scale, Tensor zero_point, int bits, int[] input_groups) -> Tensor")
def _geglu_quantize(x, scale, zero_point, bits, input_groups):
    """``x [..., 2 in]`` is value, gate: ``value * gelu(gate)`` with the exact gelu."""
    value, gate = x.float().chunk(2, dim=-1)
    return _quantize(value * F.gelu(gate), scale, zero_point, bits, input_groups, None)


@fake("geglu_quantize")
def _(x, scale, zero_point, bits, input_groups):
    return torch.empty((*x.shape[:-1], x.shape[-1] // 2), dtype=torch.int8, device=x.device)


@define(
    "group_norm_quantize(Tensor x, int num_groups, Tensor? weight, Tensor? bias, float eps, bool silu, Tensor scale, "
    "Tensor zero_point, int bits, int[] input_groups, SymInt[]? pad) -> Tensor"
)
def _group_norm_quantize(x, num_groups, weight, bias, eps, silu, scale, zero_point, bits, input_groups, pad):
    """GroupNorm of an image, SiLU if asked, then as ``quantize``; without ``pad`` the image stays as large."""
    y = F.group_norm(x.float(), num_groups, _float(weight), _float(bias), eps)
    y = F.silu(y) if silu else y
    return _quantize(y, scale, zero_point, bits, input_groups, pad or _NO_PAD)


@fake("group_norm_quantize")
def _(x, num_groups, weight, bias, eps, silu, scale, zero_point, bits, input_groups, pad):
    return _empty_image(_padded_shape(x, pad or _NO_PAD), torch.int8, x.device)


_NO_PAD = (0, 0, 0, 0)


def _float(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.float()


# --- int8 matrix products ---------------------------------------------------------------------------------------------


def int_matmul(a: Tensor, b: Tensor) -> Tensor:
    """``a [m, k] @ b [n, k].T``, int8 in, exact int32 out."""
    (m, k), n = a.shape, b.shape[0]
    if m == 0 or n == 0 or k == 0:
        return a.new_zeros((m, n), dtype=torch.int32)
    if k == 1:  # torch._int_mm is wrong for it on a CPU (torch 2.13)
        return a.int() * b.int().t()
    a, b = a.contiguous(), b.contiguous()
    if not a.is_cuda:
        return torch._int_mm(a, b.t())
    _warn_no_library()
    # cuBLAS wants more than 16 rows and multiples of 8 elsewhere; zeros change nothing.
    a = F.pad(a, (0, -k % 8, 0, max(0, 17 - m)))
    b = F.pad(b, (0, -k % 8, 0, -n % 8))
    return torch._int_mm(a, b.t())[:m, :n]


def _as_rows_of(x: Tensor, y: Tensor) -> Tensor:
    """``y [rows, out]`` as ``[..., out]``. No view: Dynamo guards what a view was taken from, and would compile again
    for a layer's output that is none."""
    return torch.ops.aten._unsafe_view(y, (*x.shape[:-1], y.shape[-1]))


def _split(x: Tensor, input_groups, dim: int):
    return (x,) if len(input_groups) == 1 else x.split(list(input_groups), dim)


def _multiply(parts, weights, alpha: Tensor, offset: Tensor, residual: Tensor | None, out: Tensor) -> None:
    """``out = sum_g (parts[g] @ weights[g].T) * alpha[g] + offset + residual``.

    int32 sums, then float32 in that order, and one rounding to ``out``.
    """
    y = out if out.dtype == torch.float32 else torch.empty_like(out, dtype=torch.float32)
    for g, (part, weight) in enumerate(zip(parts, weights, strict=True)):
        acc = int_matmul(part, weight)
        if g == 0:
            y.copy_(acc).mul_(alpha[:1] if len(weights) > 1 else alpha)
        else:
            y.add_(acc.to(torch.float32).mul_(alpha[g]))
    y.add_(offset)
    if residual is not None:
        y.add_(residual)
    if y is not out:
        out.copy_(y)


def _offset(beta: Tensor, bias: Tensor | None) -> Tensor:
    # Detached, for exported programs that run where gradients are on: there is no backward pass to record.
    return beta if bias is None else beta + bias.detach().float()


def _check_residual(residual: Tensor | None, *shapes) -> None:
    if residual is not None and residual.shape not in map(torch.Size, shapes):
        raise MixDQError(f"residual must have the output's shape {list(shapes[0])}; found {list(residual.shape)}")


def with_bos_row(y: Tensor, x: Tensor, bos_input: Tensor | None, bos_output: Tensor | None) -> Tensor:
    """Row 0 of each sample becomes ``bos_output`` where token 0 is ``bos_input``, or anyway without a ``bos_input``.

    A 2-D input is one sample, and a token by itself is none. The operators that take these tensors do the same.
    """
    if bos_output is None or x.dim() < 2 or x.shape[-2] == 0:
        return y
    first = bos_output.to(y.dtype).expand_as(y[..., 0, :])
    if bos_input is not None:
        bos = bos_input.float()
        distance = (x[..., 0, :].float() - bos).abs().amax(-1, keepdim=True)
        first = torch.where(distance <= BOS_TOLERANCE * bos.abs().amax(), first, y[..., 0, :])
    y[..., 0, :] = first
    return y


@define(
    "linear_int8(Tensor xq, Tensor qdata, Tensor alpha, Tensor beta, Tensor? bias, int bits, int[] input_groups, "
    "ScalarType out_dtype, Tensor? residual=None) -> Tensor"
)
def _linear_int8(xq, qdata, alpha, beta, bias, bits, input_groups, out_dtype, residual=None):
    out = torch.empty((*xq.shape[:-1], qdata.shape[0]), dtype=out_dtype, device=xq.device)
    _check_residual(residual, out.shape)
    rows = None if residual is None else residual.detach().reshape(-1, out.shape[-1])
    _linear_into(out.view(-1, out.shape[-1]), xq, qdata, alpha, _offset(beta, bias), bits, input_groups, rows)
    return out


def _linear_into(out: Tensor, xq: Tensor, qdata, alpha, offset, bits, input_groups, residual=None) -> None:
    """Fill ``out [rows, out]``, on a CPU in blocks of rows."""
    rows, weights = xq.reshape(-1, xq.shape[-1]), _split(unpack(qdata, bits, input_groups), input_groups, 1)
    step = max(1, len(rows)) if xq.is_cuda else _ROW_BLOCK
    blocks = rows.split(step)
    residuals = [None] * len(blocks) if residual is None else residual.split(step)
    for block, residual_block, out_block in zip(blocks, residuals, out.split(step), strict=True):
        _multiply(_split(block, input_groups, 1), weights, alpha, offset, residual_block, out_block)


@fake("linear_int8")
def _(xq, qdata, alpha, beta, bias, bits, input_groups, out_dtype, residual=None):
    return xq.new_empty((*xq.shape[:-1], qdata.shape[0]), dtype=out_dtype)


@define(
    "linear_int8_geglu(Tensor xq, Tensor qdata, Tensor alpha, Tensor beta, Tensor? bias, int bits, int[] input_groups, "
    "ScalarType dtype, Tensor act_scale, Tensor act_zero_point, int act_bits) -> Tensor"
)
def _linear_int8_geglu(xq, qdata, alpha, beta, bias, bits, input_groups, dtype, act_scale, act_zero_point, act_bits):
    """``geglu_quantize`` of what ``linear_int8`` gives, rounded to ``dtype`` in between; one scale and zero point."""
    y = _linear_int8(xq, qdata, alpha, beta, bias, bits, input_groups, dtype)
    return _geglu_quantize(y, act_scale, act_zero_point, act_bits, [qdata.shape[0] // 2])


@fake("linear_int8_geglu")
def _(xq, qdata, alpha, beta, bias, bits, input_groups, dtype, act_scale, act_zero_point, act_bits):
    return xq.new_empty((*xq.shape[:-1], qdata.shape[0] // 2), dtype=torch.int8)


@define(
    "linear_int8_multi(Tensor xq, Tensor[] qdata, Tensor[] alpha, Tensor[] beta, Tensor?[] bias, int[] bits, "
    "int[] input_groups, ScalarType out_dtype) -> Tensor"
)
def _linear_int8_multi(xq, qdata, alpha, beta, bias, bits, input_groups, out_dtype):
    """Several layers of one input, their outputs side by side: ``[..., sum of out]``."""
    out = torch.empty((*xq.shape[:-1], sum(q.shape[0] for q in qdata)), dtype=out_dtype, device=xq.device)
    parts = out.view(-1, out.shape[-1]).split([q.shape[0] for q in qdata], dim=1)
    for part, q, a, be, bi, width in zip(parts, qdata, alpha, beta, bias, bits, strict=True):
        _linear_into(part, xq, q, a, _offset(be, bi), width, input_groups)
    return out


@fake("linear_int8_multi")
def _(xq, qdata, alpha, beta, bias, bits, input_groups, out_dtype):
    return xq.new_empty((*xq.shape[:-1], sum(q.shape[0] for q in qdata)), dtype=out_dtype)


@define(
    "linear_int8_dynamic(Tensor xq, Tensor x_scale, Tensor x_zero_point, Tensor qdata, Tensor scale, "
    "Tensor weight_sum, Tensor? bias, int bits, int[] input_groups, ScalarType out_dtype) -> Tensor"
)
def _linear_int8_dynamic(xq, x_scale, x_zero_point, qdata, scale, weight_sum, bias, bits, input_groups, out_dtype):
    rows_scale, rows_zero = (v.reshape(-1, len(input_groups), 1) for v in (x_scale, x_zero_point.int()))
    parts, weights = (
        _split(v, input_groups, 1) for v in (xq.reshape(-1, xq.shape[-1]), unpack(qdata, bits, input_groups))
    )
    y = None
    for g, (part, weight) in enumerate(zip(parts, weights, strict=True)):
        acc = int_matmul(part, weight).sub_(rows_zero[:, g] * weight_sum[g])
        term = acc.to(torch.float32).mul_(rows_scale[:, g]).mul_(scale[g])
        y = term if y is None else y.add_(term)
    if bias is not None:
        y.add_(bias)
    return _as_rows_of(xq, y.to(out_dtype))


@fake("linear_int8_dynamic")
def _(xq, x_scale, x_zero_point, qdata, scale, weight_sum, bias, bits, input_groups, out_dtype):
    return xq.new_empty((*xq.shape[:-1], qdata.shape[0]), dtype=out_dtype)


def _conv_output_shape(xq: Tensor, qdata: Tensor, stride, padding, dilation) -> tuple:
    sizes = [
        (xq.shape[2 + i] + 2 * padding[i] - dilation[i] * (qdata.shape[2 + i] - 1) - 1) // stride[i] + 1 for i in (0, 1)
    ]
    return xq.shape[0], qdata.shape[0], *sizes


def _windows(x: Tensor, kernel, out_size, stride, dilation) -> Tensor:
    """A view ``[batch, p, q, r, s, channels]`` of what every output pixel sees of ``x [batch, channels, h, w]``."""
    n, h, w, c = (x.stride(i) for i in (0, 2, 3, 1))
    shape = (x.shape[0], *out_size, *kernel, x.shape[1])
    strides = (n, h * stride[0], w * stride[1], h * dilation[0], w * dilation[1], c)
    return x.as_strided(shape, strides, x.storage_offset())


@define(
    "conv2d_int8(Tensor xq, Tensor qdata, Tensor alpha, Tensor beta, Tensor? bias, SymInt[2] stride, "
    "SymInt[2] padding, SymInt[2] dilation, int bits, int[] input_groups, ScalarType out_dtype, "
    "Tensor? residual=None) -> Tensor"
)
def _conv2d_int8(xq, qdata, alpha, beta, bias, stride, padding, dilation, bits, input_groups, out_dtype, residual=None):
    """Padding adds the code 0; an input with another zero point comes padded from ``quantize``."""
    shape = _conv_output_shape(xq, qdata, stride, padding, dilation)
    _check_residual(residual, shape, (*shape[:2], 1, 1))
    if any(padding):
        xq = F.pad(xq, (padding[1], padding[1], padding[0], padding[0]))
    weights = [w.permute(0, 2, 3, 1).flatten(1) for w in _split(unpack(qdata, bits, input_groups), input_groups, 1)]
    windows = [_windows(x, qdata.shape[2:], shape[2:], stride, dilation) for x in _split(xq, input_groups, 1)]
    out = _empty_image(shape, out_dtype, xq.device)
    pixels, offset = out.permute(0, 2, 3, 1), _offset(beta, bias)
    for batch, lines in _image_blocks(shape, sum(w.shape[1] for w in weights), xq.is_cuda):
        parts = [v[batch, lines].reshape(-1, w.shape[1]) for v, w in zip(windows, weights, strict=True)]
        rows = (
            None if residual is None else residual.expand(shape).permute(0, 2, 3, 1)[batch, lines].reshape(-1, shape[1])
        )
        _multiply(parts, weights, alpha, offset, rows, pixels[batch, lines].view(-1, shape[1]))
    return out


def _image_blocks(shape, reduction: int, whole: bool):
    """Slices of samples and of output lines: several samples, or a part of one, but at least a line."""
    batch, _, height, width = shape
    if whole:
        yield slice(None), slice(None)
        return
    lines = max(1, _IM2COL_BYTES // max(1, reduction * width))
    samples = max(1, lines // max(1, height))
    for first in range(0, batch, samples):
        for top in range(0, height, lines):
            yield slice(first, first + samples), slice(top, top + lines)


@fake("conv2d_int8")
def _(xq, qdata, alpha, beta, bias, stride, padding, dilation, bits, input_groups, out_dtype, residual=None):
    return _empty_image(_conv_output_shape(xq, qdata, stride, padding, dilation), out_dtype, xq.device)


# --- quantize and multiply in one call, for eager ---------------------------------------------------------------------


@define(
    "quantized_linear(Tensor x, Tensor act_scale, Tensor act_zero_point, int act_bits, Tensor qdata, Tensor alpha, "
    "Tensor beta, Tensor? bias, int bits, int[] input_groups, Tensor? bos_input=None, Tensor? bos_output=None) "
    "-> Tensor"
)
def _quantized_linear(
    x, act_scale, act_zero_point, act_bits, qdata, alpha, beta, bias, bits, input_groups, bos_input=None,
    bos_output=None,
):  # fmt: skip
    xq = _quantize(x, act_scale, act_zero_point, act_bits, input_groups, None)
    y = _linear_int8(xq, qdata, alpha, beta, bias, bits, input_groups, x.dtype)
    return with_bos_row(y, x, bos_input, bos_output)


@fake("quantized_linear")
def _(
    x, act_scale, act_zero_point, act_bits, qdata, alpha, beta, bias, bits, input_groups, bos_input=None,
    bos_output=None,
):  # fmt: skip
    return x.new_empty((*x.shape[:-1], qdata.shape[0]))


@define(
    "quantized_linear_dynamic(Tensor x, int act_bits, Tensor qdata, Tensor scale, Tensor weight_sum, Tensor? bias, "
    "int bits, int[] input_groups, Tensor? bos_input=None, Tensor? bos_output=None) -> Tensor"
)
def _quantized_linear_dynamic(
    x, act_bits, qdata, scale, weight_sum, bias, bits, input_groups, bos_input=None, bos_output=None
):
    xq, *ranges = _quantize_per_token(x, act_bits, input_groups)
    y = _linear_int8_dynamic(xq, *ranges, qdata, scale, weight_sum, bias, bits, input_groups, x.dtype)
    return with_bos_row(y, x, bos_input, bos_output)


@fake("quantized_linear_dynamic")
def _(x, act_bits, qdata, scale, weight_sum, bias, bits, input_groups, bos_input=None, bos_output=None):
    return x.new_empty((*x.shape[:-1], qdata.shape[0]))


@define(
    "quantized_conv2d(Tensor x, Tensor act_scale, Tensor act_zero_point, int act_bits, Tensor qdata, Tensor alpha, "
    "Tensor beta, Tensor? bias, SymInt[2] stride, SymInt[] pad, SymInt[2] dilation, int bits, int[] input_groups) "
    "-> Tensor"
)
def _quantized_conv2d(
    x, act_scale, act_zero_point, act_bits, qdata, alpha, beta, bias, stride, pad, dilation, bits, input_groups
):
    """``pad`` is left, right, top, bottom, with real zeros."""
    xq = _quantize(x, act_scale, act_zero_point, act_bits, input_groups, pad)
    return _conv2d_int8(xq, qdata, alpha, beta, bias, stride, (0, 0), dilation, bits, input_groups, x.dtype)


@fake("quantized_conv2d")
def _(x, act_scale, act_zero_point, act_bits, qdata, alpha, beta, bias, stride, pad, dilation, bits, input_groups):
    padded = x.new_empty(_padded_shape(x, pad))
    return _empty_image(_conv_output_shape(padded, qdata, stride, (0, 0), dilation), x.dtype, x.device)


# --- weight-only ------------------------------------------------------------------------------------------------------


def dequantize(qdata: Tensor, scale: Tensor, bits: int, input_groups, dtype: torch.dtype) -> Tensor:
    """The floating weight ``[out, in, ...]``: codes times scale in float32, one rounding to ``dtype``."""
    parts = _split(unpack(qdata, bits, input_groups), input_groups, 1)
    ones = (1,) * (qdata.dim() - 1)
    parts = [p.float().mul_(s.view(-1, *ones)).to(dtype) for p, s in zip(parts, scale, strict=True)]
    return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]


@define(
    "linear_weight_only(Tensor x, Tensor qdata, Tensor scale, Tensor? bias, int bits, int[] input_groups, "
    "Tensor? bos_input=None, Tensor? bos_output=None) -> Tensor"
)
def _linear_weight_only(x, qdata, scale, bias, bits, input_groups, bos_input=None, bos_output=None):
    weight = dequantize(qdata, scale, bits, input_groups, x.dtype)
    # As rows and contiguous, so that the output's strides do not depend on the input's.
    y = F.linear(x.reshape(-1, x.shape[-1]), weight, None if bias is None else bias.to(x.dtype))
    return with_bos_row(_as_rows_of(x, y.contiguous()), x, bos_input, bos_output)


@fake("linear_weight_only")
def _(x, qdata, scale, bias, bits, input_groups, bos_input=None, bos_output=None):
    return x.new_empty((*x.shape[:-1], qdata.shape[0]))


@define(
    "conv2d_weight_only(Tensor x, Tensor qdata, Tensor scale, Tensor? bias, SymInt[2] stride, SymInt[] pad, "
    "SymInt[2] dilation, int bits, int[] input_groups) -> Tensor"
)
def _conv2d_weight_only(x, qdata, scale, bias, stride, pad, dilation, bits, input_groups):
    weight = dequantize(qdata, scale, bits, input_groups, x.dtype)
    x = F.pad(x, pad) if any(pad) else x
    y = F.conv2d(x, weight, None if bias is None else bias.to(x.dtype), stride, 0, dilation)
    return _empty_image(y.shape, y.dtype, y.device).copy_(y)


@fake("conv2d_weight_only")
def _(x, qdata, scale, bias, stride, pad, dilation, bits, input_groups):
    padded = x.new_empty(_padded_shape(x, pad))
    return _empty_image(_conv_output_shape(padded, qdata, stride, (0, 0), dilation), x.dtype, x.device)


# --- gradients, which there are none of -------------------------------------------------------------------------------


@define("no_backward(Tensor grad, SymInt[] shape) -> Tensor")
def _no_backward(grad, shape):
    """Stands for the gradient, of that shape, of what a quantized layer reads."""
    raise UnsupportedError(
        "a quantized layer has no backward pass. Run it under torch.no_grad(), or train before quantize_()"
    )


@fake("no_backward")
def _(grad, shape):
    return grad.new_empty(shape)


# --- the CUDA library -------------------------------------------------------------------------------------------------


def _load_cuda_library() -> str:
    """Load the compiled kernels if they are there; returns why not, or an empty string."""
    found = sorted(glob.glob(os.path.join(os.path.dirname(__file__), "_cuda*.so")))
    if not found:
        return "this installation was built without CUDA kernels"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    try:
        torch.ops.load_library(found[0])
    except OSError as error:
        return f"{os.path.basename(found[0])} could not be loaded: {error}"
    return ""


# Empty where the CUDA kernels are in use; else the reason why torch's own operations run in their place.
cuda_library_missing = _load_cuda_library()
_warned = False


def kernel_name(device: torch.device, int8: bool) -> str:
    """What multiplies on ``device``: int8 codes, or floats with a dequantized weight."""
    if device.type == "cuda" and not cuda_library_missing:
        return "mixdq_ao CUDA"
    return "torch._int_mm" if int8 else "torch, dequantized"


def _warn_no_library() -> None:
    global _warned
    if not _warned:
        _warned = True
        warnings.warn(
            f"mixdq_ao runs on torch's own operations, which are correct but slow: {cuda_library_missing}. "
            "'mixdq-ao doctor' tells more.",
            stacklevel=2,
        )
