"""The constraints as modules for :func:`torch.nn.utils.parametrize.register_parametrization`.

For weights of modules that have no constrained layer here: recurrent nets, attention, your own. A
weight of more than two dimensions is viewed as a matrix with its first dimension as rows; to bound
a convolution, use the layers, which count how often a pixel is read.

    >>> import torch
    >>> from torch.nn.utils import parametrize
    >>> rnn = torch.nn.RNN(4, 8)
    >>> _ = parametrize.register_parametrization(rnn, "weight_hh_l0", PolarFactor())
    >>> round(torch.linalg.matrix_norm(rnn.weight_hh_l0, 2).item(), 5)
    1.0
"""

from __future__ import annotations

from torch import Tensor, nn

from lipkernels import constraints
from lipkernels.constraints import forward_dtype
from lipkernels.functional import initial_vector


class _Parametrization(nn.Module):
    """Raw weight in, constrained weight out; ``k_coef_lip`` as in the layers."""

    def __init__(self, constraint: constraints.Constraint, k_coef_lip: float) -> None:
        super().__init__()
        self.constraint = constraint
        self.k_coef_lip = constraints.checked_constant(k_coef_lip)
        self.register_buffer("u", None, persistent=False)

    def forward(self, weight: Tensor) -> Tensor:
        if weight.dim() == 0:
            raise ValueError("weight: expected at least 1 dimension, got shape ()")
        # A vector is a column. Not reshape(rows, -1), which no-one can tell for an empty weight.
        matrix = weight.unsqueeze(-1) if weight.dim() == 1 else weight.flatten(1)
        us = [self._vector(matrix)] if self.constraint.uses_vector else []
        # Rounded, within the bound, to what autocast will round it to; returned in its own dtype.
        dtype = forward_dtype(weight)
        results, new_us = self.constraint([matrix], [self.k_coef_lip], us, dtype)
        if self.training and new_us:
            self.u = new_us[0].detach()
        return results[0].reshape(weight.shape).to(weight.dtype)

    def _vector(self, matrix: Tensor) -> Tensor:
        if self.u is None or self.u.shape != matrix.shape[:1] or self.u.device != matrix.device:
            return initial_vector(matrix.detach())
        return self.u

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Assigning to the parametrized weight sets the raw weight."""
        return weight

    def extra_repr(self) -> str:
        return f"{self.constraint}, k_coef_lip={self.k_coef_lip:g}"


class PolarFactor(_Parametrization):
    """k times the polar factor: all singular values are k.

    >>> PolarFactor()(torch.eye(2) * 3).diagonal().round(decimals=5)
    tensor([1., 1.])
    """

    def __init__(self, k_coef_lip: float = 1.0) -> None:
        super().__init__(constraints.PolarFactor(), k_coef_lip)


class SpectralNormalization(_Parametrization):
    """k W / sigma_max(W); the two numbers are those of the power iteration that starts the search.

    >>> SpectralNormalization()(torch.eye(2) * 3).diagonal().round(decimals=5)
    tensor([1., 1.])
    """

    def __init__(
        self,
        k_coef_lip: float = 1.0,
        *,
        eps_spectral: float = constraints.DEFAULT_EPS_SPECTRAL,
        maxiter_spectral: int = constraints.DEFAULT_MAXITER_SPECTRAL,
    ) -> None:
        constraint = constraints.spectral_constraint(
            eps_spectral, None, None, maxiter_spectral, None
        )
        super().__init__(constraint, k_coef_lip)


class Bjorck(_Parametrization):
    """k times a Bjorck iteration of W / sigma_max(W): see :func:`lipkernels.functional.bjorck`.

    >>> Bjorck(maxiter_bjorck=4)(torch.eye(2) * 3).diagonal().round(decimals=5)
    tensor([1., 1.])
    """

    def __init__(
        self,
        k_coef_lip: float = 1.0,
        *,
        eps_spectral: float = constraints.DEFAULT_EPS_SPECTRAL,
        eps_bjorck: float = constraints.DEFAULT_EPS_BJORCK,
        beta_bjorck: float = constraints.DEFAULT_BETA_BJORCK,
        maxiter_spectral: int = constraints.DEFAULT_MAXITER_SPECTRAL,
        maxiter_bjorck: int = constraints.DEFAULT_MAXITER_BJORCK,
    ) -> None:
        constraint = constraints.spectral_constraint(
            eps_spectral, eps_bjorck, beta_bjorck, maxiter_spectral, maxiter_bjorck
        )
        super().__init__(constraint, k_coef_lip)


class FrobeniusNormalization(_Parametrization):
    """k W / |W|_F, or with ``disjoint_neurons`` each row over its own norm.

    >>> FrobeniusNormalization()(torch.ones(2, 2)).norm().round(decimals=5)
    tensor(1.)
    """

    def __init__(self, k_coef_lip: float = 1.0, *, disjoint_neurons: bool = False) -> None:
        constraint = constraints.FrobeniusNormalization(per_row=bool(disjoint_neurons))
        super().__init__(constraint, k_coef_lip)
