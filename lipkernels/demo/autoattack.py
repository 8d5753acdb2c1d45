"""AutoAttack in the l2 ball: the customary ensemble of attacks, by an attacker we did not write."""

import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor, nn

from lipkernels.demo.attack import frozen

ATTACKS = ("apgd-ce", "apgd-t", "fab-t", "square")  # what its version "standard" runs, in order
BATCH = 250


@dataclass(frozen=True)
class Budget:
    """Classes that the targeted attacks aim at, and queries of Square; default: as published.

    APGD and FAB take 100 steps, once from each start and towards each target.
    """

    targets: int = 9
    queries: int = 5000


# Note [The whole ball]
# pyautoattack clamps every point to [0, 1], where a black pixel can't get darker nor a white one
# brighter. A certificate speaks of the whole l2 ball, and the attacker who may use all of it is the
# stronger one. So the attack sees g(z) = f(s z - o) with z = (x + o) / s and o = (s - 1) / 2:
# [0, 1] in z is [-o, 1 + o] in x, the radius eps in x is eps / s in z, and with o >= eps the clamp
# never acts. g is as easy to attack as f: APGD, FAB and Square normalize gradients and distances.
# s is a power of two, so that the division is exact.
class _WholeBall(nn.Module):
    def __init__(self, net: nn.Module, eps: float):
        super().__init__()
        self.net, self.scale = net, 2.0
        while (self.scale - 1) / 2 < eps:
            self.scale *= 2
        self.offset = (self.scale - 1) / 2

    def encode(self, x: Tensor) -> Tensor:
        return (x + self.offset) / self.scale

    def decode(self, z: Tensor) -> Tensor:
        return z * self.scale - self.offset

    def forward(self, z: Tensor) -> Tensor:
        return self.net(self.decode(z))


@contextmanager
def _nothing_left_behind(device: torch.device) -> Iterator[None]:
    """The attack seeds torch's global generators and clears the interpreter's trace function."""
    trace = sys.gettrace()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            sys.settrace(trace)


def _inside(points: Tensor, images: Tensor, inner: Tensor) -> Tensor:
    """`points` pulled towards `images` where they are further than `inner`, (n,), in float64."""
    delta = points.double() - images.double()
    length = delta.flatten(1).norm(dim=1).clamp_min(1e-300)
    pull = (inner / length).clamp_max(1).view(-1, *[1] * (images.dim() - 1))
    return (images.double() + pull * delta).to(images)


def package() -> ModuleType:
    """pyautoattack; a ModuleNotFoundError with the remedy where it is not installed."""
    try:
        import pyautoattack
    except ModuleNotFoundError as error:
        if error.name != "pyautoattack":
            raise
        raise ModuleNotFoundError(
            "--audit runs AutoAttack from the package pyautoattack, which is not installed: "
            "run `pip install pyautoattack==0.2.0` (it needs torch and numpy only)",
            name="pyautoattack",
        ) from error
    return pyautoattack


def autoattack_l2(
    net: nn.Module,
    images: Tensor,
    labels: Tensor,
    eps: float,
    *,
    seed: int = 0,
    budget: Budget = Budget(),
) -> Tensor:
    r"""Points within `eps` of `images` at which AutoAttack's standard ensemble changed the class.

    APGD on the cross-entropy, targeted APGD, targeted FAB, Square, each on what the ones before it
    left standing. Points may leave [0, 1]: see Note [The whole ball]. Whatever the package says of
    its points, :math:`\|x' - x\|_2 \le \epsilon` holds for those returned: they are pulled inside
    in float64, less what rounding to float32 may add. Whether they are adversarial is the caller's
    to check, on the points returned.

    `images` (n, c, h, w), float32, in [0, 1]; `labels` (n,). Returns (n, c, h, w): the image itself
    where nothing was found. TypeError and ValueError for what the package cannot attack: other
    dtypes, pixels outside [0, 1], fewer than four classes.

    Croce and Hein, "Reliable evaluation of adversarial robustness with an ensemble of diverse
    parameter-free attacks" (arXiv:2003.01690).
    """
    if images.dtype != torch.float32:
        raise TypeError(f"images: expected torch.float32, got {images.dtype}")
    if not 0 < eps < math.inf:
        raise ValueError(f"eps must be positive and finite, got {eps}")
    if len(images) == 0:
        return images.clone()
    if not bool(((images >= 0) & (images <= 1)).all()):
        low, high = images.min().item(), images.max().item()
        raise ValueError(f"images: expected pixels in [0, 1], got {low:g} to {high:g}")
    with torch.no_grad():
        classes = net(images[:1]).shape[1]
    if classes < 4:
        raise ValueError(f"AutoAttack's targeted loss needs at least 4 classes, got {classes}")
    # x' is rounded to float32, which moves it by up to 2^-24 |x'|: stay inside by that much.
    rounding = 2.0**-24 * (images.double().flatten(1).norm(dim=1) + eps)
    inner = (eps * (1 - 1e-6) - rounding).clamp_min(0)
    view = _WholeBall(net, eps)
    attack = package().AutoAttack(
        view,
        norm="L2",
        eps=inner.min().item() / view.scale,
        seed=seed,
        version="standard",
        device=images.device,
    )
    attack.apgd_targeted.n_target_classes = min(budget.targets, classes - 1)
    attack.fab.n_target_classes = min(budget.targets, classes - 1)
    attack.square.n_queries = budget.queries
    with _nothing_left_behind(images.device), frozen(net):
        points, _ = attack.run_standard_evaluation(view.encode(images), labels, batch_size=BATCH)
    found = (points != view.encode(images)).flatten(1).any(1).view(-1, *[1] * (images.dim() - 1))
    return torch.where(found, _inside(view.decode(points), images, inner), images)
