"""Weight ops compute in their own precision, whatever autocast region calls them."""

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def without_autocast(implementation: Callable[P, R]) -> Callable[P, R]:
    """``implementation`` with autocast off, so that its matrix products are not rounded to half."""

    @functools.wraps(implementation)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        if not (torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda")):
            return implementation(*args, **kwargs)  # entering a region takes ten microseconds
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            return implementation(*args, **kwargs)

    return wrapped
