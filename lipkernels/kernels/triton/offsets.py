"""Where 32-bit offsets end. Kernels have a constant ``LONG`` for more, since 64 bits are slower."""

from __future__ import annotations

# The last program counts on beyond the last element: what is masked there may not wrap around.
_FIRST_LONG = 2**31 - 2**20


def is_long(last: int) -> bool:
    """Whether offsets up to ``last`` need 64 bits."""
    return last >= _FIRST_LONG
