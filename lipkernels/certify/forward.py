r"""How far the logits that a forward pass computes can be from the network's exact ones.

Note [Rounding of a forward pass]
Let f = f_D .. f_1 be the network in real arithmetic, with the weights as stored, L_i the constant
of f_i, and x an input. For every input x' of the float format with |x' - x|_2 <= r, let z'_i be the
exact activations, and h'_i the computed ones. A layer maps the error of its input and adds its own:

    |h'_i - z'_i| <= L_i |h'_{i-1} - z'_{i-1}| + |fl(f_i)(h'_{i-1}) - f_i(h'_{i-1})|

The second term is bounded around a point that is known: p_i, the activations at x in float64. The
rules of the layers (affine.py, weightless.py, batch_norm.py) bound it by c_i + s_i d for every
computed input at a distance of at most d from p_{i-1}, and

    |h'_{i-1} - p_{i-1}| <= |h' - z'| + |z' - z| + |z - p| <= (a + b r) + L_1 .. L_{i-1} r + q

where a + b r is the error so far and q that of p itself, from the same rules with float64's unit.
So the error stays affine in r; a (one number a sample) and b (one number) follow layer by layer,
and nothing has to be sampled or searched. The error bounds are themselves rounded upwards
(:data:`lipkernels.certify.arithmetic.UP`). Overflow is excluded by a limit on r: below it no number
on the way exceeds a quarter of the format's largest.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import SupportsFloat

import torch
from torch import Tensor, nn

from lipkernels.certify.affine import AffineRule, affine_rule
from lipkernels.certify.arithmetic import DOUBLE, UP, check_products, norms
from lipkernels.certify.batch_norm import BatchNormRule
from lipkernels.certify.modules import BATCH_NORM, finite_parameters
from lipkernels.certify.network import layer_bound, leaves
from lipkernels.certify.weightless import WeightlessRule, weightless_rule

Rule = AffineRule | WeightlessRule | BatchNormRule
_FINE = 1 + 2.0**-40  # pays for the few float64 operations that combine two layers


def _checked_radius(radius: object) -> Tensor:
    """As a float64 tensor on the CPU, without gradient."""
    try:
        numbers = torch.as_tensor(radius)
        if numbers.is_complex() or numbers.layout != torch.strided:
            raise TypeError
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"radius: expected a number, or one for each sample, got {type(radius).__name__}"
        ) from error
    return numbers.detach().to("cpu", torch.float64)


@dataclass(frozen=True)
class ForwardError:
    """Bounds of what a forward pass rounds around N inputs; made by :func:`forward_error`.

    ``logits``: the network's, (N, ..), in float64 and at most ``center_error`` (N,) from the exact
    ones, in l2. ``lipschitz``: the network's constant. ``constant`` (N,) and ``slope``: the error
    bound at radius r is constant + slope r, see :meth:`at`. ``limit`` (N,): the largest radius for
    which nothing overflows, negative for none. ``layers``: what each layer adds by itself to the
    error at the given inputs (the largest over the samples).
    """

    logits: Tensor
    center_error: Tensor
    lipschitz: float
    constant: Tensor
    slope: float
    limit: Tensor
    layers: dict[str, float]

    def at(self, radius: SupportsFloat | Tensor = 0.0) -> Tensor:
        """(N,): |computed(x') - exact(x')|_2 is at most this, for every x' within ``radius`` of x.

        ``radius`` is one number or one for each sample; beyond ``limit``, and where an input or a
        logit is not finite, the bound is inf. Raises TypeError for anything but real numbers,
        ValueError for a negative or NaN one, or another number of them.
        """
        r = _checked_radius(radius)
        if r.shape not in ((), self.constant.shape):
            raise ValueError(
                f"radius: expected one number or {len(self.constant)} of them, got shape"
                f" {tuple(r.shape)}"
            )
        r = r.expand_as(self.constant)
        if not bool((r >= 0).all()):
            raise ValueError(f"radius: expected numbers >= 0, got {r.min().item()}")
        error = (self.constant + self.slope * r) * _FINE
        return error.where((r <= self.limit) & error.isfinite(), math.inf)


def _where(name: str, module: nn.Module) -> str:
    kind = type(module).__name__
    return kind if name in ("", kind) else f"layer {name!r} ({kind})"


def _rule(name: str, module: nn.Module, z: Tensor) -> Rule:
    """The rule of a layer; ValueError naming it if it has none."""
    tensors = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    if any(t.device.type != "cpu" for t in tensors):
        raise ValueError(
            f"{_where(name, module)}: expected parameters on the CPU, whose arithmetic is known,"
            f" got {tensors[0].device}"
        )
    if not finite_parameters(module):
        raise ValueError(f"{_where(name, module)}: expected finite parameters, got NaN or infinity")
    try:
        rule: Rule | None = affine_rule(module)
        lipschitz = layer_bound(module, name) if rule is None else rule.lipschitz
        if not math.isfinite(lipschitz):
            raise ValueError("expected a finite Lipschitz bound, got inf")
        if rule is None and isinstance(module, BATCH_NORM):
            rule = BatchNormRule(module, lipschitz)
        elif rule is None:
            rule = weightless_rule(module, lipschitz, z)
        if rule is None:
            raise ValueError("expected a layer whose rounding is known, got one without a rule")
        if isinstance(rule, AffineRule):
            check_products(rule.dtype, rule.is_convolution)
        rule.check_input(z)
    except ValueError as error:
        raise ValueError(f"{_where(name, module)}: {error}") from error
    return rule


@dataclass
class _State:
    """After some layers: the float64 point, its own error, and the error a + b r around it."""

    point: Tensor
    point_error: Tensor
    lipschitz: float
    constant: Tensor
    slope: float
    limit: Tensor

    def limit_by(self, reach: Tensor, reach_slope: float, largest: float) -> None:
        """Exclude radii at which ``reach`` + ``reach_slope`` d may exceed ``largest`` / 4."""
        distance = self.point_error + self.constant
        growth = max(reach_slope * (self.lipschitz + self.slope), 2.0**-1000) * UP
        room = (largest / 4 - reach - reach_slope * distance) / growth / UP
        # -1, not 0, where there is no room at all. NaN has none.
        self.limit = torch.minimum(self.limit, torch.where(room >= 0, room, -1.0))

    def advance(self, rule: Rule, y: Tensor, given: torch.dtype, stored: torch.dtype) -> Tensor:
        """Go through a layer; returns what it adds at the inputs themselves, (N,)."""
        a = rule.arithmetic(given, stored)
        ours, doubles = rule.errors(self.point, y, [a, DOUBLE])
        self.limit_by(ours.reach, ours.reach_slope, a.largest)
        distance = (self.point_error + self.constant) * _FINE
        added = ours.constant + ours.slope * distance
        self.constant = (rule.lipschitz * self.constant + added) * _FINE
        growth = ours.slope * (self.lipschitz + self.slope)
        self.slope = (rule.lipschitz * self.slope + growth) * _FINE
        self.point_error = (rule.lipschitz * self.point_error + doubles.constant) * _FINE
        self.lipschitz = self.lipschitz * rule.lipschitz * _FINE
        self.point = y
        return added


def _checked_input(inputs: object) -> Tensor:
    if not isinstance(inputs, Tensor):
        raise TypeError(f"inputs: expected a Tensor, got {type(inputs).__name__}")
    if not inputs.is_floating_point() or inputs.itemsize == 1:  # float8 has no arithmetic
        raise TypeError(f"inputs: expected a floating-point dtype, got {inputs.dtype}")
    if inputs.device.type != "cpu" or inputs.layout != torch.strided:
        raise ValueError(
            f"inputs: expected a dense tensor on the CPU, whose arithmetic is known, got one on"
            f" {inputs.device}, {inputs.layout}"
        )
    if inputs.dim() < 2:
        raise ValueError(f"inputs: expected a batch (N, ..), got shape {tuple(inputs.shape)}")
    return inputs.detach()


def _layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in leaves(model, ""):
        yield name or type(module).__name__, module


@torch.no_grad()
def forward_error(model: nn.Module, inputs: Tensor) -> ForwardError:
    r"""Bound the rounding of ``model``'s forward pass at ``inputs`` and in the balls around them.

    The model is a layer or (nested) ``Sequential`` containers of layers that
    :func:`lipschitz_bound` knows, constrained or plain, on the CPU, in float64, float32, bfloat16
    or float16; call this inside the autocast region in which the model runs. The bound holds for
    every batch size, number of threads and order of summation: see Note [Rounding of a forward
    pass], and Note [Assumptions on the arithmetic] in arithmetic.py for what it relies on.
    Constrained layers compute their weights anew in every forward: certify the export of a network
    (:func:`lipkernels.vanilla_export`), whose weights stay what they are, if its certificate is to
    be good for the last digit.

    Args:
        model: in evaluation (dropout and batch norm in training are refused).
        inputs: (N, ..) as the model takes them.

    Raises:
        ValueError: naming the layer, for NaN or infinity in its parameters or buffers; a layer
            whose rounding has no proof (exp, tanh, ..); one that mixes samples; a device other than
            the CPU; settings that break the assumptions; computed activations further from the
            exact ones than the bound allows (the assumptions do not hold on this machine); an input
            that the layer does not take.
        TypeError: a module that :func:`lipschitz_bound` refuses; inputs that are no float tensor.

    >>> layer = nn.Linear(64, 4)
    >>> error = forward_error(layer, torch.ones(2, 64))
    >>> bool((layer(torch.ones(2, 64)) - error.logits).norm() < error.at(0.0).norm())
    True
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    h = _checked_input(inputs)
    n = len(h)
    finite = h.reshape(n, h[:1].numel()).isfinite().all(1)
    zero = torch.zeros(n, dtype=torch.float64)
    state = _State(h.double(), zero, 1.0, zero, 0.0, torch.full_like(zero, math.inf))
    state.limit_by(norms(state.point), 1.0, torch.finfo(h.dtype).max)
    layers: dict[str, float] = {}
    compiled = [m for m in model.modules() if m._compiled_call_impl is not None]
    if compiled:
        raise ValueError(
            f"{_where('', compiled[0])}: expected a model that runs in eager mode, got one compiled"
        )
    for name, layer in _layers(model):
        rule = _rule(name, layer, state.point)
        given = h.dtype
        try:
            h = layer(h.clone())  # it may work in place
        except RuntimeError as error:  # torch's answer to an input of another shape or dtype
            raise ValueError(
                f"{_where(name, layer)}: expected an input that it can take, got shape"
                f" {tuple(h.shape)}, {given}: {error}"
            ) from error
        if not isinstance(h, Tensor) or h.dim() == 0 or len(h) != n:
            raise ValueError(f"{_where(name, layer)}: expected one output for each of {n} samples")
        with torch.autocast("cpu", enabled=False):
            exact = rule.exact(state.point)
            added = state.advance(rule, exact, given, h.dtype)
        most = float(added[finite].max()) if bool(finite.any()) else 0.0
        layers[name] = max(layers.get(name, 0.0), most)
        # Not the upper bound of it: that of no error at all is above zero.
        apart = (h.double() - exact).reshape(n, exact[:1].numel())
        off = torch.linalg.vector_norm(apart, dim=1)
        allowed = (state.constant + state.point_error) * UP + norms(exact) * 2.0**-50
        if bool(((off > allowed) & finite & (state.limit >= 0)).any()):
            raise ValueError(
                f"{_where(name, layer)}: expected rounding errors of at most"
                f" {allowed.max().item():.3g}, got {off.max().item():.3g}: this machine does not"
                " compute as Note [Assumptions on the arithmetic] says"
            )
    return ForwardError(
        state.point,
        state.point_error,
        state.lipschitz,
        state.constant,
        state.slope,
        state.limit.where(finite, -1.0),
        layers,
    )
