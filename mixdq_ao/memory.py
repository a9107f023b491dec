"""Memory of a model's forward pass, counted as the original project's report does: static, activation, peak."""

import os
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from mixdq_ao.summary import MIB, storage_bytes


@dataclass(frozen=True)
class Memory:
    """Bytes: ``static`` of parameters and buffers, ``activation`` allocated at most on top while running."""

    static: int
    activation: int

    @property
    def peak(self) -> int:
        return self.static + self.activation

    def mib(self) -> tuple[float, float, float]:
        return self.static / MIB, self.activation / MIB, self.peak / MIB


def measure_memory(model: nn.Module, run: Callable[[], object]) -> Memory:
    """Measure one call of ``run``, which runs ``model``. CUDA asks the allocator, a CPU the profiler."""
    static = storage_bytes([*model.parameters(), *model.buffers()])
    device = next(model.parameters()).device
    return Memory(static, _cuda_activation(run, device) if device.type == "cuda" else _cpu_activation(run))


def _cuda_activation(run, device) -> int:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _cpu_activation(run) -> int:
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler prints notes of its own otherwise
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    # One record for each allocation (positive) and release (negative), in order of time.
    level = peak = 0
    for record in sorted(_allocations(profiler), key=lambda e: e.start_ns()):
        level += record.nbytes()
        peak = max(peak, level)
    return peak


def _allocations(profiler):
    # The public events() fold allocations into the operators that made them, which loses their order.
    return [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
