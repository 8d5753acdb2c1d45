"""Many small weights: `lipkernels.group_weights(model)` against one call for each layer."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

import lipkernels
from bench import peers
from bench.accuracy import errors, truth
from bench.cases import Case
from bench.memory import kept_bytes
from bench.peers import OURS, Held
from bench.timing import Budget, interleaved, paired_ratio, spread

COUNT, SHAPE = 16, (32, 288)
GROUPED = f"{OURS} grouped"
BUDGET = Budget(seconds=10.0, least=10)


class Weights(nn.Module):
    """A model whose forward computes the constrained weights of its layers, and nothing else."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self) -> list[Tensor]:
        return [layer.weight for layer in self.layers]  # pyright: ignore[reportReturnType]


def _step(model: Weights, held: Sequence[Held], cotangents: list[Tensor]) -> Callable[[], None]:
    def step() -> None:
        for h in held:
            h.raw.grad = None
        torch.autograd.backward(model(), cotangents)

    return step


def _worst(values: Sequence[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return max(known) if known else None


def measure(
    kind: str,
    names: Sequence[str],
    budget: Budget,
    clock: Callable[[], float] = time.perf_counter,
    device: torch.device | None = None,
) -> dict[str, Any]:
    """16 weights of 32x288 in every way that ``names`` (of :mod:`bench.peers`) offer.

    Ratios refer to our grouped call; errors are those of the worst of the 16.
    """
    device = device or torch.device("cpu")
    pairs = [Case(*SHAPE, kind, seed).tensors(device) for seed in range(COUNT)]
    weights, cotangents = [w for w, _ in pairs], [g for _, g in pairs]
    exact = [truth(w, g) for w, g in pairs]
    held = {name: [peers.hold(name, w) for w in weights] for name in names}
    if OURS in names:
        held = {GROUPED: [peers.hold(OURS, w) for w in weights], **held}
    models = {name: Weights([h.layer for h in hs]).train() for name, hs in held.items()}
    if GROUPED in models:
        lipkernels.group_weights(models[GROUPED])
    steps = {name: _step(models[name], hs, cotangents) for name, hs in held.items()}
    samples = interleaved(steps, budget, device, clock=clock)
    contenders = {}
    for name, hs in held.items():
        steps[name]()
        found = [
            errors(w, h.raw.grad, e, h.is_polar)
            for w, h, e in zip(models[name](), hs, exact, strict=True)
            if h.raw.grad is not None
        ]
        columns = {key: _worst([asdict(e)[key] for e in found]) for key in asdict(found[0])}
        kept = kept_bytes(models[name], [h.raw for h in hs])
        contenders[name] = {
            "ms": asdict(spread([1e3 * s for s in samples[name]])),
            "times_ours": asdict(paired_ratio(samples[name], samples[GROUPED])),
            "kept_over_weight": kept / sum(w.nbytes for w in weights),
            **columns,
        }
    return {
        "case": f"{COUNT} x {SHAPE[0]}x{SHAPE[1]}-{kind}",
        "count": COUNT,
        "shape": list(SHAPE),
        "kind": kind,
        "condition": max(e.condition for e in exact),
        "rounds": len(samples[GROUPED]),
        "contenders": contenders,
        "samples": samples,
    }
