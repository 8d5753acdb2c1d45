"""Whether a tensor's bytes are still the same ones."""

from __future__ import annotations

from torch import Tensor

from lipkernels.kernels import fingerprint as _fingerprint


def fingerprint(x: Tensor) -> int:
    """64 bits of the bytes of ``x``: equal for equal bytes, different after any accident.

    A change goes unseen with a chance of about 2^-64. It is no cryptographic hash, is not the same
    in another version or on another device, and is not meant to be stored.

    >>> x = torch.zeros(3)
    >>> before = fingerprint(x)
    >>> x.data[1] = 1
    >>> fingerprint(x) == before
    False
    """
    return _fingerprint.fingerprint(x)
