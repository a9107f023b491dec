"""The mixdq-ao command: what it prints, writes and refuses."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import original
import pytest
import torch
from expecttest import assert_expected_inline
from models import tiny_sdxl_unet
from typer.main import get_command
from typer.testing import CliRunner

from mixdq_ao import BitPlan, MixDQConfig, QuantParams, cli, quantize_, save
from mixdq_ao.cli import app
from mixdq_ao.errors import MixDQError


def run(*args) -> str:
    """Standard output of a command that must succeed."""
    result = CliRunner().invoke(app, [str(a) for a in args], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture(scope="module")
def unet():
    return tiny_sdxl_unet()


@pytest.fixture
def files(unet, tmp_path):
    original.write(original.raw_checkpoint(unet), tmp_path / "ckpt.pth")
    original.write(original.bos_outputs(unet), tmp_path / "bos.pt")
    return tmp_path


def test_help_names_every_command():
    text = run("--help")
    assert all(name in text for name in ("demo", "convert", "inspect", "doctor"))


@pytest.mark.parametrize("command", [command.callback.__name__ for command in app.registered_commands])
def test_help_shows_every_default_in_words(command):
    """In the text of the help "[default: ...]" would be markup, of which nothing is shown."""
    parameters = get_command(app).commands[command].params
    assert not [p.name for p in parameters if "[default" in (p.help or "")]
    words = [p.show_default for p in parameters if isinstance(p.show_default, str)]
    result = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "400"})
    missing = [text for text in words if f"[default: ({text})]" not in result.stdout]
    assert not missing
    assert words or command in ("convert", "inspect", "allocate")


def test_convert_makes_what_the_library_reads(files, unet):
    out = files / "params.safetensors"
    (files / "act.json").write_text(
        json.dumps({"format": "mixdq_ao.bit_plan", "format_version": 1, "bits": {"conv_in": 8}})
    )
    (files / "protect.txt").write_text("conv_out\n")
    plans = ["--act-plan", files / "act.json", "--protect", files / "protect.txt"]
    printed = run("convert", files / "ckpt.pth", out, "--bos", files / "bos.pt", *plans)
    assert printed == f"263 layers written to {out}\n"
    params = QuantParams.load(out)
    assert dict(params.act_plan) == {"conv_in": 8} and params.protect == ["conv_out"]
    outputs = original.bos_outputs(unet)
    assert len(outputs) > 0
    for name, output in outputs.items():
        assert torch.equal(params.layers[name].bos_output, output.flatten())


def test_convert_does_not_replace_a_file_unasked(files):
    out = files / "params.safetensors"
    out.write_text("precious")
    with pytest.raises(MixDQError, match="exists; give --force"):
        run("convert", files / "ckpt.pth", out)
    assert out.read_text() == "precious"
    run("convert", files / "ckpt.pth", out, "--force")
    QuantParams.load(out)


def test_convert_refuses_a_bos_file_of_another_model(files):
    torch.save({"nowhere.attn2.to_k": torch.zeros(1, 1, 4)}, files / "bos.pt")
    with pytest.raises(MixDQError, match="nowhere.attn2.to_k"):
        run("convert", files / "ckpt.pth", files / "out.safetensors", "--bos", files / "bos.pt")
    assert not (files / "out.safetensors").exists()


def test_a_place_that_cannot_be_written_is_an_error_before_any_work(tmp_path):
    """The inputs of these commands are not there: it would be their error, if anything were read before."""
    folder, file = tmp_path / "folder", tmp_path / "file"
    folder.mkdir()
    file.touch()
    tables = ("--quality-scores", "absent", "--sizes", "absent")
    for arguments in (
        ("convert", "absent", folder, "--force"),
        ("calibrate", "absent", folder),
        ("calibrate", "absent", file / "params.safetensors"),
        ("sensitivity", "absent", "--params", "absent", "--out", file),
        ("allocate", *tables, "--out", folder),
        ("allocate", *tables, "--out", tmp_path / "plan.json", "--pareto", folder),
        ("evaluate", "absent", "--params", "absent", "--out", file),
        ("compare", "absent", folder),
        ("auto", "absent", "--out", file),
        ("demo", "--model", "absent", "--out", file),
    ):
        with pytest.raises(MixDQError, match="folder"):
            run(*arguments)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"] and not list(folder.iterdir())


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_device_or_a_pipe_is_not_replaced(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(MixDQError, match="no regular file"):
        run("convert", "absent", pipe, "--force")
    assert pipe.is_fifo()


def test_a_missing_package_is_an_error_before_any_work(tmp_path, monkeypatch):
    tables = ("--quality-scores", "absent", "--sizes", "absent", "--out", tmp_path / "plan.json")
    for package, arguments in (
        ("scipy", ("allocate", *tables)),
        ("matplotlib", ("allocate", *tables, "--pareto", tmp_path / "front.png")),
        ("jinja2", ("compare", "absent", tmp_path / "report.html")),
        ("scipy", ("auto", "absent", "--out", tmp_path / "out")),
    ):
        with monkeypatch.context() as patch, pytest.raises(MixDQError, match=rf"{package}: pip install .*\[method\]"):
            patch.setitem(sys.modules, package, None)
            run(*arguments)
    assert not list(tmp_path.iterdir())


def test_a_unit_of_sizes_is_for_a_budget_in_bytes(tmp_path):
    with pytest.raises(MixDQError, match="give --budget-mib"):
        run("allocate", "--quality-scores", "absent", "--sizes", "absent", "--out", tmp_path / "plan.json",
            "--budget", 4, "--size-unit", 11520)  # fmt: skip


class Small(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(4, 8, 3)
        self.linear = torch.nn.Linear(16, 4)
        self.last = torch.nn.Linear(4, 4)


def test_inspect_a_model(tmp_path):
    model = Small()
    quantize_(
        model,
        MixDQConfig(
            weight_bits={"conv": 4, "linear": 2, "last": None}, act_bits={"conv": 8, "linear": None, "last": None}
        ),
    )
    save(model, tmp_path / "model.safetensors")
    assert_expected_inline(
        run("inspect", tmp_path / "model.safetensors"),
        """\
layer   weight  activation  groups  computes  reason                   KiB
--------------------------------------------------------------------------
conv    4       8           1       int8                               0.2
linear  2       float       1       float                              0.0
last    float   float       1       float     floating in weight_bits  0.1
model: 3 layers, 0.0 MiB
class_name: "Small"
""",
    )


def test_inspect_a_plan(tmp_path):
    """Of weights or of activations, which its file does not say: one column of widths."""
    BitPlan({"conv_in": 8, "up.conv": 4, "conv_out": None}).write(tmp_path / "act.json")
    assert_expected_inline(
        run("inspect", tmp_path / "act.json"),
        """\
layer     bits
--------------
conv_in      8
up.conv      4
conv_out    16
bit plan: 3 layers
""",
    )


def test_inspect_for_programs(files):
    found = json.loads(run("inspect", files / "ckpt.pth", "--json"))
    assert found["kind"] == "original parameters" and len(found["rows"]) == 263


def test_doctor_for_programs():
    found = {f["name"]: f for f in json.loads(run("doctor", "--json"))}
    assert torch.__version__.startswith(found["torch"]["value"])


def test_doctor_takes_options_of_a_layer_only_with_one():
    for option in (("--bits", 4), ("--arch", 90)):
        with pytest.raises(MixDQError, match=f"{option[0]} .* give --layer"):
            run("doctor", *option)


def command(*arguments, **options) -> subprocess.CompletedProcess:
    """The command in a process of its own."""
    line = [sys.executable, "-m", "mixdq_ao", *map(str, arguments)]
    return subprocess.run(line, stderr=subprocess.PIPE, text=True, **options)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
def test_a_full_disk_is_one_line(tmp_path):
    BitPlan({"conv_in": 8}).write(tmp_path / "plan.json")
    with open("/dev/full", "w") as full:
        result = command("inspect", tmp_path / "plan.json", stdout=full)
    assert (result.returncode, result.stderr) == (2, "error: No space left on device\n")


def test_a_reader_that_has_gone_is_no_error(tmp_path):
    BitPlan({"conv_in": 8}).write(tmp_path / "plan.json")
    reader, writer = os.pipe()
    os.close(reader)
    result = command("inspect", tmp_path / "plan.json", stdout=writer)
    os.close(writer)
    assert (result.returncode, result.stderr) == (1, "")


@pytest.mark.parametrize(
    "error, text",
    [
        (PermissionError(13, "Permission denied", "plan.json"), "error: plan.json: Permission denied\n"),
        (OSError(2, "No such file", "a.tmp", None, "b/a"), "error: b/a: No such file\n"),
        (OSError("of no number"), "error: of no number\n"),
    ],
)
def test_an_error_of_the_system_is_one_line(error, text, monkeypatch, capsys):
    def fail(**options):
        raise error

    monkeypatch.setattr(cli, "app", fail)
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2 and capsys.readouterr().err == text


@pytest.mark.parametrize("name, expected", [("calibrate", "goes on"), ("bench", "--resume"), ("inspect", "stopped")])
def test_a_stop_says_whether_the_command_can_go_on(name, expected, monkeypatch):
    found = next(c for c in app.registered_commands if c.callback.__name__ == name)

    @functools.wraps(found.callback)  # its options, too
    def stop(**options):
        raise KeyboardInterrupt

    monkeypatch.setattr(found, "callback", stop)
    result = CliRunner().invoke(app, [name, *(["in", "out"] if name == "calibrate" else ["in"])])
    assert result.exit_code == 130 and result.stdout == ""
    assert result.stderr.startswith("stopped") and expected in result.stderr and result.stderr.count("\n") == 1


def test_every_command_that_goes_on_is_a_command():
    assert {command.callback.__name__ for command in app.registered_commands} >= cli.AFTER_A_STOP.keys()


def test_an_error_is_one_line_and_exit_code_2(tmp_path, monkeypatch):
    monkeypatch.delenv("TORCHAO_FORCE_SKIP_LOADING_SO_FILES")  # of which torchao says that it is set
    result = command("inspect", tmp_path / "absent.safetensors", stdout=subprocess.PIPE)
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.strip() == f"error: {tmp_path}/absent.safetensors: the file must exist. Check the path."
