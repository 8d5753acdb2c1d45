"""Frobenius normalization in Triton: the reference's values, and a bound without a tolerance."""

import cases
import pytest
import tolerances
import torch
from bad_weights import BAD_WEIGHTS, bad_weight
from cases import by_dtype, weight_of_condition

pytest.importorskip("triton")

from lipkernels import backends
from lipkernels import functional as F
from lipkernels.kernels.triton import frobenius as kernels

DEVICE = cases.device_of("triton")
pytestmark = [] if backends.is_interpreted() else [pytest.mark.gpu]

NARROW = (torch.float32, torch.bfloat16, torch.float16)
# Several blocks, one block and a bit, rows of several steps and of one.
SHAPES = [(70, 90), (1, 2049), (33, 130), (2, 40, 60), (5, 3), (1, 1)]
SCALES = [1.0, 0.37, 3.0, 2.5e-3, 11.0, 1.0]

by_rows = pytest.mark.parametrize("per_row", [False, True])


def norms(x, per_row):
    return torch.linalg.vector_norm(x.double(), dim=(-1,) if per_row else (-2, -1))


@by_dtype(NARROW)
@by_rows
def test_bad_weights_stay_within_the_bound(dtype, per_row):
    # Each has every other shape: a large one with some of its blocks full, and small ones.
    for i, name in enumerate(BAD_WEIGHTS):
        shapes, scales = SHAPES[i % 2 :: 2], SCALES[i % 2 :: 2]
        weights = [bad_weight(name, shape, dtype).to(DEVICE) for shape in shapes]
        results = F.frobenius_normalize(weights, scales, per_row=per_row, backend="triton")
        expected = F.frobenius_normalize(
            [w.double() for w in weights], scales, per_row=per_row, backend="reference"
        )
        limit = tolerances.WEIGHT_VALUES["frobenius_normalize"][dtype]
        spacing = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
        for x, exact, k in zip(results, expected, scales, strict=True):
            assert (norms(x, per_row) <= k).all(), name
            # A result that may have subnormal entries makes room for the rounding of all of them.
            room = limit * k + spacing * (x.shape[-2] * x.shape[-1]) ** 0.5
            torch.testing.assert_close(x.double(), exact, rtol=0, atol=room)


@by_dtype(NARROW)
@by_rows
def test_gradients_are_the_references(dtype, per_row):
    weights = [weight_of_condition(shape, 10, seed=3).to(dtype) for shape in SHAPES[:-1]]
    for magnitude in (1.0,) if dtype == torch.float16 else (1.0, 2.0**-12, 2.0**12):
        leaves = [(w * magnitude).to(DEVICE).requires_grad_() for w in weights]
        wide = [w.detach().double().requires_grad_() for w in leaves]
        out = F.frobenius_normalize(leaves, SCALES[:-1], per_row=per_row, backend="triton")
        exact = F.frobenius_normalize(wide, SCALES[:-1], per_row=per_row, backend="reference")
        grads = [torch.randn_like(x) for x in out]
        torch.autograd.backward(out, grads)
        torch.autograd.backward(exact, [g.double() for g in grads])
        for a, b in zip(leaves, wide, strict=True):
            limit = tolerances.NORM_GRADIENT[dtype]
            spacing = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
            floor = spacing * a.numel() ** 0.5
            assert (a.grad.double() - b.grad).norm() <= limit * b.grad.norm() + floor


@by_rows
def test_a_gradient_beyond_the_format_is_its_largest_number(per_row):
    w = torch.tensor([[3e-45, 1e-44]], device=DEVICE, requires_grad=True)
    F.frobenius_normalize(w, per_row=per_row, backend="triton").backward(
        torch.tensor([[1.0, -1.0]], device=DEVICE)
    )
    largest = torch.finfo(torch.float32).max
    assert w.grad.tolist() == [[largest, -largest]]


@by_rows
def test_nan_and_infinity_spoil_their_own_norm(per_row):
    for bad in (float("nan"), float("inf"), -float("inf")):
        w = torch.randn(3, 5, device=DEVICE)
        w[1, 2] = bad
        other = torch.randn(3, 5, device=DEVICE)
        x, y = F.frobenius_normalize([w, other], per_row=per_row, backend="triton")
        spoiled = x.isnan().all(dim=1).tolist()
        assert spoiled == ([False, True, False] if per_row else [True] * 3)
        assert torch.equal(y, F.frobenius_normalize(other, per_row=per_row, backend="triton"))


@by_rows
def test_a_list_is_bitwise_its_members_and_itself(per_row):
    weights = [torch.randn(shape, device=DEVICE) for shape in SHAPES]
    weights[0] = torch.randn(1 + 70 * 90, device=DEVICE)[1:].view(70, 90)  # not aligned
    arguments = {"per_row": per_row, "backend": "triton"}
    together = F.frobenius_normalize(weights, SCALES, **arguments)
    again = F.frobenius_normalize(weights, SCALES, **arguments)
    for i, x in enumerate(together):
        assert torch.equal(x, again[i])
        assert torch.equal(x, F.frobenius_normalize(weights[i], SCALES[i], **arguments))
        clone = weights[i].clone()
        assert torch.equal(x, F.frobenius_normalize(clone, SCALES[i], **arguments))


def test_formats_mixed_in_a_list():
    weights = [torch.randn(4, 6, device=DEVICE).to(d) for d in (*NARROW, torch.float64, *NARROW)]
    for dtype in (torch.float32, torch.bfloat16):
        together = F.frobenius_normalize(weights, dtype=dtype, backend="triton")
        for x, w in zip(together, weights, strict=True):
            assert x.dtype == dtype
            assert torch.equal(x, F.frobenius_normalize(w, dtype=dtype, backend="triton"))


class Counted:
    """A kernel that notes its launches."""

    def __init__(self, kernel, launches):
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid):
        self.launches.append(self.kernel)
        return self.kernel[grid]


@pytest.mark.parametrize(("per_row", "expected"), [(False, 2), (True, 1)])
def test_launches_of_a_group(monkeypatch, per_row, expected):
    launches = []
    for name in (
        "partial_sums", "normalize", "differentiate", "normalize_rows", "differentiate_rows",
    ):  # fmt: skip
        monkeypatch.setattr(kernels, name, Counted(getattr(kernels, name), launches))
    weights = [torch.randn(shape, device=DEVICE) for shape in SHAPES]
    kernels.forward(weights, SCALES, torch.float32, per_row)
    assert len(launches) == expected
    kernels.backward(weights, weights, SCALES, per_row)
    assert len(launches) == 2 * expected
