"""One contender's failure is written down, and the others are measured all the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

T = TypeVar("T")
_LONGEST = 300


def reason(error: BaseException) -> str:
    """The kind of the error and the beginning of what it says."""
    said = " ".join(str(error).split())
    return f"{type(error).__name__}: {said}"[:_LONGEST]


def attempt(
    name: str, call: Callable[[], T], failed: dict[str, str], device: torch.device
) -> T | None:
    """``call()``, or None, and why under ``failed[name]``. Raises if the device is lost with it."""
    try:
        result = call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    # Anything: a kernel that does not compile, a peer's bug, no memory left.
    except Exception as error:
        failed[name] = reason(error)
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # after an illegal access every call raises
        return None
    return result
