"""Find the kernels that make one step of SDXL's UNet fastest, measured in the step itself, and put them into the table.

    python benchmarks/tune_step.py --size 512 --variant w8a8 --table t.inc --out tune_step.json
    python benchmarks/tune_step.py --size 512 --variant w8a8 --table t.inc --from tune.json    fewer candidates, sooner

``tune.py`` measures a layer among launches of the same layer. In a step its input has just been written, the kernel
ahead still runs while its first weights are loaded, and weights come from memory: what wins alone may lose there. So
here the whole step is what is timed. Shape by shape, those first on which most time can be spent, each candidate takes
the place of the present kernel in every launch of that shape; it stays if replays of the two steps by turns agree that
it is faster. This goes on until a round over all shapes changes nothing, or time is up.

The table in force (built in, or MIXDQ_TUNING_TABLE) is where it starts: a row is written only for a kernel that beat
what the library chooses by it, and all other rows of ``--table`` stay. So ``--table`` should be the table in force, or
a new file, which begins with those rows. Kernels that end with GEGLU are not chosen by the table; the best are only
reported. Runs on one GPU may be started together: they compile side by side and measure one after the other. Without
``--from`` a round takes about ten minutes, with it two.
"""

import json
import math
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated, NamedTuple
from unittest import mock

import torch
import typer
from gpu import KERNELS, environment, forced, require_gpu
from torch import Tensor
from tune import TABLE, Choice, candidates, read_table, write_table

from mixdq_ao.bench.run import warm_step
from mixdq_ao.bench.timing import WARM_UP_CALLS, time_replays
from mixdq_ao.files import writable_file, write_text

MAX_WEIGHTS = 4  # of one product: kMaxWeights in csrc/problem.h
NEAR = 1.35  # candidates that by themselves take up to so many times what the best takes are tried in the step
REPLAY_MS, REPLAYS = 60.0, (3, 15)  # of one measurement: about so long, but no fewer and no more
# A gain is believed if every comparison shows one: 2 where each shows more than CLEAR of a step, else ROUNDS. Replays
# of one graph differ by about 0.1 %, their medians by less; what is smaller than LEAST on average is left alone.
ROUNDS, CLEAR, LEAST = 5, 1e-3, 2e-4


# --- which products a step has ----------------------------------------------------------------------------------------


class Product(NamedTuple):
    """Launches that the library chooses one kernel for: a key of its table, or the same with GEGLU at its end."""

    m: int
    n: int
    k: int
    taps: int
    bits: int
    geglu: bool = False

    @property
    def columns(self) -> int:
        return self.n

    @property
    def least_us(self) -> float:
        """What a launch takes at the very least on an H200: to begin, to multiply, or to read its weights."""
        return max(2.0, 2 * self.m * self.n * self.k / 1.5e9, self.n * self.k * self.bits / 8 / 4.5e6)

    def __str__(self) -> str:
        window = f" ({self.taps} taps)" if self.taps > 1 else ""
        return f"{self.m} x {self.k}{window} -> {self.n}, int{self.bits}" + (", GEGLU" if self.geglu else "")


# Arguments as the schemas in mixdq_ao/ops.py have them. None: several products, which one forced kernel does not fit.


def _linear(xq: Tensor, qdata: Tensor, alpha, beta, bias, bits: int, groups, *rest, geglu=False) -> Product | None:
    if len(groups) > 1:
        return None
    k = xq.shape[-1]
    return Product(xq.numel() // k, qdata.shape[0], k, 1, bits, geglu)


def _geglu(*args) -> Product | None:
    return _linear(*args, geglu=True)


def _multi(xq: Tensor, qdata: list[Tensor], alpha: list[Tensor], beta, bias, bits: list[int], groups, *rest):
    """Weights that lie one behind the other count as one for the library."""
    pairs = zip(qdata[:-1], qdata[1:], alpha[:-1], alpha[1:], strict=True)
    apart = sum(not (_continues(q, next_q) and _continues(a, next_a)) for q, next_q, a, next_a in pairs)
    if len(set(bits)) > 1 or apart >= MAX_WEIGHTS or len(groups) > 1:
        return None
    k = xq.shape[-1]
    return Product(xq.numel() // k, sum(q.shape[0] for q in qdata), k, 1, bits[0])


def _continues(a: Tensor, b: Tensor) -> bool:
    return a.data_ptr() + a.nbytes == b.data_ptr()


def _conv(xq: Tensor, qdata: Tensor, alpha, beta, bias, stride, padding, dilation, bits: int, groups, *rest):
    if len(groups) > 1:
        return None
    (batch, channels), (n, _, *window) = xq.shape[:2], qdata.shape
    spans = zip(xq.shape[2:], window, stride, padding, dilation, strict=True)
    out = [(size + 2 * pad - dilate * (taps - 1) - 1) // step + 1 for size, taps, step, pad, dilate in spans]
    taps = math.prod(window)
    return Product(batch * math.prod(out), n, taps * channels, taps, bits)


OPERATORS = {"linear_int8": _linear, "linear_int8_geglu": _geglu, "linear_int8_multi": _multi, "conv2d_int8": _conv}


@contextmanager
def intercepted(handle: Callable[[Product | None, Callable[[], Tensor]], Tensor]) -> Iterator[None]:
    """``handle(product, call)`` is called for every product of compiled code, and makes the call.

    Inductor's code looks ``torch.ops.mixdq_ao.NAME.default`` up at each call, so another function can stand there. A
    dispatch mode would see the calls too, but Dynamo runs no compiled code under one.
    """

    def instead(operator, product_of):
        # By name Inductor gives only what has a default: the residual, which no choice depends on.
        return lambda *args, **named: handle(product_of(*args), lambda: operator(*args, **named))

    with ExitStack() as stack:
        for name, product_of in OPERATORS.items():
            packet = getattr(torch.ops.mixdq_ao, name)
            stack.enter_context(mock.patch.object(packet, "default", instead(packet.default, product_of)))
        yield


def products(call: Callable[[], object]) -> tuple[Counter[Product], int]:
    """The products of a step and how often each is launched, and how many calls there are beside them."""
    seen: Counter[Product | None] = Counter()

    def count(product: Product | None, run: Callable[[], Tensor]) -> Tensor:
        seen[product] += 1
        return run()

    with intercepted(count):
        call()
    others = seen.pop(None, 0)
    return seen, others


def options(product: Product, sm90: bool, near: dict[tuple, list[Choice]]) -> list[Choice]:
    """What to try for it; ``near``: of ``near_the_best``."""
    if product.geglu:
        return [(k.name, s) for k in KERNELS if sm90 for s in k.splits(product, product.bits, geglu=True)]
    # Kernels of older GPUs come near only where layers are small.
    older = "sm80" if sm90 else "sm90"
    found = [c for c in candidates(product, product.bits, sm90) if c[0] != "direct" and not c[0].startswith(older)]
    return [c for c in near[product[:5]] if c in found] if product[:5] in near else found


def near_the_best(path: Path) -> dict[tuple, list[Choice]]:
    """Of each row of the table the kernels that come near the best of their layer, as ``tune.py --out`` wrote them."""
    found = {}
    for row in json.loads(path.read_text())["rows"]:
        ratios: dict[Choice, float] = {}
        for microseconds in row["microseconds"]:
            for name, us in microseconds.items():
                kernel, _, splits = name.partition(":")
                choice, ratio = (kernel, int(splits)), us / min(microseconds.values())
                ratios[choice] = min(ratio, ratios.get(choice, ratio))
        key = tuple(row[name] for name in Product._fields[:5])
        found[key] = sorted((c for c in ratios if ratios[c] <= NEAR), key=ratios.get)
    return found


# --- the time of a step -----------------------------------------------------------------------------------------------


class Timer:
    """Records a step with given kernels as a CUDA graph, and replays it."""

    def __init__(self, call: Callable[[], object]):
        self._call, self._warm = call, set()
        self._stream, self._pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()
        self._replays = None

    def record(self, choices: dict[Product, Choice]) -> "torch.cuda.CUDAGraph":
        """Products without a choice are left to the library. All graphs share memory: only replay them by turns."""

        def run(product: Product | None, call: Callable[[], Tensor]) -> Tensor:
            if product not in choices:
                return call()
            with forced(*choices[product]):
                return call()

        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(self._stream), intercepted(run):
            # A kernel is loaded when it is first launched, which may not happen in a capture.
            first = not self._warm
            if first or not self._warm.issuperset(choices.items()):
                for _ in range(WARM_UP_CALLS if first else 1):
                    self._call()
                torch.cuda.synchronize()
                self._warm |= {None, *choices.items()}
            # Not torch.cuda.graph(): it collects garbage each time, which takes longer than the rest.
            graph.capture_begin(pool=self._pool)
            try:
                self._call()
            finally:
                graph.capture_end()
        return graph

    def ms(self, graph: "torch.cuda.CUDAGraph") -> float:
        if self._replays is None:
            once = time_replays(graph, repeats=REPLAYS[0], warmup=REPLAYS[0]).median
            self._replays = max(REPLAYS[0], min(REPLAYS[1], int(REPLAY_MS / once)))
        return time_replays(graph, self._replays, warmup=2).median

    def drop(self, graph: "torch.cuda.CUDAGraph") -> None:
        graph.reset()


def gain(timer, old, new) -> float:
    """Milliseconds that ``new`` takes less than ``old``; 0 where measurements by turns do not agree that it does."""
    gains = []
    while len(gains) < ROUNDS:
        # The GPU has rested while a step was recorded: which of the two comes after that changes from round to round.
        order = (old, new) if len(gains) % 2 else (new, old)
        times = {id(step): timer.ms(step) for step in order}
        before, after = times[id(old)], times[id(new)]
        if after >= before:
            return 0.0
        gains.append(before - after)
        if len(gains) > 1 and min(gains) > CLEAR * before:
            break
    mean = sum(gains) / len(gains)
    return mean if mean > LEAST * before else 0.0


class Descent:
    """The best choice of each product so far, where the others have theirs. ``timer`` is a ``Timer``."""

    def __init__(self, todo: dict[Product, list[Choice]], timer):
        self.todo, self.timer = todo, timer
        self.choices: dict[Product, Choice] = {}
        self.gains: Counter[Product] = Counter()  # milliseconds
        self.start = self.now = timer.record({})
        self.before_ms = self.after_ms = timer.ms(self.start)

    def run(self, in_time: Callable[[], bool], report: Callable[[Product, Choice | None], object]) -> bool:
        """``report(product, choice before)`` follows each product. Whether it came to its end, where nothing gains."""
        changed = True
        while changed:
            changed = False
            for product in self.todo:
                before = self.choices.get(product)
                whole = self._improve(product, in_time)
                self.after_ms = self.timer.ms(self.now)
                changed |= self.choices.get(product) != before
                report(product, before)
                if not whole:
                    return False
        return True

    def _improve(self, product: Product, in_time: Callable[[], bool]) -> bool:
        """Whether all of its candidates were tried. None, the library's own choice, is one of them."""
        for option in [*self.todo[product], None]:
            if not in_time():
                return False
            if option == self.choices.get(product):
                continue
            trial = {p: c for p, c in (self.choices | {product: option}).items() if c}
            try:
                new = self.timer.record(trial)
            except RuntimeError as error:
                print(f"{product}, {named(option)}: {str(error).splitlines()[0]}", flush=True)
                continue  # what no later launch survives ends the program when the step is measured next
            won = gain(self.timer, self.now, new)
            old, self.now = (self.now, new) if won else (new, self.now)
            if won:
                self.choices, self.gains[product] = trial, self.gains[product] + won
            if old is not self.start:
                self.timer.drop(old)
        return True

    def compare(self) -> None:
        """Measure the step before and after once more, by turns."""
        times = [(self.timer.ms(self.start), self.timer.ms(self.now)) for _ in range(ROUNDS)]
        self.before_ms, self.after_ms = (sorted(of)[ROUNDS // 2] for of in zip(*times, strict=True))


# --- what is written --------------------------------------------------------------------------------------------------


def named(choice: Choice | None) -> str:
    return "{}:{}".format(*choice) if choice else "own choice"


def rows_in_force() -> dict:
    """The library's: of two rows for one key that of MIXDQ_TUNING_TABLE counts."""
    path = os.environ.get("MIXDQ_TUNING_TABLE")
    return read_table(TABLE) | (read_table(Path(path)) if path else {})


class Results:
    """Writes the table and the JSON file, each whole or not at all."""

    def __init__(self, table: Path, out: Path | None, facts: dict, arch: int, counts: Counter[Product]):
        self.table, self.out, self.facts, self.arch, self.counts = table, out, facts, arch, counts
        self.in_force = rows_in_force()
        self.rows = read_table(table) if table.exists() else self.in_force

    def write(self, descent: Descent, ended: str) -> None:
        won = {(self.arch, p[:5]): c for p, c in descent.choices.items() if not p.geglu}
        write_table(self.table, self.rows | won)
        if self.out:
            step = {"before_ms": round(descent.before_ms, 4), "after_ms": round(descent.after_ms, 4), "ended": ended}
            rows = [self._row(product, descent) for product in descent.todo]
            write_text(self.out, json.dumps({**self.facts, **step, "rows": rows}, indent=1) + "\n")

    def _row(self, product: Product, descent: Descent) -> dict:
        row = self.in_force.get((self.arch, product[:5]))
        return {
            **product._asdict(),
            "launches": self.counts[product],
            "before": named(None if product.geglu else row),
            "after": named(descent.choices.get(product)),
            "gain_us": round(1e3 * descent.gains[product], 2),
        }


def tune(call: Callable[[], object], todo: dict[Product, list[Choice]], results: Results, seconds: float) -> None:
    deadline, done, order = time.monotonic() + seconds, Counter(), list(todo)
    descent = Descent(todo, Timer(call))

    def report(product: Product, before: Choice | None) -> None:
        done[product] += 1
        again = f", round {done[product]}" if done[product] > 1 else ""
        at, after = f"{order.index(product) + 1}/{len(order)}{again}", descent.choices.get(product)
        change = f"{named(before)} -> {named(after)}" if after != before else f"{named(after)} stays"
        times = f"{results.counts[product]} launches"
        print(f"{at}: {product}, {times}: {change}, {descent.after_ms:.3f} ms", flush=True)
        results.write(descent, "running")

    print(f"{descent.before_ms:.3f} ms with the table in force", flush=True)
    whole = descent.run(lambda: time.monotonic() < deadline, report)
    descent.compare()
    results.write(descent, "nothing gains any more" if whole else "out of time")
    print(f"{descent.before_ms:.3f} -> {descent.after_ms:.3f} ms; {len(descent.choices)} choices in {results.table}")
    for product, choice in descent.choices.items():
        if product.geglu:
            print(f"not in the table: {product}: {named(choice)}")
    if not whole:
        print(f"{len(done)} of {len(todo)} shapes were looked at. More --seconds go on.")


def main(
    size: Annotated[int, typer.Option(help="Pixels of a picture's side.")] = 512,
    batch: Annotated[int, typer.Option(help="Pictures in a step.")] = 1,
    variant: Annotated[str, typer.Option(help="w8a8 or w4a8: the bits of weights and activations.")] = "w8a8",
    table: Annotated[Path, typer.Option(help="The table to update.")] = TABLE,
    out: Annotated[Path | None, typer.Option(help="Write what was found as JSON here.")] = None,
    timings: Annotated[
        Path | None,
        typer.Option("--from", help="JSON of tune.py --out: try only what comes near the best there.", exists=True),
    ] = None,
    seconds: Annotated[float, typer.Option(help="Stop trying when that much time has passed since compiling.")] = 200,
) -> None:
    """Choose kernels by the time of a whole step of SDXL's UNet, with random weights."""
    require_gpu()
    if os.environ.get("MIXDQ_KERNEL"):
        sys.exit("MIXDQ_KERNEL is set, and would be every product's kernel. Unset it.")
    if variant not in ("w8a8", "w4a8"):
        sys.exit(f"--variant must be w8a8 or w4a8; found {variant}")
    for path in filter(None, (table, out)):
        writable_file(path)
    near = near_the_best(timings) if timings else {}
    major, minor = torch.cuda.get_device_capability()
    arch = 10 * major + minor
    with warm_step("sdxl", variant, batch, size=size, device="cuda") as (call, turns):
        counts, others = products(call)
        if not counts:
            sys.exit("No product was seen in the compiled step: this torch calls operators in another way.")
        able = {p: found for p in counts if (found := options(p, arch == 90, near))}
        todo = {p: able[p] for p in sorted(able, key=lambda p: -counts[p] * p.least_us)}
        others += sum(counts[p] for p in counts if p not in able)
        print(f"{size} px, batch {batch}, {variant}: {counts.total()} launches of {len(todo)} shapes", end="")
        print(f"; {others} calls are left as they are", flush=True)
        with turns.alone():
            facts = {**environment(), "size": size, "batch": batch, "variant": variant}
            tune(call, todo, Results(table, out, facts, arch, counts), seconds)


if __name__ == "__main__":
    typer.run(main)
