"""What is promised (certificates), what holds (attacks), and whether the two agree (the audit)."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lipkernels import certify
from lipkernels.demo.attack import pgd_l2

CONTROL_FACTORS = (1.01, 1.02, 1.05, 1.25, 1.5, 2.0, 4.0)


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
    """Largest |logit in float32 - logit in float64| over `images`: measured, proves nothing."""
    exact = copy.deepcopy(net).double()(images.double())
    return (net(images).double() - exact).abs().max().item()


def certify_images(net: nn.Module, images: Tensor) -> Tensor:
    """l2 radius (n,) within which the prediction cannot change, float32 rounding included.

    It is the arithmetic of a CPU that is bounded: on another device a copy on the CPU is certified.
    """
    on_cpu = net if images.device.type == "cpu" else copy.deepcopy(net).cpu()
    return certify.certified_radius(on_cpu, images.cpu()).to(images.device)


def rounding_allowance(net: nn.Module, images: Tensor, radius: float) -> float:
    """The proved bound of |computed - exact logits|_2 within `radius`, its mean over `images`."""
    on_cpu = net if images.device.type == "cpu" else copy.deepcopy(net).cpu()
    return certify.forward_error(on_cpu, images.cpu()).at(radius).mean().item()


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
