"""What is read off a model's structure, on the true SDXL UNet (without memory) and on others."""

import copy

import original
import pytest
import torch
from models import run_unet, tiny_sdxl_unet, unet_inputs
from torch import nn

from mixdq_ao import families


@pytest.fixture(scope="module")
def sdxl():
    return original.make_unet(original.SDXL_CONFIG, device="meta")


def test_layers_of_sdxl(sdxl):
    layers = families.layers_of(sdxl)
    assert sum(isinstance(m, nn.Linear) for m in layers.values()) == 743
    assert sum(isinstance(m, nn.Conv2d) for m in layers.values()) == 51
    assert list(layers)[0] == "conv_in" and list(layers)[-1] == "conv_out"
    assert families.layer_shapes(sdxl)["conv_in"] == (320, 4, 3, 3)


def test_content_and_text_layers_of_sdxl(sdxl):
    family = families.family_of(sdxl)
    assert family is families.SDXL
    layers = families.layers_of(sdxl)
    content = [name for name in layers if family.is_content(name)]
    assert (len(content), len(layers) - len(content)) == (420, 374)
    text = [name for name in layers if family.sees_text(name)]
    assert len(text) == 140
    assert {layers[name].in_features for name in text} == {2048}


def test_split_points_of_sdxl(sdxl):
    resnets = {
        "up_blocks.0.resnets.0": [1280, 1280],
        "up_blocks.0.resnets.1": [1280, 1280],
        "up_blocks.0.resnets.2": [1280, 640],
        "up_blocks.1.resnets.0": [1280, 640],
        "up_blocks.1.resnets.1": [640, 640],
        "up_blocks.1.resnets.2": [640, 320],
        "up_blocks.2.resnets.0": [640, 320],
        "up_blocks.2.resnets.1": [320, 320],
        "up_blocks.2.resnets.2": [320, 320],
    }
    assert families.split_points(sdxl) == {f"{name}.conv_shortcut": groups for name, groups in resnets.items()}


def test_split_points_are_where_the_model_concatenates(monkeypatch):
    """The second group is what each up-block takes from the skip connections, seen in a real forward."""
    unet, seen = tiny_sdxl_unet(), []
    cat = torch.cat
    monkeypatch.setattr(
        torch, "cat", lambda parts, *a, **k: seen.append([p.shape[1] for p in parts]) or cat(parts, *a, **k)
    )
    run_unet(unet, **unet_inputs())
    skips = [channels for channels in seen if len(channels) == 2][-9:]
    assert list(families.split_points(unet).values()) == skips


def test_a_lora_does_not_hide_layers():
    peft = pytest.importorskip("peft")
    unet = original.make_unet(original.TINY_CONFIG)
    adapted = copy.deepcopy(unet)
    adapted.add_adapter(peft.LoraConfig(r=2, target_modules=["conv_in", "conv1", "conv_shortcut", "to_k", "proj_in"]))
    assert families.layer_shapes(adapted) == families.layer_shapes(unet)
    assert families.split_points(adapted) == families.split_points(unet)


def test_other_families():
    from diffusers import UNet2DConditionModel

    sd = UNet2DConditionModel(
        block_out_channels=(8, 8), norm_num_groups=4, cross_attention_dim=8, attention_head_dim=4, layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    assert families.family_of(sd) is families.SD
    assert set(map(tuple, families.split_points(sd).values())) == {(8, 8)}
    model = nn.Sequential(nn.Linear(2, 2), nn.Conv1d(2, 2, 1))
    assert families.family_of(model) is families.GENERIC
    assert not families.GENERIC.sees_text("attn2.to_k") and not families.GENERIC.is_content("ff")
    assert list(families.layers_of(model)) == ["0"]
    assert families.split_points(model) == {}


@pytest.mark.parametrize(
    "name, sees_text",
    [
        ("mid_block.attentions.0.transformer_blocks.0.attn2.to_k", True),
        ("attn2.to_v", True),
        ("mid_block.attentions.0.transformer_blocks.0.attn2.to_q", False),
        ("mid_block.attentions.0.transformer_blocks.0.attn1.to_k", False),
        ("attn2.to_kv", False),
        ("xattn2.to_k", False),
    ],
)
def test_text_layers(name, sees_text):
    assert families.SDXL.sees_text(name) is sees_text
