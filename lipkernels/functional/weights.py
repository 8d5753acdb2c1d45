"""Constraints on weights, as differentiable functions.

Each takes one matrix (..., rows, cols) or a list of them, of any shapes, and answers in kind: one
call for a list costs far less than a call for each. ``scale`` is the Lipschitz constant of the
result (one number, or one for each matrix), ``dtype`` the format it is rounded to; the bound holds
after the rounding. ``check=True`` raises on NaN or infinite weights, which otherwise give NaN.
The same values in another memory layout give the same result, bit by bit but for the polar factor.
``backend`` is None (the current default), "auto", "reference", "triton" or "cuda".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lipkernels import backends
from lipkernels import precision as _precision
from lipkernels.kernels import bjorck as _bjorck
from lipkernels.kernels import frobenius as _frobenius
from lipkernels.kernels import polar as _polar
from lipkernels.kernels import spectral as _spectral

Weights = Tensor | Sequence[Tensor]
Scales = float | Sequence[float]

_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_LARGEST = {kind: torch.finfo(kind).max for kind in _FLOATS}


def checked_weights(weight: Weights, check: bool) -> list[Tensor]:
    weights = [weight] if isinstance(weight, Tensor) else list(weight)
    for i, w in enumerate(weights):
        if not isinstance(w, Tensor):
            raise TypeError(f"weight {i}: expected a Tensor, got {type(w).__name__}")
        if w.dtype not in _FLOATS:
            raise TypeError(f"weight {i}: expected a floating-point dtype, got {w.dtype}")
        if w.dim() < 2:
            raise ValueError(
                f"weight {i}: expected a matrix (..., rows, cols), got shape {tuple(w.shape)}"
            )
        if check and w.device.type != "meta" and not bool(torch.isfinite(w).all()):
            n_bad = int((~torch.isfinite(w)).sum())
            raise ValueError(
                f"weight {i}: expected finite entries, got {n_bad} NaN or infinite of {w.numel()}"
            )
    if len(weights) > 1 and len({w.device for w in weights}) > 1:
        raise ValueError(
            f"weights: expected one device, got {sorted({str(w.device) for w in weights})}"
        )
    return weights


def checked_scales(scale: Scales, n: int, dtype: torch.dtype) -> list[float]:
    scales = list(scale) if isinstance(scale, Sequence) else [scale] * n
    if len(scales) != n:
        raise ValueError(f"scale: expected one number or {n} of them, got {len(scales)}")
    limit = _LARGEST[dtype]
    for s in scales:
        if isinstance(s, bool) or not isinstance(s, (int, float)):
            raise TypeError(f"scale: expected a number, or one for each weight, got {scale!r}")
        if not 0 < s < math.inf:
            raise ValueError(f"scale: expected a positive finite number, got {s}")
        if s > limit:
            raise ValueError(f"scale: expected at most {limit} (the largest {dtype}), got {s}")
    return [float(s) for s in scales]


def _checked_iteration(n_iter: int, tol: float) -> None:
    if not isinstance(n_iter, int) or n_iter < 0:
        raise ValueError(f"n_iter: expected an integer >= 0, got {n_iter!r}")
    if not tol >= 0:
        raise ValueError(f"tol: expected a number >= 0, got {tol!r}")


def _checked_vectors(u: Tensor | Sequence[Tensor] | None, weights: list[Tensor]) -> list[Tensor]:
    if u is None:
        return [initial_vector(w) for w in weights]
    us = [u] if isinstance(u, Tensor) else list(u)
    if len(us) != len(weights):
        raise ValueError(f"u: expected {len(weights)} vectors, got {len(us)}")
    for i, (vector, w) in enumerate(zip(us, weights, strict=True)):
        if vector.shape != w.shape[:-1]:
            raise ValueError(
                f"u {i}: expected shape {tuple(w.shape[:-1])}, got {tuple(vector.shape)}"
            )
    return us


def _wide_enough(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """For a result in float64, to whose digits a computation in float32 keeps no bound."""
    return weight.to(dtype) if dtype == torch.float64 else weight


def by_dtype(
    weights: list[Tensor],
    scale: Scales,
    dtype: torch.dtype | None,
    call: Callable[[list[int], list[float], torch.dtype], list[Tensor]],
) -> list[Tensor]:
    """One call of the op for each result dtype (one, unless a list mixes formats).

    ``call(members, scales, dtype)`` gets the indices of the weights that it is to constrain. A
    weight without elements is its own constrained weight.
    """
    if dtype is not None and dtype not in _FLOATS:
        raise TypeError(f"dtype: expected a floating-point dtype, got {dtype}")
    if len(weights) == 1 and weights[0].numel() > 0:  # less Python for a layer by itself
        kind = dtype or weights[0].dtype
        return call([0], checked_scales(scale, 1, kind), kind)
    wanted = [dtype or w.dtype for w in weights]
    results = [
        w.to(kind, copy=True) if w.numel() == 0 else w
        for w, kind in zip(weights, wanted, strict=True)
    ]
    # No weights have no scales either.
    for kind in dict.fromkeys(wanted or [torch.float64]):
        scales = checked_scales(scale, len(weights), kind)
        members = [i for i, w in enumerate(weights) if wanted[i] == kind and w.numel() > 0]
        if members:
            outs = call(members, [scales[i] for i in members], kind)
            for i, out in zip(members, outs, strict=True):
                results[i] = out
    return results


def one_or_list(weight: Weights, results: list[Tensor]) -> Any:
    return results[0] if isinstance(weight, Tensor) else results


def initial_vector(weight: Tensor) -> Tensor:
    """A deterministic start (..., rows) for power iteration, with no entry at zero.

    >>> initial_vector(torch.empty(3, 5)).shape
    torch.Size([3])
    """
    checked_weights(weight, False)
    rows = weight.shape[-2]
    kind = torch.promote_types(weight.dtype, torch.float32)
    # Irrational steps: no structured matrix is likely to have its top vector orthogonal to it.
    i = torch.arange(rows, dtype=torch.float64, device=weight.device)
    u = 1.0 + torch.frac(i * 0.6180339887498949)
    return (u / torch.linalg.vector_norm(u)).to(kind).expand(weight.shape[:-1]).clone()


def polar_factor(
    weight: Weights,
    scale: Scales = 1.0,
    *,
    dtype: torch.dtype | None = None,
    check: bool = False,
    backend: str | None = None,
    precision: str | None = None,
) -> Any:
    r"""The orthogonal matrix closest to each weight: ``scale * U`` with W = P U, P = (W W^T)^(1/2).

    For ``rows <= cols`` U has orthonormal rows, otherwise orthonormal columns. The gradient is the
    exact one of the polar factor (implicit, no loop is unrolled). Singular values below 3e-7 of the
    largest stay below one, zero ones zero; the norm never exceeds ``scale``.

    ``precision``: "high", "fast", or None for the current one (:mod:`lipkernels.precision`). Fast
    gives up accuracy of the matrix and of its gradient, never the bound, and on Triton alone.

    Shapes: (..., rows, cols) to the same. Raises TypeError / ValueError on anything but matrices of
    a floating-point dtype. Source: Higham, SIAM J. Sci. Stat. Comput. 7 (1986).

    >>> u = polar_factor(torch.randn(3, 5))
    >>> torch.allclose(u @ u.mT, torch.eye(3), atol=1e-5)
    True
    """
    weights = checked_weights(weight, check)
    wanted = _precision.resolve(precision)

    def call(members: list[int], scales: list[float], kind: torch.dtype) -> list[Tensor]:
        chosen = [_wide_enough(weights[i], kind) for i in members]
        name = backends.resolve("polar_factor", _polar.FORWARD, chosen[0].device, backend)
        return _polar.polar_factor(chosen, scales, kind, wanted, name)

    return one_or_list(weight, by_dtype(weights, scale, dtype, call))


def bjorck(
    weight: Weights,
    scale: Scales = 1.0,
    *,
    u: Tensor | Sequence[Tensor] | None = None,
    beta: float = 0.5,
    n_iter: int = 15,
    tol: float = 0.0,
    n_iter_spectral: int = 10,
    tol_spectral: float = 1e-3,
    dtype: torch.dtype | None = None,
    check: bool = False,
    backend: str | None = None,
) -> Any:
    r"""``(scale * X_n, u)``: a Bjorck iteration from X_0 = W / sigma_max(W), its gradient exact.

    X_{k+1} = (1 + beta) X_k - beta X_k X_k^T X_k, at most ``n_iter`` steps, fewer once
    |X_{k+1} - X_k|_F <= ``tol``. beta in (0, 1/2] keeps every singular value at most one. ``u``
    (..., rows) warm-starts the power iteration inside (see :func:`spectral_normalize`); the vector
    for the next call comes back. Few steps leave singular values below one: see
    :func:`polar_factor` for the limit. Source: Anil, Lucas and Grosse, arXiv 1811.05381.

    >>> x, _ = bjorck(torch.eye(3) * 4, n_iter=3)
    >>> torch.allclose(x, torch.eye(3), atol=1e-5)
    True
    """
    weights = checked_weights(weight, check)
    _checked_iteration(n_iter, tol)
    _checked_iteration(n_iter_spectral, tol_spectral)
    if not 0 < beta <= 0.5:
        raise ValueError(f"beta: expected a number in (0, 0.5], got {beta!r}")
    us = _checked_vectors(u, weights)
    limits = (n_iter_spectral, tol_spectral, beta, n_iter, tol)

    def call(members: list[int], scales: list[float], kind: torch.dtype) -> list[Tensor]:
        chosen, starts = [weights[i].contiguous() for i in members], [us[i] for i in members]
        name = backends.resolve("bjorck", _bjorck.FORWARD, chosen[0].device, backend)
        results, vectors, _ = _bjorck.bjorck(chosen, starts, scales, kind, *limits, name)
        for i, vector in zip(members, vectors, strict=True):
            us[i] = vector
        return results

    results = by_dtype(weights, scale, dtype, call)
    return one_or_list(weight, results), one_or_list(weight, us)


def spectral_normalize(
    weight: Weights,
    scale: Scales = 1.0,
    *,
    u: Tensor | Sequence[Tensor] | None = None,
    n_iter: int = 10,
    tol: float = 1e-3,
    dtype: torch.dtype | None = None,
    check: bool = False,
    backend: str | None = None,
) -> Any:
    r"""``(scale * W / sigma_max(W), u)``, with sigma_max exact and never under-estimated.

    Power iteration from ``u`` (..., rows), at most ``n_iter`` rounds or until its relative residual
    is at most ``tol``, starts the search for sigma_max; what it finds is refined and verified, so
    that both numbers change the time and not the result. Gradient: Gamma/sigma -
    <Gamma, W>/sigma^2 u v^T. Source of the layer: Miyato et al., arXiv 1802.05957.

    >>> w, u = spectral_normalize(torch.randn(4, 3), 2.0)
    >>> round(torch.linalg.matrix_norm(w, 2).item(), 4)
    2.0
    """
    weights = checked_weights(weight, check)
    _checked_iteration(n_iter, tol)
    us = _checked_vectors(u, weights)

    def call(members: list[int], scales: list[float], kind: torch.dtype) -> list[Tensor]:
        chosen, starts = [weights[i].contiguous() for i in members], [us[i] for i in members]
        op, device = _spectral.spectral_normalize, chosen[0].device
        name = backends.resolve("spectral_normalize", _spectral.FORWARD, device, backend)
        results, vectors, _ = op(chosen, starts, scales, kind, n_iter, tol, name)
        for i, vector in zip(members, vectors, strict=True):
            us[i] = vector
        return results

    results = by_dtype(weights, scale, dtype, call)
    return one_or_list(weight, results), one_or_list(weight, us)


def power_iteration(
    weight: Weights,
    u: Tensor | Sequence[Tensor] | None = None,
    *,
    n_iter: int = 10,
    check: bool = False,
    backend: str | None = None,
) -> Any:
    r"""``(sigma, u, v)`` after ``n_iter`` rounds of v <- W^T u / |W^T u|, u <- W v / |W v|.

    sigma (...) = u^T W v is a *lower* bound of the largest singular value: an estimate, never a
    certificate. Nothing here is differentiable. u (..., rows), v (..., cols).

    >>> sigma, u, v = power_iteration(torch.diag(torch.tensor([3.0, 1.0])))
    >>> round(sigma.item(), 4)
    3.0
    """
    weights = [w.detach() for w in checked_weights(weight, check)]
    _checked_iteration(n_iter, 0.0)
    us = _checked_vectors(u, weights)
    for i, w in enumerate(weights):
        if w.numel() == 0:
            raise ValueError(f"weight {i}: expected at least one entry, got {tuple(w.shape)}")
    if not weights:
        return [], [], []
    implemented = _spectral.POWER_ITERATION
    name = backends.resolve("power_iteration", implemented, weights[0].device, backend)
    sigmas, lefts, rights = _spectral.power_iteration(weights, us, n_iter, name)
    return tuple(one_or_list(weight, part) for part in (sigmas, lefts, rights))


def frobenius_normalize(
    weight: Weights,
    scale: Scales = 1.0,
    *,
    per_row: bool = False,
    dtype: torch.dtype | None = None,
    check: bool = False,
    backend: str | None = None,
) -> Any:
    r"""``scale * W / |W|_F``; with ``per_row`` each row is divided by its own norm.

    The spectral norm is at most ``scale`` (``scale * sqrt(rows)`` with ``per_row``, where the bound
    ``scale`` is each row's). Gradient: (Gamma - <Gamma, Wbar> Wbar) / |W|_F. A zero matrix stays
    zero.

    >>> w = frobenius_normalize(torch.ones(2, 2))
    >>> round(torch.linalg.matrix_norm(w).item(), 5)
    1.0
    """
    weights = checked_weights(weight, check)

    def call(members: list[int], scales: list[float], kind: torch.dtype) -> list[Tensor]:
        chosen = [_wide_enough(weights[i], kind).contiguous() for i in members]
        device = chosen[0].device
        name = backends.resolve("frobenius_normalize", _frobenius.FORWARD, device, backend)
        return _frobenius.frobenius_normalize(chosen, scales, kind, per_row, name)

    return one_or_list(weight, by_dtype(weights, scale, dtype, call))
