"""What kernels for GPUs are given to compute, and how the results are compared."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import tolerances
import torch
from torch import Tensor

from lipkernels import functional as F

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(x: Tensor) -> Tensor:
    """The bytes as integers: NaN and both zeros as what they are. Complex numbers stay."""
    return x if x.is_complex() else x.view(_BITS[x.itemsize])


def any_bytes(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Random bytes, NaN of every kind among them."""
    if dtype.is_complex:
        return torch.randn(shape, dtype=dtype)
    x = torch.randint(0, 256, (*shape, dtype.itemsize), dtype=torch.uint8)
    return x.view(dtype).squeeze(-1) if dtype != torch.bool else x[..., 0] > 127


def ties(shape: Sequence[int], dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Few different values, so that most groups have ties; NaN of both signs, both zeros."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(-3, 4, shape, generator=generator)
    if dtype in (torch.bool, torch.uint8):
        return x.abs().to(dtype)
    x = x.to(dtype)
    if dtype.is_floating_point:
        where = torch.randint(0, 12, shape, generator=generator)
        for i, special in enumerate((-0.0, math.nan, -math.nan, math.inf, -math.inf, 1e-7)):
            x[where == i] = special
    return x


def assert_moved(
    op: Callable[..., Tensor], x: Tensor, block: int | tuple[int, int], backend: str, **others: Any
) -> None:
    """``op``, space to depth or back, moves the bytes of ``x`` as the reference does."""
    got = op(x, block, backend=backend, **others)
    expected = op(bits(x), block, backend="reference", **others)
    assert got.dtype == x.dtype and got.is_contiguous()
    assert torch.equal(bits(got), expected)


def assert_power_iteration(
    got: Sequence[Sequence[Tensor]], weights: Sequence[Tensor], us: Sequence[Tensor], n_iter: int
) -> None:
    """sigma, u and v of each weight are those of the reference in float64."""
    limit = tolerances.POWER_ITERATION[torch.float32]
    wide = [w.double() for w in weights]
    expected = F.power_iteration(wide, us, n_iter=n_iter, backend="reference")
    for parts, references in zip(got, expected, strict=True):
        for part, reference in zip(parts, references, strict=True):
            assert part.dtype == torch.float32 and part.shape == reference.shape
            torch.testing.assert_close(
                part.double(), reference, rtol=limit, atol=limit * float(reference.abs().max())
            )
