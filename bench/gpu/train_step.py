"""A training step of a network of residual blocks: constrained, all weights in one call, or not.

Forward, loss, backward and optimizer on random images, float32 (convolutions in TF32, torch's
default) and bfloat16 autocast. Every contender trains its own copy; ratios refer to the
unconstrained twin. Of ours, the norm of every constrained weight is measured afterwards.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import lipkernels
from bench import nets
from bench.accuracy import operator_norm
from bench.gpu import launches
from bench.gpu.accuracy import relative_error
from bench.gpu.attempts import attempt
from bench.gpu.ops import TINY
from bench.gpu.queued import stopwatch
from bench.gpu.resnet import CLASSES, Size, build
from bench.gpu.table import Row, Table, options
from bench.memory import peak_bytes
from bench.nets import TWIN
from bench.timing import Budget, interleaved, paired_ratio, spread
from lipkernels.nn.constrained import ConstrainedWeight

NAMES = (
    TWIN,
    "unconstrained, ReLU",
    "lipkernels",
    "lipkernels retract",
    "deel-torchlip",
    "orthogonium",
)
BUDGET = Budget(seconds=12.0, least=5, most=60)
_SAMPLE = 50e-3
_BATCHES = 4


class Training:
    """One network with its optimizer; every call is a training step on the next batch."""

    def __init__(self, name: str, size: Size, batch: int, half: bool, device: torch.device) -> None:
        torch.manual_seed(0)
        self.net = build(name, size).to(device)
        self.device, self.half, self._next = device, half, 0
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=1e-2, momentum=0.9)
        if name == "lipkernels":
            lipkernels.group_weights(self.net)
        elif name == "lipkernels retract":
            lipkernels.Retractor(self.net).attach(self.optimizer)
        shape = (batch, 3, size.image, size.image)
        self.images = [torch.randn(shape, device=device) for _ in range(_BATCHES)]
        self.labels = torch.randint(CLASSES, (batch,), device=device)

    def _precision(self) -> AbstractContextManager:
        half = torch.autocast(self.device.type, dtype=torch.bfloat16)
        return half if self.half else contextlib.nullcontext()

    def loss(self, net: nn.Module, images: Tensor) -> Tensor:
        with self._precision():
            logits = net(images)
        return nn.functional.cross_entropy(logits.to(images.dtype), self.labels)

    def __call__(self) -> None:
        self.optimizer.zero_grad()
        self.loss(self.net, self.images[self._next]).backward()
        self.optimizer.step()
        self._next = (self._next + 1) % len(self.images)

    def accuracy(self) -> dict[str, float | None]:
        """The largest norm of a constrained weight over its promise, less one (ours alone).

        And the error of the gradients, convolutions in TF32 included.
        """
        gradient = None if self.half else self._gradient_error()
        layers = [m for m in self.net.modules() if isinstance(m, ConstrainedWeight)]
        if not layers:
            return {"norm_minus_1": None, "gradient": gradient}
        with self._precision(), torch.no_grad():
            promised = [
                layer.matrix(layer.weight).double() / layer.matrix_scale() for layer in layers
            ]
        norms = [operator_norm(w) - 1.0 for w in promised]
        return {"norm_minus_1": max(norms), "gradient": gradient}

    def _gradient_error(self) -> float:
        """The worst relative error of a parameter's gradient, against this network in float64."""
        wide = copy.deepcopy(self.net).double()
        images = self.images[0][:8]
        labels, self.labels = self.labels, self.labels[:8]
        found = [
            torch.autograd.grad(self.loss(net, x), list(net.parameters()))
            for net, x in ((self.net, images), (wide, images.double()))
        ]
        self.labels = labels
        return max(relative_error(f, e) for f, e in zip(*found, strict=True))


def _versus(samples: Mapping[str, list[float]], name: str) -> dict[str, float] | None:
    return asdict(paired_ratio(samples[name], samples[TWIN])) if TWIN in samples else None


def measure(
    batch: int, half: bool, size: Size, budget: Budget, device: torch.device, missing: set[str]
) -> Row:
    """A row: every contender of :data:`NAMES` but ``missing``."""
    failed: dict[str, str] = {}
    trainings: dict[str, Training] = {}
    for name in NAMES:
        if name in missing:
            continue

        def start(name: str = name) -> Training:
            training = Training(name, size, batch, half, device)
            training()
            return training

        training = attempt(name, start, failed, device)
        if training is not None:
            trainings[name] = training
    watch = stopwatch(device)
    sample = _SAMPLE if budget.seconds else 0.0
    samples = interleaved(trainings, budget, device, stopwatch=watch, sample=sample)
    found: dict[str, dict[str, Any]] = {}
    for name, training in trainings.items():
        values = samples[name]
        found[name] = {
            "step": {
                "ms": asdict(spread([1e3 * s for s in values])),
                "times_first": _versus(samples, name),
                "times_floor": None,
                "rounds": len(values),
            },
            "accuracy": attempt(f"{name}, accuracy", training.accuracy, failed, device),
            "launches": attempt(
                f"{name}, launches",
                lambda t=training: {"step": launches.count(t, device)},
                failed,
                device,
            ),
            "peak_bytes": peak_bytes(training, device) if device.type == "cuda" else None,
        }
    net = next(iter(trainings.values())).net
    return {
        "batch": batch,
        "size": asdict(size),
        "dtype": "bfloat16 autocast" if half else "torch.float32",
        "shapes": [list(p.shape) for p in net.parameters() if p.dim() > 1],
        "optimizer": "SGD(momentum=0.9)",
        "passes": ["step"],
        "first": TWIN,
        "floor": {},
        "contenders": found,
        "failed": failed,
    }


def main(argv: Sequence[str] | None = None) -> int:
    found = options("train_step", "A training step, constrained and unconstrained.", argv)
    tiny, device = found.dry_run, found.device
    size = Size(4, 1, 1, 4) if tiny else Size()
    budget, batches = (TINY, (2, 4)) if tiny else (BUDGET, (128, 512))
    reasons = {name: why for name, why in nets.missing().items() if name in NAMES}
    table = Table("train_step", found, reasons)
    run = partial(measure, size=size, budget=budget, device=device, missing=set(reasons))
    table.measure(
        {
            f"float32, batch {batches[0]}": partial(run, batches[0], False),
            f"bfloat16 autocast, batch {batches[1]}": partial(run, batches[1], True),
        }
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
