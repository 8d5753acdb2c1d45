"""When an op may be called directly, as an autograd.Function, and not through torch's dispatcher.

A ``torch.library`` op is what torch.compile, torch.export, fake tensors and tracers need to see. It
costs about 60 us each way for a list of tensors, several times what a small weight costs. Where
nothing of the kind is active, the same two functions are called without it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch._C import _is_torch_function_mode_enabled
from torch._C._functorch import peek_interpreter_stack
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

_PLAIN = (Tensor, nn.Parameter)


def is_plain_eager(tensors: Sequence[Tensor]) -> bool:
    """Whether ordinary tensors are computed with, and nobody is recording what is done to them."""
    return (
        not torch.compiler.is_compiling()
        and all(type(t) in _PLAIN and not (t.is_meta or t.is_neg()) for t in tensors)
        and not is_in_torch_dispatch_mode()
        and not _is_torch_function_mode_enabled()
        and torch._C._get_tracing_state() is None
        and peek_interpreter_stack() is None
    )
