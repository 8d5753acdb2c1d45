"""Retraction of weights and projection of gradients, by backend: outside autograd, so no ops."""

from __future__ import annotations

import torch
from torch import Tensor

from lipkernels.kernels.cpu import retract as cpu
from lipkernels.kernels.precision import without_autocast
from lipkernels.reference import retract as reference


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


RETRACT = {"reference": _retract_reference, "cpu": without_autocast(cpu.retract)}
PROJECT = {"reference": _project_reference, "cpu": without_autocast(cpu.project)}
