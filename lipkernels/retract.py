"""Hold the constraint between optimizer steps, instead of inside autograd.

A layer of this library constrains its raw weight in each forward, and backward differentiates
through that. A :class:`Retractor` does it once after each step of an optimizer, outside autograd:
the raw weights are put back on the constraint, all in one call, and held. Forward uses them as they
are; backward projects their gradients on the tangent space of the constraint, which is all that is
left of differentiating through it.

The promise is the same, and so are the gradients (but for a Bjorck iteration named with few steps,
which is no projection: held, it acts on its own result). A held weight satisfies it as stored,
and one that anybody else changes is not trusted: the layer constrains it in forward until the next
step of the optimizer (see Note [Held weights] in `lipkernels.nn.constrained`).

Absil, Mahony and Sepulchre, "Optimization algorithms on matrix manifolds", 2008, chapter 4.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lipkernels import constraints
from lipkernels import functional as F
from lipkernels.nn.constrained import ConstrainedWeight


def _layers(model: nn.Module) -> list[ConstrainedWeight]:
    """The constrained layers of ``model``, one for each raw weight."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    found: dict[nn.Parameter, ConstrainedWeight] = {}
    for name, module in model.named_modules():
        if not isinstance(module, ConstrainedWeight):
            continue
        first = found.setdefault(module.raw_weight, module)
        same = (first.constraint, first.matrix_scale()) == (
            module.constraint,
            module.matrix_scale(),
        )
        if not same:
            raise ValueError(
                f"Retractor: expected layers that share a raw weight to share its constraint, got"
                f" {first.constraint} at {first.matrix_scale():g} and, in {name!r},"
                f" {module.constraint} at {module.matrix_scale():g}"
            )
    return list(found.values())


def _by_constraint(layers: Iterable[ConstrainedWeight]) -> list[list[ConstrainedWeight]]:
    """Layers that one call can constrain."""
    groups = defaultdict(list)
    for layer in layers:
        raw = layer.raw_weight
        groups[layer.constraint, raw.dtype, raw.device, layer.check].append(layer)
    return list(groups.values())


def _matrices(layers: Sequence[ConstrainedWeight]) -> list[Tensor]:
    return [layer.matrix(layer.raw_weight.detach()) for layer in layers]


def _scales(layers: Sequence[ConstrainedWeight]) -> list[float]:
    return [layer.matrix_scale() for layer in layers]


def _retract(layers: Sequence[ConstrainedWeight], exactly: bool) -> None:
    """Raw weights of layers with one constraint, in place, back on it; then hold them."""
    constraint, matrices, scales = layers[0].constraint, _matrices(layers), _scales(layers)
    if isinstance(constraint, constraints.PolarFactor) and not exactly:
        results = F.retract_(matrices, scales, check=layers[0].check)
    else:
        us = [u for layer, m in zip(layers, matrices, strict=True) for u in layer.start_vectors(m)]
        results, new_us = constraint(matrices, scales, us, matrices[0].dtype, layers[0].check)
        for layer, u in zip(layers, new_us, strict=False):  # none for a constraint without vectors
            layer.u.copy_(u)
    for layer, result in zip(layers, results, strict=True):
        raw = layer.raw_weight
        if result.data_ptr() != raw.data_ptr():  # else it was written where it lies
            raw.copy_(result.reshape(raw.shape))
        layer.hold()


class Retractor:
    """Keeps every constrained weight of ``model`` on its constraint after each optimizer step.

    >>> import torch
    >>> from lipkernels.nn import GroupSort2, Sequential, SpectralLinear
    >>> net = Sequential(SpectralLinear(4, 8), GroupSort2(), SpectralLinear(8, 2))
    >>> optimizer = torch.optim.Adam(net.parameters(), lr=0.1)
    >>> retractor = Retractor(net).attach(optimizer)
    >>> net(torch.randn(16, 4)).square().sum().backward()
    >>> optimizer.step()
    >>> bool(torch.linalg.matrix_norm(net[0].raw_weight, 2) <= 1)
    True
    >>> retractor.remove()  # from here on, constrained in each forward again

    Args:
        model: any module with constrained layers, of any constraints, anywhere in it. Layers that
            share a raw weight have to share its constraint, or ValueError is raised.

    The raw weights are overwritten by the constrained ones; the model computes the same function.
    Autocast uses weights in other formats, and torch.compile cannot look at their bytes: there,
    layers constrain as ever. A layer that is given another constant, or raw weight, while attached
    is constrained in forward until the next step.
    """

    def __init__(self, model: nn.Module) -> None:
        self._layers = _layers(model)
        self._handles: list[Any] = []

    def attach(self, optimizer: torch.optim.Optimizer) -> Retractor:
        """Retract after each step of ``optimizer``, and now; may be called for several optimizers.

        An optimizer's steps concern the weights in its parameter groups alone. One that evaluates a
        closure several times in a step (LBFGS) gets constrained weights in each evaluation, and the
        retraction at the end.
        """
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(
                f"optimizer: expected a torch.optim.Optimizer, got {type(optimizer).__name__}"
            )
        self._handles.append(optimizer.register_step_post_hook(self._after_step))
        self.retract(exactly=True)
        return self

    def remove(self) -> None:
        """Take the hooks off, and let the layers constrain their weights in each forward again."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for layer in self._layers:
            layer.let_go()

    def __enter__(self) -> Retractor:
        return self

    def __exit__(self, *exc: object) -> None:
        self.remove()

    @torch.no_grad()
    def retract(self, *, exactly: bool = False) -> None:
        """Put every weight on its constraint now, and hold it.

        ``exactly``: by the converged polar factor, whatever it costs; otherwise as after a step.
        """
        for group in _by_constraint(self._layers):
            _retract(group, exactly)

    def _stepped(self, optimizer: torch.optim.Optimizer) -> list[list[ConstrainedWeight]]:
        stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
        return _by_constraint(layer for layer in self._layers if id(layer.raw_weight) in stepped)

    @torch.no_grad()
    def _after_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for group in self._stepped(optimizer):
            _retract(group, exactly=False)
