"""The true Lipschitz constant of a network, from both sides.

Finding it exactly is NP-hard for a network with kinks. It lies between the largest Jacobian norm at
any point and the product of the layers' operator norms (the activations here have constant 1). Both
ends are computed in float64 from dense matrices; for an orthogonal network they meet.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bench.accuracy import operator_norm
from bench.nets import matrix, plain_float64


@dataclass(frozen=True)
class Bracket:
    """at_least <= Lipschitz constant <= at_most."""

    at_least: float
    at_most: float


def _jacobians(net: nn.Module, images: Tensor) -> Tensor:
    """(n, classes, pixels); every image depends on itself alone, so a sum separates them."""
    x = images.clone().requires_grad_()
    logits = net(x)
    rows = [torch.autograd.grad(column.sum(), x, retain_graph=True)[0] for column in logits.T]
    return torch.stack(rows, 1).flatten(2)


def bracket(net: nn.Module, images: Tensor) -> Bracket:
    """Of ``net`` in evaluation mode; the lower end from the Jacobians at ``images`` (n, c, h, w).

    Raises RuntimeError if the float64 copy that is measured computes something else than ``net``.
    """
    plain = plain_float64(net)
    images64 = images.double()
    _check_copy(net, plain, images)
    at_most, x = 1.0, images64[:1]
    for layer in plain:
        if isinstance(layer, nn.Linear):
            at_most *= operator_norm(layer.weight)
        elif isinstance(layer, nn.Conv2d):
            at_most *= operator_norm(matrix(layer, x.shape[1:]))
        x = layer(x)
    at_least = max(operator_norm(j) for j in _jacobians(plain, images64))
    return Bracket(at_least, at_most)


def _check_copy(net: nn.Module, plain: nn.Module, images: Tensor) -> None:
    was_training = net.training
    with torch.no_grad():
        expected, found = net.eval()(images).double(), plain(images.double())
    net.train(was_training)
    difference = (expected - found).abs().max().item()
    size = expected.abs().max().item()
    if not difference <= 1e-4 * max(1.0, size):
        raise RuntimeError(
            f"the float64 copy: expected {type(net).__name__}'s logits within 1e-4, got"
            f" {difference:.1e} off ({size:.1e} large)"
        )
