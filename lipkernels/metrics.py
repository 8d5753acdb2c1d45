"""Certified radius, certified accuracy and clean accuracy of a classifier, from its logits.

Note [Certified radius]
Let f be L-Lipschitz from l2 to l2. For classes i, j the margin f_i - f_j is (e_i - e_j)^T f, hence
sqrt(2) L-Lipschitz, and it stays positive under every perturbation shorter than
(f_i - f_j) / (sqrt(2) L). With i the largest logit and j the second, no logit overtakes i. One
column of logits classifies by its sign, and f itself is L-Lipschitz: the radius is |f| / L.

If each logit given here is off by at most e from the one that real arithmetic would give, the true
margin is at least top1 - top2 - 2 e, and the true |f| at least |f| - e.

Note [Rounding down]
Each float64 operation returns the neighbour nearest to the exact value, so the exact value lies
strictly above the float below it: one step towards -inf after each operation (towards +inf for the
denominator) makes a strict lower bound of the exact formula, subnormal numbers included. Strict is
useful: the closed ball of the returned radius lies inside the open ball that is certified.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import SupportsFloat

import torch
from torch import Tensor

_INF = float("inf")


def _down(x: Tensor) -> Tensor:
    return torch.nextafter(x, x.new_tensor(-_INF))


def _check_logits(logits: object) -> Tensor:
    if not isinstance(logits, Tensor):
        raise TypeError(f"logits must be a tensor, got {type(logits).__name__}")
    if not logits.is_floating_point() or logits.element_size() == 1:  # float8 has no arithmetic
        raise TypeError(f"logits must have a real floating-point dtype, got {logits.dtype}")
    if logits.dim() != 2 or logits.shape[1] == 0:
        raise ValueError(
            f"logits must have shape (N, C), or (N, 1) for a binary classifier, "
            f"got {tuple(logits.shape)}"
        )
    return logits.detach()


def _check_labels(logits: Tensor, labels: object) -> Tensor:
    """Labels (N,): class indices, int64; for one column of logits a bool mask of the positives."""
    if not isinstance(labels, Tensor):
        raise TypeError(f"labels must be a tensor, got {type(labels).__name__}")
    n, n_classes = logits.shape
    if labels.shape != (n,) and not (n_classes == 1 and labels.shape == (n, 1)):
        raise ValueError(f"labels must have shape ({n},), got {tuple(labels.shape)}")
    if labels.is_floating_point() and labels.element_size() == 1:
        raise TypeError(f"labels must have a dtype that can be compared, got {labels.dtype}")
    if labels.device != logits.device:
        raise ValueError(
            f"labels must be on the device of logits, {logits.device}, got {labels.device}"
        )
    if n_classes == 1:
        if labels.is_complex():
            raise TypeError(f"binary labels must have a real dtype, got {labels.dtype}")
        # int64, because a comparison of unsigned integers with -1 wraps, or is not implemented.
        sign = labels if labels.is_floating_point() else labels.long()
        bad = (sign != 0) & (sign != 1) & (sign != -1)
        if bool(bad.any()):
            raise ValueError(
                "labels of a single logit column must be 0/1, -1/+1 or bool, "
                f"got {sign[bad][0].item():g}"
            )
        return sign.reshape(n) > 0
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(f"labels must have an integer dtype, got {labels.dtype}")
    index = labels.long()
    bad = (index < 0) | (index >= n_classes)
    if bool(bad.any()):
        raise ValueError(
            f"labels must be class indices in [0, {n_classes}), got {index[bad][0].item()}"
        )
    return index


def _number(name: str, value: object) -> float:
    if isinstance(value, Tensor) and (value.numel() != 1 or value.is_complex()):
        raise TypeError(f"{name} must be one real number, got a tensor of {tuple(value.shape)}")
    if isinstance(value, (bool, str, bytes)) or not isinstance(value, SupportsFloat):
        raise TypeError(f"{name} must be a number or have __float__, got {type(value).__name__}")
    return float(value)


def _check_error(error: object, logits: Tensor) -> Tensor:
    """``error`` per sample, float64 (N,)."""
    if isinstance(error, Tensor) and error.dim() > 0:
        if not error.is_floating_point():
            raise TypeError(f"error must have a real floating-point dtype, got {error.dtype}")
        if error.shape != logits.shape[:1]:
            raise ValueError(
                f"error must be a number or have shape ({logits.shape[0]},), "
                f"got {tuple(error.shape)}"
            )
        if error.device != logits.device:
            raise ValueError(
                f"error must be on the device of logits, {logits.device}, got {error.device}"
            )
        e = error.detach().double()
    else:
        e = torch.full_like(logits[:, 0], _number("error", error), dtype=torch.float64)
    if bool((e < 0).any()):
        raise ValueError(f"error must be >= 0, got {e.min().item():g}")
    return e


def _is_correct(logits: Tensor, labels: Tensor) -> Tensor:
    """Whether the label's logit is strictly the largest (one column: has the label's sign)."""
    if logits.shape[1] == 1:
        f = logits[:, 0]
        return torch.where(labels, f > 0, f < 0)
    index = labels.unsqueeze(1)
    wrong = logits.scatter(1, index, -_INF).amax(1)
    return logits.gather(1, index).squeeze(1) > wrong


def certified_radius(
    logits: Tensor, bound: SupportsFloat, error: SupportsFloat | Tensor = 0.0
) -> Tensor:
    r"""l2 radius around each sample within which the predicted class cannot change.

    .. math:: r = \max\left(0, \frac{f_{(1)} - f_{(2)} - 2 e}{\sqrt{2} L}\right), \qquad
        \text{one column:}\quad r = \max\left(0, \frac{|f| - e}{L}\right)

    with f_(1), f_(2) the two largest logits, L the bound and e the error; derived in
    Note [Certified radius]. Computed in float64 and rounded down: the result is strictly below the
    formula's exact value wherever that is positive, so the closed ball of that radius is certified.
    It is 0 for a tie, where a logit of the sample is nan or infinite, and where bound or error is.
    Whether the prediction is right plays no part: see :func:`certified_accuracy`.

    Args:
        logits: (N, C), or (N, 1) for a binary classifier; floating point.
        bound: Lipschitz constant of the network as a map from l2 to l2, > 0: a number or an object
            with ``__float__``. A certificate needs a rigorous upper bound.
        error: bound on the absolute error of every logit, >= 0: the rounding of the forward pass,
            in the units of the logits. A number, or one per sample, (N,). Default 0: in real
            arithmetic. ``lipkernels.certify.certified_radius(model, inputs)`` needs none: it proves
            the rounding of the pass that is run.

    Returns:
        float64 tensor (N,), without gradient.

    Raises:
        ValueError: wrong shape or device, bound <= 0, a negative error.
        TypeError: logits not a floating-point tensor, bound or error not a number.

    Source: Tsuzuku, Sato, Sugiyama 2018, Lipschitz-margin training, arXiv:1802.04034.

    Example:
        >>> import torch
        >>> from lipkernels.metrics import certified_radius
        >>> certified_radius(torch.tensor([[3.0, 1.0], [2.0, 2.0]]), bound=1.0)  # sqrt(2), a tie
        tensor([1.4142, 0.0000], dtype=torch.float64)
    """
    logits = _check_logits(logits)
    lip = _number("bound", bound)
    if lip <= 0:
        raise ValueError(f"bound must be > 0, got {lip:g}")
    e = _check_error(error, logits)
    f = logits.double()
    # float(bound) may have rounded down (a Fraction, a Decimal): one step up covers it.
    denominator = math.nextafter(lip, _INF)
    if f.shape[1] == 1:
        margin = _down(f[:, 0].abs() - e)
    else:
        top = f.topk(2, dim=1).values  # (N, 2)
        margin = _down(_down(top[:, 0] - top[:, 1]) - 2 * e)
        # float64's sqrt(2) lies above the real one; only the product needs rounding up.
        denominator = math.nextafter(math.sqrt(2.0) * denominator, _INF)
    # A tensor, not a Python number: on CUDA dividing by a number multiplies by its reciprocal,
    # which rounds twice.
    radius = _down(margin / torch.full_like(margin, denominator))
    valid = f.isfinite().all(1) & (radius > 0)  # nan > 0 is false
    return radius.where(valid, 0.0)


def certified_accuracy(
    logits: Tensor,
    labels: Tensor,
    bound: SupportsFloat,
    radii: Sequence[float] | Tensor,
    error: SupportsFloat | Tensor = 0.0,
) -> Tensor:
    r"""Fraction of the samples that are proved to be classified correctly at each l2 radius.

    .. math:: A(\rho) = \frac{1}{N} \#\{ i : \text{i is correct},\ r_i > 0,\ r_i \ge \rho \}

    with r_i the :func:`certified_radius`. That is rounded to strictly below the exact radius, so
    ``>=`` is sound for the closed ball of radius rho. Samples that tie, have a nan or infinite
    logit, or a margin within the error are certified at no radius, not even at 0.

    Args:
        logits, bound, error: see :func:`certified_radius`.
        labels: (N,) integer class indices; for one column of logits (N,) or (N, 1) labels 0/1,
            -1/+1 or bool of any real dtype.
        radii: the radii rho, finite and >= 0: a sequence, or a one-dimensional tensor or array.

    Returns:
        float64 tensor of shape (len(radii),); nan for an empty batch, 0/0.

    Raises:
        ValueError, TypeError: as :func:`certified_radius`; for labels out of range, of another
            shape or dtype; for a negative, infinite or nan radius.

    Example:
        >>> import torch
        >>> from lipkernels.metrics import certified_accuracy
        >>> logits, labels = torch.tensor([[3.0, 1.0], [0.0, 1.0]]), torch.tensor([0, 1])
        >>> certified_accuracy(logits, labels, bound=1.0, radii=[0.0, 1.0, 2.0])
        tensor([1.0000, 0.5000, 0.0000], dtype=torch.float64)
    """
    logits = _check_logits(logits)
    labels = _check_labels(logits, labels)
    if isinstance(radii, Tensor):
        if radii.dim() != 1:
            raise ValueError(f"radii must have one dimension, got shape {tuple(radii.shape)}")
    elif not hasattr(radii, "__getitem__") or isinstance(radii, (str, bytes, dict)):
        raise TypeError(f"radii must be a sequence of numbers, got {type(radii).__name__}")
    asked = [_number("each radius", radius) for radius in radii]
    if not all(math.isfinite(radius) and radius >= 0 for radius in asked):
        raise ValueError(f"radii must be finite and >= 0, got {asked}")
    radius = certified_radius(logits, bound, error)
    certified = radius.where(_is_correct(logits, labels), 0.0).unsqueeze(1)  # (N, 1)
    rho = torch.tensor(asked, dtype=torch.float64, device=logits.device)
    return ((certified > 0) & (certified >= rho)).double().mean(0)


def clean_accuracy(logits: Tensor, labels: Tensor) -> float:
    r"""Fraction of the samples whose label has the strictly largest logit.

    .. math:: A = \frac{1}{N} \#\{ i : f_{y_i} > \max_{c \ne y_i} f_c \}

    One column of logits: positive for the label 1, negative for the label 0 or -1. A tie, and a
    comparison with nan, count as wrong: no order of the classes decides.

    Args:
        logits: (N, C), or (N, 1) for a binary classifier; floating point.
        labels: as for :func:`certified_accuracy`.

    Returns:
        a float; nan for an empty batch, 0/0.

    Raises:
        ValueError, TypeError: as :func:`certified_accuracy`.

    Example:
        >>> import torch
        >>> from lipkernels.metrics import clean_accuracy
        >>> clean_accuracy(torch.tensor([[3.0, 1.0], [2.0, 2.0]]), torch.tensor([0, 1]))
        0.5
    """
    logits = _check_logits(logits)
    labels = _check_labels(logits, labels)
    return _is_correct(logits, labels).double().mean().item()
