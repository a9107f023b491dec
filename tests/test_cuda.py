"""The same results on a CUDA device as on a CPU, whichever kernels run there; or, without one, in the emulator."""

import contextlib
import copy

import emulated
import pytest
import torch
import torch.nn.functional as F
from models import run_unet, tiny_sdxl_unet, unet_inputs

import mixdq_ao
from mixdq_ao import MixDQConfig, MixDQTensor, observe, quantize_
from mixdq_ao.evaluate import sqnr

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
NOTHING = "" if ON_GPU else emulated.why_not()
pytestmark = pytest.mark.skipif(bool(NOTHING), reason=f"no CUDA device: {NOTHING}")
OPERATORS = None if ON_GPU else emulated.Operators()
needs_gpu = pytest.mark.skipif(not ON_GPU, reason="no CUDA device")

ACTIVATIONS = {
    "static": {"act_scale": 0.05, "act_zero_point": -7.0},
    "static-a4": {"act_bits": 4, "act_scale": 0.5, "act_zero_point": 2.0},
    "dynamic": {"act_bits": 8},
    "weight-only": {},
}
LINEAR = [(5, 33, 40), (77, 64, 24), (1, 1, 7), (130, 129, 8)]
CONV = [((2, 6, 9, 8), (12, 6, 3, 3), {"padding": 1}), ((1, 40, 7, 7), (8, 40, 1, 1), {}),
        ((3, 16, 9, 9), (5, 16, 3, 3), {"padding": (2, 1), "stride": 2, "dilation": 2})]  # fmt: skip


def kernels() -> contextlib.AbstractContextManager:
    """Within it our operators are those for CUDA tensors, wherever the tensors are."""
    return contextlib.nullcontext() if ON_GPU else emulated.in_place_of_the_cpu(OPERATORS)


def close(on_cpu, on_cuda, activation) -> None:
    """Bit for bit where integers are multiplied; floating matrix products may add in another order."""
    on_cuda = on_cuda.cpu()
    if activation == "weight-only":
        torch.testing.assert_close(on_cuda, on_cpu, rtol=1e-4, atol=1e-3)
    else:
        # The float32 epilogue may be one fused multiply-add on one of them.
        torch.testing.assert_close(on_cuda, on_cpu, rtol=2e-6, atol=2e-5)


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("rows, k, n", LINEAR)
def test_linear(rows, k, n, activation, bits):
    torch.manual_seed(0)
    w = MixDQTensor.from_float(torch.randn(n, k), bits, **ACTIVATIONS[activation])
    x, bias = torch.randn(2, rows, k), torch.randn(n)
    torch.backends.cuda.matmul.allow_tf32 = False
    with kernels():
        y = F.linear(x.to(DEVICE), w.to(DEVICE), bias.to(DEVICE))
    close(F.linear(x, w, bias), y, activation)


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("x_shape, w_shape, kwargs", CONV)
def test_conv2d(x_shape, w_shape, kwargs, activation, bits):
    torch.manual_seed(0)
    w = MixDQTensor.from_float(torch.randn(w_shape), bits, **ACTIVATIONS[activation])
    x, bias = torch.randn(x_shape), torch.randn(w_shape[0])
    with kernels(), torch.backends.cudnn.flags(allow_tf32=False):
        y = F.conv2d(x.to(DEVICE), w.to(DEVICE), bias.to(DEVICE), **kwargs)
    close(F.conv2d(x, w, bias, **kwargs), y, activation)


@needs_gpu
def test_pinning_and_moving():
    w = MixDQTensor.from_float(torch.randn(8, 16), 4, act_scale=0.1)
    pinned = w.pin_memory()
    assert pinned.is_pinned() and not w.is_pinned()
    back = pinned.to("cuda", non_blocking=True).cpu()
    assert torch.equal(back.qdata, w.qdata) and torch.equal(back.beta, w.beta)


@needs_gpu
def test_wrong_device_is_a_clear_error():
    w = MixDQTensor.from_float(torch.randn(8, 16), act_bits=8)
    with pytest.raises(ValueError, match="input on cuda:0, quantized weight on cpu"):
        F.linear(torch.randn(2, 16, device="cuda"), w)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_wrong_arguments_are_told_in_the_words_of_the_layer(activation, monkeypatch):
    """Where the library checks them, and not the layer, which here takes a CPU's tensors for those of a GPU."""
    if not ON_GPU:
        monkeypatch.setattr(mixdq_ao.ops, "cuda_library_missing", "")
        monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda t: True), raising=False)
    w = MixDQTensor.from_float(torch.randn(8, 16, device=DEVICE), **ACTIVATIONS[activation])
    x = torch.randn(2, 16, device=DEVICE)
    wrong = {
        r"F.linear: the input's last dimension must be 16; found shape \[2, 15\]": lambda: F.linear(x[:, :15], w),
        "F.linear: the input must be floating; found torch.int64": lambda: F.linear(x.long(), w),
        r"F.linear: the bias must have 8 values; found shape \[5\]": lambda: F.linear(x, w, x[0, :5]),
        "F.linear: only the weight may be a quantized tensor": lambda: F.linear(w, w),
        "the input must be float16, bfloat16 or float32 on CUDA": lambda: F.linear(x.double(), w),
    }
    c = MixDQTensor.from_float(torch.randn(8, 16, 3, 3, device=DEVICE), **ACTIVATIONS[activation])
    image = torch.randn(1, 16, 5, 5, device=DEVICE)
    wrong |= {
        r"F.conv2d: the input must be \[batch, 16, height, width\]": lambda: F.conv2d(image[:, :15], c),
        "F.conv2d: the input must be floating; found torch.int64": lambda: F.conv2d(image.long(), c),
        r"F.conv2d: the bias must have 8 values; found shape \[5\]": lambda: F.conv2d(image, c, x[0, :5]),
        r"F.conv2d: the kernel \[3, 3\] with dilation \[1, 1\] does not fit": lambda: F.conv2d(image[..., :2], c),
        "F.conv2d: stride must be at least 1; found 0": lambda: F.conv2d(image, c, stride=0),
        "F.conv2d: the quantized weight has shape": lambda: F.conv2d(image, w, padding="same"),
    }
    with kernels():
        for message, call in wrong.items():
            with pytest.raises((ValueError, RuntimeError), match=message):
                call()
        assert torch.equal(F.linear(x, w, x.new_empty(0)), F.linear(x, w))
        assert torch.equal(F.conv2d(image[0], c), F.conv2d(image, c)[0])


def moved(inputs: dict) -> dict:
    return {k: moved(v) if isinstance(v, dict) else v.to(DEVICE) for k, v in inputs.items()}


def quantized_copy(unet, inputs: dict, dtype: torch.dtype):
    with observe(unet) as recorder:
        run_unet(unet, **inputs)
    quantized = copy.deepcopy(unet)
    quantize_(quantized, MixDQConfig(recorder.params()))
    return quantized.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_unet_eager(dtype):
    unet, inputs = tiny_sdxl_unet(layers_per_block=1).to(DEVICE), moved(unet_inputs())
    quantized = quantized_copy(unet, inputs, dtype)
    with kernels():
        eager = run_unet(quantized, **moved(unet_inputs(dtype=dtype)))
    assert torch.isfinite(eager).all()
    assert sqnr(run_unet(unet, **inputs), eager) > 20


class Compared(emulated.Operators):
    """Each call must give what the operator for any device gives for the same arguments."""

    def __init__(self):
        self.called = set()

    def __getattr__(self, name: str):
        on_gpu, op = super().__getattr__(name), getattr(torch.ops.mixdq_ao, name).default

        def call(*args):
            found = on_gpu(*args)
            expected = op.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CompositeExplicitAutograd), *args)
            told = name, [tuple(a.shape) for a in args if isinstance(a, torch.Tensor)]
            assert found.shape == expected.shape and found.dtype == expected.dtype, told
            if found.dtype == torch.int8:  # norms may round the other way beside a half
                assert (found != expected).double().mean() < 2e-3 and (found.int() - expected).abs().max() <= 1, told
            else:
                assert sqnr(expected, found) > 60, told
            self.called.add(name)
            return found

        return call


@pytest.mark.skipif(ON_GPU, reason="on a GPU test_cuda_compile has more of it")
def test_unet_by_our_passes():
    """The operators that only compiled models call, with what such models give them."""
    half, operators = unet_inputs(dtype=torch.float16), Compared()
    compiled = mixdq_ao.compile(quantized_copy(tiny_sdxl_unet(layers_per_block=1), unet_inputs(), torch.float16))
    on_cpu = run_unet(compiled, **half)
    with emulated.in_place_of_the_cpu(operators):
        y = run_unet(compiled, **half)
    assert sqnr(on_cpu, y) > 20  # as far apart as roundings before quantizers drive them
    fused = {"layer_norm_quantize", "linear_int8_geglu", "group_norm_quantize", "linear_int8_multi"}
    assert operators.called >= fused | {"quantize", "linear_int8", "conv2d_int8"}


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_unet_compiled(dtype):
    inputs, half = moved(unet_inputs()), moved(unet_inputs(dtype=dtype))
    quantized = quantized_copy(tiny_sdxl_unet(layers_per_block=1).to(DEVICE), inputs, dtype)
    compiled = run_unet(torch.compile(quantized, fullgraph=True), **half)
    assert sqnr(run_unet(quantized, **half), compiled) > 20
