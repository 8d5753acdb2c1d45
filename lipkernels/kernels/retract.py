"""Retraction of weights and projection of gradients, by backend: outside autograd, so no ops."""

from __future__ import annotations

from torch import Tensor

from lipkernels.kernels.cpu import retract as cpu
from lipkernels.kernels.precision import without_autocast
from lipkernels.reference import retract as reference


def _each(batch: Tensor) -> list[Tensor]:
    return list(batch.reshape(-1, *batch.shape[-2:]).unbind())


@without_autocast
def _retract_reference(weights: list[Tensor], scales: list[float]) -> None:
    for weight, scale in zip(weights, scales, strict=True):
        for one in _each(weight):
            one.copy_(reference.retract(one, scale))


@without_autocast
def _project_reference(
    grads: list[Tensor], weights: list[Tensor], scales: list[float]
) -> list[Tensor]:
    return [reference.project(*parts) for parts in zip(grads, weights, scales, strict=True)]


# In place, on contiguous weights: the only op of this package that is, for an optimizer's step.
RETRACT = {"reference": _retract_reference, "cpu": without_autocast(cpu.retract)}
PROJECT = {"reference": _project_reference, "cpu": without_autocast(cpu.project)}
