"""Builds the library of csrc/cuda with nvcc: ``python csrc/cuda/build.py OUT.so [80 90a ...]``.

setup.py does so at installation, `make gpu` for the device that it finds. Every source is compiled
by itself, as many at once as there are cores, and kept under ``build/`` with what the compiler
said; it is compiled again when it or a header of it, a flag or the compiler changed.

Note [PTX]
Half of the time goes into PTX, once for every architecture that it is made for; machine code is as
good from PTX for an earlier one, which lacks nothing that is used here. So all machine code comes
from PTX for 80 and 90, with which clusters of blocks came, and where there are no clusters from PTX
for 80 alone.

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
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parents[1]
STEPS = HERE / "steps.py"
CACHE = ROOT / "build" / "cuda"
ARCHITECTURES = "80 90a 100f 120+PTX"
FLAGS = ["-std=c++17", "-O3", "-Xcompiler", "-fPIC", "-Xptxas", "-v"]
LINK = ["-shared", "-cudart", "static", "-Xlinker", f"--version-script={HERE / 'exports.map'}"]
# A launch of theirs in a cluster is an error.
WITHOUT_CLUSTERS = ("bjorck.cu", "sampling.cu", "sorting.cu")
_SAID = 4000  # characters of a compiler's complaint


class BuildError(Exception):
    """What the compiler said, or why there is none."""


def text_of(file: pathlib.Path) -> str:
    """A source with every header of ours that it includes, in either build."""
    found = {}

    def add(file: pathlib.Path) -> None:
        if file not in found:
            found[file] = file.read_text()
            for name in re.findall(r'^#include "(.+)"', found[file], re.MULTILINE):
                add((file.parent / name).resolve())

    add(file.resolve())
    return "\0".join(found.values())


def sources() -> list[pathlib.Path]:
    """The files to compile, the largest first with all they include: they take longest."""
    return sorted(HERE.glob("*.cu"), key=lambda file: (-len(text_of(file)), file.name))


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


def _ptx_for(source: str, number: int) -> int:
    """The architecture whose PTX a source's machine code for ``number`` comes from."""
    # No machine code for 120 runs kernels for clusters, which need more memory than it has: from
    # PTX for 80 they are empty.
    early = source in WITHOUT_CLUSTERS or (source.endswith("_cluster.cu") and number >= 120)
    return 90 if number >= 90 and not early else min(number, 80)


def generate(architectures: Sequence[str], source: str) -> list[str]:
    """nvcc's options for a source's machine code of these: "90a" or "sm_90a".

    "+PTX" adds what devices without machine code compile, from compute capability 9.0 on.

    >>> generate(["80", "sm_120+PTX"], "power.cu")[1::2]
    ['arch=compute_80,code=sm_80', 'arch=compute_90,code=sm_120', 'arch=compute_90,code=compute_90']
    """
    options = []
    for name in architectures:
        match = re.fullmatch(r"(?:sm_)?(\d{2,3})([af]?)(\+PTX)?", name)
        if match is None:
            raise BuildError(
                f"LIPKERNELS_CUDA_ARCHS: expected names like {ARCHITECTURES!r}, got {name!r}"
            )
        number, letter, ptx = match.groups()
        codes = [f"arch=compute_{_ptx_for(source, int(number))},code=sm_{number}{letter}"]
        if ptx:
            codes.append(f"arch=compute_{_ptx_for(source, 90)},code=compute_{_ptx_for(source, 90)}")
        for code in codes:
            options += ["-gencode", code]
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
    files: Sequence[pathlib.Path],
    command: Callable[[pathlib.Path], Sequence[str]],
    about: str,
    cache: pathlib.Path,
) -> list[pathlib.Path]:
    """``command(FILE) -c FILE -o OBJECT`` for each, in parallel; ``about``: what else counts."""

    def compiled(file: pathlib.Path) -> pathlib.Path:
        words = command(file)
        key = "\0".join([*words[1:], about, text_of(file)])  # whichever Python runs steps.py
        return _kept(key, ".o", [*words, "-c", str(file)], cache)

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        return list(pool.map(compiled, files))


def compiled(architectures: Sequence[str], cache: pathlib.Path = CACHE) -> list[pathlib.Path]:
    """nvcc's objects of all :func:`sources`; beside each, OBJECT.log has ptxas' report."""
    nvcc_by_steps = [sys.executable, str(STEPS), nvcc()]
    about = run([nvcc(), "--version"]) + STEPS.read_text()

    def command(source: pathlib.Path) -> list[str]:
        return [*nvcc_by_steps, *FLAGS, *generate(architectures, source.name)]

    return objects(sources(), command, about, cache)


def linked(
    found: Sequence[pathlib.Path], command: Sequence[str], cache: pathlib.Path
) -> pathlib.Path:
    """A shared library of these objects, out of the cache."""
    inputs = list(map(str, found))
    return _kept("\0".join([*command, *inputs]), ".so", [*command, *inputs], cache)


def library(architectures: Sequence[str], cache: pathlib.Path = CACHE) -> pathlib.Path:
    """The library in the cache."""
    return linked(compiled(architectures, cache), [nvcc(), *LINK], cache)


def build(out: pathlib.Path, architectures: Sequence[str], cache: pathlib.Path = CACHE) -> None:
    """Writes the library to ``out``; BuildError says why it could not."""
    kept = library(architectures, cache)
    out.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(kept, out)


if __name__ == "__main__":
    if len(sys.argv) < 2:
        raise SystemExit(__doc__)
    try:
        build(pathlib.Path(sys.argv[1]), sys.argv[2:] or wished())
    except BuildError as error:
        raise SystemExit(f"csrc/cuda/build.py: {error}") from error
