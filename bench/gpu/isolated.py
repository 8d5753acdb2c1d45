"""A step in a process of its own: what crashes or hangs there ends nothing else."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

# From asking to killing, in seconds.
_GRACE = 2.0


def _child(main: Callable[[Sequence[str]], int], argv: Sequence[str], log: Path) -> None:
    os.setsid()  # with everything that it starts
    sys.stdout = sys.stderr = file = log.open("a", buffering=1)
    for descriptor in (1, 2):  # of what is not Python, too
        os.dup2(file.fileno(), descriptor)
    status = 1
    try:
        status = main(argv)
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        file.flush()
        # Not sys.exit: a lost device hangs or raises in what runs at exit.
        os._exit(status)


def _end(group: int) -> None:
    """Whoever is left of the process and all that it started, which are a group of their own."""
    for wait, number in ((_GRACE, signal.SIGTERM), (0.0, signal.SIGKILL)):
        try:
            os.killpg(group, number)
        except ProcessLookupError:
            return
        time.sleep(wait)


def run(
    main: Callable[[Sequence[str]], int], argv: Sequence[str], log: Path, seconds: float
) -> int | None:
    """``main(argv)``'s status, its output appended to ``log``; None: out of time.

    A fork of this process, which has torch imported and must not have touched a CUDA device.
    """
    process = multiprocessing.get_context("fork").Process(target=_child, args=(main, argv, log))
    process.start()
    process.join(max(0.0, seconds))
    status = process.exitcode
    assert process.pid is not None
    _end(process.pid)
    process.join()
    return status
