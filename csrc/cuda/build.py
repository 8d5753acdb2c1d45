"""Builds the library of csrc/cuda with nvcc: ``python csrc/cuda/build.py OUT.so [80 90a ...]``.

setup.py does so at installation, `make gpu` for the device that it finds. Every source is compiled
by itself, several at once, and kept under ``build/`` with what the compiler said; it is compiled
again when a source or header, a flag or the compiler changed.

Environment: ``CUDA_HOME`` (a toolkit; default: the nvcc on PATH), ``LIPKERNELS_CUDA_ARCHS`` (the
architectures; default: "80 90a 100f 120+PTX").
"""

from __future__ import annotations

import hashlib
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CACHE = ROOT / "build" / "cuda"
ARCHITECTURES = "80 90a 100f 120+PTX"
FLAGS = ["-std=c++17", "-O3", "-Xcompiler", "-fPIC", "-Xptxas", "-v", "--threads", "2"]
LINK = ["-shared", "-cudart", "static", "-Xlinker", f"--version-script={HERE / 'exports.map'}"]
_SAID = 4000  # characters of a compiler's complaint


class BuildError(Exception):
    """What the compiler said, or why there is none."""


def sources() -> list[pathlib.Path]:
    """The files to compile, the largest first: they take longest."""
    return sorted(HERE.glob("*.cu"), key=lambda file: -file.stat().st_size)


def headers() -> list[pathlib.Path]:
    """Every header that a source may include, in either build."""
    return sorted([*HERE.glob("*.h"), *(HERE.parent / "simt").glob("*.h")])


def nvcc() -> str:
    """The compiler; BuildError where there is none."""
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    for home in homes:
        found = shutil.which("nvcc", path=os.path.join(home, "bin"))
        if found:
            return found
    found = shutil.which("nvcc")
    if not found:
        raise BuildError("no nvcc was found in CUDA_HOME or on PATH")
    return found


def generate(architectures: Sequence[str]) -> list[str]:
    """nvcc's options for machine code of these; "90a" or "sm_90a", "+PTX" adds what others compile.

    >>> generate(["80", "sm_120+PTX"])[-1]
    'arch=compute_120,code=[sm_120,compute_120]'
    """
    options = []
    for name in architectures:
        match = re.fullmatch(r"(?:sm_)?(\d{2,3}[af]?)(\+PTX)?", name)
        if match is None:
            raise BuildError(
                f"LIPKERNELS_CUDA_ARCHS: expected names like {ARCHITECTURES!r}, got {name!r}"
            )
        number, ptx = match.groups()
        code = f"[sm_{number},compute_{number}]" if ptx else f"sm_{number}"
        options += ["-gencode", f"arch=compute_{number},code={code}"]
    return options


def wished() -> list[str]:
    """The architectures of LIPKERNELS_CUDA_ARCHS, or the default."""
    return re.split(
        r"[\s,;]+", os.environ.get("LIPKERNELS_CUDA_ARCHS", "").strip() or ARCHITECTURES
    )


def run(command: Sequence[str]) -> str:
    """What a command says on standard output and error; BuildError where it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise BuildError(f"{command[0]}: {error}") from error
    said = done.stdout + done.stderr
    if done.returncode != 0:
        line = " ".join(map(str, command))
        raise BuildError(f"{line}\nended with status {done.returncode}:\n{said.strip()[-_SAID:]}")
    return said


def _kept(key: str, suffix: str, command: Sequence[str], cache: pathlib.Path) -> pathlib.Path:
    """The file that ``command -o FILE`` makes, out of the cache; beside it FILE.log."""
    file = cache / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}{suffix}"
    log = pathlib.Path(f"{file}.log")
    if not (file.is_file() and log.is_file()):
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:  # a file is there as a whole, or not
            made, said = pathlib.Path(folder) / file.name, pathlib.Path(folder) / log.name
            said.write_text(run([*command, "-o", str(made)]))
            said.replace(log)
            made.replace(file)
    return file


def objects(
    files: Sequence[pathlib.Path], command: Sequence[str], about: str, cache: pathlib.Path
) -> list[pathlib.Path]:
    """``command -c FILE -o OBJECT`` for each, in parallel; ``about``: what else counts."""
    shared = "\0".join([*command, about, *(h.read_text() for h in headers())])

    def compiled(file: pathlib.Path) -> pathlib.Path:
        key = f"{shared}\0{file.read_text()}"
        return _kept(key, ".o", [*command, "-c", str(file)], cache)

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        return list(pool.map(compiled, files))


def compiled(architectures: Sequence[str], cache: pathlib.Path = CACHE) -> list[pathlib.Path]:
    """nvcc's objects of all :func:`sources`; beside each, OBJECT.log has ptxas' report."""
    compiler = nvcc()
    command = [compiler, *FLAGS, *generate(architectures)]
    return objects(sources(), command, run([compiler, "--version"]), cache)


def linked(
    found: Sequence[pathlib.Path], command: Sequence[str], cache: pathlib.Path
) -> pathlib.Path:
    """A shared library of these objects, out of the cache."""
    inputs = list(map(str, found))
    return _kept("\0".join([*command, *inputs]), ".so", [*command, *inputs], cache)


def build(out: pathlib.Path, architectures: Sequence[str], cache: pathlib.Path = CACHE) -> None:
    """Writes the library to ``out``; BuildError says why it could not."""
    library = linked(compiled(architectures, cache), [nvcc(), *LINK], cache)
    out.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(library, out)


if __name__ == "__main__":
    if len(sys.argv) < 2:
        raise SystemExit(__doc__)
    try:
        build(pathlib.Path(sys.argv[1]), sys.argv[2:] or wished())
    except BuildError as error:
        raise SystemExit(f"csrc/cuda/build.py: {error}") from error
