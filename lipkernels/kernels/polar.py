"""``lipkernels::polar_factor``: scale * U for each W = P U, rounded to a dtype within the norm.

Saved for backward beside W and the result, with m the smaller side of W:

* ``factor`` (..., m, m) and ``spectrum`` (..., m): the eigenvectors of P and its eigenvalues, in
  ascending order. Where the first entry of ``spectrum`` is negative, ``factor`` is P^-1 instead, or
  P for a square W: a forward without an eigendecomposition.
* ``scalars`` (..., 2): the power of two that W was divided by, and the number that U was multiplied
  by, which is the scale and what roundings cost.

``precision`` is that of `lipkernels.precision`. A backend without a fast implementation is exact,
whatever it says.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from lipkernels.kernels.cpu import polar as cpu
from lipkernels.kernels.cpu.single import SinglePolarFactor, is_single
from lipkernels.kernels.cuda.split import backward_by_size, by_size
from lipkernels.kernels.eager import is_plain_eager
from lipkernels.kernels.lazy import from_cuda, from_triton
from lipkernels.kernels.precision import without_autocast
from lipkernels.kernels.shared import Names, narrow, shared
from lipkernels.reference import polar as reference
from lipkernels.reference.rounding import scale_and_round
from lipkernels.reference.scaling import compute_dtype, saturated

SAVED_PER_WEIGHT = 3

Forward = Callable[[list[Tensor], list[float], torch.dtype], tuple[list[Tensor], list[Tensor]]]
Backward = Callable[
    [list[Tensor], list[Tensor], list[Tensor], list[Tensor], list[float]], list[Tensor]
]


@without_autocast
def _forward_reference(
    weights: list[Tensor], scales: list[float], dtype: torch.dtype
) -> tuple[list[Tensor], list[Tensor]]:
    results, saved = [], []
    for weight, scale in zip(weights, scales, strict=True):
        u, vectors, p, unit = reference.polar_factor(weight)
        results.append(scale_and_round(u, scale, dtype).contiguous())
        scalars = torch.cat((unit[..., 0], torch.full_like(unit[..., 0], scale)), dim=-1)
        saved += [vectors.contiguous(), p, scalars]
    return results, saved


@without_autocast
def _backward_reference(
    grads: list[Tensor],
    weights: list[Tensor],
    results: list[Tensor],
    saved: list[Tensor],
    scales: list[float],
) -> list[Tensor]:
    out = []
    for i, (grad, weight, result, scale) in enumerate(
        zip(grads, weights, results, scales, strict=True)
    ):
        vectors, p, scalars = saved[SAVED_PER_WEIGHT * i : SAVED_PER_WEIGHT * (i + 1)]
        unit = scalars[..., :1, None]
        # A result in full precision is the polar factor itself; a rounded one is not accurate
        # enough to differentiate with, and keeping a second copy would cost memory.
        if result.dtype == vectors.dtype:
            u = result / scalars[..., 1:, None]
        else:
            u, _, _, _ = reference.polar_factor(weight)
        gradient = reference.polar_factor_vjp(grad.to(u.dtype) * scale, u, vectors, p, unit)
        out.append(saturated(gradient, weight.dtype).contiguous())
    return out


@without_autocast
def _backward_recomputed(
    grads: list[Tensor],
    weights: list[Tensor],
    results: list[Tensor],
    saved: list[Tensor],
    scales: list[float],
) -> list[Tensor]:
    """The reference's backward of a forward that saved no eigenvectors: it computes them again."""
    again = []
    for i, weight in enumerate(weights):
        _, vectors, p, unit = reference.polar_factor(weight)
        multiplier = _saved_of(saved, i)[2][..., 1:]
        again += [vectors, p, torch.cat((unit[..., 0], multiplier), dim=-1)]
    return _backward_reference(grads, weights, results, again, scales)


def _saved_of(saved: list[Tensor], i: int) -> list[Tensor]:
    return saved[SAVED_PER_WEIGHT * i : SAVED_PER_WEIGHT * (i + 1)]


_FORWARDS: dict[str, Forward] = {
    "reference": _forward_reference,
    "cpu": cpu.forward,
    "triton": from_triton("polar", "forward"),
    "cuda": from_cuda("polar", "forward"),
}
_BACKWARDS: dict[str, Backward] = {
    "reference": _backward_reference,
    "recomputed": _backward_recomputed,
    "cpu": cpu.backward,
    "triton": from_triton("polar_backward", "backward"),
    "cuda": from_cuda("polar_backward", "backward"),
}
_FAST_FORWARDS = {**_FORWARDS, "triton": from_triton("polar", "forward", fast=True)}
_FAST_BACKWARDS = {**_BACKWARDS, "triton": from_triton("polar_backward", "backward", fast=True)}


def _forward_of(names: Names, implementations: Mapping[str, Forward] = _FORWARDS) -> Forward:
    return shared(names, implementations, takes=(1, 1), gives=(1, SAVED_PER_WEIGHT))


def _backward_of(names: Names, implementations: Mapping[str, Backward] = _BACKWARDS) -> Backward:
    takes = (1, 1, 1, SAVED_PER_WEIGHT, 1)
    return shared(names, implementations, takes=takes, gives=1, weights=1)


_backward_names = backward_by_size("polar_backward", "polar")
FORWARD: dict[str, Forward] = {
    "reference": _forward_reference,
    "cpu": _forward_of(narrow("cpu")),
    "triton": _forward_of(narrow("triton")),
    "cuda": _forward_of(by_size("polar")),
}
BACKWARD: dict[str, Backward] = {
    "reference": _backward_reference,
    "cpu": _backward_of(narrow("cpu")),
    "triton": _backward_of(narrow("triton")),
    "cuda": _backward_of(_backward_names),
}
FAST_FORWARD: dict[str, Forward] = {
    "triton": _forward_of(narrow("triton"), _FAST_FORWARDS),
    "cuda": _forward_of(by_size("polar"), _FAST_FORWARDS),
}
FAST_BACKWARD: dict[str, Backward] = {
    "triton": _backward_of(narrow("triton"), _FAST_BACKWARDS),
    "cuda": _backward_of(_backward_names, _FAST_BACKWARDS),
}


def _forward_in(precision: str, backend: str) -> Forward:
    fast = FAST_FORWARD.get(backend) if precision == "fast" else None
    return fast or FORWARD[backend]


def _backward_in(precision: str, backend: str) -> Backward:
    fast = FAST_BACKWARD.get(backend) if precision == "fast" else None
    return fast or BACKWARD[backend]


@custom_op("lipkernels::polar_factor", mutates_args=())
def polar_factor_op(
    weights: list[Tensor],
    scales: list[float],
    dtype: torch.dtype,
    precision: str,
    backend: str,
) -> tuple[list[Tensor], list[Tensor]]:
    return _forward_in(precision, backend)(weights, scales, dtype)


@polar_factor_op.register_fake
def _(
    weights: list[Tensor],
    scales: list[float],
    dtype: torch.dtype,
    precision: str,
    backend: str,
) -> tuple[list[Tensor], list[Tensor]]:
    results, saved = [], []
    for weight in weights:
        batch, m = weight.shape[:-2], min(weight.shape[-2:])
        kind = compute_dtype(weight.dtype)
        results.append(weight.new_empty(weight.shape, dtype=dtype))
        saved += [
            weight.new_empty((*batch, m, m), dtype=kind),
            weight.new_empty((*batch, m), dtype=kind),
            weight.new_empty((*batch, 2), dtype=kind),
        ]
    return results, saved


@custom_op("lipkernels::polar_factor_backward", mutates_args=())
def polar_factor_backward(
    grads: list[Tensor],
    weights: list[Tensor],
    results: list[Tensor],
    saved: list[Tensor],
    scales: list[float],
    precision: str,
    backend: str,
) -> list[Tensor]:
    return _backward_in(precision, backend)(grads, weights, results, saved, scales)


@polar_factor_backward.register_fake
def _(
    grads: list[Tensor],
    weights: list[Tensor],
    results: list[Tensor],
    saved: list[Tensor],
    scales: list[float],
    precision: str,
    backend: str,
) -> list[Tensor]:
    return [torch.empty_like(weight, memory_format=torch.contiguous_format) for weight in weights]


def _setup_context(ctx, inputs, output):
    weights, ctx.scales, _, ctx.precision, ctx.backend = inputs
    results, saved = output
    ctx.save_for_backward(*weights, *results, *saved)
    ctx.mark_non_differentiable(*saved)
    ctx.n_weights = len(weights)


def _backward(ctx, grads, _saved_grads):
    n = ctx.n_weights
    tensors = list(ctx.saved_tensors)
    weights, results, saved = tensors[:n], tensors[n : 2 * n], tensors[2 * n :]
    gradients = polar_factor_backward(
        grads, weights, results, saved, ctx.scales, ctx.precision, ctx.backend
    )
    return gradients, None, None, None, None


polar_factor_op.register_autograd(_backward, setup_context=_setup_context)


class _PolarFactor(torch.autograd.Function):
    """The op without its dispatch: see `lipkernels.kernels.eager`."""

    @staticmethod
    def forward(
        ctx: Any,
        scales: list[float],
        dtype: torch.dtype,
        precision: str,
        backend: str,
        *weights: Tensor,
    ) -> tuple[Tensor, ...]:
        results, saved = _forward_in(precision, backend)(list(weights), scales, dtype)
        ctx.save_for_backward(*weights, *results, *saved)
        ctx.set_materialize_grads(False)
        ctx.scales, ctx.precision, ctx.backend = scales, precision, backend
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        if torch.is_grad_enabled():  # somebody may differentiate this: refused
            # With the weights among the arguments: gradients depend on them, whatever comes in.
            return _gradients_once(ctx, *grad_outputs, *ctx.saved_tensors[: len(grad_outputs)])
        return _gradients(ctx, *grad_outputs)


def _gradients(ctx: Any, *arguments: Any) -> Any:
    """Of :class:`_PolarFactor`; ``arguments``: the incoming ones, what else comes after them."""
    tensors = list(ctx.saved_tensors)
    n = len(tensors) // (2 + SAVED_PER_WEIGHT)
    grads = list(arguments[:n])
    weights, results, saved = tensors[:n], tensors[n : 2 * n], tensors[2 * n :]
    backward = _backward_in(ctx.precision, ctx.backend)
    if all(grad is not None for grad in grads):
        return None, None, None, None, *backward(grads, weights, results, saved, ctx.scales)
    used = [i for i, grad in enumerate(grads) if grad is not None]
    gradients = backward(
        [grads[i] for i in used],
        [weights[i] for i in used],
        [results[i] for i in used],
        [t for i in used for t in _saved_of(saved, i)],
        [ctx.scales[i] for i in used],
    )
    found = dict(zip(used, gradients, strict=True))
    return None, None, None, None, *(found.get(i) for i in range(n))


_gradients_once = torch.autograd.function.once_differentiable(_gradients)


def polar_factor(
    weights: list[Tensor],
    scales: list[float],
    dtype: torch.dtype,
    precision: str,
    backend: str,
) -> list[Tensor]:
    """The scaled polar factors, by the op where something traces, directly where nothing does."""
    if is_plain_eager(weights):
        if backend == "cpu" and is_single(weights, dtype):
            return [SinglePolarFactor.apply(weights[0], scales[0])]  # pyright: ignore[reportReturnType]
        return list(_PolarFactor.apply(scales, dtype, precision, backend, *weights))
    return polar_factor_op(weights, scales, dtype, precision, backend)[0]
