"""The named Bjorck iteration of every weight of a group, and its exact gradient: one launch each.

What is computed and saved is what `lipkernels.kernels.triton.bjorck` has; csrc/cuda/bjorck.cu says
how. The small side is at most 64. A batch of matrices stops together, where all of them would: only
batches of one are taken.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence

import torch
from torch import Tensor

from lipkernels.kernels.cuda.library import DOUBLE, FORMATS, INT, POINTER, declared
from lipkernels.kernels.cuda.polar import CHUNK
from lipkernels.reference.rounding import worst_case_factor

_SIDE = 64
_OWN_MARGIN = 1.0 - 2.0**-21  # as lipkernels.kernels.triton.bjorck
_PROBLEM = struct.Struct("7Q 3d 2i")  # Problem of csrc/cuda/bjorck.cu
_FLOAT_BYTES = 4
_SAVED_PER_WEIGHT = 3  # sigma, u, v

_run = declared("lk_bjorck", POINTER, INT, INT, INT, INT, INT, DOUBLE, DOUBLE, DOUBLE)


def fits(weight: Tensor) -> bool:
    """Whether `forward` and `backward` take ``weight``."""
    *batch, rows, cols = weight.shape
    return weight.dtype in FORMATS and 0 < min(rows, cols) <= _SIDE and math.prod(batch) == 1


def _wide_size(weight: Tensor) -> int:
    """float32 numbers of one X in the workspace."""
    m, n = sorted(weight.shape[-2:])
    return (16 if m <= 16 else _SIDE) * math.ceil(n / CHUNK) * CHUNK


def _factor(weight: Tensor, scale: float, dtype: torch.dtype) -> float:
    shape = torch.empty(weight.shape[-2:], dtype=torch.float32, device="meta")
    return worst_case_factor(shape, scale, dtype)


def _by_formats(tensors: Sequence[Tensor], others: Sequence[Tensor]) -> dict[tuple, list[int]]:
    """The positions of each pair of formats."""
    found: dict[tuple, list[int]] = {}
    for i, pair in enumerate(zip(tensors, others, strict=True)):
        found.setdefault(tuple(FORMATS[t.dtype] for t in pair), []).append(i)
    return found


def _problems(
    members: Sequence[int],
    pointers: Sequence[Sequence[Tensor]],
    workspace: Tensor,
    sizes: Sequence[int],
    numbers: Sequence[tuple[float, float, float]],
) -> bytes:
    packed, at = [], workspace.data_ptr()
    for i in members:
        addresses = [tensors[i].data_ptr() for tensors in pointers]
        packed.append(_PROBLEM.pack(*addresses, at, *numbers[i], *pointers[0][i].shape[-2:]))
        at += sizes[i] * _FLOAT_BYTES
    return b"".join(packed)


def forward(
    weights: Sequence[Tensor],
    us: Sequence[Tensor],
    scales: Sequence[float],
    dtype: torch.dtype,
    beta: float,
    n_iter: int,
    tol: float,
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """As ``lipkernels::bjorck``, for weights that `fits` takes."""
    device = weights[0].device
    kept = [w.contiguous() for w in weights]
    results = [torch.empty_like(w, dtype=dtype) for w in kept]
    sigmas, lefts, rights = (
        [torch.empty(shape, dtype=torch.float64, device=device) for shape in shapes]
        for shapes in (
            [w.shape[:-2] for w in kept],
            [w.shape[:-1] for w in kept],
            [(*w.shape[:-2], w.shape[-1]) for w in kept],
        )
    )
    own = _OWN_MARGIN if dtype == torch.float32 else 1.0  # in half precision the kernel's
    numbers = [
        (scale, scale * _factor(w, scale, dtype) * own, _factor(w, 1.0, torch.float32))
        for w, scale in zip(kept, scales, strict=True)
    ]
    sizes = [2 * _wide_size(w) for w in kept]
    workspace = torch.empty(sum(sizes), dtype=torch.float32, device=device)
    pointers = (kept, kept, results, sigmas, lefts, rights)
    for formats, members in _by_formats(kept, results).items():
        problems = _problems(members, pointers, workspace, sizes, numbers)
        settings = (0, n_iter, beta, tol, _OWN_MARGIN)
        _run(device, problems, len(members), *formats, *settings)
    new_us = [left.to(u.dtype, copy=True) for left, u in zip(lefts, us, strict=True)]
    saved = [tensor for triplet in zip(sigmas, lefts, rights, strict=True) for tensor in triplet]
    return results, new_us, saved


def backward(
    grads: Sequence[Tensor],
    weights: Sequence[Tensor],
    saved: Sequence[Tensor],
    scales: Sequence[float],
    beta: float,
    n_iter: int,
    tol: float,
) -> list[Tensor]:
    """As ``lipkernels::bjorck_backward``, with what :func:`forward` saved."""
    device = weights[0].device
    kept = [w.contiguous() for w in weights]
    incoming = [(g if g.dtype in FORMATS else g.float()).contiguous() for g in grads]
    out = [torch.empty_like(w) for w in kept]
    triplets = [saved[k::_SAVED_PER_WEIGHT] for k in range(_SAVED_PER_WEIGHT)]
    numbers = [
        (scale, 0.0, _factor(w, 1.0, torch.float32)) for w, scale in zip(kept, scales, strict=True)
    ]
    sizes = [(n_iter + 2) * _wide_size(w) for w in kept]
    workspace = torch.empty(sum(sizes), dtype=torch.float32, device=device)
    pointers = (kept, incoming, out, *triplets)
    for formats, members in _by_formats(kept, incoming).items():
        problems = _problems(members, pointers, workspace, sizes, numbers)
        settings = (1, n_iter, beta, tol, 1.0)
        _run(device, problems, len(members), *formats, *settings)
    return out
