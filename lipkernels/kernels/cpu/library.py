"""Loads the library built from csrc/cpu, and says why where there is none.

It is plain C++ behind a C interface: arrays of addresses and sizes go in, an error code comes out.
torch is imported first, so that both share one OpenMP runtime and its threads.
"""

from __future__ import annotations

import ctypes
import os
import pathlib

import torch
from torch import Tensor

from lipkernels import backends

_ABI_VERSION = 5
_POINTER, _INT, _INT64 = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
_DOUBLE = ctypes.c_double
_SIGNATURES = {
    "lk_polar_forward": (_INT64, _POINTER, _POINTER, _POINTER, _INT),
    "lk_polar_backward": (_INT64, _POINTER, _POINTER, _INT),
    "lk_polar_forward_one": (*[_INT64] * 5, _DOUBLE, _DOUBLE, _INT),
    "lk_polar_backward_one": (*[_INT64] * 6, _DOUBLE, _INT),
    "lk_polar_retract": (_INT64, _POINTER, _POINTER, _POINTER, _INT),
    "lk_polar_project": (_INT64, _POINTER, _POINTER, _INT),
    "lk_polar_gram": (_INT64, _POINTER, _INT),
    "lk_polar_from_eigenvectors": (_INT64, _POINTER, _POINTER, _INT),
    "lk_polar_split": (_INT64, _POINTER, _INT),
    "lk_polar_refined": (_INT64, _POINTER, _POINTER, _POINTER, _INT),
}
# What became of a matrix: csrc/cpu/workspace.h.
DONE, ILL_CONDITIONED, VERY_ILL_CONDITIONED, EXTREME, FEW_SMALL = range(5)
INSTRUCTION_SETS = ("baseline", "avx2", "avx512", "amx")


def _load() -> tuple[ctypes.CDLL | None, str]:
    """The library, and what it is; or None, and why."""
    package = pathlib.Path(__file__).parents[2]
    files = list(package.glob("_cpu.so"))
    if not files:
        return None, "its library was not built (no C++ compiler at installation, or it failed)"
    try:
        library = ctypes.CDLL(str(files[0]))
        version = library.lk_abi_version()
    except (OSError, AttributeError) as error:
        return None, f"its library {files[0].name} does not load: {error}"
    if version != _ABI_VERSION:
        return None, (
            f"its library {files[0].name} has version {version} of the interface, expected"
            f" {_ABI_VERSION}: build it again (pip install)"
        )
    for name, arguments in _SIGNATURES.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, ctypes.c_int
    for name in ("lk_sort_pairs", "lk_swap_pairs"):
        function = getattr(library, name)
        function.argtypes = (_POINTER, _POINTER, _POINTER, _INT64, _INT64, _INT, _INT)
        function.restype = None
    library.lk_fingerprint.argtypes = (_POINTER, _INT64)
    library.lk_fingerprint.restype = ctypes.c_uint64
    return library, INSTRUCTION_SETS[library.lk_instruction_set()]


_library, _about = _load()
if _library is None:
    backends.mark_missing("cpu", _about)


def library() -> ctypes.CDLL:
    """The library. `backends.resolve` chooses the functions here only where there is one."""
    if _library is None:
        raise backends.BackendUnavailableError(f"backend 'cpu' cannot run: {_about}")
    return _library


def is_built() -> bool:
    """Whether there is a library."""
    return _library is not None


def checked(code: int) -> None:
    """Raises what a function's return code says."""
    if code != 0:
        raise MemoryError("lipkernels: not enough memory for the scratch space of a weight")


def addresses(tensor: Tensor, n_matrices: int) -> range:
    """The address of each matrix of a batch that is not empty, and without gaps between them."""
    start, size = tensor.data_ptr(), tensor.element_size() * (tensor.numel() // n_matrices)
    return range(start, start + size * n_matrices, size)


class _Process:
    """Whether this one was forked: OpenMP's threads stayed behind, and GNU's waits for them."""

    forked = False


def _after_fork() -> None:
    _Process.forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def n_threads() -> int:
    """How many threads a call may use: torch's own setting, one in a forked process."""
    return 1 if _Process.forked else torch.get_num_threads()
