"""``mixdq_ao.compile``: torch.compile with our graph passes, and on a GPU one CUDA graph for each size."""

import contextlib
import hashlib
import inspect
import sys
import warnings
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._dynamo.eval_frame import OptimizedModule
from torch.utils import _pytree as pytree

from mixdq_ao import siblings
from mixdq_ao.attention import AUTO, BACKENDS
from mixdq_ao.errors import UnsupportedError
from mixdq_ao.passes import FUNCTIONS, FuseQuantizers, Passes, use_operators
from mixdq_ao.precompiled import NotKeptError, Step, Steps
from mixdq_ao.progress import track
from mixdq_ao.tensor import InferenceOnly, MixDQTensor

INDUCTOR, EAGER = "inductor", "eager"

# Calls before a capture: the first compiles, and libraries that plan on first use (cuDNN, cuBLAS) settle.
_WARM_UP_CALLS = 3

# Sizes are compiled one by one; Dynamo's own limit of 8 for a function is meant for accidents.
_RECOMPILE_LIMIT = 64

# What peft's layers and attention modules keep outside of parameters though their forward depends on it.
_WATCHED = ("processor", "scaling", "_active_adapter", "_disable_adapters", "merged_adapters")


def compile(
    model: nn.Module,
    *,
    fullgraph: bool = True,
    dynamic: bool | None = False,
    cuda_graphs: bool | str = "auto",
    passes: Passes | None = None,
    attention: str | None = AUTO,
    backend: str = INDUCTOR,
    max_graphs: int = 8,
    copy_outputs: bool = True,
    cache: bool | str = "auto",
    options: dict | None = None,
    progress: bool | None = None,
) -> "CompiledModel":
    """Compile a quantized UNet: ``pipe.unet = mixdq_ao.compile(pipe.unet)``.

    The result stands for ``model``, which it shares: attributes, ``config``, ``state_dict()`` and ``to()`` are those of
    ``model``, and ``model`` itself still runs eagerly. Nothing is compiled before the first call; then every new batch
    and picture size is compiled once. A floating model is compiled as it is but for its attention, with CUDA graphs,
    which makes for a fair comparison.

    Args:
        fullgraph, dynamic, options: as for ``torch.compile``; ``options`` are Inductor's
        cuda_graphs: record each size as a CUDA graph and replay it: ``"auto"`` where that is possible (on a GPU,
            without gradients, no offloading), True to raise where it is not, False never
        passes: which rewrites to make; all by default
        attention: which exact backend computes attention that has no mask. ``"auto"``: on a GPU the fastest for each
            size, measured at the first call; torch's ``"flash"``, ``"cudnn"``, ``"efficient"`` or ``"math"``, or our
            ``"mixdq"``, for 64 channels a head: that one, so that every process computes the same bits; None: the one
            that torch picks
        backend: ``"inductor"`` generates code for what lies between our operators. ``"eager"`` runs the rewritten graph
            operator by operator: nothing is generated, so that no compiler is needed and the first call takes a third
            of the time; a step takes a little longer
        max_graphs: how many sizes to keep recorded; the one that was used longest ago goes first
        copy_outputs: give every call its own output. False saves a copy, but a call overwrites the output of the one
            before it with the same sizes
        cache: keep each compiled step in Inductor's folder, so that the next process loads it in seconds instead of
            tracing the model again: ``"auto"`` where CUDA graphs are recorded, True everywhere, False never, which
            leaves Inductor's own cache. What cannot be kept is compiled all the same, with a warning if this is True
        progress: say on stderr that a size is being compiled; None: if that is a terminal

    A quantized model runs without gradients, whatever the caller's mode: it has no backward pass, and asking for one is
    an error. A recorded graph is dropped when parameters are replaced or moved, and when adapters or attention
    processors change, and another step is looked for. After changing anything else that ``forward`` depends on (say,
    ``enable_freeu``), call ``reset()``.
    """
    if backend not in (INDUCTOR, EAGER):
        raise UnsupportedError(f"backend must be {INDUCTOR} or {EAGER}; found {backend!r}")
    if backend == EAGER and options:
        raise UnsupportedError(f"options are Inductor's, which backend={EAGER!r} does without; found {options}")
    if backend == INDUCTOR and not hasattr(torch._inductor.config, "pre_grad_custom_pass"):
        raise UnsupportedError(
            f"mixdq_ao.compile needs Inductor's pre_grad_custom_pass, which torch {torch.__version__} lacks. "
            f"Use torch >= 2.11; or backend={EAGER!r} or torch.compile(model, fullgraph=True), which are slower"
        )
    if cuda_graphs not in (True, False, "auto"):
        raise UnsupportedError(f"cuda_graphs must be True, False or 'auto'; found {cuda_graphs!r}")
    if cache not in (True, False, "auto"):
        raise UnsupportedError(f"cache must be True, False or 'auto'; found {cache!r}")
    if cache is True and (backend == EAGER or not fullgraph or dynamic is not False):
        raise UnsupportedError(
            f"cache=True needs backend={INDUCTOR!r}, fullgraph=True and dynamic=False; "
            f"found {backend!r}, {fullgraph} and {dynamic}. Change that, or use cache='auto'"
        )
    if attention not in (None, AUTO, *BACKENDS):
        raise UnsupportedError(f"attention must be {AUTO}, {', '.join(BACKENDS)} or None; found {attention!r}")
    if max_graphs < 1:
        raise UnsupportedError(f"max_graphs must be at least 1; found {max_graphs}")
    model = getattr(model, "_orig_mod", model)
    passes, options = passes or Passes(), options or {}
    settings = _Settings(
        fullgraph, dynamic, cuda_graphs, passes, attention, backend, max_graphs, copy_outputs, cache, options, progress
    )
    return CompiledModel(model, settings)


def _is_quantized(model: nn.Module) -> bool:
    return any(isinstance(p, MixDQTensor) for p in model.parameters())


def _inductor_options(fuse: FuseQuantizers) -> dict:
    # torch 2.11 looks graphs up in its cache after the pass has run, and then must be told that our functions are pure.
    version = hashlib.sha256(fuse.uuid()).hexdigest()
    names = {f"{f.__module__}.{f.__name__}": version for f in FUNCTIONS}
    return {"pre_grad_custom_pass": fuse, "unsafe_marked_cacheable_functions": names}


def _operator_by_operator(fuse: FuseQuantizers) -> Callable:
    """A backend of Dynamo's."""

    def run(graph_module: torch.fx.GraphModule, inputs: list) -> Callable:
        fuse(graph_module.graph)
        use_operators(graph_module.graph)
        graph_module.recompile()
        return graph_module.forward

    return run


@dataclass
class _Settings:
    """The arguments of :func:`compile`."""

    fullgraph: bool
    dynamic: bool | None
    cuda_graphs: bool | str
    passes: Passes
    attention: str | None
    backend: str
    max_graphs: int
    copy_outputs: bool
    cache: bool | str
    options: dict
    progress: bool | None


class CompiledModel(OptimizedModule):
    """What :func:`compile` returns; to other libraries a module that ``torch.compile`` has wrapped."""

    # Declared here, so that OptimizedModule keeps them on the wrapper instead of giving them to the model.
    _settings = _fuse = _graphs = _seen = _watch = _pool = _stream = _timestep_position = _quantized = None
    _steps = _found = None

    def __init__(self, model: nn.Module, settings: _Settings):
        fuse, steps = FuseQuantizers(settings.passes, settings.attention), None
        how = {"fullgraph": settings.fullgraph, "dynamic": settings.dynamic}
        if settings.backend == EAGER:
            optimized = torch.compile(model, backend=_operator_by_operator(fuse), **how)
        else:
            options = {**_inductor_options(fuse), **settings.options}
            optimized = torch.compile(model, options=options, **how)
            if settings.cache is not False and settings.fullgraph and settings.dynamic is False:
                steps = Steps(fuse, options)
        super().__init__(model, optimized.dynamo_ctx)
        self._settings, self._fuse, self._steps = settings, fuse, steps
        self._found: dict[tuple, Step | None] = {}
        self._graphs: OrderedDict[tuple, _Graph] = OrderedDict()
        self._seen: set[tuple] = set()
        parameters = list(inspect.signature(model.forward).parameters)
        self._timestep_position = parameters.index("timestep") if "timestep" in parameters else None

    @property
    def __class__(self):
        """The model's: a diffusers pipeline leaves parts of other classes out when adapters are set or unloaded."""
        return type(self._orig_mod)

    def __reduce__(self):
        return CompiledModel, (self._orig_mod, self._settings)

    @property
    def hits(self) -> Counter:
        """How often each rewrite was made in the graph compiled or loaded last; without ``cache``, from torch 2.12 on
        empty if Inductor's cache had it."""
        return self._fuse.hits

    @property
    def recorded(self) -> int:
        """How many CUDA graphs are held."""
        return len(self._graphs)

    def reset(self) -> None:
        """Drop every CUDA graph, and look at the model again. Compiled code stays, and is used where it fits."""
        self._graphs.clear()
        self._seen.clear()
        self._found.clear()
        self._watch = None

    def state_dict(self, *args, **kwargs):
        return self._orig_mod.state_dict(*args, **kwargs)

    def load_state_dict(self, *args, **kwargs):
        return self._orig_mod.load_state_dict(*args, **kwargs)

    def __call__(self, *args, **kwargs):
        self._prepare()
        args, kwargs = self._with_timestep(args, kwargs)
        leaves, spec = pytree.tree_flatten((args, kwargs))
        if not (self._quantized and torch.is_grad_enabled()):
            return self._run(args, kwargs, leaves, spec)
        # Compiled with gradients it would give those of what is not quantized alone, which are wrong.
        source = next((t for t in (*leaves, *self._watch.values()) if _is_tensor(t) and t.requires_grad), None)
        with torch.no_grad():
            output = self._run(args, kwargs, leaves, spec)
        if source is None:
            return output
        return pytree.tree_map_only(Tensor, lambda y: InferenceOnly.apply(y, source), output)

    def _run(self, args: tuple, kwargs: dict, leaves: list, spec):
        key = _key(leaves, spec)
        if not self._wants_graph(leaves):
            return self._call(key, args, kwargs, leaves, self._settings.cache is True)
        graph = self._graphs.get(key)
        if graph is None:
            while len(self._graphs) >= self._settings.max_graphs:
                self._graphs.popitem(last=False)
            with torch.cuda.device(next(v.device for v in leaves if _is_tensor(v))):
                graph = self._graphs[key] = self._record(key, leaves, spec)
        self._graphs.move_to_end(key)
        return graph(leaves, self._settings.copy_outputs)

    def _prepare(self) -> None:
        """Once, and again whenever parameters were replaced or moved: compare and pack siblings, forget recordings."""
        if self._watch is not None and self._watch.is_unchanged():
            return
        self.reset()
        watch = _Watch(self._orig_mod)
        if not watch.is_offloaded:
            with torch.inference_mode(False), torch.no_grad():  # parameters are no inference tensors
                siblings.mark_shared(self._orig_mod)
                siblings.pack_siblings_(self._orig_mod, self._settings.passes.max_merged)
            watch = _Watch(self._orig_mod)
        self._watch, self._quantized = watch, _is_quantized(self._orig_mod)

    def _with_timestep(self, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """The timestep as a tensor on the model's device: a number would be compiled in, a CPU tensor cannot be in a
        CUDA graph."""
        i = self._timestep_position
        given = kwargs.get("timestep", args[i] if i is not None and i < len(args) else None)
        if i is None or given is None:
            return args, kwargs
        if not isinstance(given, Tensor):
            given = torch.tensor(given, dtype=torch.float64 if isinstance(given, float) else torch.int64)
        device = next((t.device for t in (*args, *kwargs.values()) if _is_tensor(t) and t.dim()), given.device)
        given = given.to(device, non_blocking=True)
        if "timestep" in kwargs:
            return args, {**kwargs, "timestep": given}
        return (*args[:i], given, *args[i + 1 :]), kwargs

    def _wants_graph(self, leaves: list) -> bool:
        wanted = self._settings.cuda_graphs
        if wanted is False:
            return False
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        reasons = {
            "the inputs are not all on one CUDA device": not tensors
            or len({t.device for t in tensors}) > 1
            or not tensors[0].is_cuda,
            "gradients are on; call it under torch.no_grad() or torch.inference_mode()": torch.is_grad_enabled(),
            "the model is offloaded, so that its weights move": self._watch.is_offloaded,
        }
        found = [reason for reason, holds in reasons.items() if holds]
        if found and wanted is True:
            raise UnsupportedError(f"cuda_graphs=True: {found[0]}. Change that, or use cuda_graphs='auto'")
        return not found

    def _call(self, key: tuple, args: tuple, kwargs: dict, leaves: list, kept: bool):
        step = self._step(key, args, kwargs, leaves) if kept and self._steps is not None else None
        if step is not None:
            return step.run(self._orig_mod, args, kwargs)
        with self._compiling(key):
            return super().__call__(*args, **kwargs)

    def _step(self, key: tuple, args: tuple, kwargs: dict, leaves: list) -> Step | None:
        """The kept step for these arguments; None where torch.compile has to do."""
        numbers: dict[int, int] = {}  # of tensors, of which two arguments may be the same
        tensors = ((t.stride(), numbers.setdefault(id(t), len(numbers))) for t in leaves if _is_tensor(t))
        key = key, *tensors
        if key not in self._found:
            try:
                step = self._found[key] = self._steps.find(self._orig_mod, args, kwargs)
                self._fuse.hits = Counter(step.hits)
            except NotKeptError as error:
                if self._settings.cache is True or error.__cause__ is not None:
                    warnings.warn(f"a compiled step is not kept for other processes: {error}", stacklevel=2)
                self._found[key] = None
        return self._found[key]

    @contextlib.contextmanager
    def _compiling(self, key: tuple):
        """A call that may have to compile first."""
        if key in self._seen:
            yield
            return
        limit = max(_RECOMPILE_LIMIT, torch._dynamo.config.recompile_limit)
        with torch._dynamo.config.patch(recompile_limit=limit):
            yield
        self._seen.add(key)

    def _record(self, key: tuple, leaves: list, spec) -> "_Graph":
        static = [torch.empty_like(v, memory_format=torch.contiguous_format) if _is_tensor(v) else v for v in leaves]
        _copy(static, leaves)
        args, kwargs = pytree.tree_unflatten(static, spec)
        show = sys.stderr.isatty() if self._settings.progress is None else self._settings.progress
        sizes = " ".join("x".join(map(str, v.shape)) for v in leaves if _is_tensor(v) and v.dim() > 1)
        if not self._graphs:
            # Graphs share memory only if pool and stream are the same. A pool whose last graph is gone is not taken
            # again by torch while one of its outputs lives.
            self._pool, self._stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()
        stream = self._stream
        stream.wait_stream(torch.cuda.current_stream())
        kept = self._settings.cache is not False
        with torch.cuda.stream(stream):
            for _ in track(range(_WARM_UP_CALLS), f"Compiling for {sizes}", show=show):
                self._call(key, args, kwargs, static, kept)
                stream.synchronize()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # The outer one restores the caller's stream also where the capture fails.
        with torch.cuda.stream(stream), torch.cuda.graph(graph, pool=self._pool, stream=stream):
            output = self._call(key, args, kwargs, static, kept)
        return _Graph(graph, static, output)


@dataclass
class _Graph:
    """A recording, the inputs that it reads and the output that it writes."""

    graph: "torch.cuda.CUDAGraph"
    inputs: list
    output: object

    def __call__(self, leaves: list, copy_outputs: bool):
        _copy(self.inputs, leaves)
        self.graph.replay()
        return pytree.tree_map_only(Tensor, torch.clone, self.output) if copy_outputs else self.output


def _is_tensor(value) -> bool:
    return isinstance(value, Tensor)


def _copy(targets: list, sources: list) -> None:
    for target, source in zip(targets, sources, strict=True):
        if _is_tensor(target):
            target.copy_(source)


def _key(leaves: list, spec) -> tuple:
    """All that a compiled graph depends on, as far as a call shows it."""
    values = [(v.shape, v.dtype, v.device) if _is_tensor(v) else (type(v), v) for v in leaves]
    autocast = [torch.get_autocast_dtype(d) if torch.is_autocast_enabled(d) else None for d in ("cuda", "cpu")]
    return tuple(values), spec, torch.is_grad_enabled(), torch.is_inference_mode_enabled(), *autocast


class _Watch:
    """Notices that a model's parameters, adapters or processors are no longer those that were looked at.

    Called before every step: it follows the dictionaries of the modules and reads addresses, and walks no module.
    """

    def __init__(self, model: nn.Module):
        modules = list(model.modules())
        self.tensors = [d for m in modules for d in (m._parameters, m._buffers) if d]
        self.children = [m._modules for m in modules if m._modules]
        self.attributes = [(m.__dict__, name) for m in modules for name in _WATCHED if name in m.__dict__]
        self.attributes.append((model.__dict__, "_hf_hook"))
        # accelerate's hooks move weights to the device for a call and away after it.
        self.is_offloaded = any("_hf_hook" in m.__dict__ for m in modules)
        self.before = self._state()

    def is_unchanged(self) -> bool:
        return self._state() == self.before

    def values(self) -> Iterator[Tensor]:
        """The parameters and buffers that were looked at."""
        return (t for d in self.tensors for t in d.values() if t is not None)

    def _state(self) -> tuple:
        addresses = [
            (t.qdata.data_ptr(), t.act_group) if type(t) is MixDQTensor else t.data_ptr()
            for d in self.tensors
            for t in d.values()
            if t is not None
        ]
        children = [id(m) for d in self.children for m in d.values()]
        return addresses, children, [_snapshot(d.get(name)) for d, name in self.attributes]


def _snapshot(value):
    """Dictionaries and lists are changed in place."""
    if isinstance(value, dict):
        return tuple(value.items())
    return tuple(value) if isinstance(value, list) else value if isinstance(value, (str, bool)) else id(value)
