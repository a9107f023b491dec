"""The operators: their results against the reference, and ``opcheck`` on each of them."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from generators import DTYPES, IMAGE_LAYOUTS, LINEAR_LAYOUTS, cases, make_case
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import array, assert_rows_near, assert_same, code_range, dynamic_range, quantize
from torch.utils._pytree import tree_map_only

from mixdq_ao import MixDQError
from mixdq_ao import ops as mixdq_ops
from mixdq_ao.layers import static_alpha_beta

ops = torch.ops.mixdq_ao

dtypes = st.sampled_from(DTYPES)
small = st.integers(1, 3)


def linear_args(case, x):
    w = case.weight
    return x, w.act_scale, w.act_zero_point, w.act_bits, w.qdata, w.alpha, w.beta, case.bias, w.bits, w.input_groups


@settings(max_examples=150)
@given(cases(), st.lists(st.integers(0, 7), min_size=0, max_size=3), st.sampled_from(list(LINEAR_LAYOUTS)), dtypes)
def test_linear_is_exact(case, lead, layout, dtype):
    """int64 accumulators, the float32 epilogue, and one rounding, bit for bit."""
    x = LINEAR_LAYOUTS[layout](case.input((*lead, sum(case.groups)), dtype))
    y = ops.quantized_linear(*linear_args(case, x))
    assert_same(y, torch.from_numpy(case.layer.float32(x)).to(dtype))
    assert y.is_contiguous()


@settings(max_examples=150)
@given(
    st.data(),
    cases(kernels=st.tuples(small, small)),
    st.integers(0, 3),
    st.tuples(small, small),
    st.tuples(*[st.integers(0, 2)] * 4),
    st.tuples(small, small),
    st.sampled_from(list(IMAGE_LAYOUTS)),
    dtypes,
)
def test_conv2d_is_exact(data, case, batch, stride, pad, dilation, layout, dtype):
    w = case.weight
    left, right, top, bottom = pad
    sizes = []
    for kernel, d, padding in zip(w.shape[2:], dilation, (top + bottom, left + right), strict=True):
        needed = max(1, d * (kernel - 1) + 1 - padding)
        sizes.append(data.draw(st.integers(needed, needed + 5)))
    x = IMAGE_LAYOUTS[layout](case.input((batch, sum(case.groups), *sizes), dtype))
    y = ops.quantized_conv2d(*linear_args(case, x)[:8], stride, pad, dilation, w.bits, w.input_groups)
    expected = case.layer.float32(x, (stride, ((top, bottom), (left, right)), dilation))
    assert_same(y, torch.from_numpy(expected).to(dtype))
    assert y.permute(0, 2, 3, 1).is_contiguous()


@pytest.mark.parametrize("rows", [1, 16, 17, 1100])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear_at_a_real_size(rows, dtype):
    """Beyond the sizes that hypothesis draws: several blocks of rows, wide reductions, both ends of the codes."""
    case = make_case(640, [1920, 640], zero_points=[-128, 127])
    x = case.input((rows, 2560), dtype)
    y = ops.quantized_linear(*linear_args(case, x))
    assert_same(y, torch.from_numpy(case.layer.float32(x)).to(dtype))
    # Against real arithmetic: float32 rounding of terms that nearly cancel, then the output's own rounding.
    assert_rows_near(y, case.layer.float64(x), 2e-4 + torch.finfo(dtype).eps)


@pytest.mark.parametrize("layout", list(IMAGE_LAYOUTS))
@pytest.mark.parametrize(("kernel", "stride", "size"), [(3, 1, 33), (3, 2, 64), (1, 1, 48)])
def test_conv2d_at_a_real_size(kernel, stride, size, layout):
    case = make_case(64, [96, 32], (kernel, kernel), zero_points=[127, -128])
    w, p = case.weight, kernel // 2
    x = IMAGE_LAYOUTS[layout](case.input((2, 128, size, size)))
    args = linear_args(case, x)[:8]
    y = ops.quantized_conv2d(*args, (stride, stride), (p, p, p, p), (1, 1), w.bits, w.input_groups)
    conv = ((stride, stride), ((p, p), (p, p)), (1, 1))
    assert_same(y, case.layer.float32(x, conv))
    assert_rows_near(y, case.layer.float64(x, conv), 2e-4)


@pytest.mark.parametrize("size", [1, 4 * 9 * 45, 2 * 9 * 9 * 45, 2**30], ids=["line", "lines", "samples", "batch"])
def test_convolutions_are_done_in_blocks(monkeypatch, size):
    """im2col is bounded; the parts give what the whole gives."""
    case = make_case(8, [5], (3, 3))
    x = case.input((7, 5, 9, 9))
    w = case.weight
    args = (*linear_args(case, x)[:8], (1, 1), (1, 1, 1, 1), (1, 1), w.bits, w.input_groups)
    whole = ops.quantized_conv2d(*args)
    monkeypatch.setattr(mixdq_ops, "_IM2COL_BYTES", size)
    assert_same(ops.quantized_conv2d(*args), whole)


@given(cases(), st.integers(0, 9), dtypes)
def test_two_steps_equal_one(case, rows, dtype):
    w, x = case.weight, case.input((rows, sum(case.groups)), dtype)
    xq = ops.quantize(x, w.act_scale, w.act_zero_point, w.act_bits, w.input_groups, None)
    y = ops.linear_int8(xq, w.qdata, w.alpha, w.beta, case.bias, w.bits, w.input_groups, dtype)
    assert_same(y, ops.quantized_linear(*linear_args(case, x)))


@settings(max_examples=50)
@given(cases(), st.integers(0, 9), st.sampled_from(list(LINEAR_LAYOUTS)), dtypes, dtypes)
def test_residual_of_a_linear_is_added_before_the_rounding(case, rows, layout, dtype, out_dtype):
    w, x = case.weight, case.input((2, rows, sum(case.groups)))
    residual = LINEAR_LAYOUTS[layout](case.input((2, rows, w.shape[0]), dtype))
    xq = ops.quantize(x, w.act_scale, w.act_zero_point, w.act_bits, w.input_groups, None)
    y = ops.linear_int8(xq, w.qdata, w.alpha, w.beta, case.bias, w.bits, w.input_groups, out_dtype, residual)
    assert_same(y, torch.from_numpy(case.layer.float32(x) + array(residual)).to(out_dtype))


@settings(max_examples=50)
@given(
    cases(kernels=st.tuples(small, small)), st.integers(0, 3), st.sampled_from(list(IMAGE_LAYOUTS)), dtypes, dtypes,
    st.booleans(),
)  # fmt: skip
def test_residual_of_a_conv2d_is_added_before_the_rounding(case, batch, layout, dtype, out_dtype, one_pixel):
    w, x = case.weight, case.input((batch, sum(case.groups), 4, 5))
    conv = ((1, 2), ((1, 1), (1, 1)), (1, 1))
    y = case.layer.float32(x, conv)
    residual = IMAGE_LAYOUTS[layout](case.input((*y.shape[:2], 1, 1) if one_pixel else y.shape, dtype))
    xq = ops.quantize(x, w.act_scale, w.act_zero_point, w.act_bits, w.input_groups, (1, 1, 1, 1))
    weight = (w.qdata, w.alpha, w.beta, case.bias)
    out = ops.conv2d_int8(xq, *weight, (1, 2), (0, 0), (1, 1), w.bits, w.input_groups, out_dtype, residual)
    assert_same(out, torch.from_numpy(y + array(residual)).to(out_dtype))
    assert out.permute(0, 2, 3, 1).is_contiguous()


def test_residual_in_blocks_and_of_a_wrong_shape():
    case = make_case(24, [40], bias=False)
    w, x = case.weight, case.input((1300, 40))
    residual = case.input((1300, 24), torch.float16)
    xq = ops.quantize(x, w.act_scale, w.act_zero_point, 8, [40], None)
    args = (xq, w.qdata, w.alpha, w.beta, None, 8, [40], torch.float16)
    assert_same(ops.linear_int8(*args, residual), torch.from_numpy(case.layer.float32(x) + array(residual)).half())
    with pytest.raises(MixDQError, match=r"residual must have the output's shape \[1300, 24\]; found \[1, 24\]"):
        ops.linear_int8(*args, residual[:1])


@settings(max_examples=50)
@given(st.data(), st.integers(1, 6), st.integers(0, 9), st.booleans(), dtypes)
def test_several_linears_of_one_input_equal_each_alone(data, count, rows, adjacent, dtype):
    first = data.draw(cases())
    groups, first_bits = first.groups, first.weight.bits
    widths = [first_bits if adjacent else (8, 4, 2)[s % 3] for s in range(1, count)]
    every = [first, *(make_case(8 * s + 1, groups, (), b, bias=s % 2 == 0, seed=s) for s, b in enumerate(widths))]
    qdata, alpha, beta, bits = ([getattr(c.weight, n) for c in every] for n in ("qdata", "alpha", "beta", "bits"))
    if adjacent:
        qdata = list(torch.cat(qdata).split([len(q) for q in qdata]))
    bias = [c.bias for c in every]
    xq = torch.randint(-128, 128, (2, rows, sum(groups)), dtype=torch.int8)
    y = ops.linear_int8_multi(xq, qdata, alpha, beta, bias, bits, groups, dtype)
    alone = [ops.linear_int8(xq, *a, groups, dtype) for a in zip(qdata, alpha, beta, bias, bits, strict=True)]
    assert_same(y, torch.cat(alone, -1))
    assert y.is_contiguous()


SPECIAL = [0.0, -0.0, float("nan"), float("inf"), -float("inf"), 3e38, -3e38, 1e-45, 65504.0, 0.5, 1.5, 2.5, -0.5]


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("scale", [1.0, 1e-38, 3e38, 0.1])
def test_special_values_quantize_to_codes(bits, scale):
    """NaN becomes the zero point, infinities the ends of the range; halves round to even."""
    x = torch.tensor(SPECIAL)
    for zero in (-(2 ** (bits - 1)), -1, 2 ** (bits - 1) - 1):
        q = ops.quantize(x, torch.tensor([scale]), torch.tensor([float(zero)]), bits, [len(SPECIAL)], None)
        assert_same(q, quantize(array(x), scale, zero, bits), f"zero point {zero}")
        assert q[2] == zero


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("at", ["first", "middle", "last"])
def test_a_nan_anywhere_becomes_the_zero_point(dtype, at):
    x = torch.randn(300, 1000).to(dtype)
    x.view(-1)[{"first": 0, "middle": 151_234, "last": -1}[at]] = float("nan")
    x[200, 7] = float("inf")
    q = ops.quantize(x, torch.tensor([0.02]), torch.tensor([-5.0]), 8, [1000], None)
    assert_same(q, quantize(array(x), 0.02, -5, 8))
    image = x.view(1, 300, 10, 100)
    padded = ops.quantize(image, torch.tensor([0.02]), torch.tensor([-5.0]), 8, [300], (1, 2, 3, 4))
    assert_same(
        padded, np.pad(quantize(array(image), 0.02, -5, 8), ((0, 0), (0, 0), (3, 4), (1, 2)), constant_values=-5)
    )


@given(cases(), st.integers(0, 9), st.sampled_from(list(LINEAR_LAYOUTS)), dtypes)
def test_traced_quantizer_equals_the_operator(case, rows, layout, dtype):
    w, x = case.weight, LINEAR_LAYOUTS[layout](case.input((rows, sum(case.groups)), dtype))
    args = (x, w.act_scale, w.act_zero_point, w.act_bits, w.input_groups)
    assert_same(mixdq_ops.quantize_traced(*args), ops.quantize(*args, None))


@given(
    cases(kernels=st.just((1, 1))), st.tuples(*[st.integers(0, 2)] * 4), st.sampled_from(list(IMAGE_LAYOUTS)), dtypes
)
def test_traced_image_quantizer_equals_the_operator(case, pad, layout, dtype):
    w, x = case.weight, IMAGE_LAYOUTS[layout](case.input((2, sum(case.groups), 3, 4), dtype))
    args = (x, w.act_scale, w.act_zero_point, w.act_bits, w.input_groups, pad)
    traced, q = mixdq_ops.quantize_traced(*args), ops.quantize(*args)
    assert_same(traced, q)
    assert traced.permute(0, 2, 3, 1).is_contiguous() and q.permute(0, 2, 3, 1).is_contiguous()


@given(cases(), st.integers(0, 9), dtypes)
def test_dynamic_linear_is_exact(case, rows, dtype):
    w, x = case.weight, case.input((rows, sum(case.groups)), dtype)
    x[: rows // 3] = x[: rows // 3].abs()
    x[rows // 2 : rows // 2 + 1] = 0
    xq, scale, zero = ops.quantize_per_token(x, w.act_bits, w.input_groups)
    weight_sum = torch.stack([p.sum(1, dtype=torch.int32) for p in w.int_repr().split(case.groups, 1)])
    y = ops.linear_int8_dynamic(xq, scale, zero, w.qdata, w.scale, weight_sum, case.bias, w.bits, w.input_groups, dtype)
    expected = None
    parts = zip(*(np.split(v, case.layer.cuts, 1) for v in (array(x), case.layer.codes)), w.scale, strict=True)
    for g, (x_g, codes, s_w) in enumerate(parts):
        s_x, z = dynamic_range(x_g, w.act_bits, 1)
        q = quantize(x_g, s_x, z, w.act_bits)
        assert_same(xq.split(case.groups, 1)[g], q, f"codes of group {g}")
        assert_same(scale[:, g : g + 1], s_x.astype(np.float32))
        term = ((q - z.astype(np.int64)) @ codes.T).astype(np.float32) * s_x * array(s_w)
        expected = term if expected is None else expected + term
    expected = expected if case.bias is None else expected + case.layer.bias
    assert_same(y, torch.from_numpy(expected).to(dtype))


@given(cases(), st.integers(0, 9), dtypes)
def test_two_dynamic_steps_equal_one(case, rows, dtype):
    w, x = case.weight, case.input((rows, sum(case.groups)), dtype)
    weight_sum = torch.stack([p.sum(1, dtype=torch.int32) for p in w.int_repr().split(case.groups, 1)])
    weight = (w.qdata, w.scale, weight_sum, case.bias, w.bits, w.input_groups)
    two = ops.linear_int8_dynamic(*ops.quantize_per_token(x, w.act_bits, w.input_groups), *weight, dtype)
    assert_same(ops.quantized_linear_dynamic(x, w.act_bits, *weight), two)


@pytest.mark.parametrize("groups", [[6], [2, 4]])
@pytest.mark.parametrize("shape", [(3, 1, 2), (3, 4, 1), (2, 4, 5)])
def test_codes_of_tokens_are_rows_whatever_the_layout(shape, groups):
    x = torch.randn(*shape, 6).contiguous(memory_format=torch.channels_last)
    assert ops.quantize_per_token(x, 8, groups)[0].stride() == torch.empty(x.shape).stride()


def test_dynamic_range_of_extremes():
    """The range always holds 0, survives both ends of float32, and a constant input is exact."""
    x = torch.tensor([[0.0, 0.0], [3e38, -3e38], [5.0, 5.0], [-5.0, -5.0], [float("nan"), 1.0], [1e-45, 0.0]])
    scale, zero = mixdq_ops.dynamic_range(x, 8, per_token=True)
    assert bool((torch.isfinite(scale) & (scale > 0)).all())
    assert zero.flatten().tolist()[2:4] == [-128, 127]
    assert scale[0] == 1
    q, s, z = ops.quantize_per_token(x, 8, [2])
    back = (q.float() - z) * s
    assert_same(back[[0, 2, 3]], x[[0, 2, 3]])


@given(cases(), st.integers(0, 5), dtypes)
def test_weight_only_linear_rounds_like_the_floating_layer(case, rows, dtype):
    w, x = case.weight, case.input((rows, sum(case.groups)), dtype)
    y = ops.linear_weight_only(x, w.qdata, w.scale, case.bias, w.bits, w.input_groups)
    weight = (np.split(case.layer.codes, case.layer.cuts, 1), array(w.scale))
    floating = np.concatenate([c * s[:, None].astype(np.float64) for c, s in zip(*weight, strict=True)], 1)
    expected = array(x).astype(np.float64) @ floating.T + (0 if case.bias is None else case.layer.bias)
    size = np.abs(array(x)) @ np.abs(floating).T + (0 if case.bias is None else np.abs(case.layer.bias))
    assert (np.abs(array(y) - expected) <= 3 * torch.finfo(dtype).eps * size + 1e-6).all()


# --- quantizers fused with norms and activations ----------------------------------------------------------------------


def assert_codes(q, real: np.ndarray, case, axis: int, pad=((0, 0),) * 4) -> None:
    """Every code is that of the float64 values ``real``, or its neighbour where float32 may fall on the other side."""
    w = case.weight
    parts = np.split(real, case.layer.cuts, axis)
    zeros = [np.full(p.shape, z) for p, z in zip(parts, case.layer.zero, strict=True)]
    t = np.concatenate(
        [p / s + z for p, s, z in zip(parts, case.layer.act_scale.astype(float), zeros, strict=True)], axis
    )
    padded = np.concatenate([np.pad(z, pad[: z.ndim], "edge") for z in zeros], axis)
    padded[tuple(slice(a, a + n) for (a, _), n in zip(pad, t.shape, strict=False))] = t
    t = np.clip(padded, *code_range(w.act_bits))
    assert q.dtype == torch.int8 and q.shape == t.shape
    # 1e-5 of a range of a few hundred steps is what float32 sums may be off.
    assert np.abs(array(q) - t).max(initial=0) <= 0.5 + 4e-3
    assert (array(q) != np.rint(t)).mean() <= 0.01 if t.size > 1000 else True


def affine(x: np.ndarray, weight, bias, axis: int) -> np.ndarray:
    shape = [-1 if d == axis % x.ndim else 1 for d in range(x.ndim)]
    x = x if weight is None else x * array(weight).astype(np.float64).reshape(shape)
    return x if bias is None else x + array(bias).astype(np.float64).reshape(shape)


def normalized(x: np.ndarray, axes, eps: float) -> np.ndarray:
    return (x - x.mean(axes, keepdims=True)) / np.sqrt(x.var(axes, keepdims=True) + eps)


def vectors(case, dtype):
    """Weight and bias of a norm: [in] or None."""
    channels = sum(case.groups)
    return case.input((channels,), dtype) if channels % 3 else None, case.input((channels,), dtype)


@given(cases(), st.integers(1, 9), st.sampled_from(list(LINEAR_LAYOUTS)), dtypes)
def test_layer_norm_quantize(case, rows, layout, dtype):
    w, x = case.weight, LINEAR_LAYOUTS[layout](case.input((2, rows, sum(case.groups)), dtype) * 3 + 1)
    weight, bias = vectors(case, dtype)
    q = ops.layer_norm_quantize(x, weight, bias, 1e-3, w.act_scale, w.act_zero_point, w.act_bits, w.input_groups)
    assert_codes(q, affine(normalized(array(x).astype(np.float64), -1, 1e-3), weight, bias, -1), case, -1)
    assert q.is_contiguous()


@given(cases(), st.integers(1, 9), st.sampled_from(list(LINEAR_LAYOUTS)), dtypes)
def test_geglu_quantize(case, rows, layout, dtype):
    w, x = case.weight, LINEAR_LAYOUTS[layout](case.input((2, rows, 2 * sum(case.groups)), dtype))
    q = ops.geglu_quantize(x, w.act_scale, w.act_zero_point, w.act_bits, w.input_groups)
    value, gate = np.split(array(x).astype(np.float64), 2, -1)
    erf = torch.from_numpy(gate / 2**0.5).erf().numpy()
    assert_codes(q, value * gate * 0.5 * (1 + erf), case, -1)
    assert q.is_contiguous()


@given(cases(), st.integers(0, 9), st.integers(0, 2**31), st.sampled_from([8, 4]), dtypes)
def test_a_product_with_geglu_equals_two_steps(case, rows, seed, act_bits, dtype):
    wide = make_case(2 * case.weight.shape[0], case.groups, bits=case.weight.bits, bias=seed % 2 == 0, seed=seed)
    w, static = wide.weight, (torch.tensor([0.03]), torch.tensor([-3.0]), act_bits)
    xq = torch.randint(-128, 128, (2, rows, sum(case.groups)), dtype=torch.int8)
    weight = (w.qdata, w.alpha, w.beta, wide.bias, w.bits, case.groups, dtype)
    q = ops.linear_int8_geglu(xq, *weight, *static)
    assert_same(q, ops.geglu_quantize(ops.linear_int8(xq, *weight), *static, [w.shape[0] // 2]))
    assert q.is_contiguous()


@given(
    cases(kernels=st.just((1, 1))),
    st.booleans(),
    st.one_of(st.none(), st.tuples(*[st.integers(0, 2)] * 4)),
    st.sampled_from(list(IMAGE_LAYOUTS)),
    dtypes,
)
def test_group_norm_quantize(case, silu, pad, layout, dtype):
    w, channels = case.weight, sum(case.groups)
    x = IMAGE_LAYOUTS[layout](case.input((2, channels, 3, 4), dtype) + 0.5)
    num_groups = max(g for g in range(1, min(32, channels) + 1) if channels % g == 0)
    weight, bias = vectors(case, dtype)
    act = (w.act_scale, w.act_zero_point, w.act_bits, w.input_groups)
    q = ops.group_norm_quantize(x, num_groups, weight, bias, 1e-3, silu, *act, pad)
    y = normalized(array(x).astype(np.float64).reshape(2, num_groups, -1), -1, 1e-3).reshape(x.shape)
    y = affine(y, weight, bias, 1)
    left, right, top, bottom = pad or (0, 0, 0, 0)
    y = y / (1 + np.exp(-y)) if silu else y
    assert_codes(q, y, case, 1, ((0, 0), (0, 0), (top, bottom), (left, right)))
    assert q.permute(0, 2, 3, 1).is_contiguous()


def test_a_fused_quantizer_rounds_once():
    """At bf16 an intermediate rounding would move about every third code by one or more."""
    x = torch.randn(64, 512).bfloat16()
    scale, zero = torch.tensor([0.01]), torch.tensor([0.0])
    y = F.layer_norm(x.double(), (512,))
    q = ops.layer_norm_quantize(x, None, None, 1e-5, scale, zero, 8, [512])
    once = (y / scale.double()).round().clamp(-128, 127)
    twice = (y.bfloat16().double() / scale.double()).round().clamp(-128, 127)
    assert (q != once).double().mean() < 1e-3 < 0.01 < (q != twice).double().mean()


# --- opcheck ----------------------------------------------------------------------------------------------------------


def op_cases():
    """For every operator, argument lists chosen by risk: id -> (operator name, arguments)."""
    for bits, groups, bias in [(8, [16], True), (4, [7, 4], False), (2, [9], True)]:
        for layout in ("contiguous", "channel slice", "transposed"):
            lin, conv = (make_case(6, groups, k, bits=bits, bias=bias) for k in ((), (3, 2)))
            w, v = lin.weight, conv.weight
            x = LINEAR_LAYOUTS[layout](lin.input((2, 3, sum(groups)), torch.bfloat16))
            image = IMAGE_LAYOUTS[layout](conv.input((2, sum(groups), 5, 6), torch.bfloat16))
            stride, pad, dilation = (2, 1), (1, 0, 2, 1), (1, 2)
            act = (w.act_scale, w.act_zero_point, w.act_bits)
            xq, s, z = ops.quantize_per_token(x, 8, groups)
            weight_sum = torch.zeros(len(groups), 6, dtype=torch.int32)
            imageq = ops.quantize(image, *act, groups, (0, 0, 0, 0))
            static = (w.qdata, w.alpha, w.beta, lin.bias)
            static_conv = (v.qdata, v.alpha, v.beta, conv.bias)
            norm = (lin.input((sum(groups),), torch.bfloat16), None, 1e-5)
            residual, image_residual = lin.input((2, 3, 6), torch.float16), conv.input((2, 6, 3, 8)).mT.contiguous().mT
            several = ([w.qdata, w.qdata], [w.alpha, w.alpha], [w.beta, w.beta], [None, lin.bias], [bits, bits], groups)
            pair = make_case(10, groups, bits=bits, bias=bias)
            u = pair.weight
            two = LINEAR_LAYOUTS[layout](lin.input((2, 3, 2 * sum(groups)), torch.bfloat16))
            calls = {
                "quantize": (x, *act, groups, None),
                "quantize_per_token": (x, 8, groups),
                "layer_norm_quantize": (x, *norm, *act, groups),
                "geglu_quantize": (two, *act, groups),
                "group_norm_quantize": (image, 1, *norm, True, *act, groups, pad),
                "linear_int8_multi": (xq, *several, torch.float16),
                "linear_int8": (xq, *static, bits, groups, torch.float16),
                "linear_int8_geglu": (
                    xq,
                    u.qdata,
                    u.alpha,
                    u.beta,
                    pair.bias,
                    bits,
                    groups,
                    torch.float16,
                    act[0][:1],
                    act[1][:1],
                    8,
                ),
                "linear_int8_dynamic": (xq, s, z, w.qdata, w.scale, weight_sum, lin.bias, bits, groups, torch.float32),
                "conv2d_int8": (imageq, *static_conv, stride, (1, 2), dilation, bits, groups, torch.float16),
                "quantized_linear": (x, *act, *static, bits, groups),
                "quantized_linear_dynamic": (x, 8, w.qdata, w.scale, weight_sum, lin.bias, bits, groups),
                "quantized_conv2d": (image, *act, *static_conv, stride, pad, dilation, bits, groups),
                "linear_weight_only": (x, w.qdata, w.scale, lin.bias, bits, groups),
                "conv2d_weight_only": (image, v.qdata, v.scale, conv.bias, stride, pad, dilation, bits, groups),
            }
            for name, args in calls.items():
                yield f"{name}-int{bits}-{layout}", name, args
            yield f"quantize-image-int{bits}-{layout}", "quantize", (image, *act, groups, pad)
            yield f"group_norm_quantize-no pad-int{bits}-{layout}", "group_norm_quantize", (
                image, sum(groups), None, *norm[1:], False, *act, groups, None,
            )  # fmt: skip
            bos = lin.input((sum(groups),), torch.float16), lin.input((6,))
            for name in ("quantized_linear", "quantized_linear_dynamic", "linear_weight_only"):
                yield f"{name}-bos-int{bits}-{layout}", name, (*calls[name], *bos)
            for name, r in (("linear_int8", residual), ("conv2d_int8", image_residual)):
                yield f"{name}-residual-int{bits}-{layout}", name, (*calls[name], r)
    w = make_case(6, [16]).weight
    empty = torch.empty(0, 16)
    yield "quantize-empty", "quantize", (empty, w.act_scale, w.act_zero_point, 8, [16], None)
    yield "quantized_linear-vector", "quantized_linear", (
        torch.randn(16), w.act_scale, w.act_zero_point, 8, w.qdata, w.alpha, w.beta, None, 8, [16],
    )  # fmt: skip
    q, k, v = (torch.randn(2, tokens, 3, 16).transpose(1, 2) for tokens in (9, 7, 7))
    for layout, inputs in {
        "cross": (q, k, v),
        "packed": torch.randn(2, 9, 3, 48).transpose(1, 2).split(16, dim=-1),
        "contiguous": [t.contiguous() for t in (q, k, v)],
    }.items():
        static = torch.tensor([0.01]), torch.tensor([3.0]), 8
        yield f"short_attention-{layout}", "short_attention", (*inputs, 0.3)
        yield f"short_attention_quantize-{layout}", "short_attention_quantize", (*inputs, 0.3, *static)
        for backend in ("flash", "math"):
            yield f"attention-{backend}-{layout}", "attention", (*inputs, None, backend)
            name = f"attention_quantize-{backend}-{layout}"
            yield name, "attention_quantize", (*inputs, None, backend, *static)


OP_CASES = list(op_cases())


def test_every_operator_is_checked():
    names = {n.removeprefix("mixdq_ao::") for n in torch._C._dispatch_get_all_op_names() if n.startswith("mixdq_ao::")}
    assert {name for _, name, _ in OP_CASES} == names - {"no_backward"}  # which does nothing but raise


@pytest.mark.parametrize(("name", "args"), [c[1:] for c in OP_CASES], ids=[c[0] for c in OP_CASES])
def test_opcheck(name, args):
    torch.library.opcheck(getattr(ops, name).default, args)


@pytest.mark.parametrize(("name", "args"), [c[1:] for c in OP_CASES], ids=[c[0] for c in OP_CASES])
def test_meta_tensors(name, args):
    """Shapes, dtypes and strides without data, as ``device="meta"`` models need them."""
    op = getattr(ops, name).default
    real = op(*args)
    meta = op(*tree_map_only(torch.Tensor, lambda t: t.to("meta"), args))
    for r, m in zip(*((t,) if isinstance(t, torch.Tensor) else t for t in (real, meta)), strict=True):
        assert m.device.type == "meta"
        assert (m.shape, m.dtype, m.stride()) == (r.shape, r.dtype, r.stride())


# --- int8 products ----------------------------------------------------------------------------------------------------


@settings(max_examples=150)
@given(st.integers(0, 40), st.integers(0, 70), st.integers(0, 140), st.integers(0, 2**31))
def test_int_matmul(m, n, k, seed):
    g = torch.Generator().manual_seed(seed)
    a, b = (torch.randint(-128, 128, (rows, k), dtype=torch.int8, generator=g) for rows in (m, n))
    assert_same(mixdq_ops.int_matmul(a, b), (array(a).astype(np.int64) @ array(b).astype(np.int64).T).astype(np.int32))


@pytest.mark.parametrize("value", [(-128, -128), (-128, 127), (127, 127)], ids=str)
def test_int_matmul_at_the_ends_of_the_range(value):
    """The longest reduction that a weight may have, with every product at its extreme."""
    from mixdq_ao.tensor import MAX_REDUCTION

    a, b = (torch.full((2, MAX_REDUCTION), v, dtype=torch.int8) for v in value)
    assert mixdq_ops.int_matmul(a, b).unique().tolist() == [value[0] * value[1] * MAX_REDUCTION]


def test_alpha_and_beta():
    scale, act_scale, zero = torch.rand(2, 3), torch.tensor([0.5, 0.25]), torch.tensor([3.0, -7.0])
    weight_sum = torch.tensor([[1, 2, 3], [4, 5, 6]], dtype=torch.int32)
    alpha, beta = static_alpha_beta(scale, act_scale, zero, weight_sum)
    assert_same(alpha, array(scale) * np.float32([[0.5], [0.25]]))
    expected = -(array(alpha).astype(np.float64) * [[3], [-7]] * array(weight_sum)).sum(0)
    assert_same(beta, expected.astype(np.float32))
