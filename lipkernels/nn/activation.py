"""Activations with a Lipschitz constant: ``k_coef_lip`` times a 1-Lipschitz map."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from lipkernels import functional as F
from lipkernels.certify import EXACT, ROUNDINGS, SCALED, Roundings
from lipkernels.nn import plain
from lipkernels.nn.module import LipschitzFunction
from lipkernels.reference import activation as reference

_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_WITH_ABS = (*_FLOATS, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def _times(x: Tensor, k: float) -> Tensor:
    return x if k == 1.0 else x * k


class GroupSort(LipschitzFunction):
    r"""Sort groups of ``group_size`` neighbours along ``dim`` in ascending order, times k.

    ``group_size`` None sorts the whole dimension. The size of the dimension must be a multiple of
    it (ValueError). Shape: any, kept. Source: Anil, Lucas and Grosse, arXiv 1811.05381.

    >>> GroupSort(2)(torch.tensor([[3.0, 1.0, 2.0, 5.0]]))
    tensor([[1., 3., 2., 5.]])
    """

    def __init__(
        self, group_size: int | None = None, *, dim: int = 1, k_coef_lip: float = 1.0
    ) -> None:
        super().__init__()
        if group_size is not None and (not isinstance(group_size, int) or group_size < 1):
            raise ValueError(f"group_size: expected a positive integer or None, got {group_size!r}")
        self.group_size = group_size
        self.dim = dim
        self.k_coef_lip = k_coef_lip

    def forward(self, x: Tensor) -> Tensor:
        return _times(F.group_sort(x, self.group_size, self.dim), self.k_coef_lip)

    def vanilla_export(self) -> nn.Module:
        """The same sort as a graph of torch operations."""
        dim, size, k = self.dim, self.group_size, self.k_coef_lip
        if size is None:
            return plain.traced(lambda x: _times(x.sort(dim=dim)[0], k), self.training)
        # Negative dimensions count from the end, where unflatten adds one.
        last = dim + 1 if dim >= 0 else dim
        first = dim if dim >= 0 else dim - 1

        def sort(x: Tensor) -> Tensor:
            # Not (-1, size), which torch cannot tell for an empty batch.
            groups = x.unflatten(dim, (x.size(dim) // size, size)).sort(dim=last)[0]
            return _times(groups.flatten(first, last), k)

        return plain.traced(sort, self.training)

    def extra_repr(self) -> str:
        return f"group_size={self.group_size}, dim={self.dim}, k_coef_lip={self.k_coef_lip:g}"


class GroupSort2(GroupSort):
    """:class:`GroupSort` of pairs: (min, max) of neighbours.

    >>> GroupSort2()(torch.tensor([[3.0, 1.0]]))
    tensor([[1., 3.]])
    """

    def __init__(self, *, dim: int = 1, k_coef_lip: float = 1.0) -> None:
        super().__init__(2, dim=dim, k_coef_lip=k_coef_lip)


class FullSort(GroupSort):
    """:class:`GroupSort` of the whole dimension.

    >>> FullSort()(torch.tensor([[3.0, 1.0, 2.0]]))
    tensor([[1., 2., 3.]])
    """

    def __init__(self, *, dim: int = 1, k_coef_lip: float = 1.0) -> None:
        super().__init__(None, dim=dim, k_coef_lip=k_coef_lip)


class MaxMin(LipschitzFunction):
    r"""k cat(relu(x), relu(-x)) along ``dim``, which doubles.

    >>> MaxMin()(torch.zeros(1, 3)).shape
    torch.Size([1, 6])
    """

    def __init__(self, dim: int = 1, *, k_coef_lip: float = 1.0) -> None:
        super().__init__()
        self.dim = dim
        self.k_coef_lip = k_coef_lip

    def forward(self, x: Tensor) -> Tensor:
        return _times(F.max_min(x, self.dim), self.k_coef_lip)

    def vanilla_export(self) -> nn.Module:
        """The same map as a graph of torch operations."""
        dim, k = self.dim, self.k_coef_lip
        return plain.traced(lambda x: _times(reference.max_min(x, dim), k), self.training)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, k_coef_lip={self.k_coef_lip:g}"


class Abs(LipschitzFunction):
    r"""k \|x\|, entry by entry.

    >>> Abs(k_coef_lip=2.0)(torch.tensor([-1.0, 3.0]))
    tensor([2., 6.])
    """

    def __init__(self, *, k_coef_lip: float = 1.0) -> None:
        super().__init__()
        self.k_coef_lip = k_coef_lip

    def forward(self, x: Tensor) -> Tensor:
        if not isinstance(x, Tensor):
            raise TypeError(f"input: expected a Tensor, got {type(x).__name__}")
        if x.dtype not in _WITH_ABS:
            known = ", ".join(str(dtype).removeprefix("torch.") for dtype in _WITH_ABS)
            raise TypeError(f"input: expected a dtype among {known}, got {x.dtype}")
        return _times(x.abs(), self.k_coef_lip)

    def vanilla_export(self) -> nn.Module:
        """The same map as a graph of torch operations."""
        k = self.k_coef_lip
        return plain.traced(lambda x: _times(torch.abs(x), k), self.training)

    def extra_repr(self) -> str:
        return f"k_coef_lip={self.k_coef_lip:g}"


class HouseHolder(LipschitzFunction):
    r"""Reflect each pair of channels beyond a learned mirror line, times k.

    ``channels`` must be even; channel i is paired with i + channels/2. The angles ``theta``
    (radians) start at pi/2, where the layer sorts each pair. Source: Singla, Singla and Feizi,
    arXiv 2108.04062.

    >>> HouseHolder(2)(torch.tensor([[2.0, 1.0]]))[0].detach().round()
    tensor([1., 2.])
    """

    def __init__(
        self,
        channels: int,
        *,
        dim: int = 1,
        k_coef_lip: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(channels, int) or channels < 2 or channels % 2:
            raise ValueError(f"channels: expected a positive even integer, got {channels!r}")
        self.dim = dim
        self.k_coef_lip = k_coef_lip
        self.theta = nn.Parameter(torch.empty(channels // 2, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """All angles at pi/2."""
        nn.init.constant_(self.theta, math.pi / 2)

    def forward(self, x: Tensor) -> Tensor:
        return _times(F.householder(x, self.theta, self.dim), self.k_coef_lip)

    def vanilla_export(self) -> nn.Module:
        """The same map as a graph of torch operations, with a parameter ``theta`` of its own."""
        dim, k = self.dim, self.k_coef_lip
        kind = torch.promote_types(self.theta.dtype, torch.float32)
        return plain.traced_with_tensor(
            lambda x, theta: _times(reference.householder(x, theta, dim, kind), k),
            self.theta,
            self.training,
        )

    def extra_repr(self) -> str:
        return f"{2 * len(self.theta)}, dim={self.dim}, k_coef_lip={self.k_coef_lip:g}"


class LPReLU(LipschitzFunction):
    r"""k (x where x >= 0, a x below), the learned slope a clamped to [-1, 1].

    ``num_parameters`` is 1, or the number of channels (dimension 1); ``init`` the first slope.

    >>> LPReLU(init=0.5)(torch.tensor([[-2.0, 2.0]])).detach()
    tensor([[-1.,  2.]])
    """

    def __init__(
        self,
        num_parameters: int = 1,
        init: float = 0.25,
        *,
        k_coef_lip: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(num_parameters, int) or num_parameters < 1:
            raise ValueError(f"num_parameters: expected an integer >= 1, got {num_parameters!r}")
        self.num_parameters = num_parameters
        self.k_coef_lip = k_coef_lip
        # torch.nn.PReLU's name: its state_dict loads here.
        self.weight = nn.Parameter(torch.empty(num_parameters, device=device, dtype=dtype))
        self.init = init
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """All slopes at ``init``."""
        nn.init.constant_(self.weight, self.init)

    def forward(self, x: Tensor) -> Tensor:
        return _times(F.lprelu(x, self.weight), self.k_coef_lip)

    def vanilla_export(self) -> nn.Module:
        """A :class:`torch.nn.PReLU` with the clamped slope."""
        module = nn.PReLU(
            self.num_parameters, device=self.weight.device, dtype=self.weight.dtype
        ).train(self.training)
        with torch.no_grad():
            module.weight.copy_(self.weight.clamp(-1.0, 1.0))
        module.weight.requires_grad_(self.weight.requires_grad)
        return plain.scaled(module, self.k_coef_lip)

    def extra_repr(self) -> str:
        return f"num_parameters={self.num_parameters}, k_coef_lip={self.k_coef_lip:g}"


def _scaling(module: LipschitzFunction, x: Tensor) -> Roundings:
    """Roundings of a map that is exact but for the product with k."""
    return EXACT if module.k_coef_lip == 1.0 else Roundings(SCALED)


def _slope(module: LipschitzFunction, x: Tensor) -> Roundings:
    return Roundings(2 * SCALED)  # the slope is converted to the input's dtype


# HouseHolder has none: nobody states how accurate sines and cosines are.
ROUNDINGS.update(
    {GroupSort.forward: _scaling, MaxMin.forward: _scaling, Abs.forward: _scaling}
    | {LPReLU.forward: _slope}
)
