"""A number that tells whether a tensor's bytes are still the same ones."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from lipkernels.kernels.cpu import library as cpu

# Odd multipliers from a linear congruential generator (Knuth's MMIX), as signed 64-bit integers.
_MULTIPLIER, _INCREMENT = 6364136223846793005, 1442695040888963407


@functools.lru_cache(maxsize=64)
def _multipliers(n: int, device: torch.device) -> Tensor:
    # x -> a x + c in wrapping arithmetic, unrolled: powers of a, and the sums of them.
    powers = torch.full((n,), _MULTIPLIER, dtype=torch.int64, device=device).cumprod(0)
    return (powers + _INCREMENT * torch.arange(n, dtype=torch.int64, device=device)) | 1


def _by_torch(x: Tensor) -> int:
    flat = x.detach().reshape(-1)
    words = flat.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.itemsize])
    return int((words.long() * _multipliers(flat.numel(), x.device)).sum())


def fingerprint(x: Tensor) -> int:
    """64 bits of ``x``'s bytes: a change goes unseen with a chance of about 2^-64.

    It finds accidents, not adversaries. Two tensors are compared only if their devices agree.
    """
    if cpu.is_built() and x.device.type == "cpu" and x.is_contiguous():
        return cpu.library().lk_fingerprint(x.data_ptr(), x.numel() * x.element_size())
    return _by_torch(x)
