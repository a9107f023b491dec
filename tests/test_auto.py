"""The whole method in one call, stopped wherever it can be."""

import errno
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from models import run_unet, unet_inputs
from pipelines import FakePipeline, prompts

from mixdq_ao import BitPlan, MixDQError, QuantParams, families, files, load
from mixdq_ao.auto import CANDIDATES, LOCK, MODEL, PARAMS, PLAN, REPORT, RESULTS, Settings, _alone_in, auto
from mixdq_ao.errors import CheckpointError

SETTINGS = Settings(
    budget=5.0, seeds=(0, 1), batch_size=2, sensitivity_prompts=2, choose_prompts=2, candidates=2, ablations=True
)
ROOT = Path(__file__).resolve().parent.parent


def run(folder, captions=("one", "two"), **changes):
    settings = replace(SETTINGS, **changes)
    return auto(FakePipeline(), prompts(4), list(captions), folder, settings, title="Test", progress=False)


def contents(folder: Path) -> dict:
    content = json.loads((folder / RESULTS).read_text())
    content["sensitivity"].pop("seconds")
    return content


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("auto")
    return run(folder)


def test_everything_is_there_and_fits_together(whole):
    unet = FakePipeline().unet
    model = load(whole.model)
    plan = BitPlan.read(whole.folder / PLAN)
    assert {name: m.weight.bits for name, m in families.layers_of(model).items()} == dict(plan) == dict(whole.plan)
    assert plan.mean_bits({n: m.weight.numel() for n, m in families.layers_of(unet).items()}) <= 5.0
    assert torch.isfinite(run_unet(model, **unet_inputs(size=8))).all()
    assert set(QuantParams.load(whole.folder / PARAMS).layers) == set(families.layers_of(unet))
    content = contents(whole.folder)
    names = [row["name"] for row in content["evaluation"]["rows"]]
    assert content["chosen"] == whole.chosen == names[-1] and "W8A8 without BOS" in names
    assert content["findings"] == whole.findings and len(whole.findings) == 7
    rows = {row.name: row for row in whole.evaluation.rows}
    assert rows[whole.chosen].mean("sqnr") > rows["W4A8"].mean("sqnr")
    assert whole.report.read_text().count("<figure>") == 2
    assert not list(whole.folder.rglob("*.tmp")) and not list(whole.folder.glob("*.state"))


class Stop(Exception):
    pass


@pytest.mark.parametrize("every", [7, 9])
def test_stops_at_writes_and_goes_on(whole, tmp_path, monkeypatch, every):
    """Every ``every``-th file that is about to take its place does not: the call raises, and is made again."""
    replace, writes, stops = os.replace, [0], 0

    def replace_or_stop(source, target):
        writes[0] += 1
        if writes[0] % every == 0:
            raise Stop
        replace(source, target)

    monkeypatch.setattr(files.os, "replace", replace_or_stop)
    while True:
        try:
            run(tmp_path)
            break
        except Stop:
            stops += 1
            assert not list(tmp_path.rglob("*.tmp"))
    assert stops >= 2
    assert contents(tmp_path) == contents(whole.folder)
    assert (tmp_path / MODEL).read_bytes() == whole.model.read_bytes()


def test_goes_on_after_being_killed(whole, tmp_path):
    code = (
        "import torch; torch.set_num_threads(1)\n"
        "from pathlib import Path\n"
        "from test_auto import run\n"
        f"run(Path({str(tmp_path)!r}))\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT / "tests")}
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=environment, stderr=subprocess.DEVNULL)
    while not (tmp_path / "candidates.json").exists() and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / REPORT).exists()
    assert run(tmp_path).plan == whole.plan
    assert (tmp_path / REPORT).exists()


def test_a_folder_of_another_call(whole):
    before = (whole.folder / "settings.json").read_bytes()
    with pytest.raises(MixDQError, match="begun with other method, prompts. .* only .*budget.* may change"):
        auto(
            FakePipeline(), prompts(3), ["one"], whole.folder, replace(SETTINGS, method="mse", budget=4), progress=False
        )
    with pytest.raises(MixDQError, match="begun with other unet"):
        auto(FakePipeline(seed=1), prompts(4), ["one", "two"], whole.folder, SETTINGS, progress=False)
    assert (whole.folder / "settings.json").read_bytes() == before
    assert (whole.folder / MODEL).exists()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"budget": 1}, r"budget must be from 3.\d+ to 8 mean bits"),
        ({"budget": 16}, r"budget must be from 3.\d+ to 8 mean bits"),
        ({"budget": math.nan}, "budget: mean bits must be a finite number; found nan"),
        ({"budget": math.inf}, "budget: mean bits must be a finite number; found inf"),
        ({"method": "bad"}, "method must be one of minmax, .*found 'bad'"),
        ({"weight_method": "bad"}, "weight_method must be one of"),
        ({"seeds": ()}, "seeds must be different, at least one"),
        ({"seeds": (1, 1)}, "seeds must be different, at least one"),
        ({"batch_size": 0}, "batch_size must be at least 1; found 0"),
        ({"candidates": 0}, "candidates must be at least 1; found 0"),
        ({"guidance_scale": math.nan}, "guidance_scale must be a finite number"),
    ],
)
def test_settings_are_checked_before_anything_is_written(tmp_path, changes, message):
    with pytest.raises(MixDQError, match=message):
        run(tmp_path / "out", **changes)
    assert not (tmp_path / "out").exists()


def test_the_budget_that_the_message_names_has_a_plan(whole, tmp_path):
    with pytest.raises(MixDQError) as caught:
        run(tmp_path, budget=1)
    lowest = float(str(caught.value).split(" to 8")[0].split()[-1])
    folder = tmp_path / "copy"
    shutil.copytree(whole.folder, folder)
    plan = run(folder, budget=lowest, ablations=False).plan
    assert plan.mean_bits({n: m.weight.numel() for n, m in families.layers_of(FakePipeline().unet).items()}) <= lowest


def never(*args, **kwargs):
    raise AssertionError("done again")


def test_another_budget_keeps_calibration_and_sensitivity(whole, tmp_path, monkeypatch):
    """And gives what a folder of its own gives; back at the first budget everything is as it was."""
    fresh = run(tmp_path / "fresh", budget=4.5)
    folder = tmp_path / "copy"
    shutil.copytree(whole.folder, folder)
    monkeypatch.setattr("mixdq_ao.auto.calibrate", never)
    monkeypatch.setattr("mixdq_ao.auto.sensitivity", never)
    for budget, expected in ((4.5, fresh), (SETTINGS.budget, whole)):
        result = run(folder, budget=budget)
        assert result.chosen == expected.chosen and contents(folder) == contents(expected.folder)
        assert result.model.read_bytes() == expected.model.read_bytes()


def test_other_captions_are_evaluated_with_the_same_model(whole, tmp_path, monkeypatch):
    folder = tmp_path / "copy"
    shutil.copytree(whole.folder, folder)
    monkeypatch.setattr("mixdq_ao.auto.choose", never)
    monkeypatch.setattr("mixdq_ao.auto.save", never)
    result = run(folder, captions=["three"])
    assert result.evaluation.captions == ["three"] and result.plan == whole.plan
    assert contents(folder)["evaluation"] != contents(whole.folder)["evaluation"]


def test_stopped_while_the_budget_changes(whole, tmp_path, monkeypatch):
    """Nothing of the old budget is taken for the new one, nor the other way round."""
    folder = tmp_path / "copy"
    shutil.copytree(whole.folder, folder)

    def stop(path, text):
        raise Stop

    with monkeypatch.context() as patch:
        patch.setattr("mixdq_ao.auto.write_text", stop)
        with pytest.raises(Stop):
            run(folder, budget=4.5)
    assert not any((folder / name).exists() for name in (CANDIDATES, PLAN, MODEL, RESULTS, REPORT))
    assert run(folder).plan == whole.plan and contents(folder) == contents(whole.folder)


def test_more_seeds_keep_the_plan_and_the_model(whole, tmp_path, monkeypatch):
    """Plans are compared at the first seed alone."""
    folder = tmp_path / "copy"
    shutil.copytree(whole.folder, folder)
    monkeypatch.setattr("mixdq_ao.auto.choose", never)
    with monkeypatch.context() as patch:
        patch.setattr("mixdq_ao.auto.save", never)
        result = run(folder, seeds=(0, 2))
    assert result.evaluation.seeds == [0, 2] and result.plan == whole.plan
    with pytest.raises(AssertionError, match="done again"):
        run(folder, seeds=(1, 0))
    assert not (folder / MODEL).exists()


@pytest.mark.parametrize("name", [PLAN, PARAMS, MODEL, REPORT])
def test_files_of_somebody_else_are_neither_used_nor_replaced(tmp_path, name):
    (tmp_path / name).write_text("precious")
    with pytest.raises(MixDQError, match=f"there is {name}, but no settings.json"):
        run(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} <= {name, LOCK} and (tmp_path / name).read_text() == "precious"


def test_one_process_at_a_time(tmp_path):
    code = "import time; from pathlib import Path; from mixdq_ao.auto import _alone_in\n"
    code += f"with _alone_in(Path({str(tmp_path)!r})): print('in', flush=True); time.sleep(100)\n"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "in\n"
        with pytest.raises(MixDQError, match="another process is at work in this folder"):
            run(tmp_path)
        assert {path.name for path in tmp_path.iterdir()} <= {LOCK}
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    with _alone_in(tmp_path):
        pass


def test_a_file_system_without_locks_is_no_error(tmp_path, monkeypatch):
    def fail(self, **options):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("mixdq_ao.auto.FileLock.acquire", fail)
    with pytest.warns(UserWarning, match="not kept out, for want of a lock: .*No locks"), _alone_in(tmp_path):
        pass


@pytest.mark.parametrize("name, text", [("settings.json", "[]"), (CANDIDATES, "{}"), (CANDIDATES, '[{"name": "a"}]')])
def test_a_broken_file_is_named(whole, tmp_path, name, text):
    folder = tmp_path / "copy"
    shutil.copytree(whole.folder, folder)
    (folder / name).write_text(text)
    with pytest.raises(CheckpointError, match=f"{name}: must be a"):
        run(folder)
