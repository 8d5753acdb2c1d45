"""What a good programmer would write in torch alone, for a GPU, in an afternoon."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.gpu.queued import FORWARD, Work, tf32

STEPS = 15


@dataclass(frozen=True)
class TF32Work(Work):
    """On TF32 tensor cores, backward too."""

    def forward(self) -> Sequence[Tensor]:
        with tf32():
            return super().forward()

    def both(self) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        with tf32():
            return super().both()


def bjorck(weight: Tensor) -> Tensor:
    """15 Bjorck steps of a batch (b, rows, cols), scaled by a bound of its norm.

    sigma_max^2 <= |W W^T|_inf: cheaper than any power iteration, and one that holds.
    """
    x = weight.mT if weight.shape[-2] > weight.shape[-1] else weight
    bound = (x @ x.mT).abs().sum(-1).amax(-1).sqrt()
    x = x / bound[:, None, None]
    for _ in range(STEPS):
        x = torch.baddbmm(x, x @ x.mT, x, beta=1.5, alpha=-0.5)
    return x.mT if weight.shape[-2] > weight.shape[-1] else x


def _by_shape(weights: Sequence[Tensor]) -> list[list[int]]:
    groups = defaultdict(list)
    for i, weight in enumerate(weights):
        groups[weight.shape].append(i)
    return list(groups.values())


def batched_bjorck(weights: Sequence[Tensor], cotangents: Sequence[Tensor]) -> Work:
    """All weights of a shape in one batch, stored as one parameter from the start."""
    groups = _by_shape(weights)
    stacks = [torch.stack([weights[i] for i in g]).requires_grad_() for g in groups]
    return TF32Work(
        lambda: [bjorck(stack) for stack in stacks],
        stacks,
        [torch.stack([cotangents[i] for i in g]) for g in groups],
    )


def unbatched(weights: Sequence[Tensor]) -> Callable[[Sequence[Tensor]], list[Tensor]]:
    """Batches of `batched_bjorck` as a list in the order of ``weights``."""
    places = [i for group in _by_shape(weights) for i in group]

    def order(batches: Sequence[Tensor]) -> list[Tensor]:
        found = [one for batch in batches for one in batch.unbind()]
        return [found[places.index(i)] for i in range(len(places))]

    return order


@dataclass(frozen=True)
class Copy(Work):
    """The copy of the inputs that moves as many bytes as the op; twice with its backward."""

    def run(self, which: str) -> object:
        found = [x.detach().clone() for x in self.inputs]
        return found if which == FORWARD else (found, [g.clone() for g in self.cotangents])
