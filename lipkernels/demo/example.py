"""One digit, attacked at growing radii: what a radius looks like."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lipkernels.demo.attack import pgd_l2


@dataclass(frozen=True)
class Example:
    """Images (k, h, w) attacked at `radii`, the class that each network gives them, and whether
    the certificate of the 1-Lipschitz one reaches that far."""

    radii: Sequence[float]
    images: Tensor
    lipschitz: Sequence[int]
    twin: Sequence[int]
    proven: Sequence[bool]


def find_example(
    ours: nn.Module,
    twin: nn.Module,
    images: Tensor,
    labels: Tensor,
    certified: Tensor,
    radii: Sequence[float],
    seed: int,
) -> Example | None:
    """The first image that both classify, that is certified to the middle one of `radii` and that
    the attack on the twin breaks at the second; None if there is none among the first 200.

    The perturbations are made against the twin; the certificate does not care whom they were made
    against.
    """
    x, y = images[:200], labels[:200]
    with torch.no_grad():
        fit = (twin(x).argmax(1) == y) & (ours(x).argmax(1) == y)
        fit &= certified[:200] >= sorted(radii)[len(radii) // 2]
        fit &= twin(pgd_l2(twin, x, y, sorted(radii)[1], seed=seed)).argmax(1) != y
    index = fit.nonzero().flatten()[:1]
    if len(index) == 0:
        return None
    x, y = x[index].expand(len(radii), -1, -1, -1), y[index].expand(len(radii))
    eps = torch.tensor(list(radii), dtype=x.dtype, device=x.device)
    worst = pgd_l2(twin, x, y, eps, seed=seed)
    with torch.no_grad():
        ours_say, twin_says = ours(worst).argmax(1).tolist(), twin(worst).argmax(1).tolist()
    proven = [certified[index].item() >= r for r in radii]
    return Example(radii, worst.squeeze(1).cpu(), ours_say, twin_says, proven)
