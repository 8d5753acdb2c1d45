"""The CUDA library that `make gpu` measures: nvcc builds it for the devices of this machine.

Where there is no nvcc, the library that is installed is taken, if one is. A process loads it when
it imports lipkernels: a new one is started in which it is there.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[2]
VARIABLE = "LIPKERNELS_CUDA_LIBRARY"
_SECONDS = 120.0  # for finding the devices and compiling
_CAPABILITIES = (
    "import torch; print(*{'%d.%d' % torch.cuda.get_device_capability(i)"
    " for i in range(torch.cuda.device_count())})"
)
# By the first number of a compute capability.
_ARCHITECTURES = {"8": "80", "9": "90a", "10": "100f", "12": "120+PTX"}


def _builder() -> ModuleType:
    """csrc/cuda/build.py, which is no part of a package."""
    spec = importlib.util.spec_from_file_location("cuda_build", ROOT / "csrc/cuda/build.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def architectures(capabilities: Iterable[str]) -> list[str]:
    """What the library is to be built for on devices of these compute capabilities.

    >>> architectures(["9.0", "8.6"])
    ['80', '90a']
    """
    first = {capability.partition(".")[0] for capability in capabilities}
    found = {_ARCHITECTURES.get(number, "120+PTX") for number in first}
    return [name for name in _ARCHITECTURES.values() if name in found]


def provide(out: Path) -> tuple[Path | None, str]:
    """The library built into ``out``; or None, and why."""
    build = _builder()
    try:
        build.nvcc()
    except build.BuildError as error:
        return None, str(error)
    command = [sys.executable, "-c", _CAPABILITIES]
    said = subprocess.run(command, capture_output=True, text=True, check=False).stdout.split()
    start, file = time.monotonic(), out / "_cuda.so"
    wanted = build.wished() if os.environ.get("LIPKERNELS_CUDA_ARCHS") else architectures(said)
    script = [sys.executable, str(build.HERE / "build.py"), str(file), *wanted]
    try:
        done = subprocess.run(script, capture_output=True, text=True, check=False, timeout=_SECONDS)
    except subprocess.TimeoutExpired:
        return None, f"nvcc took more than {_SECONDS:.0f} s"
    if done.returncode != 0:
        return None, done.stderr.strip()[-500:]
    return file, f"built by nvcc for {' '.join(wanted)} in {time.monotonic() - start:.1f} s"


def with_library(main: Callable[[Sequence[str]], int], argv: Sequence[str], out: Path) -> int:
    """``main``, in a process in which the library is loaded, if one can be built here."""
    if "--dry-run" in argv or os.environ.get(VARIABLE):
        return main(argv)
    start = time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    file, note = provide(out)
    spent = [f"--spent={time.monotonic() - start:.1f}", f"--note=CUDA library: {note}"]
    if file is not None:
        os.environ[VARIABLE] = str(file)
        os.execv(sys.executable, [sys.executable, "-m", "bench.gpu", *argv, *spent])
    return main([*argv, *spent])
