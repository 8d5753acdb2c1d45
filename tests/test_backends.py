"""`python -m lipkernels.backends`: what can run, what auto takes, and why not the rest."""

import ctypes
import functools
import re

import pytest
import simt
import subprocesses
import torch

from lipkernels import backends
from lipkernels.backends import __main__ as report
from lipkernels.kernels.implemented import IMPLEMENTED

CODE = "import runpy; runpy.run_module('lipkernels.backends', run_name='__main__')"
NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")


def printed(**environment):
    done = subprocesses.run(CODE, **environment)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    lines = done.stdout.splitlines()
    said = dict(re.split(r"\s+", line, maxsplit=1) for line in lines[: lines.index("")])
    head, *rows = (re.split(r"\s{2,}", line) for line in lines[lines.index("") + 1 :])
    return said, head, {row[0]: dict(zip(head[1:], row[1:], strict=True)) for row in rows}


@NO_GPU
def test_where_there_is_neither_triton_nor_a_library(tmp_path):
    nowhere = str(tmp_path / "nowhere.so")
    code = f"sys.modules['triton'] = None\n{CODE}"
    done = subprocesses.run(code, LIPKERNELS_CUDA_LIBRARY=nowhere)
    assert done.returncode == 0, done.stderr
    assert "\ntriton     cannot run: Triton is not installed (pip install lipkernels[triton])" in (
        done.stdout
    )
    assert f"\ncuda       cannot run: LIPKERNELS_CUDA_LIBRARY names no file: {nowhere}" in (
        done.stdout
    )
    assert done.stdout.splitlines()[0] == "reference  runs on cpu tensors, cuda tensors"


@NO_GPU
def test_every_operation_with_its_backends(tmp_path):
    said, head, rows = printed(LIPKERNELS_CUDA_LIBRARY=str(tmp_path / "nowhere.so"))
    assert list(said) == list(backends.BACKENDS)
    assert head == ["operation", *backends.BACKENDS, "auto, cpu", "auto, cuda"]
    assert set(rows) == set(IMPLEMENTED)
    for op, row in rows.items():
        for name in backends.BACKENDS:
            assert row[name] == ("yes" if name in IMPLEMENTED[op] else "-")
        assert row["auto, cpu"] == backends.resolve(op, IMPLEMENTED[op], torch.device("cpu"))


@NO_GPU
@pytest.mark.skipif(simt.why_not() is not None, reason=str(simt.why_not()))
def test_an_emulation_is_called_one():
    said, _, rows = printed(LIPKERNELS_CUDA_LIBRARY=str(simt.build()))
    assert said["cuda"].startswith("runs on cpu tensors (emulated, where it is named)")
    assert rows["space_to_depth"]["cuda"] == "yes"
    assert rows["space_to_depth"]["auto, cpu"] == "reference"
    assert rows["space_to_depth"]["auto, cuda"] != "cuda"


def test_what_auto_takes_is_what_resolve_takes(monkeypatch):
    monkeypatch.setattr(backends, "_missing", {"cpu": "no compiler"})
    monkeypatch.setattr(backends, "_emulated", set())
    monkeypatch.setattr(backends, "_interpreted", False)
    monkeypatch.setattr(backends, "_device_checks", {})
    text = report.report()
    assert "cpu        cannot run: no compiler" in text
    assert re.search(r"^cuda       runs on cuda tensors", text, re.MULTILINE)
    (row,) = (line for line in text.splitlines() if line.startswith("polar_factor"))
    assert row.split()[-2:] == ["reference", "cuda"]
    monkeypatch.setattr(backends, "_device_checks", {"cuda": lambda index: "no code for it"})
    text = report.report()
    assert re.search(r"^cuda       cannot run: no code for it", text, re.MULTILINE)
    (row,) = (line for line in text.splitlines() if line.startswith("polar_factor"))
    assert row.split()[-2:] == ["reference", "triton"]


def test_the_check_of_a_device_is_a_constant_to_the_compiler(monkeypatch):
    monkeypatch.setattr(backends, "_device_checks", {})

    @functools.lru_cache
    def why_not(index):
        ctypes.CDLL(None)  # nothing that a graph can have
        return "an old one" if index == 1 else None

    backends.check_devices("reference", why_not)
    devices = [torch.device("cuda", index) for index in (0, 1)]

    def unusable(x):
        return x + sum(backends.why_not("reference", device) is not None for device in devices)

    compiled = torch.compile(unusable, fullgraph=True, backend="eager")
    assert compiled(torch.zeros(())) == 1
