"""Linear layers with a Lipschitz constant."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from lipkernels import constraints
from lipkernels.certify import LAYER_FORWARDS, shrunk
from lipkernels.nn.checks import check_channels, check_dtype
from lipkernels.nn.constrained import ConstrainedWeight
from lipkernels.nn.held import held_linear


class _ConstrainedLinear(ConstrainedWeight, nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        check_channels(input, None, -1, self.in_features)
        check_dtype(input, self.raw_weight.dtype)
        if self.is_held():
            return held_linear(self, input, self.bias)
        return nn.functional.linear(input, self.weight, self.bias)

    def vanilla_export(self, strict: bool = False) -> nn.Linear:
        """A plain :class:`torch.nn.Linear` with the constrained weight.

        ``strict``: such that ``lipschitz_bound`` of the result is at most the promised constant.
        """
        plain = nn.Linear(
            self.in_features, self.out_features, bias=self.bias is not None, device="meta"
        )
        self._export_into(plain, strict)
        return plain


class SpectralLinear(_ConstrainedLinear):
    r"""y = x W^T + b with |W|_2 <= ``k_coef_lip``.

    By default W = k U, with U the polar factor of the raw weight: all singular values are k, the
    layer preserves gradient norms. With ``eps_bjorck=None`` W = k V / sigma_max(V), V the raw
    weight: the largest singular value is k.

    Args:
        in_features, out_features, bias, device, dtype: as in :class:`torch.nn.Linear`.
        k_coef_lip: the Lipschitz constant, > 0.
        eps_spectral, maxiter_spectral: tolerance and cap of the power iteration that starts the
            search for sigma_max; they change its time only.
        eps_bjorck: None for spectral normalization alone; else the tolerance that stops a named
            Bjorck iteration.
        beta_bjorck, maxiter_bjorck: naming one runs that Bjorck iteration (the other defaults to
            0.5 or 15) in place of the converged polar factor; beta in (0, 0.5].
        check: raise ValueError on NaN or infinity in the raw weight.

    Shape: (..., in_features) to (..., out_features). Source: Anil, Lucas and Grosse, arXiv
    1811.05381; Serrurier et al., arXiv 2006.06520.

    >>> layer = SpectralLinear(8, 4, k_coef_lip=2.0)
    >>> round(torch.linalg.matrix_norm(layer.weight, 2).item(), 4)
    2.0
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        k_coef_lip: float = 1.0,
        eps_spectral: float = constraints.DEFAULT_EPS_SPECTRAL,
        eps_bjorck: float | None = constraints.DEFAULT_EPS_BJORCK,
        beta_bjorck: float | None = None,
        maxiter_spectral: int = constraints.DEFAULT_MAXITER_SPECTRAL,
        maxiter_bjorck: int | None = None,
        check: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        constraint = constraints.spectral_constraint(
            eps_spectral, eps_bjorck, beta_bjorck, maxiter_spectral, maxiter_bjorck
        )
        nn.Linear.__init__(self, in_features, out_features, bias, device, dtype)
        self._constrain(constraint, k_coef_lip, check)


class FrobeniusLinear(_ConstrainedLinear):
    r"""y = x W^T + b with rows (or the whole) of W scaled to Frobenius norm ``k_coef_lip``.

    ``disjoint_neurons=True`` (default): each output neuron by itself is k-Lipschitz, and the layer
    as a map between vectors k sqrt(out_features)-Lipschitz: that is its :attr:`lipschitz_constant`,
    which :class:`lipkernels.nn.Sequential` and the certificates count. ``disjoint_neurons=False``:
    the layer is k-Lipschitz, |W|_F = k. The two agree for a single output.

    Shape: (..., in_features) to (..., out_features).

    >>> layer = FrobeniusLinear(8, 1)
    >>> round(layer.weight.norm().item(), 4)
    1.0
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        disjoint_neurons: bool = True,
        k_coef_lip: float = 1.0,
        check: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Linear.__init__(self, in_features, out_features, bias, device, dtype)
        constraint = constraints.FrobeniusNormalization(per_row=bool(disjoint_neurons))
        self._constrain(constraint, k_coef_lip, check)
        self.disjoint_neurons = bool(disjoint_neurons)

    @property
    def lipschitz_constant(self) -> float:
        """``k_coef_lip``, times sqrt(out_features) with disjoint neurons."""
        return self.k_coef_lip * (math.sqrt(self.out_features) if self.disjoint_neurons else 1.0)

    def strict_weight(self, weight: Tensor, factor: float) -> Tensor:
        """As in the other layers; with disjoint neurons each row first, then the whole."""
        if not self.disjoint_neurons:
            return super().strict_weight(weight, factor)
        rows = [shrunk(row.unsqueeze(0), self.k_coef_lip) for row in weight]
        matrix = torch.cat(rows) if rows else weight.clone()
        return shrunk(matrix, self.lipschitz_constant)


LAYER_FORWARDS.add(_ConstrainedLinear.forward)
