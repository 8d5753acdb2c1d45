"""``python -m triton_builds.worker FAMILY``: compile that family's builds; a JSON list on stdout.

A process of its own: where TRITON_INTERPRET is set, Triton's decorator makes no kernel to compile.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.cache import get_cache_manager

from triton_builds import Build

_CUOBJDUMP = pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
_USAGE = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
_GLOBAL = re.compile(r"\b(?:LDG|STG|LDGSTS)\b[.\w]*")
_TENSOR_MEMORY = re.compile(r"\bUTMA(?:LDG|STG)\b")
_SPILL = re.compile(r"\b(?:STL|LDL)\b")


def _source(build: Build) -> ASTSource:
    signature = dict(build.signature) | dict.fromkeys(build.constants, "constexpr")
    position = {name: i for i, name in enumerate(build.kernel.arg_names)}
    aligned = [
        name
        for name, kind in build.signature.items()
        if kind.startswith("*") or name in build.divisible
    ]
    return ASTSource(
        build.kernel,
        signature={name: signature[name] for name in build.kernel.arg_names},
        constexprs=dict(build.constants),
        attrs={(position[name],): [["tt.divisibility", 16]] for name in aligned},
    )


def _inspected(cubin: bytes) -> dict[str, Any]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [_CUOBJDUMP, "-res-usage", "-sass", file.name]
        code = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = _USAGE.search(code)
    if found is None:
        raise ValueError(f"cuobjdump: expected REG, STACK, SHARED, LOCAL, got {code[:400]!r}")
    accesses = _GLOBAL.findall(code)
    wide = [a for a in accesses if re.search(r"\.(128|256)\b", a)]
    return {
        "registers": int(found[1]),
        "stack": int(found[2]),
        "local": int(found[4]),
        "spills": len(_SPILL.findall(code)),
        "wide": len(wide) + len(_TENSOR_MEMORY.findall(code)),
        "narrow": sorted(a for a in accesses if a not in wide),
    }


def _inspected_once(cubin: bytes) -> dict[str, Any]:
    """Disassembling takes as long as compiling: what it gave stays in Triton's cache."""
    digest = hashlib.sha256(cubin + pathlib.Path(__file__).read_bytes()).hexdigest()
    cache = get_cache_manager(digest)
    known = cache.get_file("usage.json")
    if known is None:
        known = cache.put(json.dumps(_inspected(cubin)), "usage.json", binary=False)
    return json.loads(pathlib.Path(known).read_text())


def compiled(build: Build, architecture: int) -> dict[str, Any]:
    """What the machine code of one build uses."""
    kernel = triton.compile(
        _source(build),
        target=GPUTarget("cuda", architecture, 32),
        options={"num_warps": build.num_warps, "num_stages": build.num_stages},
    )
    return {"shared": kernel.metadata.shared, **_inspected_once(kernel.asm["cubin"])}


def main(family: str) -> None:
    builds = importlib.import_module(f"triton_builds.{family}").BUILDS
    json.dump(
        [{arch: compiled(build, arch) for arch in build.architectures} for build in builds],
        sys.stdout,
    )


if __name__ == "__main__":
    os.nice(10)  # the tests that run meanwhile come first
    main(sys.argv[1])
