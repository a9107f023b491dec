"""Files that are broken, wrong or malicious: every one is a CheckpointError that names file, key and rule."""

import io
import json
import os
import pickle
import zipfile
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import original
import pytest
import torch
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

from mixdq_ao import files, legacy, model_file
from mixdq_ao.checkpoint import LayerParams, QuantParams
from mixdq_ao.errors import CheckpointError
from mixdq_ao.plan import BitPlan, read_names
from mixdq_ao.tensor import MixDQTensor

# --- valid files, to be spoilt ----------------------------------------------------------------------------------------


def save_params(path: Path) -> None:
    layer = LayerParams(
        {8: torch.rand(2, 3) + 0.1, 4: torch.rand(2, 3) + 0.1},
        {8: torch.rand(2) + 0.1},
        {8: torch.tensor([-128.0, 127.0])},
        bos_input=torch.randn(4),
        bos_output=torch.randn(3),
    )
    plan = BitPlan({"conv": 8})
    QuantParams({"conv": layer}, plan, plan, ["conv"], True, "0" * 64).save(path)


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(7, 5)
        self.conv = nn.Conv2d(4, 3, 3)
        self.norm = nn.LayerNorm(5)
        self.register_buffer("steps", torch.arange(3))


def save_model(path: Path) -> None:
    model = Small()
    act = {"act_scale": 0.1, "act_zero_point": 3.0}
    bos = {"bos_input": torch.randn(7), "bos_output": torch.randn(5)}
    linear = MixDQTensor.from_float(model.linear.weight.detach(), 4, **act, **bos)
    conv = MixDQTensor.from_float(model.conv.weight.detach(), 8, input_groups=[3, 1], act_bits=4, **act)
    model.linear.weight = nn.Parameter(linear, requires_grad=False)
    model.conv.weight = nn.Parameter(conv, requires_grad=False)
    model.norm.mixdq_reason = "not a matrix product"
    model_file.save(model, path)


def load_model(path: Path) -> nn.Module:
    return model_file.load(path, model=Small())


def converted() -> OrderedDict:
    """The original's converted layout: a linear, and a shortcut in two halves."""
    content = OrderedDict()
    for layer, parts in (("linear", [""]), ("shortcut", ["", "_0"])):
        for part in parts:
            scale, zero = torch.rand(3, 5).half() + 0.1, torch.zeros(3, 5).half()
            content[f"{layer}.weight_quantizer{part}"] = {"delta_list": scale, "zero_point_list": zero}
            scale, zero = torch.rand(3).half() + 0.1, torch.tensor([2, 8, 200]).half()
            content[f"{layer}.act_quantizer{part}"] = {"delta_list": scale, "zero_point_list": zero}
    return content


READERS = {
    "params": QuantParams.load,
    "any": legacy.read_params,
    "model": load_model,
    "build": model_file.load,
    "original": legacy.read_original,
    "bos": legacy.read_bos,
    "plan": BitPlan.read,
    "names": read_names,
    "describe": model_file.describe,
}


# --- ways to spoil ----------------------------------------------------------------------------------------------------


def put(data: bytes | str):
    """Writes these bytes."""
    return lambda path: path.write_bytes(data.encode() if isinstance(data, str) else data)


def container(header, data: bytes = b"", length: int | None = None):
    """Writes a safetensors file with this header (an object, or the text itself) and this buffer."""
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    return put((len(text) if length is None else length).to_bytes(8, "little") + text + data)


def tensors(change, save=save_params):
    """Saves a valid file and writes it again, past every check, after ``change(tensors, metadata)``."""

    def make(path):
        save(path)
        file = files.TensorFile(path)
        content, metadata = {name: file.read(name) for name in file.entries}, dict(file.metadata)
        change(content, metadata)
        files.write_tensors(path, content, metadata)

    return make


def fill(key: str, value: float, save=save_params):
    """Sets the first element of one tensor."""
    return tensors(lambda content, _: content[key].view(-1)[:1].fill_(value), save)


def replace(key: str, tensor, save=save_params):
    """Sets a tensor, or removes it (None)."""

    def change(content, _):
        content[key] = tensor
        if tensor is None:
            del content[key]

    return tensors(change, save)


def metadata(key: str, value: str | None, save=save_params):
    """Sets an entry of the metadata, or removes it (None)."""

    def change(_, entries):
        entries[key] = value
        if value is None:
            del entries[key]

    return tensors(change, save)


def attribute(name: str, key: str, value):
    """Sets an attribute of a quantized weight of the model file."""

    def change(_, entries):
        quantized = json.loads(entries["quantized"])
        quantized[name][key] = value
        entries["quantized"] = json.dumps(quantized)

    return tensors(change, save_model)


def spoil_bytes(change, save=save_params):
    def make(path):
        save(path)
        path.write_bytes(change(path.read_bytes()))

    return make


def entry(**changes):
    return {"dtype": "F32", "shape": [1, 1], "data_offsets": [0, 4], **changes}


def two_entries(begin: int, end: int):
    return container({"a": entry(shape=[1]), "b": entry(shape=[1], data_offsets=[begin, end])}, bytes(end))


def checkpoint(change):
    """Writes the converted layout after ``change(content)``."""

    def make(path):
        content = converted()
        change(content)
        torch.save(content, path)

    return make


def lists(key: str, **values):
    """Replaces lists of one quantizer."""
    return checkpoint(lambda content: content[key].update(values))


def saved(content):
    return lambda path: torch.save(content, path)


class RunsCode:
    """Unpickling this creates a folder."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def marker_of(path: Path) -> Path:
    return path.parent / "the-code-ran"


def rezip(path: Path) -> None:
    """The converted layout in a compressed archive, as a zip bomb would be."""
    torch.save(converted(), path)
    buffer = io.BytesIO()
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as target:
        for member in source.namelist():
            target.writestr(member, source.read(member))
    path.write_bytes(buffer.getvalue())


def unet_file(**config):
    """A model file that asks for a UNet with these arguments."""
    values = {"class_name": "UNet2DConditionModel", "config": {**original.TINY_CONFIG, **config}}
    texts = {key: json.dumps(value) for key, value in values.items()}
    return tensors(lambda _, entries: entries.update(texts), save_model)


@dataclass(frozen=True)
class Case:
    """How to make a bad file, who reads it, and what the message must hold. ``name`` is the file's name."""

    id: str
    reader: str
    make: object
    key: str
    rule: str
    name: str = "file"


NAN, INF = float("nan"), float("inf")
WQ, AQ = "linear.weight_quantizer", "linear.act_quantizer"

CASES = [
    # files that are not files
    Case("missing", "any", lambda path: None, "", "the file must exist"),
    Case("folder", "any", lambda path: path.mkdir(), "", "must be a file"),
    Case("dangling-symlink", "any", lambda path: path.symlink_to("nowhere"), "", "must point to a file"),
    Case("fifo", "any", os.mkfifo, "", "must be a regular file"),
    Case("sharded-index", "build", put("{}"), "", "must be one file", "model.safetensors.index.json"),
    # the container
    Case("empty-file", "params", put(b""), "", "at least 8 bytes"),
    Case("text-file", "params", put("this is not a tensor file"), "", "the header must be at most"),
    Case("header-bomb", "params", container("{}", length=2**63), "", "the header must be at most"),
    Case("header-over-100-MB", "params", container("{}", length=100_000_001), "", "the header must be at most"),
    Case("header-beyond-file", "params", container("{}", length=1000), "", "the header must lie inside the file"),
    Case("truncated-data", "params", spoil_bytes(lambda data: data[:-5]), "conv.", "data must lie inside the file"),
    Case("truncated-header", "params", spoil_bytes(lambda data: data[:100]), "", "the header must lie inside"),
    Case("trailing-bytes", "params", spoil_bytes(lambda data: data + b"\0"), "", "must end with its last tensor"),
    Case("header-not-utf8", "params", put(b"\2" + bytes(7) + b"\xff\xfe"), "header", "must be UTF-8"),
    Case("header-not-json", "params", container("{nope}"), "header", "must be JSON"),
    Case("header-nested", "params", container("[" * 100_000), "header", "must be JSON"),
    Case("header-nan", "params", container('{"a": NaN}'), "header", "must be JSON"),
    Case("header-huge-number", "params", container('{"a": ' + "9" * 10_000 + "}"), "", "must"),
    Case("header-list", "params", container([]), "header", "must be a JSON object"),
    Case(
        "duplicate-tensor",
        "params",
        container(f'{{"a": {json.dumps(entry())}, "a": {json.dumps(entry())}}}', bytes(4)),
        "'a'",
        "a key must be there once",
    ),
    Case("overlap", "params", two_entries(2, 6), "'b'", "must not overlap"),
    Case("hole", "params", two_entries(8, 12), "'b'", "without a hole"),
    Case("offsets-reversed", "params", container({"a": entry(data_offsets=[4, 0])}), "'a'", "a begin and an end"),
    Case("offsets-huge", "params", container({"a": entry(data_offsets=[0, 2**70])}), "'a'", "inside the file"),
    Case("offsets-float", "params", container({"a": entry(data_offsets=[0, 4.0])}), "'a'", "a begin and an end"),
    Case("shape-huge", "params", container({"a": entry(shape=[2**40, 2**40])}, bytes(4)), "'a'", "shape must be up to"),
    Case("shape-negative", "params", container({"a": entry(shape=[-1])}, bytes(4)), "'a'", "shape must be up to"),
    Case("shape-boolean", "params", container({"a": entry(shape=[True])}, bytes(4)), "'a'", "shape must be up to"),
    Case("shape-too-long", "params", container({"a": entry(shape=[1] * 9)}, bytes(4)), "'a'", "up to 8 sizes"),
    Case(
        "shape-not-offsets", "params", container({"a": entry(shape=[2])}, bytes(4)), "'a'", "must fit dtype and shape"
    ),
    Case("unknown-dtype", "params", container({"a": entry(dtype="F8_E4M3")}, bytes(4)), "'a'", "dtype must be one of"),
    Case("dtype-list", "params", container({"a": entry(dtype=["F32"])}, bytes(4)), "'a'", "dtype must be one of"),
    Case("entry-extra-field", "params", container({"a": entry(x=1)}, bytes(4)), "'a'", "exactly dtype, shape"),
    Case("entry-not-object", "params", container({"a": 1}), "'a'", "exactly dtype, shape"),
    Case("metadata-list", "params", container({"__metadata__": []}), "__metadata__", "must be a JSON object"),
    Case("metadata-number", "params", container({"__metadata__": {"format": 1}}), "__metadata__.format", "a string"),
    # quantization parameters
    Case("no-metadata", "params", container({}), "__metadata__.format", "must be 'mixdq_ao.quant_params'"),
    Case("other-format", "params", metadata("format", "pt"), "__metadata__.format", "must be 'mixdq_ao.quant_params'"),
    Case("future-version", "params", metadata("format_version", "2"), "__metadata__.format_version", "must be '1'"),
    Case("no-layers", "params", tensors(lambda content, _: content.clear()), "", "at least one layer"),
    Case(
        "unknown-key", "params", replace("conv.weight_zero_point.8", torch.zeros(2, 3)), "zero_point.8", "unknown key"
    ),
    Case("key-without-layer", "params", replace("bos_output", torch.zeros(3)), "bos_output", "unknown key"),
    Case(
        "bits-3", "params", replace("conv.weight_scale.3", torch.ones(2, 3)), "scale.3", "bits must be one of 8, 4, 2"
    ),
    Case("bits-08", "params", replace("conv.weight_scale.08", torch.ones(2, 3)), "scale.08", "bits must be one of"),
    Case("act-bits-2", "params", replace("conv.act_scale.2", torch.ones(2)), "act_scale.2", "bits must be one of 8, 4"),
    Case("scale-half", "params", replace("conv.act_scale.8", torch.ones(2).half()), "act_scale.8", "torch.float32"),
    Case("scale-1-d", "params", replace("conv.weight_scale.8", torch.ones(6)), "weight_scale.8", "[groups, out]"),
    Case("groups-disagree", "params", replace("conv.act_scale.8", torch.ones(3)), "conv.act_scale.8", "groups = 2"),
    Case("widths-disagree", "params", replace("conv.weight_scale.4", torch.ones(2, 9)), "conv.weight_scale", "out ="),
    Case("scale-empty", "params", replace("conv.weight_scale.8", torch.ones(2, 0)), "weight_scale", "out ="),
    Case("scale-nan", "params", fill("conv.weight_scale.4", NAN), "conv.weight_scale.4", "finite and positive"),
    Case("scale-infinite", "params", fill("conv.act_scale.8", INF), "conv.act_scale.8", "finite and positive"),
    Case("scale-zero", "params", fill("conv.act_scale.8", 0.0), "conv.act_scale.8", "finite and positive"),
    Case("scale-negative", "params", fill("conv.weight_scale.8", -1.0), "weight_scale.8", "finite and positive"),
    Case("zero-point-fraction", "params", fill("conv.act_zero_point.8", 0.5), "zero_point.8", "whole numbers"),
    Case("zero-point-nan", "params", fill("conv.act_zero_point.8", NAN), "zero_point.8", "whole numbers"),
    Case("zero-point-unsigned", "params", fill("conv.act_zero_point.8", 200.0), "zero_point.8", "in -128..127"),
    Case(
        "no-zero-point", "params", replace("conv.act_zero_point.8", None), "act_scale.8", "come with act_zero_point.8"
    ),
    Case("no-act-scale", "params", replace("conv.act_scale.8", None), "act_zero_point.8", "come with act_scale.8"),
    Case("bos-nan", "params", fill("conv.bos_output", NAN), "conv.bos_output", "must be finite"),
    Case("bos-size", "params", replace("conv.bos_output", torch.zeros(4)), "conv.bos_output", "out = 3"),
    Case("bos-input-alone", "params", replace("conv.bos_output", None), "conv.bos_input", "come with bos_output"),
    Case("plan-not-json", "params", metadata("weight_plan", "{"), "__metadata__.weight_plan", "must be JSON"),
    Case("plan-bits", "params", metadata("act_plan", '{"conv": 2}'), "__metadata__.act_plan", "bits 8, 4 or null"),
    Case("plan-boolean", "params", metadata("weight_plan", '{"conv": true}'), "weight_plan", "bits 8, 4, 2 or null"),
    Case("plan-unknown-layer", "params", metadata("weight_plan", '{"x": 8}'), "'x'", "weight_plan must name only"),
    Case("plan-duplicate", "params", metadata("act_plan", '{"conv": 8, "conv": 4}'), "'conv'", "be there once"),
    Case("protect-unknown-layer", "params", metadata("protect", '["x"]'), "'x'", "protect must name only layers"),
    Case("protect-twice", "params", metadata("protect", '["conv", "conv"]'), "protect", "different layer names"),
    Case("flag-as-text", "params", metadata("bos_aware", '"yes"'), "__metadata__.bos_aware", "must be true or false"),
    Case("hash-short", "params", metadata("model_hash", '"abc"'), "__metadata__.model_hash", "64 hexadecimal digits"),
    Case("metadata-missing", "params", metadata("protect", None), "__metadata__.protect", "must have this key"),
    Case("metadata-unknown", "params", metadata("more", "1"), "__metadata__.more", "unknown key in the metadata"),
    # whole models
    Case("model-future-version", "model", metadata("format_version", "9", save_model), "format_version", "must be '1'"),
    Case("params-as-model", "model", save_params, "__metadata__.format", "must be 'mixdq_ao.model'"),
    Case("model-as-params", "params", save_model, "__metadata__.format", "must be 'mixdq_ao.quant_params'"),
    Case("model-missing-tensor", "model", replace("norm.bias", None, save_model), "norm.bias", "must have this key"),
    Case("model-missing-scale", "model", replace("linear.weight.scale", None, save_model), "weight.scale", "this key"),
    Case("model-extra-tensor", "model", replace("x.y", torch.ones(1), save_model), "'x.y'", "unknown key"),
    Case(
        "model-packed-length",
        "model",
        replace("linear.weight.qdata", torch.zeros(5, 7, dtype=torch.uint8), save_model),
        "linear.weight.qdata",
        "packed = 4",
    ),
    Case(
        "model-codes-dtype",
        "model",
        replace("linear.weight.qdata", torch.zeros(5, 4, dtype=torch.int8), save_model),
        "linear.weight.qdata",
        "dtype must be torch.uint8",
    ),
    Case("model-scale-nan", "model", fill("conv.weight.scale", NAN, save_model), "conv.weight.scale", "positive"),
    Case(
        "model-scale-shape", "model", replace("conv.weight.scale", torch.ones(1, 3), save_model), "scale", "groups = 2"
    ),
    Case("model-zero-point", "model", fill("conv.weight.act_zero_point", 9, save_model), "zero_point", "in -8..7"),
    Case("model-weight-nan", "model", fill("norm.weight", NAN, save_model), "norm.weight", "values must be finite"),
    Case("model-shape", "model", replace("norm.weight", torch.ones(6), save_model), "norm.weight", "the model's [5]"),
    Case("model-kind", "model", replace("steps", torch.ones(3), save_model), "steps", "of the model's kind"),
    Case(
        "model-act-scale-alone",
        "model",
        replace("conv.weight.act_zero_point", None, save_model),
        "conv.weight.act_scale",
        "must come with act_zero_point",
    ),
    Case("model-bos-alone", "model", replace("linear.weight.bos_output", None, save_model), "bos_input", "bos_output"),
    Case("model-bits", "model", attribute("linear.weight", "bits", 16), "linear.weight", "bits must be one of 8, 4, 2"),
    Case("model-bits-float", "model", attribute("linear.weight", "bits", 4.0), "linear.weight", "bits must be one of"),
    Case(
        "model-no-act-bits", "model", attribute("conv.weight", "act_bits", None), "conv.weight.act_", "without act_bits"
    ),
    Case("model-act-bits", "model", attribute("conv.weight", "act_bits", 2), "conv.weight", "null or one of 8, 4"),
    Case("model-groups", "model", attribute("conv.weight", "input_groups", [3, 2]), "conv.weight", "must add up"),
    Case("model-negative-group", "model", attribute("conv.weight", "input_groups", [5, -1]), "conv.weight", "positive"),
    Case(
        "model-logical-shape",
        "model",
        attribute("linear.weight", "shape", [7, 7]),
        "linear.weight",
        "the model's [5, 7]",
    ),
    Case(
        "model-huge-shape", "model", attribute("linear.weight", "shape", [2**60, 7]), "linear.weight", "2 or 4 positive"
    ),
    Case("model-float-dtype", "model", attribute("linear.weight", "dtype", "float16"), "linear.weight", "one of F64"),
    Case("model-extra-attribute", "model", attribute("linear.weight", "x", 1), "linear.weight: x", "unknown key"),
    Case("model-attributes-list", "model", metadata("quantized", '{"a": []}', save_model), "'a'", "a JSON object"),
    Case(
        "model-unknown-weight",
        "model",
        tensors(
            lambda content, entries: entries.update(
                quantized=entries["quantized"].replace("linear.weight", "linear.kernel")
            ),
            save_model,
        ),
        "linear.kernel",
        "must be a parameter of the model",
    ),
    Case("model-reason", "model", metadata("reasons", '{"x": "why"}', save_model), "reasons", "must name modules"),
    Case("model-reason-number", "model", metadata("reasons", '{"norm": 1}', save_model), "reasons", "names to texts"),
    Case("build-class", "build", metadata("class_name", '"Popen"', save_model), "class_name", "must be one of UNet2D"),
    Case(
        "build-no-config",
        "build",
        tensors(lambda _, entries: entries.update(class_name='"UNet2DConditionModel"'), save_model),
        "config",
        "must be there",
    ),
    Case("build-argument", "build", unet_file(shell="rm"), "config", "must hold arguments of UNet2DConditionModel"),
    Case("build-value", "build", unet_file(block_out_channels="wide"), "config", "must build a UNet2DConditionModel"),
    Case("build-layer-bomb", "build", unet_file(layers_per_block=10**9), "config", "more parameters than the"),
    # the original's checkpoints
    Case("original-runs-code", "original", lambda p: torch.save({"a": RunsCode(marker_of(p))}, p), "", "may hold only"),
    Case(
        "original-bare-pickle-runs-code",
        "any",
        lambda p: p.write_bytes(pickle.dumps(RunsCode(marker_of(p)), protocol=2)),
        "",
        "may hold only",
        "ckpt.pth",
    ),
    Case(
        "original-suffix-lies",
        "any",
        lambda p: torch.save(RunsCode(marker_of(p)), p),
        "",
        "may hold only",
        "params.safetensors",
    ),
    Case("original-not-a-pickle", "original", put("hello"), "", "must be"),
    Case("original-truncated", "original", spoil_bytes(lambda data: data[:-200], saved(converted())), "", "torch.save"),
    Case("original-compressed", "original", rezip, "", "must be stored uncompressed"),
    Case("original-list", "original", saved([1, 2]), "", "must be a dict of quantizers"),
    Case("original-key-number", "original", saved({3: {}}), "'3'", "keys must end in"),
    Case(
        "original-suffix", "original", checkpoint(lambda c: c.update({f"{WQ}_1": c[WQ]})), f"{WQ}_1", "keys must end in"
    ),
    Case("original-no-act", "original", checkpoint(lambda c: c.pop(AQ)), AQ, "must come in pairs"),
    Case("original-no-weight", "original", checkpoint(lambda c: c.pop(WQ)), WQ, "must come in pairs"),
    Case(
        "original-second-half-alone",
        "original",
        checkpoint(lambda c: [c.pop("shortcut.weight_quantizer"), c.pop("shortcut.act_quantizer")]),
        "shortcut.weight_quantizer",
        "a second half with a first",
    ),
    Case(
        "original-half-missing", "original", checkpoint(lambda c: c.pop("shortcut.act_quantizer_0")), "_0", "in pairs"
    ),
    Case(
        "original-halves-disagree",
        "original",
        lists("shortcut.weight_quantizer_0", delta_list=torch.ones(3, 4), zero_point_list=torch.zeros(3, 4)),
        "shortcut.weight_quantizer_0",
        "as many output channels",
    ),
    Case(
        "original-asymmetric",
        "original",
        lists(WQ, zero_point_list=torch.ones(3, 5)),
        WQ,
        "weight zero points must be 0",
    ),
    Case("original-scale-zero", "original", lists(WQ, delta_list=torch.zeros(3, 5)), f"{WQ}.delta_list", "positive"),
    Case("original-scale-nan", "original", lists(AQ, delta_list=torch.full((3,), NAN)), f"{AQ}.delta_list", "positive"),
    Case("original-scale-inf", "original", lists(AQ, delta_list=torch.full((3,), INF)), f"{AQ}.delta_list", "positive"),
    Case("original-axis", "original", lists(AQ, delta_list=torch.ones(2)), f"{AQ}.delta_list", "first axis must hold"),
    Case("original-shape", "original", lists(AQ, delta_list=torch.ones(3, 2)), f"{AQ}.delta_list", "shape must be [3]"),
    Case("original-empty", "original", lists(WQ, delta_list=torch.ones(3, 0)), f"{WQ}.delta_list", "shape must be"),
    Case("original-zero-shape", "original", lists(WQ, zero_point_list=torch.zeros(3, 4)), WQ, "shape of delta_list"),
    Case("original-no-list", "original", checkpoint(lambda c: c[AQ].pop("delta_list")), f"{AQ}.delta_list", "a dense"),
    Case("original-integers", "original", lists(AQ, delta_list=torch.ones(3).int()), f"{AQ}.delta_list", "a dense"),
    Case(
        "original-stride-bomb",
        "original",
        lists(WQ, delta_list=torch.ones(1).as_strided((3, 2**40), (0, 0))),
        f"{WQ}.delta_list",
        "every element must be stored",
    ),
    Case(
        "original-meta",
        "original",
        lists(AQ, delta_list=torch.ones(3, device="meta")),
        AQ,
        "must be stored in the file",
    ),
    Case(
        "original-act-range", "original", lists(AQ, zero_point_list=torch.tensor([0, 0, 300])), "linear.act", "a dense"
    ),
    Case(
        "original-act-high",
        "original",
        lists(AQ, zero_point_list=torch.tensor([0, 0, 300.0])),
        "linear.act",
        "-128..127",
    ),
    Case("original-raw-rounding", "original", saved({WQ: [OrderedDict(), {"alpha": 1}]}), WQ, "learned rounding"),
    Case("original-entry", "original", saved({WQ: "x"}), WQ, "must be a dict or [buffers, parameters]"),
    # BOS files
    Case("bos-list", "bos", saved([torch.ones(1)]), "", "must be a dict of BOS outputs"),
    Case("bos-rank", "bos", saved({"a": torch.ones(2, 3)}), "'a'", "shape must be [1, 1, out] or [out]"),
    Case("bos-two-rows", "bos", saved({"a": torch.ones(1, 2, 3)}), "'a'", "shape must be [1, 1, out] or [out]"),
    Case("bos-infinite", "bos", saved({"a": torch.full((1, 1, 3), INF)}), "'a'", "values must be finite"),
    Case("bos-integers", "bos", saved({"a": torch.ones(3).int()}), "'a'", "floating-point"),
    Case("bos-stride-bomb", "bos", saved({"a": torch.ones(1).expand(2**40)}), "'a'", "every element must be stored"),
    Case("bos-name", "bos", saved({1: torch.ones(3)}), "'1'", "non-empty string"),
    Case("bos-empty", "bos", container({}), "", "at least one layer"),
    # bit plans
    Case("plan-not-text", "plan", put(b"conv_in: 8\xff"), "", "must be UTF-8", "p.yaml"),
    Case("plan-too-large", "plan", put(b"#" * (files.MAX_TEXT_BYTES + 1)), "", "must be at most", "p.yaml"),
    Case("plan-empty", "plan", put(""), "", "must name at least one layer", "p.yaml"),
    Case("plan-empty-map", "plan", put("{}"), "", "must name at least one layer", "p.yaml"),
    Case("plan-broken", "plan", put("a: 8\nb: [4"), "", "must", "p.yaml"),
    Case("plan-tabs", "plan", put("a:\t8\n\t- b"), "", "must be YAML", "p.yaml"),
    Case("plan-list", "plan", put("- a\n- b\n"), "line 1", "must be a YAML map", "p.yaml"),
    Case("plan-scalar", "plan", put("8"), "line 1", "must be a YAML map", "p.yaml"),
    Case("plan-two-documents", "plan", put("a: 8\n---\nb: 8\n"), "line 3", "one flat map", "p.yaml"),
    Case("plan-twice", "plan", put("a: 8\nb: 4\na: 4\n"), "'a'", "must be named once", "p.yaml"),
    Case("plan-two-spellings", "plan", put("a: 8\nmodel.a: 4\n"), "'a'", "must be named once", "p.yaml"),
    Case("plan-number-key", "plan", put("3: 8\n"), "'3'", "a non-empty string", "p.yaml"),
    Case("plan-null-key", "plan", put("~: 8\n"), "'None'", "a non-empty string", "p.yaml"),
    Case("plan-map-key", "plan", put("? {a: 1}\n: 8\n"), "line 1", "one flat map", "p.yaml"),
    Case("plan-bits-3", "plan", put("a: 3\n"), "'a'", "bits must be one of", "p.yaml"),
    Case("plan-bits-true", "plan", put("a: true\n"), "'a'", "bits must be one of", "p.yaml"),
    Case("plan-bits-float", "plan", put("a: 8.0\n"), "'a'", "bits must be one of", "p.yaml"),
    Case("plan-bits-text", "plan", put("a: '8'\n"), "'a'", "bits must be one of", "p.yaml"),
    Case("plan-bits-negative", "plan", put("a: -8\n"), "'a'", "bits must be one of", "p.yaml"),
    Case("plan-nested", "plan", put("a: {b: 8}\n"), "line 1", "one flat map", "p.yaml"),
    Case("plan-alias", "plan", put("a: &x 8\nb: *x\n"), "line 1", "anchors and aliases", "p.yaml"),
    Case("plan-merge", "plan", put("<<: {a: 8}\n"), "", "must", "p.yaml"),
    Case(
        "plan-tag", "plan", put("a: !!python/object/apply:os.getcwd []\n"), "line 1", "tags are not allowed", "p.yaml"
    ),
    Case("plan-harmless-tag", "plan", put("a: !!int 8\n"), "line 1", "tags are not allowed", "p.yaml"),
    Case("plan-deep", "plan", put("a: " + "[" * 50_000), "line 1", "one flat map", "p.yaml"),
    Case("plan-json-list", "plan", put("[]"), "", "must be a JSON object", "p.json"),
    Case("plan-json-bare", "plan", put('{"a": 8}'), "bits", "must have this key", "p.json"),
    Case(
        "plan-json-version",
        "plan",
        put('{"format": "mixdq_ao.bit_plan", "format_version": 2, "bits": {"a": 8}}'),
        "format_version",
        "must be 1",
        "p.json",
    ),
    Case(
        "plan-json-version-true",
        "plan",
        put('{"format": "mixdq_ao.bit_plan", "format_version": true, "bits": {"a": 8}}'),
        "format_version",
        "must be 1",
        "p.json",
    ),
    Case(
        "plan-json-duplicate",
        "plan",
        put('{"format": "mixdq_ao.bit_plan", "format_version": 1, "bits": {"a": 8, "a": 4}}'),
        "'a'",
        "be there once",
        "p.json",
    ),
    Case(
        "plan-json-bits-list",
        "plan",
        put('{"format": "mixdq_ao.bit_plan", "format_version": 1, "bits": [8]}'),
        "bits",
        "must be a JSON object",
        "p.json",
    ),
    Case(
        "plan-json-empty-name",
        "plan",
        put('{"format": "mixdq_ao.bit_plan", "format_version": 1, "bits": {"": 8}}'),
        "",
        "non-empty string",
        "p.json",
    ),
    # lists of names
    Case("names-object", "names", put('{"a": 1}'), "", "must be a list of layer names", "n.json"),
    Case("names-number", "names", put('["a", 1]'), "'[1]'", "non-empty string", "n.json"),
    Case("names-twice", "names", put("a\nmodel.a\n"), "'a'", "must be named once", "n.txt"),
    Case("names-yaml-map", "names", put("a: 8\n"), "line 1", "must be a YAML list", "n.yaml"),
    Case("names-pickled-set", "names", saved({"a"}), "", "must be a list of layer names"),
    Case("names-pickled-number", "names", saved(["a", 3]), "'[1]'", "non-empty string"),
    Case("names-run-code", "names", lambda p: torch.save([RunsCode(marker_of(p))], p), "", "may hold only"),
    # what inspect meets
    Case("describe-unknown", "describe", container({"__metadata__": {"format": "pt"}}), "format", "must be one of"),
    Case("describe-text", "describe", put("hello, this is a text"), "", "the header must be at most"),
]


@pytest.mark.parametrize("case", [pytest.param(case, id=case.id) for case in CASES])
def test_hostile_file(case, tmp_path):
    path = tmp_path / case.name
    case.make(path)
    with pytest.raises(CheckpointError) as caught:
        READERS[case.reader](path)
    error = caught.value
    assert str(error).startswith(f"{path}: ")
    assert case.key in f"'{error.key}'"
    assert not error.key or f"'{error.key}'" in str(error)
    assert case.rule in str(error) and error.rule in str(error)
    assert not marker_of(path).exists()


# --- fuzzing ----------------------------------------------------------------------------------------------------------


def valid(save, name: str, folder: Path) -> bytes:
    save(folder / name)
    return (folder / name).read_bytes()


SEEDS = {
    "params": save_params,
    "model": save_model,
    "original": saved(converted()),
    "plan": lambda path: BitPlan({"conv_in": 8, "mid": 4, "out": None}).write(path),
}


@pytest.mark.parametrize("reader", SEEDS)
def test_spoilt_bytes_load_or_are_refused(reader, tmp_path):
    name = "file.yaml" if reader == "plan" else "file"
    data = valid(SEEDS[reader], name, tmp_path)

    @settings(max_examples=150)
    @given(
        flips=st.lists(st.tuples(st.integers(0, len(data) - 1), st.integers(1, 255)), max_size=4),
        length=st.one_of(st.just(len(data)), st.integers(0, len(data))),
    )
    def check(flips, length):
        spoilt = bytearray(data)
        for position, mask in flips:
            spoilt[position] ^= mask
        (tmp_path / name).write_bytes(spoilt[:length])
        try:
            READERS[reader](tmp_path / name)
        except CheckpointError as error:
            assert str(tmp_path / name) in str(error)

    check()


@settings(max_examples=150)
@given(text=st.text(st.sampled_from("ab:8 4\n-[]{}'\"#&*!?|>%@,~"), max_size=40))
@example(text="a: 8\n--- b\n")
@example(text="? a\n")
def test_any_text_is_a_plan_or_refused(text, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "fuzz.yaml"
    path.write_text(text)
    try:
        plan = BitPlan.read(path)
    except CheckpointError:
        return
    assert dict(plan) == {name: bits if bits != 16 else None for name, bits in yaml.safe_load(text).items()}


# --- writing ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("save", [save_params, save_model, SEEDS["plan"]], ids=["params", "model", "plan"])
@pytest.mark.parametrize("broken", ["fsync", "replace"])
def test_interrupted_save_leaves_the_old_file(save, broken, tmp_path, monkeypatch):
    path = tmp_path / "file.json"
    path.write_text("the old file")

    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(f"mixdq_ao.files.os.{broken}", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save(path)
    assert path.read_text() == "the old file"
    assert os.listdir(tmp_path) == ["file.json"]


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file"
    save_params(path)
    before = path.read_bytes()
    real = files._bytes_of
    written = []

    def fail_at_the_third(tensor):
        written.append(tensor)
        if len(written) == 3:
            raise OSError(28, "No space left on device")
        return real(tensor)

    monkeypatch.setattr(files, "_bytes_of", fail_at_the_third)
    with pytest.raises(OSError, match="No space left"):
        save_params(path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["file"]


def test_a_new_file_gets_ordinary_permissions(tmp_path):
    save_params(tmp_path / "ours")
    (tmp_path / "theirs").touch()
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "theirs").stat().st_mode
