"""Whether a tensor's bytes are still the same ones."""

from __future__ import annotations

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

    A change goes unseen with a chance of about 2^-64. It is no cryptographic hash, is not the same
    in another version or on another device, and is not meant to be stored.

    >>> x = torch.zeros(3)
    >>> before = fingerprint(x)
    >>> x.data[1] = 1
    >>> fingerprint(x) == before
    False
    """
    return _fingerprint.fingerprint(x)
