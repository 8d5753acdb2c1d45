"""Losses of binary and multi-label classifiers: Kantorovich-Rubinstein, hinge, and their mix."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .inputs import binary_labels, mixing_weight, number, reduce, reduction_name


def kr_values(logits: Tensor, positive: Tensor) -> Tensor:
    """Per-sample values, shape (N,), whose mean is the Kantorovich-Rubinstein estimate.

    A column without positives, or without negatives, has no estimate and gives 0. Keeping the one
    mean that it has would push the bias of that logit without end, since no term holds it back.
    """
    n = logits.shape[0]
    n_pos = positive.sum(0, dtype=logits.dtype)  # (C,)
    n_neg = n - n_pos
    both = (n_pos > 0) & (n_neg > 0)
    weight = torch.where(positive, n / n_pos.clamp(min=1), -n / n_neg.clamp(min=1))
    return (weight * both * logits).mean(1)


def hinge_terms(logits: Tensor, positive: Tensor, min_margin: float) -> Tensor:
    """max(0, min_margin / 2 - y f), with y = +1 where ``positive`` and -1 elsewhere."""
    return (min_margin / 2 - torch.where(positive, logits, -logits)).relu()


class KRLoss(nn.Module):
    r"""Kantorovich-Rubinstein estimate of the 1-Wasserstein distance between two classes.

    .. math:: \mathrm{KR}(f) = \frac{1}{C} \sum_c
        \left( \mathbb{E}_{y_c > 0}[f_c(x)] - \mathbb{E}_{y_c \le 0}[f_c(x)] \right)

    with the means taken over the batch. Its supremum over 1-Lipschitz f is the distance, so train
    with :class:`NegKRLoss`; this class reports the distance. A column in which the batch has only
    one of the two labels contributes 0.

    Value of sample i without reduction: the mean over c of :math:`f_c(x_i) N / N^+_c` if
    :math:`y_{ic}` is positive, :math:`-f_c(x_i) N / N^-_c` if not.

    Under data parallelism each rank estimates with the class counts of its own batch, and the
    ranks' gradients are averaged; labels need no preparation. For the estimate over all ranks,
    gather the logits first. This replaces the ``multi_gpu`` argument that other libraries have.

    Args:
        reduction: ``"mean"`` (default; 0 for an empty batch), ``"sum"`` or ``"none"``.

    Shape:
        - input: (N, C), or (N,) for one column; floating point. 16-bit logits give a float32 loss.
        - target: as input ((N,) and (N, 1) go together); labels 0/1, -1/+1 or bool.
        - output: scalar, or (N,) without reduction.

    Raises:
        ValueError: wrong reduction, shape, device or (on CPU, outside torch.compile) label value.
        TypeError: input or target not a tensor, or of a wrong dtype.

    Source: Serrurier et al. 2021, Achieving robustness in classification using optimal transport
    with hinge regularization, arXiv:2006.06520.

    Example:
        >>> import torch
        >>> from lipkernels.nn.loss import KRLoss
        >>> f, y = torch.tensor([[3.0], [1.0], [-1.0]]), torch.tensor([[1], [1], [0]])
        >>> KRLoss()(f, y)  # 2 - (-1)
        tensor(3.)
    """

    def __init__(self, *, reduction: str = "mean") -> None:
        super().__init__()
        self.reduction = reduction_name(reduction)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return reduce(kr_values(*binary_labels(input, target)), self.reduction)

    def extra_repr(self) -> str:
        return f"reduction={self.reduction!r}"


class NegKRLoss(nn.Module):
    r"""Minus the Kantorovich-Rubinstein estimate: the loss that trains a Wasserstein critic.

    .. math:: L(f) = -\mathrm{KR}(f)

    Arguments, shapes, errors, source: see :class:`KRLoss`.

    Example:
        >>> import torch
        >>> from lipkernels.nn.loss import NegKRLoss
        >>> NegKRLoss()(torch.tensor([3.0, 1.0, -1.0]), torch.tensor([1, 1, 0]))
        tensor(-3.)
    """

    def __init__(self, *, reduction: str = "mean") -> None:
        super().__init__()
        self.reduction = reduction_name(reduction)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return reduce(-kr_values(*binary_labels(input, target)), self.reduction)

    def extra_repr(self) -> str:
        return f"reduction={self.reduction!r}"


class HingeMarginLoss(nn.Module):
    r"""Hinge loss with half of the margin on each side of zero.

    .. math:: L(f) = \mathbb{E}\left[ \frac{1}{C} \sum_c \max(0, m/2 - y_c f_c(x)) \right],
        \quad y_c \in \{-1, +1\}

    Args:
        min_margin: the margin m >= 0 between the two classes. Default 1.
        reduction: ``"mean"`` (default; 0 for an empty batch), ``"sum"`` or ``"none"``.

    Shapes and errors: see :class:`KRLoss`; a negative or non-finite min_margin is a ValueError.

    Source: Serrurier et al. 2021, arXiv:2006.06520.

    Example:
        >>> import torch
        >>> from lipkernels.nn.loss import HingeMarginLoss
        >>> loss = HingeMarginLoss(min_margin=2.0, reduction="none")
        >>> loss(torch.tensor([0.25, 3.0]), torch.tensor([1, -1]))
        tensor([0.7500, 4.0000])
    """

    def __init__(self, min_margin: float = 1.0, reduction: str = "mean") -> None:
        super().__init__()
        self.min_margin = number("min_margin", min_margin, strict=False)
        self.reduction = reduction_name(reduction)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        terms = hinge_terms(*binary_labels(input, target), self.min_margin)
        return reduce(terms.mean(1), self.reduction)

    def extra_repr(self) -> str:
        return f"min_margin={self.min_margin}, reduction={self.reduction!r}"


class HKRLoss(nn.Module):
    r"""Hinge-regularized Kantorovich-Rubinstein loss of a binary or multi-label classifier.

    .. math:: L(f) = \alpha \, \mathrm{Hinge}_m(f) - (1 - \alpha) \, \mathrm{KR}(f)

    with :class:`HingeMarginLoss` and :class:`KRLoss`: alpha = 0 is :class:`NegKRLoss`, alpha = 1
    the hinge loss.

    Args:
        alpha: weight of the hinge, in [0, 1]. A value above 1 is read as the hinge's weight
            against a KR term of weight 1, alpha / (1 + alpha), with a UserWarning.
        min_margin: margin m >= 0 of the hinge. Default 1.
        reduction: ``"mean"`` (default; 0 for an empty batch), ``"sum"`` or ``"none"``.

    Shapes, errors, data parallelism: see :class:`KRLoss`; a negative or non-finite alpha or
    min_margin is a ValueError.

    Source: Serrurier et al. 2021, arXiv:2006.06520.

    Example:
        >>> import torch
        >>> from lipkernels.nn.loss import HKRLoss
        >>> f, y = torch.tensor([3.0, 1.0, -1.0]), torch.tensor([1, 1, 0])
        >>> HKRLoss(0.75, min_margin=2.0)(f, y)  # 0.75 * 0 - 0.25 * 3
        tensor(-0.7500)
    """

    def __init__(self, alpha: float, min_margin: float = 1.0, *, reduction: str = "mean") -> None:
        super().__init__()
        self.alpha = mixing_weight(alpha)
        self.min_margin = number("min_margin", min_margin, strict=False)
        self.reduction = reduction_name(reduction)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        logits, positive = binary_labels(input, target)
        hinge = hinge_terms(logits, positive, self.min_margin).mean(1)
        kr = kr_values(logits, positive)
        return reduce(self.alpha * hinge - (1 - self.alpha) * kr, self.reduction)

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}, min_margin={self.min_margin}, reduction={self.reduction!r}"
