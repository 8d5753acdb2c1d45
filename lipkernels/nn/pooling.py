"""Average and L2-norm pooling, scaled to a Lipschitz constant.

A window of w pixels summed with weight 1/sqrt(w), or replaced by its norm, is a 1-Lipschitz
function of the window. Windows that overlap read a pixel up to n times: dividing by sqrt(n) makes
the layer 1-Lipschitz (the proof is in :mod:`lipkernels.certify.window`). The part of a window that
lies outside the image (padding, ``ceil_mode``) counts as zeros, for which the same weight is a
bound.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lipkernels import functional as F
from lipkernels.certify import ROUNDINGS, SCALED, Roundings, operator_factor
from lipkernels.functional.pooling import avg_pool_of_checked
from lipkernels.nn import plain
from lipkernels.nn.module import LipschitzFunction
from lipkernels.reference import pooling as reference

_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def _pair(name: str, value: int | Sequence[int], least: int) -> tuple[int, int]:
    pair = tuple(value) if isinstance(value, Sequence) else (value, value)
    if len(pair) != 2 or not all(isinstance(v, int) and v >= least for v in pair):
        raise ValueError(f"{name}: expected an integer >= {least} or a pair of them, got {value!r}")
    return pair


def _check_image(x: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"input: expected a Tensor, got {type(x).__name__}")
    if x.dim() not in (3, 4):
        raise ValueError(
            f"input: expected (N, C, H, W) or (C, H, W), got {x.dim()} dimensions {tuple(x.shape)}"
        )
    if 0 in x.shape[-3:]:
        raise ValueError(
            f"input: expected at least one channel and one pixel, got shape {tuple(x.shape)}"
        )
    if x.dtype not in _FLOATS:
        raise TypeError(f"input: expected a floating-point dtype, got {x.dtype}")


_Window = tuple[tuple[int, int], tuple[int, int], tuple[int, int], bool]


class _WindowPool2d(LipschitzFunction):
    """The arguments that windowed pools share, and their check."""

    _counted: tuple[tuple, float] | None = None

    def __init__(
        self,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] | None,
        padding: int | Sequence[int],
        ceil_mode: bool,
        k_coef_lip: float,
    ) -> None:
        super().__init__()
        self.kernel_size = _pair("kernel_size", kernel_size, 1)
        self.stride = self.kernel_size if stride is None else _pair("stride", stride, 1)
        self.padding = _pair("padding", padding, 0)
        if any(2 * p > k for p, k in zip(self.padding, self.kernel_size, strict=True)):
            raise ValueError(
                f"padding: expected at most half of kernel_size {self.kernel_size},"
                f" got {self.padding}"
            )
        self.ceil_mode = bool(ceil_mode)
        self.k_coef_lip = k_coef_lip
        self._overlap(self._window())

    def _window(self) -> _Window:
        """(kernel, stride, padding, ceil_mode), whose attributes may be reassigned, as pairs."""
        return (
            _pair("kernel_size", self.kernel_size, 1),
            _pair("stride", self.stride, 1),
            _pair("padding", self.padding, 0),
            bool(self.ceil_mode),
        )

    def _overlap(self, window: _Window) -> float:
        """sqrt(max_i n_i) of the geometry as it is now."""
        kernel, stride, padding, _ = window
        geometry = (kernel, stride, tuple((p, p) for p in padding))
        if self._counted is None or self._counted[0] != geometry:
            self._counted = (geometry, operator_factor(*geometry, (1, 1), "zeros"))
        return self._counted[1]

    def _check(self, x: Tensor, window: _Window) -> None:
        _check_image(x)
        kernel, stride, padding, ceil_mode = window
        disjoint = not ceil_mode and stride == kernel and padding == (0, 0)
        if disjoint and (x.shape[-2] % kernel[0] or x.shape[-1] % kernel[1]):
            raise ValueError(
                f"input: expected a height and width divisible by {kernel}, got"
                f" {tuple(x.shape[-2:])}; ceil_mode=True keeps the border as smaller windows"
            )
        for size, k, s, p in zip(x.shape[-2:], kernel, stride, padding, strict=True):
            # With ceil_mode a window may reach over the border by less than a step.
            if size + 2 * p <= (k - s if ceil_mode else k - 1):
                raise ValueError(
                    f"input: expected an image that a window of {kernel} with padding {padding}"
                    f" fits in, got {tuple(x.shape[-2:])}"
                )

    def extra_repr(self) -> str:
        return (
            f"kernel_size={self.kernel_size}, stride={self.stride}, padding={self.padding},"
            f" ceil_mode={self.ceil_mode}, k_coef_lip={self.k_coef_lip:g}"
        )


class ScaledAvgPool2d(_WindowPool2d):
    r"""y_o = k / sqrt(w n) * (sum of the window o), w its number of pixels, n the overlap.

    For windows that do not overlap (``stride`` None) this is sqrt(w) k times the average. Arguments
    as in :class:`torch.nn.AvgPool2d`. The layer chooses the divisor itself: ``divisor_override``,
    and ``count_include_pad=False`` with padding, raise ValueError. An image that the windows would
    cut short raises ValueError unless ``ceil_mode``.

    Shape: (N, C, H, W) or (C, H, W).

    >>> ScaledAvgPool2d(2)(torch.ones(1, 1, 2, 2))
    tensor([[[[2.]]]])
    """

    def __init__(
        self,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] | None = None,
        padding: int | Sequence[int] = 0,
        ceil_mode: bool = False,
        count_include_pad: bool = True,
        divisor_override: int | None = None,
        *,
        k_coef_lip: float = 1.0,
    ) -> None:
        super().__init__(kernel_size, stride, padding, ceil_mode, k_coef_lip)
        if divisor_override is not None:
            raise ValueError(
                "divisor_override: expected None (the Lipschitz constant sets the divisor),"
                f" got {divisor_override!r}"
            )
        if not count_include_pad and self.padding != (0, 0):
            raise ValueError(
                "count_include_pad: expected True with padding (border windows would be weighted"
                " beyond the Lipschitz constant), got False"
            )

    def _scale(self, window: _Window) -> float:
        """What the mean over a window is multiplied by: the sum could overflow in float16."""
        return self.k_coef_lip * math.sqrt(math.prod(window[0])) / self._overlap(window)

    def forward(self, x: Tensor) -> Tensor:
        window = self._window()
        self._check(x, window)
        return avg_pool_of_checked(x, *window, self._scale(window))

    def vanilla_export(self) -> nn.Module:
        """The mean pool times its scale, as a graph of torch operations."""
        window = self._window()
        scale = self._scale(window)
        return plain.traced(lambda x: reference.mean_pool2d(x, *window) * scale, self.training)


class ScaledL2NormPool2d(_WindowPool2d):
    r"""y_o = k / sqrt(n) * |window o|_2, n the overlap of the windows.

    ``eps_grad_sqrt`` guards the gradient of the square root: Gamma / (2 (sqrt(s) + eps)); the value
    is exact. Other arguments as in :class:`torch.nn.AvgPool2d`. Shape: (N, C, H, W) or (C, H, W).
    Source of the layer: Boureau, Ponce and LeCun, ICML 2010.

    >>> ScaledL2NormPool2d(2)(torch.ones(1, 1, 2, 2))
    tensor([[[[2.]]]])
    """

    def __init__(
        self,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] | None = None,
        padding: int | Sequence[int] = 0,
        ceil_mode: bool = False,
        *,
        k_coef_lip: float = 1.0,
        eps_grad_sqrt: float = 1e-6,
    ) -> None:
        super().__init__(kernel_size, stride, padding, ceil_mode, k_coef_lip)
        self.eps_grad_sqrt = _checked_eps(eps_grad_sqrt)

    def forward(self, x: Tensor) -> Tensor:
        window = self._window()
        self._check(x, window)
        pooled = F.l2_norm_pool2d(x, *window, eps=self.eps_grad_sqrt)
        return pooled * (self.k_coef_lip / self._overlap(window))

    def vanilla_export(self) -> nn.Module:
        """The root of the mean of squares, as a graph; its gradient has no guard.

        In float16 the graph overflows where an entry exceeds 255, which this layer does not.
        """
        window = self._window()
        scale = self.k_coef_lip * math.sqrt(math.prod(window[0])) / self._overlap(window)

        def pool(x: Tensor) -> Tensor:
            return torch.sqrt(reference.mean_pool2d(torch.square(x), *window)) * scale

        return plain.traced(pool, self.training)


def _checked_eps(eps: float) -> float:
    if isinstance(eps, bool) or not isinstance(eps, (int, float)) or not eps > 0:
        raise ValueError(f"eps_grad_sqrt: expected a number > 0, got {eps!r}")
    return float(eps)


class _GlobalPool2d(LipschitzFunction):
    def __init__(self, output_size: int | Sequence[int], k_coef_lip: float) -> None:
        super().__init__()
        if output_size not in (1, (1, 1), [1, 1]):
            raise ValueError(
                f"output_size: expected 1 or (1, 1) (global pooling), got {output_size!r}"
            )
        self.output_size = (1, 1)
        self.k_coef_lip = k_coef_lip

    def extra_repr(self) -> str:
        return f"output_size={self.output_size}, k_coef_lip={self.k_coef_lip:g}"


class ScaledAdaptiveAvgPool2d(_GlobalPool2d):
    r"""y = k / sqrt(H W) * (sum over the image), one pixel for each channel.

    ``output_size`` must be 1 or (1, 1). Shape: (N, C, H, W) to (N, C, 1, 1), or without N.

    >>> ScaledAdaptiveAvgPool2d(1)(torch.ones(1, 2, 3, 3)).flatten()
    tensor([3., 3.])
    """

    def __init__(
        self, output_size: int | Sequence[int] = (1, 1), *, k_coef_lip: float = 1.0
    ) -> None:
        super().__init__(output_size, k_coef_lip)

    def forward(self, x: Tensor) -> Tensor:
        _check_image(x)
        # Of the mean, not of the sum: one in half precision could overflow.
        scale = self.k_coef_lip * math.sqrt(x.shape[-2] * x.shape[-1])
        return avg_pool_of_checked(x, None, (1, 1), (0, 0), False, scale)

    def vanilla_export(self) -> nn.Module:
        """The same map as a graph of torch operations, for images of any size."""
        k = self.k_coef_lip

        def pool(x: Tensor) -> Tensor:
            root = (x.size(-2) * x.size(-1)) ** 0.5
            return x.mean(dim=(-2, -1), keepdim=True) * (root * k)

        return plain.traced(pool, self.training)


class ScaledAdaptiveL2NormPool2d(_GlobalPool2d):
    r"""y = k |image|_2 for each channel; ``eps_grad_sqrt`` as in :class:`ScaledL2NormPool2d`.

    ``output_size`` must be 1 or (1, 1). Shape: (N, C, H, W) to (N, C, 1, 1), or without N.

    >>> ScaledAdaptiveL2NormPool2d(1)(torch.ones(1, 2, 3, 3)).flatten()
    tensor([3., 3.])
    """

    def __init__(
        self,
        output_size: int | Sequence[int] = (1, 1),
        *,
        k_coef_lip: float = 1.0,
        eps_grad_sqrt: float = 1e-6,
    ) -> None:
        super().__init__(output_size, k_coef_lip)
        self.eps_grad_sqrt = _checked_eps(eps_grad_sqrt)

    def forward(self, x: Tensor) -> Tensor:
        _check_image(x)
        window = tuple(x.shape[-2:])
        return F.l2_norm_pool2d(x, window, eps=self.eps_grad_sqrt) * self.k_coef_lip

    def vanilla_export(self) -> nn.Module:
        """The norm over the image as a graph of torch operations; its gradient has no guard."""
        k = self.k_coef_lip

        def pool(x: Tensor) -> Tensor:
            return torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True) * k

        return plain.traced(pool, self.training)


ScaledAdaptativeL2NormPool2d = ScaledAdaptiveL2NormPool2d  # deel-torchlip's spelling


def _mean_roundings(module: ScaledAvgPool2d, x: Tensor) -> Roundings:
    """A sum over the window, a division, the product with the scale."""
    return Roundings(math.prod(module._window()[0]) + SCALED + 3)


def _norm_roundings(module: ScaledL2NormPool2d, x: Tensor) -> Roundings:
    """Squares, their sum and its root in float32 at least, then the scale."""
    return Roundings(math.prod(module._window()[0]) + SCALED + 5, squares=True, wide=True)


def _global_mean_roundings(module: ScaledAdaptiveAvgPool2d, x: Tensor) -> Roundings:
    return Roundings(math.prod(x.shape[-2:]) + SCALED + 3)


def _global_norm_roundings(module: ScaledAdaptiveL2NormPool2d, x: Tensor) -> Roundings:
    count = math.prod(x.shape[-2:]) + SCALED + 5
    return Roundings(count, squares=True, wide=True)


ROUNDINGS.update(
    {
        ScaledAvgPool2d.forward: _mean_roundings,
        ScaledL2NormPool2d.forward: _norm_roundings,
        ScaledAdaptiveAvgPool2d.forward: _global_mean_roundings,
        ScaledAdaptiveL2NormPool2d.forward: _global_norm_roundings,
    }
)
