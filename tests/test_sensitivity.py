"""Sensitivity: the full measurement, the prediction, and stopping and sharing either."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from pipelines import FakePipeline, prompts
from typer.testing import CliRunner

from mixdq_ao import calibrate, cli, families, tables
from mixdq_ao import sensitivity as module
from mixdq_ao.allocate import problem, sweep
from mixdq_ao.bits import KINDS
from mixdq_ao.checkpoint import QuantParams
from mixdq_ao.errors import CheckpointError, MixDQError
from mixdq_ao.evaluate import sqnr
from mixdq_ao.measuring import MAX_DB
from mixdq_ao.sensitivity import Sensitivity, rank_correlation, sensitivity
from mixdq_ao.simulate import simulated
from mixdq_ao.tensor import MixDQTensor

# A convolution, a split shortcut, a linear layer, a layer that sees text, one that sees the timestep.
LAYERS = [
    "conv_in",
    "up_blocks.0.resnets.0.conv_shortcut",
    "mid_block.attentions.0.transformer_blocks.0.ff.net.2",
    "mid_block.attentions.0.transformer_blocks.0.attn2.to_k",
    "time_embedding.linear_1",
]


@pytest.fixture(scope="module")
def calibrated():
    pipe = FakePipeline()
    return pipe, calibrate(pipe, prompts(4), progress=False)


def run(calibrated, out, count: int = 3, **kwargs) -> Sensitivity:
    pipe, params = calibrated
    return sensitivity(pipe, params, prompts(count), out, **{"layers": LAYERS, "progress": False, **kwargs})


def lines(folder: Path) -> list[dict]:
    """What is noted as done."""
    rows = [json.loads(line) for path in folder.glob("rows-*.jsonl") for line in path.read_text().splitlines()]
    return [row for row in rows if "settings" not in row]


# --- the full measurement ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 2])
def test_scores_are_what_one_quantized_layer_does(calibrated, tmp_path, steps):
    pipe, params = calibrated
    before = {name: p for name, p in pipe.unet.named_parameters()}
    found = run(calibrated, tmp_path, num_inference_steps=steps, batch_size=2)
    assert all(p is before[name] for name, p in pipe.unet.named_parameters())
    assert list(found.scores) == ["weight", "act"]
    content = [n for n in LAYERS if families.SDXL.is_content(n)]
    for kind, metrics in found.scores.items():
        assert list(metrics["sqnr"]) == LAYERS and list(metrics["ssim"]) == content
        for scores in (*metrics["sqnr"].values(), *metrics["ssim"].values()):
            assert tuple(scores) == KINDS[kind]
    # All UNet calls of the floating trajectory, by hand.
    calls = []
    hook = pipe.unet.register_forward_hook(lambda m, a, k, o: calls.append((a, k, o[0])), with_kwargs=True)
    with torch.no_grad():
        generators = [torch.Generator().manual_seed(i) for i in range(3)]
        for part in (slice(0, 2), slice(2, 3)):
            pipe(prompts(3)[part], steps, 0.0, generators[part], "latent")
    hook.remove()
    for kind, bits, mix in (("weight", 4, (4, 16)), ("act", 8, (16, 8))):
        for name in LAYERS:
            with simulated(pipe.unet, params, {name: mix}), torch.no_grad():
                outputs = [pipe.unet(*a, **k)[0] for a, k, _ in calls]
            expected = sqnr(torch.cat([o for *_, o in calls]), torch.cat(outputs))
            assert found.scores[kind]["sqnr"][name][bits] == pytest.approx(expected, abs=0.5)


def test_tables_are_read_back_and_allocated(calibrated, tmp_path):
    found = run(calibrated, tmp_path, kinds=["weight"], metrics="both")
    assert list(found.scores["weight"]["ssim"]) == LAYERS
    again = Sensitivity.read(tmp_path)
    assert again == found
    assert found.noise_floor["sqnr"] > 80 and found.noise_floor["ssim"] > 0.999
    assert found.sizes["weight"]["conv_in"] == calibrated[0].unet.conv_in.weight.numel()
    points = sweep(problem(found.scores["weight"]["ssim"], found.scores["weight"]["sqnr"], found.sizes["weight"]), 5.0)
    assert points and all(p.mean_bits <= 5 + 1e-6 for p in points)
    (tmp_path / "sensitivity.json").write_text("[]")
    with pytest.raises(CheckpointError, match="report of sensitivity"):
        Sensitivity.read(tmp_path)


def test_sizes_of_inputs_are_those_of_one_picture(calibrated, tmp_path):
    sizes = run(calibrated, tmp_path, count=5, cheap=True, kinds=["act"], batch_size=2).sizes["act"]
    assert sizes["conv_in"] == 4 * 8 * 8
    assert sizes["mid_block.attentions.0.transformer_blocks.0.attn2.to_k"] == 7 * 64


def test_dynamic_scales(calibrated, tmp_path):
    pipe, _ = calibrated
    found = sensitivity(pipe, None, prompts(2), tmp_path, layers=LAYERS[:2], progress=False)
    assert all(4 < scores[4] < MAX_DB for scores in found.scores["act"]["sqnr"].values())


# --- the prediction ---------------------------------------------------------------------------------------------------


def test_the_prediction_is_the_measurement_to_first_order(calibrated, tmp_path):
    full = run(calibrated, tmp_path / "full")
    cheap = run(calibrated, tmp_path / "cheap", cheap=True, probes=32)
    for kind in KINDS:
        for name in LAYERS:
            measured, predicted = (found.scores[kind]["sqnr"][name] for found in (full, cheap))
            for bits in KINDS[kind]:
                # 3 * 32 estimates, each with a relative spread of sqrt(2), are good to 0.6 dB; large errors are beyond
                # first order.
                if measured[bits] > 45:
                    assert predicted[bits] == pytest.approx(measured[bits], abs=2.5)
        assert rank_correlation(full.scores[kind]["sqnr"], cheap.scores[kind]["sqnr"]) > 0.85
        assert cheap.scores[kind]["ssim"].keys() == full.scores[kind]["ssim"].keys()


class GuidedPipeline(FakePipeline):
    """Runs its UNet on every prompt twice, as pipelines with guidance do."""

    def __call__(self, prompt, generator, output_type, **options):
        def twice(module, args, kwargs):
            x, t, texts = args
            added = {name: value.repeat(2, 1) for name, value in kwargs["added_cond_kwargs"].items()}
            args = (x.repeat(2, 1, 1, 1), t, torch.cat([texts * 0.5, texts]))
            return args, {**kwargs, "added_cond_kwargs": added}

        hook = self.unet.register_forward_pre_hook(twice, with_kwargs=True)
        joined = self.unet.register_forward_hook(lambda module, args, output: (output[0].unflatten(0, (2, -1)).sum(0),))
        try:
            return super().__call__(prompt, generator=generator, output_type=output_type, **options)
        finally:
            hook.remove()
            joined.remove()


@pytest.mark.parametrize("make", [FakePipeline, GuidedPipeline])
def test_the_prediction_does_not_depend_on_how_many_prompts_are_at_a_time(calibrated, tmp_path, make):
    kwargs = {"layers": LAYERS, "cheap": True, "probes": 2, "progress": False}
    one, several = (
        sensitivity(make(), calibrated[1], prompts(5), tmp_path / str(n), batch_size=n, **kwargs) for n in (2, 6)
    )
    assert [len(list(r for r in lines(tmp_path / n) if r["what"] == "prompts")) for n in "26"] == [5, 2]
    for kind in KINDS:
        for name in LAYERS:
            for bits in KINDS[kind]:
                values = [found.scores[kind]["sqnr"][name][bits] for found in (one, several)]
                assert values[0] == pytest.approx(values[1], abs=0.01)


def test_the_prediction_leaves_no_trace(calibrated, tmp_path):
    pipe, _ = calibrated
    before = {name: (p, p.requires_grad) for name, p in pipe.unet.named_parameters()}
    run(calibrated, tmp_path, count=1, cheap=True)
    for name, p in pipe.unet.named_parameters():
        assert p is before[name][0] and p.requires_grad == before[name][1] and p.grad is None


# --- stopping ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cheap", [False, True])
def test_a_stopped_run_goes_on(calibrated, tmp_path, monkeypatch, cheap):
    whole = run(calibrated, tmp_path / "whole", cheap=cheap)
    add, added = module.Notebook.add, []

    def stop_after_two(self, what, key, value):
        if len(added) == 2:
            raise KeyboardInterrupt
        added.append(what)
        add(self, what, key, value)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module.Notebook, "add", stop_after_two)
        run(calibrated, tmp_path / "stopped", cheap=cheap)
    assert not (tmp_path / "stopped/sensitivity.json").exists()
    with open(tmp_path / "stopped/rows-0.jsonl", "a") as file:
        file.write('{"what": "weight", "key": "conv_')  # cut off while writing
    again = run(calibrated, tmp_path / "stopped", cheap=cheap)
    assert again.scores == whole.scores and again.sizes == whole.sizes
    keys = [(row["what"], row["key"]) for row in lines(tmp_path / "stopped")]
    assert len(keys) == len(set(keys)) == len(lines(tmp_path / "whole"))


def test_a_folder_gets_its_noise_floor_of_pictures_with_the_first_layer_that_wants_it(calibrated, tmp_path):
    pipe, params = calibrated
    family, names = families.family_of(pipe.unet), list(families.layers_of(pipe.unet))
    content, quality = (next(n for n in names if family.is_content(n) == wanted) for wanted in (True, False))
    floors = [
        sensitivity(pipe, params, prompts(2), tmp_path, kinds=["weight"], layers=layers, progress=False).noise_floor
        for layers in ([quality], [quality, content], [quality])
    ]
    assert [set(floor) for floor in floors] == [{"sqnr"}, {"sqnr", "ssim"}, {"sqnr"}]


def test_the_order_of_kinds_does_not_matter(calibrated, tmp_path):
    """The same folder goes on with either, so that the prediction must be one and the same."""
    orders = (["act", "weight"], ["weight", "act"])
    one, other = (run(calibrated, tmp_path / k[0], count=1, cheap=True, kinds=k).scores for k in orders)
    assert one == other


def test_a_folder_of_another_measurement_is_refused(calibrated, tmp_path):
    run(calibrated, tmp_path, cheap=True)
    with pytest.raises(MixDQError, match=r"rows-0.jsonl: .*other seed\. Give the same"):
        run(calibrated, tmp_path, cheap=True, seed=1)
    with pytest.raises(MixDQError, match="other .*prompts"):
        run(calibrated, tmp_path, cheap=True, count=2)


SCRIPT = """
import sys
from mixdq_ao import QuantParams
from mixdq_ao.sensitivity import sensitivity
from pipelines import FakePipeline, prompts
from typer.testing import CliRunner

folder, *layers = sys.argv[1:]
params = QuantParams.load(folder + "/params.safetensors")
sensitivity(FakePipeline(), params, prompts(3), folder + "/out", layers=layers, progress=False)
"""


def test_two_processes_share_the_work_and_survive_killing(calibrated, tmp_path):
    pipe, params = calibrated
    params.save(tmp_path / "params.safetensors")
    params = QuantParams.load(tmp_path / "params.safetensors")
    names = list(families.layers_of(pipe.unet))
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    processes = []
    for rank in range(2):
        # What `accelerate launch` and torchrun set.
        env = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        env |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": 1, "PYTHONPATH": Path(__file__).parent}
        env = {**os.environ, **{k: str(v) for k, v in env.items()}}
        command = [sys.executable, "-c", SCRIPT, str(tmp_path), *names]
        processes.append(subprocess.Popen(command, env=env, stderr=subprocess.PIPE))
    out = tmp_path / "out"
    try:
        end = time.monotonic() + 100
        while not (len(list(out.glob("rows-*.jsonl"))) == 2 and len(lines_so_far(out)) >= 12):
            assert time.monotonic() < end and all(p.poll() is None for p in processes), [
                p.stderr.read().decode()[-2000:] for p in processes if p.poll() is not None
            ]
            time.sleep(0.05)
    finally:
        for p in processes:
            p.send_signal(signal.SIGKILL)
            p.wait()
            p.stderr.close()
    assert not (out / "sensitivity.json").exists()
    done = lines_so_far(out)
    keys = [(row["what"], row["key"]) for row in done]
    assert len(keys) == len(set(keys)) and {row["rank"] for row in done} == {0, 1}
    # One process goes on with what both did, for a few layers; the rest is what it would have been.
    layers = sorted({key for what, key in keys if what == "weight"})
    module_rows = {(row["what"], row["key"]): row for row in done}
    options = {"layers": layers[:3], "kinds": ["weight"], "progress": False}
    fresh = sensitivity(pipe, params, prompts(3), tmp_path / "fresh", **options)
    again = sensitivity(pipe, params, prompts(3), out, **options)
    assert again.scores == fresh.scores
    for name in layers[:3]:
        noted = {int(bits): score for bits, score in module_rows["weight", name]["sqnr"].items()}
        assert again.scores["weight"]["sqnr"][name] == noted


def lines_so_far(folder: Path) -> list[dict]:
    """Whole lines, with the process that wrote them."""
    found = []
    for path in folder.glob("rows-*.jsonl"):
        rows = [json.loads(line) for line in path.read_text().split("\n")[:-1]]
        found += [{**row, "rank": int(path.stem[5:])} for row in rows if "settings" not in row]
    return found


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"layers": ["nothing"]}, "not layers of the model: nothing"),
        ({"kinds": ["bias"]}, r"kinds must be of weight, act; found \['bias'\]"),
        ({"kinds": [], "cheap": True}, r"kinds must be of weight, act; found \[\]"),
        ({"metrics": "all"}, "metrics must be one of decoupled, both"),
        ({"count": 0}, "needs a list of prompts"),
    ],
)
def test_errors(calibrated, tmp_path, kwargs, message):
    with pytest.raises(MixDQError, match=message):
        run(calibrated, tmp_path, **kwargs)


def test_a_quantized_model_is_refused(calibrated, tmp_path):
    pipe = FakePipeline()
    weight = MixDQTensor.from_float(pipe.unet.conv_in.weight)
    pipe.unet.conv_in.weight = torch.nn.Parameter(weight, requires_grad=False)
    for cheap in (False, True):
        with pytest.raises(MixDQError, match="quantized already"):
            sensitivity(pipe, calibrated[1], prompts(1), tmp_path / str(cheap), cheap=cheap, progress=False)


def test_a_model_that_overflows_is_refused(calibrated, tmp_path):
    pipe = FakePipeline()
    with torch.no_grad():
        pipe.unet.conv_out.bias.fill_(torch.inf)
    with pytest.raises(MixDQError, match="not finite"):
        sensitivity(pipe, None, prompts(1), tmp_path, layers=LAYERS[:1], progress=False)


def test_rank_correlation():
    a = {"x": {4: 1.0, 8: 2.0}, "y": {4: 3.0, 8: 4.0}}
    assert rank_correlation(a, a) == pytest.approx(1)
    assert rank_correlation(a, {"x": {4: 9.0}, "y": {4: 1.0}}) == pytest.approx(-1)
    assert rank_correlation(a, a, bits=8) == pytest.approx(1)


def test_command_line(calibrated, tmp_path, monkeypatch):
    monkeypatch.setattr("mixdq_ao.pipelines.load_pipeline", lambda name, device: FakePipeline())
    calibrated[1].save(tmp_path / "params.safetensors")
    texts = tmp_path / "prompts.txt"
    texts.write_text("a fox\na bear\na boat\n")
    out = tmp_path / "out"
    arguments = [f"--params={tmp_path / 'params.safetensors'}", f"--out={out}", f"--prompts={texts}", "--count=2"]
    command = ["sensitivity", "pipe", *arguments, "--cheap", "--no-acts", "--probes=2", "--device=cpu"]
    result = CliRunner().invoke(cli.app, command, catch_exceptions=False)
    assert result.exit_code == 0 and "Tables written" in result.output and "noise floor" in result.output
    assert sorted(p.name for p in out.glob("*.yaml")) == ["weight_sizes.yaml", "weight_sqnr.yaml", "weight_ssim.yaml"]
    assert len(tables.read_scores(out / "weight_sqnr.yaml")) == len(families.layers_of(calibrated[0].unet))
