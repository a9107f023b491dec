"""The 0/1 program behind :mod:`mixdq_ao.allocate`: widths of the layers that one metric judges, under a budget."""

import ctypes
import math
import os
import sys
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from mixdq_ao.errors import PlanError
from mixdq_ao.tables import Scores, Sizes

# HiGHS holds a row to 1e-6 and stops 1e-6 from the best objective, in the units of the program. Rows are given in
# shares of a bit times this, so that a budget is held to 1e-9 bits; scores as shares of the largest difference that
# the width of one layer makes.
_ROW_SCALE = 1e3
EDGE_SLACK = 1e-9  # bits; admits a plan whose own mean, computed in another order, is the edge


@dataclass(frozen=True)
class Group:
    """Layers that one metric judges: ``scores`` (layer -> candidate bits -> score, higher is safer) and ``sizes``."""

    name: str
    scores: Scores
    sizes: Sizes

    @property
    def size(self) -> float:
        return sum(self.sizes.values())

    def mean_bits(self, plan: Mapping[str, int]) -> float:
        """Mean width of the group's layers, weighted by size."""
        return sum(plan[name] * size for name, size in self.sizes.items()) / self.size

    def score(self, plan: Mapping[str, int]) -> float:
        """Summed score of the group's layers."""
        return sum(by_bits[plan[name]] for name, by_bits in self.scores.items())

    def edge_means(self) -> tuple[float, float]:
        """The lowest and the highest mean that any plan has."""
        low, high = ({name: pick(by_bits) for name, by_bits in self.scores.items()} for pick in (min, max))
        return self.mean_bits(low), self.mean_bits(high)


def solve(group: Group, upper: float, lower: float | None = None, time_limit: float = 60.0) -> dict[str, int]:
    """The widths of a group's layers with the highest summed score and mean bits within ``lower`` .. ``upper``.

    An ``upper`` above the highest mean asks for no more than it. Raises ``PlanError`` where no plan fits, saying the
    lowest and highest mean there is, for edges that are not finite, and where HiGHS does not prove the optimum within
    ``time_limit`` seconds.
    """
    for edge in (upper, lower):
        check_mean_bits(edge, f"{group.name} group")
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    low, high = group.edge_means()
    if not upper + EDGE_SLACK >= low or (lower is not None and not lower - EDGE_SLACK <= high):
        raise _infeasible(group, upper, lower)
    # One variable for each layer and width, layer after layer.
    owner = np.repeat(np.arange(len(group.scores)), [len(by_bits) for by_bits in group.scores.values()])
    bits = np.array([b for by_bits in group.scores.values() for b in by_bits])
    loss = np.array([max(s.values()) - score for s in group.scores.values() for score in s.values()], dtype=float)
    loss /= loss.max() or 1.0
    sizes = np.array([group.sizes[name] for name in group.scores])
    share = sizes[owner] / sizes.sum() * _ROW_SCALE
    variables = np.arange(len(owner))
    constraints = [
        LinearConstraint(csr_array((np.ones(len(owner)), (owner, variables))), 1, 1),
        LinearConstraint(((bits - upper) * share)[None], -np.inf, EDGE_SLACK * _ROW_SCALE),
    ]
    if lower is not None:
        constraints.append(LinearConstraint(((bits - lower) * share)[None], -EDGE_SLACK * _ROW_SCALE, np.inf))
    if pairs := _ordered_pairs(group, loss):
        rows = np.repeat(np.arange(len(pairs)), 2)
        signs = np.tile([1.0, -1.0], len(pairs))
        order = csr_array((signs, (rows, np.ravel(pairs))), shape=(len(pairs), len(owner)))
        constraints.append(LinearConstraint(order, 0, np.inf))
    with _quiet_solver():
        result = milp(
            loss,
            constraints=constraints,
            integrality=np.ones(len(owner)),
            bounds=Bounds(0, 1),
            options={"mip_rel_gap": 0.0, "time_limit": time_limit},
        )
    if result.status == 2:
        raise _infeasible(group, upper, lower)
    if result.status != 0:
        raise PlanError(
            f"{group.name} group: HiGHS did not prove an optimum for at most {upper:g} mean bits within "
            f"{time_limit:g} s ({result.message}). Raise time_limit"
        )
    chosen = np.flatnonzero(result.x > 0.5)
    return dict(zip(group.scores, bits[chosen].tolist(), strict=True))


def check_mean_bits(value: float | None, what: str) -> None:
    """Raises ``PlanError`` for a budget that is infinite or NaN: one that bounds nothing is a mistake."""
    if value is not None and not math.isfinite(value):
        raise PlanError(f"{what}: mean bits must be a finite number; found {value}. Give a number like 4.5")


@contextmanager
def _quiet_solver():
    """Drops what HiGHS writes to stdout: a debugging line here and there, whatever its options say (SciPy 1.17)."""
    libc = ctypes.CDLL(None)
    sys.stdout.flush()
    stdout, null = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    try:
        yield
    finally:
        libc.fflush(None)
        os.dup2(stdout, 1)
        os.close(stdout)
        os.close(null)


def _ordered_pairs(group: Group, loss: np.ndarray) -> list[tuple[int, int]]:
    """Pairs of variables of which the second is taken only if the first is, in some optimum.

    Of layers of one size and two widths, those that gain most from the wider one have it: exchanging two changes no
    budget. Saying so makes the hard programs, which have many layers of few sizes, a hundred times faster to prove.
    """
    classes: dict[tuple, list[tuple[float, int]]] = {}
    first = 0
    for name, by_bits in group.scores.items():
        if len(by_bits) == 2:
            wide = first + list(by_bits).index(max(by_bits))
            narrow = 2 * first + 1 - wide
            key = (group.sizes[name], tuple(sorted(by_bits)))
            classes.setdefault(key, []).append((loss[wide] - loss[narrow], wide))
        first += len(by_bits)
    ordered = [[wide for _, wide in sorted(members)] for members in classes.values()]
    return [pair for members in ordered for pair in zip(members, members[1:], strict=False)]


def _infeasible(group: Group, upper: float, lower: float | None) -> PlanError:
    low, high = group.edge_means()
    advice = _advice(low, high, upper, lower)
    asked = f"at most {upper:g}" + ("" if lower is None else f" and at least {lower:g}")
    return PlanError(
        f"{group.name} group ({len(group.scores)} layers): no plan has {asked} mean bits; with the widths that are "
        f"offered and scored the lowest mean is {low:.4f} and the highest {high:.4f}. {advice}"
    )


def _advice(low: float, high: float, upper: float, lower: float | None) -> str:
    if upper < low:
        return "Give the group more bits, or offer narrower widths"
    if lower is not None and lower > high:
        return "Ask the group for fewer bits, or offer wider widths"
    return "Put the edges further apart"
