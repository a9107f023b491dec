"""Evaluation: the metrics, and runs over variants and seeds that can be stopped."""

import copy
import json
import math

import numpy as np
import pytest
import torch
from pipelines import FakePipeline, prompts

from mixdq_ao import MixDQConfig, MixDQError, calibrate, families, quantize_, save
from mixdq_ao.choose import pick
from mixdq_ao.evaluate import FLOATING, LPIPS_BANDS, evaluate, lpips_band, psnr, sqnr, ssim
from mixdq_ao.extras import EXTRAS
from mixdq_ao.fingerprints import fingerprint
from mixdq_ao.scenes import held_out_captions


@pytest.fixture(scope="module")
def params():
    return calibrate(FakePipeline(), prompts(4), progress=False)


def variants(params):
    return {"W8A8": MixDQConfig(params, 8, 8), "W2A8": MixDQConfig(params, 2, 8)}


def test_metrics_of_known_pictures():
    black, grey = np.zeros((1, 16, 16, 3), np.uint8), np.full((1, 16, 16, 3), 51, np.uint8)
    assert psnr(black, grey) == pytest.approx(-20 * math.log10(0.2), abs=1e-4)
    assert psnr(grey, grey) == math.inf and ssim(grey, grey) == pytest.approx(1)
    assert sqnr(torch.ones(10), torch.full((10,), 1.1)) == pytest.approx(20, abs=1e-4)
    for wrong in (math.nan, math.inf):
        assert sqnr(torch.ones(2), torch.tensor([1.0, wrong])) == -math.inf
    with pytest.raises(MixDQError, match="equal shapes"):
        sqnr(torch.ones(1), torch.ones(2))


def test_bands():
    assert [lpips_band(edge) for edge, _ in LPIPS_BANDS] == [name for _, name in LPIPS_BANDS]
    assert lpips_band(0.7) == "broken"


def test_rows_order_themselves_by_width(params):
    pipe = FakePipeline()
    before = fingerprint(pipe.unet)
    result = evaluate(pipe, variants(params), prompts(5), seeds=(0, 1), batch_size=4, pictures=2, progress=False)
    assert fingerprint(pipe.unet) == before
    assert [row.name for row in result.rows] == [FLOATING, "W8A8", "W2A8"]
    floating, eight, two = result.rows
    for metric in ("sqnr", "psnr", "ssim"):
        assert floating.mean(metric) > eight.mean(metric) > two.mean(metric), metric
        assert len(eight.values[metric]) == 2 and eight.spread(metric) > 0
    assert floating.mean("sqnr") == math.inf and floating.spread("sqnr") is None
    assert eight.weight_bits == 8 and floating.weight_bits == 32 and two.mib < eight.mib < floating.mib
    assert "accuracy" not in result.metrics
    assert result.pictures["W8A8"].shape == (2, 32, 32, 3)
    assert len(result.header()) == len(result.table()[0])
    content = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert content["rows"][0]["sqnr"]["mean"] is None and content["rows"][1]["name"] == "W8A8"


def test_an_output_that_is_not_finite_is_the_worst_and_not_the_best(params, tmp_path):
    def spoil(unet):
        unet.conv_out.bias.data.fill_(math.nan)

    pipe = FakePipeline()
    recipes = {"spoiled": spoil, "same": None, **variants(params)}
    for _ in range(2):  # measured, and read again
        result = evaluate(pipe, recipes, prompts(2), out=tmp_path, progress=False)
        assert result.row("spoiled").values["sqnr"] == [-math.inf]
        cells = {row[0]: row[result.header().index("SQNR dB")] for row in result.table()}
        assert (cells["spoiled"], cells["same"], cells[FLOATING]) == ("not finite", "equal", "-")
        stored = {row["name"]: row["sqnr"] for row in json.loads(json.dumps(result.to_json(), allow_nan=False))["rows"]}
        assert stored["spoiled"]["mean"] == "-inf" and stored["same"]["mean"] is None
    assert pick([result.row(name) for name in recipes if name != "same"], "sqnr")[0] == "W8A8"
    with pytest.raises(MixDQError, match="the floating UNet's output is not finite"):
        spoil(pipe.unet)
        evaluate(pipe, {}, prompts(2), progress=False)


def test_a_file_in_another_dtype_computes_as_the_pipeline_does(params, tmp_path):
    pipe = FakePipeline()
    unet = copy.deepcopy(pipe.unet).half()
    quantize_(unet, MixDQConfig(params, 8, 8), progress=False)
    save(unet, tmp_path / "half.safetensors")
    result = evaluate(pipe, {"half": tmp_path / "half.safetensors"}, prompts(2), progress=False)
    assert result.row("half").mean("sqnr") > 15


def test_seeds_and_batches(params):
    pipe = FakePipeline()
    one, other, split = (
        evaluate(pipe, variants(params), prompts(3), seeds=[seed], batch_size=batch, progress=False)
        for seed, batch in ((0, 3), (1, 3), (0, 2))
    )
    assert not torch.equal(one.pictures[FLOATING], other.pictures[FLOATING])
    assert (one.pictures[FLOATING].int() - split.pictures[FLOATING].int()).abs().max() <= 1


def test_scene_captions_are_read_back(params):
    result = evaluate(FakePipeline(size=16), {}, held_out_captions(2, 0), progress=False)
    assert 0 <= result.rows[0].mean("accuracy") <= 1


def test_kinds_of_recipes(params, tmp_path):
    pipe = FakePipeline()
    config = MixDQConfig(params, 8, 8)
    quantized = FakePipeline().unet
    quantize_(quantized, config, progress=False)
    save(quantized, tmp_path / "model.safetensors")
    recipes = {"config": config, "file": tmp_path / "model.safetensors", "same": None}
    recipes["function"] = lambda unet: quantize_(unet, config, progress=False)
    result = evaluate(pipe, recipes, prompts(2), progress=False)
    values = [result.row(name).mean("ssim") for name in ("config", "file", "function")]
    assert values[0] == values[1] == values[2] < 1
    assert result.row("same").mean("psnr") == math.inf


def test_goes_on_where_it_stopped(params, tmp_path):
    class Stopped(FakePipeline):
        left = 3

        def __call__(self, **kwargs):
            self.left -= 1
            if self.left < 0:
                raise KeyboardInterrupt
            return super().__call__(**kwargs)

    arguments = {"captions": prompts(3), "seeds": (0, 1), "batch_size": 3, "progress": False}
    whole = evaluate(FakePipeline(), variants(params), **arguments)
    pipe = Stopped()
    with pytest.raises(KeyboardInterrupt):
        evaluate(pipe, variants(params), **arguments, out=tmp_path)
    pipe.left = 3
    resumed = evaluate(pipe, variants(params), **arguments, out=tmp_path)
    assert pipe.left == 0
    assert resumed.to_json() == whole.to_json()
    assert all(torch.equal(resumed.pictures[name], whole.pictures[name]) for name in whole.pictures)
    again = evaluate(pipe, variants(params), **arguments, out=tmp_path)
    assert again.to_json() == whole.to_json()
    pipe.left = 2  # one variant has other weights now, at two seeds
    changed = variants(params) | {"W2A8": MixDQConfig(params, 4, 8)}
    assert evaluate(pipe, changed, **arguments, out=tmp_path).row("W2A8").weight_bits == 4
    assert pipe.left == 0


def test_dynamic_activations_of_another_width_are_measured_again(tmp_path):
    """The weights hold the same tensors."""
    pipe, options = FakePipeline(), {"captions": prompts(2), "progress": False}
    for act_bits in (8, 4, None):
        kept, fresh = (
            evaluate(pipe, {"dynamic": MixDQConfig(None, 8, act_bits)}, **options, out=out) for out in (tmp_path, None)
        )
        assert kept.to_json() == fresh.to_json()


def test_another_size_of_batches_is_measured_again(tmp_path):
    pipe, variants = FakePipeline(), {"dynamic": MixDQConfig(None, 8, 4)}
    options = {"captions": prompts(3), "out": tmp_path, "progress": False}
    three, one = (evaluate(pipe, variants, **options, batch_size=n).row("dynamic") for n in (3, 1))
    assert three.values != one.values


def test_pictures_of_a_call_that_was_stopped_are_not_taken_for_those_before(params, tmp_path, monkeypatch):
    pipe, options = FakePipeline(), {"captions": prompts(2), "out": tmp_path, "progress": False}
    before = evaluate(pipe, {"x": MixDQConfig(params, 8, 8)}, **options).pictures["x"]

    def stop(path, text):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("mixdq_ao.evaluate.write_text", stop)
        evaluate(pipe, {"x": MixDQConfig(params, 2, 8)}, **options)
    assert torch.equal(evaluate(pipe, {"x": MixDQConfig(params, 8, 8)}, **options).pictures["x"], before)


def test_wrong_arguments(params):
    pipe = FakePipeline()
    with pytest.raises(MixDQError, match="different seeds"):
        evaluate(pipe, {}, prompts(1), seeds=(1, 1))
    with pytest.raises(MixDQError, match="different names; 'w8-a8' and 'W8 A8' are both 'w8-a8' as files; rename one"):
        evaluate(pipe, {"W8 A8": None, "w8-a8": None}, prompts(1))
    with pytest.raises(MixDQError, match="'Floating' and 'floating, the model as it is' are both"):
        evaluate(pipe, {"Floating": None}, prompts(1))


@pytest.mark.parametrize("name", EXTRAS)
def test_missing_extras_say_what_is_missing(name, monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("mixdq_ao.extras._clip_folder", lambda: None)
    with pytest.raises(MixDQError, match=rf"{name} needs (the packages|its network)"):
        evaluate(FakePipeline(), {}, prompts(1), extras=[name])
    monkeypatch.setattr("importlib.util.find_spec", lambda package: object())
    with pytest.raises(MixDQError, match=rf"{name} needs its network on this machine, and nothing is downloaded"):
        evaluate(FakePipeline(), {}, prompts(1), extras=[name])


def test_unknown_extra():
    with pytest.raises(MixDQError, match="extra metrics are lpips"):
        evaluate(FakePipeline(), {}, prompts(1), extras=["niqe"])
    assert families.family_of(FakePipeline().unet).name == "sdxl"
