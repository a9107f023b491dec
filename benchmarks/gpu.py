"""What the GPU benchmarks share: layers with their weights in rotation, times of graph replays, forced kernels."""

import importlib.util
import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import torch
import torch.nn.functional as F
from sdxl_shapes import Conv, Layer

if importlib.util.find_spec("torchao") is None:
    # The operators need torch alone, but the package imports torchao: let its modules be found without running it.
    package = types.ModuleType("mixdq_ao")
    package.__path__ = [str(Path(__file__).resolve().parents[1] / "mixdq_ao")]
    sys.modules["mixdq_ao"] = package

from mixdq_ao import ops  # noqa: E402

# Weights of a UNet do not stay in the L2 cache (60 MB on an H200) from one step to the next, so that of one layer must
# not either: launches go through at least that many bytes of them.
ROTATION_BYTES = 160 << 20
POOL_BYTES = 384 << 20
CHANNEL = 1280  # numbers that share a scale
# Long launches are repeated less often: about that many microseconds in each replay.
REPLAY_US = 15_000
SAVE_SECONDS, HANGING_SECONDS = 5.0, 20.0


@dataclass(frozen=True)
class Kernel:
    """A row of the catalogue in csrc/catalogue.cpp: what ``MIXDQ_KERNEL`` may name."""

    name: str
    max_splits: int = 1

    def splits(
        self, layer: Layer, bits: int, floating: bool = False, geglu: bool = False, quantizes: bool = False
    ) -> list[int]:
        """The splits in which it can do the layer; none where the library would ignore that it is forced.

        ``floating``: the layer is weight-only. ``geglu``: with GEGLU and quantization at its end. ``quantizes``: with
        quantization at its beginning.
        """
        kinds = {"_floating": floating, "_geglu": geglu, "_quantizing": quantizes}
        if any(self.name.endswith(kind) != wanted for kind, wanted in kinds.items()):
            return []
        if geglu and layer.columns % 32:
            return []
        if self.name == "direct":
            return [1]
        packed = "_packed" in self.name
        reads_packed = packed or floating or self.name == "few_rows"
        channels = layer.k // layer.taps
        if (packed and bits == 8) or channels % (16 * 8 // bits if reads_packed else 16):
            return []
        if quantizes and (bits != 8 or layer.taps > 1):
            return []
        if self.name == "few_rows" and (layer.taps > 1 or layer.m > 16):
            return []
        steps = layer.taps * -(-channels // (64 if floating else 128))
        if self.name.endswith(("_sharing", "_pairs")):
            return [s for s in (2, 4) if s <= self.max_splits]
        some = range(1, 9) if self.name.endswith("_split") else (1, 2, 4, 8)
        return [s for s in some if s <= self.max_splits and s <= steps]


KERNELS = [
    *(Kernel(f"sm90_{tile}") for tile in ("256x128", "128x160", "128x128", "64x160")),
    *(Kernel(f"sm90_{tile}", 8) for tile in ("64x80", "128x64", "64x64", "128x16")),
    *(Kernel(f"sm90_{tile}_split", 8) for tile in ("128x128", "128x160")),
    *(Kernel(f"sm90_{tile}_sharing", 4) for tile in ("64x64", "64x160")),
    Kernel("sm90_128x160_pairs", 2),
    *(Kernel(f"sm90_{tile}_packed") for tile in ("128x160", "64x160")),
    *(Kernel(f"sm90_{tile}_packed", 8) for tile in ("64x80", "128x64")),
    *(Kernel(f"sm90_{tile}_geglu") for tile in ("128x160", "64x160")),
    *(Kernel(f"sm90_{tile}_packed_geglu") for tile in ("128x160", "64x160")),
    Kernel("sm90_128x128_floating"),
    Kernel("sm90_64x80_floating", 8),
    Kernel("sm90_64x80_quantizing", 8),
    *(Kernel(f"sm80_{tile}") for tile in ("128x160", "128x128", "128x80", "64x64", "64x32", "128x16")),
    Kernel("few_rows"),
    Kernel("direct"),
]


@contextmanager
def forced(name: str, splits: int = 1) -> Iterator[None]:
    """Multiply with that kernel wherever it can do the problem."""
    before = os.environ.get("MIXDQ_KERNEL")
    os.environ["MIXDQ_KERNEL"] = f"{name}:{splits}"
    try:
        yield
    finally:
        if before is None:
            del os.environ["MIXDQ_KERNEL"]
        else:
            os.environ["MIXDQ_KERNEL"] = before


def require_gpu() -> None:
    """End the program with the reason where there is nothing to measure."""
    if not torch.cuda.is_available():
        sys.exit("This benchmark needs a CUDA device.")
    if ops.cuda_library_missing:
        sys.exit(f"This benchmark needs the CUDA library: {ops.cuda_library_missing}.")


def environment() -> dict:
    """What a result depends on beside the code."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = subprocess.run(query, capture_output=True, text=True).stdout if shutil.which(query[0]) else ""
    return {
        "gpu": torch.cuda.get_device_name(),
        "multiprocessors": torch.cuda.get_device_properties().multi_processor_count,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "driver": driver.partition("\n")[0] or "unknown",
        "date": date.today().isoformat(),
    }


def normal_codes(count: int, bits: int = 8, device: str = "cuda") -> torch.Tensor:
    """int8 codes of normal numbers, as layers have them: the largest number of each ``CHANNEL`` has the largest code.

    fp16 multiplies normal numbers as well. It matters for layers that bring a GPU to its power limit, which codes that
    are all equally likely do sooner, and no layer has such.
    """
    codes, largest = torch.empty(count, dtype=torch.int8, device=device), 2 ** (bits - 1) - 1
    for part in codes.split(CHANNEL * 2**16):
        x = torch.randn(-(-part.numel() // CHANNEL), CHANNEL, device=device)
        x = (x * (largest / x.abs().amax(1, keepdim=True))).round_()
        part.copy_(x.view(-1)[: part.numel()])
    return codes


class Bench:
    """Makes and times launches. Memory is taken once: pools of codes and one of floats, and one for all graphs.

    From then on the current stream is one that graphs can be captured on.
    """

    def __init__(self, pool_bytes: int = POOL_BYTES):
        self.codes = normal_codes(pool_bytes)
        halves = (normal_codes(pool_bytes // 2, 4).view(torch.uint8) & 15 for _ in range(2))
        self.packed = next(halves) | next(halves) << 4
        self.floats = torch.randn(pool_bytes // 2, dtype=torch.float16, device="cuda") * 0.05
        torch.cuda.synchronize()
        torch.cuda.set_stream(torch.cuda.Stream())
        # Memory that graphs share lives as long as one of them.
        self.first = torch.cuda.CUDAGraph()
        self.first.capture_begin()
        self.codes[:16].clone()
        self.first.capture_end()
        torch.backends.cudnn.benchmark = True
        self._at: tuple[str, float] | None = None
        threading.Thread(target=self._watch, daemon=True).start()

    def weights(self, pool: torch.Tensor, shape: tuple, count: int) -> list[torch.Tensor]:
        """Up to ``count`` weights of that shape, one behind the other; a window's channels come last in memory."""
        size = shape[0] * shape[1] * (shape[2] * shape[3] if len(shape) == 4 else 1)
        count = max(1, min(count, pool.numel() // size))
        stored = pool[: count * size].view(count, shape[0], *shape[2:], shape[1])
        return list(stored.permute(0, 1, 4, 2, 3) if len(shape) == 4 else stored)

    def int8(self, layer: Layer, bits: int) -> tuple[Callable[[int], object], int]:
        """Launch number i of the quantized layer, and how many to time."""
        channels = layer.k // layer.taps
        alpha, beta = (torch.randn(1, layer.n, device="cuda") * 1e-4 for _ in range(2))
        bias = torch.randn(layer.n, dtype=torch.float16, device="cuda")
        packed = -(-channels * bits // 8)
        count = launches(layer, layer.columns * layer.taps * packed)
        pool = self.codes if bits == 8 else self.packed
        epilogue = (alpha, beta[0], bias)
        if isinstance(layer, Conv):
            size = layer.size + 2 * layer.pad
            # From the end of the pool, since its beginning holds the weights.
            x = self.codes[-layer.batch * size * size * channels :].view(layer.batch, size, size, channels)
            weights = self.weights(pool, (layer.n, packed, layer.kernel, layer.kernel), count)
            image, stride = x.permute(0, 3, 1, 2), (layer.stride, layer.stride)

            def call(i):
                torch.ops.mixdq_ao.conv2d_int8(
                    image, weights[i % len(weights)], *epilogue, stride, (0, 0), (1, 1), bits, [channels], torch.float16
                )

            return call, count
        x = normal_codes(layer.m * channels).view(layer.m, channels)
        weights, each = self.weights(pool, (layer.n, packed), count * layer.weights), layer.weights

        def linear(i):
            torch.ops.mixdq_ao.linear_int8(x, weights[i % len(weights)], *epilogue, bits, [channels], torch.float16)

        def several(i):
            first = i * each % (len(weights) - each + 1)
            torch.ops.mixdq_ao.linear_int8_multi(
                x, weights[first : first + each], *([v] * each for v in epilogue), [bits] * each, [channels],
                torch.float16,
            )  # fmt: skip

        return (linear if each == 1 else several), count

    def float16(self, layer: Layer) -> tuple[Callable[[int], object], int]:
        """Launch number i of the layer in torch's own fp16, and how many to time."""
        count = launches(layer, 2 * layer.columns * layer.k)
        bias = torch.randn(layer.columns, dtype=torch.float16, device="cuda")
        if isinstance(layer, Conv):
            shape = (layer.n, layer.channels, layer.kernel, layer.kernel)
            x = torch.randn(layer.batch, layer.channels, layer.size, layer.size, dtype=torch.float16, device="cuda")
            x, weights = x.contiguous(memory_format=torch.channels_last), self.weights(self.floats, shape, count)
            return lambda i: F.conv2d(x, weights[i % len(weights)], bias, layer.stride, layer.pad), count
        x = torch.randn(layer.m, layer.k, dtype=torch.float16, device="cuda")
        weights = self.weights(self.floats, (layer.columns, layer.k), count)
        return lambda i: F.linear(x, weights[i % len(weights)], bias), count

    def try_us(self, what: str, call: Callable[[int], object], count: int, repeats: int = 5) -> float | None:
        """As ``time_us``; None, and a line, where the call fails and the GPU is well. A launch that hangs is named."""
        return self.try_in_turn({what: (call, count)}, repeats=repeats).get(what)

    def try_in_turn(
        self, calls: dict[str, tuple[Callable[[int], object], int]], of: str = "", repeats: int = 5
    ) -> dict[str, float]:
        """``try_us`` of several calls, by their names, without those that fail; they are replayed in turn.

        ``of``: what is said before a name.
        """
        graphs = {}
        for name, (call, count) in calls.items():
            self._at = of + name, time.monotonic()
            try:
                graphs[name] = self._record(call, count), count
            except RuntimeError as error:
                torch.cuda.synchronize()  # raises again for what no later launch would survive
                print(f"{of}{name}: {str(error).splitlines()[0]}", flush=True)
        try:
            return self._replay(graphs, repeats)
        finally:
            self._at = None

    def _watch(self) -> None:
        """Says what hangs, since whoever has to stop the program cannot see it."""
        said = None
        while True:
            time.sleep(1)
            at = self._at
            if at and at is not said and time.monotonic() - at[1] > HANGING_SECONDS:
                said = at
                print(f"{at[0]}: not done after {HANGING_SECONDS:.0f} s", flush=True)

    def time_us(self, call: Callable[[int], object], count: int, repeats: int = 5) -> float:
        """Median microseconds of a launch: ``count`` of them in a graph, replayed from a cold cache."""
        return self._replay({"": (self._record(call, count), count)}, repeats)[""]

    def _record(self, call: Callable[[int], object], count: int) -> torch.cuda.CUDAGraph:
        call(0)  # loads kernels, and lets cuDNN choose
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        # Not torch.cuda.graph(): it collects garbage and empties the cache each time, which takes longer than the rest.
        graph.capture_begin(pool=self.first.pool())
        try:
            for i in range(count):
                call(i)
        finally:
            graph.capture_end()
        graph.replay()
        torch.cuda.synchronize()
        return graph

    def _replay(self, graphs: dict[str, tuple[torch.cuda.CUDAGraph, int]], repeats: int) -> dict[str, float]:
        """Median microseconds of a launch of each. In turn, so that the GPU is as hot for one as for the others."""
        events = {what: [] for what in graphs}
        for _ in range(repeats):
            for what, (graph, _count) in graphs.items():
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                self.codes.view(torch.int64).amax()  # pushes everything else out of the cache
                start.record()
                graph.replay()
                end.record()
                events[what].append((start, end))
        torch.cuda.synchronize()
        return {
            what: statistics.median(start.elapsed_time(end) for start, end in events[what]) * 1e3 / count
            for what, (_, count) in graphs.items()
        }

    def warm_up(self, seconds: float = 0.3) -> None:
        """Raise the clocks."""
        a = torch.randn(4096, 4096, dtype=torch.float16, device="cuda")
        for _ in range(max(1, int(seconds * 3000))):
            a @ a
        torch.cuda.synchronize()


class Progress:
    """Says how far a benchmark is, and has it write what it found so far, every few seconds and at the end."""

    def __init__(self, total: int, save: Callable[[], object]):
        self._total, self._save, self._done = total, save, 0
        self._start = self._last = time.monotonic()

    def step(self) -> None:
        self._done += 1
        now = time.monotonic()
        if now - self._last >= SAVE_SECONDS or self._done == self._total:
            self._last = now
            self._save()
            print(f"{now - self._start:6.1f} s: {self._done} of {self._total}", flush=True)


def launches(layer: Layer, weight_bytes: int) -> int:
    """Enough for the weights to leave the cache, but no longer than ``REPLAY_US`` at a pessimistic 300 TFLOP/s."""
    expected_us = 3 + layer.flops / 300e6
    return max(8, min(ROTATION_BYTES // weight_bytes, 800, int(REPLAY_US / expected_us)))
