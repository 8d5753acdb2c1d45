"""The constraints on a weight, as small values: which op runs, with which settings.

Layers and parametrizations hold one; weights with equal constraints go through one call of the op.
Calling one returns the constrained matrices and the power-iteration vectors for the next call.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lipkernels import functional as F

Result = tuple[list[Tensor], list[Tensor]]


class _Differentiated:
    """A constraint whose gradient at a weight that satisfies it is that of the constraint's op."""

    def __call__(
        self,
        matrices: Sequence[Tensor],
        scales: Sequence[float],
        us: Sequence[Tensor],
        dtype: torch.dtype,
        check: bool = False,
    ) -> Result:
        """The constrained matrices, and the power iteration's vectors for the next call."""
        raise NotImplementedError

    def tangent(self, grad: Tensor, matrix: Tensor, scale: float, us: Sequence[Tensor]) -> Tensor:
        """``grad`` through the constraint at ``matrix``, which satisfies it at ``scale``."""
        with torch.enable_grad():
            leaf = matrix.detach().requires_grad_()
            results, _ = self([leaf], [scale], us, leaf.dtype)
            return torch.autograd.grad(results, leaf, grad)[0]


@dataclass(frozen=True)
class PolarFactor:
    """The converged polar factor: all singular values at the scale."""

    uses_vector = False

    def tangent(self, grad: Tensor, matrix: Tensor, scale: float, us: Sequence[Tensor]) -> Tensor:
        """The projection of ``grad`` on the tangent space: P = scale I there, nothing to solve."""
        return F.project_tangent(grad, matrix, scale)

    def __call__(
        self,
        matrices: Sequence[Tensor],
        scales: Sequence[float],
        us: Sequence[Tensor],
        dtype: torch.dtype,
        check: bool = False,
    ) -> Result:
        return F.polar_factor(list(matrices), scales, dtype=dtype, check=check), list(us)


@dataclass(frozen=True)
class Bjorck(_Differentiated):
    """A Bjorck iteration by name, after spectral normalization."""

    beta: float
    n_iter: int
    tol: float
    n_iter_spectral: int
    tol_spectral: float
    uses_vector = True

    def __call__(
        self,
        matrices: Sequence[Tensor],
        scales: Sequence[float],
        us: Sequence[Tensor],
        dtype: torch.dtype,
        check: bool = False,
    ) -> Result:
        return F.bjorck(
            list(matrices),
            scales,
            u=us,
            beta=self.beta,
            n_iter=self.n_iter,
            tol=self.tol,
            n_iter_spectral=self.n_iter_spectral,
            tol_spectral=self.tol_spectral,
            dtype=dtype,
            check=check,
        )


@dataclass(frozen=True)
class SpectralNormalization(_Differentiated):
    """Division by the largest singular value: it becomes the scale, the others stay below."""

    n_iter: int
    tol: float
    uses_vector = True

    def __call__(
        self,
        matrices: Sequence[Tensor],
        scales: Sequence[float],
        us: Sequence[Tensor],
        dtype: torch.dtype,
        check: bool = False,
    ) -> Result:
        return F.spectral_normalize(
            list(matrices), scales, u=us, n_iter=self.n_iter, tol=self.tol, dtype=dtype, check=check
        )


@dataclass(frozen=True)
class FrobeniusNormalization(_Differentiated):
    """Division by the Frobenius norm, of the matrix or of each row."""

    per_row: bool
    uses_vector = False

    def __call__(
        self,
        matrices: Sequence[Tensor],
        scales: Sequence[float],
        us: Sequence[Tensor],
        dtype: torch.dtype,
        check: bool = False,
    ) -> Result:
        results = F.frobenius_normalize(
            list(matrices), scales, per_row=self.per_row, dtype=dtype, check=check
        )
        return results, list(us)


Constraint = PolarFactor | Bjorck | SpectralNormalization | FrobeniusNormalization

DEFAULT_EPS_SPECTRAL = 1e-3
DEFAULT_EPS_BJORCK = 1e-3
DEFAULT_BETA_BJORCK = 0.5
DEFAULT_MAXITER_SPECTRAL = 10
DEFAULT_MAXITER_BJORCK = 15


def forward_dtype(weight: Tensor) -> torch.dtype:
    """The format that a product with ``weight`` is computed in: autocast's, or its own."""
    kind, dtype = weight.device.type, weight.dtype
    if dtype == torch.float64:
        return dtype
    # Looking it up costs more than the rest, and these two have it.
    if kind not in ("cpu", "cuda") and not torch.amp.is_autocast_available(kind):
        return dtype
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else dtype


def checked_constant(k: float) -> float:
    """``k`` as a float, or a ValueError / TypeError that names it."""
    if isinstance(k, bool) or not isinstance(k, (int, float)):
        raise TypeError(f"k_coef_lip: expected a number, got {type(k).__name__}")
    if not 0 < k < math.inf:
        raise ValueError(f"k_coef_lip: expected a positive finite number, got {k!r}")
    return float(k)


def _checked_tolerance(name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
        raise ValueError(f"{name}: expected a number > 0, got {value!r}")


def _checked_count(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}: expected an integer >= 1, got {value!r}")


def spectral_constraint(
    eps_spectral: float,
    eps_bjorck: float | None,
    beta_bjorck: float | None,
    maxiter_spectral: int,
    maxiter_bjorck: int | None,
) -> Constraint:
    """The constraint that a spectral layer's keywords describe.

    ``eps_bjorck`` None: spectral normalization alone. Neither ``beta_bjorck`` nor
    ``maxiter_bjorck`` named: the converged polar factor. Else that Bjorck iteration, with the other
    of the two at its default (0.5, 15), stopped early by ``eps_bjorck``.
    """
    _checked_tolerance("eps_spectral", eps_spectral)
    _checked_count("maxiter_spectral", maxiter_spectral)
    if eps_bjorck is not None:
        _checked_tolerance("eps_bjorck", eps_bjorck)
    if maxiter_bjorck is not None:
        _checked_count("maxiter_bjorck", maxiter_bjorck)
    if beta_bjorck is not None and not (
        isinstance(beta_bjorck, (int, float)) and 0 < beta_bjorck <= 0.5
    ):
        raise ValueError(f"beta_bjorck: expected a number in (0, 0.5], got {beta_bjorck!r}")
    named = beta_bjorck is not None or maxiter_bjorck is not None
    if eps_bjorck is None:
        if named:
            raise ValueError(
                "eps_bjorck: expected a number > 0 where beta_bjorck or maxiter_bjorck is named,"
                " got None (spectral normalization alone)"
            )
        return SpectralNormalization(maxiter_spectral, eps_spectral)
    if not named:
        return PolarFactor()
    return Bjorck(
        beta=DEFAULT_BETA_BJORCK if beta_bjorck is None else beta_bjorck,
        n_iter=DEFAULT_MAXITER_BJORCK if maxiter_bjorck is None else maxiter_bjorck,
        tol=eps_bjorck,
        n_iter_spectral=maxiter_spectral,
        tol_spectral=eps_spectral,
    )
