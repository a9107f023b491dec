"""Quantization parameters: scales, zero points and BOS vectors of each layer, as one safetensors file.

Keys are ``<layer>.weight_scale.<bits>``, ``<layer>.act_scale.<bits>``, ``<layer>.act_zero_point.<bits>``,
``<layer>.bos_input`` and ``<layer>.bos_output``; plans, protect list and flags are JSON strings in the metadata.
"""

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mixdq_ao.bits import ACT_BITS, FLOAT_BITS, WEIGHT_BITS, WIDTHS
from mixdq_ao.errors import CheckpointError, PlanError
from mixdq_ao.files import METADATA_KEY, TensorFile, check_exact_keys, parse_json, write_tensors
from mixdq_ao.plan import BitPlan

FORMAT = "mixdq_ao.quant_params"
FORMAT_VERSION = "1"

FINITE = ("values must be finite", torch.isfinite)
POSITIVE = ("scales must be finite and positive", lambda t: torch.isfinite(t) & (t > 0))
WHOLE = ("zero points must be whole numbers", lambda t: torch.isfinite(t) & (t == t.round()))


@dataclass(frozen=True)
class TensorRule:
    """What a stored tensor must be: its dtypes, the names of its dimensions, and (rule, mask of good values) pairs."""

    dtypes: tuple[torch.dtype, ...]
    dims: tuple[str, ...]
    checks: tuple[tuple[str, Callable[[Tensor], Tensor]], ...] = ()

    def check(self, fail: Callable[..., None], key: str, tensor, sizes: dict[str, int]) -> None:
        """Calls ``fail(key, rule, found)`` for the first rule that ``tensor`` breaks.

        ``sizes`` maps a dimension's name to its size; a name that is not there yet is added, so that the tensors of
        one layer must agree with one another.
        """
        if not isinstance(tensor, Tensor):
            fail(key, "must be a tensor", type(tensor).__name__)
        if tensor.dtype not in self.dtypes:
            fail(key, f"dtype must be {' or '.join(map(str, self.dtypes))}", str(tensor.dtype))
        if tensor.dim() != len(self.dims):
            fail(key, f"shape must be [{', '.join(self.dims)}]", str(list(tensor.shape)))
        for name, size in zip(self.dims, tensor.shape, strict=True):
            if size == 0 or sizes.setdefault(name, size) != size:
                fail(
                    key,
                    f"shape must be [{', '.join(self.dims)}] with {name} = {sizes.get(name, 'at least 1')}",
                    str(size),
                )
        for rule, good in self.checks:
            mask = good(tensor)
            if not mask.all():
                index = int((~mask).flatten().nonzero()[0])
                fail(key, rule, f"{tensor.flatten()[index].item()} at [{index}] of the flattened tensor")


def zero_point_range(bits: int) -> tuple[str, Callable[[Tensor], Tensor]]:
    """The check that a zero point is a code of ``bits`` in the signed domain."""
    low, high = WIDTHS[bits].qmin, WIDTHS[bits].qmax
    return f"zero points must lie in {low}..{high}", lambda t: (t >= low) & (t <= high)


_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
WEIGHT_SCALE = TensorRule((torch.float32,), ("groups", "out"), (POSITIVE,))
ACT_SCALE = TensorRule((torch.float32,), ("groups",), (POSITIVE,))
ACT_ZERO_POINT = {bits: TensorRule((torch.float32,), ("groups",), (WHOLE, zero_point_range(bits))) for bits in ACT_BITS}
BOS_INPUT = TensorRule(_FLOATS, ("in",), (FINITE,))
BOS_OUTPUT = TensorRule(_FLOATS, ("out",), (FINITE,))

# Field of LayerParams -> rule for each width, or one rule for a field without widths.
SCHEMA: dict[str, dict[int, TensorRule] | TensorRule] = {
    "weight_scale": dict.fromkeys(WEIGHT_BITS, WEIGHT_SCALE),
    "act_scale": dict.fromkeys(ACT_BITS, ACT_SCALE),
    "act_zero_point": ACT_ZERO_POINT,
    "bos_input": BOS_INPUT,
    "bos_output": BOS_OUTPUT,
}
_BITS_FIELDS = "|".join(name for name, rule in SCHEMA.items() if isinstance(rule, dict))
_PLAIN_FIELDS = "|".join(name for name, rule in SCHEMA.items() if not isinstance(rule, dict))
_KEY = re.compile(
    rf"(?P<layer>.+)\.(?:(?P<field>{_BITS_FIELDS})\.(?P<bits>[0-9]{{1,3}})|(?P<plain>{_PLAIN_FIELDS}))", re.S
)


@dataclass(eq=False)
class LayerParams:
    """The parameters of one layer; every map is bits -> tensor.

    - ``weight_scale``: fp32 ``[groups, out]``, finite and positive
    - ``act_scale``: fp32 ``[groups]``, finite and positive
    - ``act_zero_point``: fp32 ``[groups]``, whole numbers in the signed domain (-128..127 for 8 bits)
    - ``bos_input``: floating ``[in]`` or None; ``bos_output``: floating ``[out]`` or None
    """

    weight_scale: dict[int, Tensor] = field(default_factory=dict)
    act_scale: dict[int, Tensor] = field(default_factory=dict)
    act_zero_point: dict[int, Tensor] = field(default_factory=dict)
    bos_input: Tensor | None = None
    bos_output: Tensor | None = None

    @property
    def groups(self) -> int:
        """Number of input-channel groups: 2 for a split shortcut, else 1."""
        scales = [*self.weight_scale.values(), *self.act_scale.values()]
        return scales[0].shape[0] if scales else 1

    def tensors(self):
        """Yields (key below the layer's name, rule or None for a width that does not exist, tensor)."""
        for name, rules in SCHEMA.items():
            value = getattr(self, name)
            if isinstance(rules, TensorRule):
                if value is not None:
                    yield name, rules, value
            else:
                for bits, tensor in value.items():
                    yield f"{name}.{bits}", rules.get(bits), tensor

    def validate(self, file, layer: str) -> None:
        """Raises ``CheckpointError`` naming ``file``, the key and the rule for the first rule that is broken."""

        def fail(key, rule, found="", advice=""):
            raise CheckpointError(file, f"{layer}.{key}", rule, found, advice)

        sizes = {}
        for key, rule, tensor in self.tensors():
            if rule is None:
                known = ", ".join(map(str, SCHEMA[key.partition(".")[0]]))
                fail(key, f"bits must be one of {known}", key.rpartition(".")[2])
            rule.check(fail, key, tensor, sizes)
        if not sizes:
            raise CheckpointError(file, layer, "a layer must have at least one parameter", "none")
        for here, there in (("act_scale", "act_zero_point"), ("act_zero_point", "act_scale")):
            for bits in getattr(self, here).keys() - getattr(self, there).keys():
                fail(f"{here}.{bits}", f"must come with {there}.{bits}", "none")
        if self.bos_input is not None and self.bos_output is None:
            fail("bos_input", "must come with bos_output", "none")


@dataclass(eq=False, repr=False)
class QuantParams:
    """Quantization parameters of a model.

    - ``layers``: layer name -> ``LayerParams``
    - ``weight_plan``, ``act_plan``: the plans that go with them, or None; they name layers of ``layers`` only
    - ``protect``: names of layers that stay floating
    - ``bos_aware``: the ranges of the BOS layers were taken without token 0
    - ``model_hash``: ``model_hash`` of the model they belong to; None = unknown
    - ``source``: for messages, where they came from; not stored
    """

    layers: dict[str, LayerParams]
    weight_plan: BitPlan | None = None
    act_plan: BitPlan | None = None
    protect: list[str] = field(default_factory=list)
    bos_aware: bool = False
    model_hash: str | None = None
    source: str = "<parameters>"

    def __repr__(self) -> str:
        bos = ", BOS apart" if self.bos_aware else ""
        return f"QuantParams({len(self.layers)} layers{bos}, {len(self.protect)} protected, from {self.source})"

    def save(self, path) -> None:
        """Writes one safetensors file, whole or not at all. Raises ``CheckpointError`` where ``load`` would."""
        self.validate(path)
        tensors = {f"{name}.{key}": t for name, layer in self.layers.items() for key, _, t in layer.tensors()}
        metadata = {"format": FORMAT, "format_version": FORMAT_VERSION}
        metadata |= {name: json.dumps(value) for name, value in self._metadata().items()}
        write_tensors(path, tensors, metadata)

    @classmethod
    def load(cls, path) -> "QuantParams":
        """Reads what ``save`` wrote. Raises ``CheckpointError`` naming file, key and rule for anything else."""
        file = TensorFile(path)
        check_format(file, FORMAT, FORMAT_VERSION)
        values = read_metadata(file, _METADATA)
        layers: dict[str, LayerParams] = {}
        for key in file.entries:
            match = _KEY.fullmatch(key)
            if match is None:
                file.fail(key, "unknown key", advice="Keys are <layer>.weight_scale.<bits> and the like.")
            layer = layers.setdefault(match["layer"], LayerParams())
            if match["plain"]:
                setattr(layer, match["plain"], file.read(key))
            elif match["bits"] != str(int(match["bits"])) or int(match["bits"]) not in SCHEMA[match["field"]]:
                known = ", ".join(map(str, SCHEMA[match["field"]]))
                file.fail(key, f"bits must be one of {known}", match["bits"])
            else:
                getattr(layer, match["field"])[int(match["bits"])] = file.read(key)
        for name in ("weight_plan", "act_plan"):
            if values[name] is not None:
                values[name] = BitPlan(values[name], source=f"{path}, {name}")
        params = cls(layers, **values, source=str(path))
        params.validate(path)
        return params

    def validate(self, file) -> None:
        """Raises ``CheckpointError`` naming ``file``, the key and the rule for the first rule that is broken."""
        if not self.layers:
            raise CheckpointError(file, "", "must hold at least one layer", "none")
        for name, layer in self.layers.items():
            if not isinstance(name, str) or not name:
                raise CheckpointError(file, str(name), "a layer name must be a non-empty string", repr(name))
            layer.validate(file, name)
        for key, (rule, holds) in _METADATA.items():
            value = self._metadata()[key]
            if not holds(value):
                raise CheckpointError(file, key, rule, repr(value)[:80])
        for what in ("weight_plan", "act_plan", "protect"):
            for name in getattr(self, what) or ():
                if name not in self.layers:
                    raise CheckpointError(file, name, f"{what} must name only layers of this file", "a layer not there")

    def layer(self, name: str) -> LayerParams:
        """The parameters of layer ``name``. Raises ``PlanError`` where there are none."""
        if name not in self.layers:
            raise PlanError(f"checkpoint {self.source}: no parameters for layer {name}. Protect it, or calibrate again")
        return self.layers[name]

    def scale(self, name: str, kind: str, bits: int) -> Tensor:
        """The scale of layer ``name`` at ``bits``, of its "weight" ``[groups, out]`` or its "act" ``[groups]``.

        Raises ``PlanError`` for a layer or a width without one.
        """
        by_bits = getattr(self.layer(name), f"{kind}_scale")
        if bits not in by_bits:
            what, found = "activation" if kind == "act" else kind, sorted(by_bits) or "none"
            raise PlanError(f"{name}: checkpoint {self.source} has no {what} scale for {bits} bits, only for {found}")
        return by_bits[bits]

    def _metadata(self) -> dict:
        """The values that are stored as JSON in the metadata."""
        values = {name: getattr(self, name) for name in _METADATA}
        return {name: dict(value) if isinstance(value, BitPlan) else value for name, value in values.items()}


def model_hash(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """SHA-256, in hex, over the sorted lines ``name:shape`` of ``shapes`` (layer name -> weight shape)."""
    lines = sorted(f"{name}:{'x'.join(map(str, shape))}\n" for name, shape in shapes.items())
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def check_format(file: TensorFile, name: str, version: str) -> None:
    """Raises ``CheckpointError`` unless the metadata of ``file`` says this format and version."""
    for key, value in (("format", name), ("format_version", version)):
        found = file.metadata.get(key)
        if found != value:
            advice = "It was written by another version of mixdq_ao." if key == "format_version" else ""
            file.fail(f"{METADATA_KEY}.{key}", f"must be {value!r}", repr(found), advice)


def read_metadata(file: TensorFile, schema: Mapping[str, tuple[str, Callable]]) -> dict:
    """The JSON values of a file's metadata, all of ``schema`` (key -> (rule, predicate)) and no others.

    Raises ``CheckpointError`` for a missing or unknown key, for text that is not JSON and for a value that breaks its
    rule. ``format`` and ``format_version`` are left to ``check_format``.
    """

    def fail(key, rule, found=""):
        file.fail(f"{METADATA_KEY}.{key}", rule, found)

    check_exact_keys(fail, "the metadata", file.metadata.keys() - {"format", "format_version"}, schema)
    values = {}
    for key, (rule, holds) in schema.items():
        values[key] = parse_json(file.path, f"{METADATA_KEY}.{key}", file.metadata[key])
        if not holds(values[key]):
            fail(key, rule, repr(values[key])[:80])
    return values


def _is_plan(bits: tuple[int, ...]) -> Callable:
    def holds(value) -> bool:
        return value is None or (
            isinstance(value, dict)
            and all(value)
            and all(b is None or (type(b) is int and b in (*bits, FLOAT_BITS)) for b in value.values())
        )

    return holds


def _is_names(value) -> bool:
    return isinstance(value, list) and all(type(v) is str and v for v in value) and len(set(value)) == len(value)


def _is_hash(value) -> bool:
    return value is None or (type(value) is str and re.fullmatch("[0-9a-f]{64}", value) is not None)


_METADATA = {
    "weight_plan": ("must be null or a map from layer to bits 8, 4, 2 or null", _is_plan(WEIGHT_BITS)),
    "act_plan": ("must be null or a map from layer to bits 8, 4 or null", _is_plan(ACT_BITS)),
    "protect": ("must be a list of different layer names", _is_names),
    "bos_aware": ("must be true or false", lambda value: type(value) is bool),
    "model_hash": ("must be null or 64 hexadecimal digits", _is_hash),
}
