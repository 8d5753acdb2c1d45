"""Retraction and projection of a list of weights by the C++ library, in one call each."""

from __future__ import annotations

import array

import torch
from torch import Tensor

from lipkernels.kernels.cpu import polar
from lipkernels.kernels.cpu.library import checked, library, n_threads
from lipkernels.reference import retract as reference
from lipkernels.reference.rounding import worst_case_factor

_ADDRESS, _DONE = 0, 0


def _matrices(batch: Tensor) -> list[Tensor]:
    return list(batch.reshape(-1, *batch.shape[-2:]).unbind())


def _is_for_library(*tensors: Tensor) -> bool:
    return all(t.dtype == torch.float32 for t in tensors)


def retract(weights: list[Tensor], scales: list[float]) -> None:
    """As :func:`lipkernels.reference.retract.retract`, in place, for batches (..., rows, cols)."""
    table, numbers = array.array("q"), array.array("d")
    members: list[tuple[Tensor, float]] = []
    for weight, scale in zip(weights, scales, strict=True):
        margin = worst_case_factor(weight, scale, weight.dtype)
        for one in _matrices(weight):
            if not _is_for_library(one):
                one.copy_(reference.retract(one, scale))
                continue
            members.append((one, scale))
            table.extend((one.data_ptr(), *one.shape))
            numbers.extend((scale, margin))
    if not members:
        return
    status = array.array("i", [-1]) * len(members)
    checked(
        library().lk_polar_retract(
            len(members),
            table.buffer_info()[_ADDRESS],
            numbers.buffer_info()[_ADDRESS],
            status.buffer_info()[_ADDRESS],
            n_threads(),
        )
    )
    for code, (one, scale) in zip(status, members, strict=True):
        if code != _DONE:  # untouched, and too far away for a step
            (result,), _ = polar.forward([one], [scale], one.dtype)
            one.copy_(result)


def project(grads: list[Tensor], weights: list[Tensor], scales: list[float]) -> list[Tensor]:
    """As :func:`lipkernels.reference.retract.project`."""
    results: list[Tensor] = []
    keep: list[Tensor] = []  # what the table has addresses of
    table, numbers = array.array("q"), array.array("d")
    for grad, weight, scale in zip(grads, weights, scales, strict=True):
        if not _is_for_library(grad, weight):
            results.append(reference.project(grad, weight, scale))
            continue
        result, wide = (
            grad.clone(memory_format=torch.contiguous_format),
            weight.resolve_neg().contiguous(),
        )
        results.append(result)
        keep.append(wide)
        for one, w in zip(_matrices(result), _matrices(wide), strict=True):
            table.extend((one.data_ptr(), w.data_ptr(), *one.shape))
            numbers.append(scale)
    if numbers:
        checked(
            library().lk_polar_project(
                len(numbers),
                table.buffer_info()[_ADDRESS],
                numbers.buffer_info()[_ADDRESS],
                n_threads(),
            )
        )
    return results
