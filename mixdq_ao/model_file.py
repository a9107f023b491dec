"""A whole quantized model as one safetensors file: saved tensor by tensor, loaded without ever holding the float model.

A quantized parameter ``<name>`` is stored as ``<name>.qdata``, ``<name>.scale`` and the optional ``.act_scale``,
``.act_zero_point``, ``.bos_input``, ``.bos_output``; what can be derived from these is computed again on load. Its
attributes, the model's class and config, and why layers stayed floating are JSON strings in the metadata.
"""

import importlib
import inspect
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from mixdq_ao import checkpoint, legacy
from mixdq_ao.bits import ACT_BITS, FLOAT_BITS, WEIGHT_BITS, width
from mixdq_ao.checkpoint import (
    ACT_SCALE,
    ACT_ZERO_POINT,
    BOS_INPUT,
    BOS_OUTPUT,
    FINITE,
    WEIGHT_SCALE,
    QuantParams,
    TensorRule,
    check_format,
    read_metadata,
)
from mixdq_ao.config import finish
from mixdq_ao.errors import CheckpointError, MixDQError, name_list
from mixdq_ao.files import DTYPE_NAMES, DTYPES, METADATA_KEY, TensorFile, check_exact_keys, first_line, write_tensors
from mixdq_ao.packing import packed_channels
from mixdq_ao.plan import YAML_SUFFIXES, BitPlan
from mixdq_ao.progress import track
from mixdq_ao.tensor import MixDQTensor

FORMAT = "mixdq_ao.model"
FORMAT_VERSION = "1"

# Class name -> module of a model that a file may ask for; nothing else is imported or built from a file. Only models
# whose constructors stop soon at hostile sizes, and whose buffers are all in the file.
MODEL_CLASSES = dict.fromkeys(
    ("UNet2DConditionModel", "FluxTransformer2DModel", "SD3Transformer2DModel", "SanaTransformer2DModel"), "diffusers"
)

_REQUIRED = ("qdata", "scale")
_OPTIONAL = ("act_scale", "act_zero_point", "bos_input", "bos_output")
_FLOAT_NAMES = tuple(name for name, dtype in DTYPES.items() if dtype.is_floating_point)

Progress = Callable[[int, int], None]


def save(model: nn.Module, path, *, metadata: dict[str, str] | None = None) -> None:
    """Writes ``model``, quantized or not, as one safetensors file, whole or not at all.

    ``metadata`` are strings of your own; ``describe`` shows them. Raises ``MixDQError`` for parameters on the meta
    device and for dtypes that the format lacks, ``CheckpointError`` for values that ``load`` would refuse.
    """
    model = getattr(model, "_orig_mod", model)  # what torch.compile wrapped
    own = {} if metadata is None else dict(metadata)
    if not all(isinstance(text, str) for item in own.items() for text in item):
        raise MixDQError(f"metadata must map strings to strings; found {own!r}")
    tensors, quantized = {}, {}
    for name, value in model.state_dict(keep_vars=True).items():
        _check_savable(path, name, value)
        if isinstance(value, MixDQTensor):
            quantized[name] = _attributes(value)
            tensors |= {f"{name}.{key}": tensor for key, tensor in value.stored_tensors().items()}
        else:
            tensors[name] = value
    values = {
        "class_name": type(model).__name__,
        "config": config_of(model),
        "quantized": quantized,
        "reasons": {name: m.mixdq_reason for name, m in model.named_modules() if hasattr(m, "mixdq_reason")},
        "own": own,
    }
    header = {"format": FORMAT, "format_version": FORMAT_VERSION}
    write_tensors(path, tensors, header | {key: json.dumps(value) for key, value in values.items()})


def _check_savable(path, name: str, value) -> None:
    if not isinstance(value, Tensor):
        raise MixDQError(f"'{name}': only tensors can be saved; found {type(value).__name__}")
    if value.device.type == "meta":
        raise MixDQError(f"'{name}' is on the meta device, without values. Remove offloading or load the weights first")
    if isinstance(value, MixDQTensor):
        if value.dtype not in DTYPE_NAMES:
            raise MixDQError(f"'{name}': dtype must be one of {', '.join(_FLOAT_NAMES)}; found {value.dtype}")
    elif value.dtype not in DTYPE_NAMES or type(value) not in (Tensor, nn.Parameter):
        raise MixDQError(f"'{name}': cannot save a {type(value).__name__} of {value.dtype}")
    elif isinstance(value, nn.Parameter):
        _check_finite(path, name, value)


def _check_finite(path, name: str, value: Tensor) -> None:
    if value.is_floating_point() and not torch.isfinite(value).all():
        raise CheckpointError(path, name, FINITE[0], "infinity or NaN")


def _attributes(weight: MixDQTensor) -> dict:
    return {
        "bits": weight.bits,
        "act_bits": weight.act_bits,
        "input_groups": list(weight.input_groups),
        "shape": list(weight.shape),
        "dtype": DTYPE_NAMES[weight.dtype],
    }


def config_of(model: nn.Module) -> dict | None:
    """The constructor's arguments of a model that ``load`` can build, else None."""
    if type(model).__name__ not in MODEL_CLASSES or not hasattr(model, "config"):
        return None
    return {key: model.config[key] for key in _config_keys(type(model)) if key in model.config}


def _config_keys(model_class: type) -> list[str]:
    return [name for name in inspect.signature(model_class.__init__).parameters if name != "self"]


def load(path, *, model: nn.Module | None = None, device="cpu", progress: Progress | None = None) -> nn.Module:
    """Loads what ``save`` wrote; the parameters are on ``device``, the model is in eval mode if it was built here.

    Without ``model`` the model is built without memory from the class and config in the file. A given ``model``, which
    may be on the meta device, gets its parameters and buffers replaced, all or none. ``progress(done, total)`` counts
    bytes; without it a bar appears on a terminal when loading takes over two seconds.

    Raises ``CheckpointError`` naming file, key and rule for whatever does not fit.
    """
    file, values = _open(path)
    target = _build(file, values) if model is None else getattr(model, "_orig_mod", model)
    slots = target.state_dict(keep_vars=True)
    _check_keys(file, values["quantized"], slots)
    modules = dict(target.named_modules())
    for name in values["reasons"]:
        if name not in modules:
            file.fail(f"{METADATA_KEY}.reasons", "must name modules of the model", name)
    loaded, total, done = {}, sum(entry.nbytes for entry in file.entries.values()), 0
    for name, slot in track(slots.items(), "Loading", total=len(slots), show=False if progress else None):
        attributes = values["quantized"].get(name)
        if attributes is None:
            loaded[name] = _read_plain(file, name, slot, device)
            done += file.entries[name].nbytes
        else:
            loaded[name] = _read_quantized(file, name, attributes, slot, device)
            done += sum(file.entries[key].nbytes for key in _keys(file, name))
        if progress:
            progress(done, total)
    for name, value in loaded.items():
        _assign(modules, name, value)
    for name, reason in values["reasons"].items():
        modules[name].mixdq_reason = reason
    if values["quantized"]:
        finish(target)
    if model is None:
        _check_complete(file, target)
        target.eval()
    return target if model is None else model


def _open(path) -> tuple[TensorFile, dict]:
    """The checked header of a model file and the values of its metadata."""
    file = TensorFile(path)
    check_format(file, FORMAT, FORMAT_VERSION)
    values = read_metadata(file, _METADATA)

    def fail(key, rule, found=""):
        file.fail(key, rule, found)

    for name, attributes in values["quantized"].items():
        if not isinstance(attributes, dict):
            fail(name, "the attributes of a quantized weight must be a JSON object", type(attributes).__name__)
        check_exact_keys(
            lambda key, rule, found="", name=name: fail(f"{name}: {key}", rule, found),
            "a quantized weight's attributes",
            attributes,
            _ATTRIBUTES,
        )
        for key, (rule, holds) in _ATTRIBUTES.items():
            if not holds(attributes[key]):
                fail(name, f"{key} must be {rule}", repr(attributes[key])[:80])
        if sum(attributes["input_groups"]) != attributes["shape"][1]:
            fail(name, "input_groups must add up to the input channels", f"{attributes['input_groups']}")
    return file, values


def _is_sizes(lengths) -> Callable:
    def holds(value) -> bool:
        return (
            isinstance(value, list) and len(value) in lengths and all(type(v) is int and 0 < v < 2**31 for v in value)
        )

    return holds


def _is_texts(value) -> bool:
    return isinstance(value, dict) and all(isinstance(text, str) for text in value.values())


_METADATA = {
    "class_name": ("must be a class name", lambda value: isinstance(value, str)),
    "config": ("must be null or a JSON object", lambda value: value is None or isinstance(value, dict)),
    "quantized": ("must be a JSON object", lambda value: isinstance(value, dict)),
    "reasons": ("must map module names to texts", _is_texts),
    "own": ("must map names to texts", _is_texts),
}
_ATTRIBUTES = {
    "bits": (
        f"one of {', '.join(map(str, WEIGHT_BITS))}",
        lambda value: type(value) is int and value in WEIGHT_BITS,
    ),
    "act_bits": (
        f"null or one of {', '.join(map(str, ACT_BITS))}",
        lambda value: value is None or (type(value) is int and value in ACT_BITS),
    ),
    "shape": ("2 or 4 positive sizes", _is_sizes((2, 4))),
    "input_groups": ("a list of positive channel counts", _is_sizes(range(1, 65))),
    "dtype": (f"one of {', '.join(_FLOAT_NAMES)}", lambda value: isinstance(value, str) and value in _FLOAT_NAMES),
}


def _build(file: TensorFile, values: dict) -> nn.Module:
    """The model of a file on the meta device. It stops as soon as it has more parameters than the file has tensors."""
    name, config = values["class_name"], values["config"]
    if name not in MODEL_CLASSES:
        advice = "Build the model yourself and give it as model=."
        file.fail(f"{METADATA_KEY}.class_name", f"must be one of {', '.join(MODEL_CLASSES)}", name[:80], advice)
    if config is None:
        file.fail(f"{METADATA_KEY}.config", "must be there to build the model", "null", "Give the model as model=.")
    model_class = getattr(importlib.import_module(MODEL_CLASSES[name]), name)
    for key in config.keys() - set(_config_keys(model_class)):
        file.fail(f"{METADATA_KEY}.config", f"must hold arguments of {name} only", key[:80])
    parameters = 0

    def count(module, key, parameter):
        nonlocal parameters
        parameters += 1
        if parameters > len(file.entries):
            raise MixDQError(f"more parameters than the {len(file.entries)} tensors of the file")

    hook = nn.modules.module.register_module_parameter_registration_hook(count)
    try:
        with torch.device("meta"):
            return model_class(**config)
    except Exception as error:  # the constructor meets hostile values here and raises almost anything
        raise CheckpointError(file.path, f"{METADATA_KEY}.config", f"must build a {name}", first_line(error)) from error
    finally:
        hook.remove()


# A model that is built from its configuration alone has neither.
_AS_SAVED = "If it was saved with fused projections or a LoRA, make a model like it and give that as model="


def _check_keys(file: TensorFile, quantized: dict, slots: dict) -> None:
    for name in quantized:
        if name not in slots:
            what = "a quantized weight that the model does not have"
            file.fail(name, "must be a parameter of the model", what, _AS_SAVED)
    required = [name for name in slots if name not in quantized]
    required += [f"{name}.{key}" for name in quantized for key in _REQUIRED]
    optional = [f"{name}.{key}" for name in quantized for key in _OPTIONAL]
    check_exact_keys(file.fail, "the file", file.entries, required, optional)


def _keys(file: TensorFile, name: str) -> Iterator[str]:
    return (key for key in (f"{name}.{part}" for part in _REQUIRED + _OPTIONAL) if key in file.entries)


def _check_slot(file: TensorFile, name: str, shape: tuple[int, ...], dtype: torch.dtype, slot: Tensor) -> None:
    if tuple(slot.shape) != tuple(shape):
        file.fail(name, f"shape must be the model's {list(slot.shape)}", str(list(shape)))
    if dtype.is_floating_point != slot.dtype.is_floating_point:
        file.fail(name, f"dtype must be of the model's kind, {slot.dtype}", str(dtype))


def _read_plain(file: TensorFile, name: str, slot: Tensor, device) -> Tensor:
    entry = file.entries[name]
    _check_slot(file, name, entry.shape, entry.dtype, slot)
    value = file.read(name)
    if not isinstance(slot, nn.Parameter):
        return value.to(device)
    _check_finite(file.path, name, value)
    return nn.Parameter(value.to(device), requires_grad=slot.requires_grad and value.is_floating_point())


def _read_quantized(file: TensorFile, name: str, attributes: dict, slot: Tensor, device) -> nn.Parameter:
    shape, bits, act_bits = attributes["shape"], attributes["bits"], attributes["act_bits"]
    dtype, groups = DTYPES[attributes["dtype"]], attributes["input_groups"]
    _check_slot(file, name, shape, dtype, slot)
    w = width(bits)
    sizes = {"groups": len(groups), "out": shape[0], "in": shape[1], "r": shape[-2], "s": shape[-1]}
    sizes["packed"] = packed_channels(bits, groups)
    rules = {
        "qdata": TensorRule((_STORAGE[w.storage],), ("out", "packed", "r", "s")[: len(shape)]),
        "scale": WEIGHT_SCALE,
        "bos_input": BOS_INPUT,
        "bos_output": BOS_OUTPUT,
    }
    if act_bits is not None:
        rules |= {"act_scale": ACT_SCALE, "act_zero_point": ACT_ZERO_POINT[act_bits]}
    parts = {}
    for key in _keys(file, name):
        part = key[len(name) + 1 :]
        if part not in rules:
            file.fail(key, "a weight without act_bits must have no activation parameters")
        parts[part] = file.read(key)
        rules[part].check(file.fail, key, parts[part], sizes)
    for part, partner in (
        ("act_scale", "act_zero_point"),
        ("act_zero_point", "act_scale"),
        ("bos_input", "bos_output"),
    ):
        if part in parts and partner not in parts:
            file.fail(f"{name}.{part}", f"must come with {partner}", "none")
    parts = {part: tensor.to(device) for part, tensor in parts.items()}
    try:
        weight = MixDQTensor.from_codes(
            parts.pop("qdata"),
            parts.pop("scale"),
            bits=bits,
            shape=shape,
            dtype=dtype,
            input_groups=groups,
            act_bits=act_bits,
            **parts,
        )
    except MixDQError as error:
        raise CheckpointError(file.path, name, "must be a quantized weight that can be computed", str(error)) from error
    return nn.Parameter(weight, requires_grad=False)


_STORAGE = {"int8": torch.int8, "uint8": torch.uint8}


def _assign(modules: dict[str, nn.Module], name: str, value: Tensor) -> None:
    owner, _, key = name.rpartition(".")
    slots = modules[owner]._parameters if isinstance(value, nn.Parameter) else modules[owner]._buffers
    slots[key] = value


def _check_complete(file: TensorFile, model: nn.Module) -> None:
    """A buffer that no file stores has no values in a model that was built on the meta device."""
    missing = [name for name, buffer in model.named_buffers() if buffer.device.type == "meta"]
    if missing:
        advice = "Build the model yourself and give it as model=."
        file.fail(missing[0], "every buffer must be stored in the file", f"none for {name_list(missing)}", advice)


@dataclass(frozen=True)
class FileRow:
    """One layer of a file: the widths stored for its weight and its activations, input groups, bytes, and a reason
    where it stayed floating."""

    name: str
    bits: tuple[int, ...]
    act_bits: tuple[int, ...]
    groups: int
    nbytes: int
    reason: str = ""


@dataclass(frozen=True)
class FileDescription:
    """What a file holds. ``kind`` is "model", "parameters", "original parameters" or "bit plan".

    ``nbytes`` are the bytes of all tensors; in a model those of ``rows`` and of everything else that is floating.
    ``metadata`` are further facts, values of JSON types.
    """

    path: str
    kind: str
    rows: list[FileRow]
    nbytes: int
    metadata: dict = field(default_factory=dict)


def describe(path) -> FileDescription:
    """What ``path`` holds, without building a model or reading its weights. Raises ``CheckpointError``."""
    if legacy.is_original(path):
        return _describe_params(path, "original parameters", legacy.read_original(path))
    if Path(path).suffix in (".json", *YAML_SUFFIXES):
        plan = BitPlan.read(path)
        return FileDescription(
            str(path), "bit plan", [FileRow(n, (b or FLOAT_BITS,), (), 1, 0) for n, b in plan.items()], 0
        )
    formats = {checkpoint.FORMAT: lambda: _describe_params(path, "parameters", QuantParams.load(path))}
    formats[FORMAT] = lambda: _describe_model(path)
    file = TensorFile(path)
    found = file.metadata.get("format")
    if found not in formats:
        file.fail(f"{METADATA_KEY}.format", f"must be one of {', '.join(formats)}", repr(found))
    return formats[found]()


def _describe_params(path, kind: str, params: QuantParams) -> FileDescription:
    rows = []
    for name, layer in params.layers.items():
        nbytes = sum(tensor.nbytes for _, _, tensor in layer.tensors())
        rows.append(
            FileRow(name, tuple(sorted(layer.weight_scale)), tuple(sorted(layer.act_scale)), layer.groups, nbytes)
        )
    facts = {
        "bos_aware": params.bos_aware,
        "bos_layers": sum(layer.bos_output is not None for layer in params.layers.values()),
        "protect": params.protect,
        "weight_plan": params.weight_plan is not None,
        "act_plan": params.act_plan is not None,
        "model_hash": params.model_hash,
    }
    return FileDescription(str(path), kind, rows, sum(row.nbytes for row in rows), facts)


def _describe_model(path) -> FileDescription:
    file, values = _open(path)
    rows = []
    for name, attributes in values["quantized"].items():
        act_bits = () if attributes["act_bits"] is None else (attributes["act_bits"],)
        nbytes = sum(file.entries[key].nbytes for key in _keys(file, name))
        layer = name.removesuffix(".weight")
        rows.append(FileRow(layer, (attributes["bits"],), act_bits, len(attributes["input_groups"]), nbytes))
    for name, reason in values["reasons"].items():
        if f"{name}.weight" not in values["quantized"]:
            entry = file.entries.get(f"{name}.weight")
            rows.append(FileRow(name, (), (), 1, entry.nbytes if entry else 0, reason))
    facts = {"class_name": values["class_name"], **values["own"]}
    return FileDescription(str(path), "model", rows, sum(entry.nbytes for entry in file.entries.values()), facts)
