"""Weights whose certificate proves their promise: scaled until the bound itself is at most k.

A stored weight of norm k (1 - 1e-8) keeps its promise, and a certificate that is 3e-7 loose says
1.0000003 k all the same. Here the weight is scaled down, rounded to its format, and bounded again,
until the bound is at most k: what one can then prove from the file alone, in one comparison.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lipkernels.certify.matrix import spectral_norm_bound

_BISECTIONS = 8


def largest_norm(k: float, factor: float) -> float:
    """The largest norm of a matrix for which norm * factor * (1 + 2^-52), rounded, is at most k.

    Raises ValueError unless k >= 0 and factor > 0.

    >>> largest_norm(1.0, 2.0) <= 0.5
    True
    """
    if not (k >= 0 and factor > 0):
        raise ValueError(f"largest_norm: expected k >= 0 and factor > 0, got {k} and {factor}")
    norm = k / factor
    while norm * factor * (1 + 2.0**-52) > k:
        norm = math.nextafter(norm, 0.0)
    return norm


def shrunk(matrix: Tensor, limit: float) -> Tensor:
    """``matrix`` (rows, cols) scaled down, as little as was found to do, to a bound <= ``limit``.

    A copy in the dtype of ``matrix``, rounded to nearest; the same entries where the bound holds
    already. Raises ValueError for NaN or infinite entries, TypeError for anything but a tensor.

    >>> weight = shrunk(torch.eye(2), 1 - 2.0**-30)
    >>> 1 - 1e-6 < spectral_norm_bound(weight) <= 1 - 2.0**-30
    True
    """
    if not limit >= 0:
        raise ValueError(f"limit: expected a number >= 0, got {limit}")
    bound = spectral_norm_bound(matrix)
    matrix = matrix.detach()
    if not math.isfinite(bound):
        raise ValueError("matrix: expected finite entries and a finite norm, got NaN or infinity")
    if bound <= limit:
        return matrix.clone()
    wide = matrix.double()

    def scaled(factor: float) -> Tensor:
        return (wide * factor).to(matrix.dtype)

    # Rounding may undo a small step: take larger ones until the bound holds (at 0, at the latest).
    step = torch.finfo(matrix.dtype).eps / 16
    too_large, good = 1.0, limit / bound
    best = scaled(good)
    while spectral_norm_bound(best) > limit:
        too_large, good = good, max(0.0, limit / bound * (1 - step))
        best = scaled(good)
        step *= 2
    for _ in range(_BISECTIONS):
        middle = (good + too_large) / 2
        candidate = scaled(middle)
        if spectral_norm_bound(candidate) <= limit:
            good, best = middle, candidate
        else:
            too_large = middle
    return best
