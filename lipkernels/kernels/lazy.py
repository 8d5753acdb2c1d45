"""Functions of an optional backend, imported when they are first called."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any


def from_triton(family: str, name: str) -> Callable[..., Any]:
    """``lipkernels.kernels.triton.<family>.<name>``; importing it imports Triton.

    `lipkernels.backends` calls it only where Triton is installed.
    """

    @functools.cache
    def loaded() -> Callable[..., Any]:
        return getattr(importlib.import_module(f"lipkernels.kernels.triton.{family}"), name)

    def call(*args: Any) -> Any:
        return loaded()(*args)

    return call
