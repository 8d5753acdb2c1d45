"""Memory: what a forward pass keeps until its backward, and the peak of a whole step."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor


class _Packed:
    """What autograd holds in place of a saved tensor: it dies with the graph that saved it."""

    __slots__ = ("__weakref__", "tensor")

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def kept_bytes(forward: Callable[[], Iterable[Tensor]], exclude: Iterable[Tensor]) -> int:
    """Bytes that autograd holds when ``forward`` has returned, and those of its results.

    A storage counts once, and whole; those of ``exclude`` (parameters, inputs) do not count. The
    results count for everyone: the product with the data saves a constrained weight anyway. What a
    graph saved that was thrown away again (a test for convergence) does not count.
    """
    packed: list[weakref.ref[_Packed]] = []

    def pack(tensor: Tensor) -> _Packed:
        holder = _Packed(tensor.detach())  # a saved result would keep its own graph alive
        packed.append(weakref.ref(holder))
        return holder

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda holder: holder.tensor):
        results = list(forward())
    held = [holder.tensor for ref in packed if (holder := ref()) is not None]
    sizes = {s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in (*held, *results))}
    for tensor in exclude:
        sizes.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(sizes.values())


def peak_bytes(step: Callable[[], object], device: torch.device) -> int:
    """The most memory that is allocated at once during ``step``, beyond what was before it.

    On CPU: the running sum of torch's own record of every allocation (the workspace that LAPACK or
    oneDNN take for themselves is not in it). On a GPU: its allocator's peak.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
        step()
    record = profiler.profiler.kineto_results.events()  # pyright: ignore[reportOptionalMemberAccess]
    memory: list[Any] = [event for event in record if event.name() == "[memory]"]
    changes = sorted((event.start_ns(), event.nbytes()) for event in memory)
    return max(accumulate((change for _, change in changes), initial=0))
