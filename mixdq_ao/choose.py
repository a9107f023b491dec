"""Choose among candidate plans by what their pictures look like.

The tables that ``allocate`` works on measure one layer at a time; which ratio between the groups' budgets is best shows
only when all layers are quantized together. So every candidate draws the same captions at the same seeds as the
floating model, and :func:`choose` applies one rule to the figures.
"""

import math
import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mixdq_ao.checkpoint import QuantParams
from mixdq_ao.config import MixDQConfig
from mixdq_ao.errors import MixDQError
from mixdq_ao.evaluate import LOWER_IS_BETTER, Evaluation, Row, evaluate
from mixdq_ao.plan import BitPlan


@dataclass(frozen=True)
class Choice:
    """The name and plan of the winner, why it won, those that tied with the best, and all figures."""

    name: str
    plan: BitPlan
    reason: str
    tied: list[str]
    evaluation: Evaluation


def choose(
    pipe,
    params: QuantParams,
    candidates: Mapping[str, BitPlan],
    captions: Sequence[str],
    *,
    act_bits: int | None | Mapping[str, int | None] | str | os.PathLike = 8,
    metric: str = "ssim",
    seeds: Sequence[int] = (0,),
    **options,
) -> Choice:
    """Evaluate weight plans with one plan of activations, and pick one.

    The rule: the best candidate has the best mean of ``metric`` over captions and seeds. Candidates tie with it whose
    difference, paired by seed, is within one standard error of the mean; with one seed, only equal ones. Among those
    that tie the one with the fewest mean weight bits wins, then the better mean.

    ``metric`` is one of ``evaluate``'s, or an extra that ``options`` asks for; ``options`` go to ``evaluate``
    (``out=folder`` makes it resumable). Raises ``MixDQError`` without candidates and for a metric that is not measured.
    """
    if not candidates:
        raise MixDQError("choose() needs at least one candidate plan; found none")
    variants = {name: MixDQConfig(params, dict(plan), act_bits) for name, plan in candidates.items()}
    evaluation = evaluate(pipe, variants, captions, seeds=seeds, **options)
    if metric not in evaluation.metrics:
        raise MixDQError(f"metric must be one of {', '.join(evaluation.metrics)}; found {metric!r}")
    rows = [evaluation.row(name) for name in candidates]
    name, tied, reason = pick(rows, metric)
    return Choice(name, candidates[name], reason, tied, evaluation)


def pick(rows: Sequence[Row], metric: str) -> tuple[str, list[str], str]:
    """The rule of :func:`choose`, on rows of an evaluation: the winner's name, the names that tie, and a sentence."""
    sign = -1.0 if metric in LOWER_IS_BETTER else 1.0
    best = max(rows, key=lambda row: sign * row.mean(metric))
    tied = [row for row in rows if row is best or _ties(row.values[metric], best.values[metric])]
    winner = min(tied, key=lambda row: (row.weight_bits, -sign * row.mean(metric)))
    value = f"mean {metric} {winner.mean(metric):.4f}"
    if winner is best:
        reason = f"{winner.name} has the best {value} of {len(rows)} candidates"
    else:
        reason = (
            f"{winner.name} has fewer bits than {best.name} ({winner.weight_bits:.3f} against {best.weight_bits:.3f}) "
            f"at a {value} that is within one standard error of its {best.mean(metric):.4f}"
        )
    return winner.name, [row.name for row in tied], reason


def _ties(values: Sequence[float], best: Sequence[float]) -> bool:
    """Whether the paired difference is within one standard error of zero."""
    differences = [0.0 if a == b else b - a for a, b in zip(values, best, strict=True)]  # inf - inf is no number
    if not all(map(math.isfinite, differences)):
        return False
    error = statistics.stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else 0.0
    return abs(statistics.fmean(differences)) <= error
