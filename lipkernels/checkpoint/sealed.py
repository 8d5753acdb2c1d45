"""A torch.save file with a digest of all its bytes at its end, checked before any is parsed.

Note [Seal]
torch.save writes a zip archive, whose last record ends with a comment of any length, by default
none. The comment here is a prefix and the SHA-256, in hexadecimal, of every byte before it (prefix,
length of the comment and padding included). The file stays one that ``torch.load`` reads. A digest
of the tensors alone would have to parse a damaged file before it could find the damage: unpicklers
and zip readers are no place to be with arbitrary bytes. It detects damage; it is no signature.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import struct
from typing import Any, BinaryIO

import torch

_PREFIX = b"lipkernels 1 sha256 "
_HEX_DIGITS = 64
_END_RECORD = 22  # bytes of a zip archive's last record without its comment
_CHUNK = 2**20
# What torch.load raises on a file that is not what it expects.
_UNREADABLE = (
    pickle.UnpicklingError,
    RuntimeError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    EOFError,
    OverflowError,
    AssertionError,
    OSError,  # a position outside the file
)


class CheckpointError(ValueError):
    """A file that is no complete checkpoint, or that does not fit what it is to be loaded into."""


class _Digesting:
    """Passes on what is written to it, but for the archive's last record, and digests it.

    An error (a full disk) is kept and raised at the end: torch's zip writer would go on after it
    and answer with a RuntimeError about a position.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._tail = b""
        self._error: OSError | None = None
        self.sha256 = hashlib.sha256()

    def _pass_on(self, data: bytes | memoryview) -> None:
        if self._error is None:
            self.sha256.update(data)
            try:
                self._file.write(data)
            except OSError as error:
                self._error = error

    def write(self, data: bytes | memoryview) -> int:
        if len(data) >= _END_RECORD:
            self._pass_on(self._tail)
            self._pass_on(data[: len(data) - _END_RECORD])
            self._tail = bytes(data[len(data) - _END_RECORD :])
        else:
            tail = self._tail + bytes(data)
            split = max(0, len(tail) - _END_RECORD)
            self._pass_on(tail[:split])
            self._tail = tail[split:]
        return len(data)

    def flush(self) -> None:
        """Nothing waits here but the last record."""

    def finish(self) -> None:
        if not (self._tail.startswith(b"PK\5\6") and self._tail.endswith(b"\0\0")):
            raise CheckpointError(
                "expected torch.save to end with a zip archive's last record, without a comment,"
                f" got {self._tail!r}: this torch writes another format"
            )
        length = struct.pack("<H", len(_PREFIX) + _HEX_DIGITS)
        self._pass_on(self._tail[:-2] + length + _PREFIX)
        digest = self.sha256.hexdigest().encode()
        self._pass_on(digest)
        if self._error is not None:
            raise self._error


def write_sealed(content: Any, file: BinaryIO) -> None:
    """``torch.save(content, file)``, sealed. Raises OSError where the file can't be written."""
    digesting = _Digesting(file)
    torch.save(content, digesting)  # pyright: ignore[reportArgumentType]  # needs write and flush
    digesting.finish()


def _check_seal(file: BinaryIO, name: str) -> None:
    seal = len(_PREFIX) + _HEX_DIGITS
    size = file.seek(0, os.SEEK_END)
    end = b""
    if size > seal:
        file.seek(size - seal)
        end = file.read()
    if not end.startswith(_PREFIX):
        raise CheckpointError(
            f"{name}: expected a checkpoint that ends with a digest, got {size} bytes without one:"
            " cut short, damaged at the end, or not written by lipkernels.checkpoint.save"
        )
    sha256 = hashlib.sha256()
    file.seek(0)
    left = size - _HEX_DIGITS
    while left > 0:
        chunk = file.read(min(left, _CHUNK))
        if not chunk:
            raise CheckpointError(f"{name}: expected {size} bytes, got fewer: it is being changed")
        sha256.update(chunk)
        left -= len(chunk)
    if sha256.hexdigest().encode() != end[len(_PREFIX) :]:
        raise CheckpointError(
            f"{name}: expected content with the digest that stands at its end, got another one:"
            " bytes of it were changed, inserted or lost"
        )


def read_sealed(file: BinaryIO, name: str, map_location: Any) -> Any:
    """The content of a sealed file, by ``torch.load(.., weights_only=True)``.

    Raises CheckpointError, before anything is parsed, unless every byte is as it was written. All
    reads go through ``file``: a file that replaces it meanwhile is another one.
    """
    _check_seal(file, name)
    file.seek(0)
    try:
        return torch.load(file, map_location=map_location, weights_only=True)
    except _UNREADABLE as error:
        raise CheckpointError(
            f"{name}: expected content that torch.load(weights_only=True) reads, got"
            f" {type(error).__name__}: {error}"
        ) from error
