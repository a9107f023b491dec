"""The same results on a CUDA device as on a CPU, whichever kernels run there."""

import copy

import pytest
import torch
import torch.nn.functional as F
from models import run_unet, tiny_sdxl_unet, unet_inputs

from mixdq_ao import MixDQConfig, MixDQTensor, observe, quantize_
from mixdq_ao.evaluate import sqnr

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

ACTIVATIONS = {
    "static": {"act_scale": 0.05, "act_zero_point": -7.0},
    "static-a4": {"act_bits": 4, "act_scale": 0.5, "act_zero_point": 2.0},
    "dynamic": {"act_bits": 8},
    "weight-only": {},
}
LINEAR = [(5, 33, 40), (77, 64, 24), (1, 1, 7), (130, 129, 8)]
CONV = [((2, 6, 9, 8), (12, 6, 3, 3), {"padding": 1}), ((1, 40, 7, 7), (8, 40, 1, 1), {}),
        ((3, 16, 9, 9), (5, 16, 3, 3), {"padding": (2, 1), "stride": 2, "dilation": 2})]  # fmt: skip


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
    close(F.linear(x, w, bias), F.linear(x.cuda(), w.cuda(), bias.cuda()), activation)


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("x_shape, w_shape, kwargs", CONV)
def test_conv2d(x_shape, w_shape, kwargs, activation, bits):
    torch.manual_seed(0)
    w = MixDQTensor.from_float(torch.randn(w_shape), bits, **ACTIVATIONS[activation])
    x, bias = torch.randn(x_shape), torch.randn(w_shape[0])
    with torch.backends.cudnn.flags(allow_tf32=False):
        close(F.conv2d(x, w, bias, **kwargs), F.conv2d(x.cuda(), w.cuda(), bias.cuda(), **kwargs), activation)


def test_pinning_and_moving():
    w = MixDQTensor.from_float(torch.randn(8, 16), 4, act_scale=0.1)
    pinned = w.pin_memory()
    assert pinned.is_pinned() and not w.is_pinned()
    back = pinned.to("cuda", non_blocking=True).cpu()
    assert torch.equal(back.qdata, w.qdata) and torch.equal(back.beta, w.beta)


def test_wrong_device_is_a_clear_error():
    w = MixDQTensor.from_float(torch.randn(8, 16), act_bits=8)
    with pytest.raises(ValueError, match="input on cuda:0, quantized weight on cpu"):
        F.linear(torch.randn(2, 16, device="cuda"), w)


def on_cuda(inputs: dict) -> dict:
    return {k: on_cuda(v) if isinstance(v, dict) else v.cuda() for k, v in inputs.items()}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_unet_eager_and_compiled(dtype):
    unet = tiny_sdxl_unet(layers_per_block=1).cuda()
    inputs, half = on_cuda(unet_inputs()), on_cuda(unet_inputs(dtype=dtype))
    reference = run_unet(unet, **inputs)
    with observe(unet) as recorder:
        run_unet(unet, **inputs)
    quantized = copy.deepcopy(unet)
    quantize_(quantized, MixDQConfig(recorder.params()))
    quantized.to(dtype)
    eager = run_unet(quantized, **half)
    compiled = run_unet(torch.compile(quantized, fullgraph=True), **half)
    assert torch.isfinite(eager).all()
    assert sqnr(reference, eager) > 20
    assert sqnr(eager, compiled) > 20
