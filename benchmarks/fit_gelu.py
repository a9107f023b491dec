"""The polynomial of ``gelu`` in csrc/geglu.cuh: its coefficients, and the errors of both forms in float32.

log2 Phi(-t) as a polynomial p in t whose greatest error of t 2^p(t) in [0, 6] is least, by weighted least squares whose
weights grow where the error is large (Lawson's algorithm). Needs numpy and scipy: ``python benchmarks/fit_gelu.py``.
"""

import numpy as np
from numpy.polynomial import Chebyshev, Polynomial
from numpy.polynomial.chebyshev import chebvander
from scipy.special import erf, log_ndtr, ndtr

DEGREE, END, LIMIT = 5, 6.0, 13.0


def fit(points: int = 6000, rounds: int = 3000) -> tuple[np.ndarray, float]:
    """Coefficients, the lowest first, and the greatest error of t 2^p(t)."""
    s = np.cos(np.pi * (np.arange(points) + 0.5) / points)
    t = (s + 1) / 2 * END
    exact, slope = log_ndtr(-t) / np.log(2), np.maximum(t * ndtr(-t) * np.log(2), 1e-8)
    basis, weights = chebvander(s, DEGREE), np.full(points, 1 / points)
    for _ in range(rounds):
        scaled = np.sqrt(weights) * slope
        coefficients, *_ = np.linalg.lstsq(basis * scaled[:, None], exact * scaled, rcond=None)
        error = np.abs(basis @ coefficients - exact) * slope
        weights = weights * (error + 1e-30)
        weights /= weights.sum()
    return Chebyshev(coefficients, domain=[0, END]).convert(kind=Polynomial).coef, error.max()


def gelu(g: np.ndarray, coefficients: np.ndarray) -> np.ndarray:
    """What the kernel computes, rounded to float32 wherever it rounds."""
    t = np.minimum(np.abs(g), np.float32(LIMIT))
    log2 = np.full_like(t, coefficients[-1])
    for c in coefficients[-2::-1]:
        log2 = (log2.astype(np.float64) * t + np.float64(np.float32(c))).astype(np.float32)
    tail = np.exp2(log2.astype(np.float64)).astype(np.float32)
    return (np.maximum(g, 0).astype(np.float64) - t.astype(np.float64) * tail).astype(np.float32)


def main() -> None:
    coefficients, error = fit()
    print("coefficients, the lowest first:", ", ".join(f"{c:.8e}" for c in coefficients))
    print(f"greatest error of t 2^p(t) up to {END:g}: {error:.2e}")
    g = np.linspace(-LIMIT, LIMIT, 2_400_001).astype(np.float32)
    exact = g.astype(np.float64) * ndtr(g.astype(np.float64))
    half, root = np.float32(0.5), np.float32(0.70710678118654752)
    usual = half * g * (1 + erf(g * root).astype(np.float32))
    for name, values in (("polynomial", gelu(g, coefficients)), ("erf", usual)):
        print(f"{name} in float32, up to {LIMIT:g}: within {np.abs(values - exact).max():.1e} of gelu")


if __name__ == "__main__":
    main()
