"""Ranges of a layer's input: what is kept while watching it, and how the ends of a quantizer's range follow from that.

Four rules. ``minmax``: the lowest and the highest value seen. ``ema``: moving averages of each call's lowest and
highest value (momentum 0.95, one state for all widths), as in the original. ``percentile``: the ends that leave out an
equal, small share of values on either side. ``mse``: for each width, the ends whose quantizer has the least squared
error over the values seen. The last two work on a histogram.
"""

import math

import torch
from torch import Tensor

from mixdq_ao.bits import act_width
from mixdq_ao.errors import MixDQError

METHODS = ("minmax", "ema", "percentile", "mse")
EMA_MOMENTUM = 0.95
OUTSIDE = 1e-4  # percentile: the share of values left out, both sides together
BINS = 4096
_SMALLEST = 2.0**-24  # half width of the histogram of an input that is all zeros
# Of an end of the range: what the search for the least error tries.
_COARSE = 0.8 ** torch.arange(15, dtype=torch.float64)
_FINE = 0.8 ** torch.linspace(-0.75, 0.75, 7, dtype=torch.float64)


class InputRange:
    """The range of one input group, over all calls.

    ``low``, ``high``: lowest and highest value; ``ema_low``, ``ema_high``: their moving averages over calls;
    ``counts``: int64 ``[BINS]``, a histogram over ``[-limit, limit)``, kept if ``histogram``. ``limit`` is a power of
    two that doubles when a value lies outside, which merges pairs of bins exactly: the outcome does not depend on the
    order of the calls.
    """

    FIELDS = ("low", "high", "ema_low", "ema_high", "limit")

    def __init__(self, histogram: bool):
        self.low, self.high = math.inf, -math.inf
        self.ema_low = self.ema_high = 0.0
        self.limit = 0.0
        self.counts = torch.zeros(BINS, dtype=torch.int64) if histogram else None

    @property
    def seen(self) -> bool:
        return self.low <= self.high

    def note(self, x: Tensor) -> None:
        """Take in the values of one call. Raises ``MixDQError`` for infinity and NaN."""
        low, high = torch.stack(torch.aminmax(x)).tolist()
        if not (math.isfinite(low) and math.isfinite(high)):
            raise MixDQError(f"the input must be finite while calibrating; found values from {low} to {high}")
        if self.seen:
            self.ema_low += (1 - EMA_MOMENTUM) * (low - self.ema_low)
            self.ema_high += (1 - EMA_MOMENTUM) * (high - self.ema_high)
        else:
            self.ema_low, self.ema_high = low, high
        self.low, self.high = min(self.low, low), max(self.high, high)
        if self.counts is not None:
            self._count(x, max(-low, high))

    def _count(self, x: Tensor, peak: float) -> None:
        wanted = max(2.0 ** (math.frexp(peak)[1]), _SMALLEST)  # frexp: peak = m * 2^e with m < 1, so peak < 2^e
        if self.limit == 0.0:
            self.limit = wanted
        while self.limit < wanted:
            merged = self.counts.view(-1, 2).sum(1)
            self.counts = torch.zeros_like(self.counts)
            self.counts[BINS // 4 : -BINS // 4] = merged
            self.limit *= 2
        # Exact: dividing by a power of two rounds nothing (but numbers near 1e-45, to zero), and every value lies below
        # the limit. Not in half precision, whose range may lack the quotient.
        x = x if x.dtype == torch.float64 else x.float()
        bins = torch.floor(x.flatten() / (2 * self.limit / BINS)).int() + BINS // 2
        self.counts += torch.bincount(bins, minlength=BINS).cpu()

    def ends(self, method: str, bits: int) -> tuple[float, float]:
        """Lowest and highest value of the quantizer's range by a rule of ``METHODS``."""
        if method == "minmax":
            return self.low, self.high
        if method == "ema":
            return self.ema_low, self.ema_high
        if method == "percentile":
            return self._percentile()
        return self._least_squares(bits)

    def _percentile(self) -> tuple[float, float]:
        aside = OUTSIDE / 2 * float(self.counts.sum())
        below, above = self.counts.cumsum(0), self.counts.flip(0).cumsum(0)
        step = 2 * self.limit / BINS
        first, last = int((below > aside).int().argmax()), int((above > aside).int().argmax())
        return max(self.low, -self.limit + first * step), min(self.high, self.limit - last * step)

    def _least_squares(self, bits: int) -> tuple[float, float]:
        """The pair of ends with the least squared error: on a coarse grid, and on a finer one around its best."""
        filled = self.counts.nonzero().flatten()
        values = -self.limit + (filled.double() + 0.5) * (2 * self.limit / BINS)
        counts = self.counts[filled].double()
        best = torch.tensor([min(self.low, 0.0), max(self.high, 0.0)], dtype=torch.float64)
        for fractions in (_COARSE, _FINE):
            ends = torch.cartesian_prod(*(best[:, None] * fractions))
            best = ends[int(_squared_errors(values, counts, ends, bits).argmin())]
        return max(float(best[0]), self.low), min(float(best[1]), self.high)


def _squared_errors(values: Tensor, counts: Tensor, ends: Tensor, bits: int) -> Tensor:
    """For each row (low, high) of ``ends`` the summed squared error of ``values`` weighted by ``counts``."""
    scale, zero_point = _affine(ends, bits)
    w = act_width(bits)
    codes = torch.round(values / scale[:, None] + zero_point[:, None]).clamp_(w.qmin, w.qmax)
    return codes.sub_(zero_point[:, None]).mul_(scale[:, None]).sub_(values).square_() @ counts


def _affine(ends: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """``scale = (high - low) / (2^bits - 1)`` and ``zero_point = rint(-low / scale) - 2^(bits-1)`` of rows (low, high).

    The range is widened to include 0, so that zeros (padding among them) are exact; an empty one has scale 1.
    """
    w = act_width(bits)
    low, high = ends[:, 0].clamp(max=0), ends[:, 1].clamp(min=0)
    span = (high - low) / (w.qmax - w.qmin)
    # As it will be stored: a scale that float32 flushes to zero would be none.
    scale = torch.where(span > torch.finfo(torch.float32).tiny, span, 1.0)
    return scale, (torch.round(-low / scale) + w.qmin).clamp(w.qmin, w.qmax)


def scale_and_zero_point(ends: list[tuple[float, float]], bits: int) -> tuple[Tensor, Tensor]:
    """``scale`` and signed ``zero_point``, float32 ``[groups]``, of the (low, high) of each input group."""
    scale, zero_point = _affine(torch.tensor(ends, dtype=torch.float64), bits)
    return scale.float(), zero_point.float()
