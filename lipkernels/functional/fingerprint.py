"""Whether a tensor's bytes are still the same ones."""

from __future__ import annotations

import torch
from torch import Tensor

from lipkernels.kernels import fingerprint as _fingerprint
from lipkernels.kernels.eager import is_plain_eager


def has_fingerprint(x: Tensor) -> bool:
    """Whether ``x`` has bytes to look at, and nobody records what is done to it instead.

    >>> has_fingerprint(torch.zeros(3)), has_fingerprint(torch.zeros(3, device="meta"))
    (True, False)
    """
    return is_plain_eager((x,))


def fingerprint(x: Tensor) -> int:
    """64 bits of the bytes of ``x``: equal for equal bytes, different after any accident.

    A change goes unseen with a chance of about 2^-64. The memory layout does not count, nor does
    the shape. It is no cryptographic hash, is not the same in another version or on another device,
    and is not meant to be stored. Raises TypeError for anything but a tensor, ValueError for one
    that has no bytes of its own (on the meta device, sparse).

    >>> x = torch.zeros(3)
    >>> before = fingerprint(x)
    >>> x.data[1] = 1
    >>> fingerprint(x) == before
    False
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"x: expected a Tensor, got {type(x).__name__}")
    if x.is_meta or x.layout != torch.strided:
        raise ValueError(
            f"x: expected a dense tensor that holds data, got one on {x.device}, {x.layout}"
        )
    if x.is_complex():
        x = torch.view_as_real(x.detach().resolve_conj())
    # The bytes are read in the order of the indices, and fastest where they lie in that order.
    return _fingerprint.fingerprint(x.detach().contiguous())
