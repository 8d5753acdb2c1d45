"""Back to the constraint after an optimizer step, and gradients along it; outside autograd."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lipkernels import backends
from lipkernels.functional.weights import (
    Scales,
    Weights,
    by_dtype,
    checked_scales,
    checked_weights,
    one_or_list,
)
from lipkernels.kernels import retract as _retract

_ORDINARY = 8  # binary digits of a scale whose square harms no format


def _to_ordinary_scale(weight: Tensor, scale: float) -> tuple[Tensor, float]:
    """Both times a power of two that puts ``scale`` near one: squares of 1e-30 underflow."""
    exponent = math.frexp(scale)[1]
    if abs(exponent) <= _ORDINARY:
        return weight, scale
    half = -exponent // 2  # 2^1074 is no float64, and 2^200 no float32
    by = (2.0**half, 2.0 ** (-exponent - half))
    return weight.double() * by[0] * by[1], scale * by[0] * by[1]


def project_tangent(
    grad: Weights, weight: Weights, scale: Scales = 1.0, *, backend: str | None = None
) -> Any:
    r"""The part of a gradient along the constraint W W^T = ``scale``^2 I: what moves W on it.

    .. math:: G - \tfrac{1}{2 s^2} (G W^T + W G^T) W

    for ``rows <= cols``, otherwise by columns; W is taken to be on the constraint. Not
    differentiable. Shapes: (..., rows, cols), or lists of them; raises ValueError where the shapes
    differ. Source: Absil, Mahony and Sepulchre, 2008, section 3.6.

    >>> from lipkernels.functional import polar_factor
    >>> w = polar_factor(torch.randn(3, 5))
    >>> d = project_tangent(torch.randn(3, 5), w)
    >>> torch.allclose(d @ w.mT, -(d @ w.mT).mT, atol=1e-5)
    True
    """
    weights, grads = checked_weights(weight, False), checked_weights(grad, False)
    if [g.shape for g in grads] != [w.shape for w in weights]:
        raise ValueError(
            f"grad: expected the shapes of the weights, {[tuple(w.shape) for w in weights]}, got"
            f" {[tuple(g.shape) for g in grads]}"
        )
    scales = checked_scales(scale, len(weights), torch.float64)
    results = [g.clone() if g.numel() == 0 else g for g in grads]
    members = [i for i, w in enumerate(weights) if w.numel() > 0]
    if members:
        name = backends.resolve(
            "project_tangent", _retract.PROJECT, weights[members[0]].device, backend
        )
        with torch.no_grad():
            pairs = [
                _to_ordinary_scale(weights[i].detach().contiguous(), scales[i]) for i in members
            ]
            outs = _retract.PROJECT[name](
                [grads[i].detach().contiguous() for i in members],
                [w for w, _ in pairs],
                [s for _, s in pairs],
            )
        for i, out in zip(members, outs, strict=True):
            results[i] = out
    return one_or_list(grad, results)


def retract(
    weight: Weights, scale: Scales = 1.0, *, check: bool = False, backend: str | None = None
) -> Any:
    r"""A weight near the constraint W W^T = ``scale``^2 I, put back on it, as an optimizer needs.

    One step of the series of the polar factor where that is near enough, the polar factor itself
    where it is not. The norm of the result, in the format of ``weight``, never exceeds ``scale``;
    how orthogonal it is depends on how near the weight was (the defect is about cubed, that of a
    large matrix squared at least, down to 1e-3 in one call; the next call continues). Not
    differentiable. Shapes: (..., rows, cols), or lists of them. ``check=True`` raises ValueError on
    NaN or infinity. Source: Absil, Mahony and Sepulchre, 2008, section 4.1.

    >>> from lipkernels.functional import polar_factor
    >>> w = polar_factor(torch.randn(3, 5)) + 1e-3 * torch.randn(3, 5)
    >>> torch.dist(retract(w), polar_factor(w)) < 1e-5
    tensor(True)
    """
    weights = checked_weights(weight, check)

    def call(members: list[int], scales: list[float], kind: torch.dtype) -> list[Tensor]:
        copies = [weights[i].detach().clone(memory_format=torch.contiguous_format) for i in members]
        _in_place(copies, scales, backend)
        return copies

    with torch.no_grad():
        return one_or_list(weight, by_dtype(weights, scale, None, call))


def _in_place(weights: list[Tensor], scales: list[float], backend: str | None) -> None:
    if weights[0].is_meta:  # how near a weight is decides what is computed
        return
    name = backends.resolve("retract", _retract.RETRACT, weights[0].device, backend)
    _retract.RETRACT[name](weights, scales)


def retract_(
    weight: Weights, scale: Scales = 1.0, *, check: bool = False, backend: str | None = None
) -> Any:
    r""":func:`retract` in place, outside autograd, as an optimizer's step is.

    Nothing is written where anything raises. Returns ``weight``.

    >>> w = torch.eye(3) * 1.01
    >>> retract_(w) is w and bool(torch.linalg.matrix_norm(w, 2) <= 1)
    True
    """
    weights = checked_weights(weight, check)

    def call(members: list[int], scales: list[float], kind: torch.dtype) -> list[Tensor]:
        chosen = [weights[i].detach() for i in members]
        written = [w.resolve_neg().contiguous() for w in chosen]
        _in_place(written, scales, backend)
        for w, result in zip(chosen, written, strict=True):
            if result.data_ptr() != w.data_ptr():
                w.copy_(result)
            elif not w.is_inference():
                torch.autograd.graph.increment_version(w)  # a library that torch does not see
        return chosen

    with torch.no_grad():
        by_dtype(weights, scale, None, call)
    return weight
