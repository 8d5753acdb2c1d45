"""All constrained weights of a model in one call of their op, once per forward.

Layers that share a constraint and a result dtype are constrained by a single call on the list of
their raw weights, just before the model's forward, and find the result waiting. It is dropped when
forward ends, so that it can't be stale; a layer that is called on its own, in another autocast
state or another grad mode computes its own weight as ever. The gradients are the same ones.

A forward that is interrupted (KeyboardInterrupt) leaves its results behind until the next one; a
layer called by itself in between uses them only if its Parameter was not replaced or written to
since. A write through ``.data`` escapes that check.

Threads that run one model at the same time prepare weights of their own each. Turn the switch while
none of them is in a forward: one that is would keep its results, as after an interrupt.

Not for models that checkpoint activations inside their forward: the recomputation in backward finds
no prepared weights, and torch raises CheckpointError.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from torch import nn

from lipkernels.nn.constrained import ConstrainedWeight


def _constrained_layers(model: nn.Module) -> list[ConstrainedWeight]:
    return [m for m in model.modules() if isinstance(m, ConstrainedWeight)]


def prepare(model: nn.Module) -> None:
    """Compute every constrained weight of ``model`` and leave it with its layer."""
    groups = defaultdict(list)
    for layer in _constrained_layers(model):
        if layer.is_held():
            continue
        raw = layer.raw_weight
        key = (layer.constraint, layer.weight_dtype(), raw.dtype, raw.device, layer.check)
        groups[key].append(layer)
    for (constraint, dtype, _, _, check), layers in groups.items():
        matrices = [layer.matrix(layer.raw_weight) for layer in layers]
        scales = [layer.matrix_scale() for layer in layers]
        us = [u for layer, m in zip(layers, matrices, strict=True) for u in layer.start_vectors(m)]
        results, new_us = constraint(matrices, scales, us, dtype, check)
        for i, (layer, result) in enumerate(zip(layers, results, strict=True)):
            layer.prepare(result.reshape(layer.raw_weight.shape))
            layer.remember(new_us[i : i + 1])


def release(model: nn.Module) -> None:
    """Forget the prepared weights."""
    for layer in _constrained_layers(model):
        layer.release()


def _before(model: nn.Module, args: Any) -> None:
    prepare(model)


def _after(model: nn.Module, args: Any, output: Any) -> None:
    release(model)


# What lipkernels.certify asks of a hook before it certifies a module.
_before.keeps_output = True  # pyright: ignore[reportFunctionMemberAccess]
_after.keeps_output = True  # pyright: ignore[reportFunctionMemberAccess]


class GroupedWeights:
    """The switch that :func:`group_weights` returns; also a context manager that ends it."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._handles = [
            model.register_forward_pre_hook(_before),
            model.register_forward_hook(_after, always_call=True),
        ]

    def remove(self) -> None:
        """Back to one call per layer."""
        for handle in self._handles:
            handle.remove()
        release(self._model)

    def __enter__(self) -> GroupedWeights:
        return self

    def __exit__(self, *exc: object) -> None:
        self.remove()


def group_weights(model: nn.Module) -> GroupedWeights:
    """From now on every forward of ``model`` constrains all its weights in one call per constraint.

    The switch stays on until ``remove()`` is called on the result.

    >>> import torch
    >>> from lipkernels.nn import Sequential, SpectralLinear
    >>> net = Sequential(SpectralLinear(4, 4), SpectralLinear(4, 2))
    >>> switch = group_weights(net)
    >>> net(torch.zeros(1, 4)).shape
    torch.Size([1, 2])
    >>> switch.remove()
    """
    return GroupedWeights(model)


@contextlib.contextmanager
def grouped(model: nn.Module) -> Iterator[nn.Module]:
    """:func:`group_weights` for the block.

    >>> import torch
    >>> from lipkernels.nn import SpectralLinear
    >>> net = nn.Sequential(SpectralLinear(4, 4), SpectralLinear(4, 2))
    >>> with grouped(net):
    ...     net(torch.zeros(1, 4)).sum().backward()
    """
    with group_weights(model):
        yield model
