"""Retraction of weights and projection of gradients, by backend: outside autograd, so no ops."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lipkernels.kernels.cpu import retract as cpu
from lipkernels.kernels.lazy import from_triton
from lipkernels.kernels.precision import without_autocast
from lipkernels.kernels.shared import narrow, shared
from lipkernels.reference import retract as reference

Retract = Callable[[list[Tensor], list[float]], None]
Project = Callable[[list[Tensor], list[Tensor], list[float]], list[Tensor]]


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


_narrow_retract = from_triton("retract", "retract")


def _retract_triton(weights: list[Tensor], scales: list[float]) -> None:
    wide = [i for i, w in enumerate(weights) if w.dtype == torch.float64]
    _retract_reference([weights[i] for i in wide], [scales[i] for i in wide])
    others = [i for i in range(len(weights)) if i not in wide]
    if others:
        chosen = [weights[i] for i in others]
        results = _narrow_retract(chosen, [scales[i] for i in others])
        for w, result in zip(chosen, results, strict=True):
            w.copy_(result)


_PROJECTS = {"reference": _project_reference, "triton": from_triton("retract", "project")}


def _project_triton(
    grads: list[Tensor], weights: list[Tensor], scales: list[float]
) -> list[Tensor]:
    wider = [g if g.dtype == torch.float64 else w for g, w in zip(grads, weights, strict=True)]
    names = narrow("triton")(wider)
    return shared(lambda _: names, _PROJECTS, takes=(1, 1, 1), gives=1)(grads, weights, scales)


# In place, on contiguous weights: the only op of this package that is, for an optimizer's step.
RETRACT: dict[str, Retract] = {
    "reference": _retract_reference,
    "cpu": without_autocast(cpu.retract),
    "triton": _retract_triton,
}
PROJECT: dict[str, Project] = {
    "reference": _project_reference,
    "cpu": without_autocast(cpu.project),
    "triton": _project_triton,
}
