"""Weights gone bad: what a constraint has to survive, by name."""

from __future__ import annotations

import torch
from torch import Tensor


def _randn(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _rank(shape: tuple[int, int], r: int) -> Tensor:
    rows, cols = shape
    return _randn((rows, r), 1) @ _randn((r, cols), 2)


def _spike(shape: tuple[int, int], size: float) -> Tensor:
    w = torch.zeros(shape, dtype=torch.float64)
    w[0, -1] = size
    return w


def _graded(shape: tuple[int, int]) -> Tensor:
    rows, cols = shape
    m = min(shape)
    left = torch.linalg.qr(_randn((rows, m), 3))[0]
    right = torch.linalg.qr(_randn((cols, m), 4))[0]
    return left * torch.logspace(0, -9, m, dtype=torch.float64) @ right.mT


def _near_ties(shape: tuple[int, int]) -> Tensor:
    rows, cols = shape
    m = min(shape)
    left = torch.linalg.qr(_randn((rows, m), 5))[0]
    right = torch.linalg.qr(_randn((cols, m), 6))[0]
    return left * (1 - 1e-7 * torch.arange(m, dtype=torch.float64)) @ right.mT


BAD_WEIGHTS = {
    "gaussian": _randn,
    "large gaussian": lambda s: _randn(s, 7) * 300,
    "zero": lambda s: torch.zeros(s, dtype=torch.float64),
    "constant": lambda s: torch.full(s, 0.1, dtype=torch.float64),
    "duplicate rows": lambda s: _randn((1, s[1]), 8).repeat(s[0], 1),
    "rank deficient": lambda s: _rank(s, max(1, min(s) - 1)),
    "1e-38": lambda s: _randn(s, 9) * 1e-38,
    "1e30": lambda s: _randn(s, 10) * 1e30,
    "spike": lambda s: _spike(s, 3.0),
    "rank one": lambda s: _rank(s, 1),
    "rank one plus noise": lambda s: _rank(s, 1) + 1e-6 * _randn(s, 11),
    "rank one plus less noise": lambda s: _rank(s, 1) + 1e-9 * _randn(s, 12),
    "spike on noise": lambda s: _spike(s, 1e4) + _randn(s, 13),
    "graded": _graded,
    "near ties": _near_ties,
    "zero row": lambda s: _randn(s, 14) * (torch.arange(s[0])[:, None] > 0),
    "denormal": lambda s: _randn(s, 15) * 3e-45,
}


def bad_weight(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """The weight of that name in ``dtype``, which it is clamped into (1e30 becomes 65504)."""
    matrix = BAD_WEIGHTS[name]((shape[0], int(torch.tensor(shape[1:]).prod())))
    limit = torch.finfo(dtype).max
    return matrix.clamp(-limit, limit).to(dtype).reshape(shape)
