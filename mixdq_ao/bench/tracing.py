"""For profilers: named ranges, traces of one step, snapshots of memory, and calls of nsys and ncu."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

SNAPSHOT_ENTRIES = 200_000
TOOL_SECONDS = 900
# ncu runs each kernel several times over: a step of SDXL launches thousands, and its blocks are much alike.
NCU_LAUNCHES = 400
STEP_ONLY = "--step-only"


@contextmanager
def marked(name: str, device: torch.device) -> Iterator[None]:
    """A range of that name in torch's traces and, on a GPU, in NVTX's."""
    with torch.profiler.record_function(name):
        if device.type == "cuda":
            torch.cuda.nvtx.range_push(name)
        try:
            yield
        finally:
            if device.type == "cuda":
                torch.cuda.nvtx.range_pop()


def write_trace(call: Callable[[], object], path: Path, device: torch.device) -> None:
    """Writes what torch's profiler sees of one call as ``.json.gz``, for chrome://tracing or ui.perfetto.dev."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler prints notes of its own otherwise
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile, marked("step", device):
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    path.parent.mkdir(parents=True, exist_ok=True)
    profile.export_chrome_trace(str(path))


def for_variant(path: Path, name: str) -> Path:
    """``memory.pickle`` to ``memory.w8a8.pickle``."""
    return path.with_name(f"{path.stem}.{name}{path.suffix}")


def start_snapshot() -> None:
    """From here on, CUDA's allocator notes who allocates what."""
    torch.cuda.memory._record_memory_history(max_entries=SNAPSHOT_ENTRIES)


def write_snapshot(path: Path) -> None:
    """Writes what was noted, for https://pytorch.org/memory_viz, and stops noting."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.cuda.memory._dump_snapshot(str(path))
    stop_snapshot()


def stop_snapshot() -> None:
    torch.cuda.memory._record_memory_history(enabled=None)


@contextmanager
def profiled(device: torch.device) -> Iterator[None]:
    """nsys and ncu look at this block alone, as :func:`tool_commands` starts them."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.synchronize(device)
    torch.cuda.profiler.start()
    try:
        yield
        torch.cuda.synchronize(device)
    finally:
        torch.cuda.profiler.stop()


def tool_commands(out: Path, arguments: Sequence[str]) -> dict[str, list[str]]:
    """Command lines of those of nsys and ncu that are on PATH, for one step of one variant.

    ``arguments`` are those of ``mixdq-ao bench``; ``out`` is the file to write, without its suffix.
    """
    step = [sys.executable, "-m", "mixdq_ao", "bench", *arguments, STEP_ONLY]
    tools = {
        "nsys": ["nsys", "profile", "--force-overwrite=true", "--trace=cuda,nvtx", "--capture-range=cudaProfilerApi",
                 "--capture-range-end=stop", f"--output={out}"],
        "ncu": ["ncu", "--force-overwrite", "--profile-from-start=off", f"--launch-count={NCU_LAUNCHES}",
                f"--export={out}"],
    }  # fmt: skip
    return {tool: [*command, *step] for tool, command in tools.items() if shutil.which(tool)}


def call_tool(command: Sequence[str]) -> str:
    """Runs one of :func:`tool_commands`; why it failed, or an empty string."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TOOL_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)[:300]
    lines = (done.stderr or done.stdout).strip().splitlines()
    return "" if done.returncode == 0 else (lines[-1] if lines else f"exit code {done.returncode}")[:300]
