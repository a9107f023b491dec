"""What a compiled program depends on besides the values of its inputs, as hashes that are the same in every process.

Dynamo reads attributes of modules, their code, and the globals that this code names; a program that is loaded without
Dynamo must have been made of the same. Tensors count by type, sizes and strides, never by value.
"""

import enum
import functools
import hashlib
import sys
import types
from collections.abc import Iterable, Mapping, Set

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

# An SDXL UNet consists of some 50,000. A model that holds on to half a program is better traced again.
_MAX_OBJECTS = 1_000_000

_PLAIN = (bool, int, float, complex, str, bytes, range, type(None), type(Ellipsis))
_PLAIN += (torch.dtype, torch.device, torch.layout, torch.memory_format)
_NAMED = (type, types.ModuleType, enum.Enum, types.BuiltinFunctionType)
_NAMED += (types.MethodDescriptorType, types.WrapperDescriptorType)

# No forward reads them: where a configuration came from, and in random order what was not said there; and what
# torch.compile leaves on a model.
_UNREAD = ("_name_or_path", "_commit_hash", "_use_default_values", "_is_torch_compile")

# Dynamo wraps these methods of nn.Module as soon as it compiles one. What they have made of a module is read from it.
_UNREAD_OF_CLASSES = ("__init__", "__setstate__", "___needs_generation_tag_patch", "__dict__", "__weakref__")


class IndescribableError(Exception):
    """Something of which nothing can be said that holds in another process too."""


def describe(value) -> str:
    """SHA-256, in hex, of all that ``value`` is made of: modules, containers, functions, tensors without their values.

    An object that occurs twice is told from two that are equal. Raises :class:`IndescribableError` for what has no
    attributes to read, such as locks and handles of other libraries.
    """
    description = _Description()
    try:
        description.add(value)
    except RecursionError:
        raise IndescribableError("something in it is nested too deeply") from None
    return description.digest()


def describe_code(modules: Iterable[str]) -> dict[str, str]:
    """The functions, classes and constants of each module as they are now: what somebody has replaced shows.

    Values are SHA-256, in hex; "" for a module that is not loaded.
    """
    return {name: _describe_module(sys.modules[name]) if name in sys.modules else "" for name in sorted(set(modules))}


def _describe_module(module: types.ModuleType) -> str:
    description = _Description(strict=False)
    # Sorted, and without its own submodules: when a program imports something is its own affair.
    own = f"{module.__name__}."
    names = {
        name: value
        for name, value in sorted(vars(module).items())
        if not name.startswith("__") and not (isinstance(value, types.ModuleType) and value.__name__.startswith(own))
    }
    description.add_names(names)
    for value in names.values():
        if isinstance(value, type) and value.__module__ == module.__name__:
            description.add_names({k: v for k, v in vars(value).items() if k not in _UNREAD_OF_CLASSES})
    return description.digest()


class _Description:
    """A list of tokens. Strict: everything is read or an error; otherwise other objects count by their type."""

    def __init__(self, strict: bool = True):
        self._strict = strict
        self._tokens: list[str] = []
        self._seen: dict[int, tuple[int, object]] = {}  # the object too, or another could get its id

    def digest(self) -> str:
        return hashlib.sha256("\0".join(self._tokens).encode(errors="surrogatepass")).hexdigest()

    def text(self, token: str) -> None:
        self._tokens.append(token)

    def add(self, value) -> None:
        if isinstance(value, _NAMED):
            self.text(_name(value))
        elif isinstance(value, _PLAIN):
            self.text(f"{type(value).__qualname__} {value!r}")
        elif isinstance(value, tuple | frozenset):  # whether two of them are one is up to the interpreter
            self._add_parts(value)
        elif id(value) in self._seen:
            self.text(f"#{self._seen[id(value)][0]}")
        else:
            if len(self._seen) == _MAX_OBJECTS:
                raise IndescribableError(f"it consists of more than {_MAX_OBJECTS} objects")
            self._seen[id(value)] = len(self._seen), value
            self._add_parts(value)

    def add_names(self, names: Mapping[str, object]) -> None:
        """What functions and constants are; what the code keeps for itself meanwhile, in lists and the like, is not."""
        for name, value in names.items():
            is_kept = isinstance(value, Mapping | list | Set) and not isinstance(value, frozenset)
            if self._strict or not is_kept or name.isupper():
                self.text(name)
                self.add(value)

    def _add_parts(self, value) -> None:
        self.text(f"{_name(type(value))}(")
        if isinstance(value, Tensor):
            self._add_tensor(value)
        elif isinstance(value, Mapping):
            self._add_items(value)
        elif isinstance(value, list | tuple):
            for part in value:
                self.add(part)
        elif isinstance(value, Set):
            for digest in sorted(map(self._digest_of, value)):
                self.text(digest)
        elif isinstance(value, types.FunctionType):
            self._add_function(value)
        elif isinstance(value, types.CodeType):
            self._add_code(value)
        elif isinstance(value, types.MethodType):
            self.add(value.__func__)
            self.add(value.__self__)
        elif isinstance(value, functools.partial):
            self.add((value.func, value.args, value.keywords))
        elif isinstance(value, staticmethod | classmethod):
            self.add(value.__func__)
        elif isinstance(value, property):
            self.add((value.fget, value.fset))
        elif isinstance(value, functools.cached_property):
            self.add(value.func)
        elif self._strict:
            self._add_attributes(value)
        self.text(")")

    def _digest_of(self, value) -> str:
        part = _Description(self._strict)
        part.add(value)
        return part.digest()

    def _add_items(self, items: Mapping) -> None:
        for key, value in items.items():
            if key not in _UNREAD:
                self.add(key)
                self.add(value)

    def _add_attributes(self, value) -> None:
        slots = [name for cls in type(value).__mro__ for name in getattr(cls, "__slots__", ())]
        if not slots and not hasattr(value, "__dict__"):
            raise IndescribableError(f"there is a {_name(type(value))} in it, of which nothing is known")
        self._add_items({name: getattr(value, name) for name in slots if hasattr(value, name)})
        self._add_items(getattr(value, "__dict__", {}))

    def _add_tensor(self, value: Tensor) -> None:
        self.add((value.dtype, value.device, tuple(value.shape), value.requires_grad, value.is_inference()))
        if is_traceable_wrapper_subclass(value):
            names, context = value.__tensor_flatten__()
            self.add((names, context, *(getattr(value, name) for name in names)))
        else:
            self.add((value.layout, value.stride() if value.layout == torch.strided else None))

    def _add_function(self, function: types.FunctionType) -> None:
        self.text(_name(function))
        self.add((function.__code__, function.__defaults__, function.__kwdefaults__))
        # An empty cell, of a name that is not there yet, equals only another.
        cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
        self.add_names({name: cell.cell_contents for name, cell in cells if cell != types.CellType()})

    def _add_code(self, code: types.CodeType) -> None:
        self.add((code.co_code, code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars, code.co_consts))
        self.add((code.co_flags, code.co_argcount, code.co_kwonlyargcount, code.co_posonlyargcount))
        self.add(getattr(code, "co_exceptiontable", b""))


def _name(value) -> str:
    """Of a class, function, module or member of an enumeration, without what differs between processes."""
    if isinstance(value, enum.Enum):
        return f"{_name(type(value))}.{value.name}"
    return f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', getattr(value, '__name__', ''))}"
