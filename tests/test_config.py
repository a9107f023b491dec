"""``MixDQConfig`` and ``quantize_``: every rule, and that nothing is changed once one is broken."""

import copy
import json
import re
import warnings
from collections import OrderedDict

import original
import pytest
import torch
import torch.nn.functional as F
import torchao
import yaml
from models import run_unet, tiny_sdxl_unet, unet_inputs
from torch import nn
from torchao.core.config import config_from_dict, config_to_dict
from torchao.quantization import FqnToConfig

import mixdq_ao
from mixdq_ao import (
    BitPlan,
    CheckpointError,
    MixDQConfig,
    MixDQError,
    MixDQLayerConfig,
    MixDQTensor,
    PlanError,
    QuantParams,
    UnsupportedError,
    quantize_,
)
from mixdq_ao.checkpoint import LayerParams, model_hash
from mixdq_ao.families import layer_shapes, layers_of, split_points

SHORTCUT = "up_blocks.0.resnets.0.conv_shortcut"
TEXT = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"


class Net(nn.Module):
    """One layer of each kind that there is."""

    def __init__(self, grouped: bool = False):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.body = nn.Sequential(nn.Linear(8, 16), nn.SiLU(), nn.Linear(16, 4, bias=False))
        self.grouped = nn.Conv2d(8, 8, 1, groups=2) if grouped else nn.Identity()

    def forward(self, x):
        return self.body(self.grouped(self.conv(x)).mean((2, 3)))


NAMES = ["conv", "body.0", "body.2"]
X = torch.linspace(-1, 1, 2 * 3 * 5 * 5).view(2, 3, 5, 5)


def weights(model) -> dict[str, MixDQTensor]:
    """The quantized weights of ``model`` by layer."""
    return {n: m.weight for n, m in layers_of(model).items() if isinstance(m.weight, MixDQTensor)}


def bits(model) -> dict[str, tuple[int, int | None, str]]:
    return {name: (w.bits, w.act_bits, w.activation) for name, w in weights(model).items()}


def params_of(model, **changes) -> QuantParams:
    """Plausible parameters for ``model``, with two groups for the shortcuts that join a skip connection."""
    points, layers = split_points(model), {}
    for position, (name, module) in enumerate(layers_of(model).items()):
        groups = points.get(name, [module.weight.shape[1]])
        parts = module.weight.detach().split(groups, 1)
        high = torch.stack([p.abs().amax(tuple(range(1, p.dim()))) for p in parts]) + 1e-3
        ones = torch.ones(len(groups))
        layers[name] = LayerParams(
            weight_scale={b: high / (2 ** (b - 1) - 1) for b in (2, 4, 8)},
            act_scale={8: ones * (0.02 + 0.001 * (position % 7)), 4: ones * 0.4},
            act_zero_point={8: ones * -3, 4: ones},
        )
    return QuantParams(layers, **{"source": "params.safetensors"} | changes)


@pytest.fixture(scope="module")
def floating():
    return tiny_sdxl_unet()


@pytest.fixture(scope="module")
def unet_params(floating):
    return params_of(floating)


@pytest.fixture
def unet(floating):
    return copy.deepcopy(floating)


def refuse(model, config, error, *texts, **kwargs) -> None:
    """``quantize_`` raises ``error`` with all of ``texts`` in its message and leaves ``model`` as it was."""
    before = {name: (m.weight, m.weight.clone()) for name, m in layers_of(model).items()}
    with pytest.raises(error) as caught:
        quantize_(model, config, **kwargs)
    for text in texts:
        assert text in str(caught.value)
    for name, m in layers_of(model).items():
        assert m.weight is before[name][0] and torch.equal(m.weight, before[name][1]), f"{name} was changed"
        assert not hasattr(m, "mixdq_reason"), f"{name} was marked"


# --- widths -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight_bits", [8, 4, 2])
@pytest.mark.parametrize("act_bits, activation", [(8, "dynamic"), (4, "dynamic"), (None, "none")])
def test_one_width_for_all_layers(weight_bits, act_bits, activation):
    model = Net()
    quantize_(model, MixDQConfig(weight_bits=weight_bits, act_bits=act_bits))
    assert bits(model) == dict.fromkeys(NAMES, (weight_bits, act_bits, activation))


def test_defaults_are_8_bits_and_dynamic():
    model = Net()
    expected = model(X)
    quantize_(model, MixDQConfig())
    assert bits(model) == dict.fromkeys(NAMES, (8, 8, "dynamic"))
    torch.testing.assert_close(model(X), expected, atol=0.02, rtol=0)


def test_floating_weights_leave_the_model_alone():
    model = Net()
    quantize_(model, MixDQConfig(weight_bits=None))
    assert not weights(model)
    assert {m.mixdq_reason for m in layers_of(model).values()} == {"floating in uniform 16 bits"}


def test_mappings():
    model = Net()
    config = MixDQConfig(
        weight_bits={"conv": 4, "body.0": None, "body.2": 2}, act_bits={"conv": 4, "body.0": 8, "body.2": None}
    )
    quantize_(model, config)
    assert bits(model) == {"conv": (4, 4, "dynamic"), "body.2": (2, None, "none")}
    assert model.body[0].mixdq_reason == "floating in weight_bits"


@pytest.mark.parametrize("prefix", ["", "model.", "module.model."])
def test_plan_in_yaml(tmp_path, prefix):
    path = tmp_path / "plan.yaml"
    path.write_text(yaml.safe_dump({prefix + name: b for name, b in zip(NAMES, (8, 4, 2), strict=True)}))
    model = Net()
    quantize_(model, MixDQConfig(weight_bits=path))
    assert [b[0] for b in bits(model).values()] == [8, 4, 2]


def test_plan_in_json(tmp_path):
    path = tmp_path / "plan.json"
    BitPlan(dict(zip(NAMES, (2, None, 8), strict=True))).write(path)
    model = Net()
    quantize_(model, MixDQConfig(weight_bits=str(path), act_bits=BitPlan({"conv": 4, "body.2": 8})))
    assert bits(model) == {"conv": (2, 4, "dynamic"), "body.2": (8, 8, "dynamic")}


def test_layers_missing_from_a_plan_of_activations_stay_floating(tmp_path):
    path = tmp_path / "act.yaml"
    path.write_text("model.conv: 8\n")
    model = Net()
    quantize_(model, MixDQConfig(act_bits=path))
    assert list(bits(model)) == ["conv"]
    assert model.body[0].mixdq_reason == f"not in {path}"


def test_layers_missing_from_a_plan_of_weights_are_listed():
    refuse(Net(), MixDQConfig(weight_bits={"conv": 8}), PlanError, "2 layers", "body.0, body.2", "null")


@pytest.mark.parametrize("what", ["weight_bits", "act_bits"])
def test_names_that_the_model_lacks_are_listed(what):
    plan = dict.fromkeys([*NAMES, "body.1", "tail"], 8)
    refuse(Net(), MixDQConfig(**{what: plan}), PlanError, what, "2 names", "body.1, tail")


def test_long_lists_of_names_are_cut():
    names = [f"layer{i:02}" for i in range(20)]
    refuse(Net(), MixDQConfig(protect=names), PlanError, "layer00, layer01", "layer07 and 12 more")


@pytest.mark.parametrize(
    "config, found",
    [
        ({"weight_bits": 3}, "3"),
        ({"weight_bits": 16}, "16"),
        ({"weight_bits": True}, "True"),
        ({"weight_bits": 8.0}, "8.0"),
        ({"act_bits": 2}, "2"),
        ({"act_bits": False}, "False"),
        ({"act_bits": [8]}, "[8]"),
        ({"checkpoint": 7}, "int"),
        ({"bos": True}, "True"),
        ({"bos": 1}, "1"),
    ],
)
def test_arguments_that_a_config_refuses(config, found):
    with pytest.raises(MixDQError, match=re.escape(f"found {found}")):
        MixDQConfig(**config)


@pytest.mark.parametrize(
    "config, found",
    [
        ({"weight_bits": {"conv": 3, "body.0": 8, "body.2": 8}}, "3"),
        ({"act_bits": {"conv": 2}}, "2"),
        ({"act_bits": {"conv": 5}}, "5"),
    ],
)
def test_widths_that_a_mapping_may_not_have(config, found):
    refuse(Net(), MixDQConfig(**config), PlanError, f"found {found}")


@pytest.mark.parametrize("bits", [3, 16, True])
def test_layer_config_refuses_widths(bits):
    with pytest.raises(PlanError, match="weight bits"):
        MixDQLayerConfig(bits)
    with pytest.raises(PlanError, match="activation bits"):
        MixDQLayerConfig(act_bits=2)


def test_missing_files(tmp_path):
    for what in ("checkpoint", "weight_bits", "act_bits", "protect", "bos"):
        config = MixDQConfig(**{what: tmp_path / "none.yaml"})
        refuse(Net(), config, CheckpointError, "none.yaml", "the file must exist")


# --- protect, filter, device ------------------------------------------------------------------------------------------


def test_protect_list_and_file(tmp_path):
    path = tmp_path / "protect.json"
    path.write_text(json.dumps(["model.conv", "model.body.2"]))
    for protect in (["conv", "body.2"], ("conv", "body.2"), {"conv", "body.2"}, path, str(path)):
        model = Net()
        quantize_(model, MixDQConfig(protect=protect))
        assert list(weights(model)) == ["body.0"]
        assert model.conv.mixdq_reason == "protected"


def test_protect_names_that_the_model_lacks(tmp_path):
    path = tmp_path / "protect.txt"
    path.write_text("conv\nhead\n")
    refuse(Net(), MixDQConfig(protect=path), PlanError, str(path), "head")
    refuse(Net(), MixDQConfig(protect=["head"]), PlanError, "protect", "head")


def test_the_checkpoint_protects_too():
    model = Net()
    quantize_(model, MixDQConfig(params_of(model, protect=["conv"]), protect=["body.0"]))
    assert list(weights(model)) == ["body.2"]


def test_filter_fn():
    seen, model = [], Net()

    def only_linear(module, name):
        seen.append(name)
        return isinstance(module, nn.Linear)

    quantize_(model, MixDQConfig(), filter_fn=only_linear)
    assert seen == NAMES
    assert list(weights(model)) == ["body.0", "body.2"]
    assert model.conv.mixdq_reason == "left out by filter_fn"


def test_a_layer_left_out_needs_nothing():
    model = Net(grouped=True)
    params = params_of(model)
    del params.layers["conv"], params.layers["grouped"]
    quantize_(model, MixDQConfig(params), filter_fn=lambda module, name: name.startswith("body"))
    assert list(weights(model)) == ["body.0", "body.2"]


def test_device():
    model = Net()
    quantize_(model, MixDQConfig(weight_bits={"conv": None, "body.0": 8, "body.2": 4}), device="meta")
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert {t.qdata.device.type for t in weights(model).values()} == {"meta"}


def test_a_model_on_the_meta_device():
    model = Net().to("meta")
    quantize_(model, MixDQConfig(params_of(Net()), weight_bits=4))
    assert bits(model) == dict.fromkeys(NAMES, (4, 8, "static"))


# --- checkpoints ------------------------------------------------------------------------------------------------------


def test_parameters_from_an_object_and_from_files(tmp_path):
    model = Net()
    params = params_of(model)
    params.save(tmp_path / "ours.safetensors")
    quantize_(model, MixDQConfig(params))
    assert bits(model) == dict.fromkeys(NAMES, (8, 8, "static"))
    for name, w in weights(model).items():
        layer = params.layers[name]
        assert torch.equal(w.scale, layer.weight_scale[8])
        assert torch.equal(w.act_scale, layer.act_scale[8]) and torch.equal(w.act_zero_point, layer.act_zero_point[8])
    other = Net()
    quantize_(other, MixDQConfig(tmp_path / "ours.safetensors"))
    assert torch.equal(model(X), other(X))


def test_a_model_shares_no_memory_with_its_parameters():
    model, other = Net(), Net()
    params = params_of(model)
    quantize_(model, MixDQConfig(params))
    quantize_(other, MixDQConfig(params, protect=["conv"]))
    before = model(X)
    for w in weights(other).values():
        for name in w.__tensor_flatten__()[0]:
            getattr(w, name).zero_()
    assert torch.equal(model(X), before)
    params.validate("params")


def test_parameters_from_the_original_files(tmp_path):
    pictures = []
    for make in (original.raw_checkpoint, original.converted_checkpoint):
        unet = original.make_unet(original.TINY_CONFIG)
        path = original.write(make(unet), tmp_path / "ckpt.pth")
        quantize_(unet, MixDQConfig(path, weight_bits=4, bos=False))
        assert set(bits(unet).values()) == {(4, 8, "static")} and len(weights(unet)) == len(layers_of(unet))
        assert sum(len(w.input_groups) == 2 for w in weights(unet).values()) == 4
        pictures.append(weights(unet)["conv_in"].dequantize())
    torch.testing.assert_close(*pictures, atol=1e-3, rtol=1e-3)  # the converted one is fp16


def test_the_checkpoints_own_plans_are_the_default():
    model = Net()
    plans = {
        "weight_plan": BitPlan({"conv": 4, "body.0": 8, "body.2": 2}),
        "act_plan": BitPlan({"conv": 8, "body.2": 4}),
    }
    params = params_of(model, **plans)
    quantize_(model, MixDQConfig(params))
    assert bits(model) == {"conv": (4, 8, "static"), "body.2": (2, 4, "static")}
    model = Net()
    quantize_(model, MixDQConfig(params, weight_bits=8, act_bits=None))
    assert bits(model) == dict.fromkeys(NAMES, (8, None, "none"))


def test_4_bit_activations_take_their_own_scale():
    model = Net()
    quantize_(model, MixDQConfig(params_of(model), act_bits=4))
    w = weights(model)["conv"]
    assert w.act_scale.tolist() == [pytest.approx(0.4)] and w.act_zero_point.tolist() == [1.0]


def test_checkpoint_names_that_the_model_lacks():
    params = params_of(Net())
    params.layers["head"] = params.layers["conv"]
    refuse(Net(), MixDQConfig(params), PlanError, "params.safetensors", "1 names", "head")


def test_layers_that_the_checkpoint_lacks():
    params = params_of(Net())
    del params.layers["body.0"]
    refuse(Net(), MixDQConfig(params), PlanError, "params.safetensors", "no parameters for layer body.0", "Protect")
    model = Net()
    quantize_(model, MixDQConfig(params, protect=["body.0"]))
    assert list(weights(model)) == ["conv", "body.2"]


def test_scales_of_another_shape():
    params = params_of(Net())
    params.layers["body.2"].weight_scale[8] = torch.ones(1, 5)
    params.layers["body.2"].weight_scale.pop(2), params.layers["body.2"].weight_scale.pop(4)
    refuse(Net(), MixDQConfig(params), MixDQError, "body.2", "must be [1, 4]", "found [1, 5]")


@pytest.mark.parametrize(
    "change, texts",
    [
        (lambda p: p.weight_scale.pop(8), ["no weight scale for 8 bits", "[2, 4]"]),
        (lambda p: (p.act_scale.pop(8), p.act_zero_point.pop(8)), ["no activation scale for 8 bits", "[4]"]),
        (
            lambda p: (p.act_scale.clear(), p.act_zero_point.clear()),
            ["no activation scale for 8 bits", "only for none"],
        ),
    ],
)
def test_widths_that_the_checkpoint_lacks(change, texts):
    params = params_of(Net())
    change(params.layers["body.0"])
    refuse(Net(), MixDQConfig(params), PlanError, "body.0", *texts)


@pytest.mark.parametrize(
    "change, rule",
    [
        (lambda p: p.act_scale[8].fill_(float("nan")), "scales must be finite and positive"),
        (lambda p: p.weight_scale[8].fill_(0), "scales must be finite and positive"),
        (lambda p: p.act_zero_point[8].fill_(200), "zero points must lie in -128..127"),
    ],
)
def test_parameters_in_memory_are_checked_as_a_file_is(change, rule):
    params = params_of(Net())
    change(params.layers["body.2"])
    refuse(Net(), MixDQConfig(params), CheckpointError, "params.safetensors", "body.2", rule)


def test_the_hash_of_another_architecture():
    model = Net()
    params = params_of(model, model_hash=model_hash(layer_shapes(model)))
    quantize_(model, MixDQConfig(params))
    model = Net()
    model.body[0] = nn.Linear(8, 16, bias=False)  # no weight of another shape
    quantize_(model, MixDQConfig(params))
    model = Net()
    model.body[0], model.body[2] = nn.Linear(8, 12), nn.Linear(12, 4)
    refuse(model, MixDQConfig(params), MixDQError, "another architecture", "model_hash")


# --- split shortcuts --------------------------------------------------------------------------------------------------


def test_split_shortcuts(unet, unet_params):
    quantize_(unet, MixDQConfig(unet_params))
    points = split_points(unet)
    assert {n: w.input_groups for n, w in weights(unet).items() if len(w.input_groups) > 1} == points
    assert torch.isfinite(run_unet(unet, **unet_inputs())).all()


def test_split_shortcuts_without_a_checkpoint(unet):
    quantize_(unet, MixDQConfig(weight_bits=4))
    assert weights(unet)[SHORTCUT].input_groups == split_points(unet)[SHORTCUT]


def test_a_shortcut_without_second_half_is_one_group(unet, unet_params):
    layers = dict(unet_params.layers)
    layers[SHORTCUT] = LayerParams(
        {8: layers[SHORTCUT].weight_scale[8][:1]}, {8: torch.tensor([0.02])}, {8: torch.tensor([0.0])}
    )
    quantize_(unet, MixDQConfig(QuantParams(layers)))
    assert weights(unet)[SHORTCUT].input_groups == [128]


def test_groups_where_the_model_joins_nothing():
    model = Net()
    params = params_of(model)
    params.layers["conv"] = LayerParams(
        {8: torch.ones(2, 8)}, {8: torch.tensor([0.1, 0.1])}, {8: torch.tensor([0.0, 0.0])}
    )
    refuse(model, MixDQConfig(params), MixDQError, "conv", "2 input groups", "joins 1")


# --- BOS --------------------------------------------------------------------------------------------------------------


def with_bos(params: QuantParams) -> QuantParams:
    layer = params.layers[TEXT]
    known = LayerParams(
        layer.weight_scale, layer.act_scale, layer.act_zero_point, torch.ones(64), torch.full((64,), 7.0)
    )
    return QuantParams({**params.layers, TEXT: known}, bos_aware=True)


def write_bos(path, unet, names=None):
    outputs = {
        n: torch.full((1, 1, m.out_features), 5.0).half() for n, m in layers_of(unet).items() if "attn2.to_" in n
    }
    outputs = {n: v for n, v in outputs.items() if n.endswith(("to_k", "to_v"))}
    return original.write(outputs if names is None else {n: outputs[n] for n in names}, path)


def test_bos_of_the_checkpoint(unet, unet_params):
    with pytest.warns(UserWarning, match="layers that see it have no BOS output"):
        quantize_(unet, MixDQConfig(with_bos(unet_params)))
    w = weights(unet)[TEXT]
    assert w.bos_input.eq(1).all() and w.bos_output.eq(7).all()
    assert sum(v.bos_output is not None for v in weights(unet).values()) == 1
    x = torch.randn(2, 3, 64)
    x[0, 0] = 1
    y = F.linear(x, unet.get_parameter(TEXT + ".weight"))
    assert y[0, 0].eq(7).all() and not y[1, 0].eq(7).any()


def test_bos_file(tmp_path, unet, unet_params):
    path = write_bos(tmp_path / "bos.pt", unet)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quantize_(unet, MixDQConfig(with_bos(unet_params), bos=path))
    found = {n: w for n, w in weights(unet).items() if w.bos_output is not None}
    assert len(found) == 2 * sum(n.endswith("attn2") for n, _ in unet.named_modules())
    assert all(w.bos_input is None and w.bos_output.eq(5).all() for w in found.values())


def test_bos_off(unet, unet_params):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quantize_(unet, MixDQConfig(with_bos(unet_params), bos=False))
    assert not any(w.bos_output is not None for w in weights(unet).values())


def test_weight_only_layers_need_no_bos(unet, unet_params):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quantize_(unet, MixDQConfig(with_bos(unet_params), act_bits=None))
    assert weights(unet)[TEXT].bos_output is None


def test_bos_file_of_another_model(tmp_path, unet, unet_params):
    original.write({"head": torch.ones(64)}, tmp_path / "bos.pt")
    refuse(unet, MixDQConfig(bos=tmp_path / "bos.pt"), PlanError, "bos.pt", "head")
    original.write({TEXT: torch.ones(63)}, tmp_path / "bos.pt")
    refuse(unet, MixDQConfig(bos=tmp_path / "bos.pt"), MixDQError, TEXT, "bos.pt", "64 values", "found 63")


@pytest.mark.parametrize("bos_input, bos_output, rule", [(16, 9, "output"), (15, 4, "input")])
def test_bos_vectors_of_another_size(bos_input, bos_output, rule):
    params = params_of(Net())
    layer = params.layers["body.2"]
    layer.weight_scale.clear()
    layer.bos_input, layer.bos_output = torch.ones(bos_input), torch.ones(bos_output)
    texts = [f"BOS {rule} of body.2 must have", f"found {bos_input if rule == 'input' else bos_output}"]
    refuse(Net(), MixDQConfig(params), MixDQError, "params.safetensors", *texts)


# --- models that cannot be quantized ----------------------------------------------------------------------------------


def test_grouped_convolutions():
    refuse(Net(grouped=True), MixDQConfig(), UnsupportedError, "grouped", "groups=2", "Protect")
    model = Net(grouped=True)
    quantize_(model, MixDQConfig(protect=["grouped"]))
    assert list(weights(model)) == NAMES


def test_quantizing_twice():
    model = Net()
    quantize_(model, MixDQConfig(protect=["conv"]))
    before = weights(model)
    with pytest.raises(MixDQError, match=r"quantized already \(2 layers, first body.0\)"):
        quantize_(model, MixDQConfig())
    assert {n: id(w) for n, w in before.items()} == {n: id(w) for n, w in weights(model).items()}


def test_a_model_without_layers():
    with pytest.raises(MixDQError, match="SiLU has no nn.Linear or nn.Conv2d"):
        quantize_(nn.SiLU(), MixDQConfig())


def test_another_config():
    with pytest.raises(MixDQError, match="needs a MixDQConfig; found MixDQLayerConfig"):
        quantize_(Net(), MixDQLayerConfig())


def test_weights_that_are_no_plain_floating_tensors():
    model = Net()
    torchao.quantize_(model, torchao.quantization.Int8WeightOnlyConfig())
    before = model.conv.weight
    found = r"body.0: the weight must be a plain floating tensor; found \w+Tensor of"
    with pytest.raises(UnsupportedError, match=found):
        quantize_(model, MixDQConfig())
    assert model.conv.weight is before
    quantize_(model, MixDQConfig(protect=["body.0", "body.2"]))
    assert list(weights(model)) == ["conv"]


def test_weights_that_are_not_finite():
    model = Net()
    with torch.no_grad():
        model.body[2].weight[1, 2] = float("inf")
    refuse(model, MixDQConfig(), MixDQError, "body.2: the weight must be finite")


def test_sums_that_int32_cannot_hold():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(2**16 + 1, 1))
    refuse(model, MixDQConfig(), UnsupportedError, "1: ", "at most 65536 products; found 65537", "Protect")


def test_floating_dtypes():
    for dtype in (torch.float16, torch.bfloat16):
        model = Net().to(dtype)
        quantize_(model, MixDQConfig())
        assert {w.dtype for w in weights(model).values()} == {dtype}
        assert model(X.to(dtype)).dtype == dtype


def test_layers_describe_themselves():
    model = Net()
    quantize_(model, MixDQConfig(weight_bits=4, protect=["body.0"]))
    assert repr(model.conv) == (
        "Conv2d(3, 8, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1), int4 weight, dynamic int8 activations)"
    )
    assert repr(model.body[0]) == repr(Net().body[0])
    copied = copy.deepcopy(model)
    copied.conv.weight = nn.Parameter(copied.conv.weight.dequantize())
    assert repr(copied.conv) == repr(Net().conv) and repr(model.conv) != repr(copied.conv)


# --- torchao's own quantize_ ------------------------------------------------------------------------------------------


def test_torchao_default_filter_takes_linear_layers():
    model = Net()
    torchao.quantize_(model, MixDQLayerConfig(bits=4))
    assert bits(model) == dict.fromkeys(["body.0", "body.2"], (4, 8, "dynamic"))


def test_torchao_filter_for_convolutions():
    model = Net()
    torchao.quantize_(model, MixDQLayerConfig(), filter_fn=lambda m, name: isinstance(m, (nn.Linear, nn.Conv2d)))
    assert list(bits(model)) == NAMES


def test_torchao_fqn_to_config():
    model = Net()
    configs = OrderedDict(
        {
            "conv": MixDQLayerConfig(2, None),
            r"re:body\.0": MixDQLayerConfig(4),
            "body.2.weight": MixDQLayerConfig(8, 4),
        }
    )
    torchao.quantize_(model, FqnToConfig(configs), filter_fn=None)
    assert bits(model) == {"conv": (2, None, "none"), "body.0": (4, 8, "dynamic"), "body.2": (8, 4, "dynamic")}


def test_torchao_static_layer_config():
    model = Net()
    config = MixDQLayerConfig(act_scale=torch.tensor(0.02), act_zero_point=torch.tensor(-3.0))
    torchao.quantize_(model, FqnToConfig(OrderedDict({"conv": config})), filter_fn=None)
    assert bits(model) == {"conv": (8, 8, "static")}


def test_torchao_whole_model():
    model, other = Net(), Net()
    params = params_of(model)
    torchao.quantize_(model, MixDQConfig(params), filter_fn=lambda m, name: name == "")
    quantize_(other, MixDQConfig(params))
    assert torch.equal(model(X), other(X))


def test_torchao_default_filter_with_the_config_of_a_model():
    model = Net()
    with pytest.raises(
        UnsupportedError, match=r"MixDQConfig is for a whole model.*mixdq_ao\.quantize_\(model, config\)"
    ):
        torchao.quantize_(model, MixDQConfig())
    assert not weights(model)


def test_torchao_layer_config_on_other_modules():
    with pytest.raises(UnsupportedError, match="found SiLU"):
        torchao.quantize_(Net(), MixDQLayerConfig(), filter_fn=lambda m, name: name == "body.1")
    model = Net()
    quantize_(model, MixDQConfig())
    with pytest.raises(MixDQError, match="this Linear is quantized already"):
        torchao.quantize_(model, MixDQLayerConfig(), filter_fn=lambda m, name: name == "body.0")


# --- as JSON ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [
        MixDQConfig(),
        MixDQConfig("ckpt.pth", weight_bits=4, act_bits=None, protect=["conv"], bos=False),
        MixDQConfig(weight_bits={"conv": 4, "body.0": None}, act_bits="plan.yaml", bos="bos.pt"),
        MixDQLayerConfig(4, None, input_groups=[3, 5]),
    ],
)
def test_configs_as_json(config):
    stored = json.loads(json.dumps(config_to_dict(config)))
    assert config_from_dict(stored) == config


def test_paths_are_stored_as_text(tmp_path):
    config = MixDQConfig(tmp_path / "a", tmp_path / "b", tmp_path / "c", tmp_path / "d", tmp_path / "e")
    assert config_from_dict(config_to_dict(config)) == config
    assert config.protect == str(tmp_path / "d")


def test_the_public_names():
    for name in mixdq_ao.__all__:
        assert hasattr(mixdq_ao, name), name
