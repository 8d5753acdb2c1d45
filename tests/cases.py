"""One table of cases for every op: shapes, layouts, dtypes, arguments.

The op tests read it, and so can benchmarks and other backends. A case makes its own input: weights
of condition number 10, images with random pixels, both from a fixed seed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from lipkernels import backends
from lipkernels import functional as F
from lipkernels.kernels.implemented import IMPLEMENTED

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
ANY_DTYPE = (*FLOATS, *INTEGERS, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2)

WEIGHT_OPS = ("polar_factor", "bjorck", "spectral_normalize", "frobenius_normalize")

# ------------------------------------------------------------------------------------ the table
# The axes after the first two, or before the last two, are batches of matrices.
WEIGHT_SHAPES = {
    "one": (1, 1),
    "row": (1, 6),
    "column": (7, 1),
    "square": (5, 5),
    "wide": (3, 7),
    "tall": (9, 4),
    "odd": (13, 17),
    "conv": (16, 27),
    "narrow": (64, 9),
    "batch": (3, 4, 6),
    "batch_tall": (2, 7, 3),
    "batch_square": (2, 4, 4),
    "batch_deep": (2, 2, 3, 5),
    "no_rows": (0, 4),
    "no_columns": (4, 0),
    "no_matrices": (0, 3, 4),
}
WEIGHT_LAYOUTS = {
    "transposed": ("wide", "tall", "square", "batch"),
    "strided": ("odd", "batch_tall"),
    "offset": ("conv", "row"),
    "channels_last": ("batch_deep",),
}

IMAGE_LAYOUTS = ("contiguous", "channels_last", "transposed", "strided", "offset", "expanded")

# (image, block); the image of depth_to_space is the output of space_to_depth.
SAMPLING = {
    "square": ((2, 3, 4, 4), 2),
    "wide_block": ((2, 3, 4, 6), (1, 3)),
    "tall_block": ((1, 2, 6, 2), (3, 1)),
    "uneven_block": ((2, 5, 6, 9), (2, 3)),
    "unit_block": ((2, 3, 4, 5), 1),
    "whole_image": ((1, 1, 3, 5), (3, 5)),
    "no_images": ((0, 3, 4, 4), 2),
    "no_channels": ((2, 0, 4, 4), 2),
    "no_pixels": ((2, 3, 0, 4), 2),
}
# (shape, group_size, dim)
SORTING = {
    "pairs": ((5, 8), 2, 1),
    "triples": ((4, 9, 5), 3, 1),
    "whole": ((3, 7), None, 1),
    "single": ((3, 5), 1, 1),
    "images": ((2, 6, 3, 5), 2, 1),
    "last": ((2, 3, 10), 5, -1),
    "first": ((12, 3), 4, 0),
    "vector": ((6,), 2, 0),
    "wide_groups": ((1, 600), 300, 1),
    "no_samples": ((0, 6), 2, 1),
    "no_channels": ((3, 0), 2, 1),
}
# (shape, kernel, stride, padding, ceil_mode)
POOLING = {
    "blocks": ((2, 3, 6, 4), 2, None, 0, False),
    "uneven": ((1, 2, 6, 10), (3, 5), None, 0, False),
    "overlap": ((2, 3, 7, 9), 3, 2, 0, False),
    "padded": ((2, 3, 7, 8), 3, 2, 1, False),
    "uneven_padding": ((1, 3, 5, 8), (2, 3), (1, 2), (1, 0), False),
    "ceil": ((2, 3, 7, 5), 2, None, 0, True),
    "ceil_padded": ((1, 2, 7, 6), 3, 2, 1, True),
    "gaps": ((2, 1, 8, 8), 2, 3, 0, False),
    "unbatched": ((3, 6, 6), 2, None, 0, False),
    "unit": ((2, 3, 4, 4), 1, None, 0, False),
    "no_images": ((0, 3, 4, 4), 2, None, 0, False),
}


@dataclass(frozen=True)
class Case:
    """One call: the op, its input (shape and layout), its other arguments."""

    op: str
    name: str
    shape: tuple[int, ...]
    layout: str = "contiguous"
    arguments: dict[str, Any] = field(default_factory=dict, compare=False)

    def __str__(self) -> str:
        return f"{self.name}-{self.layout}"

    def input(self, dtype: torch.dtype = torch.float64, seed: int = 0, device="cpu") -> Tensor:
        """The input, always the same for a seed."""
        if self.op in WEIGHT_OPS or self.op == "power_iteration":
            values = weight_of_condition(self.shape, 10.0, seed)
        else:
            generator = torch.Generator().manual_seed(seed)
            values = torch.randn(self.shape, generator=generator, dtype=torch.float64)
            if not dtype.is_floating_point:
                values = (values * 40).round().clamp(0 if dtype == torch.uint8 else -99, 99)
                values = values > 0 if dtype == torch.bool else values
        if dtype.is_floating_point and dtype.itemsize == 1:  # few torch ops know these
            return laid_out(values.to(dtype).view(torch.uint8), self.layout).view(dtype).to(device)
        return laid_out(values.to(dtype), self.layout).to(device)

    def call(self, x: Tensor | list[Tensor], **others: Any) -> Any:
        """The public function on ``x`` with this case's arguments."""
        return getattr(F, self.op)(x, **{**self.arguments, **others})

    def result(self, x: Tensor | list[Tensor], **others: Any) -> Any:
        """The differentiable result alone, without power-iteration vectors."""
        out = self.call(x, **others)
        return out[0] if isinstance(out, tuple) else out


def weight_of_condition(shape: tuple[int, ...], condition: float, seed: int = 0) -> Tensor:
    """A float64 weight with singular values from 1 down to 1/``condition``, evenly in the log."""
    *batch, rows, cols = shape
    m = min(rows, cols)
    generator = torch.Generator().manual_seed(seed)
    left = torch.randn(*batch, rows, m, generator=generator, dtype=torch.float64)
    right = torch.randn(*batch, cols, m, generator=generator, dtype=torch.float64)
    if math.prod(shape) == 0:
        return torch.zeros(shape, dtype=torch.float64)
    values = torch.logspace(0, -math.log10(condition), m, dtype=torch.float64)
    left, right = torch.linalg.qr(left)[0], torch.linalg.qr(right)[0]
    return (left * values) @ right.mT


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The same values in another memory layout."""
    if layout == "contiguous":
        return x.contiguous()
    if layout == "transposed":
        return x.mT.contiguous().mT
    if layout == "channels_last":
        return x.contiguous(memory_format=torch.channels_last)
    if layout == "strided":  # every other column of a larger tensor
        larger = x.repeat_interleave(2, dim=-1)
        return larger[..., ::2]
    if layout == "offset":  # starts in the middle of its storage, unaligned
        storage = torch.cat((x.new_zeros(3), x.reshape(-1)))
        return storage[3:].view(x.shape)
    if layout == "expanded":  # the first image, again and again
        return x[:1].expand(x.shape)
    raise ValueError(f"layout: {layout!r}")


def _weight_cases(op: str) -> Iterator[Case]:
    for name, shape in WEIGHT_SHAPES.items():
        if op != "power_iteration" or math.prod(shape):
            yield Case(op, name, shape)
    for layout, names in WEIGHT_LAYOUTS.items():
        for name in names:
            yield Case(op, name, WEIGHT_SHAPES[name], layout)


def _layouts(shape: tuple[int, ...]) -> tuple[str, ...]:
    if math.prod(shape) == 0:
        return ("contiguous",)
    return IMAGE_LAYOUTS if len(shape) == 4 else ("contiguous", "strided", "offset")


def _table() -> Iterator[Case]:
    for op in (*WEIGHT_OPS, "power_iteration"):
        yield from _weight_cases(op)
    for name, (shape, block) in SAMPLING.items():
        ph, pw = (block, block) if isinstance(block, int) else block
        n, c, h, w = shape
        deep = (n, c * ph * pw, h // ph, w // pw)
        for layout in _layouts(shape):
            for mode in ("CRD", "DCR"):
                arguments = {"block": block, "mode": mode}
                yield Case("space_to_depth", f"{name}-{mode}", shape, layout, arguments)
                yield Case("depth_to_space", f"{name}-{mode}", deep, layout, arguments)
    for name, (shape, size, dim) in SORTING.items():
        for layout in _layouts(shape):
            yield Case("group_sort", name, shape, layout, {"group_size": size, "dim": dim})
    for name, (shape, kernel, stride, padding, ceil) in POOLING.items():
        arguments = {
            "kernel_size": kernel,
            "stride": stride,
            "padding": padding,
            "ceil_mode": ceil,
        }
        for layout in _layouts(shape):
            yield Case("l2_norm_pool2d", name, shape, layout, arguments)
            # The kernels are those of the norm: a layout of each is enough.
            if layout == "contiguous" or name in ("blocks", "ceil_padded"):
                yield Case("scaled_avg_pool2d", name, shape, layout, {**arguments, "scale": 1.3})


CASES = tuple(_table())


def of(*ops: str) -> list[Case]:
    """The cases of these ops."""
    return [case for case in CASES if case.op in ops]


def without_empty(cases: list[Case]) -> list[Case]:
    return [case for case in cases if math.prod(case.shape)]


# ------------------------------------------------------------------------------------ backends
def _backends_of(op: str) -> Iterator[Any]:
    for name in backends.BACKENDS:
        if name not in IMPLEMENTED[op]:
            continue  # nothing to test
        on_gpu = device_of(name) == "cuda" and torch.cuda.is_available()
        device = torch.device("cuda" if on_gpu else "cpu")
        try:
            backends.resolve(op, IMPLEMENTED[op], device, name)
        except backends.BackendUnavailableError as error:
            marks = [pytest.mark.gpu] if device_of(name) == "cuda" else []
            yield pytest.param(name, marks=[*marks, pytest.mark.skip(reason=str(error))])
        else:
            yield pytest.param(name, marks=[pytest.mark.gpu] if on_gpu else [])


def device_of(backend: str) -> str:
    return "cpu" if backend in ("reference", "cpu") or backends.is_emulated(backend) else "cuda"


def on_backends(*ops: str):
    """Parametrize a test over (case, backend): the cases of these ops, where they can run."""
    parameters = [
        pytest.param(
            case, *backend.values, marks=backend.marks, id=f"{op}-{case}-{backend.values[0]}"
        )
        for op in ops
        for case in of(op)
        for backend in _backends_of(op)
    ]
    return pytest.mark.parametrize(("case", "backend"), parameters)


def on_gpu_backends(op: str):
    """Parametrize a test over (backend): those of the op whose kernels are for CUDA devices."""
    found = [b for b in _backends_of(op) if b.values[0] in ("triton", "cuda")]
    return pytest.mark.parametrize("backend", found)


def is_interpreted(backend: str) -> bool:
    """Whether this backend takes a second for what takes the others a millisecond."""
    return backend == "triton" and backends.is_interpreted()


def on_backends_by_dtype(op: str):
    """Parametrize a test over (case, backend, dtype): FLOATS.

    Triton's interpreter gets float32, the strictest tolerance of what kernels compute, for every
    case, and the three others in turns: each of them has every third shape and layout.
    """
    parameters = []
    for i, case in enumerate(of(op)):
        for backend in _backends_of(op):
            (name,) = backend.values
            others = [dtype for dtype in FLOATS if dtype != torch.float32]
            if is_interpreted(name):
                others = [others[i % len(others)]]
            for dtype in (torch.float32, *others):
                label = f"{op}-{case}-{str(dtype).removeprefix('torch.')}-{name}"
                parameters.append(pytest.param(case, name, dtype, marks=backend.marks, id=label))
    return pytest.mark.parametrize(("case", "backend", "dtype"), parameters)


def by_dtype(dtypes: tuple[torch.dtype, ...] = FLOATS):
    return pytest.mark.parametrize("dtype", dtypes, ids=lambda d: str(d).removeprefix("torch."))
