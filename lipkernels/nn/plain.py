"""Plain torch modules for what torch.nn has no class for.

A function of torch operations alone is traced into a :class:`torch.fx.GraphModule`: a module that
pickles, loads and runs where only torch is installed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.proxy import GraphAppendingTracer


def _graph_module(
    function: Callable[..., Any], root: nn.Module, names: Sequence[str], training: bool
) -> fx.GraphModule:
    """``function(x, *tensors)`` as a graph, the tensors those of ``root`` with these names."""
    # Not fx.Tracer, which patches nn.Module for as long as it traces: a forward in another thread
    # would run into it. These functions call no modules.
    graph = fx.Graph()
    tracer = GraphAppendingTracer(graph)
    x = fx.Proxy(graph.placeholder("x"), tracer)
    tensors = [fx.Proxy(graph.get_attr(name), tracer) for name in names]
    graph.output(function(x, *tensors).node)
    return fx.GraphModule(root, graph, class_name="Plain").train(training)


def traced(function: Callable[[Tensor], Tensor], training: bool = True) -> nn.Module:
    """``function``, which may call torch alone, as a module that needs torch alone."""
    return _graph_module(function, nn.Module(), (), training)


def traced_with_tensor(
    function: Callable[[Tensor, Tensor], Tensor], tensor: Tensor, training: bool = True
) -> nn.Module:
    """``function(x, tensor)`` as such a module, with ``tensor`` as its parameter ``theta``."""
    root = nn.Module()
    root.theta = nn.Parameter(tensor.detach().clone(), requires_grad=tensor.requires_grad)
    return _graph_module(function, root, ("theta",), training)


def scaled(module: nn.Module, k: float) -> nn.Module:
    """``k * module(x)``: the module itself for k = 1."""
    if k == 1.0:
        return module
    return nn.Sequential(module, traced(lambda x: x * k)).train(module.training)


def symmetric_padding(pairs: Sequence[tuple[int, int]], training: bool) -> nn.Module:
    """Symmetric padding by (left, right) of each of the last dimensions, batch or none."""

    def pad(x: Tensor) -> Tensor:
        for dim, (left, right) in enumerate(pairs, start=-len(pairs)):
            parts = [x]
            if left > 0:
                parts.insert(0, x.narrow(dim, 0, left).flip(dim))
            if right > 0:
                parts.append(x.narrow(dim, -right, right).flip(dim))
            x = torch.cat(parts, dim)
        return x

    return traced(pad, training)
