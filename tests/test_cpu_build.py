"""The C++ library for the CPU: built, or not, and loaded, or not."""

import ctypes
import os
import pathlib
import platform
import subprocess
import sys

import pytest
import subprocesses

from lipkernels.kernels.cpu import library as cpu

pytestmark = pytest.mark.skipif(not cpu.is_built(), reason="no C++ library here")

WITHOUT = """
import pathlib, sys
real = pathlib.Path.glob
def glob(self, pattern):
    return iter({files}) if pattern.startswith("_cpu") else real(self, pattern)
pathlib.Path.glob = glob
import torch, lipkernels
import lipkernels.functional as F
w = torch.randn(4, 6)
assert torch.equal(F.polar_factor(w), F.polar_factor(w, backend="reference"))
assert torch.equal(F.group_sort(w, 2), F.group_sort(w, 2, backend="reference"))
assert F.fingerprint(w) != F.fingerprint(w + 1)
from lipkernels.retract import Retractor
layer = lipkernels.nn.SpectralLinear(3, 4)
optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
Retractor(layer).attach(optimizer)
layer(torch.ones(1, 3)).sum().backward()
optimizer.step()
assert layer.is_held()
assert float(torch.linalg.matrix_norm(layer.raw_weight.double(), 2)) <= 1
try:
    F.polar_factor(w, backend="cpu")
except lipkernels.BackendUnavailableError as error:
    print(error)
"""


def without(files):
    done = subprocesses.run(WITHOUT.replace("{files}", files))
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_no_library():
    assert "backend 'cpu' cannot run: its library was not built" in without("[]")


def test_a_library_that_does_not_load(tmp_path):
    (tmp_path / "_cpu.so").write_bytes(b"not a library")
    assert "its library _cpu.so does not load" in without(
        f"[pathlib.Path({str(tmp_path)!r}) / '_cpu.so']"
    )


def test_a_library_of_another_version(tmp_path):
    source = tmp_path / "old.c"
    source.write_text("int lk_abi_version(void) { return 999; }")
    try:
        subprocess.run(
            ["cc", "-shared", "-fPIC", "-o", str(tmp_path / "_cpu.so"), str(source)], check=True
        )
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no C compiler here")
    message = without(f"[pathlib.Path({str(tmp_path)!r}) / '_cpu.so']")
    assert "has version 999 of the interface, expected 5" in message


def _build(tmp_path, **environment):
    root = subprocesses.ROOT
    env = {**os.environ, "LIPKERNELS_CUDA": "skip", **environment}
    return subprocess.run(
        [
            sys.executable,
            "setup.py",
            "build_ext",
            f"--build-lib={tmp_path / 'lib'}",
            f"--build-temp={tmp_path / 'temp'}",
        ],
        cwd=root,
        env=env,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.skipif(not (subprocesses.ROOT / "setup.py").exists(), reason="not a checkout")
@pytest.mark.parametrize(
    ("environment", "succeeds"),
    [
        ({"LIPKERNELS_CPU": "skip"}, True),
        ({"CC": "/nonexistent", "CXX": "/nonexistent"}, True),
        ({"CC": "/nonexistent", "CXX": "/nonexistent", "LIPKERNELS_CPU": "require"}, False),
    ],
    ids=["skip", "no compiler", "no compiler, required"],
)
def test_building_without_a_compiler(tmp_path, environment, succeeds):
    pytest.importorskip("setuptools")
    done = _build(tmp_path, **environment)
    assert (done.returncode == 0) == succeeds, done.stderr
    assert not list(pathlib.Path(tmp_path).rglob("_cpu*.so"))


@pytest.mark.skipif(not (subprocesses.ROOT / "setup.py").exists(), reason="not a checkout")
@pytest.mark.skipif(platform.machine() != "x86_64" or sys.platform != "linux", reason="no AMX")
def test_building_with_a_compiler_that_does_not_know_amx(tmp_path):
    pytest.importorskip("setuptools")
    compiler = tmp_path / "c++"
    compiler.write_text(
        """#!/bin/sh
for argument; do
  shift
  case $argument in
    -mamx-tile) echo "unrecognized option $argument" >&2; exit 1;;
    -O3) ;;
    *) set -- "$@" "$argument";;
  esac
done
exec c++ -O0 "$@"
"""
    )
    compiler.chmod(0o755)
    done = _build(tmp_path, CC=str(compiler), CXX=str(compiler), LIPKERNELS_CPU="require")
    assert done.returncode == 0, done.stderr
    assert "unrecognized option -mamx-tile" in done.stderr
    library = ctypes.CDLL(str(tmp_path / "lib" / "lipkernels" / "_cpu.so"))
    assert library.lk_instruction_set() <= cpu.INSTRUCTION_SETS.index("avx512")
