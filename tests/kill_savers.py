"""Savers that are killed: run in a process of its own, which forks one saver for each kill.

Arguments: the directory, the number of kills at random moments, the number at each phase. Prints
one line of JSON: how many kills landed inside a save, and what every file was found to be.
"""

from __future__ import annotations

import collections
import json
import os
import random
import select
import signal
import sys
import time

import torch

from lipkernels import checkpoint
from lipkernels.checkpoint import atomic

# 3 MB in tensors of several dtypes; every value tells its version.
SHAPES = {"a": (512, 512), "b": (700, 300), "c": (1,), "d": (0, 3)}


def content(version: int) -> dict[str, object]:
    tensors = {name: torch.full(shape, float(version)) for name, shape in SHAPES.items()}
    half = torch.full((1000, 500), version % 256, dtype=torch.bfloat16)
    return {"version": version, "model": {**tensors, "half": half}, "note": ["v", version]}


def version_of(path: str) -> int:
    """The version of the file, every value of which has to be of that version."""
    loaded = checkpoint.load(path)
    version = loaded["version"]
    expected = content(version)
    assert loaded["note"] == ["v", version]
    assert loaded["model"].keys() == expected["model"].keys()
    for name, tensor in expected["model"].items():
        found = loaded["model"][name]
        assert found.dtype == tensor.dtype and torch.equal(found, tensor), name
    return version


# Where a saver stops and waits to be killed: in the middle of the writes, and around each step.
def stop_in(phase: str, say) -> None:
    def stop() -> None:
        say(b"!")
        time.sleep(60)

    real_sync, real_replace = os.fsync, os.replace

    def sync(descriptor):
        if phase == "before sync":
            stop()
        real_sync(descriptor)

    def replace(source, target):
        if phase == "before replace":
            stop()
        real_replace(source, target)
        if phase == "after replace":
            stop()

    if phase == "in a write":
        from lipkernels.checkpoint import sealed

        class Halfway(sealed._Digesting):
            def _pass_on(self, data):
                if len(data) > 1_000_000:
                    super()._pass_on(data[: len(data) // 2])
                    self._file.flush()
                    stop()
                super()._pass_on(data)

        sealed._Digesting = Halfway
    elif phase == "before the directory's sync":
        atomic._sync_directory = lambda directory: stop()
    else:
        atomic.os.fsync, atomic.os.replace = sync, replace


PHASES = (
    "in a write",
    "before sync",
    "before replace",
    "after replace",
    "before the directory's sync",
)
RENAMED = ("after replace", "before the directory's sync")


def saver(path: str, first: int, phase: str | None, pipe: int) -> None:
    def say(what: bytes) -> None:
        os.write(pipe, what)

    version = first
    while True:
        following = content(version)
        if phase is not None and version > first:  # the first save tells that it runs
            stop_in(phase, say)
        say(b"(")
        checkpoint.save(following, path)
        say(b")")
        version += 1


def kill_one(path: str, version: int, phase: str | None, rng: random.Random) -> tuple[int, str]:
    """(the version then found, "between saves" or which file a kill inside a save left)."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(read)
        try:
            saver(path, version + 1, phase, write)
        finally:
            os._exit(3)
    os.close(write)
    said = b""
    wanted = b"!" if phase is not None else b"("
    while wanted not in said:
        assert select.select([read], [], [], 30)[0], f"a saver is silent: {said!r}"
        said += os.read(read, 65536) or sys.exit(f"a saver ended: {said!r}")
    if phase is None:
        time.sleep(rng.uniform(0.0, 0.03))
    os.kill(pid, signal.SIGKILL)
    status = os.waitpid(pid, 0)[1]
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    while more := os.read(read, 65536):
        said += more
    os.close(read)
    done = version + said.count(b")")
    inside = said.rstrip(b"!").endswith(b"(")
    found = version_of(path)
    allowed = {done, done + 1} if inside else {done}
    if phase is not None:
        allowed = {done + 1} if phase in RENAMED else {done}
    assert found in allowed, (found, allowed, phase)
    if not inside:
        return found, "between saves"
    return found, "inside a save: the new file" if found > done else "inside a save: the old file"


def main() -> None:
    directory, at_random, at_phases = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    rng = random.Random(0)
    path = os.path.join(directory, "net.pt")
    checkpoint.save(content(0), path)
    version, counts = 0, collections.Counter()
    kills = [None] * at_random + [phase for phase in PHASES for _ in range(at_phases)]
    for phase in kills:
        version, landed = kill_one(path, version, phase, rng)
        counts[landed] += 1
        counts[phase or "at random"] += 1
        counts["files left behind, at most"] = max(
            counts["files left behind, at most"], len(os.listdir(directory)) - 1
        )
    checkpoint.save(content(version), path)
    counts["left after the next save"] = len(os.listdir(directory)) - 1
    counts["versions saved"] = version
    print(json.dumps(counts))


if __name__ == "__main__":
    main()
