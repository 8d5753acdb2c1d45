"""Builds the libraries from csrc. All metadata is in pyproject.toml.

They have C interfaces (no headers of torch or Python): csrc/cpu is plain C++, csrc/cuda is built
with nvcc. Without a compiler the package installs all the same, and ``python -m
lipkernels.backends`` says what is missing. LIPKERNELS_CPU, LIPKERNELS_CUDA: "require" makes that an
error, "skip" does not try, "auto" is the default. LIPKERNELS_CUDA_ARCHS: see csrc/cuda/build.py.
"""

import importlib.util
import os
import pathlib
import platform

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

FLAGS = ["-std=c++17", "-O3", "-ffp-contract=fast", "-fvisibility=hidden", "-fopenmp"]
# GCC's partial redundancy elimination costs the innermost loops of products moves: 4 to 15%.
FLAGS += ["-fno-tree-pre"]
INSTRUCTION_SETS = {"baseline": []}
if platform.machine() in ("x86_64", "AMD64"):
    INSTRUCTION_SETS["avx2"] = ["-mavx2", "-mfma"]
    INSTRUCTION_SETS["avx512"] = [
        "-mavx512f",
        "-mavx512dq",
        "-mavx512vl",
        "-mavx512bw",
        "-mfma",
        "-mprefer-vector-width=512",
    ]
# Not every compiler knows it, and only Linux hands it out. (GCC warns of its own headers.)
AMX = ["-mamx-tile", "-mamx-bf16", "-mavx512bf16", "-Wno-uninitialized", "-Wno-maybe-uninitialized"]
NAMES = ("auto", "require", "skip")
WISH = {name: os.environ.get(f"LIPKERNELS_{name.upper()}", "auto") for name in ("cpu", "cuda")}
for name, wish in WISH.items():
    if wish not in NAMES:
        raise SystemExit(f"LIPKERNELS_{name.upper()}: expected one of {NAMES}, got {wish!r}")


def cuda_build():
    """csrc/cuda/build.py, which is no part of the package."""
    spec = importlib.util.spec_from_file_location("cuda_build", "csrc/cuda/build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class BuildLibraries(build_ext):
    """Each as one shared library, found by its name and not by Python's version."""

    def get_ext_filename(self, fullname):
        return os.path.join(*fullname.split(".")) + ".so"

    def run(self):
        self.target = pathlib.Path("" if self.inplace else self.build_lib, "lipkernels")
        super().run()

    def build_extension(self, ext):
        (self.build_cuda if ext.name == "lipkernels._cuda" else self.build_cpu)(ext)

    def build_cuda(self, ext):
        """With nvcc; where that fails, lipkernels/_cuda_not_built.txt says why."""
        path, reason = pathlib.Path(self.get_ext_fullpath(ext.name)), None
        build = cuda_build()
        try:
            build.build(path, build.wished())
        except build.BuildError as error:
            reason = f"lipkernels goes without its CUDA library: {error}"
            raise CompileError(reason) from error
        finally:
            self.note(reason)

    def note(self, reason):
        file = self.target / "_cuda_not_built.txt"
        file.unlink(missing_ok=True)
        if reason is not None:
            (self.target / "_cuda.so").unlink(missing_ok=True)  # of an earlier build
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(reason + "\n")

    def build_cpu(self, ext):
        """kernels.cpp once for every instruction set, library.cpp, one shared library."""

        def compiled(source, set_name, flags):
            return self.compiler.compile(
                [source],
                output_dir=os.path.join(self.build_temp, set_name),
                macros=[("LK_NAME(x)", f"x##_{set_name}")],
                extra_postargs=FLAGS + flags,
                depends=ext.depends,
            )

        kernels, library = ext.sources
        objects, about = [], ["-fvisibility=default"]
        for set_name, flags in INSTRUCTION_SETS.items():
            objects += compiled(kernels, set_name, flags)
        if platform.system() == "Linux" and "avx512" in INSTRUCTION_SETS:
            try:
                objects += compiled(kernels, "amx", INSTRUCTION_SETS["avx512"] + AMX)
                about.append("-DLK_HAS_AMX")
            except CompileError:
                self.warn("lipkernels goes without AMX: the compiler lacks it")
        objects += compiled(library, "library", about)
        path = self.get_ext_fullpath(ext.name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        self.compiler.link_shared_object(
            objects, path, extra_postargs=["-fopenmp"], target_lang="c++"
        )


class Wheel(bdist_wheel):
    """For every Python of a platform: nothing in the wheel is of one version."""

    def get_tag(self):
        _, _, machine = super().get_tag()
        return "py3", "none", machine


def files(pattern):
    return sorted(map(str, pathlib.Path("csrc").glob(pattern)))


LIBRARIES = {
    "cpu": (files("cpu/*.cpp"), files("cpu/*.h")),
    "cuda": (files("cuda/*.cu"), files("cuda/*.py")),
}
setup(
    ext_modules=[
        Extension(f"lipkernels._{name}", sources, depends=depends, optional=WISH[name] != "require")
        for name, (sources, depends) in LIBRARIES.items()
        if WISH[name] != "skip"
    ],
    cmdclass={"build_ext": BuildLibraries, "bdist_wheel": Wheel},
)
