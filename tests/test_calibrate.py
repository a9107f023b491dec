"""Calibration: what ranges and scales come out, and that it can be stopped at any point."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import run_unet, unet_inputs
from pipelines import FakePipeline, micro_unet, prompts
from torch import nn

from mixdq_ao import MixDQConfig, MixDQError, MixDQTensor, calibrate, families, observe, quantize_
from mixdq_ao.calibrate import WEIGHT_METHODS, weight_scale
from mixdq_ao.errors import CheckpointError
from mixdq_ao.ranges import BINS, METHODS, InputRange, scale_and_zero_point

TEXT_LAYER = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"


def equal_params(a, b) -> bool:
    assert a.layers.keys() == b.layers.keys() and a.bos_aware == b.bos_aware
    tensors = [{f"{n}.{key}": t for n, p in x.layers.items() for key, _, t in p.tensors()} for x in (a, b)]
    return tensors[0].keys() == tensors[1].keys() and all(torch.equal(t, tensors[1][k]) for k, t in tensors[0].items())


def watch(values: list[torch.Tensor], histogram: bool = True) -> InputRange:
    seen = InputRange(histogram)
    for v in values:
        seen.note(v)
    return seen


@given(st.lists(st.lists(st.floats(-1e6, 1e6, width=32, allow_subnormal=False), min_size=1), min_size=1, max_size=4))
def test_histogram_counts_everything_in_any_order(calls):
    values = [torch.tensor(c) for c in calls]
    forward, backward = watch(values), watch(values[::-1])
    assert int(forward.counts.sum()) == sum(map(len, calls))
    assert torch.equal(forward.counts, backward.counts) and forward.limit == backward.limit
    assert forward.ends("minmax", 8) == (min(map(min, calls)), max(map(max, calls)))


def test_histogram_grows_exactly():
    small = torch.linspace(-0.99, 0.99, 1000)
    grown = watch([small, torch.tensor([-7.0, 7.5])])
    assert grown.limit == 8
    direct = watch([torch.cat([small, torch.tensor([-7.0, 7.5])])])
    assert torch.equal(grown.counts, direct.counts)
    assert int(grown.counts[BINS // 2 :].sum()) == 501 and int(grown.counts[: BINS // 8].sum()) == 1


def test_histogram_of_doubles_just_below_a_power_of_two():
    """In float32 they would be that power, which lies outside."""
    values = torch.tensor([2 - 1e-12, -2 + 1e-12, 0.5], dtype=torch.float64)
    seen = watch([values])
    assert seen.limit == 2 and int(seen.counts.sum()) == 3 and int(seen.counts[-1]) == int(seen.counts[0]) == 1


def test_ema_is_one_state_with_the_original_momentum():
    seen = watch([torch.tensor([-1.0, 2.0]), torch.tensor([-3.0, 6.0])], histogram=False)
    assert seen.ends("ema", 8) == pytest.approx((-1.0 - 0.05 * 2, 2.0 + 0.05 * 4))
    assert seen.ends("ema", 8) == seen.ends("ema", 4)


def test_percentile_and_mse_cut_an_outlier_off():
    torch.manual_seed(0)
    values = torch.cat([torch.randn(200_000), torch.tensor([60.0])])
    seen = watch([values])
    for method in ("percentile", "mse"):
        low, high = seen.ends(method, 4)
        assert -6 < low < -2 and 2 < high < 8, method
    assert seen.ends("minmax", 4)[1] == 60


@pytest.mark.parametrize("bits", [8, 4])
def test_mse_is_the_best_of_the_methods_in_squared_error(bits):
    torch.manual_seed(0)
    values = torch.nn.functional.gelu(3 * torch.randn(100_000))
    seen = watch([values])
    errors = {}
    for method in METHODS:
        scale, zero_point = scale_and_zero_point([seen.ends(method, bits)], bits)
        codes = (values / scale + zero_point).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        errors[method] = float(((codes - zero_point) * scale - values).square().mean())
    assert errors["mse"] <= 1.01 * min(errors.values())


def test_scale_and_zero_point_formula():
    scale, zero_point = scale_and_zero_point([(-1.0, 4.1), (0.5, 2.0), (0.0, 0.0)], 8)
    assert scale.tolist() == pytest.approx([5.1 / 255, 2.0 / 255, 1.0])
    assert zero_point.tolist() == [50 - 128, -128, -128]


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_mse_weight_scales_have_less_error(bits):
    torch.manual_seed(0)
    weight = torch.randn(16, 48, 3, 3)
    weight[3] = 0
    errors = {}
    for method in WEIGHT_METHODS:
        scale = weight_scale(weight, bits, [32, 16], method)
        assert scale.shape == (2, 16) and bool((scale > 0).all())
        q = MixDQTensor.from_float(weight, bits, scale=scale, input_groups=[32, 16])
        errors[method] = (q.dequantize() - weight).square().flatten(1).sum(1)
    assert bool((errors["mse"] <= errors["minmax"] * (1 + 1e-5)).all())
    if bits < 8:
        assert float(errors["mse"].sum()) < 0.9 * float(errors["minmax"].sum())


@pytest.mark.parametrize("method", METHODS)
def test_calibrated_unet_is_close(method):
    pipe = FakePipeline()
    params = calibrate(pipe, prompts(4), method=method, batch_size=2, progress=False)
    assert not any(type(m.weight.data) is not torch.Tensor for m in families.layers_of(pipe.unet).values())
    inputs = unet_inputs(size=8)
    reference = run_unet(pipe.unet, **inputs)
    quantize_(pipe.unet, MixDQConfig(params, bos=False), progress=False)
    assert torch.isfinite(run_unet(pipe.unet, **inputs)).all()
    error = (run_unet(pipe.unet, **inputs) - reference).square().mean() / reference.square().mean()
    assert error < 0.1
    split = params.layers["up_blocks.0.resnets.0.conv_shortcut"]
    assert split.groups == 2 and split.act_scale[8].shape == (2,)
    assert set(split.weight_scale) == {2, 4, 8} and set(split.act_scale) == {4, 8}


def test_bos_is_left_out_of_the_range_and_kept():
    pipe = FakePipeline()
    aware, naive = (calibrate(pipe, prompts(4), bos=bos, progress=False) for bos in (True, False))
    a, n = aware.layers[TEXT_LAYER], naive.layers[TEXT_LAYER]
    assert aware.bos_aware and not naive.bos_aware
    assert float(n.act_scale[8]) > 10 * float(a.act_scale[8])
    assert a.bos_input[0] == -40 and a.bos_output.shape == (32,) and n.bos_output is None
    layer = pipe.unet.get_submodule(TEXT_LAYER)
    torch.testing.assert_close(a.bos_output, nn.functional.linear(a.bos_input, layer.weight, layer.bias))


def test_zero_prompt_rows_are_no_bos_token():
    unet, inputs = micro_unet(), unet_inputs(batch=3)
    text = inputs["encoder_hidden_states"]
    text[:, 0] = 50.0
    text[1] = 0.0
    with observe(unet) as recorder:
        run_unet(unet, **inputs)
        inside = recorder.params()
    assert inside.bos_aware and float(inside.layers[TEXT_LAYER].bos_input[0]) == 50.0


def test_batches_do_not_matter_to_minmax():
    pipe = FakePipeline()
    one, two = (calibrate(pipe, prompts(4), batch_size=b, progress=False) for b in (4, 2))
    a, b = one.layers[TEXT_LAYER], two.layers[TEXT_LAYER]
    torch.testing.assert_close(a.act_scale[8], b.act_scale[8])


def test_non_finite_input_names_the_layer():
    unet, inputs = micro_unet(), unet_inputs()
    inputs["encoder_hidden_states"][0, 3, 2] = float("nan")
    with pytest.raises(MixDQError, match=r"^down_blocks.1.*attn2.to_k: the input must be finite"), observe(unet):
        run_unet(unet, **inputs)
    assert not any(hasattr(m.weight, "note") for m in families.layers_of(unet).values())


def test_wrong_arguments():
    pipe = FakePipeline()
    for bad in ("one prompt", [], [3]):
        with pytest.raises(MixDQError, match="list of prompts"):
            calibrate(pipe, bad)
    with pytest.raises(MixDQError, match="method must be one of minmax"):
        calibrate(pipe, prompts(1), method="max")
    with pytest.raises(MixDQError, match="never run"), observe(pipe.unet) as recorder:
        recorder.params()
    quantize_(pipe.unet, MixDQConfig(), progress=False)
    with pytest.raises(MixDQError, match="quantized already"):
        calibrate(pipe, prompts(1))


class Stop(Exception):
    pass


@pytest.mark.parametrize("method", ["ema", "mse"])
def test_goes_on_after_an_error(tmp_path, method):
    whole = calibrate(FakePipeline(), prompts(6), method=method, batch_size=2, progress=False)
    pipe, state = FakePipeline(), tmp_path / "state"
    draw, calls = pipe.__class__.__call__, []

    class Failing(FakePipeline):
        def __call__(self, **kwargs):
            calls.append(kwargs["prompt"])
            if len(calls) == 3:
                raise Stop
            return draw(self, **kwargs)

    pipe.__class__ = Failing
    with pytest.raises(Stop):
        calibrate(pipe, prompts(6), method=method, batch_size=2, state=state, progress=False)
    resumed = calibrate(pipe, prompts(6), method=method, batch_size=2, state=state, progress=False)
    assert calls == [prompts(6)[i : i + 2] for i in (0, 2, 4, 4)]
    assert equal_params(whole, resumed)
    with pytest.raises(MixDQError, match="other seed, prompts"):
        calibrate(pipe, prompts(5), method=method, batch_size=2, seed=1, state=state, progress=False)


def test_a_state_of_other_weights_is_refused(tmp_path):
    state, options = tmp_path / "state", {"batch_size": 1, "progress": False}
    calibrate(FakePipeline(), prompts(1), state=state, **options)
    with pytest.raises(MixDQError, match="a calibration with other unet. Give the same"):
        calibrate(FakePipeline(seed=1), prompts(1), state=state, **options)
    whole = state.read_bytes()
    for broken in (whole[:-1], whole[:100], b"", b"x" * 100):
        state.write_bytes(broken)
        with pytest.raises(CheckpointError, match=str(state)):
            calibrate(FakePipeline(), prompts(1), state=state, **options)


def test_goes_on_after_being_killed(tmp_path):
    state, out = tmp_path / "state", tmp_path / "params.safetensors"
    code = (
        "import time\n"
        "from mixdq_ao import calibrate\n"
        "from pipelines import FakePipeline, prompts\n"
        "class Slow(FakePipeline):\n"
        "    def __call__(self, **kwargs):\n"
        "        time.sleep(0.05)\n"
        "        return super().__call__(**kwargs)\n"
        "arguments = {'method': 'percentile', 'batch_size': 1, 'progress': False}\n"
        f"params = calibrate(Slow(), prompts(8), state={str(state)!r}, **arguments)\n"
        f"params.save({str(out)!r})\n"
    )
    root = Path(__file__).resolve().parent.parent
    environment = os.environ | {"PYTHONPATH": str(root / "tests"), "OMP_NUM_THREADS": "1"}
    start = [sys.executable, "-c", code]
    process = subprocess.Popen(start, cwd=root, env=environment, stderr=subprocess.DEVNULL)
    while not state.exists() and process.poll() is None:
        time.sleep(0.01)
    time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert state.exists() and not out.exists()
    torch.set_num_threads(1)
    pipe = FakePipeline()
    resumed = calibrate(pipe, prompts(8), method="percentile", batch_size=1, state=state, progress=False)
    assert equal_params(resumed, calibrate(pipe, prompts(8), method="percentile", batch_size=1, progress=False))
