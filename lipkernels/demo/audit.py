"""The certificates against AutoAttack: at the radii of the table, and at images' own radii."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lipkernels.demo import measure
from lipkernels.demo.autoattack import ATTACKS, Budget, autoattack_l2, package
from lipkernels.demo.data import Digits
from lipkernels.demo.preset import Preset

CONTROL_FACTOR = 1.05


@dataclass(frozen=True)
class OwnRadius:
    """`attacked` images, each at `reach` of its certified radius on average (`least`: at least).

    `control` is the share of them that the same attack breaks at CONTROL_FACTOR times the largest
    radius of their group: an attack that breaks nothing anywhere would prove nothing.
    """

    attacked: int
    reach: float
    least: float
    control_factor: float
    control: float


def _distance(points: Tensor, images: Tensor) -> Tensor:
    return (points.double() - images.double()).flatten(1).norm(dim=1)


def _attack(
    net: nn.Module, images: Tensor, labels: Tensor, eps: float, seed: int, budget: Budget
) -> Tensor:
    """float64 distance (n,) of the adversarial example found within eps; inf where none was."""
    points = autoattack_l2(net, images, labels, eps, seed=seed, budget=budget)
    fell = ~measure.correct(net, points, labels)
    return torch.where(fell, _distance(points, images), torch.inf)


def nearest_adversarial(
    net: nn.Module,
    images: Tensor,
    labels: Tensor,
    radii: Sequence[float],
    seed: int,
    budget: Budget,
    say: Callable[[str], None],
) -> Tensor:
    """Distance (n,), float64, of the nearest adversarial example found for each image; inf: none.

    Radii go from the largest to the smallest. What stands at one counts as standing at the smaller
    ones, whose balls the larger contains, and is not attacked again. So every image is attacked at
    the largest radius that its certificate reaches (and at the larger ones, where it may fall).
    Images that the network misclassifies are not attacked.
    """
    closest = torch.full((len(images),), torch.inf, dtype=torch.float64, device=images.device)
    undecided = measure.correct(net, images, labels)
    for radius in sorted(radii, reverse=True):
        start = time.perf_counter()
        index = (undecided & (closest > radius)).nonzero().squeeze(1)
        found = _attack(net, images[index], labels[index], radius, seed, budget)
        closest[index] = torch.minimum(closest[index], found)
        undecided &= closest <= radius
        stand, seconds = int((closest[index] > radius).sum()), time.perf_counter() - start
        say(f"  at {radius:g}: {len(index)} attacked, {stand} stand ({seconds:.0f} s)")
    return closest


def neighbours(radius: Tensor, groups: int, size: int, seed: int) -> list[Tensor]:
    """Indices of `groups` runs of up to `size` images with neighbouring radii, all above 0.

    The images in the order of their radii are cut in `groups` equal parts; a run starts anywhere
    in its part, at random. One attack has one radius, and so a group is attacked at its smallest.
    """
    generator = torch.Generator().manual_seed(seed)
    order = radius.argsort()
    order = order[radius[order] > 0]
    runs = []
    for part in order.tensor_split(groups):
        start = int(torch.randint(max(len(part) - size, 0) + 1, (), generator=generator))
        runs.append(part[start : start + size])
    return [run for run in runs if len(run)]


def at_own_radius(
    net: nn.Module, images: Tensor, radius: Tensor, preset: Preset, seed: int
) -> tuple[OwnRadius, Tensor]:
    """Attack groups of images at their certified radius; what was done, and distances as above.

    The class that must not change is the predicted one: a certificate holds for wrong ones too.
    """
    closest = torch.full((len(images),), torch.inf, dtype=torch.float64, device=images.device)
    with torch.no_grad():
        predicted = net(images).argmax(1)
    reach, controls = [], []
    for index in neighbours(radius, preset.audit_groups, preset.audit_group_size, seed):
        x, y, r = images[index], predicted[index], radius[index].double()
        closest[index] = _attack(net, x, y, r.min().item(), seed, preset.autoattack)
        reach += (r.min() / r).tolist()
        beyond = CONTROL_FACTOR * r.max().item()
        controls += _attack(net, x, y, beyond, seed, preset.autoattack).isfinite().tolist()
    n = len(reach)
    done = OwnRadius(
        attacked=n,
        reach=sum(reach) / n if n else 0.0,
        least=min(reach, default=0.0),
        control_factor=CONTROL_FACTOR,
        control=sum(controls) / n if n else 0.0,
    )
    return done, closest


def autoattack_audit(
    ours: nn.Module,
    twin: nn.Module,
    digits: Digits,
    radius: Tensor,
    preset: Preset,
    seed: int,
    say: Callable[[str], None],
) -> tuple[dict[str, Any], dict[str, float], dict[str, float]]:
    """What the attack was and what it broke; the accuracy of `ours` and of `twin` at each radius.

    `radius` (n,) are the certified radii of `ours`. A certificate is `broken` if an adversarial
    example was found anywhere within it, by whichever of the attacks. `claims` are the images that
    are right and certified to a radius of the table at least.
    """
    start = time.perf_counter()
    x, y, radii = digits.test_images, digits.test_labels, preset.table_radii

    def accuracy(net: nn.Module, closest: Tensor) -> dict[str, float]:
        right = measure.correct(net, x, y)
        return {f"{r:g}": (right & (closest > r)).float().mean().item() for r in radii}

    say("AutoAttack on the 1-Lipschitz net")
    closest = nearest_adversarial(ours, x, y, radii, seed, preset.autoattack, say)
    say("AutoAttack on certified samples at their own radius")
    own, closest_own = at_own_radius(ours, x, radius, preset, seed)
    broken = int((torch.minimum(closest, closest_own) <= radius).sum())
    say(f"  {own.attacked} attacked; certificates broken by either attack: {broken}")
    say("AutoAttack on the ReLU twin")
    closest_twin = nearest_adversarial(twin, x, y, radii, seed, preset.autoattack, say)

    claims = measure.correct(ours, x, y) & (radius >= min(radii))
    record = {
        "package": f"pyautoattack {package().__version__}",
        "norm": "L2",
        "attacks": list(ATTACKS),
        "budget": vars(preset.autoattack),
        "clipped_to_0_1": False,
        "radii": list(radii),
        "images": len(x),
        "seed": seed,
        "claims": int(claims.sum()),
        "broken": broken,
        "own_radius": vars(own),
        "seconds": time.perf_counter() - start,
    }
    return record, accuracy(ours, closest), accuracy(twin, closest_twin)
