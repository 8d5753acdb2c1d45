"""Checkpoints under fire: killed savers, savers side by side, full disks, changed bytes."""

import json
import os
import pathlib
import stat
import subprocess
import sys
import threading
import tracemalloc
import warnings

import pytest
import subprocesses
import torch
from torch import nn

from lipkernels import checkpoint
from lipkernels.checkpoint import atomic

HERE = pathlib.Path(__file__).parent
AT_RANDOM, AT_PHASES = 100, 4


@pytest.fixture
def path(tmp_path):
    return tmp_path / "net.pt"


def hidden(path):
    return [name for name in os.listdir(path.parent) if name.startswith(".")]


# ------------------------------------------------------------------------------ killed savers
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and kill -9")
def test_kill_9_leaves_the_old_file_or_the_new_one(tmp_path):
    done = subprocess.run(
        [sys.executable, HERE / "kill_savers.py", tmp_path, str(AT_RANDOM), str(AT_PHASES)],
        env=os.environ | {"PYTHONPATH": str(subprocesses.ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    counts = json.loads(done.stdout)
    print(counts)
    assert counts["at random"] == AT_RANDOM
    old, new = (counts[f"inside a save: the {which} file"] for which in ("old", "new"))
    # The test has power only if most kills hit a save, before the rename and after it.
    assert old + new >= 0.5 * AT_RANDOM + 5 * AT_PHASES
    assert old >= 3 * AT_PHASES and new >= 2 * AT_PHASES
    assert counts["left after the next save"] == 0


# ------------------------------------------------------------------------------- side by side
SAVERS = """
import sys, torch
from lipkernels import checkpoint
path, name, n = sys.argv[1:]
for i in range(int(n)):
    checkpoint.save({"who": name, "i": i, "x": torch.full((200, 200), float(i))}, path)
"""


def complete(content):
    return torch.equal(content["x"], torch.full((200, 200), float(content["i"])))


def test_savers_side_by_side(path):
    checkpoint.save({"i": 0, "x": torch.zeros(200, 200)}, path)
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", SAVERS, path, name, "40"],
            env=os.environ | {"PYTHONPATH": str(subprocesses.ROOT), "OMP_NUM_THREADS": "1"},
        )
        for name in "ab"
    ]
    seen, loads = set(), 0
    while any(p.poll() is None for p in processes):
        content = checkpoint.load(path)
        assert complete(content)
        seen.add((content.get("who"), content["i"]))
        loads += 1
    assert [p.wait() for p in processes] == [0, 0]
    assert loads >= 20 and len(seen) >= 5  # it did look while they wrote
    content = checkpoint.load(path)
    assert content["i"] == 39 and complete(content)
    assert hidden(path) == []


def test_threads_side_by_side(path):
    errors = []

    def work(k):
        try:
            for i in range(15):
                checkpoint.save({"i": i, "x": torch.full((200, 200), float(i))}, path)
                assert complete(checkpoint.load(path))
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert errors == []
    assert checkpoint.load(path)["i"] == 14 and hidden(path) == []


def test_a_live_saver_keeps_its_temporary_file(path):
    with checkpoint.replaced_atomically(path) as file:
        file.write(b"slow")
        checkpoint.save("fast", path)
        assert len(hidden(path)) == 1
        assert checkpoint.load(path) == "fast"
    assert path.read_bytes() == b"slow" and hidden(path) == []


def test_abandoned_files_are_removed_and_no_others(path):
    other = path.parent / "other.pt"
    target = os.path.realpath(path)
    abandoned = [f"{atomic._stem(target)}{i}.tmp" for i in range(3)]
    foreign = [
        f"{atomic._stem(os.path.realpath(other))}1.tmp",
        str(path.parent / ".net.pt.tmp"),
        str(path.parent / "net.pt.tmp"),
    ]
    for name in abandoned + foreign:
        pathlib.Path(name).write_bytes(b"half")
    checkpoint.save(1, path)
    assert not any(os.path.exists(name) for name in abandoned)
    assert all(os.path.exists(name) for name in foreign)


# --------------------------------------------------------------------------- files and errors
class DiskFullError(OSError):
    pass


def test_an_error_in_any_write_leaves_the_old_file(path, monkeypatch):
    checkpoint.save("old", path)
    content = {"x": torch.ones(1000), "y": list(range(100))}
    real, calls = atomic._open_temporary, []

    class Failing:
        def __init__(self, file, at):
            self.file, self.at, self.n = file, at, 0

        def __getattr__(self, name):
            return getattr(self.file, name)

        def __enter__(self):
            return self

        def __exit__(self, *exc):
            self.file.close()

        def write(self, data):
            self.n += 1
            calls.append(len(data))
            if self.n == self.at:
                raise DiskFullError(28, "No space left on device")
            return self.file.write(data)

    at = 0
    while True:
        at += 1

        def open_failing(target, at=at):
            file, name = real(target)
            return Failing(file, at), name

        monkeypatch.setattr(atomic, "_open_temporary", open_failing)
        calls.clear()
        try:
            checkpoint.save(content, path)
        except DiskFullError:
            assert hidden(path) == []
            assert checkpoint.load(path) == "old"
            continue
        break
    assert at > 20  # every one of the writes has failed once
    assert checkpoint.load(path)["y"] == content["y"]


@pytest.mark.parametrize("step", ["fsync", "replace", "chmod"])
@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), KeyboardInterrupt()])
def test_an_error_in_any_step_leaves_the_old_file(step, error, path, monkeypatch):
    checkpoint.save("old", path)

    def fail(*arguments):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(atomic.os, step, fail)
        with pytest.raises(type(error)):
            checkpoint.save("new", path)
    assert checkpoint.load(path) == "old" and hidden(path) == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs resource limits")
def test_a_real_limit_of_the_file_size(path):
    code = """
import resource, signal, sys, torch
from lipkernels import checkpoint
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
checkpoint.save("old", sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    checkpoint.save(torch.ones(1_000_000), sys.argv[1])
except OSError as error:
    print(error.errno, checkpoint.load(sys.argv[1]))
"""
    done = subprocesses.run(code, str(path))
    assert done.stdout == "27 old\n", done.stderr  # EFBIG
    assert hidden(path) == []


def test_permissions(path):
    umask = os.umask(0o027)
    try:
        checkpoint.save(1, path)
        assert stat.S_IMODE(path.stat().st_mode) == 0o640
        path.chmod(0o604)
        checkpoint.save(2, path)
        assert stat.S_IMODE(path.stat().st_mode) == 0o604
    finally:
        os.umask(umask)
    assert checkpoint.load(path) == 2


def test_read_only_file_and_missing_directory(path, monkeypatch):
    checkpoint.save(1, path)
    monkeypatch.setattr(atomic.os, "access", lambda target, how: False)  # the superuser may always
    with pytest.raises(PermissionError, match="may be written"):
        checkpoint.save(2, path)
    monkeypatch.undo()
    assert checkpoint.load(path) == 1
    with pytest.raises(FileNotFoundError):
        checkpoint.save(1, path.parent / "none" / "net.pt")


def test_paths(path, monkeypatch):
    directory = path.parent
    monkeypatch.chdir(directory)
    checkpoint.save(1, "net.pt")
    checkpoint.save(2, os.fsencode("./net.pt"))
    assert checkpoint.load("net.pt") == checkpoint.load(b"net.pt") == 2
    (directory / "link.pt").symlink_to("net.pt")
    checkpoint.save(3, directory / "link.pt")
    assert (directory / "link.pt").is_symlink() and checkpoint.load(path) == 3
    (directory / "dangling.pt").symlink_to("made.pt")
    checkpoint.save(4, "dangling.pt")
    assert checkpoint.load("made.pt") == 4
    longest = "n" * 255
    checkpoint.save(5, longest)
    checkpoint.save(6, "été [*]?.pt")
    checkpoint.save(7, "été [*]?.pt")
    assert checkpoint.load(longest) == 5 and checkpoint.load("été [*]?.pt") == 7
    assert hidden(path) == []
    for wrong in (directory, f"{directory}/", "", os.devnull):
        with pytest.raises(ValueError, match="path: expected"):
            checkpoint.save(8, wrong)
    assert stat.S_ISCHR(os.stat(os.devnull).st_mode)


# ----------------------------------------------------------------------------- changed bytes
def mutations(data):
    """Every bit of one kind or another: each byte flipped, dropped, doubled, each length cut."""
    n = len(data)
    for i in range(n):
        yield data[:i] + bytes((data[i] ^ 1 << i % 8,)) + data[i + 1 :]
        yield data[:i] + bytes((data[i] ^ 0xFF,)) + data[i + 1 :]
        yield data[:i] + data[i + 1 :]
        yield data[:i] + bytes((i % 256,)) + data[i:]
        yield data[:i]
    for i in range(0, n - 512, 61):
        yield data[:i] + bytes(512) + data[i + 512 :]
        yield data[:i] + data[i + 512 :]
        yield data[:i] + data[i + 256 : i + 512] + data[i : i + 256] + data[i + 512 :]
        yield data[i:]
    yield from (data + b"\0", data + data, b"\0" + data, data[::-1])


def test_every_changed_byte_is_a_clean_error(path):
    model = nn.Linear(5, 3)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(2, 5)).sum().backward()
    optimizer.step()
    checkpoint.save({"model": model, "optimizer": optimizer, "epoch": 3}, path)
    data = path.read_bytes()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    tried = 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tracemalloc.start()
        with open(path, "r+b", buffering=0) as file:
            for changed in mutations(data):
                if changed == data:
                    continue
                file.seek(0)
                file.write(changed)
                file.truncate()
                with pytest.raises(checkpoint.CheckpointError):
                    checkpoint.load(path, into={"model": model, "optimizer": optimizer})
                tried += 1
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            file.seek(0)
            file.write(data)
            file.truncate()
    assert tried > 4.9 * len(data) > 15_000
    assert peak < 10 * len(data) + 2**21  # one chunk of the digest's reading, twice
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert checkpoint.load(path)["epoch"] == 3
    print(f"{tried} mutations of {len(data)} bytes")


# Changed bytes under a digest made to fit: damage can't do that, but a forger can.
FORGED = """
import collections, hashlib, random, sys, warnings
import torch
from lipkernels import checkpoint
path, seed, n = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
warnings.simplefilter("ignore")
model = torch.nn.Linear(5, 3)
checkpoint.save({"model": model, "note": ["v", 1, 2.0, None], "h": torch.ones(3).half()}, path)
body = open(path, "rb").read()[:-64]
rng, counts = random.Random(seed), collections.Counter()
for _ in range(n):
    changed = bytearray(body)
    for _ in range(rng.choice((1, 1, 3))):
        i = rng.randrange(len(changed) - 24)
        how = rng.randrange(3)
        if how == 0:
            changed[i] ^= 1 << rng.randrange(8)
        elif how == 1:
            changed.insert(i, rng.randrange(256))
        else:
            del changed[i]
    with open(path, "wb") as file:
        file.write(changed + hashlib.sha256(changed).hexdigest().encode())
    try:
        checkpoint.load(path, into={"model": model})
        counts["loaded"] += 1
    except checkpoint.CheckpointError:
        counts["refused"] += 1
print(counts["loaded"], counts["refused"])
"""


def test_forged_files_end_in_a_clean_error_too(path):
    n = int(os.environ.get("LIPKERNELS_FORGED", "600"))
    done = subprocesses.run(FORGED, str(path), "0", str(n))
    assert done.returncode == 0, done.stderr
    loaded, refused = map(int, done.stdout.split())
    assert loaded + refused == n and refused > n / 4
