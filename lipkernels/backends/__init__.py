"""Which implementation of an operation runs.

``reference`` is pure torch, and runs everywhere; ``cpu`` is C++ (the polar factor), built when the
package is installed; ``triton`` runs on CUDA devices, where Triton is installed; ``cuda`` is a
library that is built with the package where CUDA's compiler is, and runs on CUDA devices too.
``auto`` takes the fastest one that can run; it never hides a failure of the one it took. Naming a
backend that cannot run an operation raises :class:`BackendUnavailableError` with the reason. The
default is ``auto``, or the environment variable ``LIPKERNELS_BACKEND`` as it was at import.

``python -m lipkernels.backends`` prints what can run here, and why the rest cannot.

Two ways to test without a GPU, both slow. With ``TRITON_INTERPRET=1`` in the environment at import,
Triton's interpreter runs its kernels: ``triton``, if it is named, then takes tensors of the CPU
too. So does ``cuda`` where ``LIPKERNELS_CUDA_LIBRARY`` names an emulation of its library.

    >>> import lipkernels
    >>> with lipkernels.use_backend("reference"):
    ...     layer_output = lipkernels.nn.SpectralLinear(4, 2)(torch.zeros(1, 4))
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Callable, Collection, Iterator

import torch

BACKENDS = ("reference", "cpu", "triton", "cuda")
_PREFERENCE = ("cuda", "triton", "cpu", "reference")
_DEVICE = {
    "cpu": ("cpu", "the CPU"),
    "triton": ("cuda", "a CUDA device"),
    "cuda": ("cuda", "a CUDA device"),
}


# Why a backend cannot run in this installation, whatever the tensors: filled by what would run it.
_missing: dict[str, str] = {}
# The backends whose kernels for CUDA devices are emulated, on the CPU alone.
_emulated: set[str] = set()
# Why a backend cannot run on the CUDA device of an index, or None.
_device_checks: dict[str, Callable[[int], str | None]] = {}


def mark_missing(name: str, reason: str) -> None:
    """Declares that the backend ``name`` cannot run in this installation."""
    _missing[name] = reason


def missing(name: str) -> str | None:
    """Why the backend ``name`` cannot run in this installation; None: it can, on some tensors."""
    return _missing.get(name)


def mark_emulated(name: str) -> None:
    """Declares that the kernels of ``name`` run on tensors of the CPU, and on no others."""
    _emulated.add(name)


def check_devices(name: str, why_not: Callable[[int], str | None]) -> None:
    """Declares who says why the backend ``name`` cannot run on a CUDA device, by its index."""

    def constant(index: int) -> str | None:
        return why_not(index)  # a plain function: dynamo looks through functools.lru_cache

    # What torch.compiler.assume_constant_result does, after importing the whole compiler.
    constant._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]
    _device_checks[name] = constant


if importlib.util.find_spec("triton") is None:
    mark_missing("triton", "Triton is not installed (pip install lipkernels[triton])")

# As Triton itself reads it, when its decorator makes a kernel.
_interpreted = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


def is_interpreted() -> bool:
    """Whether Triton's kernels run in its interpreter, on the CPU."""
    return _interpreted


def is_emulated(name: str) -> bool:
    """Whether the kernels of ``name``, which are for CUDA devices, run on the CPU."""
    return (name == "triton" and _interpreted) or name in _emulated


class BackendUnavailableError(RuntimeError):
    """A backend that was asked for by name cannot run this operation here."""


def _validated(name: str) -> str:
    if name != "auto" and name not in BACKENDS:
        raise ValueError(f"backend: expected one of {('auto', *BACKENDS)}, got {name!r}")
    return name


_default = _validated(os.environ.get("LIPKERNELS_BACKEND", "auto"))


def why_not(name: str, device: torch.device) -> str | None:
    """Why the backend ``name`` cannot run on ``device``, whatever the operation; or None."""
    if name in _DEVICE:
        kind, words = _DEVICE[name]
        if device.type != kind and not (is_emulated(name) and device.type == "cpu"):
            return f"{name} needs tensors on {words}, got {device}"
        if device.type == "cuda" and name in _emulated:
            return f"{name} is an emulation on the CPU here (LIPKERNELS_CUDA_LIBRARY), got {device}"
    if name not in _missing and device.type == "cuda" and name in _device_checks:
        return _device_checks[name](-1 if device.index is None else device.index)
    return _missing.get(name)


def _why_not(name: str, op: str, implemented: Collection[str], device: torch.device) -> str | None:
    if name not in implemented:
        return f"{op} has no {name} implementation in this version"
    return why_not(name, device)


def _runs_unnamed(name: str, device: torch.device) -> bool:
    """Whether `auto` may take it on ``device``: as :func:`why_not`, mostly without the words."""
    if name in _missing or (name in _DEVICE and _DEVICE[name][0] != device.type):
        return False
    return device.type != "cuda" or why_not(name, device) is None


def resolve(
    op: str, implemented: Collection[str], device: torch.device, backend: str | None = None
) -> str:
    """The backend that runs ``op`` on ``device``, out of those that implement it."""
    wanted = _default if backend is None else _validated(backend)
    if wanted == "auto":
        for name in _PREFERENCE:
            if name in implemented and _runs_unnamed(name, device):
                return name
    reason = _why_not(wanted, op, implemented, device)
    if reason is not None:
        raise BackendUnavailableError(f"backend {wanted!r} cannot run: {reason}")
    return wanted


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run the block's operations on ``name`` ("auto", "reference", "triton" or "cuda").

    The choice is made when an operation is called and holds for its backward too, wherever that
    runs. It applies to the whole process.
    """
    global _default
    previous, _default = _default, _validated(name)
    try:
        yield
    finally:
        _default = previous
