"""``mixdq_ao.export``: one file that runs elsewhere without a compiler, in a pipeline, with the numbers of eager."""

import os
import subprocess
import sys

import pytest
import torch
from models import run_unet, unet_inputs
from pipelines import FakePipeline, micro_unet
from torch import nn

from mixdq_ao import (
    CheckpointError,
    MixDQConfig,
    MixDQError,
    calibrate,
    export,
    exporting,
    load_exported,
    quantize_,
)

NOISE = {"guidance_scale": 0.0, "output_type": "pt"}


def draw(pipe, prompts=("a", "b"), steps=2) -> torch.Tensor:
    noise = [torch.Generator().manual_seed(i) for i in range(len(prompts))]
    with torch.no_grad():
        return pipe(list(prompts), num_inference_steps=steps, generator=noise, **NOISE).images


@pytest.fixture(scope="module")
def pipe():
    pipe = FakePipeline()
    quantize_(pipe.unet, MixDQConfig(calibrate(pipe, ["c", "d"], num_inference_steps=1)))
    pipe.unet.requires_grad_(True)  # as diffusers' from_pretrained gives it
    return pipe


@pytest.fixture(scope="module")
def exported(pipe, tmp_path_factory):
    """Exported once, for batches of 2 and every size: the file, and the operators that it calls."""
    path = tmp_path_factory.mktemp("exported") / "unet.pt2"
    programs = []
    compile_and_package = torch._inductor.aoti_compile_and_package

    def watched(program, **options):
        programs.append(program)
        return compile_and_package(program, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch._inductor, "aoti_compile_and_package", watched)
        export(pipe.unet, path, lambda: draw(pipe), dynamic=True)
    return path, {str(node.target) for node in programs[0].graph.nodes if node.op == "call_function"}


@pytest.fixture(scope="module")
def loaded(exported):
    return load_exported(exported[0])


def test_in_a_pipeline(pipe, loaded):
    expected, unet = draw(pipe), pipe.unet
    try:
        pipe.unet = loaded
        torch.testing.assert_close(draw(pipe), expected, rtol=0, atol=1e-5)
    finally:
        pipe.unet = unet


@pytest.mark.parametrize("size", [(8, 8), (12, 20), (16, 6)])
def test_every_size(pipe, loaded, size):
    inputs = {**unet_inputs(batch=2), "sample": torch.randn(2, 4, *size)}
    expected = run_unet(pipe.unet, **inputs)
    torch.testing.assert_close(run_unet(loaded, **inputs), expected, rtol=0, atol=1e-5)
    positional = [inputs.pop(name) for name in ("sample", "timestep", "encoder_hidden_states")]
    found = loaded(*positional, timestep_cond=None, cross_attention_kwargs=None, **inputs).sample
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_timesteps_of_any_kind(loaded):
    inputs = unet_inputs(batch=2, size=8)
    expected = run_unet(loaded, **inputs)
    for timestep in (999, 999.0, torch.tensor(999)):
        assert torch.equal(run_unet(loaded, **{**inputs, "timestep": timestep}), expected)


def test_inputs_of_any_layout(loaded):
    inputs = unet_inputs(batch=2, size=8)
    expected, added = run_unet(loaded, **inputs), inputs["added_cond_kwargs"]
    inputs["sample"] = inputs["sample"].to(memory_format=torch.channels_last)
    inputs["added_cond_kwargs"] = {
        "time_ids": torch.tensor(16.0).expand(2, 6),
        "text_embeds": added["text_embeds"].t().contiguous().t(),
    }
    assert torch.equal(run_unet(loaded, **inputs), expected)


def test_layers_are_fused(exported):
    assert {"layer_norm_quantize", "group_norm_quantize", "linear_int8_geglu", "linear_int8_multi"} <= {
        name.removeprefix("mixdq_ao.").removesuffix(".default") for name in exported[1]
    }


def test_what_a_pipeline_asks(pipe, loaded):
    assert (loaded.config.in_channels, loaded.config.time_cond_proj_dim) == (4, None)
    assert loaded.add_embedding.linear_1.in_features == pipe.unet.add_embedding.linear_1.in_features
    assert (loaded.dtype, loaded.device) == (torch.float32, torch.device("cpu"))
    assert not list(loaded.parameters()) and loaded.to("cpu").eval() is loaded


@pytest.mark.parametrize(
    "change, message",
    [
        ({"sample": torch.zeros(2, 4, 9, 8)}, r"multiples of 2, twice it at least; found \[9, 8\]"),
        ({"sample": torch.zeros(3, 4, 8, 8)}, "must be .*'shape': .2, 4, 8, 8.*found .*Export once more"),
        ({"encoder_hidden_states": torch.zeros(2, 7, 64).half()}, "float32.* as in the .*; found .*float16"),
        ({"added_cond_kwargs": {"text_embeds": torch.zeros(2, 32)}}, "takes exactly .*time_ids"),
        ({"cross_attention_kwargs": {"scale": 0.5}}, "takes tensors only; found .*scale.* = 0.5"),
    ],
)
def test_what_does_not_fit(loaded, change, message):
    with pytest.raises(MixDQError, match=message):
        run_unet(loaded, **{**unet_inputs(batch=2, size=8), **change})


IN_ANOTHER_PROCESS = """
import sys, torch
from concurrent.futures import ThreadPoolExecutor
from mixdq_ao import load_exported
inputs, expected = torch.load({inputs!r})
unet = load_exported({file!r})
with ThreadPoolExecutor(3) as pool:
    for future in [pool.submit(unet, **inputs, return_dict=False) for _ in range(9)]:
        torch.testing.assert_close(future.result()[0].detach(), expected, rtol=0, atol=1e-5)
"""


def test_another_process_without_a_compiler(pipe, exported, tmp_path):
    """Nor does one thread wait there for another that waits for it."""
    inputs = unet_inputs(batch=2, size=8)
    torch.save((inputs, run_unet(pipe.unet, **inputs)), tmp_path / "inputs")
    code = IN_ANOTHER_PROCESS.format(inputs=str(tmp_path / "inputs"), file=str(exported[0]))
    environment = {**os.environ, "PATH": "", "CXX": ""}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_other_versions(exported, monkeypatch):
    monkeypatch.setitem(exporting._VERSIONS, "torch", "1.0")
    with pytest.raises(CheckpointError, match="'torch': '1.0'.*found .*Export the model again"):
        load_exported(exported[0])


def test_other_files(tmp_path):
    (tmp_path / "unet.pt2").write_bytes(b"something else")
    with pytest.raises(CheckpointError, match="must be a file that mixdq_ao.export wrote"):
        load_exported(tmp_path / "unet.pt2")
    with pytest.raises(CheckpointError, match="must exist"):
        load_exported(tmp_path / "missing.pt2")


def test_an_export_that_fails_leaves_the_file(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        kwargs["package_path"].write(b"half")
        raise RuntimeError("no compiler")

    monkeypatch.setattr(exporting, "_program", lambda *args: None)
    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", fail)
    path = tmp_path / "unet.pt2"
    path.write_bytes(b"old")
    with pytest.raises(RuntimeError, match="no compiler"):
        export(micro_unet(), path, unet_inputs(size=8))
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "model, name, example, message",
    [
        (nn.Linear(2, 2), "x.pt2", {}, "takes a UNet2DConditionModel; found Linear"),
        (None, "x.bin", {}, "must end in .pt2; found .*x.bin"),
        (None, "x.pt2", lambda: None, "did not call the model"),
        (None, "x.pt2", {**unet_inputs(), "cross_attention_kwargs": {"scale": 0.5}}, "takes tensors only"),
    ],
)
def test_wrong_arguments(model, name, example, message, tmp_path):
    with pytest.raises(MixDQError, match=message):
        export(model or micro_unet(), tmp_path / name, example)
    assert not list(tmp_path.iterdir())
