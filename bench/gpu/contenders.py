"""Who constrains weights: our backends, the reference, the other libraries, a strong baseline."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from bench import peers
from bench.gpu import baselines, implementations
from bench.gpu.implementations import REFERENCE
from bench.gpu.queued import Work, copies
from bench.gpu.rows import OURS, Contender
from bench.gpu.shapes import another
from lipkernels import functional as F

PEERS = tuple(name for name in peers.BUILDERS if name != peers.OURS)
COMPOSITION = "torch composition"  # of the same maths: the reference backend
BASELINE = f"Bjorck-{baselines.STEPS}, TF32"
KERNELS = ("triton", "cuda")  # backends for a GPU, which a CUDA graph can hold

Function = Callable[[list[Tensor], str], Sequence[Tensor]]


def _list(found: Sequence[Tensor] | tuple[Sequence[Tensor], object]) -> Sequence[Tensor]:
    """The constrained weights of a function that returns power-iteration vectors besides."""
    return found[0] if isinstance(found, tuple) else found  # pyright: ignore[reportReturnType]


WEIGHT_OPS: dict[str, Function] = {
    "polar_factor": lambda w, b: F.polar_factor(w, backend=b),
    "bjorck": lambda w, b: _list(F.bjorck(w, backend=b)),
    "spectral_normalize": lambda w, b: _list(F.spectral_normalize(w, backend=b)),
    "frobenius_normalize": lambda w, b: F.frobenius_normalize(w, backend=b),
    "power_iteration": lambda w, b: F.power_iteration(w, backend=b)[0],  # sigma
    "retract": lambda w, b: F.retract(w, backend=b),
}


def work(
    function: Function, backend: str, inputs: Sequence[Tensor], cotangents: Sequence[Tensor]
) -> Work:
    """``function`` of ``inputs``, which become leaves of autograd (the same memory)."""
    leaves = [x.detach().requires_grad_(x.is_floating_point()) for x in inputs]
    return Work(lambda: function(leaves, backend), leaves, cotangents)


def exact(
    function: Function, inputs: Sequence[Tensor], cotangents: Sequence[Tensor]
) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """Results and gradients of the reference in float64; no cotangents: no gradients."""
    wide = work(function, REFERENCE, [x.double() for x in inputs], [g.double() for g in cotangents])
    return wide.both() if cotangents else (wide.forward(), ())


def own(
    op: str, function: Function, problems: Sequence[tuple[list[Tensor], list[Tensor]]]
) -> tuple[dict[str, Contender], dict[str, str]]:
    """Our backends for ``op`` on each problem (inputs, cotangents); whose kernels are missing."""
    able, missing = implementations.of(op, problems[0][0][0].device)

    def make(backend: str) -> list[Work]:
        return [work(function, backend, *problem) for problem in problems]

    found = {
        COMPOSITION if name == REFERENCE else f"{OURS} {name}": Contender(
            partial(make, name), graph=name in KERNELS
        )
        for name in able
    }
    return found, {f"{OURS} {n}": reason for n, reason in missing.items() if n in KERNELS}


def _held(name: str, weights: Sequence[Tensor], cotangents: Sequence[Tensor]) -> Work:
    layers = [peers.hold(name, weight) for weight in weights]
    return Work(lambda: [h.weight() for h in layers], [h.raw for h in layers], cotangents)


def others(
    problems: Sequence[tuple[list[Tensor], list[Tensor]]],
) -> tuple[dict[str, Contender], dict[str, str]]:
    """The peers that are installed, a layer for each weight, and the strong baseline; the missing.

    One copy of each peer: its layers take far longer than reading their weights.
    """
    missing = peers.missing({name: peers.MODULES[name] for name in PEERS})
    weights = problems[0][0]
    found = {
        BASELINE: Contender(
            lambda: [baselines.batched_bjorck(*p) for p in problems],
            eager=False,
            graph=True,
            order=baselines.unbatched(weights),
        )
    }
    for name in PEERS:
        if name not in missing:
            # torch's orthogonal starts from another matrix: no polar factor to compare with.
            order = None if name == "torch orthogonal" else list
            found[name] = Contender(partial(lambda n: [_held(n, *problems[0])], name), order=order)
    return found, missing


def rotated(
    weights: list[Tensor], cotangents: list[Tensor], device: torch.device
) -> list[tuple[list[Tensor], list[Tensor]]]:
    """Copies of a problem with weights of the same singular values, as many as pass the cache."""
    nbytes = sum(2 * x.nbytes for x in (*weights, *cotangents))  # and results, and gradients
    return [
        (weights, cotangents)
        if i == 0
        else (another(weights, seed=i), [g.clone() for g in cotangents])
        for i in range(copies(nbytes, device))
    ]
