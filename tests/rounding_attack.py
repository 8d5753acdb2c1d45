"""An attack on a certificate's last digits: inputs on the edge of a radius, an ulp from another."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

F64 = torch.float64


def _view(factor: Tensor, x: Tensor) -> Tensor:
    return factor.reshape(-1, *[1] * (x.dim() - 1))


def _steepest(exact: nn.Module, x: Tensor, classes: Tensor) -> Tensor:
    """The unit direction in which the runner-up gains most on ``classes``, in float64."""
    point = x.double().requires_grad_()
    logits = exact(point)
    top = logits.gather(1, classes.unsqueeze(1)).squeeze(1)
    others = logits.scatter(1, classes.unsqueeze(1), -torch.inf).amax(1)
    (slope,) = torch.autograd.grad((others - top).sum(), point)
    return slope / _view(slope.flatten(1).norm(dim=1), x)


def near_the_border(
    net: nn.Module, x: Tensor, classes: Tensor, beyond: Tensor, distance: float
) -> Tensor:
    """Points of x's format about ``distance`` short of the border that x -> ``beyond`` crosses.

    ``net`` predicts ``classes`` at x and something else at ``beyond``; the border is found by
    bisection in float64, and left again along its normal.
    """
    exact = copy.deepcopy(net).double()
    inside, outside = torch.zeros(len(x), dtype=F64), torch.ones(len(x), dtype=F64)
    start, step = x.double(), beyond.double() - x.double()
    for _ in range(52):
        middle = (inside + outside) / 2
        with torch.no_grad():
            same = exact(start + _view(middle, x) * step).argmax(1) == classes
        inside = torch.where(same, middle, inside)
        outside = torch.where(same, outside, middle)
    border = start + _view(inside, x) * step
    return (border - distance * _steepest(exact, border, classes)).to(x.dtype)


def _within(y: Tensor, x: Tensor, radius: Tensor) -> Tensor:
    """Which y are within ``radius`` of x: the float64 norm, with more than its error to spare."""
    return (y.double() - x.double()).flatten(1).norm(dim=1) * (1 + 1e-12) <= radius


def rounding_flips(
    net: nn.Module, x: Tensor, radius: Tensor, *, trials: int = 200, seed: int = 0
) -> Tensor:
    """Which samples (N,) change their class, as ``net`` computes it, within ``radius`` of x.

    Goes to the edge of the ball along the float64 gradient, rounds to x's format, then moves random
    pixels by an ulp, ``trials`` times; a candidate counts if its exact distance is allowed. Each is
    evaluated as it is, in the batch of all and, if it flips there, by itself.
    """
    exact = copy.deepcopy(net).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        classes = net(x).argmax(1)
    direction = _steepest(exact, x, classes)
    flipped = torch.zeros(len(x), dtype=torch.bool)
    for trial in range(trials):
        # Rounding moves the candidate: from just inside the ball to clearly inside it.
        short = 1 - 10.0 ** -(2 + 7 * float(torch.rand((), generator=generator)))
        y = (x.double() + _view(radius * short, x) * direction).to(x.dtype)
        if trial:
            up = torch.rand(x.shape, generator=generator) < 0.5
            ulp = torch.where(up, torch.nextafter(y, y + 1), torch.nextafter(y, y - 1))
            share = 10.0 ** -(3 * float(torch.rand((), generator=generator)))
            y = torch.where(torch.rand(x.shape, generator=generator) < share, ulp, y)
        with torch.no_grad():
            candidates = (net(y).argmax(1) != classes) & _within(y, x, radius) & ~flipped
            for i in candidates.nonzero().flatten().tolist():
                # The kernel of another batch size may round otherwise: both have to agree.
                alone = net(y[i : i + 1]).argmax(1) != net(x[i : i + 1]).argmax(1)
                flipped[i] = bool(alone)
    return flipped
