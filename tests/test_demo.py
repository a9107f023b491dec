"""The demo on the small model, and the quality that it shows."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from pipelines import FakeTransformerPipeline

from mixdq_ao import demo
from mixdq_ao.errors import MixDQError
from mixdq_ao.pipelines import TINY, load_pipeline
from mixdq_ao.prompts import BUILT_IN, HELD_OUT, built_in_prompts
from mixdq_ao.summary import format_table
from mixdq_ao.tiny_model import TINY_SDXL


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    """16 fixed held-out captions, 4 steps, as `mixdq-ao demo --pictures 16` draws them."""
    return demo.run_demo(tmp_path_factory.mktemp("demo"), pictures=16, steps=4, progress=False)


@pytest.fixture(scope="module")
def rows(result):
    print(format_table(demo.HEADER, [demo.cells(row) for row in result.rows]))
    return {row.name: row for row in result.rows}


def test_w8a8_draws_the_same_pictures(rows):
    assert rows["W8A8"].ssim > 0.99
    assert rows["W8A8"].psnr > 40
    assert rows["W8A8"].sqnr > 28


def test_captions_are_still_right(rows):
    assert rows["W16A16"].accuracy > 0.95
    assert rows["W8A8"].accuracy > rows["W16A16"].accuracy - 0.01
    assert rows["W4/8A8"].accuracy > rows["W16A16"].accuracy - 0.02
    assert rows["W4A8"].accuracy > rows["W16A16"].accuracy - 0.10


def test_quality_falls_with_the_width(rows):
    assert rows["W16A16"].sqnr > rows["W8A8"].sqnr > rows["W4/8A8"].sqnr > rows["W4A8"].sqnr


def test_memory_falls_with_the_width(rows):
    assert [row.mean_weight_bits for row in rows.values()] == sorted(r.mean_weight_bits for r in rows.values())[::-1]
    assert rows["W8A8"].static_mib < 0.6 * rows["W16A16"].static_mib
    assert rows["W4A8"].static_mib < 0.35 * rows["W16A16"].static_mib
    assert all(r.peak_mib == pytest.approx(r.static_mib + r.activation_mib) for r in rows.values())


def test_writes_picture_and_numbers(result):
    sheet = np.asarray(Image.open(result.picture))
    assert sheet.shape[1] > 16 * 192 and sheet.std() > 20
    content = json.loads(result.json.read_text())
    assert [row["name"] for row in content["rows"]] == ["W16A16", "W8A8", "W4/8A8", "W4A8"]
    assert content["captions"] == result.captions and len(set(result.captions)) == 16


def test_a_pipeline_folder_and_prompts_of_ones_own(tmp_path):
    prompts = ["a small red circle in the centre on a white background"]
    result = demo.run_demo(tmp_path, model=str(TINY_SDXL), prompts=prompts, steps=1, progress=False)
    assert result.captions == prompts
    assert all(row.accuracy is None for row in result.rows)


def test_pictures_are_drawn_in_batches_that_do_not_matter():
    pipe = load_pipeline(TINY, "cpu", torch.float32)
    sizes = []
    pipe.unet.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    captions = built_in_prompts(11, scenes=True, held_out=True)
    drawn = demo._generate(pipe, captions, 2, seed=3)
    assert sizes == [8, 8, 3, 3] and len(drawn.unet_seconds) == 4
    assert len(drawn.images) == 11 and len(drawn.output) == 11 and len(drawn.call[0][0]) == 8
    fewer = demo._generate(pipe, captions[:9], 2, seed=3)
    assert torch.allclose(drawn.output[:9], fewer.output, atol=1e-4)
    for a, b in zip(drawn.images, fewer.images, strict=False):
        assert np.abs(np.asarray(a, dtype=int) - np.asarray(b)).max() <= 1


def test_a_pipeline_around_a_transformer(tmp_path, monkeypatch):
    timesteps = []

    class Pictures(FakeTransformerPipeline):
        def __call__(self, output_type="pil", **kwargs):
            arrays = super().__call__(output_type="np", **kwargs).images
            return SimpleNamespace(images=[Image.fromarray(np.uint8(255 * a)) for a in arrays])

        def _predict(self, x, t, texts, pooled):
            hook = self.transformer.register_forward_hook(lambda module, args, output: timesteps.append(args[2]))
            with hook:
                return super()._predict(x, t, texts, pooled)

    monkeypatch.setattr(demo, "load_pipeline", lambda *args: Pictures())
    result = demo.run_demo(tmp_path, model="sana", pictures=2, steps=1, progress=False)
    assert [row.name for row in result.rows] == ["W16A16", "W8A8", "W4A8"]  # no content layers for a mixed plan
    assert result.rows[1].mean_weight_bits < 17 and result.rows[1].sqnr > 25
    assert all(t.dtype == torch.float32 for t in timesteps)


def test_many_captions_are_not_all_on_the_sheet(tmp_path):
    captions = built_in_prompts(demo.SHOWN + 1, scenes=True, held_out=True)
    result = demo.run_demo(tmp_path, prompts=captions, steps=1, progress=False)
    assert len(result.captions) == demo.SHOWN + 1
    assert Image.open(result.picture).width < 120 + demo.SHOWN * 200


@pytest.mark.parametrize("readable, own", [(True, None), (True, "scenes"), (False, None), (False, "everyday")])
def test_what_is_drawn_is_not_what_calibrates(readable, own):
    prompts = {None: None, "scenes": built_in_prompts(4, scenes=True), "everyday": [BUILT_IN[0], "a pear"]}[own]
    drawn, calibration = demo._captions(prompts, 8, readable, seed=0)
    assert drawn == (prompts or built_in_prompts(8, scenes=readable, held_out=True))
    assert len(calibration) == demo.CALIBRATION_PROMPTS and not set(drawn) & set(calibration)
    assert readable or own or drawn == list(HELD_OUT[:8])


def test_a_folder_that_is_no_pipeline_is_a_clear_error(tmp_path):
    with pytest.raises(MixDQError, match="no diffusers pipeline"):
        demo.run_demo(tmp_path / "out", model=str(tmp_path), progress=False)
    assert not (tmp_path / "out").exists()


def test_prompts_that_the_small_model_does_not_know_are_refused_before_drawing(tmp_path):
    with pytest.raises(MixDQError, match="a red fox"):
        demo.run_demo(tmp_path, prompts=["a red fox in fresh snow"], progress=False)
    assert not list(tmp_path.iterdir())
