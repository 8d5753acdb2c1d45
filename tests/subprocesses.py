"""Run a snippet of Python in a process of its own, on this checkout."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

import lipkernels

ROOT = pathlib.Path(lipkernels.__file__).parents[1]

# Refuses to import the named packages, from wherever.
BLOCKER = """
import sys

class Blocker:
    def __init__(self, *names):
        self.names = names
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.names:
            raise ModuleNotFoundError(f"blocked: {name}")

def block(*names):
    sys.meta_path.insert(0, Blocker(*names))
"""


def run(code: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Standard output and error as text; the exit status is the caller's to check."""
    own = ("LIPKERNELS_BACKEND", "LIPKERNELS_CUDA_LIBRARY")
    env = {k: v for k, v in os.environ.items() if k not in own}
    env |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(
        [sys.executable, "-c", BLOCKER + code, *arguments],
        env=env,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
