"""The mixdq-ao command: what it prints, writes and refuses."""

import json
import subprocess
import sys

import original
import pytest
import torch
from expecttest import assert_expected_inline
from models import tiny_sdxl_unet
from typer.main import get_command
from typer.testing import CliRunner

from mixdq_ao import MixDQConfig, QuantParams, quantize_, save
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
layer   weight  activation  groups  computes  kernel              reason                   KiB
----------------------------------------------------------------------------------------------
conv    4       8           1       int8      torch._int_mm                                0.2
linear  2       float       1       float     torch, dequantized                           0.0
last    float   float       1       float     torch               floating in weight_bits  0.1
model: 3 layers, 0.0 MiB
class_name: "Small"
""",
    )


def test_inspect_for_programs(files):
    found = json.loads(run("inspect", files / "ckpt.pth", "--json"))
    assert found["kind"] == "original parameters" and len(found["rows"]) == 263


def test_doctor_for_programs():
    found = {f["name"]: f for f in json.loads(run("doctor", "--json"))}
    assert torch.__version__.startswith(found["torch"]["value"])


def test_an_error_is_one_line_and_exit_code_2(tmp_path, monkeypatch):
    monkeypatch.delenv("TORCHAO_FORCE_SKIP_LOADING_SO_FILES")  # of which torchao says that it is set
    command = [sys.executable, "-m", "mixdq_ao.cli", "inspect", str(tmp_path / "absent.safetensors")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.strip() == f"error: {tmp_path}/absent.safetensors: the file must exist. Check the path."
