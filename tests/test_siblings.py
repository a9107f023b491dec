"""Which layers may share a quantized input, and their weights side by side."""

import copy

import pytest
import torch
from models import run_unet, tiny_sdxl_unet, unet_inputs
from torch import nn

from mixdq_ao import MixDQConfig, MixDQTensor, families, load, observe, quantize_, save
from mixdq_ao.siblings import mark_shared, pack_siblings_


@pytest.fixture(scope="module")
def quantized():
    unet = tiny_sdxl_unet(layers_per_block=1)
    with observe(unet) as recorder:
        run_unet(unet, **unet_inputs())
    quantize_(unet, MixDQConfig(recorder.params()))
    return unet


@pytest.fixture
def unet(quantized):
    return copy.deepcopy(quantized)


def groups(model: nn.Module) -> dict[str, int | None]:
    return {name: layer.weight.act_group for name, layer in families.layers_of(model).items()}


def numbered(model: nn.Module) -> dict[str, int]:
    return {name: number for name, number in groups(model).items() if number is not None}


def scaled(weight: MixDQTensor, factor: float) -> MixDQTensor:
    """The same weight with other activation parameters."""
    return MixDQTensor.from_float(
        weight.dequantize(), act_scale=weight.act_scale * factor, act_zero_point=weight.act_zero_point
    )


def give(model: nn.Module, name: str, weight: MixDQTensor) -> None:
    model.get_submodule(name).weight = nn.Parameter(weight, requires_grad=False)


def adjacent(tensors) -> bool:
    return all(a.data_ptr() + a.nbytes == b.data_ptr() for a, b in zip(tensors, tensors[1:], strict=False))


BLOCK = "down_blocks.1.attentions.0.transformer_blocks.0"
QKV = [f"{BLOCK}.attn1.to_{part}" for part in "qkv"]


def test_siblings_are_found_by_name_in_running_order(unet):
    sets = families.siblings_of(unet)
    assert QKV in [list(layers) for layers in sets]
    text = next(list(layers) for layers in sets if any("attn2" in name for name in layers))
    assert len(text) == 22 and text[0] == f"{BLOCK}.attn2.to_k" and text[1] == f"{BLOCK}.attn2.to_v"
    stages = [name.partition(".")[0] for name in text]
    assert stages == sorted(stages, key=["down_blocks", "mid_block", "up_blocks"].index)


def test_equal_parameters_get_equal_numbers_in_every_block(unet):
    marked = numbered(unet)
    assert set(marked.values()) == {0}
    assert len(marked) == 3 * 11 + 2 * 11 + len([n for n in groups(unet) if n.endswith("time_emb_proj")])


def test_unequal_parameters_get_another_number(unet):
    give(unet, QKV[1], scaled(unet.get_submodule(QKV[1]).weight, 2))
    mark_shared(unet)
    assert [groups(unet)[name] for name in QKV] == [0, 1, 0]


def test_blocks_that_all_read_the_text_do_not_number_it_each():
    """With numbers of their own, the first attentions of two blocks would share the quantizer of one."""
    unet = tiny_sdxl_unet(layers_per_block=1, only_cross_attention=True)  # but for the middle block
    names = [n for layers in families.siblings_of(unet) for n in layers if not n.startswith("mid_block")]
    assert any("attn2" in name for name in names) and not any("attn1" in name for name in names)


def test_another_bos_input_gets_another_number():
    layers = nn.ModuleDict({"attn2": nn.ModuleDict({"to_k": nn.Linear(16, 8), "to_v": nn.Linear(16, 8)})})
    for value, layer in enumerate(layers["attn2"].values()):
        weight = MixDQTensor.from_float(
            layer.weight, act_scale=0.1, bos_input=torch.full((16,), float(value)), bos_output=torch.zeros(8)
        )
        layer.weight = nn.Parameter(weight, requires_grad=False)
    mark_shared(layers)
    assert list(groups(layers).values()) == [0, 1]


@pytest.mark.parametrize("act_bits", [8, None])
def test_only_static_activations_are_shared(act_bits):
    unet = tiny_sdxl_unet(layers_per_block=1)
    quantize_(unet, MixDQConfig(act_bits=act_bits))
    assert not numbered(unet)


def test_numbers_survive_what_weights_go_through(unet, tmp_path):
    expected = groups(unet)
    assert groups(copy.deepcopy(unet)) == expected
    assert groups(copy.deepcopy(unet).half().to(memory_format=torch.channels_last)) == expected
    torch.save(unet.state_dict(), tmp_path / "weights.pt")
    other = copy.deepcopy(unet)
    other.load_state_dict(torch.load(tmp_path / "weights.pt"), assign=True)
    assert groups(other) == expected
    save(unet, tmp_path / "unet.safetensors")
    assert groups(load(tmp_path / "unet.safetensors")) == expected


def test_a_weight_that_gets_other_values_stops_sharing(unet):
    weight = unet.get_submodule(QKV[0]).weight
    weight.copy_(copy.deepcopy(weight))
    assert weight.act_group == 0
    weight.copy_(scaled(weight, 2))
    assert weight.act_group is None
    mark_shared(unet)
    assert [groups(unet)[name] for name in QKV] == [0, 1, 1]


def test_packing_moves_memory_and_nothing_else(unet, tmp_path):
    before = {name: (w.int_repr(), w.alpha.clone(), w.beta.clone()) for name, w in weights(unet).items()}
    expected = run_unet(unet, **unet_inputs())
    names = list(unet.state_dict())
    assert pack_siblings_(unet) == 11 + 2 + 1  # QKV, text by twenties, time embeddings of 64 and 32 channels
    for name, w in weights(unet).items():
        assert all(torch.equal(a, b) for a, b in zip(before[name], (w.int_repr(), w.alpha, w.beta), strict=True))
    qkv = [unet.get_submodule(name).weight for name in QKV]
    assert all(adjacent([getattr(w, part) for w in qkv]) for part in ("qdata", "alpha", "beta"))
    assert not any(getattr(w, part)._is_view() for w in qkv for part in ("qdata", "alpha", "beta"))
    assert torch.equal(run_unet(unet, **unet_inputs()), expected) and list(unet.state_dict()) == names


def test_packing_again_moves_nothing(unet):
    pack_siblings_(unet)
    before = {name: w.qdata.data_ptr() for name, w in weights(unet).items()}
    assert pack_siblings_(unet) == 0
    assert {name: w.qdata.data_ptr() for name, w in weights(unet).items()} == before


def test_biases_of_packed_layers_are_adjacent_too(unet):
    pack_siblings_(unet)
    layers = next(s for s in families.siblings_of(unet) if any("time" in name for name in s))
    assert adjacent([layer.bias for layer in layers.values()])


def test_only_equal_widths_are_packed_together(unet):
    weight = unet.get_submodule(QKV[1]).weight
    narrow = MixDQTensor.from_float(
        weight.dequantize(), 4, act_scale=weight.act_scale, act_zero_point=weight.act_zero_point
    )
    give(unet, QKV[1], narrow)
    mark_shared(unet)
    pack_siblings_(unet)
    q, k, v = (unet.get_submodule(name).weight for name in QKV)
    assert k.act_group == q.act_group and adjacent([q.qdata, v.qdata]) and not adjacent([q.qdata, k.qdata])


@pytest.mark.parametrize("how", ["ours", "diffusers", "torch"])
def test_files_of_a_packed_model(unet, tmp_path, how):
    from diffusers import UNet2DConditionModel

    expected = run_unet(unet, **unet_inputs())
    pack_siblings_(unet)
    if how == "ours":
        save(unet, tmp_path / "unet.safetensors")
        loaded = load(tmp_path / "unet.safetensors")
    elif how == "diffusers":
        unet.save_pretrained(tmp_path)
        loaded = UNet2DConditionModel.from_pretrained(tmp_path, torch_dtype=torch.float32)
    else:
        torch.save(unet.state_dict(), tmp_path / "unet.pt")
        loaded = copy.deepcopy(unet)
        loaded.load_state_dict(torch.load(tmp_path / "unet.pt"), assign=True)
    assert torch.equal(run_unet(loaded, **unet_inputs()), expected)


def weights(model: nn.Module) -> dict[str, MixDQTensor]:
    return {name: layer.weight for name, layer in families.layers_of(model).items()}
