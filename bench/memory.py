"""Bytes that a forward pass keeps until its backward."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor


def kept_bytes(forward: Callable[[], Tensor], exclude: Iterable[Tensor]) -> int:
    """Bytes of all that autograd saves in ``forward``, and of its result.

    A storage counts once, and whole; those of ``exclude`` (parameters, inputs) do not count. The
    result counts for everyone: the layer's product saves it.
    """
    storages: dict[int, int] = {}
    alive = []  # a storage that is freed would lend its address to the next one

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        alive.append(storage)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        result = forward()
    note(result)
    for tensor in exclude:
        storages.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(storages.values())
