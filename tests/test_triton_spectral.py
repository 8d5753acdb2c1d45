"""Spectral normalization in Triton: a bound that no float64 SVD exceeds, reference's gradients."""

import contextlib

import cases
import pytest
import tolerances
import torch
from bad_weights import BAD_WEIGHTS, bad_weight
from cases import by_dtype, weight_of_condition

pytest.importorskip("triton")

import lipkernels
import lipkernels.nn as lnn
from lipkernels import backends
from lipkernels import functional as F
from lipkernels.kernels import frobenius as frobenius_ops
from lipkernels.kernels import spectral as spectral_ops
from lipkernels.kernels.triton import norms, packing
from lipkernels.kernels.triton.group import group

DEVICE = cases.device_of("triton")
pytestmark = [] if backends.is_interpreted() else [pytest.mark.gpu]

NARROW = (torch.float32, torch.bfloat16, torch.float16)
# Small sides of one tile, of two and of three; one split of the columns and two; one row.
SHAPES = [(5, 9), (40, 33), (9, 2), (1, 7), (1, 1)]
SCALES = [1.0, 0.37, 11.0, 3.0, 2.5e-3]


def largest(matrix):
    return torch.linalg.svdvals(matrix.detach().double())[..., 0]


def bounds(weights, squarings=norms.SQUARINGS):
    """sigma of every matrix and its vector on the small side, as `norms` finds them."""
    shapes = group(weights)
    n = len(shapes.matrices)
    skip = torch.zeros(n, dtype=torch.int32, device=DEVICE)
    sigmas = torch.full((n,), float("nan"), dtype=torch.float64, device=DEVICE)
    packed = packing.packed(weights, shapes, wide=True)
    vectors = norms.largest_singular_values(packed, shapes, skip, sigmas, squarings)
    starts = norms.sizes(shapes).vectors
    found = [vectors[s : s + m.small] for s, m in zip(starts, shapes.matrices, strict=True)]
    return sigmas, found


# ----------------------------------------------------------------------------- the bound itself
@pytest.mark.parametrize("name", BAD_WEIGHTS)
def test_the_bound_is_above_and_tight(name):
    shapes = [(5, 5), (3, 8), (9, 4), (40, 50), (1, 7), (70, 33)]
    weights = [bad_weight(name, shape, torch.float32).to(DEVICE) for shape in shapes]
    sigmas, vectors = bounds(weights)
    for w, sigma, u in zip(weights, sigmas, vectors, strict=True):
        exact = largest(w)
        assert exact <= sigma <= exact * (1 + 1e-11), name
        x = w.double() if w.shape[0] <= w.shape[1] else w.double().T
        torch.testing.assert_close((u @ x).norm(), exact, rtol=1e-11, atol=0)


@pytest.mark.parametrize("shape", [(5, 7), (40, 36)])
def test_ties_cost_less_than_float32_rounding(shape):
    w = F.polar_factor(torch.randn(shape, dtype=torch.float64), backend="reference")
    # Powers of two: float32 rounds all singular values alike.
    for tied in (3.0 * w.float(), torch.eye(*shape)):
        sigmas, _ = bounds([tied.to(DEVICE)])
        exact = largest(tied)
        assert exact <= sigmas[0] <= exact * (1 + 1e-7)


@pytest.mark.parametrize("shape", [(6, 9), (36, 40)])
@pytest.mark.parametrize("gap", [1e-2, 1e-4, 1e-6, 1e-8])
def test_two_values_close_to_each_other(shape, gap):
    m = min(shape)
    left = torch.linalg.qr(torch.randn(shape[0], m, dtype=torch.float64))[0]
    right = torch.linalg.qr(torch.randn(shape[1], m, dtype=torch.float64))[0]
    values = torch.full((m,), 0.5, dtype=torch.float64)
    values[0], values[1] = 1.0, 1.0 - gap
    w = ((left * values) @ right.T).float().to(DEVICE)
    sigmas, (u,) = bounds([w])
    exact = largest(w)
    assert exact <= sigmas[0] <= exact * (1 + 1e-7)
    assert (u @ w.double()).norm() >= exact * (1 - 1e-7)


@pytest.mark.parametrize("squarings", [0, 1, 3, 8])
def test_few_squarings_are_looser_and_never_below(squarings):
    for shape in ((6, 9), (40, 36)):
        for w in (torch.randn(shape, device=DEVICE), torch.eye(*shape, device=DEVICE)):
            sigmas, _ = bounds([w], squarings)
            exact, m = largest(w), min(shape)
            assert exact <= sigmas[0] <= exact * m ** (0.5 ** (squarings + 2)) * (1 + 1e-12)


def test_columns_in_more_than_one_part():
    for shape in ((2, 2500), (33, 1100)):
        w = torch.rand(shape, device=DEVICE) + 1
        sigmas, _ = bounds([w])
        assert largest(w) <= sigmas[0] <= largest(w) * (1 + 1e-9)


# ------------------------------------------------------------------------- promise and gradient
# float32 and one of the other two, in turns.
@pytest.mark.parametrize(
    ("dtype", "name"),
    [
        (dtype, name)
        for i, name in enumerate(BAD_WEIGHTS)
        for dtype in (torch.float32, NARROW[1 + i % 2])
    ],
    ids=str,
)
def test_bad_weights_keep_their_promise(dtype, name):
    weights = [bad_weight(name, shape, dtype).to(DEVICE) for shape in SHAPES]
    results, _ = F.spectral_normalize(weights, SCALES, backend="triton")
    for w, x, k in zip(weights, results, SCALES, strict=True):
        assert largest(x) <= k
        if w.any() and k >= 0.1:  # the smallest has subnormal entries in float16
            assert largest(x) >= k * (1 - tolerances.ATTAINED[dtype])


@by_dtype(NARROW)
@pytest.mark.parametrize("result_dtype", NARROW, ids=str)
def test_any_format_to_any_other(dtype, result_dtype):
    weights = [weight_of_condition(shape, 10).to(dtype).to(DEVICE) for shape in SHAPES]
    results, _ = F.spectral_normalize(weights, 1.7, dtype=result_dtype, backend="triton")
    limit = 1.7 * tolerances.WEIGHT_VALUES["spectral_normalize"][result_dtype]
    for w, x in zip(weights, results, strict=True):
        assert x.dtype == result_dtype and largest(x) <= 1.7
        exact = 1.7 * w.double() / largest(w)
        torch.testing.assert_close(x.double(), exact, rtol=0, atol=limit)


@by_dtype(NARROW)
@pytest.mark.parametrize("condition", [1.5, 10, 1000])
def test_gradients_are_the_references(dtype, condition):
    weights = [weight_of_condition(shape, condition, seed=2).to(dtype) for shape in SHAPES[:-1]]
    leaves = [w.to(DEVICE).requires_grad_() for w in weights]
    wide = [w.detach().double().requires_grad_() for w in leaves]
    out, _ = F.spectral_normalize(leaves, SCALES[:-1], backend="triton")
    exact, _ = F.spectral_normalize(wide, SCALES[:-1], backend="reference")
    grads = [torch.randn_like(x) for x in out]
    torch.autograd.backward(out, grads)
    torch.autograd.backward(exact, [g.double() for g in grads])
    for a, b in zip(leaves, wide, strict=True):
        error = (a.grad.double() - b.grad).norm() / b.grad.norm()
        assert error <= tolerances.NORM_GRADIENT[dtype]


@pytest.mark.parametrize("factor", [2.0**-110, 2.0**110])
def test_magnitude_changes_the_gradient_alone(factor):
    for shape in ((5, 9), (40, 33)):
        w = weight_of_condition(shape, 3).float().to(DEVICE).requires_grad_()
        other = (w.detach() * factor).requires_grad_()
        (x, y), _ = F.spectral_normalize([w, other], backend="triton")
        assert torch.equal(x, y)
        (x.sum() + y.sum()).backward()
        assert torch.equal(other.grad * factor, w.grad)


def test_a_gradient_beyond_the_format_is_its_largest_number():
    w = torch.tensor([[3e-45, 1e-44]], device=DEVICE, requires_grad=True)
    x, _ = F.spectral_normalize(w, backend="triton")
    x.backward(torch.tensor([[1.0, -1.0]], device=DEVICE))
    limit = torch.finfo(torch.float32).max
    assert w.grad.tolist() == [[limit, -limit]]


# ------------------------------------------------------------------------------ the start vector
@pytest.mark.parametrize("shape", [(4, 7), (40, 33), (2, 7, 4)])
def test_start_vectors_do_not_change_the_result(shape):
    w = weight_of_condition(shape, 10).float().to(DEVICE)
    left = torch.linalg.svd(w.double())[0]
    expected, _ = F.spectral_normalize(w, backend="triton")
    nan = torch.full(shape[:-1], float("nan"), device=DEVICE)
    for u in (left[..., 0].float(), left[..., 2].float(), torch.zeros_like(nan), nan):
        x, new_u = F.spectral_normalize(w, u=u, backend="triton")
        assert torch.equal(x, expected)
        torch.testing.assert_close(new_u.double().abs(), left[..., 0].abs(), rtol=0, atol=1e-6)


def test_vectors_keep_the_format_of_their_starts():
    w = weight_of_condition((4, 7), 10).float().to(DEVICE)
    formats = (torch.float64, torch.float32, torch.bfloat16)
    starts = [torch.ones(4, dtype=d, device=DEVICE) for d in formats]
    _, us = F.spectral_normalize([w, w, w], u=starts, backend="triton")
    assert [u.dtype for u in us] == list(formats)
    torch.testing.assert_close(us[1], us[0].float(), rtol=0, atol=0)


# -------------------------------------------------------------------------------------- groups
@by_dtype(NARROW)
def test_a_list_is_bitwise_its_members_and_itself(dtype):
    shapes = [*SHAPES, (2, 3, 5)]
    scales = [*SCALES, 0.9]
    weights = [weight_of_condition(shape, 5).to(dtype).to(DEVICE) for shape in shapes]
    together, us = F.spectral_normalize(weights, scales, backend="triton")
    again, _ = F.spectral_normalize(weights, scales, backend="triton")
    for i, w in enumerate(weights):
        alone, u = F.spectral_normalize(w.clone(), scales[i], backend="triton")
        assert torch.equal(together[i], alone) and torch.equal(us[i], u)
        assert torch.equal(together[i], again[i])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_one_spoiled_weight_of_a_group(bad):
    for shape in ((5, 9), (40, 33)):
        weights = [torch.randn(shape, device=DEVICE) for _ in range(3)]
        weights[1][2, 1] = bad
        (x, y, z), us = F.spectral_normalize(weights, backend="triton")
        assert y.isnan().all() and us[1].isnan().all()
        expected, _ = F.spectral_normalize([weights[0], weights[2]], backend="triton")
        assert torch.equal(x, expected[0]) and torch.equal(z, expected[1])


def test_uninitialized_memory_is_not_read():
    weights = [torch.randn(shape, device=DEVICE).requires_grad_() for shape in SHAPES]
    torch.use_deterministic_algorithms(True)  # fills torch.empty with NaN
    try:
        for dtype in (torch.float32, torch.bfloat16):
            results, us = F.spectral_normalize(weights, dtype=dtype, backend="triton")
            results += F.frobenius_normalize(weights, dtype=dtype, backend="triton")
            gradients = torch.autograd.grad([x.sum() for x in results], weights)
            estimates = F.power_iteration(weights, backend="triton")
            for x in (*results, *us, *gradients, *(t for part in estimates for t in part)):
                assert x.isfinite().all()
    finally:
        torch.use_deterministic_algorithms(False)


def test_opcheck():
    weights = [torch.randn(shape, device=DEVICE).requires_grad_() for shape in SHAPES[:3]]
    raw, scales = [w.detach() for w in weights], SCALES[:3]
    us, kind = [F.initial_vector(w) for w in raw], torch.float32
    spectral = (us, scales, kind, 10, 1e-3, "triton")
    _, _, saved = spectral_ops.spectral_normalize(raw, *spectral)
    grads = [torch.randn_like(w) for w in raw]
    for op, arguments in (
        (spectral_ops.spectral_normalize, (weights, *spectral)),
        (spectral_ops.spectral_normalize_backward, (grads, raw, saved, scales, "triton")),
        (spectral_ops.power_iteration, (raw, us, 2, "triton")),
        (frobenius_ops.frobenius_normalize, (weights, scales, kind, False, "triton")),
        (frobenius_ops.frobenius_normalize, (weights, scales, torch.bfloat16, True, "triton")),
        (frobenius_ops.frobenius_normalize_backward, (grads, raw, scales, True, "triton")),
    ):
        torch.library.opcheck(op, arguments)


def test_a_layer_holds_its_bound():
    layer = lnn.SpectralLinear(40, 36, k_coef_lip=1.3, eps_bjorck=None).to(DEVICE)
    x = torch.randn(4, 40, device=DEVICE)
    with lipkernels.use_backend("triton"):
        for context in (contextlib.nullcontext(), torch.autocast(DEVICE, dtype=torch.bfloat16)):
            with context:
                assert largest(layer.weight) <= 1.3
                layer(x).sum().backward()
    assert layer.raw_weight.grad.isfinite().all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_captured_in_a_graph():
    weights = [torch.randn(shape, device=DEVICE) for shape in [*SHAPES, (96, 200)]]

    def step():
        return [
            *F.spectral_normalize(weights, backend="triton")[0],
            *F.frobenius_normalize(weights, backend="triton"),
            *F.power_iteration(weights, n_iter=3, backend="triton")[0],
        ]

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for w in weights:
        w.copy_(torch.randn_like(w))
    expected = step()
    for _ in range(2):
        graph.replay()
        for x, y in zip(captured, expected, strict=True):
            assert torch.equal(x, y)
