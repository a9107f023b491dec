"""What a layer with a quantized weight computes: arguments checked, then the operators of ``ops``.

``w`` is a ``tensor.MixDQTensor``, of which only inner tensors and attributes are read: its shape and dtype are slow.
"""

from functools import lru_cache

import torch
from torch import Tensor

from mixdq_ao import ops
from mixdq_ao.errors import MixDQError, UnsupportedError

_op = torch.ops.mixdq_ao


def _eager_op(name: str):
    """An operator without its ``__call__``, which does nothing but pass arguments on, in 0.6 us of host time."""
    overload = getattr(_op, name).default
    return getattr(overload, "_op", overload)


_quantized_linear = _eager_op("quantized_linear")
_quantized_linear_dynamic = _eager_op("quantized_linear_dynamic")
_quantized_conv2d = _eager_op("quantized_conv2d")
_linear_weight_only = _eager_op("linear_weight_only")
_conv2d_weight_only = _eager_op("conv2d_weight_only")


def static_alpha_beta(scale: Tensor, act_scale: Tensor, act_zero_point: Tensor, weight_sum: Tensor):
    """``alpha [groups, out]`` and ``beta [out]`` of the epilogue, see ``MixDQTensor``."""
    alpha = act_scale.unsqueeze(1) * scale
    # In float64, since alpha * zero_point * weight_sum nearly cancels against the accumulator.
    beta = -(alpha.double() * act_zero_point.unsqueeze(1).double() * weight_sum.double()).sum(0)
    return alpha, beta.float()


def linear(x: Tensor, w, bias: Tensor | None = None) -> Tensor:
    """``F.linear``: ``[..., in]`` to ``[..., out]``, in the dtype of ``x``."""
    if torch.compiler.is_compiling():
        return _linear_traced(x, w, _checked_for_linear(x, w, bias))
    if x.is_cuda and not ops.cuda_library_missing:
        try:  # The CUDA library checks what it is given, much faster.
            return _linear_eager(x, w, bias)
        except RuntimeError:
            pass  # What is wrong is said in the layer's words, else again in the operator's.
    return _linear_eager(x, w, _checked_for_linear(x, w, bias))


def _linear_eager(x: Tensor, w, bias: Tensor | None) -> Tensor:
    """One operator, whatever the layer has: each call from Python costs as much as a small kernel."""
    if w.act_bits is None:
        return _linear_weight_only(x, w.qdata, w.scale, bias, w.bits, w.input_groups, w.bos_input, w.bos_output)
    if w.act_scale is None:
        return _quantized_linear_dynamic(
            x, w.act_bits, w.qdata, w.scale, w.weight_sum, bias, w.bits, w.input_groups, w.bos_input, w.bos_output
        )
    return _quantized_linear(
        x, w.act_scale, w.act_zero_point, w.act_bits, w.qdata, w.alpha, w.beta, bias, w.bits, w.input_groups,
        w.bos_input, w.bos_output,
    )  # fmt: skip


def _linear_traced(x: Tensor, w, bias: Tensor | None) -> Tensor:
    """Quantizer and BOS row as aten arithmetic, which Inductor fuses with what is around them."""
    if w.act_bits is None:
        y = _op.linear_weight_only(x, w.qdata, w.scale, bias, w.bits, w.input_groups)
    elif w.act_scale is None:
        xq, *ranges = ops.quantize_per_token_traced(x, w.act_bits, w.input_groups)
        y = _op.linear_int8_dynamic(xq, *ranges, w.qdata, w.scale, w.weight_sum, bias, w.bits, w.input_groups, x.dtype)
    else:
        xq = ops.quantize_traced(x, w.act_scale, w.act_zero_point, w.act_bits, w.input_groups)
        y = _op.linear_int8(xq, w.qdata, w.alpha, w.beta, bias, w.bits, w.input_groups, x.dtype)
    return ops.with_bos_row(y, x, w.bos_input, w.bos_output)


def _checked_for_linear(x: Tensor, w, bias: Tensor | None) -> Tensor | None:
    bias = _checked_operands(x, w, bias, 2, "F.linear")
    if x.shape[-1] != sum(w.input_groups):
        raise MixDQError(f"F.linear: the input's last dimension must be {w.shape[1]}; found shape {list(x.shape)}")
    return bias


def conv2d(x, w, bias=None, stride=1, padding=0, dilation=1, groups=1) -> Tensor:
    """``F.conv2d``: ``[batch, in, height, width]``, or without batch, in the dtype of ``x``."""
    if x.dim() == 3:
        return conv2d(x.unsqueeze(0), w, bias, stride, padding, dilation, groups).squeeze(0)
    given = bias, stride, padding, dilation
    if torch.compiler.is_compiling():
        return _conv2d_traced(x, w, *_checked_for_conv2d(x, w, *given, groups))
    if x.is_cuda and groups == 1 and not ops.cuda_library_missing:
        try:  # As in linear(). Lists, which cannot be looked up, are a TypeError.
            return _conv2d_eager(x, w, bias, *_known_geometry(w.qdata.shape[2:], stride, padding, dilation))
        except (RuntimeError, TypeError, ValueError):
            pass
    return _conv2d_eager(x, w, *_checked_for_conv2d(x, w, *given, groups))


def _conv2d_eager(x: Tensor, w, bias: Tensor | None, stride, dilation, pad) -> Tensor:
    if w.act_bits is None:
        return _conv2d_weight_only(x, w.qdata, w.scale, bias, stride, pad, dilation, w.bits, w.input_groups)
    act_scale, act_zero_point, alpha, beta = _conv_range(x, w)
    return _quantized_conv2d(
        x, act_scale, act_zero_point, w.act_bits, w.qdata, alpha, beta, bias, stride, pad, dilation, w.bits,
        w.input_groups,
    )  # fmt: skip


def _conv2d_traced(x: Tensor, w, bias: Tensor | None, stride, dilation, pad) -> Tensor:
    if w.act_bits is None:
        return _op.conv2d_weight_only(x, w.qdata, w.scale, bias, stride, pad, dilation, w.bits, w.input_groups)
    act_scale, act_zero_point, alpha, beta = _conv_range(x, w)
    xq = ops.quantize_traced(x, act_scale, act_zero_point, w.act_bits, w.input_groups, pad)
    return _op.conv2d_int8(xq, w.qdata, alpha, beta, bias, stride, (0, 0), dilation, w.bits, w.input_groups, x.dtype)


def _checked_for_conv2d(x, w, bias, stride, padding, dilation, groups) -> tuple:
    """Bias, stride, dilation and padding as the operators take them."""
    bias = _checked_operands(x, w, bias, 4, "F.conv2d")
    if groups != 1:
        raise UnsupportedError(f"F.conv2d: grouped convolutions cannot be quantized; found groups={groups}")
    channels, kernel = sum(w.input_groups), w.qdata.shape[2:]
    if x.dim() != 4 or x.shape[1] != channels:
        raise MixDQError(f"F.conv2d: the input must be [batch, {channels}, height, width]; found shape {list(x.shape)}")
    stride, dilation, pad = conv_geometry(kernel, stride, padding, dilation)
    height, width = x.shape[2] + pad[2] + pad[3], x.shape[3] + pad[0] + pad[1]
    if height <= dilation[0] * (kernel[0] - 1) or width <= dilation[1] * (kernel[1] - 1):
        raise MixDQError(
            f"F.conv2d: the kernel {list(kernel)} with dilation {list(dilation)} does not fit into the padded input "
            f"{[height, width]}"
        )
    return bias, stride, dilation, pad


def _conv_range(x: Tensor, w) -> tuple:
    """Scale and zero point of the input, and the epilogue's alpha and beta."""
    if w.act_scale is not None:
        return w.act_scale, w.act_zero_point, w.alpha, w.beta
    return _dynamic_conv_range(x, w)


def _dynamic_conv_range(x: Tensor, w):
    ranges = [ops.dynamic_range(p, w.act_bits, per_token=False) for p in x.split(w.input_groups, dim=1)]
    act_scale, act_zero_point = (torch.cat(values) for values in zip(*ranges, strict=True))
    return act_scale, act_zero_point, *static_alpha_beta(w.scale, act_scale, act_zero_point, w.weight_sum)


def _checked_operands(x, w, bias: Tensor | None, dim: int, op: str) -> Tensor | None:
    """The bias, or None where there is none. Asks ``w.qdata`` what it can: properties of a subclass are slow."""
    if type(x) is type(w):
        raise UnsupportedError(f"{op}: only the weight may be a quantized tensor")
    qdata = w.qdata
    if qdata.dim() != dim:
        raise MixDQError(f"{op}: the quantized weight has shape {list(w.shape)}, which is not {dim}-dimensional")
    if not x.is_floating_point():
        raise MixDQError(f"{op}: the input must be floating; found {x.dtype}")
    if x.device != qdata.device:
        raise MixDQError(f"{op}: input on {x.device}, quantized weight on {qdata.device}; move one of them with .to()")
    if bias is None or bias.numel() == 0:
        return None
    if bias.numel() != qdata.shape[0]:
        raise MixDQError(f"{op}: the bias must have {qdata.shape[0]} values; found shape {list(bias.shape)}")
    return bias


def conv_geometry(kernel, stride, padding, dilation) -> tuple:
    """What ``F.conv2d`` takes, in one form: stride and dilation as pairs, padding as left, right, top, bottom."""
    stride, dilation = _pair(stride, "stride", 1), _pair(dilation, "dilation", 1)
    return stride, dilation, _pad(padding, kernel, stride, dilation)


_known_geometry = lru_cache(maxsize=1024)(conv_geometry)


def _pair(value, name: str, least: int) -> tuple[int, int]:
    values = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    if len(values) not in (1, 2):
        raise MixDQError(f"F.conv2d: {name} must be a number or a pair; found {value!r}")
    if min(values) < least:
        raise MixDQError(f"F.conv2d: {name} must be at least {least}; found {value!r}")
    return values[0], values[-1]


def _pad(padding, kernel, stride, dilation) -> tuple[int, int, int, int]:
    """Padding as left, right, top, bottom."""
    if padding == "valid":
        padding = 0
    if padding == "same":
        if stride != (1, 1):
            raise MixDQError(f"F.conv2d: padding='same' needs stride 1; found {stride}")
        (top, bottom), (left, right) = [
            (d * (k - 1) // 2, d * (k - 1) - d * (k - 1) // 2) for k, d in zip(kernel, dilation, strict=True)
        ]
        return left, right, top, bottom
    if isinstance(padding, str):
        raise MixDQError(f"F.conv2d: padding must be 'same', 'valid', a number or a pair; found {padding!r}")
    vertical, horizontal = _pair(padding, "padding", 0)
    return horizontal, horizontal, vertical, vertical
