"""Which layer gets which width: exact 0/1 programs under a budget, and the sweep between two groups of layers.

Layers come in two groups, judged by different metrics (MixDQ, arXiv 2405.17873, section 4.3): content layers by SSIM
of pictures, quality layers by SQNR of the UNet output. Within a group the summed score is maximised:

    choose c[l, b] in {0, 1}, one width b for each layer l,
    maximise sum c[l, b] * score[l][b]
    subject to lower <= sum c[l, b] * b * size[l] / sum size[l] <= upper

which HiGHS solves exactly (``scipy.optimize.milp``). What one group's score is worth in the other's is not in the
program; a sweep over the ratio k of the groups' budgets offers a plan for each k, or :func:`joint` puts both metrics
on one scale.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mixdq_ao import families
from mixdq_ao.errors import MixDQError, PlanError, name_list
from mixdq_ao.files import replacing
from mixdq_ao.plan import BitPlan
from mixdq_ao.program import EDGE_SLACK, Group, check_mean_bits, solve
from mixdq_ao.progress import track
from mixdq_ao.tables import Scores, Sizes

CONTENT, QUALITY = "content", "quality"

# Widths that are offered to each group. No published plan has 2-bit weights in quality layers or activations below 4.
CANDIDATES = {
    "weight": {CONTENT: (2, 4, 8), QUALITY: (4, 8)},
    "act": {CONTENT: (4, 8), QUALITY: (4, 8)},
}
# Ratios of mean bits, content to quality. Content weights stand 2 bits, so their ratio reaches further down.
RATIOS = {
    "weight": tuple(round(0.25 + 0.05 * i, 2) for i in range(24)),
    "act": tuple(round(0.90 + 0.01 * i, 2) for i in range(21)),
}


@dataclass(frozen=True)
class Problem:
    """What is to be allocated: one or two groups, and ``noise``, all layers on one scale, where that is known.

    ``noise`` maps layer -> bits -> relative error energy of the UNet output, lower is safer; see :func:`common_scale`.
    ``kind`` is "weight" or "act".
    """

    kind: str
    groups: tuple[Group, ...]
    noise: Scores | None = None

    @property
    def sizes(self) -> Sizes:
        return {name: size for group in self.groups for name, size in group.sizes.items()}

    def layers(self) -> Group:
        """All layers as one group whose score is minus their noise. Raises ``PlanError`` without a common scale."""
        if self.noise is None:
            raise PlanError(
                "a joint program, and choosing from a sweep without pictures, need both metrics on one scale: the SQNR "
                "table must have content layers too. Measure SQNR of all layers, give the mean bits of each group, or "
                "evaluate the candidates of sweep() with choose()"
            )
        scores = {name: {bits: -e for bits, e in by_bits.items()} for name, by_bits in self.noise.items()}
        return Group("joint", scores, self.sizes)


@dataclass(frozen=True)
class Allocation:
    """A plan and what the tables say of it.

    ``mean_bits`` over all allocated layers; mean bits, summed scores and numbers of layers by group; ``ratio`` of the
    groups' mean bits as it was asked for, None outside a sweep; ``noise``: summed relative error energy, None without
    a common scale.
    """

    plan: BitPlan
    mean_bits: float
    group_bits: dict[str, float]
    group_scores: dict[str, float]
    group_layers: dict[str, int]
    ratio: float | None = None
    noise: float | None = None


def problem(
    content_scores: Mapping[str, Mapping[int, float]] | None,
    quality_scores: Mapping[str, Mapping[int, float]],
    sizes: Mapping[str, float],
    *,
    kind: str = "weight",
    family: families.ModelFamily = families.SDXL,
    candidates: Mapping[str, Sequence[int]] | None = None,
    protect: Iterable[str] = (),
) -> Problem:
    """Sort layers into groups and keep the candidate widths.

    Args:
        content_scores: SSIM of pictures, at least of the content layers; None where the family has no such layers.
        quality_scores: SQNR in dB, at least of the quality layers; with content layers too there is a common scale.
        sizes: of the layers to allocate: weight counts, or elements of the input; any unit.
        kind: "weight" or "act", for the default ``candidates``.
        family: whose rule says which layers are content layers, from their names.
        candidates: widths offered to each group, ``{"content": (2, 4, 8), "quality": (4, 8)}``.
        protect: layers that stay floating and take no part.

    Raises ``PlanError`` for layers without a size, a score or a candidate width, and for unknown names.
    """
    if kind not in CANDIDATES:
        raise PlanError(f"kind must be one of {', '.join(CANDIDATES)}; found {kind!r}")
    candidates = CANDIDATES[kind] | dict(candidates or {})
    protect = set(protect)
    if unknown := protect - sizes.keys():
        raise PlanError(f"protect: {len(unknown)} names have no size: {name_list(unknown)}")
    layers = [name for name in sizes if name not in protect]
    tables = {CONTENT: content_scores or {}, QUALITY: quality_scores}
    members = {CONTENT: [n for n in layers if family.is_content(n)]}
    members[QUALITY] = [n for n in layers if not family.is_content(n)]
    groups = [_group(name, members[name], tables[name], sizes, candidates[name]) for name in tables if members[name]]
    if not groups:
        raise PlanError("there is no layer to allocate: sizes are empty, or every layer is protected")
    return Problem(kind, tuple(groups), common_scale(groups, quality_scores))


def _group(name: str, layers: list[str], table, sizes, widths: Sequence[int]) -> Group:
    if missing := [layer for layer in layers if layer not in table]:
        score = "SQNR" if name == QUALITY else "SSIM; a transformer, which has no such layers, is of the family generic"
        raise PlanError(
            f"{name} group: {len(missing)} layers have a size but no score: {name_list(missing)}. Give their {score}"
        )
    scores = {layer: {bits: table[layer][bits] for bits in widths if bits in table[layer]} for layer in layers}
    if bare := [layer for layer, by_bits in scores.items() if not by_bits]:
        raise PlanError(f"{name} group: no score at any of {list(widths)} bits for {name_list(bare)}")
    bad = [layer for layer in layers if not 0 < sizes[layer] < math.inf]
    if bad:
        raise PlanError(f"{name} group: sizes must be positive; found {sizes[bad[0]]} for {bad[0]}")
    return Group(name, scores, {layer: sizes[layer] for layer in layers})


def common_scale(groups: Sequence[Group], sqnr: Mapping[str, Mapping[int, float]]) -> Scores | None:
    """Relative error energy of the UNet output for each layer and width, from both metrics; None where it is unknown.

    - From SQNR in dB: ``10^(-SQNR/10)``.
    - From SSIM: ``2 * (1/SSIM - 1)``. A picture with noise of variance n over structure of variance v, and nothing
      else changed, has SSIM = 2v / (2v + n); so this is n/v, the relative error energy of the picture.
    - The factor between picture and UNet output (one step of SDXL-Turbo amplifies errors some hundred times) is the
      median ratio over content layers and widths that have both scores, far above either noise floor.
    - The noise floor of each metric, its lowest energy in the table, is subtracted: what two float runs differ by is
      no damage.

    Energies of errors that know nothing of each other add up, which is what a sum over layers assumes.
    """
    energies = {}
    for group in groups:
        if group.name == QUALITY:
            energies |= _above_floor(_energies(group.scores, _sqnr_energy))
            continue
        bare = any(layer not in sqnr for layer in group.scores)
        if bare:
            return None
        own = _above_floor(_energies(group.scores, _ssim_energy))
        factor = _median_ratio(_energies({name: sqnr[name] for name in own}, _sqnr_energy), own)
        if factor is None:
            return None
        energies |= {name: {bits: factor * e for bits, e in by_bits.items()} for name, by_bits in own.items()}
    return energies


def _sqnr_energy(score: float) -> float:
    return 10 ** (-score / 10)


def _ssim_energy(score: float) -> float:
    return 2 * (1 / max(score, 1e-3) - 1)  # SSIM may be 0 or negative: nothing is left of the picture


def _energies(scores, energy) -> Scores:
    return {name: {bits: energy(score) for bits, score in by_bits.items()} for name, by_bits in scores.items()}


def _above_floor(energies: Scores) -> Scores:
    floor = min(e for by_bits in energies.values() for e in by_bits.values())
    return {name: {bits: e - floor for bits, e in by_bits.items()} for name, by_bits in energies.items()}


def _median_ratio(target: Scores, source: Scores) -> float | None:
    """Median of target / source over the larger half of both, where noise floors do not matter."""
    pairs = np.array([(target[n][b], source[n][b]) for n in source for b in source[n] if b in target[n]])
    if len(pairs) == 0:
        return None
    pairs = pairs[(pairs >= np.median(pairs, axis=0)).all(1) & (pairs > 0).all(1)]
    return float(np.median(pairs[:, 0] / pairs[:, 1])) if len(pairs) else None


# --- the program ------------------------------------------------------------------------------------------------------


def _allocation(p: Problem, bits: Mapping[str, int], source: str, ratio: float | None = None) -> Allocation:
    sizes = p.sizes
    plan = BitPlan({name: bits[name] for name in sizes}, source)
    return Allocation(
        plan,
        plan.mean_bits(sizes),
        {group.name: group.mean_bits(plan) for group in p.groups},
        {group.name: group.score(plan) for group in p.groups},
        {group.name: len(group.scores) for group in p.groups},
        ratio,
        None if p.noise is None else sum(by_bits[plan[name]] for name, by_bits in p.noise.items()),
    )


def by_group(p: Problem, group_bits: Mapping[str, float], lower: Mapping[str, float] | None = None) -> Allocation:
    """One program for each group, with its mean bits at most ``group_bits[group]`` (and at least ``lower[group]``)."""
    names = {group.name for group in p.groups}
    if names != group_bits.keys():
        raise PlanError(f"mean bits must be given for the groups {sorted(names)}; found {sorted(group_bits)}")
    bits = {}
    for group in p.groups:
        bits |= solve(group, group_bits[group.name], (lower or {}).get(group.name))
    edges = ", ".join(f"{name} {edge:g}" for name, edge in group_bits.items())
    return _allocation(p, bits, f"allocation of {p.kind} bits ({edges})")


def joint(p: Problem, budget: float) -> Allocation:
    """One program for all layers on the common scale (see :func:`common_scale`), with at most ``budget`` mean bits."""
    return _allocation(p, solve(p.layers(), budget), f"joint allocation of {p.kind} bits ({budget:g})")


def group_budgets(p: Problem, budget: float, ratio: float) -> dict[str, float]:
    """Mean bits of both groups that have the ratio k = content / quality and together the mean ``budget`` m.

    ``quality = m (1 + r) / (k r + 1)`` and ``content = k * quality``, r = size of content / size of quality.
    """
    content, quality = p.groups
    r = content.size / quality.size
    bits = budget * (1 + r) / (ratio * r + 1)
    return {CONTENT: ratio * bits, QUALITY: bits}


def sweep(
    p: Problem, budget: float, ratios: Iterable[float] | None = None, progress: bool | None = None
) -> list[Allocation]:
    """An allocation with at most ``budget`` mean bits for each ratio k of the groups' budgets, equal plans once.

    Ratios whose group budgets no plan can have are left out; so are those that would give a group more than its widest
    candidates. With one group there is one allocation, and for a budget above the mean of the widest plan it is that
    plan. Raises ``PlanError`` where nothing is left, and for a budget that is not finite.
    """
    check_mean_bits(budget, "the budget")
    if len(p.groups) == 1:
        return [by_group(p, {p.groups[0].name: budget})]
    ratios = list(RATIOS[p.kind] if ratios is None else ratios)
    edges = {group.name: group.edge_means() for group in p.groups}
    lowest, highest = (
        sum(edges[group.name][end] * group.size for group in p.groups) / sum(p.sizes.values()) for end in (0, 1)
    )
    if budget > highest + EDGE_SLACK:
        return [by_group(p, {name: high for name, (_, high) in edges.items()})]
    points: dict[tuple, Allocation] = {}
    for ratio in track(ratios, "Allocating", len(ratios), progress):
        budgets = group_budgets(p, budget, ratio)
        if all(edges[name][0] - EDGE_SLACK <= bits <= edges[name][1] + EDGE_SLACK for name, bits in budgets.items()):
            bits = {name: b for group in p.groups for name, b in solve(group, budgets[group.name]).items()}
            point = _allocation(p, bits, f"allocation of {p.kind} bits ({budget:g}, ratio {ratio:g})", ratio)
            points.setdefault(tuple(point.plan.items()), point)
    if not points:
        raise PlanError(
            f"no plan for {budget:g} mean bits at any of {len(ratios)} ratios from {min(ratios, default=0):g} to "
            f"{max(ratios, default=0):g}; the lowest possible mean is {lowest:.4f} and the highest {highest:.4f}. "
            + ("Give more bits, or offer narrower widths" if budget < lowest else "Give other ratios, or more bits")
        )
    return list(points.values())


def offered_means(sizes: Mapping[str, float], kind: str, family: families.ModelFamily) -> tuple[float, float]:
    """The lowest and the highest mean bits that :func:`problem` can meet with its widths: known before any score is."""
    widths = {name: CANDIDATES[kind][CONTENT if family.is_content(name) else QUALITY] for name in sizes}
    low, high = (sum(pick(widths[n]) * size for n, size in sizes.items()) for pick in (min, max))
    return low / sum(sizes.values()), high / sum(sizes.values())


def least_noise(points: Sequence[Allocation]) -> Allocation:
    """The allocation with the least summed error energy on the common scale. Raises ``PlanError`` without one."""
    if any(point.noise is None for point in points):
        raise PlanError("without the SQNR of content layers no plan can be preferred from the tables alone")
    return min(points, key=lambda point: point.noise)


def front(points: Sequence[Allocation]) -> list[Allocation]:
    """The Pareto front: allocations that no other beats in mean bits and every group's score at once, by mean bits."""

    def values(a: Allocation) -> tuple[float, ...]:
        return -a.mean_bits, *a.group_scores.values()

    def beaten(a: Allocation) -> bool:
        mine = values(a)
        return any(values(b) != mine and all(y >= x for x, y in zip(mine, values(b), strict=True)) for b in points)

    return sorted((a for a in points if not beaten(a)), key=lambda a: (a.mean_bits, a.ratio or 0.0))


def mean_bits_of_bytes(nbytes: float, sizes: Mapping[str, float], unit: float | None = None) -> float:
    """The mean bits at which codes take ``nbytes``; ``unit`` is the number of weights that a size of 1 stands for.

    Without it sizes must be counts. Raises ``PlanError`` for sizes that are not whole numbers, then.
    """
    if unit is None:
        unit = 1.0
        if fraction := next((f"{size} for {name}" for name, size in sizes.items() if size != round(size)), None):
            raise PlanError(
                f"a budget in bytes needs weight counts as sizes, or their unit; found {fraction}. Give size_unit, the "
                "number of weights that a size of 1 stands for: 11520 in the original project's tables"
            )
    if not (nbytes > 0 and unit > 0):
        raise PlanError(f"a budget in bytes and a unit must be positive; found {nbytes} and {unit}")
    return 8 * nbytes / (unit * sum(sizes.values()))


@dataclass(frozen=True)
class Result:
    """All allocations that were looked at, and the one that was taken."""

    points: list[Allocation]
    chosen: Allocation


def run(
    p: Problem,
    *,
    group_bits: Mapping[str, float] | None = None,
    budget: float | None = None,
    budget_bytes: float | None = None,
    size_unit: float | None = None,
    one_scale: bool = False,
    progress: bool | None = None,
) -> Result:
    """Solve ``p`` under one budget; see :func:`allocate`, whose plan is ``run(...).chosen.plan``."""
    if sum(given is not None for given in (group_bits or None, budget, budget_bytes)) != 1:
        raise MixDQError("give one budget: mean bits of each group, or of all layers, or bytes")
    if group_bits and one_scale:
        raise MixDQError("a joint program has one budget for all layers; give mean bits of all layers, or bytes")
    if group_bits:
        points = [by_group(p, group_bits)]
        return Result(points, points[0])
    if budget_bytes is not None:
        budget = mean_bits_of_bytes(budget_bytes, p.sizes, size_unit)
    points = [joint(p, budget)] if one_scale else sweep(p, budget, progress=progress)
    return Result(points, points[0] if len(points) == 1 else least_noise(points))


def allocate(
    content_scores: Mapping[str, Mapping[int, float]] | None,
    quality_scores: Mapping[str, Mapping[int, float]],
    sizes: Mapping[str, float],
    *,
    content_bits: float | None = None,
    quality_bits: float | None = None,
    budget: float | None = None,
    budget_bytes: float | None = None,
    size_unit: float | None = None,
    one_scale: bool = False,
    progress: bool | None = None,
    **options,
) -> BitPlan:
    """A bit plan from sensitivity scores under a budget.

    Give one budget: the upper edges of both groups' mean bits (``content_bits`` and ``quality_bits``; the latter alone
    where there are no content layers); ``budget``, the mean bits of all layers; or ``budget_bytes``, what all codes may
    take, scales and biases not counted, with ``size_unit`` weights for a size of 1. The last two take the plan of the
    sweep with the least noise on the common scale, or with ``one_scale`` the joint program. Tables and ``options``:
    see :func:`problem`. Raises ``PlanError`` for budgets that no plan meets.
    """
    group_bits = {CONTENT: content_bits, QUALITY: quality_bits}
    return run(
        problem(content_scores, quality_scores, sizes, **options),
        group_bits={name: bits for name, bits in group_bits.items() if bits is not None},
        budget=budget,
        budget_bytes=budget_bytes,
        size_unit=size_unit,
        one_scale=one_scale,
        progress=progress,
    ).chosen.plan


HEADER = (
    "",
    "ratio",
    "mean bits",
    "content bits",
    "quality bits",
    "content SSIM",
    "quality SQNR dB",
    "noise",
    "widths",
)


def cells(a: Allocation, chosen: bool = False) -> tuple[str, ...]:
    """An allocation as text, in the order of ``HEADER``; scores are means over layers."""

    def each(values: Mapping[str, float], digits: int) -> list[str]:
        return [f"{values[n]:.{digits}f}" if n in values else "-" for n in (CONTENT, QUALITY)]

    means = {name: score / a.group_layers[name] for name, score in a.group_scores.items()}
    widths = ", ".join(f"{sum(v == b for v in a.plan.values())} x {b}" for b in sorted(set(a.plan.values())))
    return (
        "*" if chosen else "",
        "-" if a.ratio is None else f"{a.ratio:g}",
        f"{a.mean_bits:.4f}",
        *each(a.group_bits, 4),
        each(means, 5)[0],
        each(means, 2)[1],
        "-" if a.noise is None else f"{a.noise:.3g}",
        widths,
    )


def as_json(result: Result) -> dict:
    """What was found, for programs: the chosen plan, and the figures of all allocations."""

    def figures(a: Allocation) -> dict:
        return {k: getattr(a, k) for k in ("ratio", "mean_bits", "group_bits", "group_scores", "noise")}

    return {
        "chosen": figures(result.chosen),
        "bits": dict(result.chosen.plan),
        "points": [figures(a) for a in result.points],
    }


def plot_front(points: Sequence[Allocation], path, chosen: Allocation | None = None) -> None:
    """Draws allocations as a PNG: both groups' mean scores against each other, or the score against mean bits.

    The Pareto front is a line, ``chosen`` a ring; colours are mean bits, labels the ratio k.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.8), layout="constrained")
    axes = figure.subplots()
    names = list(points[0].group_scores)
    axes.set(xlabel="summed SQNR of quality layers, dB", ylabel="summed SSIM of content layers")

    def position(a: Allocation) -> tuple[float, float]:
        if len(names) == 1:
            return a.mean_bits, a.group_scores[names[0]]
        return a.group_scores[QUALITY], a.group_scores[CONTENT]

    if len(names) == 1:
        axes.set(xlabel="mean bits", ylabel=f"summed score of {names[0]} layers")
    bits = [a.mean_bits for a in points]
    dots = axes.scatter(*zip(*map(position, points), strict=True), c=bits, zorder=2)
    if max(bits) - min(bits) > 0.1:  # one budget needs no scale of colours
        figure.colorbar(dots, label="mean bits")
    line = sorted(map(position, front(points)))
    axes.plot(*zip(*line, strict=True), color="0.6", linewidth=1, zorder=1, label="Pareto front")
    for a in points:
        if a.ratio is not None:
            axes.annotate(f"{a.ratio:g}", position(a), xytext=(4, 4), textcoords="offset points", fontsize=7)
    if chosen is not None:
        x, y = position(chosen)
        axes.scatter([x], [y], s=120, facecolors="none", edgecolors="tab:red", label="chosen", zorder=3)
    axes.legend(frameon=False)
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=150)
