"""The original project's checkpoints and BOS files."""

from pathlib import Path

import original
import pytest
import torch

from mixdq_ao import legacy
from mixdq_ao.checkpoint import LayerParams, QuantParams
from mixdq_ao.files import TensorFile

DATA = Path(__file__).resolve().parents[2] / "shared/data/mixdq"


@pytest.fixture(scope="module")
def unet():
    return original.make_unet(original.TINY_CONFIG)


def test_raw_checkpoint(unet, tmp_path):
    content = original.raw_checkpoint(unet)
    params = legacy.read_original(original.write(content, tmp_path / "ckpt.pth"))
    assert params.layers.keys() == original.quantizable(unet).keys()
    assert params.bos_aware and params.model_hash is None and params.weight_plan is None and params.protect == []
    layer = params.layers["mid_block.attentions.0.transformer_blocks.0.ff.net.2"]
    weight = unet.mid_block.attentions[0].transformer_blocks[0].ff.net[2].weight
    assert layer.groups == 1 and sorted(layer.weight_scale) == [2, 4, 8] and sorted(layer.act_scale) == [4, 8]
    for bits, steps in ((2, 1), (4, 7), (8, 127)):
        torch.testing.assert_close(layer.weight_scale[bits], weight.detach().abs().amax(1)[None] / steps)
    buffers = content["mid_block.attentions.0.transformer_blocks.0.ff.net.2.act_quantizer"][0]
    for bits, index in ((4, 1), (8, 2)):
        assert layer.act_scale[bits].item() == buffers["delta_list"][index].item()
        assert layer.act_zero_point[bits].item() == buffers["zero_point_list"][index].item() - 2 ** (bits - 1)


def test_converted_checkpoint_is_the_raw_one_in_half_precision(unet, tmp_path):
    raw = legacy.read_original(original.write(original.raw_checkpoint(unet), tmp_path / "ckpt.pth"))
    content = original.converted_checkpoint(unet)
    assert all(value.dtype == torch.float16 for lists in content.values() for value in lists.values())
    converted = legacy.read_original(original.write(content, tmp_path / "new_ckpt.pth"))
    assert converted.layers.keys() == raw.layers.keys()
    for name, layer in converted.layers.items():
        for (key, _, tensor), (_, _, exact) in zip(layer.tensors(), raw.layers[name].tensors(), strict=True):
            assert tensor.dtype == torch.float32
            torch.testing.assert_close(tensor, exact, rtol=0 if "zero_point" in key else 2**-11, atol=0)


def test_split_shortcut_has_two_groups(unet, tmp_path):
    params = legacy.read_original(original.write(original.raw_checkpoint(unet), tmp_path / "ckpt.pth"))
    splits = original.split_points(unet)
    assert {name for name, layer in params.layers.items() if layer.groups == 2} == splits.keys()
    name, c = next(iter(splits.items()))
    weight = unet.get_submodule(name).weight.detach()
    halves = torch.stack([weight[:, :c].abs().amax((1, 2, 3)), weight[:, c:].abs().amax((1, 2, 3))])
    torch.testing.assert_close(params.layers[name].weight_scale[8], halves / 127)
    assert params.layers[name].act_scale[8].shape == (2,)


def test_without_second_halves_a_shortcut_is_one_group(unet, tmp_path):
    params = legacy.read_original(original.write(original.raw_checkpoint(unet, splits={}), tmp_path / "ckpt.pth"))
    assert {layer.groups for layer in params.layers.values()} == {1}


def test_true_sdxl_layout(tmp_path):
    """794 layers, nine of them in two halves, with a weight and an activation entry each."""
    unet = original.make_unet(original.SDXL_CONFIG, device="meta")
    content = original.converted_checkpoint(unet)
    assert len(content) == 794 * 2 + 9 * 2 == 1606
    params = legacy.read_original(original.write(content, tmp_path / "new_ckpt.pth"))
    assert len(params.layers) == 794
    assert sum(layer.groups == 2 for layer in params.layers.values()) == 9
    params.save(tmp_path / "p.safetensors")
    assert QuantParams.load(tmp_path / "p.safetensors").layers.keys() == params.layers.keys()


def test_read_params_goes_by_content(unet, tmp_path):
    original.write(original.converted_checkpoint(unet), tmp_path / "wrong.safetensors")
    params = legacy.read_params(tmp_path / "wrong.safetensors")
    params.save(tmp_path / "wrong.pth")
    assert legacy.read_params(tmp_path / "wrong.pth").layers.keys() == params.layers.keys()
    assert legacy.is_original(tmp_path / "wrong.safetensors") and not legacy.is_original(tmp_path / "wrong.pth")


def test_a_header_length_that_looks_like_a_pickle(tmp_path):
    """640 is 80 02 in the first two bytes, which also start a pickle."""
    for padding in range(1000):
        QuantParams({"x" * padding + "y": LayerParams({8: torch.ones(1, 1)})}).save(tmp_path / "p.safetensors")
        if (tmp_path / "p.safetensors").read_bytes()[:2] == b"\x80\x02":
            break
    assert (tmp_path / "p.safetensors").read_bytes()[:2] == b"\x80\x02"
    assert not legacy.is_original(tmp_path / "p.safetensors")
    assert len(legacy.read_params(tmp_path / "p.safetensors").layers) == 1


def test_bos_of_the_original(unet, tmp_path):
    outputs = original.bos_outputs(unet)
    assert outputs and all(value.dim() == 3 and value.dtype == torch.float16 for value in outputs.values())
    bos = legacy.read_bos(original.write(outputs, tmp_path / "bos_pre_computed.pt"))
    assert bos.keys() == outputs.keys()
    assert all(torch.equal(bos[name], value[0, 0]) for name, value in outputs.items())


@pytest.mark.skipif(not DATA.is_dir(), reason="the published BOS outputs are not beside this checkout")
def test_published_bos():
    bos = legacy.read_bos(DATA / "bos_pre_computed.safetensors")
    assert len(bos) == 140
    sizes = [tuple(value.shape) for value in bos.values()]
    assert sizes.count((640,)) == 20 and sizes.count((1280,)) == 120
    assert max(value.abs().max().item() for value in bos.values()) == pytest.approx(198.4, abs=0.1)
    file = TensorFile(DATA / "bos_pre_computed.safetensors")
    assert all(torch.equal(bos[name], file.read(name)[0, 0]) for name in bos)
