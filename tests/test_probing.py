"""Probes against finite differences: what a small step along a layer's rounding error does to the UNet's output."""

import pytest
import torch
from models import tiny_sdxl_unet, unet_inputs

from mixdq_ao import families
from mixdq_ao.bits import KINDS
from mixdq_ao.errors import MixDQError
from mixdq_ao.probing import Call, probe_call
from mixdq_ao.simulate import act_quantizer, input_groups, rounded_weight

LAYERS = [
    "conv_in",
    "conv_out",
    "up_blocks.0.resnets.0.conv_shortcut",  # split in two groups of channels
    "mid_block.attentions.0.transformer_blocks.0.attn1.to_q",
    "mid_block.attentions.0.transformer_blocks.0.attn2.to_k",
    "time_embedding.linear_1",
]
PROBES, PROMPTS = 3, 2


@pytest.fixture(scope="module")
def unet():
    return tiny_sdxl_unet().double()


@pytest.fixture(scope="module")
def call(unet):
    inputs = unet_inputs(PROMPTS, dtype=torch.float64)
    args = inputs.pop("sample"), inputs.pop("timestep"), inputs.pop("encoder_hidden_states")
    with torch.no_grad():
        return Call(args, inputs, unet(*args, **inputs, return_dict=False)[0])


def generators():
    return [torch.Generator().manual_seed(10 + i) for i in range(PROMPTS)]


@pytest.fixture(scope="module")
def probed(unet, call):
    return probe_call(unet, None, call, list(KINDS), LAYERS, PROBES, generators())


def slope(unet, call: Call, hook_of, step: float = 1e-5):
    """How the output changes per unit of the step that ``hook_of(step)``, a pre-hook of the layer, takes."""
    outputs = []
    for size in (step, -step):
        with hook_of(size), torch.no_grad():
            outputs.append(unet(*call.args, **call.kwargs, return_dict=False)[0])
    return (outputs[0] - outputs[1]) / (2 * step)


def expected(change) -> float:
    """The mean over probes of ``(v . change)^2``, summed over prompts."""
    directions = [torch.randn((PROBES, *change.shape[1:]), generator=g) for g in generators()]
    return sum(float(((v * d).flatten(1).sum(1) ** 2).mean()) for v, d in zip(directions, change, strict=True))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", LAYERS)
def test_noise_is_that_of_a_small_step_along_the_rounding_error(unet, call, probed, name, kind):
    layer = families.layers_of(unet)[name]
    groups = input_groups(name, layer, None, families.split_points(unet))

    class moved:
        """A context in which the layer's weight or input is moved along its rounding error."""

        def __init__(self, bits: int, size: float):
            self.bits, self.size = bits, size

        def __enter__(self):
            self.weight = layer.weight.data
            if kind == "weight":
                rounded = rounded_weight(self.weight, self.bits, None, groups)
                layer.weight.data = self.weight + self.size * (rounded - self.weight)
                return
            quantizer = act_quantizer(name, layer, self.bits, None, groups)
            self.hook = layer.register_forward_pre_hook(lambda m, a: (a[0] + self.size * (quantizer(a[0]) - a[0]),))

        def __exit__(self, *error):
            layer.weight.data = self.weight
            if kind == "act":
                self.hook.remove()

    for i, bits in enumerate(KINDS[kind]):
        change = slope(unet, call, lambda size, bits=bits: moved(bits, size))
        assert probed["noise"][kind][name][i] == pytest.approx(expected(change), rel=1e-4)


def test_signal_is_the_energy_of_the_output(call, probed):
    assert probed["signal"] == pytest.approx(float(call.output.square().sum()))


def test_a_layer_that_nothing_reads_is_named(unet, call):
    unet.add_module("idle", torch.nn.Linear(4, 4).double())
    try:
        with pytest.raises(MixDQError, match="1 layers do not reach the UNet's output: idle"):
            probe_call(unet, None, call, ["weight"], ["conv_in", "idle"], PROBES, generators())
    finally:
        del unet.idle


def test_an_overflow_names_the_layer(call):
    unet = tiny_sdxl_unet().double()
    unet.conv_out.weight.data.fill_(float("inf"))
    with pytest.raises(MixDQError, match="conv_in: the gradient is not finite; run the UNet in float32"):
        probe_call(unet, None, call, ["weight"], ["conv_in"], PROBES, generators())
