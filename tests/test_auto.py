"""The whole method in one call, stopped wherever it can be."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from models import run_unet, unet_inputs
from pipelines import FakePipeline, prompts

from mixdq_ao import BitPlan, MixDQError, QuantParams, families, files, load
from mixdq_ao.auto import MODEL, PARAMS, PLAN, REPORT, RESULTS, Settings, auto

SETTINGS = Settings(
    budget=5.0, seeds=(0, 1), batch_size=2, sensitivity_prompts=2, choose_prompts=2, candidates=2, ablations=True
)
ROOT = Path(__file__).resolve().parent.parent


def run(folder):
    return auto(FakePipeline(), prompts(4), ["one", "two"], folder, SETTINGS, title="Test", progress=False)


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
    with pytest.raises(MixDQError, match="begun with other captions"):
        auto(FakePipeline(), prompts(4), ["other"], whole.folder, SETTINGS, progress=False)
    with pytest.raises(MixDQError, match="begun with other unet"):
        auto(FakePipeline(seed=1), prompts(4), ["one", "two"], whole.folder, SETTINGS, progress=False)
