r"""The rounding of layers without a weight matrix: activations, pools, permutations.

Note [Rounding of homogeneous layers]
ReLU, a sort, a pool, k times one of them: f(c z) = c f(z) for c >= 0, so |f(z)|_2 <= L |z|_2. Each
output comes from at most ``count`` operations in a row, of positive terms or of factors: it is off
by at most gamma_count times what the same operations give for |z|, whose norm is at most L |z|_2
too. So

    |fl(f(z)) - f(z)|_2 <= gamma_count L |z|_2 <= gamma_count L (|c|_2 + d)

within d of a point c. ``offset`` pays for settings that the layer converts to its input's format
(the limits of a Hardtanh), for each output. A norm pool squares its input: what underflows there
is as large as sqrt(tiny) in the result.

A function whose accuracy nobody states (exp, tanh, sin, ..) has no rule.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from lipkernels.certify.arithmetic import UP, Arithmetic, LayerError, gamma, norms, operations
from lipkernels.certify.graph import graph_roundings
from lipkernels.certify.modules import AVG_POOL, DROPOUT, MAX_POOL, as_tuple, pool_dimensions


@dataclass(frozen=True)
class Roundings:
    """``count`` roundings in a row, by factors that multiply to at most ``gain`` on the way.

    ``squares``: whether the input is squared on the way; ``wide``: in float32 at least.
    ``offset``: the largest setting that is converted to the input's format.
    """

    count: int
    gain: float = 1.0
    squares: bool = False
    wide: bool = False
    offset: float = 0.0


EXACT = Roundings(0)
_FLOAT32_ROOT = 2.0**63  # whose square is within float32's range
# torch converts a Python number to the tensor's format (or to float32), and rounds the product.
SCALED = 3

_EXACT = (
    nn.Identity,
    nn.Flatten,
    nn.Unflatten,
    nn.ReLU,
    nn.ReLU6,
    nn.PixelShuffle,
    nn.PixelUnshuffle,
    nn.ChannelShuffle,
    nn.ZeroPad1d,
    nn.ZeroPad2d,
    nn.ZeroPad3d,
    *MAX_POOL,
)
_CONSTANT_PAD = (nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d)

# By forward function: the roundings of a module, given an input.
ROUNDINGS: dict[Callable[..., Any], Callable[[Any, Tensor], Roundings]] = {}


def _torch_roundings(module: Any) -> Roundings | None:
    kind = type(module)
    if kind in MAX_POOL and module.return_indices:
        return None
    if kind in _EXACT:
        return EXACT
    if kind in DROPOUT:
        if module.training and module.p > 0:
            raise ValueError("expected dropout in evaluation, got it in training: call eval()")
        return EXACT
    if kind in (nn.LeakyReLU, nn.PReLU):
        return Roundings(SCALED + 1)
    if kind in (nn.Softshrink, nn.Softsign):
        return Roundings(4)
    if kind is nn.Hardtanh:
        return Roundings(0, offset=max(abs(module.min_val), abs(module.max_val)))
    if kind in _CONSTANT_PAD:
        return Roundings(0, offset=abs(module.value))
    if kind in AVG_POOL:
        window = math.prod(as_tuple(module.kernel_size, pool_dimensions(module)))
        return Roundings(window + 3)
    return None


class WeightlessRule:
    """z -> module(z), by the Note above."""

    is_convolution = False
    dtype: torch.dtype | None = None

    def __init__(
        self, module: Callable[[Tensor], Tensor], lipschitz: float, roundings: Roundings
    ) -> None:
        self.lipschitz = lipschitz
        self._module = module
        self._roundings = roundings

    def check_input(self, z: Tensor) -> None:
        """ValueError if the layer mixes the samples of a batch."""
        if len(z) == 0:
            return
        few = z[:3].nan_to_num()
        # Every sample has a neighbour on its right that differs in the two batches.
        batches = [
            torch.stack((few, torch.full_like(few, fill)), 1).flatten(0, 1) for fill in (1e6, -2e6)
        ]
        try:
            first, second = [self._module(batch) for batch in batches]
            apart = len(first) == 2 * len(few) and torch.equal(first[::2], second[::2])
        except RuntimeError:  # a batch of this size does not fit
            apart = False
        if not apart:
            raise ValueError("expected a layer that acts on each sample by itself")

    def arithmetic(self, given: torch.dtype, stored: torch.dtype) -> Arithmetic:
        """For an input ``given`` and an output ``stored``."""
        return operations(given, stored)

    def exact(self, z: Tensor) -> Tensor:
        """The module in float64."""
        return self._module(z.clone())  # it may work in place

    def errors(self, z: Tensor, y: Tensor, arithmetics: list[Arithmetic]) -> list[LayerError]:
        """Around the float64 point ``z``, whose image is ``y``: one for each arithmetic."""
        size = norms(z)
        return [self._error(size, y[:1].numel(), a) for a in arithmetics]

    def _error(self, size: Tensor, n_out: int, a: Arithmetic) -> LayerError:
        has = self._roundings
        width = math.sqrt(n_out)
        relative = gamma(has.count, a.unit) * self.lipschitz * UP
        gain = max(1.0, self.lipschitz, has.gain) * UP
        # Comparisons of half-precision numbers run in float32.
        float32_tiny = min(a.tiny, torch.finfo(torch.float32).smallest_normal)
        # Each of the operations may flush, before a factor of at most count * gain.
        most = gain * (has.count + 1) ** 2
        flushed = most * (a.tiny if has.count else float32_tiny) * width
        # The sum of a window of w entries is at most sqrt(w) times their norm.
        reach_slope = gain * math.sqrt(has.count + 1)
        reach = size * reach_slope + has.offset
        if has.squares:
            flushed += most * math.sqrt(float32_tiny if has.wide else a.tiny) * width
            if not (has.wide and a.largest < _FLOAT32_ROOT):
                # (reach + slope d)^2 must not overflow either.
                root = math.sqrt(a.largest)
                reach, reach_slope = reach * root, reach_slope * root
        flushed += (2 * a.unit * has.offset + a.tiny) * width if has.offset else 0.0
        return LayerError(relative * size + flushed, relative, reach, reach_slope)


def weightless_rule(module: Any, lipschitz: float, z: Tensor) -> WeightlessRule | None:
    """The rule of a layer of known ``lipschitz`` constant, for inputs like ``z``; None if none."""
    if isinstance(module, fx.GraphModule):
        return WeightlessRule(module, lipschitz, Roundings(*graph_roundings(module, z)))
    registered = ROUNDINGS.get(type(module).forward)
    roundings = registered(module, z) if registered else _torch_roundings(module)
    if roundings is None:
        return None
    if type(module) is nn.PReLU:  # which takes an input of its weight's dtype alone
        slope = module.weight.detach().double()
        return WeightlessRule(lambda x: nn.functional.prelu(x, slope), lipschitz, roundings)
    return WeightlessRule(module, lipschitz, roundings)
