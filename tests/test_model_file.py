"""Whole quantized models as files, and the description of any file."""

import json

import original
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mixdq_ao import model_file
from mixdq_ao.checkpoint import LayerParams, QuantParams
from mixdq_ao.errors import CheckpointError, MixDQError
from mixdq_ao.files import TensorFile
from mixdq_ao.plan import BitPlan
from mixdq_ao.tensor import MixDQTensor


def set_weight(model: nn.Module, name: str, **kwargs) -> None:
    module = model.get_submodule(name)
    module.weight = nn.Parameter(MixDQTensor.from_float(module.weight.detach(), **kwargs), requires_grad=False)


class Small(nn.Module):
    """Every kind of stored tensor, and shapes that do not fill their last byte."""

    def __init__(self):
        super().__init__()
        self.static = nn.Linear(7, 5)
        self.dynamic = nn.Linear(6, 5)
        self.weight_only = nn.Linear(9, 4)
        self.split = nn.Conv2d(5, 3, 3)
        self.bos = nn.Linear(6, 4, bias=False)
        self.norm = nn.BatchNorm2d(3)
        self.norm.mixdq_reason = "not a matrix product"


def quantized_small() -> Small:
    torch.manual_seed(0)
    model = Small()
    set_weight(model, "static", bits=8, act_scale=0.1, act_zero_point=-128)
    set_weight(model, "dynamic", bits=4, act_bits=8)
    set_weight(model, "weight_only", bits=2)
    zero_point = torch.tensor([7.0, -8.0])
    set_weight(model, "split", bits=4, input_groups=[3, 2], act_bits=4, act_scale=0.2, act_zero_point=zero_point)
    bos = {"bos_input": torch.randn(6), "bos_output": torch.randn(4).half()}
    set_weight(model, "bos", bits=8, act_scale=0.1, act_zero_point=0, **bos)
    return model


def assert_equal_models(found: nn.Module, wanted: nn.Module) -> None:
    found, wanted = found.state_dict(keep_vars=True), wanted.state_dict(keep_vars=True)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert type(found[name]) is type(value) and found[name].dtype == value.dtype, name
        if isinstance(value, MixDQTensor):
            assert model_file._attributes(found[name]) == model_file._attributes(value)
            parts, others = value.__tensor_flatten__()[0], found[name].__tensor_flatten__()[0]
            assert parts == others
            if value.dim() == 4:
                assert found[name].qdata.is_contiguous(memory_format=torch.channels_last), name
            for part in parts:
                assert torch.equal(getattr(found[name], part), getattr(value, part)), f"{name}.{part}"
        else:
            assert torch.equal(found[name], value), name
            assert found[name].requires_grad == value.requires_grad, name


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_round_trip_into_a_given_model(tmp_path, device):
    model = quantized_small()
    model_file.save(model, tmp_path / "m.safetensors")
    with torch.device(device):
        target = Small()
    del target.norm.mixdq_reason
    assert model_file.load(tmp_path / "m.safetensors", model=target) is target
    assert_equal_models(target, model)
    assert target.norm.mixdq_reason == "not a matrix product"
    assert target.training  # the caller's model keeps its mode


def test_derived_tensors_are_not_stored(tmp_path):
    model_file.save(quantized_small(), tmp_path / "m.safetensors")
    keys = TensorFile(tmp_path / "m.safetensors").entries.keys()
    assert {key for key in keys if key.startswith("static.")} == {
        "static.bias",
        *(f"static.weight.{part}" for part in ("qdata", "scale", "act_scale", "act_zero_point")),
    }
    assert not any(key.endswith(("alpha", "beta", "weight_sum")) for key in keys)


@pytest.fixture(scope="module")
def unet() -> nn.Module:
    """Every layer quantized: 8, 4 and 2 bits in turn, two groups where the model splits."""
    unet = original.make_unet(original.TINY_CONFIG, dtype=torch.float16)
    splits = original.split_points(unet)
    for i, (name, module) in enumerate(original.quantizable(unet).items()):
        channels = module.weight.shape[1]
        groups = [splits[name], channels - splits[name]] if name in splits else None
        set_weight(unet, name, bits=(8, 4, 2)[i % 3], act_scale=0.05, act_zero_point=3, input_groups=groups)
    return unet


def call(unet: nn.Module) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    added = {"text_embeds": torch.randn(2, 16, generator=generator), "time_ids": torch.ones(2, 6)}
    sample, text = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 5, 24, generator=generator)
    unet.float()
    with torch.inference_mode():
        return unet(sample, 1, text, added_cond_kwargs=added).sample


def test_unet_is_built_from_the_file(tmp_path, unet):
    model_file.save(unet, tmp_path / "m.safetensors", metadata={"base": "random"})
    again = model_file.load(tmp_path / "m.safetensors")
    assert type(again) is type(unet) and not again.training
    assert_equal_models(again, unet)
    assert again.config["transformer_layers_per_block"] == unet.config["transformer_layers_per_block"]
    assert torch.equal(call(again), call(unet))
    config = json.loads(TensorFile(tmp_path / "m.safetensors").metadata["config"])
    assert not any(key.startswith("_") for key in config)  # the folder a model came from is nobody's business


class FloatsMade(TorchDispatchMode):
    """Records the largest floating tensor that is made outside the meta device."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point() and tensor.device.type != "meta":
                if type(tensor) is torch.Tensor:
                    self.largest = max(self.largest, tensor.untyped_storage().nbytes())
        return out


def test_loading_never_makes_a_floating_weight(tmp_path, unet):
    model_file.save(unet, tmp_path / "m.safetensors")
    weights = [w for w in unet.state_dict(keep_vars=True).values() if isinstance(w, MixDQTensor)]
    stored = max(tensor.nbytes for w in weights for name, tensor in w.stored_tensors().items() if name != "qdata")
    with FloatsMade() as made:
        model_file.load(tmp_path / "m.safetensors")
    assert 0 < made.largest <= 2 * stored < max(w.numel() for w in weights)  # beta is computed in double


def test_a_failing_load_leaves_the_model_alone(tmp_path):
    model = quantized_small()
    model_file.save(model, tmp_path / "m.safetensors")
    torch.manual_seed(9)
    target = Small()
    target.bos = nn.Linear(6, 8, bias=False)
    before = {name: value.clone() for name, value in target.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"'bos.weight': shape must be the model's \[8, 6\]; found \[4, 6\]"):
        model_file.load(tmp_path / "m.safetensors", model=target)
    assert all(torch.equal(value, before[name]) for name, value in target.state_dict().items())


def test_progress_counts_bytes(tmp_path):
    model_file.save(quantized_small(), tmp_path / "m.safetensors")
    calls = []
    model_file.load(tmp_path / "m.safetensors", model=Small(), progress=lambda *call: calls.append(call))
    total = sum(entry.nbytes for entry in TensorFile(tmp_path / "m.safetensors").entries.values())
    assert calls[-1] == (total, total)
    assert [done for done, _ in calls] == sorted({done for done, _ in calls})


def test_slow_loading_shows_a_bar_on_a_terminal(tmp_path, monkeypatch, capsys):
    model_file.save(quantized_small(), tmp_path / "m.safetensors")
    model_file.load(tmp_path / "m.safetensors", model=Small())
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("mixdq_ao.progress.DELAY_SECONDS", -1.0)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    model_file.load(tmp_path / "m.safetensors", model=Small())
    assert "Loading" in capsys.readouterr().err


def test_compiled_model_saves_under_its_own_names(tmp_path):
    model = quantized_small()
    model_file.save(torch.compile(model, backend="eager"), tmp_path / "m.safetensors")
    assert_equal_models(model_file.load(tmp_path / "m.safetensors", model=Small()), model)


def test_unbuildable_models_say_what_to_do(tmp_path):
    model_file.save(quantized_small(), tmp_path / "m.safetensors")
    with pytest.raises(CheckpointError, match="must be one of UNet2DConditionModel, .*; found Small. Build"):
        model_file.load(tmp_path / "m.safetensors")


@pytest.mark.parametrize(
    "change, text",
    [
        (lambda m: m.to("meta"), "on the meta device, without values"),
        (lambda m: m.register_buffer("odd", torch.zeros(1, dtype=torch.complex64)), "'odd': cannot save a Tensor of"),
        (lambda m: m.norm.weight.data.fill_(float("nan")), "'norm.weight': values must be finite"),
    ],
)
def test_save_refuses(tmp_path, change, text):
    model = quantized_small()
    change(model)
    with pytest.raises(MixDQError, match=text):
        model_file.save(model, tmp_path / "m.safetensors")
    assert not list(tmp_path.iterdir())


def test_save_refuses_metadata_that_is_not_text(tmp_path):
    with pytest.raises(MixDQError, match="metadata must map strings to strings; found {'a': 1}"):
        model_file.save(Small(), tmp_path / "m.safetensors", metadata={"a": 1})


def test_describe_model(tmp_path):
    model_file.save(quantized_small(), tmp_path / "m.safetensors", metadata={"base": "random"})
    found = model_file.describe(tmp_path / "m.safetensors")
    rows = {row.name: row for row in found.rows}
    assert found.kind == "model" and found.metadata == {"class_name": "Small", "base": "random"}
    assert (rows["split"].bits, rows["split"].act_bits, rows["split"].groups) == ((4,), (4,), 2)
    assert rows["split"].nbytes == 3 * 3 * 9 + 2 * 3 * 4 + 2 * 2 * 4  # codes, scales, activation parameters
    assert (rows["weight_only"].bits, rows["weight_only"].act_bits) == ((2,), ())
    assert rows["norm"] == model_file.FileRow("norm", (), (), 1, 12, "not a matrix product")
    assert found.nbytes > sum(row.nbytes for row in found.rows)


def test_describe_parameters_and_plan(tmp_path, unet):
    layer = LayerParams({8: torch.ones(2, 3), 4: torch.ones(2, 3)}, {8: torch.ones(2)}, {8: torch.zeros(2)})
    QuantParams({"a": layer}, protect=["a"]).save(tmp_path / "p.safetensors")
    found = model_file.describe(tmp_path / "p.safetensors")
    assert (found.kind, found.nbytes) == ("parameters", 2 * 24 + 2 * 8)
    assert found.rows == [model_file.FileRow("a", (4, 8), (8,), 2, 64)]
    assert found.metadata["protect"] == ["a"]
    BitPlan({"a": 8, "b": None}).write(tmp_path / "plan.yaml")
    assert [row.bits for row in model_file.describe(tmp_path / "plan.yaml").rows] == [(8,), (16,)]


def test_describe_original(tmp_path):
    unet = original.make_unet(original.TINY_CONFIG, device="meta")
    found = model_file.describe(original.write(original.converted_checkpoint(unet), tmp_path / "new_ckpt.pth"))
    assert found.kind == "original parameters" and found.metadata["bos_aware"]
    assert {row.groups for row in found.rows} == {1, 2} and len(found.rows) == len(original.quantizable(unet))
