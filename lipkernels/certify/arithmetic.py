"""The floating-point arithmetic that a CPU forward pass runs in, and what is refused.

Note [Assumptions on the arithmetic]
The proofs in this package need the following of the kernels, and nothing else:

1. A product of matrices or a convolution adds, for each output, the products w_i z_i and the bias
   in some order: any order, any blocking, with or without fused multiply-add. Every operation
   rounds with a relative error of at most ``unit``, and may flush a result or an operand below
   ``tiny`` to zero. That is what BLAS and oneDNN do. Winograd, FFT and Strassen algorithms do not.
2. Weights in bfloat16 or float16 (autocast included): the sum runs in float32, where each addition
   may be off by a whole unit in the last place (2^-23: some processors do not round these sums to
   nearest). What is stored in the half format is rounded to nearest: once, and once more where a
   bias is added; a transposed convolution may also store the sums of its columns.
3. Other layers apply the operations that their definition names, each rounded once in the coarser
   of their input's and output's formats.

torch on a CPU leaves this where settings allow it to: products in TF32 or bfloat16 for float32
weights (``torch.set_float32_matmul_precision``, ``torch.backends.*.fp32_precision``, oneDNN's
environment variable), float16 sums of float16 products, NNPACK's Winograd and FFT convolutions
(used where oneDNN is switched off), Winograd on ARM. Those are refused. On x86-64 torch asks oneDNN
for ``convolution_direct``, never for Winograd. ``torch.compile`` is not covered: it may fuse and
reorder, which 1 allows, but also approximates functions.
"""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass

import torch
from torch import Tensor

_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
HALVES = (torch.bfloat16, torch.float16)
# Pays for the rounding of the float64 arithmetic in which error bounds are themselves computed:
# sums of up to 2^30 terms, of which each result here is one.
UP = 1 + 2.0**-20
MOST_TERMS = 2**30
_UNDERFLOW = 2.0**-500  # more than what squares below float64's range can hide from a norm


@dataclass(frozen=True)
class Arithmetic:
    """How one layer computes.

    ``unit``, ``tiny``: relative error of an operation, and the size below which it may be zero.
    ``cast_unit``, ``cast_tiny``: of converting the input first; 0 for none. ``store_unit``,
    ``store_tiny``: of converting what ``unit`` computed; 0 for none. ``largest``: of the format
    that overflows first.
    """

    unit: float
    tiny: float
    largest: float
    cast_unit: float = 0.0
    cast_tiny: float = 0.0
    store_unit: float = 0.0
    store_tiny: float = 0.0


@dataclass(frozen=True)
class LayerError:
    """What a layer rounds, on computed inputs at a distance of at most d from a given point.

    |fl(f(z)) - f(z)|_2 <= ``constant`` + ``slope`` d, and no number on the way exceeds ``reach`` +
    ``reach_slope`` d. ``constant`` and ``reach`` are one number for each sample, (N,).
    """

    constant: Tensor
    slope: float
    reach: Tensor
    reach_slope: float


def unit_roundoff(dtype: torch.dtype) -> float:
    """Largest relative error of rounding to nearest: 2^-24 for float32."""
    if dtype not in _FLOATS:
        raise ValueError(f"expected float64, float32, bfloat16 or float16 numbers, got {dtype}")
    return torch.finfo(dtype).eps / 2


def _unit_and_tiny(dtype: torch.dtype) -> tuple[float, float]:
    # Not the smallest subnormal: flushing subnormals to zero is a switch of the processor.
    return unit_roundoff(dtype), torch.finfo(dtype).smallest_normal


DOUBLE = Arithmetic(*_unit_and_tiny(torch.float64), torch.finfo(torch.float64).max)


def products(given: torch.dtype, computed: torch.dtype, stored: torch.dtype) -> Arithmetic:
    """Of a layer with a weight in ``computed``, for an input ``given`` and an output ``stored``."""
    cast = (0.0, 0.0) if given == computed else _unit_and_tiny(computed)
    if computed in HALVES:
        unit, tiny = 2 * unit_roundoff(torch.float32), torch.finfo(torch.float32).smallest_normal
        store = _unit_and_tiny(computed)
    else:
        unit, tiny = _unit_and_tiny(computed)
        store = (0.0, 0.0) if stored == computed else _unit_and_tiny(stored)
    largest = min(torch.finfo(computed).max, torch.finfo(stored).max)
    return Arithmetic(unit, tiny, largest, *cast, *store)


def operations(given: torch.dtype, stored: torch.dtype) -> Arithmetic:
    """Of a layer without a weight: every operation in the coarser format."""
    coarse = max((given, stored), key=unit_roundoff)
    tiny = max(torch.finfo(given).smallest_normal, torch.finfo(stored).smallest_normal)
    largest = min(torch.finfo(given).max, torch.finfo(stored).max)
    return Arithmetic(unit_roundoff(coarse), tiny, largest)


def gamma(n: int, unit: float) -> float:
    """n u / (1 - n u), the relative error of n roundings; inf where that is no bound."""
    return n * unit / (1 - n * unit) if n * unit < 0.5 else float("inf")


def norms(x: Tensor) -> Tensor:
    """Upper bounds of the l2 norms of the float64 samples x (N, ..), as (N,)."""
    flat = x.reshape(x.shape[0], x[:1].numel())
    return torch.linalg.vector_norm(flat, dim=1) * UP + flat.shape[1] * _UNDERFLOW


def _full_precision() -> bool:
    try:
        settings = [torch.get_float32_matmul_precision()]
    except RuntimeError:  # old and new settings contradict each other
        return False
    mkldnn = torch.backends.mkldnn
    for owner in (torch.backends, mkldnn, *(getattr(mkldnn, n, None) for n in ("matmul", "conv"))):
        settings.append(getattr(owner, "fp32_precision", "none"))
    return set(settings) <= {"highest", "ieee", "none"}


def check_products(dtype: torch.dtype, convolution: bool) -> None:
    """ValueError where the settings of torch may break Note [Assumptions on the arithmetic]."""
    if dtype == torch.float32 and not _full_precision():
        raise ValueError(
            "expected float32 products in full precision, got a reduced one: see"
            " torch.get_float32_matmul_precision() and torch.backends.fp32_precision"
        )
    for name in ("ONEDNN_DEFAULT_FPMATH_MODE", "DNNL_DEFAULT_FPMATH_MODE"):
        if os.environ.get(name, "strict").lower() != "strict":
            raise ValueError(f"expected {name} unset or STRICT, got {os.environ[name]!r}")
    reduced = getattr(torch._C, "_get_cpu_allow_fp16_reduced_precision_reduction", None)
    if dtype == torch.float16 and reduced is not None and reduced():
        raise ValueError("expected float16 products summed in float32, got sums in float16")
    if convolution and dtype != torch.float64:
        if platform.machine().lower() not in ("x86_64", "amd64"):
            raise ValueError(
                f"expected a convolution on x86-64, where torch uses no Winograd algorithm, got"
                f" {platform.machine()}; float64 is possible"
            )
        direct = torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled
        nnpack = torch.backends.nnpack.is_available() and torch._C._get_nnpack_enabled()
        if nnpack and not direct:
            raise ValueError(
                "expected oneDNN on or NNPACK off (whose convolutions may be Winograd's or an FFT),"
                " got torch.backends.mkldnn disabled and torch.backends.nnpack enabled"
            )
