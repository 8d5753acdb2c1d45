r"""The rounding of linear layers and convolutions.

Note [Rounding of a sum of products]
An output is s = sum_i w_i z_i + b. Let T = sum_i |w_i z_i| + |b|, and n the number of additions.
A computed sum is a binary tree of additions. If node v rounds by delta_v, the result is off by
exactly the sum of all delta_v and of the products' own roundings; |delta_v| <= u' |node v as
computed|, u' = u / (1 - u). Computed nodes are within gamma_{n+1} T of the exact partial sums, and
a partial sum, of whichever terms, lies between minus the sum N of the negative terms and the sum P
of the positive ones: |partial sum| <= max(P, N) = (T + |s|) / 2. So, for every order of summation,

    |fl(s) - s| <= n u' ((T + |s|) / 2 + gamma_{n+1} T) + u' T

which is about half of the textbook's gamma_{n+1} T (Higham 2002, section 3), since |s| is small
against T in a layer that preserves norms. It pays for products that are not fused. Flushing numbers
below tiny to zero adds less than tiny for each operation, |w_i| tiny for each input and |z_i| tiny
for each weight.

At an input z at a distance of at most d from a point c, with A the matrix |W|:

    |T(z)|_2 <= |T(c)|_2 + |A|_2 d,        |s(z)|_2 <= |s(c)|_2 + |W|_2 d

so the error of a layer is at most an affine function of d: exact at the point, by norms around it.
A convolution is such a matrix, and |A|_2 is bounded as |W|_2 is: see window.py.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lipkernels.certify.arithmetic import (
    HALVES,
    MOST_TERMS,
    UP,
    Arithmetic,
    LayerError,
    gamma,
    norms,
    products,
)
from lipkernels.certify.matrix import spectral_norm_bound
from lipkernels.certify.modules import (
    CONV,
    CONV_TRANSPOSE,
    LAYER_FORWARDS,
    as_forward_casts,
    as_tuple,
    convolution_factor,
    has_own_forward,
    weight_matrices,
)
from lipkernels.certify.window import max_reads

Apply = Callable[[Tensor, Tensor, Tensor | None], Tensor]
_TRANSPOSE = {
    3: nn.functional.conv_transpose1d,
    4: nn.functional.conv_transpose2d,
    5: nn.functional.conv_transpose3d,
}


class AffineRule:
    """z -> W z + b: ``apply(z, W, b)`` is the operation, the weights those of forward."""

    def __init__(
        self,
        module: Any,
        weight: Tensor,
        apply: Apply,
        factor: float,
        n_terms: int,
        n_stored: int,
        rank: int | None,
    ) -> None:
        bias = module.bias
        self.dtype = weight.dtype
        self.is_convolution = rank is not None
        self._apply = apply
        self._weight = weight.detach().double()
        self._bias = None if bias is None else as_forward_casts(bias).detach().double()
        self._n_terms = n_terms  # products in one output
        self._n_stored = n_stored  # partial sums of an output that may be stored
        self._rank = rank  # dimensions of the input, where any other means no batch
        groups = getattr(module, "groups", 1)
        matrices = weight_matrices(self._weight, groups) if self._weight.numel() else []
        scale = factor * (1 + 2.0**-52)
        self.lipschitz = max((spectral_norm_bound(k) for k in matrices), default=0.0) * scale
        positive = max((spectral_norm_bound(k.abs()) for k in matrices), default=0.0)
        self._positive_norm = positive * scale  # |A|_2
        self._largest = float(self._weight.abs().max()) if self._weight.numel() else 0.0

    def check_input(self, z: Tensor) -> None:
        """ValueError unless the first dimension of ``z`` counts samples."""
        if z.dim() < 2 or (self._rank is not None and z.dim() != self._rank):
            expected = f"{self._rank}" if self._rank else "at least 2"
            raise ValueError(
                f"expected an input of {expected} dimensions, samples first, got {tuple(z.shape)}"
            )

    def arithmetic(self, given: torch.dtype, stored: torch.dtype) -> Arithmetic:
        """Of the products, for an input ``given`` and an output ``stored``."""
        return products(given, self.dtype, stored)

    def exact(self, z: Tensor) -> Tensor:
        """W z + b in float64."""
        return self._apply(z, self._weight, self._bias)

    def errors(self, z: Tensor, y: Tensor, arithmetics: list[Arithmetic]) -> list[LayerError]:
        """Around the float64 point ``z``, whose image is ``y``: one for each arithmetic."""
        bias = None if self._bias is None else self._bias.abs()
        total = norms(self._apply(z.abs(), self._weight.abs(), bias))
        return [self._error(z, y, total, a) for a in arithmetics]

    def _error(self, z: Tensor, y: Tensor, total: Tensor, a: Arithmetic) -> LayerError:
        n_in, n_out = z[:1].numel(), y[:1].numel()
        size = norms(z)
        # The input that is multiplied lies within cast + (1 + cast_unit) d of z.
        cast = a.cast_unit * size + a.cast_tiny * math.sqrt(n_in)
        stretch = 1 + a.cast_unit

        # float64's own rounding of y: 2^-22 pays for up to MOST_TERMS terms.
        sums = norms(y) + 2.0**-22 * total
        n_add = self._n_terms + (self._bias is not None)  # one more than there are without a bias
        if n_add > MOST_TERMS:
            raise ValueError(f"expected at most {MOST_TERMS} terms in a sum, got {n_add}")
        unit = a.unit / (1 - a.unit)
        by_total = unit * (n_add / 2 + n_add * gamma(n_add + 1, a.unit) + 1) * UP
        by_sum = unit * n_add / 2 * UP
        flushed = a.tiny * math.sqrt(n_out) * UP
        constant = by_total * total + by_sum * sums
        constant = constant + flushed * (2 * n_add + 2 + n_add * (self._largest + size))
        slope = by_total * self._positive_norm + by_sum * self.lipschitz + flushed * n_add

        if a.store_unit:
            unit = a.store_unit / (1 - a.store_unit)
            if self._n_stored > 1:
                stores = gamma(self._n_stored + 3, a.store_unit) * UP
                constant = constant + stores * total * (1 + by_total + by_sum)
                slope = slope + stores * self._positive_norm * (1 + by_total + by_sum)
            else:
                before, before_slope = sums + constant, self.lipschitz + slope
                if self._bias is not None:  # stored once without the bias, perhaps
                    unbiased = float(torch.linalg.vector_norm(self._bias)) * UP
                    unbiased *= math.sqrt(n_out / max(1, self._bias.numel()))
                    constant = constant + unit * (before + unbiased)
                    slope = slope + unit * before_slope
                    before, before_slope = sums + constant, self.lipschitz + slope
                constant = constant + unit * before
                slope = slope + unit * before_slope
            constant = constant + (self._n_stored + 2) * a.store_tiny * math.sqrt(n_out)

        # Everything so far is a function of the distance after the cast.
        constant = (constant + slope * cast + self.lipschitz * cast) * UP
        reach_slope = self._positive_norm * stretch * UP
        return LayerError(
            constant,
            (slope * stretch + self.lipschitz * a.cast_unit) * UP,
            torch.maximum((total + self._positive_norm * cast) * UP, size),
            max(reach_slope, 1.0),
        )


def _convolve(module: Any, z: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return module._conv_forward(z, weight, bias)


def _convolve_transposed(module: Any, z: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    convolve = _TRANSPOSE[weight.dim()]
    return convolve(
        z,
        weight,
        bias,
        module.stride,
        module.padding,
        module.output_padding,
        module.groups,
        module.dilation,
    )


def affine_rule(module: Any) -> AffineRule | None:
    """The rule of a torch.nn linear layer or convolution, plain or constrained; None for others."""
    if not isinstance(module, (nn.Linear, *CONV, *CONV_TRANSPOSE)):
        return None
    if has_own_forward(module) or type(module).forward not in LAYER_FORWARDS:
        return None
    weight = as_forward_casts(module.weight)
    if isinstance(module, nn.Linear):
        return AffineRule(module, weight, nn.functional.linear, 1.0, weight.shape[1], 1, None)
    factor = convolution_factor(module, tuple(weight.shape[2:]))
    if factor is None:
        return None
    if isinstance(module, CONV):
        apply: Apply = functools.partial(_convolve, module)
        n_terms = weight[:1].numel()
        return AffineRule(module, weight, apply, factor, n_terms, 1, weight.dim())
    n = weight.dim() - 2
    reads = math.prod(
        max_reads(k, s, 0, 0, d, "zeros")
        for k, s, d in zip(
            weight.shape[2:], as_tuple(module.stride, n), as_tuple(module.dilation, n), strict=True
        )
    )
    n_terms = reads * weight.shape[0] // module.groups
    stored = max(2, reads) if weight.dtype in HALVES else 1
    apply = functools.partial(_convolve_transposed, module)
    return AffineRule(module, weight, apply, factor, n_terms, stored, weight.dim())
