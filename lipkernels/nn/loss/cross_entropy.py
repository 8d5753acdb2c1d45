"""Cross-entropies with the temperature, and the margin, that a Lipschitz network needs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .inputs import (
    as_logits,
    binary_labels,
    check_target,
    class_indices,
    class_labels,
    number,
    readable,
    reduce,
    reduction_name,
)


class TauCrossEntropyLoss(nn.CrossEntropyLoss):
    r"""Cross-entropy of the logits times tau, divided by tau.

    .. math:: L(f) = \frac{1}{\tau} \mathrm{CE}(\tau f(x), y)

    A k-Lipschitz network cannot scale its logits up, so tau sets the trade-off between accuracy
    (large tau) and robustness (small tau). The division by tau keeps the gradient's scale.

    Args:
        tau: inverse temperature, > 0.
        weight, ignore_index, reduction, label_smoothing: as in torch.nn.CrossEntropyLoss. The mean
            over nothing (empty batch, or every target ignored) is 0, where torch's is nan.

    Shape:
        - input: (N, C), (N, C, d1, ...) or (C,), floating point. 16-bit logits give a float32 loss.
        - target: integer class indices, of input's shape without C; or class probabilities in
          [0, 1] (any real dtype; a 0/1 one-hot is one), of input's shape.
        - output: scalar, or of the indices' shape without reduction.

    Raises:
        ValueError: wrong tau, reduction, shape, device or (on CPU, outside torch.compile) an index
            or probability out of range.
        TypeError: input or target not a tensor, or of a wrong dtype.

    Source: Bethune et al. 2022, Pay attention to your loss: understanding misconceptions about
    1-Lipschitz neural networks, arXiv:2104.05097.

    Example:
        >>> import torch
        >>> from lipkernels.nn.loss import TauCrossEntropyLoss
        >>> TauCrossEntropyLoss(tau=10.0)(torch.tensor([[0.1, 0.0]]), torch.tensor([0]))
        tensor(0.0313)
    """

    def __init__(
        self,
        tau: float,
        weight: Tensor | None = None,
        *,
        ignore_index: int = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__(
            weight=weight,
            ignore_index=ignore_index,
            reduction=reduction_name(reduction),
            label_smoothing=label_smoothing,
        )
        self.tau = number("tau", tau)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        logits, target = as_logits(input), check_target(input, target)
        if logits.dim() == 0:
            raise ValueError("input must have shape (C,), (N, C) or (N, C, d1, ...), got ()")
        class_dim = 0 if logits.dim() == 1 else 1
        n_classes = logits.shape[class_dim]
        shape = logits.shape[:class_dim] + logits.shape[class_dim + 1 :]
        weight = None if self.weight is None else self.weight.to(logits.dtype)
        if target.shape == logits.shape:
            target = target.to(logits.dtype)
            if readable(target) and not bool(((target >= 0) & (target <= 1)).all()):
                raise ValueError("class probabilities must lie in [0, 1]; pass 0/1, not -1/+1")
            total = torch.ones(shape, device=logits.device)
        elif target.shape == shape:
            target = class_indices(target, n_classes, self.ignore_index)
            total = target != self.ignore_index
            if weight is not None:
                total = total * weight[target.clamp(0, n_classes - 1)]
        else:
            raise ValueError(
                f"target must be class indices of shape {tuple(shape)} or probabilities of shape "
                f"{tuple(logits.shape)}, got {tuple(target.shape)}"
            )
        loss = F.cross_entropy(
            self.tau * logits,
            target,
            weight,
            ignore_index=self.ignore_index,
            reduction="none" if self.reduction == "none" else "sum",
            label_smoothing=self.label_smoothing,
        )
        loss = loss / self.tau
        if self.reduction != "mean":
            return loss
        # Where the total weight is 0, so is the sum: dividing it by 1 gives the documented 0.
        total = total.sum(dtype=loss.dtype)
        return loss / total.where(total != 0, 1.0)

    def extra_repr(self) -> str:
        return f"tau={self.tau}, reduction={self.reduction!r}"


class TauBCEWithLogitsLoss(nn.BCEWithLogitsLoss):
    r"""Binary cross-entropy of the logits times tau, divided by tau.

    .. math:: L(f) = \frac{1}{\tau} \mathrm{BCE}(\mathrm{sigmoid}(\tau f(x)), y)

    Args:
        tau: inverse temperature, > 0.
        weight, reduction, pos_weight: as in torch.nn.BCEWithLogitsLoss. The mean over an empty
            batch is 0.

    Shape:
        - input: (N,) or (N, C), floating point. 16-bit logits give a float32 loss.
        - target: as input ((N,) and (N, 1) go together); labels 0/1, -1/+1 or bool.
        - output: scalar, or of input's shape without reduction.

    Raises:
        ValueError: wrong tau, reduction, shape, device or (on CPU, outside torch.compile) label
            value.
        TypeError: input or target not a tensor, or of a wrong dtype.

    Source: Bethune et al. 2022, arXiv:2104.05097.

    Example:
        >>> import torch
        >>> from lipkernels.nn.loss import TauBCEWithLogitsLoss
        >>> TauBCEWithLogitsLoss(tau=10.0)(torch.tensor([0.1, 0.0]), torch.tensor([1, -1]))
        tensor(0.0503)
    """

    def __init__(
        self,
        tau: float,
        weight: Tensor | None = None,
        *,
        reduction: str = "mean",
        pos_weight: Tensor | None = None,
    ) -> None:
        super().__init__(weight=weight, reduction=reduction_name(reduction), pos_weight=pos_weight)
        self.tau = number("tau", tau)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        logits, positive = binary_labels(input, target)
        logits, positive = logits.reshape(input.shape), positive.reshape(input.shape)
        loss = F.binary_cross_entropy_with_logits(
            self.tau * logits,
            positive.to(logits.dtype),
            None if self.weight is None else self.weight.to(logits.dtype),
            pos_weight=None if self.pos_weight is None else self.pos_weight.to(logits.dtype),
            reduction="none",
        )
        return reduce(loss / self.tau, self.reduction)

    def extra_repr(self) -> str:
        return f"tau={self.tau}, reduction={self.reduction!r}"


class MarginCrossEntropyLoss(nn.Module):
    r"""Cross-entropy with a temperature, after the true logit is lowered by an offset.

    .. math:: L(f) = T \, \mathrm{CE}\left( \frac{f(x) - o \, \mathrm{onehot}(y)}{T}, y \right)

    As T goes to 0 it becomes :class:`CategoricalHingeLoss` with margin o. The offset asks for the
    certified radius o / (sqrt(2) L) of a network that is L-Lipschitz; T and o together set the
    trade-off between clean accuracy and radius. The gradient of a sample with respect to its
    logits is softmax - onehot, of Euclidean norm at most sqrt(2) for every T and o.

    Args:
        temperature: T > 0. Default 0.5.
        offset: o >= 0, subtracted from the true logit. Default 1.
        reduction: ``"mean"`` (default; 0 for an empty batch), ``"sum"`` or ``"none"``.

    Shapes and errors: see :class:`KRMulticlassLoss`; a number out of its range is a ValueError.

    Source: Prach and Lampert 2022, Almost-orthogonal layers for efficient general-purpose
    Lipschitz networks, arXiv:2208.03160.

    Example:
        >>> import torch
        >>> from lipkernels.nn.loss import MarginCrossEntropyLoss
        >>> MarginCrossEntropyLoss()(torch.tensor([[1.0, 0.0]]), torch.tensor([0]))  # log(2) / 2
        tensor(0.3466)
    """

    def __init__(
        self, temperature: float = 0.5, offset: float = 1.0, reduction: str = "mean"
    ) -> None:
        super().__init__()
        self.temperature = number("temperature", temperature)
        self.offset = number("offset", offset, strict=False)
        self.reduction = reduction_name(reduction)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        logits, positive = class_labels(input, target)
        lowered = torch.where(positive, logits - self.offset, logits) / self.temperature
        loss = F.cross_entropy(lowered, positive.int().argmax(1), reduction="none")
        return reduce(self.temperature * loss, self.reduction)

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}, offset={self.offset}, reduction={self.reduction!r}"
