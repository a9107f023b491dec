"""Bit plans: which layer gets how many bits, as a YAML file of the original project or as our JSON."""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import yaml

from mixdq_ao.bits import FLOAT_BITS, WEIGHT_BITS
from mixdq_ao.errors import CheckpointError, PlanError, name_list
from mixdq_ao.files import check_exact_keys, is_pickle, load_pickle, parse_json, read_text, write_text

FORMAT = "mixdq_ao.bit_plan"
FORMAT_VERSION = 1
YAML_SUFFIXES = (".yaml", ".yml")

# The C scanner is ten times faster where libyaml is there; both give the same events.
_YAML_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_YAML_FRAME = (yaml.StreamStartEvent, yaml.StreamEndEvent, yaml.DocumentStartEvent, yaml.DocumentEndEvent)


class BitPlan(Mapping[str, int | None]):
    """An immutable map from layer name to bits (2, 4 or 8), or None for a layer that stays floating.

    ``source`` says in messages where the plan came from. 16 bits are taken as None. Raises ``PlanError`` for bits that
    do not exist and for a name that is not a non-empty string.
    """

    def __init__(self, bits: Mapping[str, int | None], source: str = "<mapping>"):
        for name, value in bits.items():
            if problem := _problem(name, value):
                raise PlanError(f"{source}: '{name}': {problem[0]}; found {problem[1]}")
        self.source = source
        self._bits = {name: None if value == FLOAT_BITS else value for name, value in bits.items()}

    def __getitem__(self, name: str) -> int | None:
        return self._bits[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._bits)

    def __len__(self) -> int:
        return len(self._bits)

    def __repr__(self) -> str:
        return f"BitPlan({len(self)} layers from {self.source})"

    @classmethod
    def uniform(cls, names: Iterable[str], bits: int | None) -> "BitPlan":
        """The same ``bits`` for every layer of ``names``."""
        return cls(dict.fromkeys(names, bits), source=f"uniform {FLOAT_BITS if bits is None else bits} bits")

    @classmethod
    def read(cls, path) -> "BitPlan":
        """Reads the original's YAML (everything up to a ``model.`` in a name is cut) or our JSON (``*.json``).

        Raises ``CheckpointError`` naming file, key and rule for whatever the file breaks.
        """
        text = read_text(path)
        entries = _json_entries(path, text) if Path(path).suffix == ".json" else _yaml_entries(path, text)
        if not entries:
            raise CheckpointError(path, "", "a bit plan must name at least one layer")
        for name, value in entries.items():
            if problem := _problem(name, value):
                raise CheckpointError(path, name, *problem)
        return cls(entries, source=str(path))

    def write(self, path) -> None:
        """Writes JSON (``.json``) or the original's YAML (``.yaml``, ``.yml``), whole or not at all.

        Raises ``PlanError`` for another suffix, for an empty plan and for names that reading the YAML would shorten.
        """
        suffix = Path(path).suffix
        if suffix not in (".json", *YAML_SUFFIXES):
            raise PlanError(f"{path}: a bit plan is written as .json or .yaml; found {suffix!r}")
        if not self:
            raise PlanError(f"{path}: an empty bit plan cannot be written")
        if suffix == ".json":
            content = {"format": FORMAT, "format_version": FORMAT_VERSION, "bits": self._bits}
            write_text(path, json.dumps(content, indent=1) + "\n")
            return
        shortened = [name for name in self if cut_prefix(name) != name]
        if shortened:
            raise PlanError(
                f"{path}: YAML names lose their 'model.'; found {name_list(shortened)}. Write .json instead"
            )
        bits = {name: FLOAT_BITS if value is None else value for name, value in self.items()}
        write_text(path, yaml.safe_dump(bits, sort_keys=False, width=10**6))

    def mean_bits(self, sizes: Mapping[str, float]) -> float:
        """Mean over this plan's layers, weighted by ``sizes`` (layer name -> count); floating layers count 16.

        Raises ``PlanError`` where ``sizes`` lacks a layer or the sizes add up to nothing.
        """
        missing = [name for name in self if name not in sizes]
        if missing:
            raise PlanError(f"{self.source}: no size for {name_list(missing)}")
        total = sum(sizes[name] for name in self)
        if not total > 0:
            raise PlanError(f"{self.source}: the sizes of the layers must add up to more than 0; found {total}")
        return sum(sizes[name] * (FLOAT_BITS if bits is None else bits) for name, bits in self.items()) / total


def _problem(name, bits) -> tuple[str, str] | None:
    """The rule that an entry of a plan breaks and what was found, or None."""
    if not isinstance(name, str) or not name:
        return "a layer name must be a non-empty string", repr(name)
    if bits is not None and (type(bits) is not int or bits not in (*WEIGHT_BITS, FLOAT_BITS)):
        return f"bits must be one of {', '.join(map(str, WEIGHT_BITS))}, or {FLOAT_BITS} or null for floating", repr(
            bits
        )
    return None


def cut_prefix(name: str) -> str:
    """A layer name of the original without everything up to and including its first ``model.``."""
    return re.sub(r"^(?:.*?\.)?model\.", "", name, count=1)


def _json_entries(path, text: str) -> dict:
    content = parse_json(path, "", text)
    if not isinstance(content, dict):
        raise CheckpointError(path, "", "must be a JSON object", type(content).__name__)

    def fail(key, rule, found=""):
        raise CheckpointError(path, key, rule, found)

    check_exact_keys(fail, "a bit plan", content, ("format", "format_version", "bits"))
    for key, value in (("format", FORMAT), ("format_version", FORMAT_VERSION)):
        if content[key] != value or type(content[key]) is not type(value):
            fail(key, f"must be {value!r}", repr(content[key]))
    if not isinstance(content["bits"], dict):
        fail("bits", "must be a JSON object", type(content["bits"]).__name__)
    return content["bits"]


def _yaml_entries(path, text: str) -> dict:
    scalars = list(_yaml_scalars(path, text, yaml.MappingStartEvent))
    for name in scalars[::2]:
        if type(name) is not str:
            raise CheckpointError(path, str(name), "a layer name must be a non-empty string", repr(name))
    return dict(zip(_unique_names(path, map(cut_prefix, scalars[::2])), scalars[1::2], strict=True))


def yaml_events(path, text: str) -> Iterator[yaml.Event]:
    """The parser events of a YAML file's content, without the frame around documents.

    Anchors, aliases and tags are refused here, before anything is built. Raises ``CheckpointError``.
    """
    try:
        for event in yaml.parse(text, _YAML_LOADER):
            if isinstance(event, _YAML_FRAME):
                continue
            if getattr(event, "anchor", None):  # an alias has one, too
                raise CheckpointError(path, yaml_place(event), "anchors and aliases are not allowed", event.anchor)
            if getattr(event, "tag", None):
                raise CheckpointError(path, yaml_place(event), "tags are not allowed", event.tag)
            yield event
    except (yaml.YAMLError, RecursionError) as error:
        raise CheckpointError(path, "", "must be YAML", " ".join(str(error).split())) from error


def yaml_place(event: yaml.Event) -> str:
    """The line of an event, as the key of an error."""
    return f"line {event.start_mark.line + 1}"


def _yaml_scalars(path, text: str, start: type) -> Iterator:
    """The scalars of a flat YAML map or list (``start``) in order: str, int, None or, for other kinds, an ``_Other``.

    It works on parser events, so that nesting is refused before anything is built.
    """
    kind, ended = "map" if start is yaml.MappingStartEvent else "list", False
    for position, event in enumerate(yaml_events(path, text)):
        place = yaml_place(event)
        if position == 0 and not isinstance(event, start):
            raise CheckpointError(path, place, f"must be a YAML {kind}")
        if ended or (position > 0 and isinstance(event, yaml.CollectionStartEvent)):
            raise CheckpointError(path, place, f"must be one flat {kind}", "a nested value or a second document")
        ended = isinstance(event, yaml.CollectionEndEvent)
        if isinstance(event, yaml.ScalarEvent):
            yield _scalar(event)


_resolver = yaml.resolver.Resolver()


class _Other(str):
    """A YAML scalar that is neither a string, a decimal integer nor null; it prints as it is written."""

    __repr__ = str.__str__


def _scalar(event):
    tag = _resolver.resolve(yaml.ScalarNode, event.value, event.implicit).rpartition(":")[2]
    if tag == "str":
        return event.value
    if tag == "int" and re.fullmatch(r"[0-9]{1,9}", event.value):
        return int(event.value)
    return None if tag == "null" else _Other(event.value)


def _unique_names(path, names: Iterable[str]) -> list[str]:
    seen = {}
    for name in names:
        if name in seen:
            raise CheckpointError(path, name, "a layer must be named once", "it twice")
        seen[name] = None
    return list(seen)


def read_names(path) -> list[str]:
    """Layer names, in the order of the file: a JSON or YAML list, a text file (one name per line, ``#`` comments) or
    the original's pickled list of strings. A ``model.`` prefix is cut.

    Raises ``CheckpointError`` for a file that is none of these, a name that is not a string and a name that is there
    twice.
    """
    if is_pickle(path):
        names = load_pickle(path)
    elif Path(path).suffix == ".json":
        names = parse_json(path, "", read_text(path))
    elif Path(path).suffix in YAML_SUFFIXES:
        names = list(_yaml_scalars(path, read_text(path), yaml.SequenceStartEvent))
    else:
        names = [line.partition("#")[0].strip() for line in read_text(path).splitlines()]
        names = [name for name in names if name]
    if not isinstance(names, list):
        raise CheckpointError(path, "", "must be a list of layer names", type(names).__name__)
    for position, name in enumerate(names):
        if type(name) is not str or not name:
            raise CheckpointError(path, f"[{position}]", "a layer name must be a non-empty string", repr(name)[:80])
    return _unique_names(path, map(cut_prefix, names))
