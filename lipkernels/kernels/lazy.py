"""Functions of an optional backend, imported when they are first called."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lipkernels.kernels.cuda import library as _library  # noqa: F401 (says if there is none)


def _is_elsewhere(first: Tensor | list[Tensor]) -> bool:
    """Whether the tensors of a call are on another GPU than the current one."""
    device = (first if isinstance(first, Tensor) else first[0]).device
    return device.type == "cuda" and device.index != torch.cuda.current_device()


def _lazily(backend: str, family: str, name: str, **settings: Any) -> Callable[..., Any]:
    """``lipkernels.kernels.<backend>.<family>.<name>``, imported when it is first called.

    Kernels are launched on the current device, which a call makes that of its first argument: a
    tensor, or a list with at least one.
    """

    @functools.cache
    def loaded() -> Callable[..., Any]:
        return getattr(importlib.import_module(f"lipkernels.kernels.{backend}.{family}"), name)

    def call(first: Tensor | list[Tensor], *args: Any) -> Any:
        if _is_elsewhere(first):
            with torch.cuda.device((first if isinstance(first, Tensor) else first[0]).device):
                return loaded()(first, *args, **settings)
        return loaded()(first, *args, **settings)

    return call


def from_triton(family: str, name: str, **settings: Any) -> Callable[..., Any]:
    """A function of :mod:`lipkernels.kernels.triton` with ``settings``; this imports Triton.

    `lipkernels.backends` calls it only where Triton is installed.
    """
    return _lazily("triton", family, name, **settings)


def from_cuda(family: str, name: str) -> Callable[..., Any]:
    """A function of :mod:`lipkernels.kernels.cuda`.

    `lipkernels.backends` calls it only where the library is.
    """
    return _lazily("cuda", family, name)
