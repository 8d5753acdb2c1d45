"""How accurately polar factors are computed where there is a choice: by the Triton kernels.

``"high"``, the default: singular values, directions and gradients to float32.

``"fast"``: about half the multiplications, in half the reads. The bound is the same: no singular
value of the result exceeds its scale, and they are all at the scale to float32. What is given up is
which matrix with these singular values it is, and how well the gradient is that of the exact map.
For a condition number c of the weight (1 to 3 in training that starts orthogonal) these are at most

    c        |U - U_exact|_2    |gradient - exact| / |exact|
    3        1e-3               2e-3
    100      5e-3               2e-2
    1000     1e-2               2e-1

which ``tests/test_triton_polar_fast.py`` asserts. float64 weights, every other backend ("cuda" but
for the weights that it leaves to Triton), a
:class:`~lipkernels.Retractor` and the constraints other than the polar factor (a named Bjorck
iteration, whose result is what it computed) ignore the setting: they are always exact.

The choice is made when an op is called and holds for its backward too, wherever that runs. It
applies to the whole process, as :func:`torch.set_float32_matmul_precision` does.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

PRECISIONS = ("high", "fast")
_current = "high"


def _validated(precision: str) -> str:
    if precision not in PRECISIONS:
        raise ValueError(f"precision: expected one of {PRECISIONS}, got {precision!r}")
    return precision


def resolve(precision: str | None) -> str:
    """``precision`` itself, or the current one for None."""
    return _current if precision is None else _validated(precision)


def get_polar_precision() -> str:
    """The precision that polar factors are computed in, "high" or "fast"."""
    return _current


def set_polar_precision(precision: str) -> None:
    """Compute polar factors in "high" (the default) or "fast" precision from now on.

    What "fast" gives up is in the table of :mod:`lipkernels.precision`; the bound stays.
    """
    global _current
    _current = _validated(precision)


@contextlib.contextmanager
def polar_precision(precision: str) -> Iterator[None]:
    """:func:`set_polar_precision` for the block.

    >>> import lipkernels
    >>> with lipkernels.polar_precision("fast"):
    ...     lipkernels.get_polar_precision()
    'fast'
    >>> lipkernels.get_polar_precision()
    'high'
    """
    previous = get_polar_precision()
    set_polar_precision(precision)
    try:
        yield
    finally:
        set_polar_precision(previous)
