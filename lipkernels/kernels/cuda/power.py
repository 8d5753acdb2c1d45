"""Power iteration on a group of weights that fit on the chip: all rounds in one launch.

csrc/cuda/power.cu reads a matrix once, and keeps it in the shared memory of one block (a
multiprocessor has 227 KB on sm_90 and sm_100, 163 on sm_80, 99 on sm_120) or, from sm_90 on, of a
cluster of 2, 4 or 8. Matrices for clusters of one size make one launch, of up to 64.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from lipkernels.kernels.cuda.library import FORMATS, INT, INT64, POINTER, check, declared, library
from lipkernels.kernels.cuda.members import members

_SIZES_OF_CLUSTERS = (1, 2, 4, 8)

_run = declared("lk_power_iteration", POINTER, INT, INT, INT, INT)


class _Problem(ctypes.Structure):
    """The struct Problem of power.cu."""

    _fields_ = (
        *((name, POINTER) for name in ("w", "u", "sigma", "left", "right")),
        *((name, INT) for name in ("rows", "cols")),
    )


@functools.lru_cache(maxsize=64)
def _room(index: int) -> tuple[int, int]:
    """What a device has: bytes of shared memory for a block, and blocks for a cluster."""
    function = library().lk_power_iteration_room
    function.argtypes, function.restype = (INT, POINTER, POINTER), INT
    size, cluster = INT(), INT()
    check(function(index, ctypes.byref(size), ctypes.byref(cluster)))
    return size.value, cluster.value


@functools.lru_cache(maxsize=4096)
def _cluster(rows: int, cols: int, itemsize: int, room: tuple[int, int]) -> int | None:
    """The blocks of the smallest cluster that has room for a matrix; None: not even the largest."""
    function = library().lk_power_iteration_bytes
    function.argtypes, function.restype = (INT, INT, INT, INT), INT64
    for cluster in _SIZES_OF_CLUSTERS:
        if cluster <= room[1] and function(rows, cols, itemsize, cluster) <= room[0]:
            return cluster
    return None


def _cluster_of(weight: Tensor) -> int | None:
    rows, cols = weight.shape[-2:]
    index = weight.device.index if weight.device.type == "cuda" else 0
    return _cluster(rows, cols, weight.element_size(), _room(index))


def fits(weight: Tensor) -> bool:
    """Whether `power_iteration` takes ``weight``."""
    return weight.dtype in FORMATS and _cluster_of(weight) is not None


def _start(u: Tensor) -> Tensor:
    """``u`` in float32; where that has too few exponents, divided by its largest entry."""
    if u.dtype == torch.float64:
        tiny = torch.finfo(u.dtype).tiny
        u = u / u.abs().amax(-1, keepdim=True).clamp_min(tiny)
    return u.float().contiguous()


def power_iteration(
    weights: Sequence[Tensor], us: Sequence[Tensor], n_iter: int
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """As ``lipkernels::power_iteration``, for weights that `fits` takes."""
    device = weights[0].device
    kept = [w.contiguous() for w in weights], [_start(u) for u in us]  # they outlive the launches
    sigmas, lefts, rights = [], [], []
    launches: dict[tuple[int, int | None], list[tuple[int, ...]]] = {}
    for weight, u in zip(*kept, strict=True):
        *batch, rows, cols = weight.shape
        parts = [weight, u]
        for found, shape in ((sigmas, batch), (lefts, (*batch, rows)), (rights, (*batch, cols))):
            found.append(torch.empty(shape, dtype=torch.float32, device=device))
            parts.append(found[-1])
        problems = launches.setdefault((FORMATS[weight.dtype], _cluster_of(weight)), [])
        problems += [(*addresses, rows, cols) for addresses in members(parts)]
    for (kind, cluster), problems in launches.items():
        array = (_Problem * len(problems))(*problems)
        _run(device, array, len(problems), kind, n_iter, cluster)
    return sigmas, lefts, rights
