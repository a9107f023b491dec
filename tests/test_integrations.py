"""Quantized UNets in the hands of diffusers, peft, accelerate and torch itself."""

import copy
import importlib
import io
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models import run_unet
from original import TINY_CONFIG, make_unet
from torch import nn

import mixdq_ao
from mixdq_ao import MixDQConfig, MixDQTensor, UnsupportedError, integrations, quantize_, summary
from mixdq_ao.families import layers_of
from mixdq_ao.integrations import _imports
from mixdq_ao.integrations.diffusers import portable_config

diffusers = pytest.importorskip("diffusers")
from diffusers import UNet2DConditionModel  # noqa: E402


def inputs(dtype=torch.float32) -> dict:
    """A batch of two whose first text token is always the same."""
    g = torch.Generator().manual_seed(1)
    text = torch.randn(2, 7, TINY_CONFIG["cross_attention_dim"], generator=g)
    text[:, 0] = 3.0
    added = {"text_embeds": torch.randn(2, 16, generator=g).to(dtype), "time_ids": torch.full((2, 6), 8.0).to(dtype)}
    return {
        "sample": torch.randn(2, 4, 8, 8, generator=g).to(dtype),
        "timestep": torch.tensor(999.0),
        "encoder_hidden_states": text.to(dtype),
        "added_cond_kwargs": added,
    }


@pytest.fixture(scope="module")
def floating():
    return make_unet(TINY_CONFIG)


@pytest.fixture(scope="module")
def params(floating):
    with mixdq_ao.observe(floating) as recorder:
        run_unet(floating, **inputs())
    return recorder.params()


def mixed_bits(model) -> dict[str, int]:
    return {name: (8, 4, 2)[i % 3] for i, name in enumerate(layers_of(model))}


@pytest.fixture(scope="module")
def static(floating, params):
    """A UNet with layers of all widths, split shortcuts, BOS, and two floating layers. Not to be changed."""
    unet = copy.deepcopy(floating)
    quantize_(unet, MixDQConfig(params, weight_bits=mixed_bits(unet), protect=["conv_in", "conv_out"]))
    return unet


@pytest.fixture
def unet(static):
    return copy.deepcopy(static)


@pytest.fixture(scope="module")
def expected(static):
    return run_unet(static, **inputs())


def inner_tensors(model) -> dict[str, torch.Tensor]:
    found = {}
    for name, p in model.named_parameters():
        parts = (
            {part: getattr(p, part) for part in p.__tensor_flatten__()[0]} if isinstance(p, MixDQTensor) else {"": p}
        )
        found |= {f"{name}.{part}": t for part, t in parts.items()}
    return found


def assert_same_parameters(a, b) -> None:
    a, b = inner_tensors(a), inner_tensors(b)
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]), name


def sqnr(expected, actual) -> float:
    return float(10 * torch.log10(expected.square().mean() / (expected - actual).square().mean()))


def python(code: str) -> str:
    """The output of a fresh interpreter, which must print nothing on stderr."""
    # torchao would say that the tests' own settings keep it from loading its libraries.
    environment = {key: value for key, value in os.environ.items() if key != "TORCHAO_FORCE_SKIP_LOADING_SO_FILES"}
    folder = Path(mixdq_ao.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=folder, env=environment)
    assert done.returncode == 0 and not done.stderr, done.stderr
    return done.stdout


# --- importing --------------------------------------------------------------------------------------------------------


def test_import_is_lean_and_quiet():
    code = """
import sys, mixdq_ao, torch
heavy = ("diffusers", "peft", "transformers", "accelerate", "matplotlib", "torchmetrics", "rich")
print(sorted(set(heavy) & set(sys.modules)), torch.cuda.is_initialized())
sys.stderr = None  # what the others say is theirs
import diffusers.loaders.peft as d, peft.tuners.lora.model as p
print(d.PeftAdapterMixin.fuse_lora.mixdq_wrapped, p.dispatch_torchao.mixdq_wrapped)
"""
    assert python(code) == "[] False\nTrue True\n"


def test_works_without_the_other_libraries():
    code = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("diffusers", "peft", "accelerate", "transformers"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
import mixdq_ao, torch
model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2)).eval()
x = torch.ones(4, 8)
with mixdq_ao.observe(model) as recorder, torch.no_grad():
    model(x)
mixdq_ao.quantize_(model, mixdq_ao.MixDQConfig(recorder.params()))
with torch.no_grad():
    print(tuple(model(x).shape), mixdq_ao.summary(model).totals().splitlines()[0])
try:
    import peft
except ModuleNotFoundError as error:
    print(error)
"""
    assert python(code) == "(4, 2) 2 layers: 2 with 8-bit weights\nNo module named 'peft'\n"


def test_register_is_idempotent():
    from torchao.core.config import ALLOWED_AO_MODULES
    from torchao.prototype.safetensors import safetensors_support, safetensors_utils

    integrations.register()
    integrations.register()
    assert "mixdq_ao" in ALLOWED_AO_MODULES
    # A prototype of torchao's: if this fails, integrations/torchao.py must follow where the lists have gone.
    assert safetensors_utils.ALLOWED_CLASSES["MixDQTensor"] is MixDQTensor
    assert safetensors_utils.ALLOWED_TENSORS_SUBCLASSES.count("MixDQTensor") == 1
    assert safetensors_support.ALLOWED_TENSORS_SUBCLASSES is safetensors_utils.ALLOWED_TENSORS_SUBCLASSES
    assert len(mixdq_ao.config.after_quantize) == 1
    lora = importlib.import_module("peft.tuners.lora.model")
    assert not hasattr(lora.dispatch_torchao.__wrapped__, "mixdq_wrapped")


def test_when_imported(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "mixdq_late.py").write_text("value = 1\n")
    (tmp_path / "mixdq_early.py").write_text("value = 2\n")
    seen = []
    _imports.when_imported("mixdq_late", lambda m: seen.append(m.value))
    _imports.when_imported("mixdq_absent", lambda m: seen.append(m.value))
    importlib.import_module("mixdq_early")
    assert not seen
    _imports.when_imported("mixdq_early", lambda m: seen.append(m.value))
    importlib.import_module("mixdq_late")
    importlib.reload(sys.modules["mixdq_late"])
    assert seen == [2, 1]
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("mixdq_absent")


# --- diffusers: save_pretrained and from_pretrained -------------------------------------------------------------------


@pytest.mark.parametrize("shards", [{}, {"max_shard_size": "50KB"}])
def test_stock_from_pretrained(tmp_path, static, expected, shards):
    static.save_pretrained(tmp_path, **shards)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 2) is bool(shards)
    loaded = UNet2DConditionModel.from_pretrained(tmp_path, torch_dtype=torch.float32)
    assert_same_parameters(static, loaded)
    assert torch.equal(run_unet(loaded, **inputs()), expected)
    kinds = {(type(m), m.weight.bits) for m in layers_of(loaded).values() if isinstance(m.weight, MixDQTensor)}
    assert kinds == {(kind, bits) for kind in (nn.Linear, nn.Conv2d) for bits in (8, 4, 2)}
    loaded.save_pretrained(tmp_path / "again")
    again = UNet2DConditionModel.from_pretrained(tmp_path / "again", torch_dtype=torch.float32)
    assert_same_parameters(static, again)


@pytest.mark.parametrize("act_bits", [8, None])
def test_stock_from_pretrained_without_static_activations(tmp_path, floating, act_bits):
    unet = copy.deepcopy(floating)
    quantize_(unet, MixDQConfig(weight_bits=4, act_bits=act_bits))
    unet.save_pretrained(tmp_path)
    loaded = UNet2DConditionModel.from_pretrained(tmp_path, torch_dtype=torch.float32)
    assert torch.equal(run_unet(loaded, **inputs()), run_unet(unet, **inputs()))


def test_loading_in_half_precision(tmp_path, static):
    static.save_pretrained(tmp_path)
    loaded = UNet2DConditionModel.from_pretrained(tmp_path, torch_dtype=torch.float16)
    assert loaded.conv_in.weight.dtype == loaded.mid_block.resnets[0].conv1.bias.dtype == torch.float16
    output = run_unet(loaded, **inputs(dtype=torch.float16))
    assert output.dtype == torch.float16 and output.isfinite().all()
    quantized = loaded.mid_block.resnets[0].conv1.weight
    assert quantized.scale.dtype == quantized.act_scale.dtype == torch.float32


def test_a_model_from_one_file_saves_itself_too(tmp_path, static, expected):
    mixdq_ao.save(static, tmp_path / "unet.safetensors")
    loaded = mixdq_ao.load(tmp_path / "unet.safetensors")
    assert repr(loaded) == repr(static)
    again = through_diffusers(loaded, tmp_path / "folder")
    assert_same_parameters(static, again)
    assert torch.equal(run_unet(again, **inputs()), expected)


def test_the_stored_config_has_no_paths_and_no_tensors(tmp_path, static, params):
    static.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert stored["quant_method"] == "torchao"
    data = stored["quant_type"]["default"]["_data"]
    assert data["checkpoint"] is None and data["bos"] is None and data["act_bits"] == 8
    assert data["protect"] == ["conv_in", "conv_out"]
    bits = mixed_bits(static) | {"conv_in": None, "conv_out": None}
    assert data["weight_bits"] == bits


def test_portable_config_of_equal_layers(floating):
    unet = copy.deepcopy(floating)
    quantize_(unet, MixDQConfig(weight_bits=4, act_bits=None))
    assert portable_config(unet) == MixDQConfig(weight_bits=4, act_bits=None)
    again = copy.deepcopy(floating)
    quantize_(again, portable_config(unet))
    assert_same_parameters(unet, again)


def test_other_models_get_no_quantizer():
    model = nn.Sequential(nn.Linear(4, 4))
    quantize_(model, MixDQConfig())
    assert not hasattr(model, "hf_quantizer")


def test_another_unet_from_the_same_config(static):
    assert "quantization_config" in static.config
    other = UNet2DConditionModel.from_config(static.config)
    assert not any(isinstance(p, MixDQTensor) for p in other.parameters())


def test_dequantize(unet, expected):
    unet.dequantize()
    assert not any(isinstance(p, MixDQTensor) for p in unet.parameters())
    assert "int" not in repr(unet.conv_in) + repr(unet.mid_block.resnets[0].conv1)
    assert (
        mixdq_ao.evaluate_sqnr(expected, run_unet(unet, **inputs())) > 10 if hasattr(mixdq_ao, "evaluate_sqnr") else 1
    )


def test_quantizing_while_loading_explains_itself(tmp_path, floating):
    floating.save_pretrained(tmp_path)
    config = diffusers.TorchAoConfig(MixDQConfig(weight_bits=4))
    with pytest.raises(UnsupportedError, match=r"Use mixdq_ao\.quantize_\(model, config\)"):
        UNet2DConditionModel.from_pretrained(tmp_path, torch_dtype=torch.float32, quantization_config=config)


def test_quantizing_while_loading_a_pipeline_explains_itself(tmp_path):
    unet = diffusers.UNet2DModel(
        block_out_channels=(8,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), norm_num_groups=4
    )
    diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler()).save_pretrained(tmp_path)
    config = diffusers.PipelineQuantizationConfig(quant_mapping={"unet": diffusers.TorchAoConfig(MixDQConfig())})
    with pytest.raises(UnsupportedError, match=r"Use mixdq_ao\.quantize_\(model, config\)"):
        diffusers.DDPMPipeline.from_pretrained(tmp_path, torch_dtype=torch.float32, quantization_config=config)


def test_a_pipeline_saves_and_loads_a_quantized_unet(tmp_path):
    unet = diffusers.UNet2DModel(
        block_out_channels=(8,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), norm_num_groups=4
    )
    quantize_(unet, MixDQConfig(weight_bits=4))
    diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler()).save_pretrained(tmp_path)
    loaded = diffusers.DDPMPipeline.from_pretrained(tmp_path, torch_dtype=torch.float32)
    assert_same_parameters(unet, loaded.unet)


# --- peft: LoRA -------------------------------------------------------------------------------------------------------

LORA_TARGETS = ["to_q", "to_out.0", "ff.net.2", "conv1", "conv2", "conv_shortcut", "conv_in"]


def lora_config(**kwargs):
    peft = pytest.importorskip("peft")
    return peft.LoraConfig(r=4, lora_alpha=2, target_modules=LORA_TARGETS, **kwargs)


def lora_layers(unet) -> dict[str, nn.Module]:
    return {name: m for name, m in unet.named_modules() if hasattr(m, "get_base_layer")}


@pytest.fixture
def adapted(unet):
    torch.manual_seed(3)
    unet.add_adapter(lora_config(init_lora_weights=False))
    return unet.eval()


def test_a_new_lora_changes_nothing(unet, expected):
    unet.add_adapter(lora_config())
    assert torch.equal(run_unet(unet, **inputs()), expected)


def test_lora_on_linear_and_conv(adapted, expected):
    from peft.tuners import lora

    layers = lora_layers(adapted)
    assert {type(m) for m in layers.values()} == {lora.Linear, lora.Conv2d}
    assert sum(isinstance(m.get_base_layer().weight, MixDQTensor) for m in layers.values()) == len(layers) - 1
    for module in (
        adapted.mid_block.resnets[0].conv1,
        adapted.mid_block.attentions[0].transformer_blocks[0].attn1.to_q,
    ):
        base = module.get_base_layer()
        x = (
            torch.randn(2, base.weight.shape[1], 6, 6)
            if base.weight.dim() == 4
            else torch.randn(2, 5, base.in_features)
        )
        with torch.no_grad():
            delta = module.lora_B["default"](module.lora_A["default"](x)) * module.scaling["default"]
            assert torch.equal(module(x), base(x) + delta) and delta.abs().max() > 0
    changed = run_unet(adapted, **inputs())
    assert not torch.allclose(changed, expected, atol=1e-2)
    adapted.disable_lora()
    assert torch.equal(run_unet(adapted, **inputs()), expected)
    adapted.enable_lora()
    assert torch.equal(run_unet(adapted, **inputs()), changed)
    adapted.delete_adapters("default")
    assert torch.equal(run_unet(adapted, **inputs()), expected)


def test_load_lora_adapter(tmp_path, adapted, static):
    changed = run_unet(adapted, **inputs())
    adapted.save_lora_adapter(tmp_path, weight_name="lora.safetensors")
    for unet in (copy.deepcopy(static), through_diffusers(static, tmp_path / "unet")):
        unet.load_lora_adapter(str(tmp_path), prefix=None, weight_name="lora.safetensors", adapter_name="style")
        assert torch.equal(run_unet(unet, **inputs()), changed)
        unet.unload_lora()
        assert_same_parameters(unet, static)


def through_diffusers(unet, path):
    unet.save_pretrained(path)
    return UNet2DConditionModel.from_pretrained(path, torch_dtype=torch.float32)


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_fuse_lora_is_refused_before_anything_changes(adapted, scale):
    before, weight = run_unet(adapted, **inputs()), adapted.conv_in.get_base_layer().weight.clone()
    for safe in (False, True):
        with pytest.raises(UnsupportedError, match=r"cannot be fused into a quantized weight.*before quantize_\(\)"):
            adapted.fuse_lora(lora_scale=scale, safe_fusing=safe)
        assert torch.equal(adapted.conv_in.get_base_layer().weight, weight)
        assert not any(m.merged for m in lora_layers(adapted).values())
        assert torch.equal(run_unet(adapted, **inputs()), before)


def test_a_single_layer_refuses_to_merge(adapted):
    layer = adapted.mid_block.resnets[0].conv1
    for safe in (False, True):
        with pytest.raises(UnsupportedError):
            layer.merge(safe_merge=safe)
        assert not layer.merged


def test_merging_through_peft_is_refused():
    peft = pytest.importorskip("peft")
    model = nn.Sequential(nn.Linear(8, 8), nn.Conv2d(3, 3, 1), nn.Linear(8, 4))
    quantize_(model, MixDQConfig(protect=["0"]))
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["0", "1", "2"], init_lora_weights=False))
    before = adapted.base_model.model[0].get_base_layer().weight.clone()
    for merge in (adapted.merge_and_unload, adapted.merge_adapter):
        with pytest.raises(UnsupportedError, match="1: a LoRA cannot be fused"):
            merge()
        assert torch.equal(adapted.base_model.model[0].get_base_layer().weight, before)
    assert isinstance(adapted.unload()[1].weight, MixDQTensor)


def test_fusing_into_floating_and_other_torchao_layers_still_works(floating):
    peft = pytest.importorskip("peft")
    torchao = importlib.import_module("torchao.quantization")
    unet = copy.deepcopy(floating)
    unet.add_adapter(lora_config(init_lora_weights=False))
    before = run_unet(unet, **inputs())
    unet.fuse_lora()
    torch.testing.assert_close(run_unet(unet, **inputs()), before, atol=1e-4, rtol=1e-4)
    model = nn.Sequential(nn.Linear(32, 32))
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
    with pytest.warns(UserWarning, match="get_apply_tensor_subclass"):
        adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["0"]))
    assert type(adapted.base_model.model[0]).__name__ == "TorchaoLoraLinear"


def test_a_lora_from_before_quantize(floating, params):
    unet = copy.deepcopy(floating)
    unet.add_adapter(lora_config(init_lora_weights=False))
    before = run_unet(unet, **inputs())
    quantize_(unet, MixDQConfig(params))
    assert not any(isinstance(p, MixDQTensor) for name, p in unet.named_parameters() if "lora_" in name)
    assert all(isinstance(m.get_base_layer().weight, MixDQTensor) for m in lora_layers(unet).values())
    assert sqnr(before, run_unet(unet, **inputs())) > 20
    with pytest.raises(UnsupportedError):
        unet.fuse_lora()


# --- fusing projections, offloading -----------------------------------------------------------------------------------


def test_fuse_qkv_projections_explains_itself(unet, expected):
    with pytest.raises(UnsupportedError, match=r"before quantize_\(\).*fuse_qkv_projections"):
        unet.fuse_qkv_projections()
    assert torch.equal(run_unet(unet, **inputs()), expected)


def test_fuse_qkv_projections_before_quantize(floating):
    unet = copy.deepcopy(floating)
    unet.fuse_qkv_projections()
    before = run_unet(unet, **inputs())
    quantize_(unet, MixDQConfig())
    assert isinstance(unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_qkv.weight, MixDQTensor)
    assert sqnr(before, run_unet(unet, **inputs())) > 20


def test_a_file_with_fused_projections_needs_a_model_like_it(floating, tmp_path):
    unet, path = copy.deepcopy(floating), tmp_path / "fused.safetensors"
    unet.fuse_qkv_projections()
    quantize_(unet, MixDQConfig())
    mixdq_ao.save(unet, path)
    with pytest.raises(mixdq_ao.MixDQError, match="to_qkv.weight.*fused projections or a LoRA.*model="):
        mixdq_ao.load(path)
    like_it = copy.deepcopy(floating)
    like_it.fuse_qkv_projections()
    assert torch.equal(run_unet(mixdq_ao.load(path, model=like_it), **inputs()), run_unet(unet, **inputs()))


def test_sequential_offload(unet, static, expected):
    accelerate = pytest.importorskip("accelerate")
    accelerate.cpu_offload(unet, execution_device=torch.device("cpu"), offload_buffers=True)
    assert unet.mid_block.resnets[0].conv1.weight.is_meta
    for _ in range(2):
        assert torch.equal(run_unet(unet, **inputs()), expected)
    accelerate.hooks.remove_hook_from_submodules(unet)
    assert_same_parameters(unet, static)


@pytest.mark.parametrize("offload_type", ["leaf_level", "block_level"])
def test_group_offload(unet, expected, offload_type):
    cpu = torch.device("cpu")
    blocks = {"num_blocks_per_group": 1} if offload_type == "block_level" else {}
    unet.enable_group_offload(onload_device=cpu, offload_device=cpu, offload_type=offload_type, **blocks)
    for _ in range(2):
        assert torch.equal(run_unet(unet, **inputs()), expected)


# --- what torch does to models ----------------------------------------------------------------------------------------


def test_deepcopy_and_pickle(static, expected):
    for other in (copy.deepcopy(static), pickle.loads(pickle.dumps(static))):
        assert_same_parameters(static, other)
        assert repr(other) == repr(static)
        assert torch.equal(run_unet(other, **inputs()), expected)
        other.mid_block.resnets[0].conv1.weight.qdata.zero_()
        assert torch.equal(run_unet(static, **inputs()), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_casting(unet, static, dtype):
    unet.half() if dtype == torch.float16 else unet.to(dtype)
    assert {p.dtype for p in unet.parameters()} == {dtype}
    w, original = (u.mid_block.resnets[0].conv1.weight for u in (unet, static))
    for part in ("qdata", "scale", "act_scale", "act_zero_point", "alpha", "beta"):
        assert torch.equal(getattr(w, part), getattr(original, part)), part
    assert run_unet(unet, **inputs(dtype=dtype)).dtype == dtype


def test_memory_format(unet, expected):
    unet.to(memory_format=torch.channels_last)
    weight = unet.mid_block.resnets[0].conv1.weight
    assert weight.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(run_unet(unet, **inputs()), expected, atol=1e-3, rtol=1e-3)


def test_meta_and_back(unet, static, expected):
    state = static.state_dict()
    unet.to("meta")
    assert all(t.is_meta for t in inner_tensors(unet).values())
    unet.to_empty(device="cpu")
    assert not any(t.is_meta for t in inner_tensors(unet).values())
    unet.load_state_dict(state)
    assert_same_parameters(unet, static)
    assert torch.equal(run_unet(unet, **inputs()), expected)


def test_state_dict(floating, static, expected):
    file = io.BytesIO()
    torch.save(static.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    unet = copy.deepcopy(floating)
    with pytest.raises(RuntimeError, match="needs assign=True"):
        unet.load_state_dict(state)
    unet = copy.deepcopy(floating)
    unet.load_state_dict(state, assign=True)
    assert torch.equal(run_unet(unet, **inputs()), expected)
    empty = copy.deepcopy(floating).to("meta")
    empty.load_state_dict(state, assign=True)
    assert torch.equal(run_unet(empty, **inputs()), expected)


def test_summary_counts_a_loaded_model(tmp_path, static):
    loaded = through_diffusers(static, tmp_path)
    assert summary(loaded).quantized_bytes == summary(static).quantized_bytes
