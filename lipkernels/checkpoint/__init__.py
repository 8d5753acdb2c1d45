"""Checkpoints that a crash can't tear, damage can't change and a lie can't certify.

:func:`save` replaces a file in one step; :func:`load` checks every byte of it against a digest
before it parses one, unpickles with ``weights_only=True``, and recomputes a stored bound.
"""

from lipkernels.checkpoint.atomic import replaced_atomically
from lipkernels.checkpoint.files import load, save
from lipkernels.checkpoint.sealed import CheckpointError

__all__ = ["CheckpointError", "load", "replaced_atomically", "save"]
