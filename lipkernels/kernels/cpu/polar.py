"""The polar factor of a list of weights, and its gradient, by the C++ library.

The library takes float32 matrices whose condition number is moderate, all of a list in one call.
What it returns unfinished goes through an eigendecomposition (`decomposed.py`; of a weight that is
not finite, the reference's); the last step, or the gradient, is the library's again.
"""

from __future__ import annotations

import array
import math

import torch
from torch import Tensor

from lipkernels.kernels.cpu.decomposed import decomposed
from lipkernels.kernels.cpu.library import (
    DONE,
    EXTREME,
    addresses,
    checked,
    library,
    n_threads,
)
from lipkernels.kernels.precision import without_autocast
from lipkernels.reference import polar as reference
from lipkernels.reference.rounding import scale_and_round, worst_case_factor
from lipkernels.reference.scaling import saturated, to_unit_magnitude

SAVED_PER_WEIGHT = 3  # factor, spectrum, scalars: see `lipkernels.kernels.polar`
_UNSET = -1


def _constrained(
    weights: list[Tensor], numbers: list[tuple[float, float]]
) -> tuple[list[Tensor], list[Tensor]]:
    """Results in float32, and saved tensors, of contiguous float32 weights (..., rows, cols).

    ``numbers`` holds (scale, margin) for each weight: the result is at most their product times U.
    """
    results: list[Tensor] = []
    saved: list[Tensor] = []
    table, factors = array.array("q"), array.array("d")
    for w, pair in zip(weights, numbers, strict=True):
        *batch, rows, cols = w.shape
        m, n = min(rows, cols), math.prod(batch)
        new = w.new_empty
        tensors = (torch.empty_like(w), new((*batch, m, m)), new((*batch, m)), new((*batch, 2)))
        results.append(tensors[0])
        saved += tensors[1:]
        if batch:
            for each in zip(*(addresses(t, n) for t in (w, *tensors)), strict=True):
                table.extend((*each, rows, cols))
        else:
            table.extend((w.data_ptr(), *(t.data_ptr() for t in tensors), rows, cols))
        factors.extend(pair * n)
    n = len(factors) // 2
    status = array.array("i", [_UNSET]) * n
    checked(
        library().lk_polar_forward(
            n,
            table.buffer_info()[0],
            factors.buffer_info()[0],
            status.buffer_info()[0],
            n_threads(),
        )
    )
    if any(status):
        finish_the_others(weights, status, results, saved, numbers)
    return results, saved


def forward(
    weights: list[Tensor], scales: list[float], dtype: torch.dtype
) -> tuple[list[Tensor], list[Tensor]]:
    """As ``lipkernels::polar_factor``, for weights of any format but float64."""
    wide = [w if w.dtype == torch.float32 else w.float() for w in weights]
    wide = [w if w.is_contiguous() else w.contiguous() for w in wide]
    if dtype == torch.float32:
        margins = (worst_case_factor(w, k, dtype) for w, k in zip(wide, scales, strict=True))
        return _constrained(wide, list(zip(scales, margins, strict=True)))
    # Other formats are rounded afterwards, from polar factors that have no margin of their own.
    results, saved = _constrained(wide, [(1.0, 1.0)] * len(wide))
    rounded = [scale_and_round(u, k, dtype) for u, k in zip(results, scales, strict=True)]
    return rounded, saved


@without_autocast
def finish_the_others(
    weights: list[Tensor],
    status: array.array,
    results: list[Tensor],
    saved: list[Tensor],
    numbers: list[tuple[float, float]],
) -> None:
    """Eigendecompositions for the matrices that the library gave back, into the same tensors."""
    position = 0
    for i, w in enumerate(weights):
        rows, cols = w.shape[-2:]
        m, n = min(rows, cols), math.prod(w.shape[:-2])
        codes = status[position : position + n]
        position += n
        to = [
            t.view(n, *shape)
            for t, shape in zip(
                (results[i], *saved[SAVED_PER_WEIGHT * i : SAVED_PER_WEIGHT * (i + 1)]),
                ((rows, cols), (m, m), (m,), (2,)),
                strict=True,
            )
        ]
        for code in sorted({*codes} - {DONE}):  # one batched decomposition for each
            chosen = [j for j, other in enumerate(codes) if other == code]
            x, whole = w.reshape(n, rows, cols), len(chosen) == n
            into = to if whole else [t.new_empty((len(chosen), *t.shape[1:])) for t in to]
            y = x if whole else x[chosen]
            if code == EXTREME:
                _rescaled(y, *numbers[i], into)
            else:
                decomposed(y, code, *numbers[i], into)
            if not whole:
                for tensor, part in zip(to, into, strict=True):
                    tensor[chosen] = part


def _rescaled(x: Tensor, scale: float, margin: float, into: list[Tensor]) -> None:
    """``into``: as :func:`decomposed`, of matrices that are zero, not finite or extreme."""
    unit, power = to_unit_magnitude(x)
    largest = unit.abs().amax(dim=(-2, -1))
    if bool(((largest >= 1) & torch.isfinite(largest)).all()):
        (result,), (factor, spectrum, scalars) = _constrained([unit], [(scale, margin)])
    else:
        u, factor, spectrum, _ = reference.polar_factor(x)
        result, scalars = u * (scale * margin), x.new_full((len(x), 2), scale * margin)
    scalars[:, 0] = power[:, 0, 0]
    for tensor, part in zip(into, (result, factor, spectrum, scalars), strict=True):
        tensor.copy_(part)


def backward(
    grads: list[Tensor],
    weights: list[Tensor],
    results: list[Tensor],
    saved: list[Tensor],
    scales: list[float],
) -> list[Tensor]:
    """As ``lipkernels::polar_factor_backward``."""
    out: list[Tensor] = []
    keep: list[Tensor] = []  # what the table has addresses of
    table, numbers = array.array("q"), array.array("d")
    for i, (grad, weight, result, scale) in enumerate(
        zip(grads, weights, results, scales, strict=True)
    ):
        factor, spectrum, scalars = saved[SAVED_PER_WEIGHT * i : SAVED_PER_WEIGHT * (i + 1)]
        if result.dtype != torch.float32:
            # A rounded result is not accurate enough to differentiate with, and keeping a second
            # copy would cost memory: once more.
            (result,), (factor, spectrum, scalars) = forward([weight], [1.0], torch.float32)
        *batch, rows, cols = weight.shape
        n = math.prod(batch)
        grad = grad.float().resolve_neg()
        grad = grad if grad.is_contiguous() else grad.contiguous()
        tensors = (grad, result, factor, spectrum, scalars, torch.empty_like(grad))
        keep += tensors
        out.append(tensors[-1])
        if batch:
            for each in zip(*(addresses(t, n) for t in tensors), strict=True):
                table.extend((*each, rows, cols))
        else:
            table.extend((*(t.data_ptr() for t in tensors), rows, cols))
        numbers.extend([scale] * n)
    if numbers:
        checked(
            library().lk_polar_backward(
                len(numbers), table.buffer_info()[0], numbers.buffer_info()[0], n_threads()
            )
        )
    return [
        gradient if gradient.dtype == weight.dtype else saturated(gradient, weight.dtype)
        for gradient, weight in zip(out, weights, strict=True)
    ]
