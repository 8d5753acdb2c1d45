"""Sorting, reflecting and rectifying activations."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lipkernels import backends
from lipkernels.kernels import sorting as _sorting
from lipkernels.reference import activation as _activation

_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_SIGNED = (*_FLOATS, torch.int64, torch.int32, torch.int16, torch.int8)
_ORDERED = (*_SIGNED, torch.uint8, torch.bool)


def _check(name: str, x: Tensor, dtypes: Sequence[torch.dtype]) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a Tensor, got {type(x).__name__}")
    if x.dtype not in dtypes:
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{name}: expected a dtype among {known}, got {x.dtype}")


def _checked_dim(x: Tensor, dim: int) -> int:
    if isinstance(dim, bool) or not isinstance(dim, int):
        raise TypeError(f"dim: expected an integer, got {dim!r}")
    if not -x.dim() <= dim < x.dim():
        raise ValueError(f"dim: expected one of the input's {x.dim()} dimensions, got {dim}")
    return dim % x.dim()


def group_sort(
    x: Tensor, group_size: int | None = None, dim: int = 1, *, backend: str | None = None
) -> Tensor:
    r"""Sort each group of ``group_size`` neighbours along ``dim`` in ascending order.

    None: the whole dimension (FullSort). 1-Lipschitz in every l_p norm; the Jacobian is a
    permutation. Raises ValueError where the size does not divide the dimension. Source: Anil, Lucas
    and Grosse, arXiv 1811.05381.

    >>> group_sort(torch.tensor([[3.0, 1.0, 2.0, 5.0]]), 2)
    tensor([[1., 3., 2., 5.]])
    """
    _check("input", x, _ORDERED)
    dim = _checked_dim(x, dim)
    size = x.shape[dim] if group_size is None else group_size
    if not isinstance(size, int) or (size < 1 and x.shape[dim] > 0):
        raise ValueError(f"group_size: expected a positive integer or None, got {group_size!r}")
    if size > 0 and x.shape[dim] % size:
        raise ValueError(
            f"input: expected a size along dimension {dim} that groups of {size} divide,"
            f" got {x.shape[dim]}"
        )
    if x.numel() == 0:
        return x.clone()
    name = backends.resolve("group_sort", _sorting.FORWARD, x.device, backend)
    return _sorting.group_sort(x, size, dim, name)


def max_min(x: Tensor, dim: int = 1) -> Tensor:
    r"""cat(relu(x), relu(-x)) along ``dim``, which doubles. 1-Lipschitz.

    >>> max_min(torch.tensor([[1.0, -2.0]])).abs()
    tensor([[1., 0., 0., 2.]])
    """
    _check("input", x, _SIGNED)
    return _activation.max_min(x, _checked_dim(x, dim))


def householder(x: Tensor, theta: Tensor, dim: int = 1) -> Tensor:
    r"""Reflect each pair (x_i, x_{i+c}) that lies beyond its mirror line at angle ``theta_i`` / 2.

    ``x`` has 2 c entries along ``dim``, ``theta`` (c,), in radians. pi/2 sorts the pair. An
    isometry on either side and continuous across: 1-Lipschitz. Source: Singla, Singla and Feizi,
    arXiv 2108.04062.

    >>> householder(torch.tensor([[2.0, 1.0]]), torch.tensor([torch.pi / 2])).round()
    tensor([[1., 2.]])
    """
    _check("input", x, _FLOATS)
    _check("theta", theta, _FLOATS)
    dim = _checked_dim(x, dim)
    if theta.dim() != 1 or x.shape[dim] != 2 * theta.shape[0]:
        raise ValueError(
            f"input: expected twice as many entries along dimension {dim} as there are angles"
            f" ({tuple(theta.shape)}), got {x.shape[dim]}"
        )
    kind = torch.promote_types(torch.promote_types(x.dtype, theta.dtype), torch.float32)
    return _activation.householder(x, theta, dim, kind)


def lprelu(x: Tensor, slope: Tensor) -> Tensor:
    r"""x where x >= 0, a x below, a = clamp(``slope``, -1, 1), one or one for each channel (dim 1).

    >>> lprelu(torch.tensor([[-2.0, 1.0]]), torch.tensor([4.0]))
    tensor([[-2.,  1.]])
    """
    _check("input", x, _FLOATS)
    _check("slope", slope, _FLOATS)
    channels = x.shape[1] if x.dim() > 1 else 1
    if slope.dim() != 1 or slope.shape[0] not in (1, channels):
        raise ValueError(f"slope: expected shape (1,) or ({channels},), got {tuple(slope.shape)}")
    return _activation.lprelu(x, slope)
