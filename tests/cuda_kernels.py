"""Where kernels of csrc/cuda are tested: on a GPU, or in the SIMT shim in any order of threads."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import cases
import pytest
import simt
import torch

from lipkernels import backends
from lipkernels.kernels.cuda import library

DEVICE = torch.device(cases.device_of("cuda"))
SEEDS = (0, 1, 2, 3)


def _why_not() -> str | None:
    reason = backends.why_not("cuda", DEVICE)
    if reason is None and DEVICE.type == "cuda" and not torch.cuda.is_available():
        reason = "no CUDA device"
    return reason and f"{reason}; {simt.why_not() or 'the SIMT library is not the one loaded'}"


# For a file's pytestmark.
MARKS = []
if DEVICE.type == "cuda":
    MARKS.append(pytest.mark.gpu)
if _why_not() is not None:
    MARKS.append(pytest.mark.skip(reason=_why_not()))


@contextlib.contextmanager
def thread_order(seed: int) -> Iterator[None]:
    """In the shim, threads run in the order that ``seed`` draws (0: by number)."""
    if not library.is_simt():
        yield
        return
    choose = library.library().lk_simt_seed
    choose(seed)
    try:
        yield
    finally:
        choose(0)


def in_every_order(call: Callable[[], Any]) -> list[Any]:
    """What ``call`` returns, once for each of ``SEEDS``."""
    found = []
    for seed in SEEDS:
        with thread_order(seed):
            found.append(call())
    return found
