"""Convolutions with a Lipschitz constant.

The kernel, as a matrix for each group, is given the norm k / sqrt(max_i n_i), n_i the number of
(output, tap) pairs that read input element i: see :mod:`lipkernels.certify.window` for the proof
that the convolution's norm is then at most k, whatever the padding, stride, dilation and image
size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.utils import _pair, _single, _triple  # torch.nn's own argument rule

from lipkernels import constraints
from lipkernels.certify import LAYER_FORWARDS, conv_padding
from lipkernels.certify.window import smallest_input
from lipkernels.functional import symmetric_pad
from lipkernels.nn import plain
from lipkernels.nn.conv_geometry import ConstrainedConvNd

_TUPLE = {1: _single, 2: _pair, 3: _triple}
_PLAIN_CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


class _ConstrainedConv(ConstrainedConvNd):
    def _build(
        self,
        arguments: tuple,
        padding_mode: str,
        input_size: int | Sequence[int] | None,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        """Call torch.nn's constructor, which does not know symmetric padding."""
        known = "zeros" if padding_mode == "symmetric" else padding_mode
        n = self._n_dims()
        _PLAIN_CONV[n].__init__(self, *arguments, known, device, dtype)
        self.padding_mode = padding_mode
        if input_size is not None:
            size = _TUPLE[n](input_size)
            if len(size) != n or not all(isinstance(v, int) and v > 0 for v in size):
                raise ValueError(
                    f"input_size: expected {n} positive integers (spatial size), got {input_size!r}"
                )
            self.input_size = tuple(size)

    def forward(self, input: Tensor) -> Tensor:
        self._check(input, self._least_sizes())
        return self._conv_forward(input, self.weight, self.bias)

    def _n_dims(self) -> int:
        return next(n for n, cls in _PLAIN_CONV.items() if isinstance(self, cls))

    def _padding_pairs(self) -> tuple[tuple[int, int], ...]:
        return conv_padding(self)

    def _least_sizes(self) -> tuple[int, ...]:
        dilations = _TUPLE[self._n_dims()](self.dilation)
        kernel, pairs = self.raw_weight.shape[2:], self._padding_pairs()
        return tuple(
            smallest_input(k, left, right, d, self.padding_mode)
            for k, (left, right), d in zip(kernel, pairs, dilations, strict=True)
        )

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self.input_size is not None and tuple(input.shape[-self._n_dims() :]) != self.input_size:
            raise ValueError(
                f"input: expected the spatial size {self.input_size} that the layer was built for,"
                f" got {tuple(input.shape[-self._n_dims() :])}"
            )
        if self.padding_mode != "symmetric":
            plain_conv = super()._conv_forward  # pyright: ignore[reportAttributeAccessIssue]
            return plain_conv(input, weight, bias)
        padded = symmetric_pad(input, self._reversed_padding_repeated_twice)
        n = self._n_dims()
        conv = {1: nn.functional.conv1d, 2: nn.functional.conv2d, 3: nn.functional.conv3d}[n]
        return conv(padded, weight, bias, self.stride, 0, self.dilation, self.groups)

    def vanilla_export(self, strict: bool = False) -> nn.Module:
        """A plain torch.nn convolution; symmetric padding becomes a graph before it.

        ``strict``: such that ``lipschitz_bound`` of the convolution is at most the promised
        constant, for images of any size.
        """
        symmetric = self.padding_mode == "symmetric"
        layer = _PLAIN_CONV[self._n_dims()](
            self.in_channels,
            self.out_channels,
            self.kernel_size,
            self.stride,
            0 if symmetric else self.padding,
            self.dilation,
            self.groups,
            self.bias is not None,
            "zeros" if symmetric else self.padding_mode,
            device="meta",
        )
        if not symmetric:
            # What forward pads by, and the factor counted: torch reads self.padding only once.
            layer._reversed_padding_repeated_twice = list(self._reversed_padding_repeated_twice)
        self._export_into(layer, strict)
        if not symmetric:
            return layer
        pad = plain.symmetric_padding(self._padding_pairs(), self.training)
        return nn.Sequential(pad, layer).train(self.training)

    def extra_repr(self) -> str:
        size = "" if self.input_size is None else f", input_size={self.input_size}"
        return super().extra_repr() + size


class _SpectralConv(_ConstrainedConv):
    """The constructor of SpectralConv1d, 2d and 3d."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, ...],
        stride: int | tuple[int, ...] = 1,
        padding: int | tuple[int, ...] | str = 0,
        dilation: int | tuple[int, ...] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        *,
        input_size: int | Sequence[int] | None = None,
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
        arguments = (
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias,
        )
        self._build(arguments, padding_mode, input_size, device, dtype)
        self._constrain(constraint, k_coef_lip, check)


class _FrobeniusConv(_ConstrainedConv):
    """The constructor of FrobeniusConv1d, 2d and 3d."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, ...],
        stride: int | tuple[int, ...] = 1,
        padding: int | tuple[int, ...] | str = 0,
        dilation: int | tuple[int, ...] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        *,
        input_size: int | Sequence[int] | None = None,
        k_coef_lip: float = 1.0,
        check: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        arguments = (
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias,
        )
        self._build(arguments, padding_mode, input_size, device, dtype)
        self._constrain(constraints.FrobeniusNormalization(per_row=False), k_coef_lip, check)


class SpectralConv1d(_SpectralConv, nn.Conv1d):
    """:class:`SpectralConv2d` in one dimension: (N, C, L)."""


class SpectralConv2d(_SpectralConv, nn.Conv2d):
    r"""A convolution of l2 operator norm at most ``k_coef_lip`` on images of any size.

    The kernel matrix (c_out / groups, c_in / groups * kh * kw) of each group is k / f times its
    polar factor (or times V / sigma_max(V) with ``eps_bjorck=None``), f = sqrt(max_i n_i) as in
    :mod:`lipkernels.certify.window`. For zero padding f^2 = prod ceil(k g / s), g = gcd(d, s).

    Args:
        in_channels .. padding_mode, device, dtype: as in :class:`torch.nn.Conv2d`; ``padding_mode``
            may also be "symmetric" (the edge is repeated).
        input_size: (height, width) of every input, for a tighter f; other inputs raise ValueError.
        k_coef_lip .. check: as in :class:`lipkernels.nn.SpectralLinear`.

    Shape: (N, C, H, W) or (C, H, W) as in torch. Source: the kernel-matrix bound of Cisse et al.,
    arXiv 1704.08847, with the exact count in place of the kernel size.

    >>> layer = SpectralConv2d(3, 8, 3, padding=1)
    >>> layer(torch.zeros(2, 3, 16, 16)).shape
    torch.Size([2, 8, 16, 16])
    """


class SpectralConv3d(_SpectralConv, nn.Conv3d):
    """:class:`SpectralConv2d` in three dimensions: (N, C, D, H, W)."""


class FrobeniusConv1d(_FrobeniusConv, nn.Conv1d):
    """:class:`FrobeniusConv2d` in one dimension: (N, C, L)."""


class FrobeniusConv2d(_FrobeniusConv, nn.Conv2d):
    r"""A convolution of norm at most ``k_coef_lip``: each group's kernel over its Frobenius norm.

    Cheaper and looser than :class:`SpectralConv2d`, whose other arguments it shares.

    >>> FrobeniusConv2d(3, 8, 3)(torch.zeros(1, 3, 8, 8)).shape
    torch.Size([1, 8, 6, 6])
    """


class FrobeniusConv3d(_FrobeniusConv, nn.Conv3d):
    """:class:`FrobeniusConv2d` in three dimensions: (N, C, D, H, W)."""


LAYER_FORWARDS.update((_ConstrainedConv.forward, _ConstrainedConv._conv_forward))
