r"""The radius within which the class that a forward pass computes cannot change, rounding included.

Note [Certified radius under rounding]
Let x be a sample, f the exact network and F the computed one, E(r) = a + b r the bound of |F(x') -
f(x')|_2 within r of x (see forward.py), and p the float64 logits, at most q from f(x). For the
largest logit i and any other j, and every x' of the format with |x' - x|_2 <= r,

    F_i(x') - F_j(x') >= f_i(x') - f_j(x') - sqrt(2) E(r)
                      >= f_i(x)  - f_j(x)  - sqrt(2) (L r + E(r))
                      >= p_i - p_j - sqrt(2) (q + a + (L + b) r)

since e_i - e_j has length sqrt(2). That is positive for r < ((p_i - p_j) / sqrt(2) - q - a) / (L +
b): one quotient, as the error is affine in r. The clean point pays nothing for its own float32
rounding: r = 0 says that F(x) has the class of p. One column of logits classifies by its sign:
r < (|p| - q - a) / (L + b).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from lipkernels.certify.forward import forward_error

_DOWN = 1 - 2.0**-45  # pays for the float64 operations below


def certified_radius(model: nn.Module, inputs: Tensor) -> Tensor:
    r"""l2 radius around each input within which the class that ``model`` computes cannot change.

    For every input of the given float format in the closed ball, the largest logit of the forward
    pass as it is run, in its own precision, in any batch, is the one of ``model(inputs)``: the
    Lipschitz constant and all rounding are bounded rigorously; derived in Note [Certified radius
    under rounding]. Compare :func:`lipkernels.metrics.certified_radius`, which takes logits and
    believes the ``error`` that it is told. In float64 (``model.double()``) rounding costs nothing.

    Args:
        model, inputs: see :func:`lipkernels.certify.forward_error`; the output must be (N, C), or
            (N, 1) for a binary classifier by sign.

    Returns:
        float64 (N,); 0 for a tie, a margin within the rounding error, an input or logits that are
        not finite, and where a number could overflow.

    Raises:
        ValueError, TypeError: as :func:`forward_error`; another shape of the output.

    >>> layer = nn.Linear(3, 2, bias=False)
    >>> _ = layer.weight.data.copy_(torch.eye(2, 3))
    >>> certified_radius(layer, torch.tensor([[3.0, 1.0, 0.0]]))  # 2 / sqrt(2), and no more
    tensor([1.4142], dtype=torch.float64)
    """
    error = forward_error(model, inputs)
    logits = error.logits
    if logits.dim() != 2 or logits.shape[1] == 0:
        raise ValueError(f"model: expected an output of shape (N, C), got {tuple(logits.shape)}")
    if logits.shape[1] == 1:
        margin = logits[:, 0].abs()
    else:
        top = logits.topk(2, dim=1).values
        margin = (top[:, 0] - top[:, 1]) * _DOWN / math.sqrt(2.0)
    room = margin * _DOWN - (error.center_error + error.constant) / _DOWN
    rate = max((error.lipschitz + error.slope) / _DOWN, 2.0**-1000)
    radius = torch.minimum(room / rate * _DOWN, error.limit)
    valid = logits.isfinite().all(1) & (radius > 0)  # nan > 0 is false
    return radius.where(valid, 0.0)
