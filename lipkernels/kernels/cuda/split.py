"""Who computes which weights of a list, on the backend "cuda".

A family's kernels keep a matrix on the chip: its ``fits(weight)`` says whether this one does. The
others go to Triton where that can run, and to the reference where it cannot, as float64 weights
always do. The list of one call may be mixed; each part of it is one call of its implementation.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lipkernels import backends
from lipkernels.kernels.shared import Names


@functools.cache
def _fits(family: str) -> Callable[[Tensor], bool]:
    return importlib.import_module(f"lipkernels.kernels.cuda.{family}").fits


def _name(weight: Tensor, family: str) -> str:
    if weight.dtype == torch.float64:
        return "reference"
    if _fits(family)(weight):
        return "cuda"
    return "triton" if backends.why_not("triton", weight.device) is None else "reference"


def by_size(family: str) -> Names:
    """Says "cuda", "triton" or "reference" of each weight."""

    def names(weights: Sequence[Tensor]) -> list[str]:
        return [_name(weight, family) for weight in weights]

    return names


def backward_by_size(family: str, forward: str) -> Names:
    """The same for a backward with kernels in ``family``, of a forward with kernels in ``forward``.

    "cuda" and "triton" save the same for backward, and the reference something else: it
    differentiates what it computed, and nobody else does. "recomputed" is what the others
    computed, where only the reference can differentiate.
    """

    def names(weights: Sequence[Tensor]) -> list[str]:
        found = []
        for weight in weights:
            name = _name(weight, forward)
            if name != "reference":
                name = _name(weight, family)
                name = "recomputed" if name == "reference" else name
            found.append(name)
        return found

    return names
