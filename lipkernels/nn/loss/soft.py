"""HKR losses that compare the true logit with a smooth maximum of the wrong ones."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .binary import hinge_terms
from .inputs import class_labels, mixing_weight, number, reduce, reduction_name

# The bounds of the running mean, of the mean that sets the temperature, and of the temperature:
# far outside what training meets; they keep an outlier from freezing or blowing up the softmax.
_MEAN_RANGE = (0.005, 1000.0)
_MEAN_MAX = 20000.0
_TEMPERATURE_RANGE = (0.005, 250.0)


class SoftHKRMulticlassLoss(nn.Module):
    r"""HKR loss of the true class against a softmax-weighted mean of the wrong ones.

    .. math::
        w = \mathrm{softmax}_{c \ne y}(t f_c(x)), \qquad
        L(f) = \mathbb{E}\left[ (1 - \alpha) \left( \sum_{c \ne y} w_c f_c - f_y \right)
        + \alpha \left( \max(0, m/2 - f_y) + \sum_{c \ne y} w_c \max(0, m/2 + f_c) \right) \right]

    The weights are differentiated. The inverse temperature t is not, it is a constant for the
    gradient: t = temperature * m / max(M, m), kept in [0.005, 250], where M is a running mean of
    \|f\| over batches, M <- alpha_mean * M + (1 - alpha_mean) * mean(\|f\|).

    M is the buffer ``current_mean``: it starts at m, is kept in [0.005, 1000], moves to the
    logits' device, and is updated before use by every forward in training mode, except by an empty
    or non-finite batch. Call ``eval()`` on the loss to evaluate with M as it is. Under data
    parallelism each rank has its own M.

    Args:
        alpha: weight of the hinge, in [0, 1]. A value above 1 is read as the hinge's weight
            against a KR term of weight 1, alpha / (1 + alpha), with a UserWarning. Default 0.9.
        min_margin: margin m > 0 of the hinge. Default 1.
        alpha_mean: decay of the running mean, in [0, 1]. Default 0.99.
        temperature: > 0; the larger, the more the largest wrong logit counts. Default 1.
        reduction: ``"mean"`` (default; 0 for an empty batch), ``"sum"`` or ``"none"``.

    Shapes and errors: see :class:`KRMulticlassLoss`; a number out of its range is a ValueError.

    Source: Serrurier et al. 2023, On the explainable properties of 1-Lipschitz neural networks:
    an optimal transport perspective, arXiv:2206.06854.

    Example:
        >>> import torch
        >>> from lipkernels.nn.loss import SoftHKRMulticlassLoss
        >>> loss = SoftHKRMulticlassLoss(alpha=0.5).eval()
        >>> loss(torch.tensor([[2.0, -1.0, -1.0]]), torch.tensor([0]))  # 0.5 * (-1 - 2) + 0.5 * 0
        tensor(-1.5000)
    """

    current_mean: Tensor

    def __init__(
        self,
        alpha: float = 0.9,
        min_margin: float = 1.0,
        alpha_mean: float = 0.99,
        temperature: float = 1.0,
        reduction: str = "mean",
    ) -> None:
        super().__init__()
        self.alpha = mixing_weight(alpha)
        self.min_margin = number("min_margin", min_margin)
        self.alpha_mean = number("alpha_mean", alpha_mean, strict=False)
        if self.alpha_mean > 1:
            raise ValueError(f"alpha_mean must lie in [0, 1], got {alpha_mean!r}")
        self.temperature = number("temperature", temperature)
        self.reduction = reduction_name(reduction)
        self.register_buffer("current_mean", torch.tensor(self.min_margin, dtype=torch.float32))

    @torch.no_grad()
    def _inverse_temperature(self, logits: Tensor) -> Tensor:
        mean = self.current_mean.to(logits.device)
        if self.training and logits.numel():
            batch_mean = logits.abs().mean().to(mean.dtype)
            updated = self.alpha_mean * mean + (1 - self.alpha_mean) * batch_mean
            mean = torch.where(updated.isfinite(), updated, mean)
            if self.current_mean.device != mean.device:
                self.current_mean = self.current_mean.to(mean.device)
            self.current_mean.copy_(mean.clamp(*_MEAN_RANGE))
        # At least m, so that t does not exceed the temperature asked for while logits are small.
        scale = mean.clamp(self.min_margin, max(_MEAN_MAX, self.min_margin))
        return (self.temperature * self.min_margin / scale).clamp(*_TEMPERATURE_RANGE)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        logits, positive = class_labels(input, target)
        t = self._inverse_temperature(logits).to(logits.dtype)
        weight = (t * logits).masked_fill(positive, -float("inf")).softmax(1)
        weight = weight.masked_fill(positive, 1.0)
        kr = torch.where(positive, -logits, logits)
        hinge = hinge_terms(logits, positive, self.min_margin)
        terms = (1 - self.alpha) * kr + self.alpha * hinge
        return reduce((weight * terms).sum(1), self.reduction)

    def extra_repr(self) -> str:
        return (
            f"alpha={self.alpha}, min_margin={self.min_margin}, alpha_mean={self.alpha_mean}, "
            f"temperature={self.temperature}, reduction={self.reduction!r}"
        )


class LseHKRMulticlassLoss(nn.Module):
    r"""HKR loss of the true class against the log-sum-exp of the wrong ones.

    .. math::
        s = \frac{1}{t} \log \sum_{c \ne y} \exp(t g_c), \qquad t = \frac{2 \log(C - 1)}{m p},
        \qquad g = \mathrm{temperature} \cdot f(x)

    .. math:: L(f) = \mathbb{E}\left[ (1 - \alpha) (s - g_y)
        + \alpha \left( \max(0, m/2 - g_y) + \max(0, m/2 + s) \right) \right]

    The smooth maximum satisfies max g_c <= s <= max g_c + p m / 2. With two classes there is one
    wrong logit, and s is that logit.

    Args:
        alpha: weight of the hinge, in [0, 1]. A value above 1 is read as the hinge's weight
            against a KR term of weight 1, alpha / (1 + alpha), with a UserWarning. Default 1: the
            hinge alone.
        temperature: > 0, multiplies the logits. Default 1.
        penalty: p > 0, how far s may exceed the maximum, in units of m / 2. Default 1.
        min_margin: margin m > 0 of the hinge. Default 1.
        reduction: ``"mean"`` (default; 0 for an empty batch), ``"sum"`` or ``"none"``.

    Shapes and errors: see :class:`KRMulticlassLoss`; a number out of its range is a ValueError.

    Source: the HKR loss of Serrurier et al. 2021, arXiv:2006.06520, with a smooth maximum.

    Example:
        >>> import torch
        >>> from lipkernels.nn.loss import LseHKRMulticlassLoss
        >>> loss = LseHKRMulticlassLoss(alpha=0.5)
        >>> loss(torch.tensor([[2.0, -1.0]]), torch.tensor([0]))  # 0.5 * (-1 - 2) + 0.5 * 0
        tensor(-1.5000)
    """

    def __init__(
        self,
        alpha: float = 1.0,
        temperature: float = 1.0,
        penalty: float = 1.0,
        min_margin: float = 1.0,
        reduction: str = "mean",
    ) -> None:
        super().__init__()
        self.alpha = mixing_weight(alpha)
        self.temperature = number("temperature", temperature)
        self.penalty = number("penalty", penalty)
        self.min_margin = number("min_margin", min_margin)
        self.reduction = reduction_name(reduction)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        logits, positive = class_labels(input, target)
        logits = self.temperature * logits
        n_wrong = logits.shape[1] - 1
        # For one wrong logit log(1) = 0 would divide by zero, and every t gives that logit.
        t = 2 * math.log(n_wrong) / (self.min_margin * self.penalty) if n_wrong > 1 else 1.0
        wrong = (t * logits).masked_fill(positive, -float("inf")).logsumexp(1) / t
        true = logits.masked_fill(~positive, 0).sum(1)
        half = self.min_margin / 2
        hinge = (half - true).relu() + (half + wrong).relu()
        return reduce((1 - self.alpha) * (wrong - true) + self.alpha * hinge, self.reduction)

    def extra_repr(self) -> str:
        return (
            f"alpha={self.alpha}, temperature={self.temperature}, penalty={self.penalty}, "
            f"min_margin={self.min_margin}, reduction={self.reduction!r}"
        )
