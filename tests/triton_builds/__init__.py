"""What each family of Triton kernels builds: a list ``BUILDS`` for tests/test_triton_builds.py."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import triton

# Of one program: what a multiprocessor lends it on sm_80, sm_90 and sm_100, less what is reserved.
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}

# Of a multiprocessor of any of them, which a thread is given so many of at a time.
_REGISTERS, _GRANULE = 65536, 8
# Of Triton: the budgets of registers are what its compiler needs, or a little more.
_VERSION = "3.7."


@dataclass(frozen=True)
class Build:
    """One kernel with the constants that its launcher gives it, and what the machine code may use.

    ``signature`` has a type for each argument that is not a constant ("*fp32", "i32", ...).
    Pointers are 16-byte aligned, as torch's allocations are; ``divisible`` names the integers that
    a launcher knows to be multiples of 16. ``registers`` is a limit for a thread, ``shared`` one in
    bytes for a program (None: what the architecture has). ``wide_loads``: global memory is read and
    written 16 bytes at a time, but for the arguments' own tables; ``narrow`` is how many narrower
    accesses the code may have besides. ``architectures``: 80, 90, 100, or some of them.
    """

    kernel: Any
    signature: Mapping[str, str]
    constants: Mapping[str, Any]
    num_warps: int = 4
    num_stages: int = 3
    registers: int = 255
    shared: int | None = None
    wide_loads: bool = False
    narrow: int = 0
    divisible: tuple[str, ...] = ()
    architectures: tuple[int, ...] = (80, 90, 100)
    name: str = field(default="", compare=False)

    @property
    def most_registers(self) -> int:
        """``registers``; with another compiler than the one that they were read from, a step more.

        Each version has its own number. Up to this step as many programs run on a multiprocessor at
        once, and it costs nothing.
        """
        if triton.__version__.startswith(_VERSION):
            return self.registers
        threads = self.num_warps * 32
        programs = _REGISTERS // (threads * (-(-self.registers // _GRANULE) * _GRANULE))
        return min(255, _REGISTERS // (threads * programs) // _GRANULE * _GRANULE)

    def __str__(self) -> str:
        name = self.name or "-".join(f"{k}{v}" for k, v in self.constants.items())
        return f"{self.kernel.__name__}-{name}"
