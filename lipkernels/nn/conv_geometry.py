"""What convolutions and transposed convolutions share: the kernel as a matrix, and its factor."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.modules.utils import _ntuple  # torch.nn's own argument rule

from lipkernels.certify import convolution_factor, operator_factor
from lipkernels.nn.checks import check_channels, check_dtype
from lipkernels.nn.constrained import ConstrainedWeight


class ConstrainedConvNd(ConstrainedWeight):
    """Comes before the torch.nn convolution class in the bases."""

    # Attributes of the torch.nn layer that this is mixed into.
    in_channels: int
    out_channels: int
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    padding_mode: str
    input_size: tuple[int, ...] | None = None
    _factor: tuple[tuple, float] | None = None
    padding: tuple[int, ...] | str
    _reversed_padding_repeated_twice: list[int]

    def matrix(self, weight: Tensor) -> Tensor:
        """(rows, cols), or (groups, rows, cols): rows are the first dimension of the kernel."""
        if self.groups == 1:
            return weight.flatten(1)
        return weight.reshape(self.groups, weight.shape[0] // self.groups, -1)

    def _check(self, input: Tensor, least: tuple[int, ...]) -> None:
        """Refuse what torch would answer with a RuntimeError; ``least``: the smallest image."""
        n = len(self.kernel_size)
        check_channels(input, (n + 1, n + 2), -n - 1, self.in_channels)
        check_dtype(input, self.raw_weight.dtype)
        if any(size < at_least for size, at_least in zip(input.shape[-n:], least, strict=True)):
            raise ValueError(
                f"input: expected a spatial size of at least {least}, got {tuple(input.shape[-n:])}"
            )

    def _padding_pairs(self) -> tuple[tuple[int, int], ...]:
        raise NotImplementedError

    def operator_factor(self) -> float:
        """sqrt(max_i n_i) of the geometry as it is now (stride and padding may be reassigned)."""
        kernel = tuple(self.raw_weight.shape[2:])  # what counts in forward, not `kernel_size`
        as_tuple = _ntuple(len(kernel))
        geometry = (
            kernel,
            as_tuple(self.stride),
            self._padding_pairs(),
            as_tuple(self.dilation),
            self.padding_mode,
            self.input_size,
        )
        if self._factor is None or self._factor[0] != geometry:
            # 0: the taps meet nothing but padding, every weight gives the zero map.
            self._factor = (geometry, operator_factor(*geometry) or 1.0)
        return self._factor[1]

    def _factor_of(self, plain: nn.Module) -> float:
        # The plain layer accepts images of any size, whatever `input_size` was promised here.
        certified = convolution_factor(plain, tuple(self.raw_weight.shape[2:]))
        return max(self.operator_factor(), certified or 0.0)
