"""Losses of one-against-all and of largest-wrong-logit multiclass classifiers."""

from __future__ import annotations

from torch import Tensor, nn

from .binary import hinge_terms, kr_values
from .inputs import class_labels, mixing_weight, number, reduce, reduction_name


def hinge_values(logits: Tensor, positive: Tensor, min_margin: float) -> Tensor:
    """Mean over the classes of the hinge terms, the true class weighing as much as all others."""
    hinge = hinge_terms(logits, positive, min_margin)
    return hinge.where(~positive, (logits.shape[1] - 1) * hinge).mean(1)


class KRMulticlassLoss(nn.Module):
    r"""Kantorovich-Rubinstein estimate of each class against the rest, averaged over the classes.

    .. math:: \mathrm{KR}(f) = \frac{1}{C} \sum_c
        \left( \mathbb{E}_{y = c}[f_c(x)] - \mathbb{E}_{y \ne c}[f_c(x)] \right)

    It grows as the classes separate: train with :class:`HKRMulticlassLoss`, at alpha = 0 for this
    term alone. A class that is missing from the batch, or fills it, contributes 0.

    Args:
        reduction: ``"mean"`` (default; 0 for an empty batch), ``"sum"`` or ``"none"``.

    Shape:
        - input: (N, C), C >= 2, floating point. 16-bit logits give a float32 loss.
        - target: one-hot (N, C) with values 0/1, -1/+1 or bool; or integer class indices (N,).
        - output: scalar, or (N,) without reduction.

    Raises:
        ValueError: wrong reduction, shape, device or (on CPU, outside torch.compile) label value,
            or a row without exactly one positive label; for multi-label targets see
            :class:`KRLoss`.
        TypeError: input or target not a tensor, or of a wrong dtype.

    Data parallelism: as for :class:`KRLoss`, which replaces a ``multi_gpu`` argument.

    Source: Serrurier et al. 2021, arXiv:2006.06520.

    Example:
        >>> import torch
        >>> from lipkernels.nn.loss import KRMulticlassLoss
        >>> KRMulticlassLoss()(torch.tensor([[3.0, 0.0], [1.0, 4.0]]), torch.tensor([0, 1]))
        tensor(3.)
    """

    def __init__(self, *, reduction: str = "mean") -> None:
        super().__init__()
        self.reduction = reduction_name(reduction)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return reduce(kr_values(*class_labels(input, target)), self.reduction)

    def extra_repr(self) -> str:
        return f"reduction={self.reduction!r}"


class HingeMulticlassLoss(nn.Module):
    r"""Hinge loss of each class against the rest.

    .. math:: L(f) = \mathbb{E}\left[ \frac{1}{C} \left( (C - 1) \max(0, m/2 - f_y(x))
        + \sum_{c \ne y} \max(0, m/2 + f_c(x)) \right) \right]

    The true class weighs as much as the C - 1 others together. Unlike torch's MultiMarginLoss it
    compares each logit with zero, not with the true logit.

    Args:
        min_margin: the margin m >= 0 between a class and the rest. Default 1.
        reduction: ``"mean"`` (default; 0 for an empty batch), ``"sum"`` or ``"none"``.

    Shapes and errors: see :class:`KRMulticlassLoss`; a negative or non-finite min_margin is a
    ValueError.

    Source: Serrurier et al. 2021, arXiv:2006.06520.

    Example:
        >>> import torch
        >>> from lipkernels.nn.loss import HingeMulticlassLoss
        >>> loss = HingeMulticlassLoss(min_margin=1.0)
        >>> loss(torch.tensor([[0.25, 0.0, -3.0]]), torch.tensor([0]))  # (2 * 0.25 + 0.5 + 0) / 3
        tensor(0.3333)
    """

    def __init__(self, min_margin: float = 1.0, reduction: str = "mean") -> None:
        super().__init__()
        self.min_margin = number("min_margin", min_margin, strict=False)
        self.reduction = reduction_name(reduction)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        values = hinge_values(*class_labels(input, target), self.min_margin)
        return reduce(values, self.reduction)

    def extra_repr(self) -> str:
        return f"min_margin={self.min_margin}, reduction={self.reduction!r}"


class HKRMulticlassLoss(nn.Module):
    r"""Hinge-regularized Kantorovich-Rubinstein loss of each class against the rest.

    .. math:: L(f) = \alpha \, \mathrm{Hinge}_m(f) - (1 - \alpha) \, \mathrm{KR}(f)

    with :class:`HingeMulticlassLoss` and :class:`KRMulticlassLoss`.

    Args:
        alpha: weight of the hinge, in [0, 1]. A value above 1 is read as the hinge's weight
            against a KR term of weight 1, alpha / (1 + alpha), with a UserWarning.
        min_margin: margin m >= 0 of the hinge. Default 1.
        reduction: ``"mean"`` (default; 0 for an empty batch), ``"sum"`` or ``"none"``.

    Shapes, errors, data parallelism: see :class:`KRMulticlassLoss`; a negative or non-finite
    alpha or min_margin is a ValueError.

    Source: Serrurier et al. 2021, arXiv:2006.06520.

    Example:
        >>> import torch
        >>> from lipkernels.nn.loss import HKRMulticlassLoss
        >>> f, y = torch.tensor([[3.0, -1.0], [-1.0, 4.0]]), torch.tensor([0, 1])
        >>> HKRMulticlassLoss(0.75)(f, y)  # 0.75 * 0 - 0.25 * 4.5
        tensor(-1.1250)
    """

    def __init__(self, alpha: float, min_margin: float = 1.0, *, reduction: str = "mean") -> None:
        super().__init__()
        self.alpha = mixing_weight(alpha)
        self.min_margin = number("min_margin", min_margin, strict=False)
        self.reduction = reduction_name(reduction)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        logits, positive = class_labels(input, target)
        hinge = hinge_values(logits, positive, self.min_margin)
        kr = kr_values(logits, positive)
        return reduce(self.alpha * hinge - (1 - self.alpha) * kr, self.reduction)

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}, min_margin={self.min_margin}, reduction={self.reduction!r}"


class CategoricalHingeLoss(nn.Module):
    r"""Hinge loss of the true logit against the largest wrong one.

    .. math:: L(f) = \mathbb{E}\left[ \max(0, m - f_y(x) + \max_{c \ne y} f_c(x)) \right]

    It is zero where the certified radius of a correct sample is at least m / (sqrt(2) L), L the
    network's Lipschitz constant. Wrong logits that tie for the maximum share the gradient.

    Args:
        min_margin: the margin m >= 0 between the two logits. Default 1.
        reduction: ``"mean"`` (default; 0 for an empty batch), ``"sum"`` or ``"none"``.

    Shapes and errors: see :class:`KRMulticlassLoss`; a negative or non-finite min_margin is a
    ValueError.

    Source: Crammer and Singer 2001, On the algorithmic implementation of multiclass kernel-based
    vector machines, JMLR 2.

    Example:
        >>> import torch
        >>> from lipkernels.nn.loss import CategoricalHingeLoss
        >>> f = torch.tensor([[2.0, 1.5, 0.0], [0.0, 9.0, 1.0]])
        >>> CategoricalHingeLoss(reduction="none")(f, torch.tensor([0, 1]))
        tensor([0.5000, 0.0000])
    """

    def __init__(self, min_margin: float = 1.0, reduction: str = "mean") -> None:
        super().__init__()
        self.min_margin = number("min_margin", min_margin, strict=False)
        self.reduction = reduction_name(reduction)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        logits, positive = class_labels(input, target)
        true = logits.masked_fill(~positive, 0).sum(1)
        wrong = logits.masked_fill(positive, -float("inf")).amax(1)
        return reduce((self.min_margin - true + wrong).relu(), self.reduction)

    def extra_repr(self) -> str:
        return f"min_margin={self.min_margin}, reduction={self.reduction!r}"
