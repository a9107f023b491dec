"""Simulated quantization agrees with the real tensor, and leaves no trace."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import run_unet, tiny_sdxl_unet, unet_inputs
from torch import nn

from mixdq_ao import MixDQConfig, families, observe, quantize_
from mixdq_ao.checkpoint import LayerParams, QuantParams
from mixdq_ao.errors import MixDQError, PlanError
from mixdq_ao.evaluate import sqnr
from mixdq_ao.plan import BitPlan
from mixdq_ao.simulate import SimulatedWeight, mix_of, simulated, simulated_weight
from mixdq_ao.tensor import MixDQTensor


def real(module: nn.Module, bits: int, act_bits: int | None, p: LayerParams | None, groups=None) -> nn.Module:
    module = copy.deepcopy(module)
    static = p is not None and act_bits is not None
    module.weight = nn.Parameter(
        MixDQTensor.from_float(
            module.weight,
            bits,
            scale=p and p.weight_scale[bits],
            input_groups=groups,
            act_bits=act_bits,
            act_scale=p.act_scale[act_bits] if static else None,
            act_zero_point=p.act_zero_point[act_bits] if static else None,
            bos_input=p.bos_input if static else None,
            bos_output=p.bos_output if static else None,
        ),
        requires_grad=False,
    )
    return module


def random_params(module: nn.Module, groups: list[int], generator: torch.Generator) -> LayerParams:
    out = module.weight.shape[0]
    rand = lambda *shape: torch.rand(shape, generator=generator)  # noqa: E731
    return LayerParams(
        {b: (rand(len(groups), out) + 0.5) * 2.0 ** (1 - b) for b in (2, 4, 8)},
        {b: (rand(len(groups)) + 0.5) * 6 / 2**b for b in (4, 8)},
        {b: (rand(len(groups)) * 6).round() - 3 for b in (4, 8)},
    )


@given(
    kind=st.sampled_from(["linear", "conv", "strided"]),
    channels=st.lists(st.integers(1, 24), min_size=1, max_size=2),
    out=st.integers(1, 20),
    bits=st.sampled_from([2, 4, 8]),
    act_bits=st.sampled_from([4, 8, None]),
    static=st.booleans(),
    seed=st.integers(0, 10**6),
)
@settings(max_examples=50)
def test_a_layer_agrees_with_the_real_tensor(kind, channels, out, bits, act_bits, static, seed):
    g = torch.Generator().manual_seed(seed)
    total = sum(channels)
    torch.manual_seed(seed)
    if kind == "linear":
        module, x = nn.Linear(total, out), torch.randn(2, 5, total, generator=g)
    else:
        stride = 2 if kind == "strided" else 1
        module = nn.Conv2d(total, out, 3, stride, 1)
        x = torch.randn(2, total, 6, 7, generator=g)
    params = None
    if static:
        params = QuantParams({"layer": random_params(module, channels, g)})
    with torch.no_grad():
        expected = real(module, bits, act_bits, params and params.layers["layer"], channels)(x)
    points = {"layer": channels}
    module.weight = simulated_weight("layer", module, bits, act_bits or 16, params, points)
    with torch.no_grad():
        found = module(x)
    assert type(found) is torch.Tensor and type(expected) is torch.Tensor
    assert torch.allclose(found, expected, atol=1e-5) or sqnr(expected, found) > 60


@pytest.mark.parametrize("dtype, least", [(torch.float32, 60), (torch.bfloat16, 40), (torch.float16, 50)])
def test_dtypes(dtype, least):
    torch.manual_seed(0)
    module, x = nn.Linear(64, 32).to(dtype), torch.randn(4, 7, 64).to(dtype)
    with torch.no_grad():
        expected = real(module, 4, 8, None)(x)
        module.weight = simulated_weight("layer", module, 4, 8)
        found = module(x)
    assert found.dtype == dtype and sqnr(expected, found) > least


def test_a_floating_weight_with_quantized_activations():
    torch.manual_seed(0)
    module, x = nn.Linear(16, 8), torch.randn(3, 5, 16)
    weight = module.weight.detach().clone()
    params = QuantParams({"layer": random_params(module, [16], torch.Generator().manual_seed(0))})
    p = params.layers["layer"]
    q = (x / p.act_scale[4] + p.act_zero_point[4]).round().clamp(-8, 7)
    expected = nn.functional.linear((q - p.act_zero_point[4]) * p.act_scale[4], weight, module.bias)
    module.weight = simulated_weight("layer", module, 16, 4, params)
    assert module.weight.data_ptr() != weight.data_ptr() and torch.equal(
        module.weight.as_subclass(torch.Tensor), weight
    )
    with torch.no_grad():
        assert torch.allclose(module(x), expected, atol=1e-5)


def test_bos_rows():
    torch.manual_seed(0)
    module, x = nn.Linear(16, 8, bias=False), torch.randn(3, 5, 16)
    token, output = 50 * torch.randn(16), torch.randn(8)
    x[:2, 0] = token
    params = QuantParams({"layer": random_params(module, [16], torch.Generator().manual_seed(0))})
    params.layers["layer"].bos_input, params.layers["layer"].bos_output = token, output
    expected = real(module, 8, 8, params.layers["layer"])(x)
    floating = module.weight
    for bits in (8, 16):
        module.weight = floating
        module.weight = simulated_weight("layer", module, bits, 8, params)
        with torch.no_grad():
            found = module(x)
        assert torch.equal(found[:2, 0], output.expand(2, 8))
        assert not torch.equal(found[2, 0], output)
        if bits == 8:
            assert sqnr(expected, found) > 60


@pytest.fixture(scope="module")
def unet_and_params():
    unet = tiny_sdxl_unet()
    with observe(unet) as recorder:
        for seed in range(2):
            run_unet(unet, **unet_inputs(2, seed=seed))
    return unet, recorder.params()


@pytest.mark.parametrize("bits, act_bits", [(8, 8), (4, 8), (2, 4), (8, None)])
def test_every_layer_of_a_unet_agrees_with_the_real_tensor(unet_and_params, bits, act_bits):
    unet, params = unet_and_params
    quantized = copy.deepcopy(unet)
    quantize_(quantized, MixDQConfig(params, weight_bits=bits, act_bits=act_bits))
    layers, points = families.layers_of(unet), families.split_points(unet)
    agreement = {}

    # Layer by layer: where a code lies on an edge it may round the other way, and layers after it carry that on.
    def compare(name):
        def hook(module, args, output):
            twin = copy.deepcopy(layers[name])
            twin.weight = simulated_weight(name, twin, bits, act_bits or 16, params, points)
            agreement[name] = sqnr(output, twin(args[0]))

        return hook

    for name, module in families.layers_of(quantized).items():
        module.register_forward_hook(compare(name))
    output = run_unet(quantized, **unet_inputs(2))
    assert agreement.keys() == layers.keys()
    assert {name: value for name, value in agreement.items() if value <= 60} == {}
    if act_bits is None:
        with simulated(unet, params, (bits, 16)):
            assert sqnr(output, run_unet(unet, **unet_inputs(2))) > 60


def test_the_model_is_as_before(unet_and_params):
    unet, params = unet_and_params
    before = {name: p for name, p in unet.named_parameters()}
    output = run_unet(unet, **unet_inputs())
    names = list(families.layers_of(unet))
    with (
        pytest.raises(RuntimeError, match="on purpose"),
        simulated(unet, params, {names[0]: (4, 16), names[5]: (2, 4)}),
    ):
        assert isinstance(unet.conv_in.weight, SimulatedWeight)
        assert sum(isinstance(p, SimulatedWeight) for p in unet.parameters()) == 2
        assert not torch.equal(run_unet(unet, **unet_inputs()), output)
        raise RuntimeError("on purpose")
    assert all(p is before[name] for name, p in unet.named_parameters())
    assert torch.equal(run_unet(unet, **unet_inputs()), output)
    with simulated(unet, params, (16, 16)):
        assert not any(isinstance(p, SimulatedWeight) for p in unet.parameters())


def test_mix_of_plans():
    weights, acts = BitPlan({"a": 4, "b": None, "c": 2, "d": 8}), BitPlan({"a": 8, "b": 8, "c": None})
    assert mix_of(weights, acts) == {"a": (4, 8), "b": (16, 16), "c": (2, 16), "d": (16, 16)}
    assert mix_of(weights) == {"a": (4, 16), "b": (16, 16), "c": (2, 16), "d": (8, 16)}


def test_errors(unet_and_params):
    unet, params = unet_and_params
    for mix, message in (
        ({"nothing": (8, 8)}, "not layers of the model: nothing"),
        ({"conv_in": (3, 8)}, "conv_in: weight bits must be one of .*found 3"),
        ({"conv_in": (8, 2)}, "conv_in: activation bits must be one of .*found 2"),
    ):
        with pytest.raises(PlanError, match=message), simulated(unet, params, mix):
            pass
    with pytest.raises(PlanError, match="no parameters for layer conv_in"):
        with simulated(unet, QuantParams({"x": params.layers["conv_in"]}), {"conv_in": (8, 8)}):
            pass
    bare = QuantParams({"conv_in": LayerParams({8: params.layers["conv_in"].weight_scale[8]})})
    with pytest.raises(PlanError, match="conv_in: .*no weight scale for 4 bits, only for"):
        with simulated(unet, bare, {"conv_in": (4, 16)}):
            pass
    module = nn.Linear(8, 8)
    module.weight = nn.Parameter(MixDQTensor.from_float(module.weight), requires_grad=False)
    with pytest.raises(MixDQError, match="plain floating"):
        simulated_weight("layer", module, 4, 16)
