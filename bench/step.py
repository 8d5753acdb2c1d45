"""Time and memory of a whole training step: forward, loss, backward, optimizer, constraint.

Every contender trains its own copy of the network on the same batches of digits with the same loss,
one step in each round; so that after the last round the Lipschitz constants can be compared too.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

import lipkernels
import lipkernels.nn as lnn
from bench import nets
from bench.lipschitz import bracket
from bench.memory import kept_bytes, peak_bytes
from bench.nets import TWIN
from bench.timing import Budget, interleaved, paired_ratio, spread
from lipkernels.demo import data
from lipkernels.demo.nets import describe
from lipkernels.demo.preset import FULL

BATCH, RATE = FULL.batch, 3e-3
BUDGET = Budget(seconds=45.0, least=5, most=100)
# Jacobians are taken at this many images of the held-out part.
JACOBIANS = 32

Batches = list[tuple[Tensor, Tensor]]


@functools.cache
def digits() -> data.Digits:
    """The demo's images."""
    return data.load()


def batches(device: torch.device) -> Batches:
    """The training images in batches, once through."""
    images, labels = digits().train_images.to(device), digits().train_labels.to(device)
    full = len(images) // BATCH * BATCH
    pairs = zip(images[:full].split(BATCH), labels[:full].split(BATCH), strict=True)
    return list(pairs)


class Training:
    """One network with its optimizer; every call is a training step."""

    def __init__(self, name: str, model: str, work: Batches) -> None:
        torch.manual_seed(0)
        self.net = nets.build(name, model).to(work[0][0].device)
        self.loss = lnn.MarginCrossEntropyLoss(temperature=FULL.temperature, offset=FULL.offset)
        self.optimizer = torch.optim.Adam(self.net.parameters(), lr=RATE)
        self.work, self.steps = work, 0
        if name == "lipkernels":
            lipkernels.group_weights(self.net)
        elif name == "lipkernels retract":
            retractor = lipkernels.Retractor(self.net)  # pyright: ignore[reportAttributeAccessIssue]
            retractor.attach(self.optimizer)

    def forward(self) -> Tensor:
        images, labels = self.work[self.steps % len(self.work)]
        return self.loss(self.net(images), labels)

    def clear(self) -> None:
        """Free the last step's gradients."""
        self.optimizer.zero_grad()

    def __call__(self) -> None:
        self.clear()
        self.forward().backward()
        self.optimizer.step()
        self.steps += 1

    def kept_bytes(self) -> int:
        known = [*self.net.parameters(), *self.net.buffers()]
        known += [x for batch in self.work for x in batch]
        return kept_bytes(lambda: [self.forward()], known)


def measure(
    model: str,
    names: Sequence[str],
    budget: Budget,
    device: torch.device | None = None,
) -> dict[str, Any]:
    """All ``names`` (of :mod:`bench.nets`) on the demo's ``model``, "mlp" or "conv"."""
    device = device or torch.device("cpu")
    work = batches(device)
    trainings = {name: Training(name, model, work) for name in names}
    samples = interleaved(trainings, budget, device, one_call=True)
    images = digits().test_images[:JACOBIANS].to(device)
    contenders = {}
    for name, training in trainings.items():
        steps = training.steps
        lipschitz = bracket(training.net, images)
        training.clear()  # for everyone, the peak holds one set of gradients
        contenders[name] = {
            "ms": asdict(spread([1e3 * s for s in samples[name]])),
            "times_twin": asdict(paired_ratio(samples[name], samples[TWIN])),
            "peak_bytes": peak_bytes(training, device),
            "kept_bytes": training.kept_bytes(),
            "lipschitz_at_least": lipschitz.at_least,
            "lipschitz_at_most": lipschitz.at_most,
            "steps": steps,
        }
    net: nn.Module = trainings[TWIN].net
    return {
        "case": model,
        "shape": describe(net),
        "weights_bytes": sum(p.nbytes for p in net.parameters()),
        "batch": BATCH,
        "optimizer": f"Adam(lr={RATE})",
        "rounds": len(samples[TWIN]),
        "contenders": contenders,
        "samples": samples,
    }
