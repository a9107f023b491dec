"""``run_bench``: measures variants one after the other, each from fresh memory, and keeps what is done."""

import contextlib
import gc
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from datetime import datetime
from multiprocessing.connection import Connection, wait
from pathlib import Path

import torch
from torch import nn

from mixdq_ao import families
from mixdq_ao.bench import timing, tracing
from mixdq_ao.bench.inputs import make_inputs
from mixdq_ao.bench.models import SDXL, Source, find_model
from mixdq_ao.bench.results import NOT_FINITE, Results, Row, Settings, agreement
from mixdq_ao.bench.turns import Turns, within
from mixdq_ao.bench.variants import (
    COMPILED,
    DTYPES,
    Prepared,
    Variant,
    default_names,
    float_name,
    parse_variants,
    with_plan,
)
from mixdq_ao.calibrate import observe
from mixdq_ao.doctor import examine
from mixdq_ao.errors import MixDQError
from mixdq_ao.files import first_line, writable_file, writable_folder
from mixdq_ao.fingerprints import digest
from mixdq_ao.memory import measure_memory
from mixdq_ao.pipelines import checked_device
from mixdq_ao.plan import BitPlan
from mixdq_ao.progress import between

# Ranges of activations are taken from that many pictures: enough to see that the first token is always the same.
CALIBRATION_BATCH = 2
ENDING_SECONDS = 10.0  # that a process has for what it is doing when it is to end


def run_bench(
    model: str = SDXL,
    *,
    size: int = 512,
    batches: Sequence[int] = (1,),
    variants: Sequence[str] | None = None,
    device: str = "cpu",
    dtype: str | None = None,
    plan: str | os.PathLike | None = None,
    compile: bool = True,
    layers: int | None = None,
    channels_last: bool = True,
    repeats: int = 20,
    warmup: int = 3,
    cold: bool = True,
    seed: int = 0,
    jobs: int = 1,
    compile_limit: float | None = None,
    out: str | os.PathLike | None = None,
    resume: bool = False,
    profile: str | os.PathLike | None = None,
    memory_snapshot: str | os.PathLike | None = None,
    progress: bool | None = None,
) -> Results:
    """Measure latency, memory and agreement of a UNet's variants on random inputs.

    Args:
        model: see :func:`mixdq_ao.bench.models.find_model`
        variants: names, see :data:`mixdq_ao.bench.variants.NAMES`; ``compile`` False measures quantized ones eagerly
        dtype: "fp16", "bf16" or "fp32"; fp16 on a GPU and fp32 on a CPU by default
        plan: a bit plan of the weights, with 8-bit activations, as one more variant
        layers: at most so many transformer layers in each block, for random weights
        channels_last: memory format of convolution weights and of the input, for every variant alike
        cold: compile every variant with empty caches, so that the seconds it takes say something
        jobs: prepare and compile that many variants side by side, each in a process of its own, which holds a model on
            the device; they are measured one after the other, but seconds of compiling are those of a shared machine.
            A script that asks for several needs a main guard
        compile_limit: seconds; a variant that needs more for a batch size becomes a row that says so
        out: a JSON file, written after each variant; ``resume`` keeps the rows that it has
        profile: a folder for traces of one step of each variant (a call, and on a GPU a replay of its CUDA graph, where
            no kernel waits for the host), and for what nsys and ncu say where they are
        memory_snapshot: a pickle of CUDA's allocations, one for each variant, for the first batch size
        progress: a bar on stderr; None: if that is a terminal, and else a line for each row

    A variant that fails (not supported here, out of memory) becomes a row that says why. Raises ``MixDQError`` for
    arguments that cannot be followed.
    """
    if variants and plan is not None:
        variants = with_plan(variants)
    bench = _Bench(
        model, batches, variants, size=size, device=device, dtype=dtype, plan=plan, compile=compile, layers=layers,
        channels_last=channels_last, repeats=repeats, warmup=warmup, cold=cold, seed=seed, profile=profile,
        snapshot=memory_snapshot, compile_limit=compile_limit,
    )  # fmt: skip
    if jobs < 1:
        raise MixDQError(f"jobs must be at least 1; found {jobs}")
    if resume and out is None:
        raise MixDQError("resume keeps the rows of a file that an earlier run wrote; give that file as out (--out)")
    for path in (out, memory_snapshot):
        if path is not None:
            writable_file(path)
    if profile is not None:
        writable_folder(profile)
    return bench.run(None if out is None else Path(out), resume, progress, jobs)


def run_step(model: str, variant: str, batch: int, **options) -> None:
    """One step of a variant for nsys and ncu, which look at nothing before it.

    ``options``: size, device, dtype, plan, compile, layers, channels_last and seed, as for :func:`run_bench`.
    """
    bench = _Bench(model, [batch], [variant], repeats=1, warmup=1, cold=False, **options)
    with bench.warm() as call, tracing.profiled(bench.device), tracing.marked(bench.variants[0].name, bench.device):
        call()


@contextlib.contextmanager
def warm_step(
    model: str, variant: str, batch: int, *, size: int, device: str, layers: int | None = None
) -> Iterator[tuple[Callable[[], torch.Tensor], Turns]]:
    """A step of a variant, built, compiled and called as :func:`run_bench` does it, for those who measure in other
    ways; and the turns that its user is to take with other runs on the device."""
    bench = _Bench(
        model, [batch], [variant], size=size, device=device, dtype=None, plan=None, compile=True, layers=layers,
        channels_last=True, repeats=1, warmup=1, cold=False, seed=0,
    )  # fmt: skip
    with bench.warm() as call:
        yield call, bench.turns


class _Bench:
    """Checked arguments of a run, and its parts."""

    def __init__(
        self, model, batches, variants, *, size, device, dtype, plan, compile, layers, channels_last, repeats, warmup,
        cold, seed, profile=None, snapshot=None, compile_limit=None,
    ):  # fmt: skip
        self.device = checked_device(device)
        self.turns, self.compile_limit = Turns(self.device), compile_limit
        if dtype is not None and dtype not in DTYPES:
            raise MixDQError(f"dtype must be one of {', '.join(DTYPES)}; found {dtype!r}")
        self.dtype = DTYPES[dtype or ("fp16" if self.device.type == "cuda" else "fp32")]
        self.batches = sorted(set(batches))
        for what, values in (("batch", self.batches), ("repeats", [repeats]), ("size", [size])):
            if not values or min(values) < 1:
                raise MixDQError(f"{what} must be at least 1; found {values}")
        if not 0 <= seed < 2**32:
            raise MixDQError(f"seed must be a number of 32 bits; found {seed}")
        # A timer knows no other; 0 would switch it off.
        if compile_limit is not None and not 0 < compile_limit <= threading.TIMEOUT_MAX:
            raise MixDQError(f"compile_limit must be a positive number of seconds; found {compile_limit}")
        self.source: Source = find_model(model, layers, seed)
        if size % self.source.latent_scale:
            raise MixDQError(f"size must be a multiple of {self.source.latent_scale} pixels; found {size}")
        plan = None if plan is None else os.fspath(plan)
        self.variants = parse_variants(
            default_names(self.device, compile, plan is not None) if variants is None else variants,
            self.dtype, plan, layers is None, compile,
        )  # fmt: skip
        self.settings = Settings(
            model, size, float_name(self.dtype), str(self.device), plan, layers, channels_last, repeats, warmup, cold,
            seed,
        )  # fmt: skip
        self.compile = compile
        self.profile, self.snapshot = (None if path is None else Path(path) for path in (profile, snapshot))
        if self.snapshot and self.device.type != "cuda":
            raise MixDQError(
                "a memory snapshot shows what CUDA's allocator did, and this run is on a CPU. Leave it out"
            )

    def run(self, out: Path | None, resume: bool, progress: bool | None, jobs: int) -> Results:
        results = self._start(out, resume)
        kept = {(r.variant, r.batch): r for r in results.rows if not r.error}
        todo = [v for v in self.variants if any((v.name, b) not in kept for b in self.batches)]
        started = datetime.now().astimezone().isoformat(timespec="seconds")
        steps = len(todo) * len(self.batches) + 1
        with self._state(), between(steps, progress) as self.advance:
            self.advance("waiting while another run measures on this device", 0)
            with self.turns.together():
                prepared = self._prepare() if todo else Prepared()
            results.notes += [note for note in _not_comparable(prepared) if note not in results.notes]
            for rows in self._all(todo, prepared, started, jobs):
                kept.update({(r.variant, r.batch): r for r in rows})
                results.rows = _ordered(kept, self.variants, self.batches)
                if out is not None:
                    results.write(out)
                if progress is None and not sys.stderr.isatty():
                    print(*map(_line, rows), sep="\n", file=sys.stderr, flush=True)
        if self.profile:
            results.notes += self._call_tools([v for v in todo if not kept[v.name, self.batches[0]].error])
            if out is not None:
                results.write(out)
        return results

    def _all(self, todo: list[Variant], prepared: Prepared, started: str, jobs: int) -> Iterator[list[Row]]:
        """The rows of each variant as soon as they are there."""
        if jobs == 1 or len(todo) < 2:
            for variant in todo:
                yield self._variant(variant, prepared, started)
            return
        settings = {name: value for name, value in vars(self.settings).items() if name != "model"}
        own = {name: getattr(self, name) for name in ("compile", "profile", "snapshot", "compile_limit")}
        # Bytes: a tensor that multiprocessing itself sends is a file descriptor, and parameters are thousands of them.
        common = self.settings.model, self.batches, settings | own, pickle.dumps(prepared), started
        spawn = multiprocessing.get_context("spawn")
        watched, held = spawn.Pipe(duplex=False)
        pool = ProcessPoolExecutor(min(jobs, len(todo)), spawn, initializer=_end_with, initargs=(watched,))
        # Closed in this order: a pool that is left waits for all that was submitted, unless its processes end.
        with watched, _shared_threads(jobs), pool, held:
            futures = {pool.submit(_variant_elsewhere, v.asked, *common): v for v in todo}
            for done in as_completed(futures):
                variant = futures[done]
                try:
                    yield done.result()
                except Exception as error:  # the process is gone
                    yield [Row(variant.name, batch, started, _reason(error)) for batch in self.batches]
                self.advance(variant.name, len(self.batches))

    @contextlib.contextmanager
    def warm(self) -> Iterator[Callable[[], torch.Tensor]]:
        """One step of the first variant, which has been called before."""
        self.advance = lambda text, count=1: None
        with self._state():
            with self.turns.together():
                prepared = self._prepare()
                model, run = self._built(self.variants[0], prepared)
                inputs = self._inputs(model, self.batches[0])
                for _ in range(timing.WARM_UP_CALLS):
                    run(**inputs)
            yield lambda: run(**inputs)[0]

    def _start(self, out: Path | None, resume: bool) -> Results:
        environment = {f.name: f.value for f in examine()}
        # Files may be edited between two runs.
        environment["model's configuration"] = digest(self.source.config)
        if self.settings.plan is not None:
            environment["plan's bits"] = digest(dict(BitPlan.read(self.settings.plan)))
        results = Results(self.settings, environment, float_name(self.dtype) + COMPILED)
        if not resume or out is None or not out.exists():
            return results
        before = Results.read(out)
        if (before.settings, before.environment) != (results.settings, environment):
            mine = {**vars(results.settings), **environment}
            other = [
                key for key, value in {**vars(before.settings), **before.environment}.items() if value != mine.get(key)
            ]
            raise MixDQError(
                f"{out}: measured with other settings or on another machine ({', '.join(other)} differ), so its rows "
                "cannot be kept. Give another file, or the same settings"
            )
        return before

    @contextlib.contextmanager
    def _state(self) -> Iterator[None]:
        """Settings of the process while measuring: no gradients, this device, and cuDNN's choice by measurement."""
        before = torch.backends.cudnn.benchmark
        torch.backends.cudnn.benchmark = True
        device = torch.cuda.device(self.device) if self.device.type == "cuda" else contextlib.nullcontext()
        try:
            with torch.no_grad(), device:
                yield
        finally:
            torch.backends.cudnn.benchmark = before

    def _model(self) -> nn.Module:
        model = self.source.build(self.dtype, self.device)
        return model.to(memory_format=torch.channels_last) if self.settings.channels_last else model

    def _inputs(self, model: nn.Module, batch: int) -> dict:
        s = self.settings
        return make_inputs(
            model, batch, s.size, self.source.latent_scale, self.dtype, self.device, s.channels_last, s.seed
        )

    def _prepare(self) -> Prepared:
        """Calibrate and keep the floating outputs, all from one floating model that is gone afterwards."""
        self.advance("calibrating", 0)
        model, prepared = self._model(), Prepared()
        for name, layer in families.layers_of(model).items():
            if isinstance(layer, nn.Linear):
                layer.register_forward_pre_hook(_count_rows(prepared.rows, name))
        if any(v.quantize for v in self.variants):
            with observe(model) as recorder:
                model(**self._inputs(model, CALIBRATION_BATCH))
            prepared.params = recorder.params()
        for batch in self.batches:
            # What does not fit floating may fit quantized.
            with contextlib.suppress(torch.OutOfMemoryError):
                prepared.outputs[batch] = model(**self._inputs(model, batch))[0].float().cpu()
        del model
        _release(self.device)
        self.advance("calibrated", 1)
        return prepared

    def _variant(self, variant: Variant, prepared: Prepared, started: str) -> list[Row]:
        """Rows of one variant. Whatever goes wrong is a row's error: the other variants are still to be measured."""
        rows: list[Row] = []
        self.advance(variant.name, 0)
        try:
            with _caches(self.settings.cold), tracing.marked(variant.name, self.device):
                rows = self._rows(variant, prepared, started)
        finally:
            if self.snapshot:
                tracing.stop_snapshot()
            _release(self.device)
        return rows

    def _rows(self, variant: Variant, prepared: Prepared, started: str) -> list[Row]:
        base = _allocated(self.device)
        if self.snapshot:
            tracing.start_snapshot()
        found: dict[int, dict] = {}  # of each batch size, the values of its row
        with self.turns.together():
            try:
                model, run = self._built(variant, prepared)
            except Exception as error:
                self.advance(variant.name, len(self.batches))
                return [Row(variant.name, batch, started, _reason(error)) for batch in self.batches]
            for batch in self.batches:
                try:
                    seconds = self._first_call(variant, model, run, batch)
                    found[batch] = {"compile_s": None if variant.compile is None else seconds}
                except Exception as error:
                    found[batch] = {"error": _reason(error)}
        for batch in self.batches:
            if "error" not in found[batch]:
                try:
                    self.advance(f"{variant.name}, batch {batch}, waiting for its turn on this device", 0)
                    with self.turns.alone():
                        self.advance(f"{variant.name}, batch {batch}", 0)
                        found[batch] |= self._row(variant, model, run, batch, prepared, base)
                except Exception as error:
                    found[batch] = {"error": _reason(error)}
            self.advance(variant.name, 1)
        return [Row(variant.name, batch, started, **found[batch]) for batch in self.batches]

    def _first_call(self, variant: Variant, model: nn.Module, run: Callable, batch: int) -> float:
        """Seconds of the call that compiles."""
        self.advance(f"{variant.name}, batch {batch}, first call", 0)
        inputs = self._inputs(model, batch)
        with within(self.compile_limit, "compiled"), tracing.marked(f"{variant.name} first call", self.device):
            return timing.timed(lambda: run(**inputs)[0], self.device)[0] / 1e3

    def _built(self, variant: Variant, prepared: Prepared) -> tuple[nn.Module, Callable]:
        model = self._model()
        if variant.quantize is not None:
            variant.quantize(model, prepared)
        return model, model if variant.compile is None else variant.compile(model)

    def _row(self, variant, model, run, batch: int, prepared: Prepared, base: int) -> dict:
        """The numbers of a row. Memory comes before the CUDA graph, which has a pool of its own."""
        inputs, device, s = self._inputs(model, batch), self.device, self.settings
        first = batch == self.batches[0]

        def call():
            return run(**inputs)[0]

        for _ in range(1 + s.warmup):
            output = call()
        memory = measure_memory(model, call)
        found: dict = {"static": memory.static, "activation": memory.activation}
        if device.type == "cuda":
            del output
            gc.collect()
            found["held"] = _allocated(device) - base
        if self.snapshot and first:
            tracing.write_snapshot(tracing.for_variant(self.snapshot, variant.name))
        if self.profile and first:
            tracing.write_trace(call, self.profile / f"{variant.name}.json.gz", device)
        name = f"{variant.name}, batch {batch}"

        def tick(done: int) -> None:
            self.advance(f"{name}, {done} of {s.repeats} calls", 0)

        with tracing.marked(name, device):
            times = timing.time_calls(call, s.repeats, device, tick)
        if device.type == "cuda":
            found["call_ms"] = times.median
            graph, output = timing.capture(call)
            with tracing.marked(f"{name}, graph", device):
                times = timing.time_replays(graph, s.repeats, s.warmup)
            if self.profile and first:
                tracing.write_trace(graph.replay, self.profile / f"{variant.name}.graph.json.gz", device)
        found["latency"] = times
        return found | agreement(prepared.outputs.get(batch), output.float().cpu())

    def _call_tools(self, variants: list[Variant]) -> list[str]:
        """nsys and ncu, each on one step of each variant, where they are."""
        notes = []
        for variant in variants:
            commands = tracing.tool_commands(
                self.profile / variant.name, [*self._arguments(), "--variants", variant.asked]
            )
            for tool, command in commands.items():
                reason = tracing.call_tool(command)
                outcome = f"failed ({reason})" if reason else "done"
                notes.append(f"{tool} of {variant.name}: {outcome}: {' '.join(command)}")
        return notes

    def _arguments(self) -> list[str]:
        s = self.settings
        arguments = [s.model, "--size", s.size, "--batch", self.batches[0], "--dtype", s.dtype, "--device", s.device]
        arguments += ["--seed", s.seed, *(("--plan", s.plan) if s.plan else ())]
        arguments += ["--layers", s.layers] if s.layers is not None else []
        arguments += ["--compile" if self.compile else "--no-compile"]
        arguments += ["--channels-last" if s.channels_last else "--no-channels-last"]
        return [str(a) for a in arguments]


def _variant_elsewhere(name: str, model: str, batches, options: dict, prepared: bytes, started: str) -> list[Row]:
    """The rows of one variant, in a process that was started for it."""
    bench = _Bench(model, batches, [name], **options)
    bench.advance = lambda text, count=1: None
    try:
        with bench._state():
            return bench._variant(bench.variants[0], pickle.loads(prepared), started)
    except SystemExit:  # of _end_with; a pool's process would send it back and go on with the next variant
        os._exit(1)


def _end_with(watched: Connection) -> None:
    """In a process of the pool: end it when Ctrl-C is pressed, and when the run that started it is stopped or gone."""
    signal.signal(signal.SIGINT, lambda number, frame: sys.exit(1))

    def watch() -> None:
        wait([watched])  # for the end of file
        os.kill(os.getpid(), signal.SIGINT)  # what is being done cleans up
        time.sleep(ENDING_SECONDS)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@contextlib.contextmanager
def _shared_threads(jobs: int) -> Iterator[None]:
    """Processes started meanwhile share the cores: Inductor would start a compiler for each core in every one."""
    name = "TORCHINDUCTOR_COMPILE_THREADS"
    before = os.environ.get(name)
    os.environ.setdefault(name, str(max(1, (os.cpu_count() or 1) // jobs)))
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]


def _not_comparable(prepared: Prepared) -> list[str]:
    return [
        f"batch {batch}: the floating output holds NaN or infinity, so nothing can be compared with it"
        for batch, output in prepared.outputs.items()
        if not output.isfinite().all()
    ]


def _line(row: Row) -> str:
    compiled = "" if row.compile_s is None else f", compiled in {row.compile_s:.1f} s"
    broken = f", {NOT_FINITE}" if row.nonfinite else ""
    return f"{row.variant}, batch {row.batch}: {row.error or f'{row.latency.median:.2f} ms{compiled}{broken}'}"


def _count_rows(rows: dict[str, int], name: str):
    def hook(module, args):
        found = args[0].numel() // args[0].shape[-1]
        rows[name] = min(found, rows.get(name, found))

    return hook


def _ordered(kept: dict[tuple[str, int], Row], variants: list[Variant], batches: list[int]) -> list[Row]:
    """In the order of this run's variants; rows that only an earlier run measured come last."""
    asked = [(v.name, b) for v in variants for b in batches]
    return [kept[key] for key in [*asked, *(key for key in kept if key not in asked)] if key in kept]


@contextlib.contextmanager
def _caches(cold: bool) -> Iterator[None]:
    if not cold:
        yield
        return
    from torch._inductor import utils

    if not hasattr(utils, "fresh_cache"):  # private to torch, and no reason to measure nothing
        warnings.warn("this torch offers no empty cache: seconds to compile may be those of a warm one", stacklevel=2)
    with getattr(utils, "fresh_cache", contextlib.nullcontext)():
        yield


def _allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def _release(device: torch.device) -> None:
    """Compiled code holds on to the weights it was made for."""
    torch._dynamo.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {first_line(error)}"
