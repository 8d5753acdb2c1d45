"""Families of matrices whose norm is hard to bound: draws (rows, cols) -> float64."""

from __future__ import annotations

import torch
from torch import nn

F64 = torch.float64


def hilbert(m, n):
    i, j = torch.arange(m, dtype=F64)[:, None], torch.arange(n, dtype=F64)
    return 1 / (i + j + 1)


def orthogonal(m, n):
    return nn.init.orthogonal_(torch.empty(m, n, dtype=F64))


def with_values(m, n, values):
    k = min(m, n)
    left, right = orthogonal(m, k), orthogonal(n, k)
    return (left * values) @ right.T


def graded_rows(m, n):
    return torch.randn(m, n, dtype=F64) * 10.0 ** torch.empty(m, 1, dtype=F64).uniform_(-150, 150)


PATHOLOGICAL = {
    "gaussian": lambda m, n: torch.randn(m, n, dtype=F64),
    "integers": lambda m, n: torch.randint(-3, 4, (m, n)).double(),
    "float32": lambda m, n: torch.randn(m, n).double(),
    "orthogonal": orthogonal,
    "orthogonal_float32": lambda m, n: orthogonal(m, n).float().double(),
    "graded": lambda m, n: with_values(m, n, torch.logspace(0, -15, min(m, n), dtype=F64)),
    "graded_rows": graded_rows,
    "hilbert": hilbert,
    "rank_one": lambda m, n: torch.randn(m, 1, dtype=F64) @ torch.randn(1, n, dtype=F64),
    "rank_one_noise": lambda m, n: (
        torch.ones(m, n, dtype=F64) + 10.0 ** -torch.randint(1, 17, ()) * torch.randn(m, n)
    ),
    "near_ties": lambda m, n: with_values(
        m, n, 1 - 10.0 ** -torch.randint(2, 17, ()) * torch.arange(min(m, n), dtype=F64)
    ),
    "one_outlier": lambda m, n: with_values(
        m, n, torch.tensor([1.0] + [1e-8] * (min(m, n) - 1), dtype=F64)
    ),
    "constant": lambda m, n: torch.full((m, n), float(torch.rand(())) + 0.1, dtype=F64),
    "sparse": lambda m, n: torch.randn(m, n, dtype=F64) * (torch.rand(m, n) < 0.3),
    "one_entry": lambda m, n: (
        nn.functional.one_hot(torch.tensor(m * n // 2), m * n).double().reshape(m, n)
    ),
    "denormal": lambda m, n: torch.randn(m, n, dtype=F64) * 2e-320,
    "smallest": lambda m, n: torch.randint(0, 2, (m, n)) * 5e-324,
    "float32_denormal": lambda m, n: (torch.randn(m, n) * 3e-45).double(),
    "1e37": lambda m, n: (torch.randn(m, n) * 1e37).double(),
    "1e300": lambda m, n: torch.randn(m, n, dtype=F64) * 1e300,
    "almost_overflow": lambda m, n: torch.rand(m, n, dtype=F64) * 1.7e308,
    "1e-160": lambda m, n: torch.randn(m, n, dtype=F64) * 1e-160,
    "huge_and_tiny": lambda m, n: 10.0 ** (400.0 * torch.randint(0, 2, (m, n)).double() - 200),
    "triangular": lambda m, n: torch.ones(m, n, dtype=F64).tril(),
    "kahan": lambda m, n: 0.6 ** torch.arange(m, dtype=F64)[:, None] * torch.ones(m, n).triu(),
    "zero": lambda m, n: torch.zeros(m, n, dtype=F64),
}
