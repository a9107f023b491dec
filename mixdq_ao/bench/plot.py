"""A benchmark as a picture: latency and memory of each variant, and how latency grows with the batch."""

from collections.abc import Sequence
from pathlib import Path

from mixdq_ao.bench.results import Results, Row
from mixdq_ao.errors import MixDQError
from mixdq_ao.extras import needed
from mixdq_ao.files import replacing, writable_file
from mixdq_ao.summary import MIB

_FLOATING, _OTHERS, _OURS = "#8a8a8a", "#56b4e9", "#d55e00"
_STATIC, _ACTIVATION = "#0072b2", "#9fcbe8"
_MARKERS = "osD^v"
_DTYPES = ("fp16", "bf16", "fp32")


def check_plot(path: str | Path) -> None:
    """Raises ``MixDQError`` where :func:`write_plot` could not write: to be asked before anything is measured."""
    needed("matplotlib", "a plot")
    from matplotlib.backend_bases import FigureCanvasBase

    known = FigureCanvasBase.get_supported_filetypes()
    if _format(path) not in known:
        raise MixDQError(f"{path}: a plot is a file of one of these suffixes: {', '.join(sorted(known))}")
    writable_file(path)


def write_plot(results: Results, path: str | Path) -> None:
    """Writes a PNG (or what the suffix says), whole or not at all. Raises ``MixDQError`` without a measured row, and
    where :func:`check_plot` does."""
    check_plot(path)
    measured = [r for r in results.rows if not r.error]
    if not measured:
        raise MixDQError("nothing was measured, so there is nothing to plot; the table says why")
    from matplotlib.figure import Figure

    batches = sorted({r.batch for r in measured})
    first = [r for r in measured if r.batch == batches[0]]
    panels = 3 if len(batches) > 1 else 2
    figure = Figure(figsize=(5.4 * panels, 2.3 + 0.42 * len(first)), layout="constrained")
    axes = figure.subplots(1, panels)
    _latency(axes[0], results, first)
    _memory(axes[1], first)
    if panels == 3:
        _scaling(axes[2], measured, batches)
    s = results.settings
    figure.suptitle(f"{Path(s.model).name} UNet, {s.size} px, on {_hardware(results)}", fontsize=11)
    with replacing(path) as file:
        figure.savefig(file, dpi=150, format=_format(path))


def _format(path: str | Path) -> str:
    return Path(path).suffix.lstrip(".").lower() or "png"


def _hardware(results: Results) -> str:
    kind, _, index = results.settings.device.partition(":")
    found = results.environment.get(f"GPU {index or 0}", kind) if kind == "cuda" else kind
    return found.partition(",")[0]


def _colour(name: str) -> str:
    return _FLOATING if name.startswith(_DTYPES) else _OTHERS if name.startswith("torchao") else _OURS


def _bars(axes, rows: Sequence[Row], title: str) -> None:
    axes.set_yticks(range(len(rows)), [r.variant for r in rows])
    axes.invert_yaxis()
    axes.set_title(title, fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", alpha=0.2)
    axes.set_axisbelow(True)


def _latency(axes, results: Results, rows: Sequence[Row]) -> None:
    values = [r.latency.median for r in rows]
    spread = [
        [max(0.0, r.latency.median - r.latency.p10) for r in rows],
        [max(0.0, r.latency.p90 - r.latency.median) for r in rows],
    ]
    axes.barh(range(len(rows)), values, xerr=spread, color=[_colour(r.variant) for r in rows], height=0.65)
    for i, r in enumerate(rows):
        speedup = results.speedup(r)
        label = f"{r.latency.median:.{1 if r.latency.median > 10 else 2}f}" + (f"  ({speedup:.2f}x)" if speedup else "")
        axes.annotate(label, (r.latency.p90, i), (5, 0), textcoords="offset points", va="center", fontsize=9)
    axes.set_xlim(0, 1.35 * max(r.latency.p90 for r in rows))
    axes.set_xlabel("ms")
    ratio = f" (times as fast as {results.baseline})" if any(results.speedup(r) for r in rows) else ""
    _bars(axes, rows, f"Latency, batch {rows[0].batch}{ratio}")


def _memory(axes, rows: Sequence[Row]) -> None:
    static, activation = ([getattr(r, part) / MIB for r in rows] for part in ("static", "activation"))
    axes.barh(range(len(rows)), static, color=_STATIC, height=0.65, label="static")
    axes.barh(range(len(rows)), activation, left=static, color=_ACTIVATION, height=0.65, label="activation")
    for i, r in enumerate(rows):
        axes.annotate(
            f"{r.peak / MIB:.0f}" if r.peak > 100 * MIB else f"{r.peak / MIB:.1f}",
            (r.peak / MIB, i),
            (5, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
        )
    axes.set_xlim(0, 1.2 * max(r.peak for r in rows) / MIB)
    axes.set_xlabel("MiB")
    _bars(axes, rows, f"Peak memory, batch {rows[0].batch}")
    axes.legend(frameon=False, fontsize=9, loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=2)


def _scaling(axes, rows: Sequence[Row], batches: Sequence[int]) -> None:
    """Milliseconds of a picture over the batch size."""
    styles = ("-", "--", ":", "-.")
    seen: dict[str, int] = {}
    for name in dict.fromkeys(r.variant for r in rows):
        own = sorted((r for r in rows if r.variant == name), key=lambda r: r.batch)  # a resumed run's come as measured
        colour = _colour(name)
        style = styles[seen.setdefault(colour, 0) % len(styles)]
        x, y = [r.batch for r in own], [r.latency.median / r.batch for r in own]
        axes.plot(x, y, style, color=colour, marker=_MARKERS[seen[colour] % len(_MARKERS)], markersize=5, label=name)
        seen[colour] += 1
    axes.set_xscale("log", base=2)
    axes.set_xticks(batches, [str(b) for b in batches])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.set_xlabel("batch")
    axes.set_ylabel("ms for each picture")
    axes.set_title("Latency over the batch size", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.2)
    axes.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1.0, 0.5))
