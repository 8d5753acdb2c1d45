"""Every Triton kernel compiles for every architecture, within its budget. No GPU is needed."""

from __future__ import annotations

import functools
import importlib
import json
import os
import pathlib
import pkgutil
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

import triton_builds

from lipkernels.kernels import triton as kernels

TESTS = pathlib.Path(__file__).parent
FAMILIES = sorted(
    module.name
    for module in pkgutil.iter_modules(triton_builds.__path__)
    if module.name != "worker"
)
CASES = [
    (family, i, build, architecture)
    for family in FAMILIES
    for i, build in enumerate(importlib.import_module(f"triton_builds.{family}").BUILDS)
    for architecture in build.architectures
]


def compile_family(family):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    paths = [str(TESTS), str(TESTS.parent), *environment.get("PYTHONPATH", "").split(os.pathsep)]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    done = subprocess.run(
        [sys.executable, "-m", "triton_builds.worker", family],
        env=environment,
        capture_output=True,
        text=True,
        timeout=1200,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


@functools.cache
def pool():
    return ThreadPoolExecutor(2)  # each waits for a process


@functools.cache
def report_of(family) -> Future:
    """What the builds of a family come to; conftest.py asks for all as soon as it may."""
    return pool().submit(compile_family, family)


@pytest.mark.parametrize(
    ("family", "i", "build", "architecture"),
    [pytest.param(*case, id=f"{case[0]}-{case[2]}-sm_{case[3]}") for case in CASES],
)
def test_build(family, i, build, architecture):
    used = report_of(family).result()[i][str(architecture)]
    assert used["spills"] == 0 and used["local"] == 0 and used["stack"] == 0, used
    assert used["registers"] <= build.most_registers, used
    limit = triton_builds.SHARED_MEMORY[architecture]
    assert used["shared"] <= (limit if build.shared is None else build.shared), used
    if build.wide_loads:
        assert used["wide"] > 0 and len(used["narrow"]) <= build.narrow, used


def test_every_family_has_builds():
    files = pathlib.Path(kernels.__file__).parent.glob("*.py")
    assert {path.stem for path in files if ".store(" in path.read_text()} == set(FAMILIES)
