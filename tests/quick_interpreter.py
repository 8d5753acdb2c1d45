"""Triton's interpreter in half the time: without what it repeats for every launch and every sum.

- It looks for the functions to replace in all members of its modules, whenever a kernel is launched
  and whenever a kernel calls a function. Their names are found once here, and a called function's
  modules replaced once: the launch has replaced the same ones already.
- It does all integer sums and products a second time in 64 bits, to see if they overflow, and then
  throws away what it has seen unless it is told to debug.

No value changes. A Triton that has none of this any more is left as it is. And Triton 3.6 makes an
int of an array of one number, which NumPy 2.4 refuses.
"""

from __future__ import annotations

import functools
import inspect
from types import ModuleType
from typing import Any

import triton.language as tl
from triton.runtime import interpreter

_called: set[Any] = set()
_patch_tensor_before = getattr(interpreter, "_patch_lang_tensor", None)


@functools.cache
def _builtins_of(package: ModuleType | type) -> list[str]:
    return [name for name, member in inspect.getmembers(package) if tl.core.is_builtin(member)]


def _patch_builtin(package: ModuleType | type, builder: Any, scope: Any) -> None:
    for name in _builtins_of(package):
        member = getattr(package, name)
        if tl.core.is_builtin(member):  # not yet replaced
            interpreter._patch_attr(package, name, member, builder, scope)


def _patch_tensor(tensor: type, scope: Any) -> None:
    _patch_tensor_before(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


def _call(self: Any, *args: Any, **kwargs: Any) -> Any:
    if self.fn not in _called:
        interpreter._patch_lang(self.fn)
        _called.add(self.fn)
    try:
        return self.rewrite()(*args, **kwargs)
    except Exception as error:
        raise interpreter.InterpreterError(repr(error)) from error


def install() -> None:
    """From now on, before the first launch."""
    expected = ("_patch_builtin", "_patch_attr", "_patch_lang", "_patch_lang_tensor")
    if not all(hasattr(interpreter, name) for name in expected):
        return
    for package in (tl, tl.core, tl.math, tl.core.tensor, tl.core.tensor_descriptor_base):
        _builtins_of(package)
    interpreter._patch_builtin = _patch_builtin
    interpreter._patch_lang_tensor = _patch_tensor
    interpreter.InterpretedFunction.__call__ = _call
    # A frozen dataclass: an option that no caller can choose.
    object.__setattr__(interpreter.interpreter_builder.options, "sanitize_overflow", False)
