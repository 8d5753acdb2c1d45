"""The library of csrc/cuda built with g++ against csrc/simt, which runs its kernels on the CPU.

tests/conftest.py builds it before lipkernels is imported, which then loads it in place of nvcc's.
"""

from __future__ import annotations

import functools
import importlib.util
import pathlib
import platform
import shutil

import torch

ROOT = pathlib.Path(__file__).resolve().parents[1]
CACHE = ROOT / "build" / "simt"
# No contraction: an emulated kernel rounds where its source says so.
FLAGS = ["-std=gnu++17", "-O2", "-march=native", "-ffp-contract=off", "-fPIC", "-fno-gnu-unique"]
_ABOUT = ["-march=native", "-E", "-v", "-x", "c++", "/dev/null"]


def load_build():
    """csrc/cuda/build.py, which is no part of a package."""
    spec = importlib.util.spec_from_file_location("cuda_build", ROOT / "csrc/cuda/build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def why_not() -> str | None:
    """Why it cannot be built here; or None."""
    if torch.cuda.is_available():
        return "kernels run on the CUDA device, and not in the SIMT shim"
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return "the SIMT shim needs Linux on x86-64"
    if shutil.which("g++") is None:
        return "no g++ on PATH, which the SIMT shim needs"
    return None


@functools.cache
def build(*more: str) -> pathlib.Path:
    """The library, with ``more`` flags (a planted fault, say); raises where it does not compile."""
    builder = load_build()
    command = ["g++", *FLAGS, "-DLK_SIMT", *more, "-x", "c++"]
    about = builder.run(["g++", *_ABOUT])
    found = builder.objects(builder.sources(), lambda _: command, about, CACHE)
    return builder.linked(found, ["g++", "-shared"], CACHE)
