"""The true SDXL UNet, with a checkpoint in the original's layout and the published plans. Needs 14 GiB of memory."""

import copy
import os
from pathlib import Path

import original
import pytest
import torch

from mixdq_ao import MixDQConfig, MixDQTensor, quantize_, summary
from mixdq_ao.families import layers_of, split_points
from mixdq_ao.plan import read_names
from mixdq_ao.summary import MIB

DATA = Path(__file__).resolve().parents[2] / "shared/data/mixdq"
MEMORY = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")

pytestmark = [
    pytest.mark.skipif(not DATA.is_dir(), reason="the published bit plans are not beside this checkout"),
    pytest.mark.skipif(MEMORY < 14 * 2**30, reason="the floating and a quantized SDXL UNet need 14 GiB of memory"),
]


@pytest.fixture(scope="module")
def floating():
    """The UNet in bf16 with cheap values: every row of a weight is a piece of one random sequence."""
    unet = original.make_unet(original.SDXL_CONFIG, device="meta", dtype=torch.bfloat16).to_empty(device="cpu")
    noise = torch.randn(2**24 + 1, generator=torch.Generator().manual_seed(0)).bfloat16()
    for module in unet.modules():
        for name, p in module.named_parameters(recurse=False):
            if p.dim() == 1:
                p.data.fill_(1.0 if name == "weight" else 0.0)  # norms, biases
            else:
                repeats = -(-p.numel() // len(noise))
                values = noise.repeat(repeats)[: p.numel()] if repeats > 1 else noise[: p.numel()]
                torch.mul(values.view(p.shape), (p[0].numel()) ** -0.5, out=p.data)
    return unet.requires_grad_(False)


@pytest.fixture
def unet(floating):
    """A model of its own over the same floating weights, which quantize_ replaces but does not change."""
    shared = {id(p): p for p in floating.parameters()}
    return copy.deepcopy(floating, shared)


@pytest.fixture(scope="module")
def checkpoint(floating, tmp_path_factory):
    content = original.converted_checkpoint(floating)
    assert len(content) == 1606 and sum(key.endswith("_0") for key in content) == 2 * 9
    assert {t.dtype for lists in content.values() for t in lists.values()} == {torch.float16}
    return original.write(content, tmp_path_factory.mktemp("sdxl") / "ckpt.pth")


def quantized(model) -> dict[str, MixDQTensor]:
    return {name: m.weight for name, m in layers_of(model).items() if isinstance(m.weight, MixDQTensor)}


def report(text: str, capsys) -> None:
    with capsys.disabled():
        print(f"\n{text}", end=" ")


@pytest.mark.parametrize(
    "weight, act, limit, floating_layers",
    [
        ("uniform_8", "uniform_8", 2500, 0),
        ("weight_5.02", "uniform_8", 1560, 0),
        ("weight_4.00", "uniform_8", 1260, 0),
        ("weight_4.00", "act_8.00", 1320, 9),
    ],
)
def test_published_plans(unet, checkpoint, capsys, weight, act, limit, floating_layers):
    config = MixDQConfig(
        checkpoint, DATA / f"weight/{weight}.yaml", DATA / f"act/{act}.yaml", bos=DATA / "bos_pre_computed.safetensors"
    )
    quantize_(unet, config)
    total = summary(unet).total_bytes / MIB
    report(f"{weight} with {act}: {total:.1f} MiB (at most {limit})", capsys)
    assert total <= limit
    weights = quantized(unet)
    assert len(weights) == 794 - floating_layers
    assert {n: w.input_groups for n, w in weights.items() if len(w.input_groups) > 1} == {
        name: groups for name, groups in split_points(unet).items() if name in weights
    }
    assert sum(w.bos_output is not None for w in weights.values()) == 140
    assert {w.activation for w in weights.values()} == {"static"}
    protected = set(read_names(DATA / "act_protect.json")) if floating_layers else set()
    assert layers_of(unet).keys() - weights.keys() == protected
    if not floating_layers:
        assert sum(w.dim() == 2 for w in weights.values()) == 743 and sum(w.dim() == 4 for w in weights.values()) == 51


def test_forward_at_512_pixels(unet, checkpoint):
    quantize_(unet, MixDQConfig(checkpoint, bos=DATA / "bos_pre_computed.safetensors"))
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        output = unet(
            torch.randn(1, 4, 64, 64, generator=g).bfloat16(),
            torch.tensor(999),
            torch.randn(1, 77, 2048, generator=g).bfloat16(),
            added_cond_kwargs={
                "text_embeds": torch.randn(1, 1280, generator=g).bfloat16(),
                "time_ids": torch.tensor([[512.0, 512, 0, 0, 512, 512]]).bfloat16(),
            },
        ).sample
    assert output.shape == (1, 4, 64, 64) and output.dtype == torch.bfloat16
    assert output.isfinite().all() and output.std() > 0
