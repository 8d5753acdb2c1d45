"""The gradient of the polar factor of every weight of a group, each by a block or a cluster.

What is computed is what `lipkernels.kernels.triton.polar_backward` does, from what either forward
saved; csrc/cuda/polar_backward.h says how. One launch for the matrices of a group with clusters of
one size, those of a small side up to 64 and the others each.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence

import torch
from torch import Tensor

from lipkernels.kernels.cuda import polar
from lipkernels.kernels.cuda.library import FORMATS, INT, POINTER, declared
from lipkernels.kernels.cuda.members import members
from lipkernels.kernels.cuda.polar import cluster_of, fits, padded_side

SAVED_PER_WEIGHT = 3  # factor, spectrum, scalars: see `lipkernels.kernels.polar`
_SMALL = 64  # the largest side of lk_polar_backward_small
_PROBLEM = struct.Struct("7Q d 2i")  # GradientProblem

_small = declared("lk_polar_backward_small", POINTER, INT, INT, INT, INT)
_large = declared("lk_polar_backward_large", POINTER, INT, INT, INT, INT)

__all__ = ["backward", "fits"]


def _in_float32(
    weights: Sequence[Tensor], results: Sequence[Tensor], saved: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """``results`` and ``saved`` with the polar factors that were rounded to other formats again.

    A rounded result is not accurate enough to differentiate with, and keeping a second copy would
    cost memory.
    """
    results, saved = list(results), list(saved)
    rounded_ones = [i for i, result in enumerate(results) if result.dtype != torch.float32]
    if rounded_ones:
        again, others = polar.forward(
            [weights[i] for i in rounded_ones], [1.0] * len(rounded_ones), torch.float32
        )
        for k, i in enumerate(rounded_ones):
            results[i] = again[k]
            saved[SAVED_PER_WEIGHT * i : SAVED_PER_WEIGHT * (i + 1)] = others[
                SAVED_PER_WEIGHT * k : SAVED_PER_WEIGHT * (k + 1)
            ]
    return results, saved


def backward(
    grads: Sequence[Tensor],
    weights: Sequence[Tensor],
    results: Sequence[Tensor],
    saved: Sequence[Tensor],
    scales: Sequence[float],
) -> list[Tensor]:
    """As ``lipkernels::polar_factor_backward``, for weights that `fits` takes."""
    device = weights[0].device
    results, saved = _in_float32(weights, results, saved)
    out = [torch.empty_like(w, memory_format=torch.contiguous_format) for w in weights]
    clusters = [cluster_of(w.shape[-2], w.shape[-1], device) for w in weights]
    sizes = [
        cluster * padded_side(min(w.shape[-2:])) ** 2
        for w, cluster in zip(weights, clusters, strict=True)
    ]
    batches = [math.prod(w.shape[:-2]) for w in weights]
    total = sum(size * n for size, n in zip(sizes, batches, strict=True))
    workspace = torch.empty(total, dtype=torch.float32, device=device)
    kept = []  # copies among them outlive the launches
    at = workspace.data_ptr()
    launches: dict[tuple[bool, int, int, int], list[bytes]] = {}
    for i, (grad, gradient) in enumerate(zip(grads, out, strict=True)):
        rows, cols = gradient.shape[-2:]
        grad = (grad if grad.dtype in FORMATS else grad.float()).contiguous()
        parts = saved[SAVED_PER_WEIGHT * i : SAVED_PER_WEIGHT * (i + 1)]
        tensors = [t.contiguous() for t in (results[i], *parts)]
        kept.append((grad, tensors))
        is_large = min(rows, cols) > _SMALL
        kind = (is_large, FORMATS[grad.dtype], FORMATS[gradient.dtype], clusters[i])
        problems = launches.setdefault(kind, [])
        for addresses in members([grad, *tensors, gradient]):
            problems.append(_PROBLEM.pack(*addresses, at, scales[i], rows, cols))
            at += workspace.element_size() * sizes[i]
    for (is_large, *formats, cluster), problems in launches.items():
        run = _large if is_large else _small
        run(device, b"".join(problems), len(problems), *formats, cluster)
    return out
