"""What is promised (certificates), what holds (attacks), and whether the two agree (the audit)."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lipkernels import metrics
from lipkernels.demo.attack import pgd_l2

# Note [Rounding in the forward pass]
# The bound on the Lipschitz constant is rigorous, but it speaks of a network in exact arithmetic,
# and what predicts is a network in float32. If no logit is ever further than e from its exact
# value, a prediction is safe for as long as the exact margin stays positive by 2e at the clean
# image (two logits, read in float32) and again 2e at the perturbed one: `certified_radius` takes
# 2 * error off the margin, so error = 2e. We do not prove e. We measure it, as the largest
# difference to a float64 forward pass of the same weights on the images at hand, and multiply by
# ROUNDING_SAFETY. That is an estimate; it costs about 1e-5 of radius.
ROUNDING_SAFETY = 4.0

CONTROL_FACTORS = (1.05, 1.25, 1.5, 2.0, 4.0)


@dataclass(frozen=True)
class Audit:
    """`attacked` certified samples, each within its own radius; `broken` changed their class.

    `furthest` is the largest distance / radius among the attacked points (it must not pass 1).
    An attack that breaks nothing anywhere would prove nothing: `control` is the share of the same
    samples that it breaks at `control_factor` times their radius, the first of CONTROL_FACTORS at
    which half of them break (or the last one).
    """

    attacked: int
    broken: int
    furthest: float
    control_factor: float
    control: float


@torch.no_grad()
def rounding_error(net: nn.Module, images: Tensor) -> float:
    """Largest |logit in float32 - logit in float64| over `images`."""
    exact = copy.deepcopy(net).double()(images.double())
    return (net(images).double() - exact).abs().max().item()


@torch.no_grad()
def certify_images(net: nn.Module, images: Tensor, bound: float, error: float) -> Tensor:
    """l2 radius (n,) within which the prediction cannot change; see Note [Rounding ...]."""
    return metrics.certified_radius(net(images), bound, error=2 * ROUNDING_SAFETY * error)


@torch.no_grad()
def correct(net: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Which images (n,) the network puts in their class."""
    return net(images).argmax(1) == labels


def accuracy_under_attack(
    net: nn.Module, images: Tensor, labels: Tensor, radii: Sequence[float], seed: int
) -> dict[float, float]:
    """Share of images still classified correctly after PGD at each radius.

    A sample that fell at one radius has fallen at the larger ones, whose balls contain the
    smaller: only survivors are attacked again.
    """
    standing = correct(net, images, labels)
    result = {}
    for radius in sorted(radii):
        index = standing.nonzero().squeeze(1)
        worst = pgd_l2(net, images[index], labels[index], radius, seed=seed)
        standing[index] = correct(net, worst, labels[index])
        result[radius] = standing.float().mean().item()
    return result


def audit(net: nn.Module, images: Tensor, radius: Tensor, seed: int) -> Audit:
    """Attack every sample whose prediction is certified (radius > 0) inside its radius."""
    index = (radius > 0).nonzero().squeeze(1)
    x, r = images[index], radius[index]
    with torch.no_grad():
        predicted = net(x).argmax(1)
    # x + delta is rounded to float32, which moves it by up to 2^-24 |x + delta|: stay inside.
    rounding = 2.0**-24 * (x.flatten(1).norm(dim=1) + r)
    eps = (r * (1 - 1e-6) - rounding).clamp_min(0)
    worst = pgd_l2(net, x, predicted, eps, seed=seed)
    broken = ~correct(net, worst, predicted)
    distance = (worst.double() - x.double()).flatten(1).norm(dim=1)
    standing = torch.ones_like(broken)
    factor, control = CONTROL_FACTORS[0], 0.0
    for factor in CONTROL_FACTORS if len(index) else ():
        left = standing.nonzero().squeeze(1)
        beyond = pgd_l2(net, x[left], predicted[left], factor * r[left], seed=seed)
        standing[left] = correct(net, beyond, predicted[left])
        control = 1 - standing.float().mean().item()
        if control >= 0.5:
            break
    return Audit(
        attacked=len(index),
        broken=int(broken.sum()),
        furthest=(distance / r.double()).max().item() if len(index) else 0.0,
        control_factor=factor,
        control=control,
    )
