"""One training loop for both networks."""

import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm import tqdm

from lipkernels import Retractor, grouped
from lipkernels.demo.data import Digits, random_shift


@dataclass(frozen=True)
class Recipe:
    """What a training run is made of; `peak` is the highest learning rate of the one-cycle."""

    epochs: int
    peak: float
    batch: int = 128
    warm_up: float = 0.2
    shift: int = 1
    beta2: float = 0.999


# How the constraint of a network is held in training; "no" for one that has none.
HOLDS = ("retract", "reparametrize", "no")


@dataclass(frozen=True)
class Timing:
    """Seconds in all, and the median milliseconds of a step (forward, backward, optimizer)."""

    seconds: float
    ms_per_step: float
    steps: int


def fit(
    net: nn.Module,
    loss: Callable[[Tensor, Tensor], Tensor],
    digits: Digits,
    recipe: Recipe,
    seed: int,
    hold: str = "no",
    title: str = "training",
) -> Timing:
    """Train `net` in place: Adam, one-cycle learning rate, random shifts of whole pixels.

    Two calls with the same seed see the same batches and the same shifts. `hold` is one of HOLDS.
    """
    if hold not in HOLDS:
        raise ValueError(f"hold: expected one of {HOLDS}, got {hold!r}")
    generator = torch.Generator().manual_seed(seed)
    images, labels = digits.train_images, digits.train_labels
    batches = -(-len(images) // recipe.batch)
    steps = recipe.epochs * batches
    optimizer = torch.optim.Adam(net.parameters(), lr=recipe.peak, betas=(0.9, recipe.beta2))
    holding: AbstractContextManager = nullcontext()
    if hold == "retract":
        holding = Retractor(net).attach(optimizer)
    elif hold == "reparametrize":
        holding = grouped(net)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=recipe.peak, total_steps=steps, pct_start=recipe.warm_up
    )
    net.train()
    laps = []
    start = time.perf_counter()
    # disable=None: no bar where nobody watches one (a log file, CI).
    with holding, tqdm(total=steps, desc=title, unit="step", disable=None, leave=False) as bar:
        for epoch in range(recipe.epochs):
            total = torch.zeros((), device=images.device)
            order = torch.randperm(len(images), generator=generator).to(images.device)
            for batch in order.split(recipe.batch):
                lap = time.perf_counter()
                x = random_shift(images[batch], recipe.shift, generator)
                optimizer.zero_grad()
                value = loss(net(x), labels[batch])
                value.backward()
                optimizer.step()
                schedule.step()
                if images.device.type == "cuda":
                    torch.cuda.synchronize(images.device)
                laps.append(time.perf_counter() - lap)
                total += value.detach()
                bar.update()
            bar.set_postfix(epoch=epoch + 1, loss=f"{total.item() / batches:.3f}")
    net.eval()
    return Timing(time.perf_counter() - start, 1000 * statistics.median(laps), steps)
