"""QuantParams: round trips, the bytes on disk, and what save refuses."""

import hashlib
import json

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mixdq_ao import files
from mixdq_ao.bits import ACT_BITS, WEIGHT_BITS, WIDTHS
from mixdq_ao.checkpoint import LayerParams, QuantParams, model_hash
from mixdq_ao.errors import CheckpointError
from mixdq_ao.plan import BitPlan

layer_names = st.text(st.characters(codec="utf-8", exclude_categories=["C"]), min_size=1, max_size=20)


@st.composite
def layers(draw) -> LayerParams:
    groups, out, in_channels = draw(st.integers(1, 3)), draw(st.integers(1, 40)), draw(st.integers(1, 40))
    act_bits = draw(st.sets(st.sampled_from(ACT_BITS)))
    weight_bits = draw(st.sets(st.sampled_from(WEIGHT_BITS), min_size=1))
    layer = LayerParams(
        {bits: torch.rand(groups, out) + 1e-30 for bits in weight_bits},
        {bits: torch.rand(groups) + 1e-8 for bits in act_bits},
        {bits: torch.randint(WIDTHS[bits].qmin, WIDTHS[bits].qmax + 1, (groups,)).float() for bits in act_bits},
    )
    if draw(st.booleans()):
        layer.bos_output = torch.randn(out, dtype=draw(st.sampled_from([torch.float16, torch.float32])))
        layer.bos_input = torch.randn(in_channels) if draw(st.booleans()) else None
    return layer


@st.composite
def quant_params(draw) -> QuantParams:
    table = draw(st.dictionaries(layer_names, layers(), min_size=1, max_size=5))
    some = st.sets(st.sampled_from(sorted(table)))

    def plan(widths):
        return BitPlan({name: draw(st.sampled_from([*widths, None])) for name in draw(some)})

    return QuantParams(
        table,
        weight_plan=plan(WEIGHT_BITS) if draw(st.booleans()) else None,
        act_plan=plan(ACT_BITS) if draw(st.booleans()) else None,
        protect=sorted(draw(some)),
        bos_aware=draw(st.booleans()),
        model_hash=model_hash({"a": (1,)}) if draw(st.booleans()) else None,
    )


def contents(params: QuantParams) -> dict:
    return {f"{name}.{key}": tensor for name, layer in params.layers.items() for key, _, tensor in layer.tensors()}


@settings(max_examples=50)
@given(params=quant_params())
def test_round_trip(params, tmp_path_factory):
    path = tmp_path_factory.mktemp("params") / "p.safetensors"
    params.save(path)
    again = QuantParams.load(path)
    ours, theirs, reference = contents(params), contents(again), safetensors.torch.load_file(path)
    assert ours.keys() == theirs.keys() == reference.keys()
    for key, tensor in ours.items():
        torch.testing.assert_close(theirs[key], tensor, rtol=0, atol=0)
        torch.testing.assert_close(reference[key], tensor, rtol=0, atol=0)
    for name in ("weight_plan", "act_plan", "protect", "bos_aware", "model_hash"):
        assert getattr(again, name) == getattr(params, name)
    assert again.source == str(path)


def example() -> QuantParams:
    layer = LayerParams(
        {8: torch.tensor([[0.5, 0.25]])},
        {8: torch.tensor([2.0])},
        {8: torch.tensor([-128.0])},
        bos_output=torch.ones(2),
    )
    return QuantParams({"conv_in": layer}, BitPlan({"conv_in": 8}), protect=["conv_in"])


def test_bytes_on_disk(tmp_path):
    """The file that version 1 writes; a change here makes old files unreadable."""
    example().save(tmp_path / "p.safetensors")
    data = (tmp_path / "p.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    assert length % 8 == 0
    assert json.loads(data[8 : 8 + length]) == {
        "__metadata__": {
            "format": "mixdq_ao.quant_params",
            "format_version": "1",
            "weight_plan": '{"conv_in": 8}',
            "act_plan": "null",
            "protect": '["conv_in"]',
            "bos_aware": "false",
            "model_hash": "null",
        },
        "conv_in.act_scale.8": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
        "conv_in.act_zero_point.8": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]},
        "conv_in.bos_output": {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]},
        "conv_in.weight_scale.8": {"dtype": "F32", "shape": [1, 2], "data_offsets": [16, 24]},
    }
    assert torch.frombuffer(bytearray(data[8 + length :]), dtype=torch.float32).tolist() == [2, -128, 1, 1, 0.5, 0.25]


def test_reads_what_the_safetensors_library_writes(tmp_path):
    params = example()
    params.save(tmp_path / "ours.safetensors")
    metadata = files.TensorFile(tmp_path / "ours.safetensors").metadata
    safetensors.torch.save_file(contents(params), tmp_path / "theirs.safetensors", metadata)
    assert contents(QuantParams.load(tmp_path / "theirs.safetensors")).keys() == contents(params).keys()


@pytest.mark.parametrize("dtype", files.DTYPES.values(), ids=files.DTYPES)
def test_every_dtype_and_layout(tmp_path, dtype):
    base = torch.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5).to(dtype)
    tensors = {
        "channels_last": base.contiguous(memory_format=torch.channels_last),
        "strided": base[:, ::2, 1:],
        "scalar": base[0, 0, 0, 1],
        "empty": base[:0],
    }
    files.write_tensors(tmp_path / "t.safetensors", tensors, {"name": "value"})
    file = files.TensorFile(tmp_path / "t.safetensors")
    reference = safetensors.torch.load_file(tmp_path / "t.safetensors")
    assert file.metadata == {"name": "value"}
    for name, tensor in tensors.items():
        assert torch.equal(file.read(name), tensor) and torch.equal(reference[name], tensor)
        assert file.read(name).shape == tensor.shape


def test_write_refuses_a_dtype_without_a_name(tmp_path):
    with pytest.raises(TypeError, match="'a': dtype must be one of F64, .*; found torch.complex64"):
        files.write_tensors(tmp_path / "t.safetensors", {"a": torch.zeros(1, dtype=torch.complex64)}, {})
    assert not list(tmp_path.iterdir())


def test_groups():
    assert LayerParams().groups == 1
    assert LayerParams({8: torch.ones(2, 5)}).groups == 2
    assert LayerParams(act_scale={8: torch.ones(2)}).groups == 2


def test_model_hash_depends_on_names_and_shapes_only():
    text = b"a:3x4\nb:1x2x3x3\n"
    assert model_hash({"b": (1, 2, 3, 3), "a": (3, 4)}) == hashlib.sha256(text).hexdigest()
    assert model_hash({"a": (3, 4)}) != model_hash({"a": (34,)})


@pytest.mark.parametrize(
    "change, key, rule",
    [
        (lambda p: p.layers.clear(), "", "at least one layer"),
        (lambda p: p.layers.update(x=LayerParams()), "x", "at least one parameter"),
        (lambda p: p.layers["conv_in"].act_scale.clear(), "conv_in.act_zero_point.8", "must come with act_scale.8"),
        (lambda p: p.layers["conv_in"].weight_scale.update({3: torch.ones(1, 2)}), "weight_scale.3", "8, 4, 2"),
        (lambda p: p.layers["conv_in"].weight_scale.update({4: [1.0]}), "weight_scale.4", "must be a tensor"),
        (lambda p: setattr(p, "act_plan", BitPlan({"conv_in": 2})), "act_plan", "bits 8, 4 or null"),
        (lambda p: setattr(p, "protect", ["conv_out"]), "conv_out", "protect must name only layers"),
        (lambda p: setattr(p, "model_hash", "abc"), "model_hash", "64 hexadecimal digits"),
    ],
)
def test_save_refuses_what_load_would(tmp_path, change, key, rule):
    params = example()
    change(params)
    with pytest.raises(CheckpointError) as error:
        params.save(tmp_path / "p.safetensors")
    assert key in error.value.key and rule in str(error.value)
    assert not list(tmp_path.iterdir())
