"""ConstrainedWeight: the mixin that puts a constraint between a layer's Parameter and its forward.

The Parameter keeps torch.nn's name ``weight``, so that state_dict, optimizers, DDP and plain
checkpoints see an ordinary layer. The attribute ``layer.weight`` is the constrained weight,
computed from the Parameter that is there at that moment: nothing is kept from one forward to the
next, so nothing is ever stale. (Within one forward, `lipkernels.grouped` computes it ahead.)

Note [Held weights]
`lipkernels.Retractor` keeps the Parameter itself on the constraint, and forward uses it as it is.
That is trusted only while the Parameter is, byte for byte, what the retraction wrote: a record of
its identity, version and fingerprint is compared at each forward. A checkpoint, a write through
``.data``, a second optimizer, a swap of averaged weights, another constant or another autocast
state make it differ, and the layer constrains its weight as if nobody had held it.
"""

from __future__ import annotations

import math
import threading
import weakref
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lipkernels.certify import largest_norm, shrunk
from lipkernels.constraints import Constraint, forward_dtype
from lipkernels.functional import fingerprint, initial_vector
from lipkernels.functional.fingerprint import has_fingerprint
from lipkernels.nn.held import held_weight
from lipkernels.nn.module import LipschitzModule


def _version(tensor: Tensor) -> int:
    """How often ``tensor`` was written to in place; tensors of inference mode do not count."""
    return 0 if tensor.is_inference() else tensor._version


class _Prepared(NamedTuple):
    """A weight that `lipkernels.grouped` computed, and what from."""

    weight: Tensor
    raw: nn.Parameter
    version: int
    scale: float


class _PreparedHere(threading.local):
    """The prepared weights of the forward that this thread is in.

    Each thread has its own: another thread's weight hangs on another autograd graph, and is dropped
    when that thread's forward ends. Not on the layer, where a copy or a pickle would find them.
    """

    def __init__(self) -> None:
        self.of: weakref.WeakKeyDictionary[nn.Module, _Prepared] = weakref.WeakKeyDictionary()


_prepared = _PreparedHere()


class ConstrainedWeight(LipschitzModule):
    """Comes before a torch.nn layer class in the bases of a constrained layer."""

    has_strict_mode = True
    constraint: Constraint
    check: bool
    u: Tensor
    bias: nn.Parameter | None
    # The prepared weight while torch.compile traces, which knows no thread-local state.
    _traced: Tensor | None = None

    # What `lipkernels.Retractor` left: (raw Parameter, its version, its fingerprint, the scale).
    _held: tuple[nn.Parameter, int, int, float] | None = None

    def _constrain(self, constraint: Constraint, k_coef_lip: float, check: bool) -> None:
        """The part of the constructor that follows the torch.nn layer's own."""
        self.constraint = constraint
        self.k_coef_lip = k_coef_lip
        self.check = bool(check)
        self.operator_factor()  # refuses an impossible geometry here and not in forward
        if constraint.uses_vector:
            # Not persistent: a plain torch.nn state_dict must load, and it is only a warm start.
            vector = initial_vector(self.matrix(self.raw_weight.detach()))
            self.register_buffer("u", vector, persistent=False)

    # ---------------------------------------------------------------------------- geometry
    def matrix(self, weight: Tensor) -> Tensor:
        """The matrix view whose norm is constrained: (rows, cols), or (groups, rows, cols)."""
        return weight

    def operator_factor(self) -> float:
        """How much larger than its matrix's norm the layer's norm can be."""
        return 1.0

    def matrix_scale(self) -> float:
        """The norm that the matrix is given, for the layer to be ``k_coef_lip``-Lipschitz."""
        return self.k_coef_lip / self.operator_factor()

    # ----------------------------------------------------------------------------- weights
    @property
    def raw_weight(self) -> nn.Parameter:
        """The unconstrained Parameter, registered under the name ``weight``."""
        raw = self._parameters.get("weight")
        if raw is None:
            raise AttributeError(f"{type(self).__name__} has no raw weight yet")
        return raw

    @property
    def weight(self) -> Tensor:
        """The constrained weight that forward uses. In-place writes to it change nothing.

        While it is held it shares the raw weight's memory: a write changes that, and ends the hold.
        """
        if self._parameters.get("weight") is None:
            raise AttributeError(f"{type(self).__name__} has no raw weight yet")
        try:
            return self._constrained_weight()
        except AttributeError as error:
            # nn.Module.__getattr__ would answer an AttributeError with the raw Parameter.
            raise RuntimeError(f"{type(self).__name__}.weight failed: {error}") from error

    def weight_dtype(self) -> torch.dtype:
        """The format that forward computes in, which the bound has to hold in."""
        return forward_dtype(self.raw_weight)

    def prepare(self, weight: Tensor) -> None:
        """Keep the constrained ``weight`` for the forward that this thread is about to run."""
        if torch.compiler.is_compiling():
            self._traced = weight
        else:
            raw = self.raw_weight
            _prepared.of[self] = _Prepared(weight, raw, _version(raw), self.matrix_scale())

    def release(self) -> None:
        """Forget the weight that this thread prepared."""
        self._traced = None  # always: a graph break may have left it on the layer
        if not torch.compiler.is_compiling():
            _prepared.of.pop(self, None)

    def prepared(self) -> Tensor | None:
        """The weight that this thread prepared, unless the layer was changed since.

        An interrupt in forward can leave one behind.
        """
        if torch.compiler.is_compiling():
            return self._traced
        kept = _prepared.of.get(self)
        if kept is None:
            return None
        raw = self.raw_weight
        now = (_version(raw), self.matrix_scale())
        return kept.weight if raw is kept.raw and now == (kept.version, kept.scale) else None

    def hold(self) -> None:
        """Trust the raw weight as it is now: it satisfies the constraint. See Note [Held weights].

        For who put it there, and has a bound for it; anybody else's is checked by nothing.
        """
        raw = self.raw_weight
        self._held = (raw, _version(raw), fingerprint(raw), self.matrix_scale())

    def let_go(self) -> None:
        """Constrain the raw weight in each forward again."""
        self._held = None

    def is_held(self) -> bool:
        """Whether forward uses the raw weight as it is: held, and nobody touched it since."""
        held = self._held  # read once: another thread may let go
        if held is None or torch.compiler.is_compiling():
            return False  # a compiled graph cannot look at bytes: it constrains
        raw, version, bytes_then, scale = held
        now = self.raw_weight
        return (
            now is raw
            and has_fingerprint(now)  # a trace or a transform constrains too
            and _version(now) == version
            and scale == self.matrix_scale()
            and self.weight_dtype() == now.dtype
            and fingerprint(now) == bytes_then
        )

    def _constrained_weight(self) -> Tensor:
        raw = self.raw_weight
        if self.is_held():
            return held_weight(self)
        dtype = self.weight_dtype()
        prepared = self.prepared()
        if prepared is not None:
            wanted = (dtype, raw.requires_grad and torch.is_grad_enabled())
            if (prepared.dtype, prepared.requires_grad) == wanted:
                return prepared
        matrix = self.matrix(raw)
        us = self.start_vectors(matrix)
        results, new_us = self.constraint([matrix], [self.matrix_scale()], us, dtype, self.check)
        self.remember(new_us)
        # A view of a tensor that has the shape already would still be a node for autograd.
        return results[0] if results[0].shape == raw.shape else results[0].reshape(raw.shape)

    def start_vectors(self, matrix: Tensor) -> list[Tensor]:
        """Where the power iteration starts: one vector, or none for a constraint without one."""
        if not self.constraint.uses_vector:
            return []
        # A module built on the meta device gets its weights, not this buffer, from a checkpoint.
        if self.u.device != matrix.device or self.u.shape != matrix.shape[:-1]:
            with torch.inference_mode(False):  # a later training step has to write to it
                self.u = initial_vector(matrix.detach())
        return [self.u]

    def remember(self, us: list[Tensor]) -> None:
        """Keep the power iteration's vector for the next training step."""
        # Without gradients it is no training step: an export leaves the layer as it is.
        if self.training and torch.is_grad_enabled() and us:
            with torch.no_grad():
                self.u.copy_(us[0])

    def __getstate__(self) -> dict[str, object]:
        """Without what belongs to the process: a copy constrains its weight until it is held."""
        state = self.__dict__.copy()
        state.pop("_held", None)
        return state

    # ---------------------------------------------------------------------- initialization
    def reset_parameters(self) -> None:
        """Orthogonal raw weight (each group by itself), torch.nn's bias."""
        raw = self.raw_weight
        with torch.no_grad():
            # QR does not exist in half precision.
            wide = torch.empty_like(raw, dtype=torch.promote_types(raw.dtype, torch.float32))
            matrix = self.matrix(wide)
            if raw.numel() and raw.device.type != "meta":
                for block in matrix.reshape(-1, *matrix.shape[-2:]):
                    nn.init.orthogonal_(block)
                raw.copy_(matrix.reshape(raw.shape))
            if self._buffers.get("u") is not None:
                self.u = initial_vector(self.matrix(raw))
            bias = self._parameters.get("bias")
            if bias is not None:
                fan_in = matrix.shape[-1] if raw.numel() else 0
                bound = 1 / math.sqrt(fan_in) if fan_in > 0 else 0.0
                nn.init.uniform_(bias, -bound, bound)

    # ------------------------------------------------------------------ condense and export
    def strict_weight(self, weight: Tensor, factor: float) -> Tensor:
        """``weight``, scaled down as little as makes its certified norm at most k over ``factor``.

        Each group by itself; see :func:`lipkernels.certify.shrunk`. A copy.
        """
        matrix = self.matrix(weight)
        limit = largest_norm(self.k_coef_lip, factor)
        blocks = [shrunk(block, limit) for block in matrix.reshape(-1, *matrix.shape[-2:])]
        return torch.stack(blocks).reshape(weight.shape) if blocks else weight.clone()

    def _factor_of(self, plain: nn.Module) -> float:
        """:meth:`operator_factor`, or what a certificate counts for the exported layer if more."""
        return self.operator_factor()

    def condense(self, strict: bool = False) -> None:
        r"""Write the constrained weight over the raw one, in place, outside autograd.

        The constraints are projections, so a second call changes nothing beyond rounding, and nor
        does the layer's output change. (A Bjorck iteration named with few steps is no projection:
        each call takes the weight closer to its polar factor.)

        ``strict``: scale it such that the certified norm of what is stored is at most k, see
        :meth:`strict_weight`. (``weight`` is computed anew from that, and may be an ulp off.)
        """
        self.release()
        with torch.no_grad(), torch.autocast(self.raw_weight.device.type, enabled=False):
            weight = self.weight.detach()
            if strict:
                weight = self.strict_weight(weight, self.operator_factor())
            self.raw_weight.copy_(weight)

    def _export_into(self, plain: nn.Module, strict: bool) -> nn.Module:
        """Copy the constrained weight and the bias into ``plain``, sharing no storage."""
        self.release()
        raw, bias = self.raw_weight, self._parameters.get("bias")
        with torch.no_grad(), torch.autocast(raw.device.type, enabled=False):
            weight = self.weight.detach().clone()
            if strict:
                weight = self.strict_weight(weight, self._factor_of(plain))
            plain.weight = nn.Parameter(weight, requires_grad=raw.requires_grad)
            if bias is not None:
                plain.bias = nn.Parameter(bias.detach().clone(), requires_grad=bias.requires_grad)
        return plain.train(self.training)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, k_coef_lip={self.k_coef_lip:g}, {self.constraint}"
