"""The training script of the small model draws, tokenizes and steps exactly as the finished pipeline does."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from mixdq_ao import scenes
from mixdq_ao.tiny_model import load_tiny_sdxl

pytest.importorskip("diffusers")
pytest.importorskip("matplotlib")
SCRIPT = Path(__file__).resolve().parent.parent / "tutorials" / "train_tiny_sdxl.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("train_tiny_sdxl", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def records_of(script, some):
    shifts = [[round((v + scenes.MAX_SHIFT) / scenes.SHIFT_STEP) for v in scene.shift] for scene in some]
    return torch.tensor([script.scene_record(scene) for scene in some]), torch.tensor(shifts)


def test_the_painter_draws_what_render_draws(script):
    some = [scenes.sample_scene(seed) for seed in range(24)]
    painted = (script.Painter("cpu")(*records_of(script, some)) + 1) * 127.5
    drawn = np.stack([scenes.render(scene) for scene in some])
    assert torch.equal(painted.round().byte().permute(0, 2, 3, 1), torch.from_numpy(drawn))


def test_the_noise_chooses_every_shift_about_equally(script):
    shift = script.shift_of_noise(torch.randn(4000, 4, 16, 16, generator=torch.Generator().manual_seed(0)))
    counts = torch.bincount(shift.flatten(), minlength=script.SHIFTS)
    assert counts.shape == (script.SHIFTS,)
    assert counts.min() > 0.8 * counts.float().mean()


def test_no_held_out_caption_is_trained_on(script):
    tokenizer = script.build_tokenizers()[0]
    words = [*script.caption_words(), ",", script.BOS, script.EOS]
    ids = {w: tokenizer.convert_tokens_to_ids(w if w.startswith("<") else w + "</w>") for w in words}
    records, tokens = script._pool_part((0, 400, ids))
    kept = [scenes.sample_scene(seed) for seed in range(400)]
    kept = [scene for scene in kept if not scenes.is_held_out(scene.caption)]
    assert 300 < len(kept) == len(records) < 400
    for row, record, scene in zip(tokens, records, kept, strict=True):
        assert row[row >= 0].tolist() == tokenizer(scene.caption).input_ids
        assert record.tolist() == script.scene_record(scene)


def test_the_asset_has_the_scripts_shape(script):
    pipe = load_tiny_sdxl()
    tokenizers = script.build_tokenizers()
    assert pipe.tokenizer.get_vocab() == tokenizers[0].get_vocab()
    assert (pipe.tokenizer.pad_token, pipe.tokenizer_2.pad_token) == (script.EOS, "!")
    fresh = script.Denoiser(tokenizers[0])
    for mine, shipped in ((fresh.unet, pipe.unet), (fresh.text_encoder_2, pipe.text_encoder_2)):
        shapes = {name: value.shape for name, value in mine.state_dict().items()}
        assert shapes == {name: value.shape for name, value in shipped.state_dict().items()}


def test_few_step_training_walks_as_the_scheduler_does(script, monkeypatch):
    tokenizer = script.build_tokenizers()[0]
    some = [scenes.sample_scene(seed) for seed in range(8)]
    tokens = torch.full((8, script.POOL_TOKENS), -1)
    tokens[:, 0], tokens[:, 1] = tokenizer.bos_token_id, tokenizer.eos_token_id
    pool = script.ScenePool(records_of(script, some)[0], tokens)
    task = script.FewStepTask(script.Denoiser(tokenizer), script.build_vae(), pool, "cpu", 4)
    row = script.STEP_COUNTS.index(4)
    task.schedule.fill_(row)
    scheduler = script.build_scheduler()
    scheduler.set_timesteps(4)
    x = task.x.clone()
    monkeypatch.setattr(torch, "randn_like", torch.zeros_like)
    monkeypatch.setattr("diffusers.schedulers.scheduling_euler_ancestral_discrete.randn_tensor", zeros_of_shape)
    for k in range(3):
        v = torch.randn(x.shape, generator=torch.Generator().manual_seed(k))
        now, after = task.sigmas[row, k], task.sigmas[row, k + 1]
        assert task.timesteps[row, k] == scheduler.timesteps[k]
        scheduler.scale_model_input(x, scheduler.timesteps[k])
        x, guess = scheduler.step(v, scheduler.timesteps[k], x, return_dict=False)
        spread = [sigma.expand(4)[:, None, None, None] for sigma in (now, after)]
        task._advance(guess, *spread)
        torch.testing.assert_close(task.x, x, rtol=1e-4, atol=1e-4)
        assert task.step.tolist() == [k + 1] * 4
    task._advance(guess, spread[1], torch.zeros_like(spread[1]))
    assert task.step.tolist() == [0] * 4  # the way has ended and a new sample begun


def zeros_of_shape(shape, **kwargs):
    return torch.zeros(shape)
