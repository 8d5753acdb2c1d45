"""What nvcc makes of csrc/cuda: built beside the other tests, and what its machine code may use."""

from __future__ import annotations

import fcntl
import functools
import importlib.util
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import simt

BUILD = simt.load_build()
ARCHITECTURES = ("sm_80", "sm_90a", "sm_100f", "sm_120")


@dataclass(frozen=True)
class Budget:
    """Of a kernel, by the name that its function has in the source, in every instance.

    ``registers`` of a thread; ``shared``: static shared memory in bytes, what a launcher asks for
    not counted. ``wide_loads``, ``wide_stores``: global memory is accessed 16 bytes at a time.
    ``matrix_units``: the architectures on which there are products on them.
    """

    source: str
    kernel: str
    registers: int
    shared: int = 0
    wide_loads: bool = False
    wide_stores: bool = False
    matrix_units: tuple[str, ...] = ()


# Those with clusters of blocks and enough shared memory; a kernel for clusters is empty elsewhere.
_LARGE = ("sm_90a", "sm_100f")
BUDGETS = (
    Budget("library.cu", "probe", 8),
    Budget("sampling.cu", "permuted_copy", 48, wide_loads=True, wide_stores=True),
    Budget("sorting.cu", "on_words", 40, wide_loads=True, wide_stores=True),
    Budget("sorting.cu", "on_elements", 32),
    Budget("polar.cu", "polar_small", 176, wide_loads=True, matrix_units=ARCHITECTURES),
    Budget("polar_cluster.cu", "polar_large", 255, matrix_units=_LARGE),
    Budget("polar_backward.cu", "polar_backward_small", 128, matrix_units=ARCHITECTURES),
    Budget("polar_backward_cluster.cu", "polar_backward_large", 255, matrix_units=_LARGE),
    Budget("bjorck.cu", "bjorck", 168, wide_loads=True, matrix_units=ARCHITECTURES),
    Budget("power.cu", "iterate", 128, wide_loads=True),
)


def why_no_nvcc() -> str | None:
    """Why nothing can be built here; or None."""
    try:
        BUILD.nvcc()
    except BUILD.BuildError as error:
        return str(error)
    return None


def disassembler() -> str | None:
    """cuobjdump, of a toolkit or of Triton."""
    folders = [os.path.dirname(BUILD.nvcc()), *os.environ.get("PATH", "").split(os.pathsep)]
    triton = importlib.util.find_spec("triton")
    if triton is not None and triton.origin is not None:
        folders.append(str(pathlib.Path(triton.origin).parent / "backends" / "nvidia" / "bin"))
    return shutil.which("cuobjdump", path=os.pathsep.join(folders))


def _build() -> pathlib.Path:
    """The library for all architectures; compiled in another process, after all that is urgent."""
    BUILD.CACHE.mkdir(parents=True, exist_ok=True)
    with open(BUILD.CACHE / "lock", "w") as lock, tempfile.TemporaryDirectory() as folder:
        fcntl.flock(lock, fcntl.LOCK_EX)  # other tests may be at it: what they compiled is kept
        script, out = str(BUILD.HERE / "build.py"), os.path.join(folder, "_cuda.so")
        done = subprocess.run(
            [sys.executable, script, out, *BUILD.ARCHITECTURES.split()],
            capture_output=True, text=True, check=False, preexec_fn=lambda: os.nice(10),
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-4000:]
        return BUILD.library(BUILD.ARCHITECTURES.split())


@functools.cache
def start() -> Future:
    """The library; conftest.py asks for it as soon as it may."""
    return ThreadPoolExecutor(1).submit(_build)


@functools.cache
def objects() -> dict[str, pathlib.Path]:
    """By source; beside each a .log with ptxas' report."""
    start().result()
    found = BUILD.compiled(BUILD.ARCHITECTURES.split())
    return {source.name: o for source, o in zip(BUILD.sources(), found, strict=True)}


_ENTRY = re.compile(
    r"Compiling entry function '(\S+)' for '(\w+)'.*?"
    r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads.*?"
    r"Used (\d+) registers(?:.*?(\d+) bytes smem)?[^\n]*",
    re.DOTALL,
)


@dataclass(frozen=True)
class Usage:
    """What ptxas says of a kernel's machine code."""

    name: str
    architecture: str
    stack: int
    spills: int
    registers: int
    shared: int


def usages(log: str) -> list[Usage]:
    """ptxas' report, read."""
    entries = log.split("Compiling entry function")[1:]
    found = []
    for text in entries:
        match = _ENTRY.search("Compiling entry function" + text)
        if match is None:
            raise ValueError(f"expected ptxas' report of a kernel, got {text[:400]!r}")
        name, architecture, stack, stores, loads, registers, shared = match.groups()
        found.append(
            Usage(name, architecture, int(stack), int(stores) + int(loads), int(registers),
                  int(shared or 0))
        )  # fmt: skip
    return found


def budget_of(source: str, mangled: str) -> Budget:
    """The budget of a kernel by its name in the machine code, where a name follows its length."""
    for budget in BUDGETS:
        if budget.source == source and f"{len(budget.kernel)}{budget.kernel}" in mangled:
            return budget
    raise LookupError(
        f"expected a budget in tests/cuda_builds.py, got none for {source}: {mangled}"
    )


@functools.cache
def machine_code(source: str) -> dict[tuple[str, str], str]:
    """SASS by (architecture, mangled name)."""
    command = [str(disassembler()), "-sass", str(objects()[source])]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found, architecture = {}, ""
    for part in re.split(r"^(?=\s*Function : |\s*arch = )", said, flags=re.MULTILINE):
        arch = re.match(r"\s*arch = (\w+)", part)
        name = re.match(r"\s*Function : (\S+)", part)
        architecture = arch[1] if arch else architecture
        if name:
            found[architecture, name[1]] = part
    return found
