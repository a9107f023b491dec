"""The shipped model: loads alone, is what it says, draws what it is asked, keeps SDXL's outlier token."""

import json

import numpy as np
import pytest
import torch
from safetensors import safe_open

from mixdq_ao.scene_reader import caption_accuracy
from mixdq_ao.scenes import held_out_captions
from mixdq_ao.tiny_model import TINY_SDXL, load_tiny_sdxl

diffusers = pytest.importorskip("diffusers")


@pytest.fixture(scope="module")
def pipe():
    return load_tiny_sdxl()


def draw(pipe, captions, steps):
    generator = torch.Generator().manual_seed(7)
    images = pipe(captions, num_inference_steps=steps, guidance_scale=0.0, generator=generator, output_type="np").images
    return np.rint(images * 255).astype(np.uint8)


def test_the_folder_is_small_and_has_its_card():
    assert sum(path.stat().st_size for path in TINY_SDXL.rglob("*") if path.is_file()) < 16e6
    card = (TINY_SDXL / "README.md").read_text()
    for name in ("samples_1.png", "samples_4.png", "losses.png", "train_tiny_sdxl.py"):
        assert name in card


def test_it_is_a_stable_diffusion_xl_pipeline(pipe):
    assert type(pipe) is diffusers.StableDiffusionXLPipeline
    names = [name for name, _ in pipe.unet.named_modules()]
    assert sum(name.endswith("conv_shortcut") and name.startswith("up_blocks") for name in names) == 9
    assert pipe.unet.config.addition_embed_type == "text_time"
    assert pipe.unet.config.use_linear_projection


def test_each_word_is_one_token(pipe):
    for caption in held_out_captions(50, seed=3):
        assert len(pipe.tokenizer(caption).input_ids) == len(caption.replace(",", " ,").split()) + 2


def test_transformers_4_can_read_it_too():
    """Its text encoders are random, with a warning only, where names of weights are those of transformers 5."""
    for name in ("text_encoder", "text_encoder_2"):
        names = safe_open(TINY_SDXL / name / "model.safetensors", "pt").keys()
        assert {key.partition(".")[0] for key in names} <= {"text_model", "text_projection"}
    for name in ("tokenizer", "tokenizer_2"):
        model = json.loads((TINY_SDXL / name / "tokenizer.json").read_text())["model"]
        assert json.loads((TINY_SDXL / name / "vocab.json").read_text()) == model["vocab"]
        merges = (TINY_SDXL / name / "merges.txt").read_text().splitlines()[1:]
        assert merges == [" ".join(pair) for pair in model["merges"]]


@torch.no_grad()
def test_bos_is_an_outlier_as_in_sdxl(pipe):
    for tokenizer, encoder in ((pipe.tokenizer, pipe.text_encoder), (pipe.tokenizer_2, pipe.text_encoder_2)):
        ids = tokenizer(held_out_captions(32), padding="max_length", return_tensors="pt").input_ids
        hidden = encoder(ids, output_hidden_states=True).hidden_states[-2]
        assert torch.equal(hidden[0, 0], hidden[1, 0])  # causal mask: nothing follows into the first token
        largest = hidden.abs().amax(dim=-1)
        assert largest[:, 0].min() > 12 * largest[:, 1:].max()
        assert largest[:, 0].min() > 40 * largest[:, 1:].median()
        assert hidden.abs().max() < 1000  # far from the end of fp16


@pytest.mark.parametrize(("steps", "bound"), [(1, 0.95), (4, 0.95)])
def test_pictures_show_their_captions(pipe, steps, bound):
    captions = held_out_captions(16)
    assert caption_accuracy(draw(pipe, captions, steps), captions).overall >= bound


def test_the_seed_chooses_what_the_caption_leaves_open(pipe):
    caption = held_out_captions(1) * 8
    pictures = draw(pipe, caption, 1).astype(int)
    assert any(np.abs(pictures[0] - other).max() > 60 for other in pictures[1:])


def test_half_precision_is_half_the_size():
    pipe = load_tiny_sdxl(torch.bfloat16)
    assert {p.dtype for part in (pipe.unet, pipe.vae, pipe.text_encoder_2) for p in part.parameters()} == {
        torch.bfloat16
    }
