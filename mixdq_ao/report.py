"""The report: one HTML file that needs nothing else, with pictures to compare, bits, sensitivities and numbers."""

import base64
import io
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from torch import Tensor

from mixdq_ao import families
from mixdq_ao.bits import FLOAT_BITS
from mixdq_ao.errors import MixDQError
from mixdq_ao.evaluate import FLOATING, Evaluation
from mixdq_ao.extras import needed
from mixdq_ao.files import write_text
from mixdq_ao.plan import BitPlan
from mixdq_ao.tables import Scores

TEMPLATE = Path(__file__).resolve().parent / "assets" / "report.html.j2"
BARS = 12
# The order in which data passes blocks; modules are registered in another one.
_PATH = {"down": 1, "mid": 2, "up": 3}
_INK = "#010203"  # stands for the page's text colour in a plot
_KINDS = {"candidate": ("#e69f00", "o"), "uniform": ("#56b4e9", "s"), "chosen": ("#d55e00", "D")}


@dataclass(frozen=True)
class Point:
    """A plan in the plot of size against quality: ``kind`` is "candidate", "uniform" or "chosen"."""

    name: str
    mean_bits: float
    quality: float
    kind: str = "candidate"


def write_report(
    path: str | os.PathLike,
    evaluation: Evaluation,
    *,
    title: str,
    chosen: str | None = None,
    plan: BitPlan | None = None,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    sensitivity: Mapping[str, tuple[str, Scores]] | None = None,
    family: families.ModelFamily = families.SDXL,
    points: Sequence[Point] = (),
    quality: str = "SSIM",
    facts: Mapping[str, str] | None = None,
    findings: Sequence[str] = (),
) -> None:
    """Write the report, whole or not at all.

    Args:
        evaluation: what :func:`mixdq_ao.evaluate.evaluate` gave; its pictures go into the file.
        chosen: the variant that is shown first; the last one by default.
        plan, shapes: bits of the chosen variant, and the weight shape of each layer, for the map of bits.
        sensitivity: heading -> (group of ``family``: "content" or "quality", scores of one layer alone quantized).
        points: plans for the plot; ``quality`` says what their quality is.
        facts: what else a reader needs to know, as it is printed; findings: sentences below the table.

    Raises ``MixDQError`` where jinja2 or, for the plot, matplotlib is missing, and for an evaluation of one variant.
    """
    jinja2 = needed("jinja2", "a report")
    variants = [row.name for row in evaluation.rows if row.name != FLOATING]
    if not variants:
        raise MixDQError("a report compares the floating model with at least one variant; found none")
    chosen = chosen or variants[-1]
    if chosen not in variants:
        raise MixDQError(f"chosen must be one of {variants}; found {chosen!r}")
    pictures = {name: [data_uri(p) for p in batch] for name, batch in evaluation.pictures.items()}
    first = evaluation.pictures[FLOATING]
    height, width = first.shape[1:3]
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    seeds = f"{len(evaluation.seeds)} seed" + "s" * (len(evaluation.seeds) != 1)
    text = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        title=title,
        subtitle=_subtitle(evaluation, chosen),
        measured=f"{len(evaluation.captions)} captions, {seeds}; against the floating pictures of the same noise. "
        + ("± is the standard deviation over seeds." if len(evaluation.seeds) > 1 else ""),
        variants=variants,
        chosen=chosen,
        captions=evaluation.captions[: len(first)],
        floating=pictures.pop(FLOATING),
        pictures=pictures,
        aspect=f"{width} / {height}",
        small=width < 256,
        header=evaluation.header(),
        rows=evaluation.table(),
        findings=list(findings),
        blocks=_blocks(plan, shapes),
        legend=_legend(plan, shapes),
        sensitivity=_panels(sensitivity or {}, family),
        pareto=pareto_svg(points, quality) if points else "",
        pareto_note=f"Mean bits of the weights against {quality}; up and to the left is better.",
        facts=dict(facts or {}),
    )
    write_text(path, text)


def _subtitle(evaluation: Evaluation, chosen: str) -> str:
    row, floating = evaluation.row(chosen), evaluation.row(FLOATING)
    text = f"{chosen}: {floating.mib / row.mib:.1f} times smaller than the floating UNet, SSIM {row.mean('ssim'):.3f}"
    if "accuracy" in row.values:
        text += (
            f", captions {100 * row.mean('accuracy'):.1f} % right (floating {100 * floating.mean('accuracy'):.1f} %)"
        )
    return text


def data_uri(picture: Tensor) -> str:
    """A picture uint8 ``[h, w, 3]`` as a PNG in a data URI."""
    buffer = io.BytesIO()
    Image.fromarray(picture.numpy()).save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


# --- the map of bits --------------------------------------------------------------------------------------------------


def _blocks(plan: BitPlan | None, shapes) -> list[tuple[str, list[dict]]]:
    """(block of the UNet, its layers in order): a block is what follows ``down_blocks`` and the like, or the rest."""
    if plan is None:
        return []
    blocks: dict[str, list[dict]] = {}
    for name, shape in shapes.items():
        if name not in plan:
            continue
        bits = plan[name] or FLOAT_BITS
        size = math.prod(shape)
        title = f"{name}: {bits} bits, {'x'.join(map(str, shape))} = {size} weights"
        cell = {"bits": bits, "title": title, "width": round(0.55 + 0.28 * max(0.0, math.log2(size) - 9), 2)}
        blocks.setdefault(_block_of(name), []).append(cell)
    return sorted(
        blocks.items(), key=lambda item: 4 if item[0] == "conv_out" else _PATH.get(item[0].partition("_")[0], 0)
    )


def _block_of(name: str) -> str:
    parts = name.split(".")
    if len(parts) > 3 and parts[1].isdigit():
        return ".".join(parts[:4]) if parts[3].isdigit() else ".".join(parts[:2] + parts[2:3])
    if len(parts) > 2 and parts[1].isdigit():
        return ".".join(parts[:2])
    return parts[0]


def _legend(plan: BitPlan | None, shapes) -> list[tuple[int, int, str]]:
    if plan is None:
        return []
    sizes = {name: math.prod(shape) for name, shape in shapes.items() if name in plan}
    rows = []
    for bits in (2, 4, 8, FLOAT_BITS):
        names = [name for name in sizes if (plan[name] or FLOAT_BITS) == bits]
        if names:
            share = sum(sizes[name] for name in names) / sum(sizes.values())
            rows.append((bits, len(names), f"{100 * share:.0f} %"))
    return rows


# --- sensitivity ------------------------------------------------------------------------------------------------------


def _panels(sensitivity: Mapping[str, tuple[str, Scores]], family: families.ModelFamily) -> list[dict]:
    """The layers of each group with the lowest score at 4 bits; bars say how much is lost, relative to the worst."""
    panels = []
    for title, (group, scores) in sensitivity.items():
        wanted = {n: s[4] for n, s in scores.items() if 4 in s and family.is_content(n) == (group == "content")}
        worst = sorted(wanted.items(), key=lambda item: item[1])[:BARS]
        if not worst:
            continue
        # An SSIM loses from 1; an SQNR in dB from the safest layer.
        top = 1.0 if all(v <= 1 for v in wanted.values()) else max(wanted.values())
        most = max(top - worst[0][1], 1e-12)
        # SSIMs of a single layer differ far behind the point: what is missing to 1 says more.
        bars = [
            {
                "name": name,
                "value": f"{1 - value:.1e}" if top == 1.0 else f"{value:.1f} dB",
                "share": round(100 * (top - value) / most, 1),
            }
            for name, value in worst
        ]
        panels.append({"title": title, "bars": bars})
    return panels


# --- the plot ---------------------------------------------------------------------------------------------------------


def pareto_svg(points: Sequence[Point], quality: str) -> str:
    """Mean bits against quality as an SVG element whose text and axes take the colour of the text around it."""
    matplotlib = needed("matplotlib", "the plot of a report")
    from matplotlib.figure import Figure

    settings = {"svg.fonttype": "none", "svg.hashsalt": "mixdq_ao", "font.family": "sans-serif", "font.size": 11}
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(7, 3.8), layout="constrained")
        axes = figure.add_subplot()
        for kind, (colour, marker) in _KINDS.items():
            some = [p for p in points if p.kind == kind]
            if some:
                x, y = [p.mean_bits for p in some], [p.quality for p in some]
                size = 70 if kind == "chosen" else 42
                axes.scatter(
                    x, y, s=size, c=colour, marker=marker, edgecolors=_INK, linewidths=0.7, label=kind, zorder=3
                )
        for p in points:
            if p.kind != "candidate":
                axes.annotate(p.name, (p.mean_bits, p.quality), (7, -13), textcoords="offset points", color=_INK)
        axes.set_xlabel("mean bits of the weights", color=_INK)
        axes.set_ylabel(quality, color=_INK)
        axes.margins(x=0.12, y=0.15)
        axes.tick_params(colors=_INK)
        axes.grid(color=_INK, alpha=0.12)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["bottom", "left"]].set_color(_INK)
        axes.legend(frameon=False, labelcolor=_INK, loc="lower right")
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    return svg[svg.index("<svg") :].replace(_INK, "currentColor")
