"""The operators: their results against the reference, and ``opcheck`` on each of them."""

import numpy as np
import pytest
import torch
from generators import DTYPES, IMAGE_LAYOUTS, LINEAR_LAYOUTS, cases, make_case
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import array, assert_rows_near, assert_same, dynamic_range, quantize

from mixdq_ao import ops as mixdq_ops
from mixdq_ao.tensor import static_alpha_beta

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
            calls = {
                "quantize": (x, *act, groups, None),
                "quantize_per_token": (x, 8, groups),
                "linear_int8": (xq, *static, bits, groups, torch.float16),
                "linear_int8_dynamic": (xq, s, z, w.qdata, w.scale, weight_sum, lin.bias, bits, groups, torch.float32),
                "conv2d_int8": (imageq, *static_conv, stride, (1, 2), dilation, bits, groups, torch.float16),
                "quantized_linear": (x, *act, *static, bits, groups),
                "quantized_conv2d": (image, *act, *static_conv, stride, pad, dilation, bits, groups),
                "linear_weight_only": (x, w.qdata, w.scale, lin.bias, bits, groups),
                "conv2d_weight_only": (image, v.qdata, v.scale, conv.bias, stride, pad, dilation, bits, groups),
            }
            for name, args in calls.items():
                yield f"{name}-int{bits}-{layout}", name, args
            yield f"quantize-image-int{bits}-{layout}", "quantize", (image, *act, groups, pad)
    w = make_case(6, [16]).weight
    empty = torch.empty(0, 16)
    yield "quantize-empty", "quantize", (empty, w.act_scale, w.act_zero_point, 8, [16], None)
    yield "quantized_linear-vector", "quantized_linear", (
        torch.randn(16), w.act_scale, w.act_zero_point, 8, w.qdata, w.alpha, w.beta, None, 8, [16],
    )  # fmt: skip


OP_CASES = list(op_cases())


def test_every_operator_is_checked():
    names = {n.removeprefix("mixdq_ao::") for n in torch._C._dispatch_get_all_op_names() if n.startswith("mixdq_ao::")}
    assert {name for _, name, _ in OP_CASES} == names


@pytest.mark.parametrize(("name", "args"), [c[1:] for c in OP_CASES], ids=[c[0] for c in OP_CASES])
def test_opcheck(name, args):
    torch.library.opcheck(getattr(ops, name).default, args)


@pytest.mark.parametrize(("name", "args"), [c[1:] for c in OP_CASES], ids=[c[0] for c in OP_CASES])
def test_meta_tensors(name, args):
    """Shapes, dtypes and strides without data, as ``device="meta"`` models need them."""
    op = getattr(ops, name).default
    real = op(*args)
    meta = op(*[a.to("meta") if isinstance(a, torch.Tensor) else a for a in args])
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
