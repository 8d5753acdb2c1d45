"""Transposed convolutions with a Lipschitz constant.

A transposed convolution is the adjoint of the convolution with the same kernel and zero padding,
cropped by its padding: its norm is at most that convolution's (:mod:`lipkernels.certify.window`).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.utils import _ntuple  # torch.nn's own argument rule

from lipkernels import constraints
from lipkernels.certify import LAYER_FORWARDS
from lipkernels.nn.conv_geometry import ConstrainedConvNd

_PLAIN_TRANSPOSE = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}


class _SpectralConvTranspose(ConstrainedConvNd):
    """The constructor of SpectralConvTranspose1d, 2d and 3d."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, ...],
        stride: int | tuple[int, ...] = 1,
        padding: int | tuple[int, ...] = 0,
        output_padding: int | tuple[int, ...] = 0,
        groups: int = 1,
        bias: bool = True,
        dilation: int | tuple[int, ...] = 1,
        padding_mode: str = "zeros",
        *,
        k_coef_lip: float = 1.0,
        eps_spectral: float = constraints.DEFAULT_EPS_SPECTRAL,
        eps_bjorck: float | None = constraints.DEFAULT_EPS_BJORCK,
        beta_bjorck: float | None = None,
        maxiter_spectral: int = constraints.DEFAULT_MAXITER_SPECTRAL,
        maxiter_bjorck: int | None = None,
        check: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        constraint = constraints.spectral_constraint(
            eps_spectral, eps_bjorck, beta_bjorck, maxiter_spectral, maxiter_bjorck
        )
        self._plain_class().__init__(
            self,
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            output_padding,
            groups,
            bias,
            dilation,
            padding_mode,
            device,
            dtype,
        )
        self._constrain(constraint, k_coef_lip, check)

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        self._check(input, self._least_sizes(output_size))
        return super().forward(input, output_size)

    def _least_sizes(self, output_size: list[int] | None) -> tuple[int, ...]:
        """For an output of at least one element; a named ``output_size`` is torch's to check."""
        n = len(self.kernel_size)
        if output_size is not None:
            return (1,) * n
        as_tuple = _ntuple(n)
        numbers = (self.stride, self.padding, self.output_padding, self.dilation)
        return tuple(
            max(1, 1 - (d * (k - 1) + extra - 2 * p) // s)
            for k, s, p, extra, d in zip(self.kernel_size, *map(as_tuple, numbers), strict=True)
        )

    def _plain_class(self) -> type[nn.Module]:
        return next(cls for cls in _PLAIN_TRANSPOSE.values() if isinstance(self, cls))

    def _padding_pairs(self) -> tuple[tuple[int, int], ...]:
        # Padding crops the output of a transposed convolution, which can only lower the norm.
        return ((0, 0),) * len(self.kernel_size)

    def vanilla_export(self, strict: bool = False) -> nn.Module:
        """A plain :mod:`torch.nn` transposed convolution with the constrained weight.

        ``strict``: such that ``lipschitz_bound`` of the result is at most the promised constant.
        """
        layer = self._plain_class()(
            self.in_channels,
            self.out_channels,
            self.kernel_size,
            self.stride,
            self.padding,
            self.output_padding,
            self.groups,
            self.bias is not None,
            self.dilation,
            self.padding_mode,
            device="meta",
        )
        return self._export_into(layer, strict)


class SpectralConvTranspose1d(_SpectralConvTranspose, nn.ConvTranspose1d):
    """:class:`SpectralConvTranspose2d` in one dimension: (N, C, L)."""


class SpectralConvTranspose2d(_SpectralConvTranspose, nn.ConvTranspose2d):
    r"""A transposed convolution of norm at most ``k_coef_lip``, on inputs of any size.

    It is the adjoint of the convolution with the same kernel, cropped; the matrix of a group is
    (c_in / groups, c_out / groups * kh * kw), and the factor that of the convolution with zero
    padding. Arguments as in :class:`torch.nn.ConvTranspose2d` and
    :class:`lipkernels.nn.SpectralLinear`.

    >>> SpectralConvTranspose2d(8, 3, 2, stride=2)(torch.zeros(1, 8, 4, 4)).shape
    torch.Size([1, 3, 8, 8])
    """


class SpectralConvTranspose3d(_SpectralConvTranspose, nn.ConvTranspose3d):
    """:class:`SpectralConvTranspose2d` in three dimensions: (N, C, D, H, W)."""


LAYER_FORWARDS.add(_SpectralConvTranspose.forward)
