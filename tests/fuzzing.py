"""Random tensors of every shape, layout, dtype and value, and what a call on them may come to."""

from __future__ import annotations

import collections
import math
import re

import torch
from hypothesis import strategies as st
from operator_norm import assert_within
from torch import Tensor

from lipkernels.nn import LipschitzModule

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
ODD_DTYPES = (
    torch.int64,
    torch.int32,
    torch.int8,
    torch.uint8,
    torch.uint16,
    torch.bool,
    torch.complex64,
    torch.complex128,
    torch.float8_e4m3fn,
)
LAYOUTS = ("contiguous", "transposed", "sliced", "stepped", "expanded", "permuted", "offset")
VALUES = ("normal", "zero", "constant", "tiny", "huge", "largest", "spike", "nan", "inf", "ties")

# How many calls of each name came to a result, and how many were refused.
CALLS: collections.Counter[str] = collections.Counter()
REFUSED: collections.Counter[str] = collections.Counter()


def dtypes(odd: int = 4):
    """Mostly floats; one in ``odd`` is another dtype."""
    return st.integers(0, odd - 1).flatmap(
        lambda i: st.sampled_from(FLOATS) if i else st.sampled_from(ODD_DTYPES)
    )


def shapes(least: int = 0, most: int = 5, size: int = 6):
    return st.lists(st.integers(0, size), min_size=least, max_size=most).map(tuple)


def _values(shape: tuple[int, ...], kind: str, dtype: torch.dtype, seed: int) -> Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    limit = float(torch.finfo(dtype).max) if dtype.is_floating_point else 100.0
    smallest = torch.finfo(dtype).tiny if dtype.is_floating_point else 1.0
    flat = x.reshape(-1)
    if kind in ("zero", "constant"):
        x = torch.full_like(x, 0.0 if kind == "zero" else 0.3)
    elif kind == "tiny":
        x = x * smallest * 0.1  # subnormal
    elif kind in ("huge", "largest"):
        x = (x * limit * (1e-3 if kind == "huge" else 1.0)).clamp(-limit, limit)
    elif kind == "ties":
        x = x.round()
    elif flat.numel():
        if kind == "spike":
            flat.zero_()
            flat[seed % flat.numel()] = min(limit, 1e30)
        elif kind in ("nan", "inf"):
            flat[seed % flat.numel()] = math.nan if kind == "nan" else math.inf
    return x


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    if dtype.is_floating_point or dtype.is_complex:
        return x.to(dtype)
    return (
        (x.nan_to_num(1.0) * 3)
        .clamp(0 if dtype in (torch.uint8, torch.uint16) else -99, 99)
        .to(torch.int64)
        .to(dtype)
    )


def _laid_out(x: Tensor, layout: str) -> Tensor:
    """The same values (but for "expanded") in another memory layout."""
    if x.dim() == 0 or layout == "contiguous":
        return x
    if layout == "transposed" and x.dim() > 1:
        return x.transpose(-1, -2).contiguous().transpose(-1, -2)
    if layout == "permuted":
        order = [*range(1, x.dim()), 0]
        return x.permute(order).contiguous().permute([x.dim() - 1, *range(x.dim() - 1)])
    if layout == "sliced":
        larger = x.new_zeros([n + 2 for n in x.shape])
        middle = larger[tuple(slice(1, n + 1) for n in x.shape)]
        return middle.copy_(x)
    if layout == "stepped":
        larger = x.new_zeros((*x.shape[:-1], 2 * x.shape[-1]))
        return larger[..., ::2].copy_(x)
    if layout == "expanded" and x.shape[0] > 1:
        return x[:1].expand(x.shape)
    if layout == "offset":
        storage = x.new_zeros(x.numel() + 1)
        return storage[1:].view(x.shape).copy_(x)
    return x


@st.composite
def tensors(draw, shape=None, dtype=None, values=None):
    """A tensor; each of the strategies may be given."""
    shape = draw(shapes() if shape is None else shape)
    dtype = draw(dtypes() if dtype is None else dtype)
    kind = draw(st.sampled_from(VALUES) if values is None else values)
    layout, seed = draw(st.sampled_from(LAYOUTS)), draw(st.integers(0, 9999))
    x = _cast(_values(shape, kind, dtype, seed), dtype)
    if dtype.itemsize == 1 and dtype.is_floating_point:  # few torch ops know these
        return _laid_out(x.view(torch.uint8), layout).view(dtype)
    return _laid_out(x, layout)


numbers = st.sampled_from(
    (1.0, 0.5, 3, 1e-30, 1e30, 1e300, 0, -1.0, math.nan, math.inf, True, "2", None)
)
matrices = tensors(shape=shapes(2, 3, 7) | shapes(0, 4, 5), dtype=dtypes(8))
weights = matrices | st.lists(matrices, max_size=3)
scales = st.sampled_from((1.0, 0.3, 2, 100.0, 1e-3)) | numbers | st.lists(numbers, max_size=3)


def same(a: object, b: object) -> bool:
    """Bitwise the same values, NaN included."""
    if isinstance(a, Tensor):
        if not isinstance(b, Tensor) or a.dtype != b.dtype or a.shape != b.shape:
            return False
        a, b = (
            t.detach().resolve_conj().clone(memory_format=torch.contiguous_format) for t in (a, b)
        )
        if a.is_floating_point() and a.dtype.itemsize > 1:
            return torch.equal(a.isnan(), b.isnan()) and torch.equal(
                a.nan_to_num(7.0, 8.0, 9.0), b.nan_to_num(7.0, 8.0, 9.0)
            )
        a, b = (t.reshape(-1).view(torch.uint8) if t.numel() else t for t in (a, b))
        return torch.equal(a, b)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))  # type: ignore[arg-type]
    return a == b or (a != a and b != b)


SAYS_WHAT_WAS_WRONG = re.compile(r"expect|must|cannot|should|divisible|support|None of ours")


def call(name, function, *arguments, **keywords):
    """(result,) of the call, or None where it was refused as documented.

    Whatever else it raises goes on. Neither may change a tensor among the arguments.
    """
    tensors = [t for a in arguments for t in (a if isinstance(a, (list, tuple)) else [a])]
    tensors = [t for t in tensors if isinstance(t, Tensor)]
    before = [t.detach().clone() for t in tensors]
    CALLS[name] += 1
    try:
        result = (function(*arguments, **keywords),)
    except (ValueError, TypeError) as error:
        REFUSED[name] += 1
        assert SAYS_WHAT_WAS_WRONG.search(str(error)), f"{name}: {error!r} says not what was wrong"
        result = None
    assert all(map(same, tensors, before)), f"{name} changed its input"
    return result


def contiguous(value):
    if isinstance(value, Tensor):
        return value.detach().clone(memory_format=torch.contiguous_format)
    return [contiguous(v) for v in value] if isinstance(value, list) else value


def agree(name, function, x, *arguments, **keywords):
    """The call's result or None, after checking it against the call on a contiguous copy."""
    got = call(name, function, x, *arguments, **keywords)
    again = call(name, function, contiguous(x), *arguments, **keywords)
    assert (got is None) == (again is None), name
    if got is None:
        return None
    # Of a matrix near a singular one the polar factor is anybody's; its bound is checked below.
    if name != "polar_factor":
        assert same(got[0], again[0]), f"{name} depends on the layout of its input"
    return got[0]


def finite(x):
    wide = x.double() if x.is_floating_point() else x  # float8 has no arithmetic
    return bool(torch.isfinite(wide).all())


def within(module):
    """Whether the weights keep the promise; True too where one of them is no number."""
    for m in module.modules():
        if isinstance(m, LipschitzModule) and hasattr(m, "constraint"):
            if not finite(m.raw_weight):
                continue
            matrix = m.matrix(m.weight.detach())
            per_row = getattr(m, "disjoint_neurons", False)
            for one in matrix.reshape(-1, *matrix.shape[-2:]):
                for part in one.split(1) if per_row else [one]:
                    assert_within(part, m.matrix_scale(), type(m).__name__)


def constrained(name, got, weight, scale, factor=lambda w: 1.0, dtype=None):
    """Check bound, shape, dtype, NaN for NaN, finite for finite; the (weight, scale) of each."""
    listed = isinstance(weight, list)
    given = weight if listed else [weight]
    results = got if listed else [got]
    factors = scale if isinstance(scale, list) else [scale] * len(given)
    for w, result, k in zip(given, results, factors, strict=True):
        assert result.shape == w.shape and result.dtype == (dtype or w.dtype)
        for one, source in zip(
            result.reshape(-1, *w.shape[-2:]) if w.numel() else [],
            w.reshape(-1, *w.shape[-2:]) if w.numel() else [],
            strict=True,
        ):
            if finite(w):
                assert finite(one), f"{name}: finite weight, result {one}"
                assert_within(one, k * factor(one), (name, source))
            elif name != "frobenius_normalize" and not finite(source):
                assert bool(one.isnan().any()), f"{name} hides a weight that is no number"
    return list(zip(given, factors, strict=True))
