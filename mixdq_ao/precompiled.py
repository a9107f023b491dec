"""Compiled steps as files: a process that finds its step starts in seconds, as nothing of the model is traced again.

torch's own caches keep what Inductor generates, but Dynamo traces the model in every process, which for SDXL takes
longer than all else. Here the whole step is kept, by ``aot_compile``, without guards: in their place stand the
description of model, arguments and settings (``describing``), which names the file, and that of the code that was
traced, which is written in it. Files lie in Inductor's folder, and like all of that are programs to be trusted.
"""

import builtins
import contextlib
import importlib
import io
import json
import platform
import re
import tempfile
import types
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from mixdq_ao._version import __version__
from mixdq_ao.checkpoint import check_format
from mixdq_ao.describing import IndescribableError, describe, describe_code
from mixdq_ao.files import TensorFile, first_line, parse_json, replacing, write_tensors
from mixdq_ao.passes import FuseQuantizers

FORMAT = "mixdq_ao.precompiled"
FORMAT_VERSION = "1"

_PROGRAM = "program"
_NAME = re.compile("[0-9a-f]{64}")

# Described whatever was traced: where people put another attention, and the hooks of all modules.
_ALWAYS = ("torch.nn.functional", "torch.nn.modules.module")

# Inductor's settings for passes of other people, whose effect no description tells.
_PASSES = ("pre_grad_custom_pass", "joint_custom_pre_pass", "joint_custom_post_pass", "post_grad_custom_pre_pass")
_PASSES += ("post_grad_custom_post_pass",)

# What this process has compiled or loaded, for ``save_compile_cache``.
_used: dict[str, Path] = {}


class NotKeptError(Exception):
    """Why a step cannot be a file; it can be compiled as ever."""


@dataclass
class Step:
    """A compiled step: ``run(model, args, kwargs)``, for any model that is described by the same.

    ``hits`` is how often each rewrite was made, ``code`` the description of what was traced.
    """

    run: Callable[[nn.Module, tuple, dict], object]
    hits: Counter[str]
    code: dict[str, str]


class Steps:
    """The steps of one compiled model, each loaded or compiled once.

    Args:
        fuse: the passes
        options: Inductor's, with the passes among them
    """

    def __init__(self, fuse: FuseQuantizers, options: dict):
        self._fuse, self._options = fuse, options
        self._steps: dict[str, Step] = {}

    def find(self, model: nn.Module, args: tuple, kwargs: dict) -> Step:
        """The step for these arguments, from this process, an earlier one, or compiled and kept for the next.

        Raises :class:`NotKeptError` where only ``torch.compile`` can do it, or gives the error that it would give.
        """
        if reason := _why_not():
            raise NotKeptError(reason)
        try:
            name = describe(self._all_it_depends_on(model, args, kwargs))
        except IndescribableError as error:
            raise NotKeptError(str(error)) from None
        except Exception as error:  # of something that another torch has elsewhere: it can still compile
            raise NotKeptError(f"what it depends on cannot be read: {first_line(error)}") from error
        step = self._steps.get(name)
        if step is None or describe_code(step.code) != step.code:
            step = self._steps[name] = _load(name) or self._compile(name, model, args, kwargs)
        return step

    def _all_it_depends_on(self, model: nn.Module, args: tuple, kwargs: dict) -> list:
        options = {key: value for key, value in self._options.items() if value is not self._fuse}
        devices = {t.device for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        gpus = [torch.cuda.get_device_properties(device) for device in devices if device.type == "cuda"]
        cuda, sdp = torch.backends.cuda, ("flash", "mem_efficient", "math", "cudnn")
        return [
            [__version__, torch.__version__, torch.version.git_version, platform.python_version()],
            [torch.backends.cpu.get_cpu_capability(), {f"{gpu.name} {gpu.major}.{gpu.minor}" for gpu in gpus}],
            [self._fuse.uuid(), options],
            [config.save_config_portable() for config in (torch._inductor.config, torch._functorch.config)],
            [torch.get_default_dtype(), torch.get_float32_matmul_precision()],
            [torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory],
            [getattr(cuda, f"{name}_sdp_enabled")() for name in sdp],
            [torch.is_inference_mode_enabled(), torch.is_autocast_cache_enabled()],
            [torch.get_autocast_dtype(d) if torch.is_autocast_enabled(d) else None for d in ("cuda", "cpu")],
            [args, kwargs],
            model,
        ]

    def _compile(self, name: str, model: nn.Module, args: tuple, kwargs: dict) -> Step:
        options = {**self._options, "guard_filter_fn": torch.compiler.skip_all_guards_unsafe}
        try:
            with torch._dynamo.config.patch(enable_aot_compile=True):  # which is off in torch 2.11
                compiled = torch.compile(_step, fullgraph=True, dynamic=False, options=options)
            with _stand_ins(model):
                run = compiled.aot_compile(((model, args, kwargs), {}))
            traced = {source.module for source in run.source_info().inlined_sources}
            step = Step(run, Counter(self._fuse.hits), describe_code(traced.union(_ALWAYS)))
        except Exception as error:
            raise NotKeptError(f"torch's aot_compile failed: {first_line(error)}") from error
        try:
            _keep(name, step)
        except Exception as error:
            warnings.warn(f"a compiled step was not kept for other processes: {first_line(error)}", stacklevel=2)
        return step


def _why_not() -> str:
    """Why this process keeps no steps; empty if it does."""
    stance = getattr(torch._dynamo.eval_frame, "_stance", None)  # of which torch says nothing in public
    reasons = {
        f"torch {torch.__version__} has no torch.compiler.load_compiled_function": not hasattr(
            torch.compiler, "load_compiled_function"
        ),
        "torch.compile is switched off": torch._dynamo.config.disable
        or getattr(stance, "stance", "default") != "default",
        "torch's caches are switched off": torch._inductor.config.force_disable_caches,
        "Inductor's config has passes of its own": any(getattr(torch._inductor.config, name, None) for name in _PASSES),
        "gradients are on; call it under torch.no_grad() or torch.inference_mode()": torch.is_grad_enabled(),
    }
    return next((reason for reason, holds in reasons.items() if holds), "")


def used_files() -> dict[str, bytes]:
    """By its name, the file of each step that this process has compiled or loaded."""
    return {name: path.read_bytes() for name, path in _used.items() if path.exists()}


def is_name(text: str) -> bool:
    """Whether a file of :func:`used_files` can be called that."""
    return _NAME.fullmatch(text) is not None


def keep_file(name: str, data: bytes) -> None:
    """Put a file of :func:`used_files` where the next :meth:`Steps.find` looks."""
    with replacing(_new_path(name)) as file:
        file.write(data)


def _call(model: nn.Module, args: tuple, kwargs: dict):
    return model(*args, **kwargs)


# With globals of its own, to which Dynamo adds modules; and torch 2.11 looks for builtins nowhere else.
_step = types.FunctionType(_call.__code__, {**vars(builtins), "__name__": __name__, "__builtins__": builtins})


@contextlib.contextmanager
def _stand_ins(model: nn.Module) -> Iterator[None]:
    """Meanwhile, parameters and buffers are other tensors with the same memory.

    aot_compile leaves weak references to what it has traced, and ``nn.Module.to()`` refuses to move a quantized weight
    that has one.
    """
    found = [d for m in model.modules() for d in (m._parameters, m._buffers) if d]
    before = [dict(d) for d in found]
    with torch.inference_mode(False), torch.no_grad():  # which would make inference tensors of quantized weights
        others = {id(t): _other(t) for d in before for t in d.values() if t is not None}
    try:
        for d in found:
            d.update({name: others[id(t)] for name, t in d.items() if t is not None})
        yield
    finally:
        for d, tensors in zip(found, before, strict=True):
            d.update(tensors)


def _other(tensor: Tensor) -> Tensor:
    other = tensor.detach()
    if isinstance(tensor, nn.Parameter):
        other = nn.Parameter(other, requires_grad=tensor.requires_grad)
    if type(other) is not type(tensor):
        raise TypeError(f"detach() makes a {type(other).__name__} of a {type(tensor).__name__}")
    return other


def _path(name: str) -> Path:
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    return Path(cache_dir()) / "mixdq_ao" / f"{name}.safetensors"


def _new_path(name: str) -> Path:
    path = _path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _keep(name: str, step: Step) -> None:
    with tempfile.TemporaryDirectory() as folder:
        saved = Path(folder) / _PROGRAM
        step.run.save_compiled_function(str(saved))
        data = torch.frombuffer(bytearray(saved.read_bytes()), dtype=torch.uint8)
    described = {"code": step.code, "hits": step.hits, "modules": _named_by_dynamo()}
    header = {"format": FORMAT, "format_version": FORMAT_VERSION}
    path = _new_path(name)
    write_tensors(path, {_PROGRAM: data}, header | {key: json.dumps(value) for key, value in described.items()})
    _used[name] = path


def _named_by_dynamo() -> dict[str, str]:
    """The modules among the globals of :func:`_step`, under names of Dynamo's own.

    It puts them there while it compiles, for instance to make the dataclass that a model returns; aot_compile leaves it
    to whoever loads a step to have them.
    """
    found = {name: value for name, value in _step.__globals__.items() if isinstance(value, types.ModuleType)}
    return {name: module.__name__ for name, module in found.items() if module is not builtins}


def _load(name: str) -> Step | None:
    """What :func:`_keep` wrote; None if there is none, or the code has changed since."""
    path = _path(name)
    if not path.exists():
        return None
    try:
        file = TensorFile(path)
        check_format(file, FORMAT, FORMAT_VERSION)
        code, hits, named = (parse_json(path, key, file.metadata[key]) for key in ("code", "hits", "modules"))
        if describe_code(code) != code:
            return None
        data = io.BytesIO(file.read(_PROGRAM).numpy().tobytes())
        modules = {alias: importlib.import_module(module) for alias, module in named.items()}
        run = torch.compiler.load_compiled_function(data, f_globals={**vars(builtins), **modules})
    except Exception as error:
        warnings.warn(f"{path} cannot be used, the step is compiled anew: {first_line(error)}", stacklevel=2)
        return None
    _used[name] = path
    return Step(run, Counter(hits), code)
