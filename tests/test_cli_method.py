"""The commands of the method, on a stand-in pipeline."""

import json

import pytest
import torch
from pipelines import FakePipeline
from typer.testing import CliRunner

from mixdq_ao import BitPlan, MixDQError, QuantParams, cli, families
from mixdq_ao.pipelines import TINY, load_pipeline
from mixdq_ao.tiny_model import TINY_SDXL


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


def test_rows_of_one_name_are_an_error(folder):
    params = ("--params", folder / "params.safetensors")
    for arguments, names in (
        (("--plan", "a/plan.json", "--plan", "b/plan.json"), "a/plan.json and --plan b/plan.json"),
        (("--plan", "W4A8.json", "--bits", 4), "W4A8.json and --bits 4"),
        (("--bits", 4, "--bits", 4), "--bits 4 and --bits 4"),
        (("--bits", 4, "--model", "W4A8.safetensors"), "--bits 4 and --model W4A8.safetensors"),
    ):
        with pytest.raises(MixDQError, match=names):
            run("evaluate", TINY, *params, *arguments)


def test_rows_of_one_name_as_files_are_an_error_before_anything_is_loaded(folder, monkeypatch):
    monkeypatch.setattr("mixdq_ao.pipelines.load_pipeline", None)
    for plans, names in (
        (("my plan.json", "my-plan.json"), "'my-plan' and 'my plan'"),
        (("Floating.json",), "Floating"),
    ):
        arguments = [word for plan in plans for word in ("--plan", plan)]
        with pytest.raises(MixDQError, match=names):
            run("evaluate", TINY, "--params", folder / "params.safetensors", *arguments)


def test_another_calibration_of_the_same_file_was_faster(tmp_path, monkeypatch):
    save, out = QuantParams.save, tmp_path / "params.safetensors"

    def save_and_lose_the_state(params, path):
        save(params, path)
        (tmp_path / "params.safetensors.state").unlink()

    monkeypatch.setattr(QuantParams, "save", save_and_lose_the_state)
    run("calibrate", TINY, out, "--count", 1)
    assert list(tmp_path.iterdir()) == [out]


def test_options_that_change_no_model_are_an_error(folder, tmp_path):
    for option in (("--params", folder / "params.safetensors"), ("--act-bits", 8)):
        with pytest.raises(MixDQError, match=f"{option[0]} .* changes no --model"):
            run("compare", TINY, tmp_path / "report.html", "--model", "model.safetensors", *option)


def test_the_width_of_activations(folder):
    arguments = ("evaluate", TINY, "--params", folder / "params.safetensors", "--count", 1, "--json")
    found = json.loads(run(*arguments, "--bits", 8, "--act-bits", 4))
    assert found["rows"][1]["name"] == "W8A4"
    with pytest.raises(MixDQError, match="0"):
        run(*arguments, "--act-bits", 0)


def test_sensitivity_takes_the_prompts_that_there_are(folder, tmp_path, monkeypatch):
    taken = []

    def measure(pipe, params, prompts, out, **options):
        taken.append(prompts)
        raise MixDQError("enough")

    monkeypatch.setattr("mixdq_ao.sensitivity.sensitivity", measure)
    (tmp_path / "two.txt").write_text("a fox\na bear\n")
    arguments = ("--params", folder / "params.safetensors", "--out", tmp_path / "out")
    for more in (("--prompts", tmp_path / "two.txt"), ("--prompts", tmp_path / "two.txt", "--count", 1), ()):
        with pytest.raises(MixDQError, match="enough"):
            run("sensitivity", TINY, *arguments, *more)
    with pytest.raises(MixDQError, match="enough"):
        run("sensitivity", "another", *arguments, "--count", 50)
    assert taken[:2] == [["a fox", "a bear"], ["a fox"]] and [len(prompts) for prompts in taken[2:]] == [16, 32]


def test_sensitivity_of_nothing(tmp_path):
    with pytest.raises(MixDQError, match="nothing to measure"):
        run("sensitivity", TINY, "--params", "absent", "--out", tmp_path / "out", "--no-weights", "--no-acts")
    assert not list(tmp_path.iterdir())


def test_a_demo_draws_so_many_of_the_prompts(tmp_path, monkeypatch):
    taken = []

    def draw(out, *, prompts, pictures, **options):
        taken.append((prompts, pictures))
        raise MixDQError("enough")

    monkeypatch.setattr("mixdq_ao.demo.run_demo", draw)
    (tmp_path / "three.txt").write_text("a fox\na bear\na cat\n")
    prompts = ("--prompts", tmp_path / "three.txt")
    for arguments in (prompts, (*prompts, "--pictures", 2), ("--pictures", 5), ()):
        with pytest.raises(MixDQError, match="enough"):
            run("demo", "--out", tmp_path / "out", *arguments)
    assert [found and len(found) for found, _ in taken] == [3, 2, None, None]
    assert [pictures for found, pictures in taken if found is None] == [5, 8]


@pytest.mark.parametrize("name", ["cud", "meta", f"cuda:{torch.cuda.device_count()}"])
def test_a_device_that_is_not_there(name, tmp_path):
    with pytest.raises(MixDQError, match=f"device must be cpu.*{name}"):
        load_pipeline(TINY, name)
    with pytest.raises(MixDQError, match=f"device must be cpu.*{name}"):
        run("demo", "--device", name, "--out", tmp_path)


def test_a_pipeline_that_is_not_there(tmp_path):
    with pytest.raises(MixDQError, match="no diffusers pipeline on this machine"):
        load_pipeline(tmp_path / "none")
    (tmp_path / "model_index.json").write_text((TINY_SDXL / "model_index.json").read_text())
    # Which part is missed first varies, and with it the words of diffusers or transformers.
    with pytest.raises(MixDQError, match="diffusers cannot load this pipeline: .*(config.json|no file named)"):
        load_pipeline(tmp_path)


def test_an_error_keeps_its_brackets(monkeypatch, capsys):
    def fail(**kwargs):
        raise MixDQError("pip install 'mixdq_ao[metrics]'")

    monkeypatch.setattr(cli, "app", fail)
    with pytest.raises(SystemExit):
        cli.main()
    assert "mixdq_ao[metrics]" in capsys.readouterr().err
