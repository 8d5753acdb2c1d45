"""Invertible down- and upsampling: all pixels are kept, moved to channels and back."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from lipkernels import functional as F
from lipkernels.certify import EXACT, ROUNDINGS, SCALED, Roundings
from lipkernels.nn import plain
from lipkernels.nn.module import LipschitzFunction
from lipkernels.reference import sampling as reference


class _InvertibleSampling(LipschitzFunction):
    def __init__(
        self,
        kernel_size: int | Sequence[int],
        *,
        k_coef_lip: float = 1.0,
        data_format: str = "channels_first",
        mode: str = "CRD",
    ) -> None:
        super().__init__()
        several = isinstance(kernel_size, Sequence)
        pair = tuple(kernel_size) if several else (kernel_size, kernel_size)
        if len(pair) != 2 or not all(isinstance(p, int) and p > 0 for p in pair):
            raise ValueError(
                f"kernel_size: expected a positive integer or a pair of them, got {kernel_size!r}"
            )
        if data_format not in ("channels_first", "channels_last"):
            raise ValueError(
                f"data_format: expected 'channels_first' or 'channels_last', got {data_format!r}"
            )
        if mode not in ("CRD", "DCR"):
            raise ValueError(f"mode: expected 'CRD' or 'DCR', got {mode!r}")
        self.kernel_size = pair
        self.data_format = data_format
        self.mode = mode
        self.k_coef_lip = k_coef_lip

    def _is_torch_shuffle(self) -> bool:
        ph, pw = self.kernel_size
        return ph == pw and self.mode == "CRD" and self.data_format == "channels_first"

    def extra_repr(self) -> str:
        return (
            f"kernel_size={self.kernel_size}, data_format={self.data_format}, mode={self.mode},"
            f" k_coef_lip={self.k_coef_lip:g}"
        )


class InvertibleDownSampling(_InvertibleSampling):
    r"""Move each (ph, pw) block of pixels to channels, times k. Exactly invertible for k = 1.

    Args:
        kernel_size: the block, an integer or (ph, pw); it must divide the image (ValueError).
        k_coef_lip: the Lipschitz constant.
        data_format: "channels_first" (N, C, H, W) or "channels_last" (N, H, W, C).
        mode: order of the channels: "CRD", c ph pw + a pw + d (:class:`torch.nn.PixelUnshuffle`),
            or "DCR", (a pw + d) C + c (deel-lip up to 1.5.0).

    Shape: (N, C, H, W) to (N, C ph pw, H/ph, W/pw). Source: Jacobsen et al., arXiv 1802.07088.

    >>> InvertibleDownSampling(2)(torch.zeros(1, 3, 4, 4)).shape
    torch.Size([1, 12, 2, 2])
    """

    def forward(self, x: Tensor) -> Tensor:
        return F.space_to_depth(
            x,
            self.kernel_size,
            mode=self.mode,
            data_format=self.data_format,
            scale=self.k_coef_lip,
        )

    def vanilla_export(self) -> nn.Module:
        """:class:`torch.nn.PixelUnshuffle` where it is the same map, else a graph."""
        ph, pw = self.kernel_size
        if self._is_torch_shuffle():
            module: nn.Module = nn.PixelUnshuffle(ph).train(self.training)
        else:
            mode, last = self.mode, self.data_format == "channels_last"
            module = plain.traced(
                lambda x: reference.space_to_depth(x, ph, pw, mode, last), self.training
            )
        return plain.scaled(module, self.k_coef_lip)


class InvertibleUpSampling(_InvertibleSampling):
    r"""The inverse of :class:`InvertibleDownSampling` with the same arguments (for k = 1).

    Shape: (N, C ph pw, H, W) to (N, C, H ph, W pw). Raises ValueError where ph pw does not divide
    the number of channels.

    >>> InvertibleUpSampling(2)(torch.zeros(1, 12, 2, 2)).shape
    torch.Size([1, 3, 4, 4])
    """

    def forward(self, x: Tensor) -> Tensor:
        return F.depth_to_space(
            x,
            self.kernel_size,
            mode=self.mode,
            data_format=self.data_format,
            scale=self.k_coef_lip,
        )

    def vanilla_export(self) -> nn.Module:
        """:class:`torch.nn.PixelShuffle` where it is the same map, else a graph."""
        ph, pw = self.kernel_size
        if self._is_torch_shuffle():
            module: nn.Module = nn.PixelShuffle(ph).train(self.training)
        else:
            mode, last = self.mode, self.data_format == "channels_last"
            module = plain.traced(
                lambda x: reference.depth_to_space(x, ph, pw, mode, last), self.training
            )
        return plain.scaled(module, self.k_coef_lip)


def _scaling(module: _InvertibleSampling, x: Tensor) -> Roundings:
    """Roundings of a permutation times k."""
    return EXACT if module.k_coef_lip == 1.0 else Roundings(SCALED)


ROUNDINGS.update({InvertibleDownSampling.forward: _scaling, InvertibleUpSampling.forward: _scaling})
