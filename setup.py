"""Builds the CPU library from csrc/cpu. All metadata is in pyproject.toml.

The library is plain C++ with a C interface (no headers of torch or Python). Without a compiler the
package installs all the same, and lipkernels.backends says what is missing; LIPKERNELS_CPU=require
makes that an error, LIPKERNELS_CPU=skip does not try.
"""

import os
import platform

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

FLAGS = ["-std=c++17", "-O3", "-ffp-contract=fast", "-fvisibility=hidden", "-fopenmp"]
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
    ]  #
WISH = os.environ.get("LIPKERNELS_CPU", "auto")


class BuildLibrary(build_ext):
    """kernels.cpp once for every instruction set, library.cpp, one shared library."""

    def build_extension(self, ext):
        def compiled(source, set_name, flags):
            return self.compiler.compile(
                [source],
                output_dir=os.path.join(self.build_temp, set_name),
                macros=[("LK_NAME(x)", f"x##_{set_name}")],
                extra_postargs=FLAGS + flags,
                depends=ext.depends,
            )

        kernels, library = ext.sources
        objects = compiled(library, "library", ["-fvisibility=default"])
        for set_name, flags in INSTRUCTION_SETS.items():
            objects += compiled(kernels, set_name, flags)
        path = self.get_ext_fullpath(ext.name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        self.compiler.link_shared_object(
            objects, path, extra_postargs=["-fopenmp"], target_lang="c++"
        )


headers = [
    f"csrc/cpu/{name}.h"
    for name in ("gemm", "polar", "retract", "scratch", "sorting", "spectrum", "team")
]
library = Extension(
    "lipkernels._cpu",
    ["csrc/cpu/kernels.cpp", "csrc/cpu/library.cpp"],
    depends=headers,
    optional=WISH != "require",
)
setup(ext_modules=[library] if WISH != "skip" else [], cmdclass={"build_ext": BuildLibrary})
