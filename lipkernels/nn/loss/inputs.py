"""What every loss checks at its door: numbers, logits, labels; and how it reduces its values."""

from __future__ import annotations

import math
import numbers
import warnings

import torch
from torch import Tensor

# Note [Reading labels]
# Whether a label is one of the allowed values is known only by reading it. On an accelerator that
# stops the stream once per training step, and while torch.compile traces there is nothing to read;
# there only shape, dtype and device are checked. A label is then positive if it is above zero, and
# an out-of-range class index stops at scatter's (or cross_entropy's) own assertion on the device.


def number(name: str, value: object, minimum: float = 0.0, *, strict: bool = True) -> float:
    """``value`` as a finite float above ``minimum`` (``strict=False``: at least ``minimum``)."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a real number, got {type(value).__name__}")
    x = float(value)
    if not math.isfinite(x) or x < minimum or (strict and x == minimum):
        relation = ">" if strict else ">="
        raise ValueError(f"{name} must be a finite number {relation} {minimum:g}, got {value!r}")
    return x


def mixing_weight(alpha: object) -> float:
    """``alpha`` in [0, 1]; one above 1, the older weight of the hinge term, is mapped to it."""
    x = number("alpha", alpha, strict=False)
    if x > 1:
        mapped = x / (1 + x)
        # Two frames up is the caller of the loss's constructor.
        warnings.warn(
            f"alpha={x:g} is above 1: read as the weight of the hinge term against a KR term of "
            f"weight 1, that is alpha={mapped:.6g} in [0, 1]. Pass that value instead.",
            UserWarning,
            stacklevel=3,
        )
        return mapped
    return x


def reduction_name(reduction: object) -> str:
    """``reduction``, one of none, mean, sum; ``auto`` means mean."""
    if reduction == "auto":
        return "mean"
    if not isinstance(reduction, str) or reduction not in ("none", "mean", "sum"):
        raise ValueError(f"reduction must be 'none', 'mean' or 'sum', got {reduction!r}")
    return reduction


def reduce(values: Tensor, reduction: str) -> Tensor:
    """Reduce per-sample values; the mean over an empty batch is 0, so that it trains nothing."""
    if reduction == "none":
        return values
    if reduction == "mean" and values.numel():
        return values.mean()
    return values.sum()


def as_logits(input: object) -> Tensor:
    """``input`` as float32 or float64: 16-bit logits are computed, and returned, in float32."""
    if not isinstance(input, Tensor):
        raise TypeError(f"input must be a tensor of logits, got {type(input).__name__}")
    if not input.is_floating_point():
        raise TypeError(f"input must have a real floating-point dtype, got {input.dtype}")
    return input.float() if input.element_size() < 4 else input


def readable(target: Tensor) -> bool:
    """Whether label values may be read here, see Note [Reading labels]."""
    return target.device.type == "cpu" and not torch.compiler.is_compiling()


def check_target(input: Tensor, target: object) -> Tensor:
    """``target`` as a real tensor on the device of ``input``."""
    if not isinstance(target, Tensor):
        raise TypeError(f"target must be a tensor, got {type(target).__name__}")
    if target.is_complex() or (target.is_floating_point() and target.element_size() == 1):
        raise TypeError(f"target must have a real dtype that can be compared, got {target.dtype}")
    if target.device != input.device:
        raise ValueError(
            f"target must be on the device of input, {input.device}, got {target.device}"
        )
    return target


def _positive(target: Tensor) -> Tensor:
    """Mask of the positive labels; the labels are 0/1, -1/+1 or bool."""
    # int64, because a comparison of unsigned integers with -1 wraps, or is not implemented.
    label = target if target.is_floating_point() else target.long()
    if readable(label):
        bad = (label != 0) & (label != 1) & (label != -1)
        if bool(bad.any()):
            raise ValueError(
                f"target must contain the labels 0/1 or -1/+1, got {label[bad][0].item():g}"
            )
    return label > 0


def binary_labels(input: Tensor, target: object) -> tuple[Tensor, Tensor]:
    """Logits (N, C) in a computing dtype, and the bool mask (N, C) of their positive labels."""
    logits, target = as_logits(input), check_target(input, target)
    if logits.dim() == 1:
        logits = logits.unsqueeze(1)  # (N,) -> (N, 1)
    if logits.dim() != 2 or logits.shape[1] == 0:
        raise ValueError(
            f"input must have shape (N,) or (N, C) with C >= 1, got {tuple(input.shape)}"
        )
    if target.shape != input.shape:
        column = logits.shape[1] == 1
        if not (column and target.shape in (logits.shape, logits.shape[:1])):
            raise ValueError(
                f"target must have the shape of input, {tuple(input.shape)}, "
                f"got {tuple(target.shape)}"
            )
    return logits, _positive(target).reshape(logits.shape)


def class_labels(input: Tensor, target: object) -> tuple[Tensor, Tensor]:
    """Logits (N, C) in a computing dtype, and the one-hot bool mask (N, C) of their classes.

    ``target`` is one-hot, (N, C) with values 0/1 or -1/+1, or class indices, (N,) integers.
    """
    logits, target = as_logits(input), check_target(input, target)
    if logits.dim() != 2 or logits.shape[1] < 2:
        raise ValueError(f"input must have shape (N, C) with C >= 2, got {tuple(logits.shape)}")
    if target.shape == logits.shape:
        positive = _positive(target)
        if readable(target) and bool((positive.sum(1) != 1).any()):
            raise ValueError("target must be one-hot: exactly one positive label in each row")
        return logits, positive
    if target.shape != logits.shape[:1]:
        raise ValueError(
            f"target must be one-hot of shape {tuple(logits.shape)} or class indices of shape "
            f"{tuple(logits.shape[:1])}, got {tuple(target.shape)}"
        )
    index = class_indices(target, logits.shape[1]).unsqueeze(1)
    return logits, torch.zeros_like(logits, dtype=torch.bool).scatter(1, index, True)


def class_indices(target: Tensor, n_classes: int, ignore_index: int | None = None) -> Tensor:
    """``target`` as int64 class indices in [0, n_classes), or ``ignore_index``."""
    if target.is_floating_point() or target.dtype == torch.bool:
        raise TypeError(f"class indices must have an integer dtype, got {target.dtype}")
    index = target.long()
    if readable(target):
        bad = (index < 0) | (index >= n_classes)
        if ignore_index is not None:
            bad &= index != ignore_index
        if bool(bad.any()):
            raise ValueError(
                f"class indices must lie in [0, {n_classes}), got {index[bad][0].item()}"
            )
    return index
