"""What a checkpoint may contain: tensors and plain Python values, and what they are put into."""

from __future__ import annotations

from collections import Counter, OrderedDict
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lipkernels.certify import LipschitzBound
from lipkernels.checkpoint.sealed import CheckpointError

_PLAIN = (type(None), bool, int, float, str)
_DICTS = (dict, OrderedDict, Counter)
_LONGEST_INT = 2000  # bits: torch.load(weights_only=True) knows no longer ones


def _saved_tensor(value: Tensor, where: str) -> Tensor:
    if type(value) not in (Tensor, nn.Parameter):
        raise TypeError(f"{where}: expected a plain Tensor, got {type(value).__name__}")
    if value.is_meta or value.layout != torch.strided or value.is_quantized:
        raise TypeError(
            f"{where}: expected a dense tensor with data, got one of layout {value.layout} on"
            f" device {value.device}"
        )
    tensor = value.detach().resolve_conj().resolve_neg()
    # A view would take its whole storage into the file. Tied tensors stay tied.
    covers = tensor.numel() * tensor.element_size() == tensor.untyped_storage().nbytes()
    return tensor if covers else tensor.clone(memory_format=torch.contiguous_format)


def _saved_plain(value: Any, where: str) -> Any:
    if isinstance(value, int) and value.bit_length() > _LONGEST_INT:
        raise ValueError(
            f"{where}: expected an integer of at most {_LONGEST_INT} bits, got {value.bit_length()}"
        )
    return value


def saved_form(value: Any, where: str = "content", parents: tuple[int, ...] = ()) -> Any:
    """``value`` as it is saved: modules and optimizers as their state, a bound as its number.

    Raises TypeError, ValueError naming the place of what ``torch.load(weights_only=True)`` would
    refuse.
    """
    if isinstance(value, (nn.Module, Optimizer)):
        return saved_form(value.state_dict(), where, parents)
    if isinstance(value, LipschitzBound):
        return value.value
    if isinstance(value, Tensor):
        return _saved_tensor(value, where)
    kind: Any = type(value)  # exactly: torch.load refuses most subclasses
    if kind in _PLAIN:
        return _saved_plain(value, where)
    if id(value) in parents:
        raise ValueError(f"{where}: expected a tree of values, got one that contains itself")
    parents = (*parents, id(value))
    if kind in (list, tuple):
        return kind(saved_form(v, f"{where}[{i}]", parents) for i, v in enumerate(value))
    if kind in _DICTS:
        return _saved_dict(value, where, parents)
    raise TypeError(
        f"{where}: expected tensors, modules, optimizers, and None, bool, int, float, str, list,"
        f" tuple, dict of them, got {type(value).__name__}"
    )


def _saved_dict(value: dict[Any, Any], where: str, parents: tuple[int, ...]) -> dict[Any, Any]:
    result = type(value)()
    for key, item in value.items():
        if type(key) not in _PLAIN:
            raise TypeError(
                f"{where}: expected keys that are plain values, got {type(key).__name__} {key!r}"
            )
        result[key] = saved_form(item, f"{where}[{key!r}]", parents)
    versions = getattr(value, "_metadata", None)  # of the modules, in a state_dict
    if versions is not None and type(value) is OrderedDict:
        result._metadata = saved_form(  # pyright: ignore[reportAttributeAccessIssue]
            versions, f"{where}._metadata", parents
        )
    return result


def _mismatches(model: nn.Module, state: dict[Any, Any]) -> list[str]:
    own = model.state_dict()
    found = [f"missing {name!r}" for name in own if name not in state]
    found += [f"unexpected {name!r}" for name in state if name not in own]
    for name in (name for name in own if name in state):
        mine, stored = own[name], state[name]
        if not isinstance(mine, Tensor):
            continue  # a module's extra state, which may be anything
        if not isinstance(stored, Tensor):
            found.append(f"{name!r} is a {type(stored).__name__}, expected a tensor")
        elif mine.shape != stored.shape:
            found.append(f"{name!r} has shape {tuple(stored.shape)}, expected {tuple(mine.shape)}")
        elif mine.dtype != stored.dtype:
            found.append(f"{name!r} has dtype {stored.dtype}, expected {mine.dtype}")
    return found


def _optimizer_mismatches(optimizer: Optimizer, state: dict[Any, Any]) -> list[str]:
    if not isinstance(state.get("state"), dict) or not isinstance(state.get("param_groups"), list):
        return ["no state of an optimizer"]
    groups = state["param_groups"]
    if not all(isinstance(g, dict) and isinstance(g.get("params"), list) for g in groups):
        return ["no parameter groups of an optimizer"]
    mine = [len(group["params"]) for group in optimizer.param_groups]
    stored = [len(group["params"]) for group in groups]
    return [] if mine == stored else [f"groups of {stored} parameters, expected {mine}"]


def pairs(into: Any, content: Any, name: str, where: str = "content") -> list[tuple[Any, dict]]:
    """(module or optimizer, its state) for everything in ``into``, by the same keys.

    Raises CheckpointError, with every mismatch there is, unless all of it fits.
    """
    if isinstance(into, (nn.Module, Optimizer)):
        if not isinstance(content, dict):
            raise CheckpointError(
                f"{name}: expected the state of a {type(into).__name__} as {where}, got"
                f" {type(content).__name__}"
            )
        check = _mismatches if isinstance(into, nn.Module) else _optimizer_mismatches
        found = check(into, content)  # pyright: ignore[reportArgumentType]
        if found:
            raise CheckpointError(
                f"{name}: expected {where} to fit the {type(into).__name__}, got "
                + "; ".join(found)
            )
        return [(into, content)]
    if not isinstance(into, dict):
        raise TypeError(
            f"into: expected a module, an optimizer or a dict of them, got {type(into).__name__}"
        )
    found = []
    for key, target in into.items():
        if not isinstance(content, dict) or key not in content:
            raise CheckpointError(f"{name}: expected {where}[{key!r}], got a file without it")
        found += pairs(target, content[key], name, f"{where}[{key!r}]")
    return found
