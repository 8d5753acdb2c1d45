"""Retraction of weights and projection of gradients, by backend: outside autograd, so no ops."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lipkernels.kernels.cpu import retract as cpu
from lipkernels.kernels.formats import by_format
from lipkernels.kernels.lazy import from_triton
from lipkernels.kernels.precision import without_autocast
from lipkernels.reference import retract as reference

Retract = Callable[[list[Tensor], list[float]], list[Tensor]]
Project = Callable[[list[Tensor], list[Tensor], list[float]], list[Tensor]]


def _each(batch: Tensor) -> list[Tensor]:
    return list(batch.reshape(-1, *batch.shape[-2:]).unbind())


@without_autocast
def _retract_reference(weights: list[Tensor], scales: list[float]) -> list[Tensor]:
    return [
        torch.stack([reference.retract(one, scale) for one in _each(w)]).view(w.shape)
        for w, scale in zip(weights, scales, strict=True)
    ]


@without_autocast
def _project_reference(
    grads: list[Tensor], weights: list[Tensor], scales: list[float]
) -> list[Tensor]:
    return [reference.project(*parts) for parts in zip(grads, weights, scales, strict=True)]


_narrow_retract = from_triton("retract", "retract")
_narrow_project = from_triton("retract", "project")


def _retract_triton(weights: list[Tensor], scales: list[float]) -> list[Tensor]:
    def run(retract: Retract) -> Callable[[list[int]], list[Tensor]]:
        return lambda members: retract([weights[i] for i in members], [scales[i] for i in members])

    return by_format(weights, run(_retract_reference), run(_narrow_retract))


def _project_triton(
    grads: list[Tensor], weights: list[Tensor], scales: list[float]
) -> list[Tensor]:
    def run(project: Project) -> Callable[[list[int]], list[Tensor]]:
        return lambda members: project(
            [grads[i] for i in members],
            [weights[i] for i in members],
            [scales[i] for i in members],
        )

    wider = [g if g.dtype == torch.float64 else w for g, w in zip(grads, weights, strict=True)]
    return by_format(wider, run(_project_reference), run(_narrow_project))


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
