"""Exact power-of-two scaling of a matrix to unit magnitude.

Gram matrices square the entries of W: at 1e30 they overflow float32, at 1e-30 they vanish. Every
constraint of this library is invariant to a positive scale, so W is first divided by a power of
two (exact), and the gradient is divided by the same number afterwards.
"""

from __future__ import annotations

import torch
from torch import Tensor


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for everything narrower."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def for_products(x: Tensor) -> Tensor:
    """``x``, in float64 if float32 products are allowed to round to TF32 or bfloat16 (a global
    switch of torch, :func:`torch.set_float32_matmul_precision`): bounds would not survive that."""
    settings = {
        "cuda": torch.backends.cuda.matmul,
        "cpu": torch.backends.mkldnn.matmul,  # pyright: ignore[reportAttributeAccessIssue]
    }
    setting = settings.get(x.device.type)
    reduced = setting is not None and setting.fp32_precision not in ("ieee", "none")
    return x.double() if reduced and x.dtype == torch.float32 else x


def to_unit_magnitude(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """``(X, s)`` with ``matrix = s X``, s a power of two (..., 1, 1), and max |X| in [1, 2).

    A zero, infinite or NaN matrix keeps s = 1.
    """
    x = matrix.to(compute_dtype(matrix.dtype))
    largest = x.abs().amax(dim=(-2, -1), keepdim=True)
    usable = (largest > 0) & torch.isfinite(largest)
    exponent = torch.frexp(torch.where(usable, largest, 1.0)).exponent
    scale = torch.ldexp(torch.ones_like(largest), exponent - 1)
    return x / scale, scale


def unscale_gradient(grad: Tensor, scale: Tensor) -> Tensor:
    """``grad / scale``, saturated: the gradient at a weight of 1e-40 exceeds the float range."""
    limit = torch.finfo(grad.dtype).max
    return (grad / scale).clamp(-limit, limit)


def saturated(grad: Tensor, dtype: torch.dtype) -> Tensor:
    """``grad`` in ``dtype``; what exceeds its range becomes its largest number."""
    limit = torch.finfo(dtype).max
    if torch.finfo(grad.dtype).max > limit:
        grad = grad.clamp(-limit, limit)
    return grad.to(dtype)
