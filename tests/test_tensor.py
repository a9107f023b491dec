"""MixDQTensor as a tensor and as a weight: construction, every way in which torch reaches it, and what torch, diffusers
and accelerate do to weights."""

import copy
import inspect
import io
import pickle
import re
from contextlib import nullcontext

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from generators import DTYPES, IMAGE_LAYOUTS, make_case
from hypothesis import given
from hypothesis import strategies as st
from models import quantize_by_hand, run_unet, tiny_sdxl_unet, unet_inputs
from reference import array, assert_same, code_range, pair, sqnr
from torch import nn
from torchao.utils import TorchAOBaseTensor, get_model_size_in_bytes

from mixdq_ao.errors import MixDQError, PlanError, UnsupportedError
from mixdq_ao.ops import BOS_TOLERANCE
from mixdq_ao.tensor import MAX_REDUCTION, MixDQTensor

aten = torch.ops.aten

STATIC = {"act_scale": 0.02, "act_zero_point": -9.0}
KINDS = {"static": STATIC, "dynamic": {"act_bits": 8}, "none": {}}


def linear_weight(out=12, inp=20, bits=8, dtype=torch.float32, seed=0, **options) -> MixDQTensor:
    g = torch.Generator().manual_seed(seed)
    return MixDQTensor.from_float(torch.randn(out, inp, generator=g).to(dtype), bits, **options)


def conv_weight(out=6, inp=5, kernel=(3, 3), bits=8, dtype=torch.float32, seed=0, **options) -> MixDQTensor:
    g = torch.Generator().manual_seed(seed)
    return MixDQTensor.from_float(torch.randn(out, inp, *kernel, generator=g).to(dtype), bits, **options)


def inner(w: MixDQTensor) -> dict[str, torch.Tensor]:
    return {name: getattr(w, name) for name in w.__tensor_flatten__()[0]}


def assert_same_weight(a, b):
    assert type(a) is type(b) is MixDQTensor or isinstance(a, nn.Parameter)
    assert a.__tensor_flatten__()[1] == b.__tensor_flatten__()[1]
    assert inner(a).keys() == inner(b).keys()
    for name, t in inner(a).items():
        assert_same(t, inner(b)[name], name)


# --- construction -----------------------------------------------------------------------------------------------------


def test_the_docstring_names_exactly_the_declared_fields():
    text = inspect.getdoc(MixDQTensor)  # Python 3.13 takes the indentation away itself
    sections = re.split(r"\n(?:Tensor|Non-tensor) attributes:\n", text)
    tensors, attributes = [re.findall(r"^    (\w+):", s, re.MULTILINE) for s in sections[1:]]
    assert tensors == MixDQTensor.tensor_data_names + MixDQTensor.optional_tensor_data_names
    assert attributes == MixDQTensor.tensor_attribute_names + MixDQTensor.optional_tensor_attribute_names


@given(
    st.sampled_from([8, 4, 2]),
    st.integers(1, 9),
    st.lists(st.integers(1, 9), min_size=1, max_size=3),
    st.sampled_from([(), (3, 2)]),
    st.integers(0, 2**31),
)
def test_from_float_rounds_to_the_nearest_code(bits, out, groups, kernel, seed):
    weight = torch.randn(out, sum(groups), *kernel, generator=torch.Generator().manual_seed(seed))
    weight[0] = 0
    w = MixDQTensor.from_float(weight, bits, input_groups=groups)
    low, high = code_range(bits)
    for g, (part, codes) in enumerate(zip(weight.split(groups, 1), w.int_repr().split(groups, 1), strict=True)):
        part = array(part).reshape(out, -1)
        largest = np.abs(part).max(1)
        scale = np.where(largest > 0, largest / np.float32(high), np.float32(1))
        assert_same(w.scale[g], scale)
        expected = np.clip(np.rint(part / scale[:, None]), low, high).astype(np.int8)
        assert_same(codes.reshape(out, -1), expected)
    assert (w.dequantize() - weight).abs().max() <= w.scale.max() / 2 + 1e-6
    assert w.shape == w.int_repr().shape == weight.shape
    assert not kernel or w.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("shape", [(3,), (2, 12)], ids=str)
def test_a_given_scale_is_used_and_codes_are_clamped(shape):
    scale = torch.full(shape, 0.01)
    out = shape[-1]
    w = MixDQTensor.from_float(
        torch.full((out, 6), -5.0), 4, scale=scale, input_groups=[6] if len(shape) == 1 else [2, 4]
    )
    assert_same(w.scale, scale.reshape(-1, out))
    assert w.int_repr().unique().tolist() == [-8]


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dequantize_is_one_rounding(bits, dtype):
    w = conv_weight(bits=bits, dtype=dtype, input_groups=[2, 3])
    expected = w.int_repr().float() * w.scale.repeat_interleave(torch.tensor([2, 3]), 0).T[:, :, None, None]
    assert_same(w.dequantize(), expected.to(dtype))
    assert_same(w.dequantize(torch.float32), expected)


def test_from_codes_and_stored_tensors_rebuild_the_weight():
    w = linear_weight(bits=4, input_groups=[7, 13], **STATIC, bos_output=torch.ones(12), bos_input=torch.ones(20))
    stored = w.stored_tensors()
    assert list(stored) == ["qdata", "scale", "act_scale", "act_zero_point", "bos_input", "bos_output"]
    again = MixDQTensor.from_codes(
        stored.pop("qdata"), stored.pop("scale"), bits=4, shape=w.shape, dtype=w.dtype, input_groups=[7, 13], **stored
    )
    assert_same_weight(again, w)


def test_the_tensors_of_each_kind():
    names = {kind: set(inner(linear_weight(**options))) for kind, options in KINDS.items()}
    assert names == {
        "static": {"qdata", "scale", "act_scale", "act_zero_point", "alpha", "beta"},
        "dynamic": {"qdata", "scale", "weight_sum"},
        "none": {"qdata", "scale"},
    }
    assert [linear_weight(**o).activation for o in KINDS.values()] == ["static", "dynamic", "none"]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({}, "int8 weight, weight-only"),
        ({"bits": 4, "act_bits": 8}, "int4 weight, dynamic int8 activations"),
        (
            {"bits": 2, **STATIC, "input_groups": [8, 12]},
            r"int2 weight, static int8 activations, input groups \[8, 12\]",
        ),
        ({"act_scale": 0.1, "act_bits": 4, "bos_output": torch.zeros(12)}, "static int4 activations, BOS"),
    ],
    ids=["weight-only", "dynamic", "groups", "bos"],
)
def test_repr_says_what_it_is(options, text):
    w = linear_weight(**options)
    assert re.search(text, w.quantization_repr())
    assert re.fullmatch(rf"MixDQTensor\(shape=\[12, 20\], dtype=torch.float32, device=cpu, .*{text}\)", repr(w))


@pytest.mark.parametrize(
    ("error", "text", "make"),
    [
        (PlanError, "weight bits must be one of .*found 3", lambda: linear_weight(bits=3)),
        (PlanError, "activation bits must be one of .*found 2", lambda: linear_weight(act_bits=2)),
        (
            UnsupportedError,
            r"floating weights of linear .*int32 \[4, 4\]",
            lambda: MixDQTensor.from_float(torch.ones(4, 4).int()),
        ),
        (UnsupportedError, r"found torch.float32 \[3, 3, 3\]", lambda: MixDQTensor.from_float(torch.ones(3, 3, 3))),
        (MixDQError, r"add up to 20 input channels; found \[8, 8\]", lambda: linear_weight(input_groups=[8, 8])),
        (MixDQError, r"input_groups must be positive", lambda: linear_weight(input_groups=[0, 20])),
        (MixDQError, r"input_groups must be positive .*found \[\]", lambda: linear_weight(input_groups=[])),
        (
            MixDQError,
            r"scale must be \[groups, out\] = \[1, 12\]; found \[5\]",
            lambda: linear_weight(scale=torch.ones(5)),
        ),
        (
            MixDQError,
            r"scale must be finite and positive",
            lambda: linear_weight(scale=torch.full((12,), float("nan"))),
        ),
        (MixDQError, r"scale must be finite and positive", lambda: linear_weight(scale=torch.zeros(12))),
        (MixDQError, "act_zero_point needs act_scale", lambda: linear_weight(act_zero_point=1)),
        (
            MixDQError,
            "act_scale must have one value for each of 1 input groups; found 2",
            lambda: linear_weight(act_scale=torch.ones(2)),
        ),
        (MixDQError, "act_scale must be finite and positive", lambda: linear_weight(act_scale=-1.0)),
        (MixDQError, "act_scale must be finite and positive", lambda: linear_weight(act_scale=float("inf"))),
        (
            MixDQError,
            "whole number from -128 to 127 for 8 bits; found .*0.5",
            lambda: linear_weight(act_scale=1.0, act_zero_point=0.5),
        ),
        (
            MixDQError,
            "whole number from -8 to 7 for 4 bits; found .*8.0",
            lambda: linear_weight(act_scale=1.0, act_zero_point=8, act_bits=4),
        ),
        (
            MixDQError,
            r"bos_output is for linear layers; this weight has shape \[6, 5, 3, 3\]",
            lambda: conv_weight(bos_output=torch.ones(6)),
        ),
        (MixDQError, "bos_input needs bos_output", lambda: linear_weight(bos_input=torch.ones(20))),
        (
            MixDQError,
            r"bos_output must hold 12 floating values; found torch.float32 \[20\]",
            lambda: linear_weight(bos_output=torch.ones(20)),
        ),
        (
            UnsupportedError,
            f"at most {MAX_REDUCTION} products.*sums {MAX_REDUCTION + 1}.*protect=",
            lambda: linear_weight(1, MAX_REDUCTION + 1),
        ),
        (
            MixDQError,
            r"codes of 4 bits for a weight \[2, 5\] must be uint8 \[2, 3\]; found torch.int8 \[2, 5\]",
            lambda: MixDQTensor.from_codes(
                torch.ones(2, 5, dtype=torch.int8), torch.ones(1, 2), bits=4, shape=(2, 5), dtype=torch.float16
            ),
        ),
    ],
)
def test_arguments_that_do_not_fit_are_named(error, text, make):
    with pytest.raises(error, match=text):
        make()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_refused(value):
    weight = torch.ones(3, 4)
    weight[1, 2] = value
    with pytest.raises(MixDQError, match="weight must be finite"):
        MixDQTensor.from_float(weight)


def test_the_longest_reduction_is_exact():
    w = MixDQTensor.from_codes(
        torch.full((1, MAX_REDUCTION), -128, dtype=torch.int8), torch.ones(1, 1), bits=8, shape=(1, MAX_REDUCTION),
        dtype=torch.float32, act_scale=1.0, act_zero_point=127.0,
    )  # fmt: skip
    x = torch.full((1, MAX_REDUCTION), -1e9)
    assert F.linear(x, w).item() == 255 * 128 * MAX_REDUCTION


# --- the layer, and every way in which torch reaches it ---------------------------------------------------------------

DISPATCH = {
    "torch_function": (nullcontext, nullcontext),
    "torch_function, no_grad": (nullcontext, torch.no_grad),
    "torch_function, inference_mode": (nullcontext, torch.inference_mode),
    "aten, inference_mode": (torch._C.DisableTorchFunctionSubclass, torch.inference_mode),
    "aten, no_grad": (torch._C.DisableTorchFunctionSubclass, torch.no_grad),
}


@pytest.mark.parametrize("path", list(DISPATCH))
@pytest.mark.parametrize("kind", list(KINDS))
def test_linear_from_every_dispatch_path(path, kind):
    w, x, bias = linear_weight(**KINDS[kind]), torch.randn(2, 3, 20), torch.randn(12)
    expected = F.linear(x, w, bias)
    contexts = [make() for make in DISPATCH[path]]
    with contexts[0], contexts[1]:
        if path == "aten, no_grad":  # torch decomposes it and transposes the weight
            with pytest.raises(UnsupportedError, match="cannot be transposed.*torch.inference_mode"):
                F.linear(x, w, bias)
        else:
            assert_same(F.linear(x, w, bias), expected)
            assert_same(F.linear(x, w), F.linear(x, w, torch.zeros(12)))


@pytest.mark.parametrize("padding", [1, "same"])
@pytest.mark.parametrize("path", list(DISPATCH))
@pytest.mark.parametrize("kind", list(KINDS))
def test_conv2d_from_every_dispatch_path(path, kind, padding):
    w, x, bias = conv_weight(**KINDS[kind]), torch.randn(2, 5, 7, 8), torch.randn(6)
    expected = F.conv2d(x, w, bias, padding=1)
    contexts = [make() for make in DISPATCH[path]]
    with contexts[0], contexts[1]:
        assert_same(F.conv2d(x, w, bias, padding=padding), expected)


def test_linear_binds_keywords():
    w, x, bias = linear_weight(**STATIC), torch.randn(3, 20), torch.randn(12)
    expected = F.linear(x, w, bias)
    assert_same(F.linear(x, w, bias=bias), expected)
    assert_same(F.linear(input=x, weight=w, bias=bias), expected)
    assert not torch.equal(F.linear(x, w), expected)


CONV_ARGUMENTS = [
    {},
    {"stride": 2},
    {"stride": (2, 1), "padding": (0, 1)},
    {"stride": [2], "padding": [1], "dilation": (2,)},
    {"padding": "same", "dilation": (2, 3)},
    {"padding": "valid", "stride": 2},
    {"padding": 3, "dilation": 2},
    {"groups": 1, "padding": torch.Size([1, 2])},
]


@pytest.mark.parametrize("kernel", [(3, 3), (2, 3), (1, 1)], ids=str)
@pytest.mark.parametrize("arguments", CONV_ARGUMENTS, ids=str)
def test_conv2d_binds_every_spelling(arguments, kernel):
    """Against the reference, with stride, padding and dilation resolved here in another way."""
    case = make_case(6, [3, 2], kernel)
    x = case.input((2, 5, 12, 13))
    stride, dilation = (pair(arguments.get(n, 1)) for n in ("stride", "dilation"))
    padding = arguments.get("padding", 0)
    if padding == "same":
        total = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
        padding = [(t // 2, t - t // 2) for t in total]
    else:
        padding = [
            (p, p)
            for p in pair(0 if padding == "valid" else tuple(padding) if not isinstance(padding, int) else padding)
        ]
    expected = case.layer.float32(x, (stride, tuple(padding), dilation))
    assert_same(F.conv2d(x, case.weight, case.bias, **arguments), expected)
    assert_same(F.conv2d(input=x, weight=case.weight, bias=case.bias, **arguments), expected)
    positional = [arguments.get(n, d) for n, d in (("stride", 1), ("padding", 0), ("dilation", 1), ("groups", 1))]
    assert_same(F.conv2d(x, case.weight, case.bias, *positional), expected)
    unbatched = F.conv2d(x[1], case.weight, case.bias, **arguments)
    assert_same(unbatched, expected[1])


@pytest.mark.parametrize("layout", list(IMAGE_LAYOUTS))
@pytest.mark.parametrize("kind", list(KINDS))
def test_conv2d_does_not_depend_on_the_memory_format(kind, layout):
    w, x = conv_weight(**KINDS[kind]), torch.randn(2, 5, 7, 8)
    y, expected = F.conv2d(IMAGE_LAYOUTS[layout](x), w, padding=1), F.conv2d(x, w, padding=1)
    if kind == "none":  # floating convolutions may sum in another order
        torch.testing.assert_close(y, expected)
    else:
        assert_same(y, expected)
    assert y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("kind", list(KINDS))
def test_modules_with_an_empty_batch(kind):
    linear, conv = nn.Linear(20, 12), nn.Conv2d(5, 6, 3, padding=1)
    linear.weight = nn.Parameter(linear_weight(**KINDS[kind]), requires_grad=False)
    conv.weight = nn.Parameter(conv_weight(**KINDS[kind]), requires_grad=False)
    assert linear(torch.empty(0, 20)).shape == (0, 12)
    assert linear(torch.empty(2, 0, 20)).shape == (2, 0, 12)
    assert conv(torch.empty(0, 5, 7, 8)).shape == (0, 6, 7, 8)


@pytest.mark.parametrize("mode", ["reflect", "circular"])
def test_modules_that_pad_on_their_own(mode):
    conv = nn.Conv2d(5, 6, 3, padding=1, padding_mode=mode)
    w = conv_weight(**STATIC)
    conv.weight = nn.Parameter(w, requires_grad=False)
    x = torch.randn(2, 5, 7, 8)
    assert_same(conv(x), F.conv2d(F.pad(x, (1, 1, 1, 1), mode=mode), w, conv.bias))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("kind", "bits", "floor"),
    [("static", 8, 36), ("dynamic", 8, 38), ("none", 8, 40), ("static", 4, 16), ("static", 2, 1.2)],
)
def test_signal_to_noise_against_the_floating_layer(kind, bits, floor, dtype):
    """Gaussian data against the float64 layer. Measured in float32 (dB, linear, conv): static 38.2, 38.4, dynamic
    39.9, 39.0, weight-only 42.6, 42.6, int4 17.4, 17.4, int2 1.5, 1.5; bf16 loses at most 0.6, fp16 none."""
    g = torch.Generator().manual_seed(0)
    weight, image_weight = torch.randn(256, 512, generator=g), torch.randn(64, 64, 3, 3, generator=g)
    x, image = torch.randn(64, 512, generator=g), torch.randn(2, 64, 16, 16, generator=g)
    options = KINDS[kind] if kind != "static" else {"act_scale": 8.5 / 255, "act_zero_point": 0.0}
    y = F.linear(x.to(dtype), MixDQTensor.from_float(weight, bits, **options))
    z = F.conv2d(image.to(dtype), MixDQTensor.from_float(image_weight, bits, **options))
    assert y.dtype == z.dtype == dtype
    figures = (
        sqnr(F.linear(x.double(), weight.double()), y),
        sqnr(F.conv2d(image.double(), image_weight.double()), z),
    )
    assert min(figures) > floor


@pytest.mark.parametrize("kind", ["static", "dynamic"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_bad_inputs_do_not_spread(kind, bad):
    """A NaN counts as a real zero and an infinity as the end of the range: the output is finite."""
    x = torch.randn(4, 20)
    x[1, 3] = bad
    w = linear_weight(**KINDS[kind])
    y = F.linear(x, w)
    clean = F.linear(x[[0, 2, 3]], w)
    assert_same(y[[0, 2, 3]], clean)
    if kind == "static" or bad != bad:
        assert y.isfinite().all()
    if bad != bad:
        zeroed = x.nan_to_num(nan=0.0)
        assert_same(y, F.linear(zeroed, w))


def test_the_layer_works_in_float64_and_ignores_autocast():
    """The output has the input's dtype, whatever autocast or the weight's own dtype say."""
    w = linear_weight(dtype=torch.bfloat16, **STATIC)
    x = torch.randn(3, 20)
    assert_same(F.linear(x.double(), w).float(), F.linear(x, w))
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(F.linear(x, w), F.linear(x, w))
        assert F.linear(x, w).dtype == torch.float32


@pytest.mark.parametrize(
    ("error", "text", "call"),
    [
        (
            MixDQError,
            r"F.linear: the input's last dimension must be 20; found shape \[3, 7\]",
            lambda w, c: F.linear(torch.ones(3, 7), w),
        ),
        (
            MixDQError,
            "F.linear: the input must be floating; found torch.int64",
            lambda w, c: F.linear(torch.ones(3, 20).long(), w),
        ),
        (
            UnsupportedError,
            "F.linear: only the weight may be a quantized tensor",
            lambda w, c: F.linear(w, torch.ones(5, 20)),
        ),
        (UnsupportedError, "F.linear: only the weight may be a quantized tensor", lambda w, c: F.linear(w, w)),
        (
            MixDQError,
            "F.linear: input on meta, quantized weight on cpu",
            lambda w, c: F.linear(torch.ones(3, 20, device="meta"), w),
        ),
        (
            MixDQError,
            r"F.linear: the quantized weight has shape \[6, 5, 3, 3\], which is not 2-dim",
            lambda w, c: F.linear(torch.ones(3, 20), c),
        ),
        (
            MixDQError,
            r"F.linear: the bias must have 12 values; found shape \[5\]",
            lambda w, c: F.linear(torch.ones(3, 20), w, torch.ones(5)),
        ),
        (
            MixDQError,
            r"F.conv2d: the quantized weight has shape \[12, 20\], which is not 4-dim",
            lambda w, c: F.conv2d(torch.ones(1, 5, 7, 7), w),
        ),
        (
            MixDQError,
            r"F.conv2d: the input must be \[batch, 5, height, width\]; found shape \[1, 4, 7, 7\]",
            lambda w, c: F.conv2d(torch.ones(1, 4, 7, 7), c),
        ),
        (MixDQError, r"F.conv2d: the input must be .*found shape \[7, 7\]", lambda w, c: F.conv2d(torch.ones(7, 7), c)),
        (
            MixDQError,
            r"F.conv2d: the kernel \[3, 3\] with dilation \[1, 1\] does not fit into the padded input \[2, 9\]",
            lambda w, c: F.conv2d(torch.ones(1, 5, 2, 9), c),
        ),
        (
            UnsupportedError,
            "F.conv2d: grouped convolutions cannot be quantized; found groups=5",
            lambda w, c: F.conv2d(torch.ones(1, 25, 7, 7), c, groups=5),
        ),
        (
            MixDQError,
            r"F.conv2d: stride must be a number or a pair; found \(1, 2, 3\)",
            lambda w, c: F.conv2d(torch.ones(1, 5, 7, 7), c, stride=(1, 2, 3)),
        ),
        (
            MixDQError,
            "F.conv2d: stride must be at least 1; found 0",
            lambda w, c: F.conv2d(torch.ones(1, 5, 7, 7), c, stride=0),
        ),
        (
            MixDQError,
            "F.conv2d: padding must be at least 0; found -1",
            lambda w, c: F.conv2d(torch.ones(1, 5, 7, 7), c, padding=-1),
        ),
        (
            MixDQError,
            r"F.conv2d: padding='same' needs stride 1; found \(2, 2\)",
            lambda w, c: F.conv2d(torch.ones(1, 5, 7, 7), c, stride=2, padding="same"),
        ),
        (
            MixDQError,
            "F.conv2d: padding must be 'same', 'valid', a number or a pair; found 'full'",
            lambda w, c: F.conv2d(torch.ones(1, 5, 7, 7), c, padding="full"),
        ),
        (
            UnsupportedError,
            "transposed convolutions cannot be quantized",
            lambda w, c: F.conv_transpose2d(torch.ones(1, 6, 7, 7), c),
        ),
        (UnsupportedError, "does not support aten.mm.default.*dequantize", lambda w, c: torch.mm(torch.ones(3, 12), w)),
        (UnsupportedError, "does not support aten.add", lambda w, c: w + 1),
        (UnsupportedError, "does not support aten.slice", lambda w, c: w[:3]),
        (UnsupportedError, r"cannot be transposed", lambda w, c: w.t()),
        (UnsupportedError, "cannot be concatenated.*fuse_qkv_projections", lambda w, c: torch.cat([w, w])),
        (UnsupportedError, "cannot become torch.int8", lambda w, c: w.to(torch.int8)),
    ],
)
def test_what_cannot_be_is_an_error_that_says_so(error, text, call):
    with pytest.raises(error, match=text):
        call(linear_weight(**STATIC), conv_weight(**STATIC))


@pytest.mark.parametrize("kind", list(KINDS))
def test_backward_is_refused_with_the_reason(kind):
    """Also where only a bias asks for a gradient, and through a branch, as of a LoRA, that could give one."""
    x, bias = torch.randn(1, 5, 7, 8, requires_grad=True), torch.randn(6, requires_grad=True)
    w = conv_weight(**KINDS[kind])
    for y in (F.conv2d(x, w), F.conv2d(x.detach(), w, bias), F.conv2d(x, w) + x.sum()):
        with pytest.raises(UnsupportedError, match="no backward pass.*torch.no_grad"):
            y.sum().backward()
    tokens = torch.randn(2, 3, 20, requires_grad=True)
    y = F.linear(tokens, linear_weight(**KINDS[kind], bos_output=torch.ones(12)))
    with pytest.raises(UnsupportedError, match="no backward pass"):
        y.sum().backward()
    with torch.no_grad():
        assert not F.conv2d(x, w).requires_grad


# --- BOS --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
class TestBos:
    """Row 0 of a sample is ``bos_output`` where its first token is ``bos_input``."""

    bos, out = torch.randn(20, generator=torch.Generator().manual_seed(3)), torch.arange(12.0)

    def layer(self, kind, **options):
        plain = linear_weight(**KINDS[kind])
        return plain, linear_weight(**KINDS[kind], bos_output=self.out, **options)

    def test_only_samples_that_start_with_it(self, kind, dtype):
        plain, w = self.layer(kind, bos_input=self.bos)
        x = torch.randn(3, 5, 20).to(dtype)
        x[0, 0] = x[2, 0] = self.bos.to(dtype)
        x[1, 2] = self.bos.to(dtype)  # not the first token
        expected = F.linear(x, plain)
        expected[0, 0] = expected[2, 0] = self.out.to(dtype)
        assert_same(F.linear(x, w), expected)

    def test_without_bos_input_it_is_every_sample(self, kind, dtype):
        plain, w = self.layer(kind)
        x = torch.randn(3, 5, 20).to(dtype)
        expected = F.linear(x, plain)
        expected[:, 0] = self.out.to(dtype)
        assert_same(F.linear(x, w), expected)

    def test_two_dimensions_are_one_sample(self, kind, dtype):
        plain, w = self.layer(kind, bos_input=self.bos)
        x = torch.randn(4, 20).to(dtype)
        assert_same(F.linear(x, w), F.linear(x, plain))
        x[0] = self.bos.to(dtype)
        expected = F.linear(x, plain)
        expected[0] = self.out.to(dtype)
        assert_same(F.linear(x, w), expected)

    def test_sample_dimensions_may_be_many(self, kind, dtype):
        plain, w = self.layer(kind, bos_input=self.bos)
        x = torch.randn(2, 3, 4, 20).to(dtype)
        x[1, 2, 0] = self.bos.to(dtype)
        expected = F.linear(x, plain)
        expected[1, 2, 0] = self.out.to(dtype)
        assert_same(F.linear(x, w), expected)

    @pytest.mark.parametrize("shape", [(20,), (0, 20), (2, 0, 20), (0, 4, 20)], ids=str)
    def test_inputs_without_a_first_row(self, kind, dtype, shape):
        plain, w = self.layer(kind, bos_input=self.bos)
        x = torch.randn(shape).to(dtype)
        assert_same(F.linear(x, w), F.linear(x, plain))

    def test_the_comparison_forgives_rounding_and_nothing_else(self, kind, dtype):
        _, w = self.layer(kind, bos_input=self.bos)
        largest = self.bos.abs().max()
        for noise, known in ((0.4 * BOS_TOLERANCE, True), (1.6 * BOS_TOLERANCE, False)):
            x = self.bos.repeat(1, 2, 1)
            x[0, 0, 7] += noise * largest
            assert torch.equal(F.linear(x.to(dtype), w)[0, 0], self.out.to(dtype)) is known
        assert not torch.equal(F.linear(torch.zeros(1, 2, 20, dtype=dtype), w)[0, 0], self.out.to(dtype))
        not_a_token = torch.full((1, 2, 20), float("nan"), dtype=dtype)
        assert not torch.equal(F.linear(not_a_token, w)[0, 0], self.out.to(dtype))

    def test_the_input_is_left_alone(self, kind, dtype):
        _, w = self.layer(kind, bos_input=self.bos)
        x = torch.randn(2, 3, 20).to(dtype)
        before = x.clone()
        F.linear(x, w)
        assert_same(x, before)


# --- what torch does to weights ---------------------------------------------------------------------------------------


def both_weights(**options):
    return [linear_weight(**options), conv_weight(**options)]


def tiny_model(kind="static", bos=True) -> nn.Module:
    model = nn.Sequential(nn.Conv2d(5, 6, 3, padding=1), nn.Flatten(2), nn.Linear(20, 12))
    options = {"bos_output": torch.ones(12), "bos_input": torch.ones(20)} if bos else {}
    model[0].weight = nn.Parameter(conv_weight(bits=4, **KINDS[kind]), requires_grad=False)
    model[2].weight = nn.Parameter(linear_weight(**KINDS[kind], **options), requires_grad=False)
    return model.requires_grad_(False)


def model_input(dtype=torch.float32):
    return torch.randn(2, 5, 4, 5, generator=torch.Generator().manual_seed(5)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("kind", list(KINDS))
def test_another_dtype_changes_the_wrapper_alone(kind, dtype):
    """Codes and scales keep theirs: scales in fp16 would underflow."""
    for w in both_weights(**KINDS[kind]):
        moved = w.to(dtype)
        assert moved.dtype == dtype and moved.dequantize().dtype == dtype
        for name, t in inner(moved).items():
            assert_same(t, inner(w)[name], name)
            assert t.data_ptr() != inner(w)[name].data_ptr()
        assert w.to(w.dtype) is w


def test_a_model_in_half_precision():
    model = tiny_model()
    before = model(model_input(torch.bfloat16).float())
    for convert in (
        lambda m: m.half().to(torch.bfloat16),
        lambda m: m.bfloat16(),
        lambda m: m.float().to(torch.bfloat16),
    ):
        m = convert(copy.deepcopy(model))
        assert {p.dtype for p in m.parameters()} == {torch.bfloat16}
        assert isinstance(m[2].weight, nn.Parameter) and isinstance(m[2].weight, MixDQTensor)
        y = m(model_input(torch.bfloat16))
        assert y.dtype == torch.bfloat16
        assert sqnr(before, y) > 35


@pytest.mark.parametrize("format_", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("move", ["to", "clone", "contiguous"])
def test_memory_format_reaches_the_codes(move, format_):
    w = conv_weight(**STATIC)
    moved = getattr(w, move)(memory_format=format_)
    assert moved.qdata.is_contiguous(memory_format=format_)
    assert moved.is_contiguous(memory_format=format_)
    assert moved.stride() == torch.empty(w.shape).to(memory_format=format_).stride()
    assert_same(moved.dequantize(), w.dequantize())
    x = torch.randn(1, 5, 7, 8)
    assert_same(F.conv2d(x, moved), F.conv2d(x, w))


def test_a_model_to_a_memory_format():
    model = tiny_model()
    x = model_input()
    expected = model(x)
    model.to(memory_format=torch.channels_last)
    assert model[0].weight.qdata.is_contiguous(memory_format=torch.channels_last)
    assert_same(model(x), expected)
    model.to(memory_format=torch.contiguous_format)
    assert_same(model(x), expected)


def by_torch_save(model):
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    fresh = nn.Sequential(nn.Conv2d(5, 6, 3, padding=1), nn.Flatten(2), nn.Linear(20, 12)).requires_grad_(False)
    fresh.load_state_dict(torch.load(file, weights_only=True), assign=True)
    return fresh


def into_quantized(model):
    fresh = tiny_model(model[0].weight.activation)
    with torch.no_grad():
        for p in fresh.parameters():
            for t in inner(p).values() if isinstance(p, MixDQTensor) else [p]:
                t.zero_()
    fresh.load_state_dict(model.state_dict())
    return fresh


def into_meta(model):
    fresh = nn.Sequential(nn.Conv2d(5, 6, 3, padding=1), nn.Flatten(2), nn.Linear(20, 12)).to("meta")
    fresh.load_state_dict(model.state_dict(), assign=True)
    return fresh.requires_grad_(False)


def by_empty_storage(model):
    fresh = copy.deepcopy(model).to("meta").to_empty(device="cpu")
    fresh.load_state_dict(model.state_dict())
    return fresh


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "torch.save, weights_only, assign": by_torch_save,
    "load_state_dict into a quantized model": into_quantized,
    "load_state_dict into meta": into_meta,
    "to_empty, load_state_dict": by_empty_storage,
    "device": lambda m: m.to("cpu"),
}


@pytest.mark.parametrize("make", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize("kind", list(KINDS))
def test_copies_compute_the_same(kind, make):
    model = tiny_model(kind)
    expected = model(model_input())
    again = make(model)
    for p, q in zip(model.parameters(), again.parameters(), strict=True):
        assert type(p) is type(q) and p.requires_grad == q.requires_grad
        if isinstance(p, MixDQTensor):
            assert_same_weight(p, q)
    assert_same(again(model_input()), expected)


def test_the_saved_file_holds_no_copy():
    w = linear_weight(256, 256, bits=4, **STATIC)
    file = io.BytesIO()
    torch.save({"weight": w}, file)
    assert file.getbuffer().nbytes < 256 * 256 // 2 + 16_000


def test_loading_into_a_floating_model_without_assign_says_what_to_do():
    model = nn.Sequential(nn.Conv2d(5, 6, 3, padding=1), nn.Flatten(2), nn.Linear(20, 12))
    with pytest.raises(RuntimeError, match="assign=True"):
        model.load_state_dict(tiny_model().state_dict())


@pytest.mark.parametrize("reverse", [False, True], ids=["floating <- quantized", "quantized <- floating"])
def test_copy_between_quantized_and_floating_is_refused(reverse):
    pair_ = [torch.zeros(12, 20), linear_weight(**STATIC)]
    a, b = reversed(pair_) if reverse else pair_
    with pytest.raises(UnsupportedError, match=r"copy_\(\) between a quantized and a floating weight.*assign=True"):
        a.copy_(b)


@pytest.mark.parametrize(
    "other", [{"bits": 4, **STATIC}, {}, {"input_groups": [8, 12], **STATIC}, {"inp": 21, **STATIC}], ids=str
)
def test_copy_needs_equal_quantization(other):
    with pytest.raises(MixDQError, match=r"copy_\(\) needs equal quantization; found MixDQTensor.*and MixDQTensor"):
        linear_weight(**STATIC).copy_(linear_weight(**other))


def test_copy_copies():
    a, b = linear_weight(seed=1, **STATIC), linear_weight(seed=2, act_scale=0.5)
    assert a.copy_(b) is a
    assert_same_weight(a, b)
    assert a.qdata.data_ptr() != b.qdata.data_ptr()


@pytest.mark.parametrize("kind", list(KINDS))
def test_meta(kind):
    for w in both_weights(**KINDS[kind]):
        meta = w.to("meta")
        assert meta.device.type == "meta" and {t.device.type for t in inner(meta).values()} == {"meta"}
        assert (meta.shape, meta.dtype, meta.stride()) == (w.shape, w.dtype, w.stride())
    model = tiny_model(kind).to("meta")
    y = model(model_input().to("meta"))
    assert y.device.type == "meta" and y.shape == (2, 6, 12)


def test_a_weight_made_on_meta():
    w = MixDQTensor.from_float(torch.empty(8, 6, 3, 3, device="meta"), 4, **STATIC)
    assert {t.device.type for t in inner(w).values()} == {"meta"}


@pytest.mark.parametrize("options", [{}, {"device": "meta"}, {"dtype": torch.float16}], ids=str)
def test_empty_like(options):
    for w in both_weights(bits=4, **STATIC):
        empty = torch.empty_like(w, **options)
        assert isinstance(empty, MixDQTensor)
        assert empty.device.type == options.get("device", "cpu") and empty.dtype == options.get("dtype", w.dtype)
        assert {n: (t.shape, t.dtype) for n, t in inner(empty).items()} == {
            n: (t.shape, t.dtype) for n, t in inner(w).items()
        }
        if not options:
            assert_same_weight(empty.copy_(w), w)


def test_clone_and_detach():
    for w in both_weights(**STATIC):
        clone, detached = w.clone(), w.detach()
        assert_same_weight(clone, w)
        assert all(t.data_ptr() != inner(w)[n].data_ptr() for n, t in inner(clone).items())
        assert all(t.data_ptr() == inner(w)[n].data_ptr() for n, t in inner(detached).items())


def test_pinning():
    assert not linear_weight(**STATIC).is_pinned()
    if not torch.accelerator.is_available():
        pytest.skip("memory is pinned for an accelerator, and there is none")
    pinned = linear_weight(**STATIC).pin_memory()
    assert pinned.is_pinned() and all(t.is_pinned() for t in inner(pinned).values())


def test_parameters_need_no_gradient():
    w = linear_weight(**STATIC)
    assert not w.requires_grad
    parameter = nn.Parameter(w, requires_grad=False)
    assert isinstance(parameter, nn.Parameter) and isinstance(parameter, MixDQTensor)
    assert_same_weight(parameter.data, w)


def test_torchao_helpers_understand_it():
    w = linear_weight(**STATIC)
    assert isinstance(w, TorchAOBaseTensor)
    assert torch._has_compatible_shallow_copy_type(w, w.clone())
    assert not torch._has_compatible_shallow_copy_type(w, linear_weight(5, **STATIC))
    assert not torch._has_compatible_shallow_copy_type(w, torch.zeros(12, 20))
    model = nn.Sequential(nn.Linear(512, 256, bias=False))
    model[0].weight = nn.Parameter(linear_weight(256, 512, bits=4), requires_grad=False)
    assert get_model_size_in_bytes(model) == 256 * 512 // 2 + 256 * 4


def test_swap_tensors_replaces_a_weight():
    a, b = linear_weight(seed=1, **STATIC), linear_weight(seed=2, **STATIC)
    first, second = a.clone(), b.clone()
    torch.utils.swap_tensors(a, b)
    assert_same_weight(a, second)
    assert_same_weight(b, first)


# --- accelerate and diffusers -----------------------------------------------------------------------------------------


def test_parameters_can_be_rebuilt_from_themselves():
    """accelerate calls ``type(parameter)(tensor, requires_grad=...)``."""
    w = linear_weight(**STATIC)
    assert MixDQTensor(w, requires_grad=False) is w
    assert_same_weight(MixDQTensor(w, requires_grad=False), linear_weight(**STATIC))


def test_accelerate_moves_a_weight():
    accelerate = pytest.importorskip("accelerate.utils")
    model = tiny_model()
    before = model[2].weight.clone()
    accelerate.set_module_tensor_to_device(model, "2.weight", "meta")
    assert model[2].weight.device.type == "meta"
    accelerate.set_module_tensor_to_device(model, "2.weight", "cpu", value=before)
    assert_same_weight(model[2].weight, before)


def test_sequential_offload():
    accelerate = pytest.importorskip("accelerate")
    model = tiny_model()
    expected = model(model_input())
    accelerate.cpu_offload(model, torch.device("cpu"))
    assert model[2].weight.device.type == "meta"
    for _ in range(2):
        assert_same(model(model_input()), expected)


@pytest.fixture(scope="module")
def quantized_unet():
    unet = tiny_sdxl_unet()
    floating = run_unet(unet, **unet_inputs())
    quantize_by_hand(unet, lambda: unet(**unet_inputs()))
    return unet, floating


def test_a_unet(quantized_unet):
    """Every layer of the tiny SDXL-type UNet. Measured against the floating UNet: 30.6 dB."""
    unet, floating = quantized_unet
    assert all(isinstance(m.weight, MixDQTensor) for m in unet.modules() if isinstance(m, (nn.Linear, nn.Conv2d)))
    assert sqnr(floating, run_unet(unet, **unet_inputs())) > 28


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_unet_in_half_precision(quantized_unet, dtype):
    """Measured against the floating float32 UNet: bf16 30.2 dB, fp16 30.6 dB."""
    unet, floating = quantized_unet
    half = copy.deepcopy(unet).to(dtype).to(memory_format=torch.channels_last)
    y = run_unet(half, **unet_inputs(dtype=dtype))
    assert y.dtype == dtype
    assert sqnr(floating, y) > 25


def test_fuse_qkv_says_what_to_do(quantized_unet):
    unet = copy.deepcopy(quantized_unet[0])
    with pytest.raises(UnsupportedError, match=r"fuse_qkv_projections\(\), then quantize_"):
        unet.fuse_qkv_projections()


@pytest.mark.parametrize("kernel", [1, 3])
def test_codes_from_anywhere_have_the_same_strides(kernel):
    made = MixDQTensor.from_float(torch.randn(8, 4, kernel, kernel))
    stored = made.qdata.contiguous().clone(memory_format=torch.contiguous_format)
    built = MixDQTensor.from_codes(stored, made.scale, bits=8, shape=made.shape, dtype=made.dtype)
    assert built.stride() == made.stride() and built.qdata.stride() == made.qdata.stride()


@pytest.mark.parametrize(
    "change, dtype",
    [("half", torch.float16), ("bfloat16", torch.bfloat16), ("float", torch.float32), ("cpu", torch.float32)],
)
def test_conversions_under_inference_mode(change, dtype):
    weight = MixDQTensor.from_float(torch.randn(4, 8), act_scale=0.1)
    with torch.inference_mode():
        converted = getattr(weight, change)()
        assert (converted is weight) == (dtype == weight.dtype)
    assert converted.dtype == dtype
    assert converted.scale.dtype == torch.float32 and torch.equal(converted.qdata, weight.qdata)
