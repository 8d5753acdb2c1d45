"""Which implementation of an operation runs.

``reference`` is pure torch, and runs everywhere; ``cpu`` is C++ (the polar factor), built when the
package is installed; ``triton`` runs on CUDA devices, where Triton is installed; ``cuda`` is
reserved for kernels to come. ``auto`` takes the fastest one that can run; it never hides a failure
of the one it took. Naming a backend that cannot run an operation raises
:class:`BackendUnavailableError` with the reason. The default is ``auto``, or the environment
variable ``LIPKERNELS_BACKEND`` as it was at import.

With ``TRITON_INTERPRET=1`` in the environment at import, Triton's interpreter runs its kernels:
``triton``, if it is named, then takes tensors of the CPU too. It is slow, a way to test.

    >>> import lipkernels
    >>> with lipkernels.use_backend("reference"):
    ...     layer_output = lipkernels.nn.SpectralLinear(4, 2)(torch.zeros(1, 4))
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Collection, Iterator

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


def mark_missing(name: str, reason: str) -> None:
    """Declares that the backend ``name`` cannot run in this installation."""
    _missing[name] = reason


if importlib.util.find_spec("triton") is None:
    mark_missing("triton", "Triton is not installed (pip install lipkernels[triton])")

# As Triton itself reads it, when its decorator makes a kernel.
_interpreted = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


def is_interpreted() -> bool:
    """Whether Triton's kernels run in its interpreter, on the CPU."""
    return _interpreted


class BackendUnavailableError(RuntimeError):
    """A backend that was asked for by name cannot run this operation here."""


def _validated(name: str) -> str:
    if name != "auto" and name not in BACKENDS:
        raise ValueError(f"backend: expected one of {('auto', *BACKENDS)}, got {name!r}")
    return name


_default = _validated(os.environ.get("LIPKERNELS_BACKEND", "auto"))


def _why_not(name: str, op: str, implemented: Collection[str], device: torch.device) -> str | None:
    if name not in implemented:
        return f"{op} has no {name} implementation in this version"
    if name in _DEVICE:
        kind, words = _DEVICE[name]
        interpreted = name == "triton" and _interpreted and device.type == "cpu"
        if device.type != kind and not interpreted:
            return f"{name} needs tensors on {words}, got {device}"
    return _missing.get(name)


def resolve(
    op: str, implemented: Collection[str], device: torch.device, backend: str | None = None
) -> str:
    """The backend that runs ``op`` on ``device``, out of those that implement it."""
    wanted = _default if backend is None else _validated(backend)
    if wanted == "auto":
        # As `_why_not` has it, but for the interpreter, without the words.
        return next(
            name
            for name in _PREFERENCE
            if name in implemented
            and name not in _missing
            and (name not in _DEVICE or _DEVICE[name][0] == device.type)
        )
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
