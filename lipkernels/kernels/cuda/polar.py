"""The polar factor of every weight of a group, each by a block, or by a cluster of blocks.

A group is one launch, or one for each format of its weights and each size of their clusters: wide
matrices have larger ones. What is computed and saved is what `lipkernels.kernels.triton.polar` has;
csrc/cuda/polar.h says how. The small side is at most 64, or 128 where there are clusters and 176 KB
of shared memory for a block (compute capability 9.0 and 10.0).
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence

import torch
from torch import Tensor

from lipkernels.kernels.cuda.library import FORMATS, INT, POINTER, declared, is_simt
from lipkernels.kernels.cuda.members import members
from lipkernels.reference.rounding import worst_case_factor

CHUNK = 64  # columns that a block works on at a time

_SMALL = 64  # the largest side of lk_polar_small
_LARGE = 128  # of lk_polar_large
_OWN_MARGIN = 1.0 - 2.0**-22  # for roundings of the kernel beyond those of the worst-case factor
_PROBLEM = struct.Struct("6Q 2d 2i")  # PolarProblem
_FLOAT_BYTES = 4
_LARGE_BYTES = 176_384  # of shared memory, for a side of 128

_small = declared("lk_polar_small", POINTER, INT, INT, INT, INT)
_large = declared("lk_polar_large", POINTER, INT, INT, INT, INT)


def has_clusters(device: torch.device) -> bool:
    """Whether blocks of the device can read one another's shared memory."""
    return is_simt() or torch.cuda.get_device_capability(device) >= (9, 0)


def padded_side(m: int) -> int:
    """``m``, rounded up to a size that the kernels have."""
    return next(side for side in (16, 32, _SMALL, _LARGE) if m <= side)


def workspace_size(rows: int, cols: int) -> int:
    """float32 numbers that the kernel needs for a matrix: chunks of X, and of Z."""
    m, n = sorted((rows, cols))
    side = padded_side(m)
    return (math.ceil(n / CHUNK) + math.ceil(side / CHUNK)) * side * CHUNK


def largest_side(device: torch.device) -> int:
    """The largest small side of a matrix that a block of the device can work on."""
    if is_simt():
        return _LARGE
    about = torch.cuda.get_device_properties(device)
    roomy = about.shared_memory_per_block_optin >= _LARGE_BYTES
    return _LARGE if roomy and has_clusters(device) else _SMALL


def cluster_of(rows: int, cols: int, device: torch.device) -> int:
    """Blocks that share the columns of a matrix: by its shape alone, so that bits are too."""
    if not has_clusters(device):
        return 1
    chunks = math.ceil(max(rows, cols) / CHUNK)
    of_each = 1 if min(rows, cols) > _SMALL else 4
    return next((size for size in (8, 4, 2) if chunks >= of_each * size), 1)


def fits(weight: Tensor) -> bool:
    """Whether `forward` takes ``weight``."""
    return weight.dtype in FORMATS and 0 < min(weight.shape[-2:]) <= largest_side(weight.device)


def _multiplier(weight: Tensor, scale: float, dtype: torch.dtype) -> float:
    """What the polar factor is multiplied by: at most ``scale`` after any rounding to ``dtype``."""
    shape = torch.empty(weight.shape[-2:], dtype=torch.float32, device="meta")
    margin = _OWN_MARGIN if dtype == torch.float32 else 1.0
    return scale * worst_case_factor(shape, scale, dtype) * margin


def forward(
    weights: Sequence[Tensor], scales: Sequence[float], dtype: torch.dtype
) -> tuple[list[Tensor], list[Tensor]]:
    """As ``lipkernels::polar_factor``, for weights that `fits` takes."""
    results, saved = [], []
    device = weights[0].device
    launches: dict[tuple[bool, int, int], list[bytes]] = {}
    sizes = [workspace_size(*w.shape[-2:]) for w in weights]
    batches = [math.prod(w.shape[:-2]) for w in weights]
    total = sum(size * n for size, n in zip(sizes, batches, strict=True))
    workspace = torch.empty(total, dtype=torch.float32, device=device)
    kept = [w.contiguous() for w in weights]  # copies among them outlive the launches
    at = workspace.data_ptr()
    for weight, scale, size in zip(kept, scales, sizes, strict=True):
        *batch, rows, cols = weight.shape
        m = min(rows, cols)
        result = torch.empty(weight.shape, dtype=dtype, device=device)
        parts = [
            torch.empty((*batch, *shape), dtype=torch.float32, device=device)
            for shape in ((m, m), (m,), (2,))
        ]
        results.append(result)
        saved += parts
        worst_case = _multiplier(weight, scale, dtype)
        kind = (m > _SMALL, FORMATS[weight.dtype], cluster_of(rows, cols, device))
        launch = launches.setdefault(kind, [])
        for addresses in members([weight, result, *parts]):
            launch.append(_PROBLEM.pack(*addresses, at, scale, worst_case, rows, cols))
            at += size * _FLOAT_BYTES
    for (is_large, kind, cluster), problems in launches.items():
        run = _large if is_large else _small
        run(device, b"".join(problems), len(problems), kind, FORMATS[dtype], cluster)
    return results, saved
