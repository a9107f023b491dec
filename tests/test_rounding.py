"""Better rounding: less error in outputs than nearest rounding has, and nothing else changed."""

import copy

import pytest
import torch
from models import run_unet, unet_inputs
from pipelines import FakePipeline, prompts
from torch import nn

from mixdq_ao import MixDQConfig, MixDQError, MixDQTensor, calibrate, families, load, quantize_, save
from mixdq_ao.calibrate import run_batches
from mixdq_ao.evaluate import sqnr
from mixdq_ao.rounding import gptq_codes, round_from_data_, round_weights_, watch_grams


def correlated(k: int, n: int) -> torch.Tensor:
    return torch.randn(k, k) @ torch.randn(k, n) / k**0.5


@pytest.mark.parametrize("bits", [4, 2])
@pytest.mark.parametrize("groups", [[40], [32, 8]])
def test_less_output_error_than_nearest(bits, groups):
    torch.manual_seed(0)
    weight, x = torch.randn(16, 40), correlated(40, 400)
    nearest = MixDQTensor.from_float(weight, bits, input_groups=groups)
    codes = gptq_codes(weight, x @ x.T, nearest.scale, bits, groups)
    assert codes.dtype == torch.int8 and codes.min() >= -(2 ** (bits - 1)) and codes.max() < 2 ** (bits - 1)
    scale = nearest.scale.T.repeat_interleave(torch.tensor(groups), dim=1)
    errors = [float(((weight - w) @ x).square().sum()) for w in (nearest.dequantize(), codes * scale)]
    assert errors[1] < 0.75 * errors[0]


def test_uncorrelated_inputs_round_to_nearest():
    torch.manual_seed(0)
    weight = torch.randn(8, 24)
    nearest = MixDQTensor.from_float(weight, 4)
    assert torch.equal(gptq_codes(weight, torch.eye(24), nearest.scale, 4, [24]), nearest.int_repr())


def test_the_share_of_an_error_that_is_gone_is_zero():
    """Inputs that are always equal see the sum of the weights alone, which the second code can make up for."""
    floating, quantized = (nn.Sequential(nn.Linear(2, 1, bias=False)) for _ in range(2))
    weight = torch.tensor([[0.25, 0.25]])
    floating[0].weight = nn.Parameter(weight)
    old = MixDQTensor.from_float(weight, 4, scale=torch.tensor([[0.5]]))
    quantized[0].weight = nn.Parameter(old, requires_grad=False)
    assert old.int_repr().tolist() == [[0, 0]]
    assert round_weights_(quantized, floating, {"0": torch.ones(2, 2)}, progress=False) == {"0": 0.0}
    assert sorted(quantized[0].weight.int_repr().tolist()[0]) == [0, 1]


@pytest.mark.parametrize("stride,padding,dilation", [(1, 1, 1), (2, 0, 1), (1, 2, 2)])
def test_gram_of_a_convolution(stride, padding, dilation):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 5, 3, stride, padding, dilation, bias=False))
    x = torch.randn(2, 3, 9, 9)
    with torch.no_grad(), watch_grams(model, ["0"]) as grams:
        y = model(x)
    rows = model[0].weight.flatten(1)
    torch.testing.assert_close(((rows @ grams["0"]) * rows).sum(), y.square().sum())
    assert type(model[0].weight.data) is torch.Tensor


def test_a_whole_unet(tmp_path):
    pipe = FakePipeline()
    params = calibrate(pipe, prompts(4), progress=False)
    names = list(families.layers_of(pipe.unet))
    text = [name for name, p in params.layers.items() if p.bos_output is not None]
    with watch_grams(pipe.unet, names, text) as grams:
        list(run_batches(pipe, prompts(4), progress=False))
    assert grams.keys() == set(names)
    quantized = copy.deepcopy(pipe.unet)
    quantize_(quantized, MixDQConfig(params, 4, 8), progress=False)
    inputs = unet_inputs(size=8)
    inputs["encoder_hidden_states"][:, 0] = torch.linspace(-40, 100, 64)
    reference, nearest = run_unet(pipe.unet, **inputs), run_unet(quantized, **inputs)
    scales = {name: m.weight.scale.clone() for name, m in families.layers_of(quantized).items()}
    shares = round_weights_(quantized, pipe.unet, grams, progress=False)
    assert all(0 < share <= 1 for share in shares.values()) and sum(shares.values()) / len(shares) < 0.9
    for name, module in families.layers_of(quantized).items():
        assert torch.equal(module.weight.scale, scales[name]) and module.weight.bits == 4
    rounded = run_unet(quantized, **inputs)
    piecewise = copy.deepcopy(pipe.unet)
    quantize_(piecewise, MixDQConfig(params, 4, 8), progress=False)
    runs = []

    def run():
        runs.append(list(run_batches(pipe, prompts(4), progress=False)))

    again = round_from_data_(piecewise, pipe.unet, run, without_bos=text, memory=2**22, progress=False)
    assert again == shares and len(runs) > 1
    assert torch.equal(run_unet(piecewise, **inputs), rounded)
    assert sqnr(reference, rounded) > sqnr(reference, nearest)
    save(quantized, tmp_path / "model.safetensors")
    assert torch.equal(run_unet(load(tmp_path / "model.safetensors"), **inputs), rounded)


def test_floating_layers_cannot_be_rounded():
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(MixDQError, match="not: 0"):
        round_weights_(model, model, {"0": torch.eye(4)})
