"""Save and load a checkpoint."""

from __future__ import annotations

import os
import warnings
from typing import Any

from torch import nn

from lipkernels.certify import lipschitz_bound
from lipkernels.checkpoint.atomic import replaced_atomically
from lipkernels.checkpoint.content import pairs, saved_form
from lipkernels.checkpoint.sealed import read_sealed, write_sealed

_BOUND = "lipschitz_bound"
_TOLERANCE = 1e-6  # by which a stored bound may fall short unreported: another machine's rounding


def save(content: Any, path: str | os.PathLike[str]) -> None:
    r"""Replace the file ``path`` by a checkpoint of ``content``, in one step.

    A crash at any moment, kill -9 and power failures included, leaves the old file or the new one,
    whole: see :func:`lipkernels.checkpoint.replaced_atomically`. The file is an ordinary torch.save
    archive, which ``torch.load(path, weights_only=True)`` reads too, with a digest at its end.

    Args:
        content: a module or an optimizer (its state_dict is saved), a tensor, a plain Python value,
            or dicts, lists and tuples of these. Tensors are saved without gradient; a view without
            the rest of its storage. A :class:`lipkernels.certify.LipschitzBound` is saved as a
            number, for information: no loader believes it.
        path: the file.

    Raises:
        TypeError, ValueError: content that could not be loaded again, named by its place; a path
            that is no regular file. The file is untouched.
        OSError: as ``open`` and ``write``, a full disk included. The file is untouched.

    Example:
        >>> import os, tempfile
        >>> from lipkernels.nn import SpectralLinear
        >>> path = os.path.join(tempfile.mkdtemp(), "net.pt")
        >>> net = SpectralLinear(4, 2)
        >>> save({"model": net, "epoch": 3}, path)
        >>> load(path, into={"model": net})["epoch"]
        3
    """
    saved = saved_form(content)
    with replaced_atomically(path) as file:
        write_sealed(saved, file)


def _without_belief(content: Any, restored: list[tuple[Any, dict]], name: str) -> Any:
    """``content`` with the bound recomputed, or left out where there is no one model to ask."""
    if not isinstance(content, dict) or _BOUND not in content:
        return content
    claimed = content.pop(_BOUND)
    models = [target for target, _ in restored if isinstance(target, nn.Module)]
    if len(models) != 1:
        return content
    try:
        bound = content[_BOUND] = lipschitz_bound(models[0])
    except TypeError as error:  # a module without a rule; it is restored nevertheless
        warnings.warn(f"{name}: no bound to recompute: {error}", UserWarning, stacklevel=3)
        return content
    honest = isinstance(claimed, (int, float)) and claimed >= bound.value * (1 - _TOLERANCE)
    if not honest:
        warnings.warn(
            f"{name}: the stored bound {claimed!r} is not one: the weights have {bound.value!r}",
            UserWarning,
            stacklevel=3,
        )
    return content


def load(path: str | os.PathLike[str], *, into: Any = None, map_location: Any = "cpu") -> Any:
    r"""The content of a checkpoint that :func:`save` wrote; restores modules and optimizers.

    Every byte is checked against the file's digest before any is parsed; then
    ``torch.load(weights_only=True)`` reads it. The digest detects damage. It is no signature: who
    can write the file can write another digest, but no more than that, since no code is run and no
    bound is believed.

    Args:
        path: the file.
        into: a module or an optimizer, or a dict of them (and of such dicts) under the keys that
            :func:`save` got them under. All names, shapes and dtypes are compared before the first
            value is written: everything is restored, or nothing.
        map_location: as in torch.load. Values copied ``into`` a module go to its own devices.

    Returns:
        the content, modules and optimizers as their state_dict. A bound stored as
        ``content["lipschitz_bound"]`` is never returned: it is left out, or, with one module in
        ``into``, replaced by :func:`lipkernels.certify.lipschitz_bound` of the restored module,
        with a UserWarning if what was stored is below it (or the module has no such bound).

    Raises:
        CheckpointError: a file that is damaged, cut short, or no checkpoint; a state that does not
            fit ``into``, with all that is missing, unexpected, or of another shape or dtype.
        TypeError: ``into`` is none of these.
        OSError: as ``open``.

    Example: see :func:`save`.
    """
    name = os.fsdecode(path)
    with open(path, "rb") as file:
        content = read_sealed(file, name, map_location)
    restored = [] if into is None else pairs(into, content, name)
    for target, state in restored:
        target.load_state_dict(state)
    return _without_belief(content, restored, name)
