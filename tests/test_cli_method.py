"""The commands of the method, on a stand-in pipeline."""

import json

import pytest
from pipelines import FakePipeline
from typer.testing import CliRunner

from mixdq_ao import BitPlan, MixDQError, QuantParams, cli, families
from mixdq_ao.pipelines import TINY, load_pipeline


@pytest.fixture(autouse=True)
def fake(monkeypatch):
    monkeypatch.setattr("mixdq_ao.pipelines.load_pipeline", lambda name, device: FakePipeline(size=16))


def run(*arguments) -> str:
    result = CliRunner().invoke(cli.app, [str(a) for a in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("cli")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mixdq_ao.pipelines.load_pipeline", lambda name, device: FakePipeline(size=16))
        run("calibrate", TINY, path / "params.safetensors", "--count", 4, "--method", "ema", "--batch-size", 2)
    return path


def test_calibrate(folder):
    params = QuantParams.load(folder / "params.safetensors")
    assert set(params.layers) == set(families.layers_of(FakePipeline().unet)) and params.bos_aware
    assert [p.name for p in folder.iterdir()] == ["params.safetensors"]


def test_evaluate_plans_and_widths(folder, tmp_path):
    plan = tmp_path / "mine.json"
    BitPlan.uniform(families.layers_of(FakePipeline().unet), 4).write(plan)
    arguments = ("--params", folder / "params.safetensors", "--count", 2, "--seeds", 2)
    out = run("evaluate", TINY, *arguments, "--plan", plan, "--bits", 8, "--out", tmp_path / "done", "--json")
    content = json.loads(out)
    assert [row["name"] for row in content["rows"]] == ["floating", "mine", "W8A8"]
    assert content["rows"][1]["weight_bits"] == 4 and content["captions"] == 2 and content["seeds"] == [0, 1]
    assert "accuracy" in content["rows"][0]
    assert (tmp_path / "done" / "mine-1.json").exists()
    table = run("evaluate", TINY, *arguments, "--bits", 8)
    assert "W8A8" in table and "SSIM" in table and "±" in table


def test_compare(folder, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a fox\na bear\n")
    report = tmp_path / "report.html"
    arguments = ("--params", folder / "params.safetensors", "--bits", 8, "--bits", 2, "--captions", prompts)
    assert "report.html" in run("compare", TINY, report, *arguments)
    text = report.read_text()
    assert text.count("<figure>") == 2 and "W2A8" in text and "a bear" in text


def test_wrong_arguments(tmp_path):
    with pytest.raises(MixDQError, match="nothing to evaluate"):
        run("evaluate", TINY)
    with pytest.raises(MixDQError, match="need --params"):
        run("evaluate", TINY, "--bits", 8)


def test_a_pipeline_that_is_not_there(tmp_path):
    with pytest.raises(MixDQError, match="no diffusers pipeline on this machine"):
        load_pipeline(tmp_path / "none")


def test_an_error_keeps_its_brackets(monkeypatch, capsys):
    def fail(**kwargs):
        raise MixDQError("pip install 'mixdq_ao[metrics]'")

    monkeypatch.setattr(cli, "app", fail)
    with pytest.raises(SystemExit):
        cli.main()
    assert "mixdq_ao[metrics]" in capsys.readouterr().err
