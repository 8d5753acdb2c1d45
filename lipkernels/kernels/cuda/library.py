"""Loads the library built from csrc/cuda, declares its functions, and raises what they return.

It has a C interface: addresses, sizes and a stream go in, a ``cudaError_t`` comes out. No driver is
needed to load it: CUDA is asked when something is called. ``LIPKERNELS_CUDA_LIBRARY`` in the
environment at import names another file than the package's own: one that was built elsewhere, or an
emulation on the CPU (it has a function ``lk_is_simt``), which takes tensors of the CPU.
"""

from __future__ import annotations

import ctypes
import functools
import os
import pathlib
from collections.abc import Callable
from typing import Any

import torch

from lipkernels import backends

ABI_VERSION = 1
VARIABLE = "LIPKERNELS_CUDA_LIBRARY"
# Types of arguments. An array of structs is a POINTER, given by ctypes.byref or as an array.
POINTER, INT, INT64, FLOAT, DOUBLE = (
    ctypes.c_void_p,
    ctypes.c_int,
    ctypes.c_int64,
    ctypes.c_float,
    ctypes.c_double,
)
# As csrc/cuda/primitives.h numbers the formats of weights.
FORMATS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_PACKAGE = pathlib.Path(__file__).parents[2]


class CudaError(RuntimeError):
    """A function of the library failed; ``code`` is CUDA's number of the error."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


def _file() -> tuple[pathlib.Path | None, str]:
    """The library's file; or None, and why there is none."""
    named = os.environ.get(VARIABLE)
    if named:
        file = pathlib.Path(named)
        return (file, "") if file.is_file() else (None, f"{VARIABLE} names no file: {named}")
    own = _PACKAGE / "_cuda.so"
    if own.is_file():
        return own, ""
    why = _PACKAGE / "_cuda_not_built.txt"  # setup.py's
    reason = why.read_text().strip() if why.is_file() else "nvcc builds it at installation"
    return None, f"its library was not built ({reason})"


def _load() -> tuple[ctypes.CDLL | None, str]:
    """The library, and its file's name; or None, and why."""
    file, reason = _file()
    if file is None:
        return None, reason
    try:
        library = ctypes.CDLL(str(file.absolute()))
        version = library.lk_abi_version()
    except (OSError, AttributeError) as error:
        return None, f"its library {file.name} does not load: {error}"
    if version != ABI_VERSION:
        return None, (
            f"its library {file.name} has version {version} of the interface, expected"
            f" {ABI_VERSION}: build it again (pip install)"
        )
    for name in ("lk_error_name", "lk_error_message"):
        function = getattr(library, name)
        function.argtypes, function.restype = (INT,), ctypes.c_char_p
    return library, file.name


_library, _about = _load()


def library() -> ctypes.CDLL:
    """The library. `backends.resolve` chooses the functions here only where there is one."""
    if _library is None:
        raise backends.BackendUnavailableError(f"backend 'cuda' cannot run: {_about}")
    return _library


def is_loaded() -> bool:
    """Whether there is a library."""
    return _library is not None


def is_simt() -> bool:
    """Whether the library is an emulation, on the CPU."""
    return _library is not None and hasattr(_library, "lk_is_simt")


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


def message(code: int) -> str:
    """The name of an error and CUDA's words for it."""
    name, words = library().lk_error_name(code).decode(), library().lk_error_message(code).decode()
    if name == "cudaErrorInsufficientDriver":
        driver = library().lk_driver_version()
        wanted = library().lk_runtime_version()
        found = f"is for {_version(driver)}" if driver else "is missing"
        words += f" ({_version(wanted)}; this machine's driver {found})"
    return f"{name}: {words}"


def check(code: int) -> None:
    """Raises :class:`CudaError` with the error's name, if ``code`` is one.

    >>> check(0)
    """
    if code != 0:
        raise CudaError(code, message(code))


@functools.lru_cache(maxsize=64)
def why_not_device(index: int) -> str | None:
    """Why the library cannot run on the CUDA device ``index`` (-1: the current one); or None."""
    code = library().lk_check_device(index)
    return None if code == 0 else f"its library cannot run on this device: {message(code)}"


def stream_of(device: torch.device) -> int | None:
    """torch's current stream on ``device``, as an address; None on the CPU."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else None


def declared(name: str, *types: Any) -> Callable[..., None]:
    """A function of the library as ``call(device, *arguments)``, which raises where it fails.

    ``types`` are those of the arguments before the last, the stream: ``call`` adds the current one
    of ``device``. Declared once, where a family's launchers are; looked up when it is first called.
    """

    @functools.cache
    def function() -> Callable[..., int]:
        found = getattr(library(), name)
        found.argtypes, found.restype = (*types, POINTER), INT
        return found

    def call(device: torch.device, *arguments: Any) -> None:
        check(function()(*arguments, stream_of(device)))

    return call


if _library is None:
    backends.mark_missing("cuda", _about)
elif is_simt():
    backends.mark_emulated("cuda")
else:
    backends.check_devices("cuda", why_not_device)
