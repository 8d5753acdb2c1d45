"""Replace a file in one step: whoever looks, whenever, sees the old file or the new one, whole.

Note [Replacing a file]
The new content goes to a temporary file in the same directory (another one could be another file
system, where a rename is a copy), and to the disk (fsync) before the rename: otherwise a power
failure could leave the new name on missing content. The rename is atomic by POSIX; the directory's
fsync makes it durable.

A saver that is killed leaves its temporary file behind. Savers hold a lock on theirs, which dies
with the process: the next saver of the same file removes the temporary files that nobody holds.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import os
import secrets
import stat
from collections.abc import Iterator
from typing import BinaryIO

try:
    import fcntl
except ImportError:  # Windows: no locks, and temporary files of killed savers stay
    fcntl = None


def _locked(descriptor: int, *, wait: bool) -> bool:
    """Whether the lock on an open file was taken; not where there are no locks."""
    if fcntl is None:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:  # somebody holds it, or the file system has no locks
        return False
    return True


def _stem(target: str) -> str:
    """What the names of the temporary files of ``target`` begin with: of fixed length."""
    name = hashlib.sha256(os.fsencode(os.path.basename(target))).hexdigest()[:16]
    return os.path.join(os.path.dirname(target), f".lipkernels-{name}-")


def _remove_abandoned(target: str) -> None:
    for path in glob.glob(glob.escape(_stem(target)) + "*.tmp"):
        with contextlib.suppress(OSError):  # another saver was faster
            descriptor = os.open(path, os.O_RDWR)
            try:
                if _locked(descriptor, wait=False):
                    os.unlink(path)
            finally:
                os.close(descriptor)


def _open_temporary(target: str) -> tuple[BinaryIO, str]:
    while True:
        path = f"{_stem(target)}{secrets.token_hex(8)}.tmp"
        # 0o666 less the umask, as open() would; O_BINARY is Windows' alone.
        flags = os.O_CREAT | os.O_EXCL | os.O_RDWR | getattr(os, "O_BINARY", 0)
        descriptor = os.open(path, flags, 0o666)
        _locked(descriptor, wait=True)
        # Another saver may have removed it between its creation and the lock.
        if os.fstat(descriptor).st_nlink or fcntl is None:
            return os.fdopen(descriptor, "wb"), path
        os.close(descriptor)


def _checked_target(path: str | os.PathLike[str]) -> tuple[str, int | None]:
    """(what ``path`` leads to through symbolic links, the mode of the file there or None)."""
    name = os.fsdecode(path)
    if os.path.basename(name) == "":
        raise ValueError(f"path: expected the name of a file, got {name!r}")
    target = os.path.realpath(name)
    try:
        mode = os.stat(target).st_mode
    except FileNotFoundError:
        return target, None
    if not stat.S_ISREG(mode):
        raise ValueError(f"path: expected a regular file or none yet, got {target!r}")
    if not os.access(target, os.W_OK):
        raise PermissionError(f"path: expected a file that may be written, got {target!r}")
    return target, stat.S_IMODE(mode)


def _sync_directory(directory: str) -> None:
    if os.name == "nt":  # no such thing
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def replaced_atomically(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A binary file to write; ``path`` is replaced by it, at once, where the block ends well.

    Where the block raises, ``path`` stays as it is and nothing is left behind; where the process is
    killed, too, but for a hidden ``.lipkernels-*.tmp`` file that the next call for the same path
    removes. A symbolic link stays one: the file that it leads to is replaced. An existing file's
    permissions are kept, a new one's follow the umask. Several processes and threads may replace
    one path at the same time: the last one to finish stays. See Note [Replacing a file].

    Raises ValueError for a directory or a device, OSError as ``open`` and ``write`` do.

    >>> import os, tempfile
    >>> path = os.path.join(tempfile.mkdtemp(), "numbers")
    >>> with replaced_atomically(path) as file:
    ...     _ = file.write(b"1 2 3")
    >>> os.listdir(os.path.dirname(path))
    ['numbers']
    """
    target, mode = _checked_target(path)
    _remove_abandoned(target)
    file, temporary = _open_temporary(target)
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            if mode is not None:
                os.chmod(temporary, mode)
            if fcntl is not None:  # while the lock is held
                os.replace(temporary, target)
        if fcntl is None:  # an open file cannot be renamed there
            os.replace(temporary, target)
    except BaseException:  # KeyboardInterrupt too: whatever it was goes on after the clean-up
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    _sync_directory(os.path.dirname(target))
