"""The rounding of a batch norm in evaluation.

y = alpha (x - mean) + b with alpha = w / sqrt(var + eps). Whichever way it is multiplied out (alpha
x + (b - mean alpha), say), each of alpha x, alpha mean and b goes through at most 16 roundings, so
that, entry by entry,

    |fl(y) - y| <= gamma_16 (|alpha| (|x| + |mean|) + |b|)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lipkernels.certify.arithmetic import UP, Arithmetic, LayerError, gamma, norms, operations

_ROUNDINGS = 16
_LEAST_VARIANCE = 1e-30  # far enough from numbers that may be flushed to zero


class BatchNormRule:
    """A torch.nn.BatchNorm in evaluation, with statistics."""

    is_convolution = False
    dtype: torch.dtype | None = None

    def __init__(self, module: Any, lipschitz: float) -> None:
        self.lipschitz = lipschitz
        self._mean = module.running_mean.detach().double()
        self._var = module.running_var.detach().double()
        weight, bias = module.weight, module.bias
        mean = self._mean
        self._weight = torch.ones_like(mean) if weight is None else weight.detach().double()
        self._bias = torch.zeros_like(mean) if bias is None else bias.detach().double()
        self._eps = module.eps
        smallest = float((self._var + self._eps).min()) if self._var.numel() else 1.0
        if smallest < _LEAST_VARIANCE:
            raise ValueError(
                f"expected a variance (with eps) of at least {_LEAST_VARIANCE}, got {smallest}"
            )
        self._spread = smallest**-0.5

    def _apply(self, z: Tensor, mean: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return nn.functional.batch_norm(z, mean, self._var, weight, bias, False, 0.0, self._eps)

    def check_input(self, z: Tensor) -> None:
        """ValueError unless ``z`` is a batch."""
        if z.dim() < 2:
            raise ValueError(f"expected a batch of samples, got shape {tuple(z.shape)}")

    def arithmetic(self, given: torch.dtype, stored: torch.dtype) -> Arithmetic:
        """For an input ``given`` and an output ``stored``."""
        return operations(given, stored)

    def exact(self, z: Tensor) -> Tensor:
        """The normalization in float64."""
        return self._apply(z, self._mean, self._weight, self._bias)

    def errors(self, z: Tensor, y: Tensor, arithmetics: list[Arithmetic]) -> list[LayerError]:
        """Around the float64 point ``z``, whose image is ``y``: one for each arithmetic."""
        ones, zeros = torch.ones_like(self._mean), torch.zeros_like(self._mean)
        mean = -self._mean.abs()
        total = norms(self._apply(z.abs(), mean, self._weight.abs(), self._bias.abs()))
        unweighted = norms(self._apply(z.abs(), mean, ones, zeros))
        width = y[:1].numel() ** 0.5
        gain = max(1.0, self.lipschitz, self._spread)
        results = []
        for a in arithmetics:
            relative = gamma(_ROUNDINGS, a.unit) * UP
            # Flushed to zero: a weight, which multiplies by `unweighted`; a result.
            flushed = 2 * _ROUNDINGS * a.tiny
            constant = relative * total + flushed * (unweighted + gain * width)
            slope = relative * self.lipschitz + flushed * gain
            reach = (total + unweighted + norms(z)) * 2
            results.append(LayerError(constant, slope, reach, 4 * gain))
        return results
