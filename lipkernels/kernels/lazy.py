"""Functions of an optional backend, imported when they are first called."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def _is_elsewhere(first: Tensor | list[Tensor]) -> bool:
    """Whether the tensors of a call are on another GPU than the current one."""
    device = (first if isinstance(first, Tensor) else first[0]).device
    return device.type == "cuda" and device.index != torch.cuda.current_device()


def from_triton(family: str, name: str, **settings: Any) -> Callable[..., Any]:
    """``lipkernels.kernels.triton.<family>.<name>`` with ``settings``; importing it imports Triton.

    `lipkernels.backends` calls it only where Triton is installed. Triton launches on the current
    device, which a call makes that of its first argument: a tensor, or a list with at least one.
    """

    @functools.cache
    def loaded() -> Callable[..., Any]:
        return getattr(importlib.import_module(f"lipkernels.kernels.triton.{family}"), name)

    def call(first: Tensor | list[Tensor], *args: Any) -> Any:
        if _is_elsewhere(first):
            with torch.cuda.device((first if isinstance(first, Tensor) else first[0]).device):
                return loaded()(first, *args, **settings)
        return loaded()(first, *args, **settings)

    return call
