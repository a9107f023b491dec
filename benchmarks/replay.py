"""Where the time of a CUDA graph's replay goes, by kernel, from a trace that ``mixdq-ao bench --profile`` wrote.

    python benchmarks/replay.py traces/w8a8.graph.json.gz

A kernel that may begin before the one ahead has ended overlaps it, so durations add up to more than the replay took.
"own" is what a kernel adds to the end of all before it; own times and those in which nothing ran add up to the replay.
"""

import gzip
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from mixdq_ao.errors import MixDQError

GPU_WORK = {"kernel", "gpu_memset", "gpu_memcpy"}


@dataclass
class Kernel:
    """All launches of a kernel with one number of blocks; microseconds."""

    name: str
    blocks: int | None  # None: a copy or a memset
    launches: int = 0
    duration: float = 0.0
    own: float = 0.0


def read_events(path: Path) -> list[dict]:
    """What ran on the GPU, by its begin. Raises ``MixDQError`` where the file is no trace."""
    try:
        with gzip.open(path, "rt") if path.suffix == ".gz" else open(path) as file:
            events = json.load(file)["traceEvents"]
        return sorted((e for e in events if e.get("cat") in GPU_WORK), key=lambda e: e["ts"])
    except (OSError, EOFError, ValueError, LookupError, TypeError) as error:
        raise MixDQError(f"{path}: cannot be read as a trace of torch's profiler ({error})") from None


def short_name(name: str) -> str:
    """Without what is returned and the arguments: ``mixdq::sm90::matmul<mixdq::sm90::Config<64, 80> >``."""
    name = re.sub(r"\(anonymous namespace\)::", "", re.sub(r"^void ", "", name))
    depth = 0
    for i, c in enumerate(name):
        depth += (c == "<") - (c == ">")
        if c == "(" and depth == 0:
            return name[:i]
    return name


def add_up(events: list[dict]) -> tuple[list[Kernel], float, float]:
    """Kernels, the longest own time first; microseconds from the first begin to the last end; those when none ran."""
    kernels: dict[tuple, Kernel] = {}
    if not events:
        return [], 0.0, 0.0
    idle, end = 0.0, events[0]["ts"]
    for event in events:
        grid = event.get("args", {}).get("grid")
        blocks = grid[0] * grid[1] * grid[2] if grid else None
        key = short_name(event["name"]), blocks
        kernel = kernels.setdefault(key, Kernel(*key))
        begin, own_end = event["ts"], event["ts"] + event["dur"]
        idle += max(begin - end, 0.0)
        kernel.launches += 1
        kernel.duration += event["dur"]
        kernel.own += max(own_end - max(begin, end), 0.0)
        end = max(end, own_end)
    return sorted(kernels.values(), key=lambda k: -k.own), end - events[0]["ts"], idle


def by_name(kernels: list[Kernel]) -> list[Kernel]:
    """Whatever their numbers of blocks."""
    groups: dict[str, Kernel] = {}
    for k in kernels:
        group = groups.setdefault(k.name, Kernel(k.name, None))
        group.launches += k.launches
        group.duration += k.duration
        group.own += k.own
    return sorted(groups.values(), key=lambda k: -k.own)


def show(kernels: list[Kernel], took: float, idle: float, most: int) -> Table:
    launches = sum(k.launches for k in kernels)
    title = f"{took / 1e3:.3f} ms, {launches} launches, nothing ran for {idle / 1e3:.3f} ms"
    table = Table("kernel", "blocks", "launches", "own ms", "of all", "own us each", "us each", title=title)
    for column in table.columns[1:]:
        column.justify = "right"
    for k in kernels[:most]:
        table.add_row(
            k.name, "" if k.blocks is None else str(k.blocks), str(k.launches), f"{k.own / 1e3:.3f}",
            f"{100 * k.own / took:.1f} %", f"{k.own / k.launches:.2f}", f"{k.duration / k.launches:.2f}",
        )  # fmt: skip
    rest = kernels[most:]
    if rest:
        own = sum(k.own for k in rest)
        table.add_row(
            f"{len(rest)} more", "", str(sum(k.launches for k in rest)), f"{own / 1e3:.3f}", f"{100 * own / took:.1f} %"
        )
    return table


def main(
    trace: Annotated[Path, typer.Argument(help="A .graph.json.gz of bench --profile.")],
    by_blocks: Annotated[bool, typer.Option(help="A line for each number of blocks.")] = False,
    most: Annotated[int, typer.Option(min=1, help="Lines.")] = 40,
) -> None:
    """Kernels of a replay by the time that each adds."""
    try:
        events = read_events(trace)
    except MixDQError as error:
        raise typer.BadParameter(str(error)) from None
    if not events:
        raise typer.BadParameter(f"{trace}: no kernel ran on a GPU while this was recorded")
    kernels, took, idle = add_up(events)
    Console().print(show(kernels if by_blocks else by_name(kernels), took, idle, most))


if __name__ == "__main__":
    typer.run(main)
