"""Choosing among plans: the rule on invented figures, and on a model."""

import pytest
from pipelines import FakePipeline, prompts

from mixdq_ao import calibrate, families
from mixdq_ao.choose import choose, pick
from mixdq_ao.errors import MixDQError
from mixdq_ao.evaluate import Row
from mixdq_ao.plan import BitPlan


def row(name: str, bits: float, *ssim: float) -> Row:
    return Row(name, bits, 1.0, {"ssim": list(ssim), "lpips": [1 - s for s in ssim]})


@pytest.mark.parametrize("metric", ["ssim", "lpips"])
def test_the_best_mean_wins(metric):
    rows = [row("a", 4.0, 0.90, 0.91), row("b", 4.0, 0.95, 0.96), row("c", 3.9, 0.93, 0.94)]
    assert pick(rows, metric)[0] == "b"


def test_fewer_bits_win_a_tie():
    # Paired by seed a and b differ by 0.01 and -0.008: noise. c differs by 0.02 every time.
    rows = [row("a", 4.1, 0.95, 0.94), row("b", 4.0, 0.94, 0.948), row("c", 3.0, 0.93, 0.92)]
    name, tied, reason = pick(rows, "ssim")
    assert name == "b" and tied == ["a", "b"]
    assert "fewer bits than a" in reason


def test_with_one_seed_only_equal_ones_tie():
    rows = [row("a", 4.1, 0.95), row("b", 4.0, 0.95), row("c", 3.0, 0.949)]
    assert pick(rows, "ssim")[:2] == ("b", ["a", "b"])
    assert pick([row("a", 4, float("inf")), row("b", 3, 0.1)], "ssim")[0] == "a"


def test_more_bits_are_chosen_when_pictures_say_so(tmp_path):
    pipe = FakePipeline()
    params = calibrate(pipe, prompts(4), progress=False)
    names = families.layers_of(pipe.unet)
    candidates = {f"all {bits}": BitPlan.uniform(names, bits) for bits in (2, 8, 4)}
    choice = choose(pipe, params, candidates, prompts(4), seeds=(0, 1), out=tmp_path, progress=False)
    assert choice.name == "all 8" and choice.plan is candidates["all 8"]
    assert [r.name for r in choice.evaluation.rows] == ["floating", *candidates]
    assert "all 8" in choice.reason


def test_errors():
    with pytest.raises(MixDQError, match="at least one candidate"):
        choose(None, None, {}, ["a"])
    pipe = FakePipeline()
    params = calibrate(pipe, prompts(2), progress=False)
    plan = BitPlan.uniform(families.layers_of(pipe.unet), 8)
    with pytest.raises(MixDQError, match="metric must be one of .*ssim.*found 'beauty'"):
        choose(pipe, params, {"a": plan}, prompts(2), metric="beauty", progress=False)
