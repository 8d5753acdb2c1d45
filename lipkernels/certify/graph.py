"""The Lipschitz constant of an exported activation or pool: a small torch.fx graph, walked.

The constant is recomputed from the operations of the graph, never read from the file. Every
node's value is a function of the input; its constant follows from its arguments' constants by the
rules below, and an operation without a rule ends the walk.
"""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
from torch import Tensor, fx

from lipkernels.certify.window import operator_factor

# Methods and functions that only move or order the elements of a tensor.
_PERMUTATIONS = {
    "unflatten",
    "flatten",
    "reshape",
    "permute",
    "movedim",
    "contiguous",
    "sort",
}
_ONE_LIPSCHITZ = (torch.abs, torch.relu, torch.nn.functional.relu)


class NoRuleError(ValueError):
    """The graph has an operation whose constant is not known."""


def _sum_pool(node: Any) -> float:
    """l2 constant of avg_pool2d(x, kernel, stride, padding, ceil_mode, divisor_override=n)."""
    divisor = node.kwargs.get("divisor_override")
    if not isinstance(divisor, int) or divisor < 1 or len(node.args) != 5:
        return math.inf
    _, kernel, stride, padding, _ = node.args
    overlap = operator_factor(kernel, stride, [(p, p) for p in padding], (1, 1), "zeros")
    return math.sqrt(math.prod(kernel)) * overlap / divisor * (1 + 2.0**-50)


def _is_mirrored_relus(node: Any) -> Any:
    """x of cat((relu(x), relu(-x))), which is an isometry of |x|'s parts."""
    if len(node.args[0]) != 2:
        return None
    first, second = node.args[0]
    relus = (torch.relu, torch.nn.functional.relu)
    if not all(isinstance(n, fx.Node) and n.target in relus for n in (first, second)):
        return None
    negated = second.args[0]
    if negated.target is operator.neg and negated.args[0] is first.args[0]:
        return first.args[0]
    return None


def _norm_pool(node: Any) -> tuple[Any, float] | None:
    """(x, constant) of sqrt(sum_pool(square(x))): the norm of each window over sqrt(divisor)."""
    pool = node.args[0]
    if pool.target is not torch.nn.functional.avg_pool2d:
        return None
    square = pool.args[0]
    if square.target is not torch.square:
        return None
    constant = _sum_pool(pool)
    if not math.isfinite(constant):
        return None
    ratio = math.sqrt(pool.kwargs["divisor_override"] / math.prod(pool.args[1]))
    return square.args[0], constant * ratio * (1 + 2.0**-48)


def _global_average(node: Any) -> tuple[Any, float] | None:
    """(x, k) of x.mean((-2, -1)) * ((x.size(-2) * x.size(-1)) ** 0.5 * k)."""
    mean, factor = node.args
    if not (hasattr(mean, "args") and hasattr(factor, "args")):  # both nodes, no number
        return None
    x = mean.args[0]
    if mean.target != "mean" or tuple(mean.kwargs.get("dim", ())) != (-2, -1):
        return None
    if factor.target is not operator.mul or not isinstance(factor.args[1], (int, float)):
        return None
    power = factor.args[0]
    if power.target is not operator.pow or power.args[1] != 0.5:
        return None
    sizes = [(n.target, n.args) for n in power.args[0].args]
    if power.args[0].target is not operator.mul or sizes != [("size", (x, -2)), ("size", (x, -1))]:
        return None
    return x, abs(factor.args[1]) * (1 + 2.0**-48)


def _selects_once(node: Any) -> bool:
    """Whether a getitem takes each element at most once (and values, not a sort's indices)."""
    source, index = node.args
    if source.target == "sort":
        return isinstance(index, int) and index == 0
    parts = index if isinstance(index, tuple) else (index,)
    return all(part is None or isinstance(part, (int, slice)) for part in parts)


def graph_constant(module: fx.GraphModule) -> float:
    """Upper bound of the l2 constant of a traced function; NoRuleError where there is none."""
    # inf: a value whose constant is unknown, which matters only if the output depends on it.
    constants: dict[Any, float] = {}
    node: Any  # fx types an argument as a union of everything that it could be
    for node in module.graph.nodes:
        if node.op == "placeholder":
            constants[node] = 1.0
        elif node.op == "call_method" and node.target in _PERMUTATIONS:
            constants[node] = constants[node.args[0]]
        elif node.op == "call_function":
            constants[node] = _function_constant(node, constants)
        elif node.op == "output":
            result = constants[node.args[0]]
            if math.isfinite(result):
                return result
        else:
            constants[node] = math.inf
    unknown = sorted({str(n.target) for n, c in constants.items() if c == math.inf})
    raise NoRuleError(f"a graph with operations that have no rule, among {unknown}")


def _function_constant(node: Any, constants: dict[Any, float]) -> float:
    target = node.target
    if target in _ONE_LIPSCHITZ or target is operator.neg:
        return constants[node.args[0]]
    if target is torch.linalg.vector_norm:
        # A second positional argument would be the order of the norm.
        euclidean = len(node.args) == 1 and set(node.kwargs) <= {"dim", "keepdim"}
        return constants[node.args[0]] if euclidean else math.inf
    if target is operator.getitem:
        return constants[node.args[0]] if _selects_once(node) else math.inf
    if target is operator.mul and isinstance(node.args[1], (int, float)):
        return constants[node.args[0]] * abs(node.args[1]) * (1 + 2.0**-52)
    if target is torch.nn.functional.avg_pool2d:
        return constants[node.args[0]] * _sum_pool(node)
    if target is torch.cat:
        mirrored = _is_mirrored_relus(node)
        return math.inf if mirrored is None else constants[mirrored]
    pattern = {operator.mul: _global_average, torch.sqrt: _norm_pool}.get(target)
    match = pattern(node) if pattern else None
    return math.inf if match is None else constants[match[0]] * match[1]


def graph_roundings(module: fx.GraphModule, x: Tensor) -> tuple[int, float, bool]:
    """(count, gain, squares) of a traced function that :func:`graph_constant` has a rule for.

    ``count`` is a bound of how many roundings in a row an output goes through, for inputs of the
    shape of ``x`` (N, ..); ``gain`` of what the factors on the way multiply to; ``squares`` says
    whether the input is squared.
    """
    count, gain, squares = 0, 1.0, False
    n = max(1, x[:1].numel())
    node: Any
    for node in module.graph.nodes:
        if node.op == "call_method" and node.target == "mean":
            count += n + 4
        elif node.op != "call_function":
            continue
        elif node.target is operator.mul:
            factor = node.args[1]
            # Not a number: the root of the number of pixels, in a global average.
            count += 3
            gain *= max(1.0, abs(factor) if isinstance(factor, (int, float)) else math.sqrt(n))
        elif node.target is torch.nn.functional.avg_pool2d:
            window = math.prod(node.args[1])
            count += window + 3
            gain *= max(1.0, window / abs(node.kwargs["divisor_override"]))
        elif node.target in (torch.square, torch.sqrt):
            count, squares = count + 1, True
        elif node.target is torch.linalg.vector_norm:
            count, squares = count + n + 6, True
    return count, gain, squares
