"""What a quantized layer computes, written a second time in numpy: int64 accumulators and float64 arithmetic.

Nothing here is taken from ``mixdq_ao``. Weights are int8 codes in the logical shape of the layer, inputs are what the
layer gets. Where a result is compared bit for bit, the float32 operations are in the order that the layer promises.
"""

import numpy as np
import torch
from torch import Tensor

F32 = np.float32


def array(x: Tensor) -> np.ndarray:
    """numpy has no bfloat16, and float32 holds every fp16 and bf16 value exactly."""
    x = x.detach()
    return (x.float() if x.is_floating_point() and x.dtype != torch.float64 else x).numpy()


def code_range(bits: int) -> tuple[int, int]:
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1


def quantize(x: np.ndarray, scale, zero_point, bits: int) -> np.ndarray:
    """``clamp(rint(x / scale + zero_point))`` in float32; a NaN becomes the zero point."""
    low, high = code_range(bits)
    with np.errstate(all="ignore"):
        t = x.astype(F32) / np.asarray(scale, F32)
    t = np.where(np.isnan(t), F32(0), t) + np.asarray(zero_point, F32)
    return np.clip(np.rint(t), low, high).astype(np.int64)


def dynamic_range(x: np.ndarray, bits: int, axes) -> tuple[np.ndarray, np.ndarray]:
    """float32 scale and zero point of the range of ``x``, widened to hold 0."""
    low_code, high_code = code_range(bits)
    steps = F32(high_code - low_code)
    x = x.astype(F32)
    low, high = (np.minimum(x.min(axes, keepdims=True), 0), np.maximum(x.max(axes, keepdims=True), 0))
    scale = high / steps - low / steps
    scale = np.where(scale > 0, scale, F32(1))
    return scale, np.clip(np.rint(-low / scale) + F32(low_code), low_code, high_code)


def pair(value) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[-1])


def correlate(x: np.ndarray, w: np.ndarray, stride, dilation) -> np.ndarray:
    """2-D correlation of int64 codes without padding; ``[batch, out, p, q]``."""
    (sh, sw), (dh, dw) = stride, dilation
    r, s = w.shape[2:]
    p = (x.shape[2] - dh * (r - 1) - 1) // sh + 1
    q = (x.shape[3] - dw * (s - 1) - 1) // sw + 1
    y = np.zeros((x.shape[0], p, q, w.shape[0]), np.int64)
    for i in range(r):
        for j in range(s):
            window = x[:, :, i * dh : i * dh + (p - 1) * sh + 1 : sh, j * dw : j * dw + (q - 1) * sw + 1 : sw]
            y += integer_product(window.transpose(0, 2, 3, 1), w[:, :, i, j])
    return y.transpose(0, 3, 1, 2)


def integer_product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """``a @ b.T`` of int64, through float64: exact below 2^53, and many times faster than numpy's own."""
    return (a.astype(np.float64) @ b.T.astype(np.float64)).astype(np.int64)


def _products(codes: list[np.ndarray], weights: list[np.ndarray], conv) -> list[np.ndarray]:
    if conv is None:
        return [integer_product(c, w) for c, w in zip(codes, weights, strict=True)]
    return [correlate(c, w, *conv) for c, w in zip(codes, weights, strict=True)]


def _over_outputs(values: np.ndarray, conv) -> np.ndarray:
    return values if conv is None else values[:, None, None]


class Layer:
    """A linear (``[out, in]``) or convolution (``[out, in, r, s]``) layer with static activation quantization."""

    def __init__(self, codes, scale, groups, act_scale, act_zero_point, act_bits=8, bias=None):
        self.codes = array(codes).astype(np.int64)
        self.scale, self.act_scale, self.zero = (array(t).astype(F32) for t in (scale, act_scale, act_zero_point))
        self.cuts, self.act_bits = np.cumsum(groups)[:-1], act_bits
        self.bias = None if bias is None else array(bias).astype(F32)

    def _split(self, x, axis):
        return np.split(x, self.cuts, axis)

    def _accumulate(self, x, conv, subtract_zero: bool):
        """int64 sums of each group, with the zero point subtracted from the codes or not; padding is a real zero."""
        axis, pad = (-1, None) if conv is None else (1, conv[1])
        parts = []
        for x_g, s, z in zip(self._split(x, axis), self.act_scale, self.zero, strict=True):
            q = quantize(x_g, s, z, self.act_bits)
            if pad is not None:
                q = np.pad(q, ((0, 0), (0, 0), *pad), constant_values=int(z))
            parts.append(q - int(z) if subtract_zero else q)
        return _products(parts, self._split(self.codes, 1), conv and (conv[0], conv[2]))

    def float32(self, x: Tensor, conv=None) -> np.ndarray:
        """``sum_g acc_g * alpha_g + (beta + bias)`` in float32, before the rounding to the output dtype.

        ``conv`` is stride, ``((top, bottom), (left, right))`` and dilation.
        """
        alpha = self.act_scale[:, None] * self.scale
        sums = np.stack([w.reshape(w.shape[0], -1).sum(1) for w in self._split(self.codes, 1)])
        offset = -(alpha.astype(np.float64) * self.zero[:, None].astype(np.float64) * sums).sum(0).astype(F32)
        offset = offset if self.bias is None else offset + self.bias
        y = None
        for acc, a in zip(self._accumulate(array(x), conv, subtract_zero=False), alpha, strict=True):
            term = acc.astype(F32) * _over_outputs(a, conv)
            y = term if y is None else y + term
        return y + _over_outputs(offset, conv)

    def float64(self, x: Tensor, conv=None) -> np.ndarray:
        """The formula of DESIGN 3 in real arithmetic: only the quantization of ``x`` is rounded."""
        y = 0.0 if self.bias is None else _over_outputs(self.bias.astype(np.float64), conv)
        for acc, s_x, s_w in zip(
            self._accumulate(array(x), conv, subtract_zero=True), self.act_scale, self.scale, strict=True
        ):
            y = y + acc * _over_outputs(np.float64(s_x) * s_w.astype(np.float64), conv)
        return y


def assert_same(actual: Tensor, expected, what: str = "result") -> None:
    """Equal bit for bit, in shape and dtype; on failure the first coordinate that is not."""
    if isinstance(expected, np.ndarray):
        expected = torch.from_numpy(np.ascontiguousarray(expected)).to(actual.dtype)
    assert actual.dtype == expected.dtype, f"{what}: {actual.dtype}, expected {expected.dtype}"
    assert actual.shape == expected.shape, f"{what}: {list(actual.shape)}, expected {list(expected.shape)}"
    wrong = ~((actual == expected) | (actual.isnan() & expected.isnan()))
    if wrong.any():
        at = tuple(wrong.nonzero()[0].tolist())
        count = int(wrong.sum())
        raise AssertionError(
            f"{what}: {count} of {actual.numel()} differ, first at {list(at)}: {actual[at].item()!r}, "
            f"expected {expected[at].item()!r}"
        )


def assert_rows_near(actual: Tensor, expected: np.ndarray, bound: float, what: str = "result") -> None:
    """In every row (last dimension) the largest error is at most ``bound`` times that row's largest value."""
    error = np.abs(array(actual).astype(np.float64) - expected).max(-1)
    limit = bound * np.abs(expected).max(-1)
    bad = np.argwhere(~(error <= limit))
    if len(bad):
        at = tuple(bad[0])
        raise AssertionError(
            f"{what}: {len(bad)} rows are off, first {list(map(int, at))}: error {error[at]:.3g}, limit {limit[at]:.3g}"
        )


def sqnr(reference, actual) -> float:
    """Signal to noise of ``actual`` in dB."""
    reference, actual = (np.asarray(array(v) if isinstance(v, Tensor) else v, np.float64) for v in (reference, actual))
    noise = ((reference - actual) ** 2).sum()
    return float("inf") if noise == 0 else float(10 * np.log10((reference**2).sum() / noise))
