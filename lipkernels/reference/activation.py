"""Elementwise and pairwise activations with a Lipschitz constant of one.

MaxMin:       cat(relu(x), relu(-x)); |x|^2 = |relu(x)|^2 + |relu(-x)|^2 and each entry moves once.
HouseHolder:  on each pair z, the identity or the reflection H = [[cos t, sin t], [sin t, -cos t]],
              by the side of the mirror line (cos t/2, sin t/2) that z lies on; continuous across
              it. At t = pi/2 it sorts the pair (Singla, Singla and Feizi, arXiv 2108.04062).
LPReLU:       x for x >= 0, a x below, with the slope a clamped to [-1, 1].
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def max_min(x: Tensor, dim: int) -> Tensor:
    """Twice as wide along ``dim``."""
    return torch.cat((F.relu(x), F.relu(-x)), dim=dim)


def householder(x: Tensor, theta: Tensor, dim: int, kind: torch.dtype) -> Tensor:
    """``x`` with 2 c entries along ``dim``; entry i is paired with i + c and angle theta_i.

    Computed in ``kind``: a half-precision cos and sin are too coarse for cos^2 + sin^2 = 1.
    """
    channels_last = x.movedim(dim, -1)
    a, b = channels_last.to(kind).chunk(2, dim=-1)
    angle = theta.to(kind)
    reflect = a * torch.sin(angle / 2) - b * torch.cos(angle / 2) > 0
    cos, sin = torch.cos(angle), torch.sin(angle)
    out_a = torch.where(reflect, cos * a + sin * b, a)
    out_b = torch.where(reflect, sin * a - cos * b, b)
    return torch.cat((out_a, out_b), dim=-1).to(x.dtype).movedim(-1, dim)


def lprelu(x: Tensor, slope: Tensor) -> Tensor:
    """Slopes for one channel, or one for each channel of dimension 1."""
    return F.prelu(x, slope.clamp(-1.0, 1.0).to(x.dtype))
