"""Results of a benchmark: rows, the file that keeps them, and the table that shows them."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

from torch import Tensor

from mixdq_ao.bench.timing import Times
from mixdq_ao.errors import CheckpointError
from mixdq_ao.evaluate import sqnr
from mixdq_ao.files import parse_json, read_text, write_text
from mixdq_ao.summary import MIB

FORMAT = "mixdq_ao.bench"
FORMAT_VERSION = 1
NOT_FINITE = "its output holds NaN or infinity"


@dataclass(frozen=True)
class Settings:
    """What every row depends on, beside its variant and batch. Rows of equal settings and environment may be joined."""

    model: str
    size: int
    dtype: str
    device: str
    plan: str | None
    layers: int | None
    channels_last: bool
    repeats: int
    warmup: int
    cold: bool
    seed: int


@dataclass(frozen=True)
class Row:
    """A variant at a batch size. ``error``: why there are no numbers, else empty. Memory in bytes.

    ``latency``: of a CUDA graph's replays on a GPU, of calls on a CPU; ``call_ms``: median of calls without a graph, on
    a GPU; ``static``, ``activation``: parameters and buffers, and what is allocated at most on top while running;
    ``held``: what the allocator held at rest, on a GPU; ``sqnr``: dB against the floating eager output, None where that
    did not fit in memory or was not finite, where this is the ``same``, or where this is ``nonfinite``, which is to say
    that it holds NaN or infinity; ``compile_s``: seconds of the first call, which compiles; ``run``: when its run was
    started.
    """

    variant: str
    batch: int
    run: str
    error: str = ""
    latency: Times | None = None
    call_ms: float | None = None
    static: int | None = None
    activation: int | None = None
    held: int | None = None
    sqnr: float | None = None
    same: bool = False
    nonfinite: bool = False
    compile_s: float | None = None

    @property
    def peak(self) -> int | None:
        return None if self.static is None else self.static + self.activation


@dataclass
class Results:
    """All rows, in the order of variants; ``environment``: versions and hardware; ``notes``: what else happened."""

    settings: Settings
    environment: dict[str, str]
    baseline: str
    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def row(self, variant: str, batch: int) -> Row | None:
        return next((r for r in self.rows if (r.variant, r.batch) == (variant, batch)), None)

    def speedup(self, row: Row) -> float | None:
        """How many times faster than the baseline, compiled floating point, at the same batch size."""
        base = self.row(self.baseline, row.batch)
        if base is None or base.error or row.error:
            return None
        return base.latency.median / row.latency.median

    def to_json(self) -> dict:
        """Everything, as values of JSON; of each row also what follows from others."""
        return {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "settings": asdict(self.settings),
            "environment": self.environment,
            "baseline": self.baseline,
            "rows": [{**asdict(r), "peak": r.peak, "speedup": self.speedup(r)} for r in self.rows],
            "notes": self.notes,
        }

    def write(self, path) -> None:
        """Writes :meth:`to_json`, whole or not at all."""
        write_text(path, json.dumps(self.to_json(), indent=1, allow_nan=False) + "\n")

    @classmethod
    def read(cls, path) -> "Results":
        """What :meth:`write` wrote. Raises ``CheckpointError`` for anything else."""
        content = parse_json(path, "", read_text(path))
        if not isinstance(content, Mapping) or (content.get("format"), content.get("format_version")) != (
            FORMAT,
            FORMAT_VERSION,
        ):
            raise CheckpointError(path, "format", f"must be {FORMAT}, version {FORMAT_VERSION}")
        try:
            return cls(
                Settings(**content["settings"]),
                dict(content["environment"]),
                content["baseline"],
                [_row(r) for r in content["rows"]],
                list(content["notes"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(path, "", f"must be what mixdq-ao bench writes ({error!r})") from error


def _row(values: dict) -> Row:
    fields = {key: value for key, value in values.items() if key not in ("peak", "speedup")}
    latency = fields.pop("latency")
    return Row(latency=None if latency is None else Times(**latency), **fields)


def agreement(reference: Tensor | None, output: Tensor) -> dict:
    """The row's ``sqnr``, ``same`` and ``nonfinite``: JSON has no infinity, which is the SQNR of equal outputs, and no
    NaN."""
    nonfinite = not output.isfinite().all().item()
    value = math.nan if reference is None or nonfinite else sqnr(reference, output)
    return {"sqnr": value if math.isfinite(value) else None, "same": value == math.inf, "nonfinite": nonfinite}


# --- the table --------------------------------------------------------------------------------------------------------


def table(results: Results) -> tuple[str, tuple[str, ...], list[tuple[str, ...]], list[str]]:
    """Title, header, cells and the lines below the table: why rows are empty, and what else happened."""
    header = ("", "batch", "ms", "p10 - p90", f"over {results.baseline}", "call ms", "static", "activation", "peak MiB",
              "SQNR dB", "compile s")  # fmt: skip
    s = results.settings
    kind = "CUDA graph replays" if s.device.startswith("cuda") else "calls"
    title = f"{s.model}, {s.size} px, {s.dtype}, on {s.device}: median of {s.repeats} {kind}"
    lines = [f"{r.variant}, batch {r.batch}: {r.error or NOT_FINITE}" for r in results.rows if r.error or r.nonfinite]
    if len({r.run for r in results.rows}) > 1:
        lines.append("Rows come from several runs: ratios between them are less certain than within one.")
    return title, header, [_cells(r, results) for r in results.rows], lines + results.notes


def _cells(r: Row, results: Results) -> tuple[str, ...]:
    if r.error:
        return r.variant, str(r.batch), *["-"] * 9
    speedup = results.speedup(r)
    return (
        r.variant,
        str(r.batch),
        f"{r.latency.median:.2f}",
        f"{r.latency.p10:.2f} - {r.latency.p90:.2f}",
        "-" if speedup is None else f"{speedup:.2f}x",
        "-" if r.call_ms is None else f"{r.call_ms:.2f}",
        *(f"{b / MIB:.1f}" for b in (r.static, r.activation, r.peak)),
        _agreement_cell(r),
        "-" if r.compile_s is None else f"{r.compile_s:.1f}",
    )


def _agreement_cell(r: Row) -> str:
    if r.nonfinite:
        return "NaN"
    return "same" if r.same else "-" if r.sqnr is None else f"{r.sqnr:.1f}"
