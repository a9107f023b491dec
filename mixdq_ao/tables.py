"""Tables of numbers for each layer: sensitivity scores at every width, and sizes; the original's YAML, or JSON.

A score table maps a layer to ``[at 2 bits, at 4 bits, at 8 bits]``; null stands for a width that was not measured, and
higher is safer. A size table maps a layer to one number.
"""

import json
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import yaml

from mixdq_ao.bits import WEIGHT_BITS
from mixdq_ao.errors import CheckpointError, MixDQError
from mixdq_ao.files import parse_json, read_text, write_text
from mixdq_ao.plan import YAML_SUFFIXES, cut_prefix, yaml_events, yaml_place

Scores = dict[str, dict[int, float]]  # layer -> bits -> score
Sizes = dict[str, float]  # layer -> size

SCORE_BITS = tuple(sorted(WEIGHT_BITS))
_SCORE_RULE = (
    f"a layer must have {len(SCORE_BITS)} numbers, for {', '.join(map(str, SCORE_BITS))} bits (null: not known)"
)
_NUMBER = re.compile(r"[-+]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]{1,3})?")
_NULLS = ("", "~", "null", "Null", "NULL")


def read_scores(path) -> Scores:
    """The scores of a file, of the widths that were measured. Raises ``CheckpointError`` naming file, key and rule."""
    scores = {}
    for name, values in _read(path).items():
        if not isinstance(values, list) or len(values) != len(SCORE_BITS):
            raise CheckpointError(path, name, _SCORE_RULE, repr(values)[:80])
        scores[name] = {}
        for bits, value in zip(SCORE_BITS, values, strict=True):
            if value is not None:
                scores[name][bits] = _number(path, name, value, "a score must be a finite number")
        if not scores[name]:
            raise CheckpointError(path, name, "a layer must have a score for at least one width", "none")
    return scores


def read_sizes(path) -> Sizes:
    """The sizes of a file, all positive. Raises ``CheckpointError`` naming file, key and rule."""
    rule = "a size must be a positive number"
    sizes = {name: _number(path, name, value, rule) for name, value in _read(path).items()}
    for name, size in sizes.items():
        if size <= 0:
            raise CheckpointError(path, name, rule, repr(size))
    return sizes


def write_scores(path, scores: Mapping[str, Mapping[int, float]]) -> None:
    """Writes what ``read_scores`` reads, whole or not at all; ``.yaml``, ``.yml`` or ``.json``."""
    _write(path, {name: [by_bits.get(bits) for bits in SCORE_BITS] for name, by_bits in scores.items()})


def write_sizes(path, sizes: Mapping[str, float]) -> None:
    """Writes what ``read_sizes`` reads, whole or not at all; ``.yaml``, ``.yml`` or ``.json``."""
    _write(path, dict(sizes))


def _write(path, content: dict) -> None:
    suffix = Path(path).suffix
    if suffix not in (".json", *YAML_SUFFIXES):
        raise MixDQError(f"{path}: a table is written as .json or .yaml; found {suffix!r}")
    if suffix == ".json":
        write_text(path, json.dumps(content, indent=1, allow_nan=False) + "\n")
    else:
        write_text(path, yaml.safe_dump(content, sort_keys=False, width=10**6))


def _read(path) -> dict[str, float | list[float | None] | None]:
    """Layer to a number, or to a flat list of numbers and nulls; strings stand for whatever is neither."""
    text = read_text(path)
    content = parse_json(path, "", text) if Path(path).suffix == ".json" else _read_yaml(path, text)
    if not isinstance(content, dict) or not content:
        raise CheckpointError(path, "", "must be a map with at least one layer", repr(content)[:80])
    layers = {}
    for name, value in content.items():
        layer = cut_prefix(name)
        if not layer:
            raise CheckpointError(path, name, "a layer name must be a non-empty string")
        if layer in layers:
            raise CheckpointError(path, layer, "a layer must be named once", "it twice")
        layers[layer] = value
    return layers


def _number(path, name: str, value, rule: str) -> float:
    # Compared as it is: a whole number of JSON may be too large for a float.
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= sys.float_info.max:
        raise CheckpointError(path, name, rule, repr(value)[:80])
    return float(value)


def _read_yaml(path, text: str) -> dict:
    events = yaml_events(path, text)
    event = next(events, None)
    if not isinstance(event, yaml.MappingStartEvent):
        raise CheckpointError(path, yaml_place(event) if event else "", "must be a YAML map from layer to numbers")
    content = {}
    for event in events:
        if isinstance(event, yaml.MappingEndEvent):
            break
        if not isinstance(event, yaml.ScalarEvent):
            raise CheckpointError(path, yaml_place(event), "a layer name must be a string")
        if event.value in content:
            raise CheckpointError(path, event.value, "a layer must be named once", "it twice")
        content[event.value] = _yaml_value(path, event.value, events)
    for event in events:
        raise CheckpointError(path, yaml_place(event), "must be one map", "a second document")
    return content


def _yaml_value(path, name: str, events: Iterator[yaml.Event]):
    event = next(events)
    if isinstance(event, yaml.ScalarEvent):
        return _yaml_number(event)
    values = []
    if isinstance(event, yaml.SequenceStartEvent):
        for event in events:
            if isinstance(event, yaml.SequenceEndEvent):
                return values
            if not isinstance(event, yaml.ScalarEvent):
                break
            values.append(_yaml_number(event))
    raise CheckpointError(path, name, "must be a number or one flat list of numbers", f"nesting in {yaml_place(event)}")


def _yaml_number(event: yaml.ScalarEvent) -> float | str | None:
    plain = event.implicit[0]
    if plain and event.value in _NULLS:
        return None
    return float(event.value) if plain and _NUMBER.fullmatch(event.value) else event.value
