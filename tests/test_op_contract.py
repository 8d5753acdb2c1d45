"""What every op keeps: inputs are not touched, outputs are owned, lists equal single calls."""

import math

import cases
import pytest
import torch
from cases import FLOATS, WEIGHT_OPS, by_dtype, on_backends

from lipkernels import functional as F
from lipkernels.kernels import avg_pooling as avg_pooling_ops
from lipkernels.kernels import bjorck as bjorck_ops
from lipkernels.kernels import frobenius as frobenius_ops
from lipkernels.kernels import polar as polar_ops
from lipkernels.kernels import pooling as pooling_ops
from lipkernels.kernels import sampling as sampling_ops
from lipkernels.kernels import sorting as sorting_ops
from lipkernels.kernels import spectral as spectral_ops

ALL_OPS = tuple(dict.fromkeys(case.op for case in cases.CASES))
POOLS = ("l2_norm_pool2d", "scaled_avg_pool2d")
DATA_OPS = ("space_to_depth", "depth_to_space", "group_sort", *POOLS)


def tensors_in(out):
    if isinstance(out, torch.Tensor):
        return [out]
    return [t for part in out for t in tensors_in(part)]


def weight_case(op, name="odd", layout="contiguous"):
    return cases.Case(op, name, cases.WEIGHT_SHAPES[name], layout)


def cotangent(out):
    return torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)


def gradient(case, x, **others):
    x = x.detach().clone().requires_grad_()
    out = case.result(x, **others)
    out.backward(cotangent(out))
    return x.grad


# ------------------------------------------------------------------------------ every case, once
@on_backends(*ALL_OPS)
def test_input_kept_and_output_owned(case, backend):
    x = case.input(torch.float32, device=cases.device_of(backend)).requires_grad_()
    before, version = x.detach().clone(), x._version
    # Its buffers take turns: the third step writes where the first one did.
    others = {"n_iter": 3} if case.op == "bjorck" else {}
    outs = tensors_in(case.call(x, backend=backend, **others))
    if case.op not in POOLS:  # which keep channels_last, as torch's pools do
        assert all(out.is_contiguous() for out in outs)
    result = outs[0]
    if result.requires_grad:
        result.sum().backward()
        assert x.grad.shape == x.shape and x.grad.dtype == x.dtype
        outs.append(x.grad)
    assert torch.equal(x.detach(), before)
    assert x._version == version
    for i, out in enumerate(outs):
        if out.numel() == 0:
            continue
        others = [x.detach(), *(o for j, o in enumerate(outs) if j != i)]
        storages = [t.untyped_storage().data_ptr() for t in others if t.numel()]
        assert out.untyped_storage().data_ptr() not in storages


@pytest.mark.parametrize("op", [op for op in ALL_OPS if op != "power_iteration"])
def test_layout_changes_neither_value_nor_gradient(op):
    compared = 0
    for case in cases.of(op):
        if case.layout in ("contiguous", "expanded"):
            continue
        x = case.input(torch.float64)
        assert not x.is_contiguous() or case.layout == "offset" or 1 in x.shape
        torch.testing.assert_close(case.result(x), case.result(x.contiguous()))
        torch.testing.assert_close(gradient(case, x), gradient(case, x.contiguous()))
        compared += 1
    assert compared >= 6


@pytest.mark.parametrize("op", [op for op in ALL_OPS if op != "power_iteration"])
def test_uninitialized_memory_is_not_read(op):
    torch.use_deterministic_algorithms(True)  # fills torch.empty with NaN
    try:
        for case in cases.of(op):
            x = case.input(torch.float64)
            assert case.result(x).isfinite().all(), str(case)
            assert gradient(case, x).isfinite().all(), str(case)
    finally:
        torch.use_deterministic_algorithms(False)


# ---------------------------------------------------------------------------------- lists
LIST = ("wide", "tall", "one", "batch", "no_rows", "conv", "row", "batch_deep", "square")


@pytest.mark.parametrize("op", WEIGHT_OPS)
@by_dtype()
def test_a_list_is_bitwise_its_members(op, dtype):
    members = [weight_case(op, name) for name in LIST]
    scales = [0.5 + i for i in range(len(members))]
    together = [case.input(dtype).requires_grad_() for case in members]
    alone = [case.input(dtype).requires_grad_() for case in members]
    results = members[0].result(together, scale=scales)
    assert isinstance(results, list) and len(results) == len(members)
    singles = [c.result(w, scale=s) for c, w, s in zip(members, alone, scales, strict=True)]
    for result, single, w in zip(results, singles, together, strict=True):
        assert result.shape == w.shape and result.dtype == dtype
        assert torch.equal(result, single)
    grads = [cotangent(r) for r in results]
    torch.autograd.backward(results, grads)
    torch.autograd.backward(singles, grads)
    for a, b in zip(together, alone, strict=True):
        assert torch.equal(a.grad, b.grad)
        assert a.grad.any() or math.prod(a.shape) < 2


@pytest.mark.parametrize("op", WEIGHT_OPS)
def test_vectors_of_a_list_are_those_of_its_members(op):
    if op in ("polar_factor", "frobenius_normalize"):
        return
    members = [weight_case(op, name) for name in ("wide", "tall", "batch", "no_columns")]
    weights = [case.input(torch.float64) for case in members]
    starts = [F.initial_vector(w).flip(-1) for w in weights]
    _, together = members[0].call(weights, u=starts)
    alone = [c.call(w, u=u)[1] for c, w, u in zip(members, weights, starts, strict=True)]
    for u, v, w in zip(together, alone, weights, strict=True):
        assert torch.equal(u, v) and u.shape == w.shape[:-1]


def test_power_iteration_of_a_list_is_its_members():
    members = [weight_case("power_iteration", name) for name in ("wide", "tall", "batch", "one")]
    weights = [case.input(torch.float64) for case in members]
    together = F.power_iteration(weights)
    alone = [F.power_iteration(w) for w in weights]
    for i, single in enumerate(alone):
        for part, expected in zip(together, single, strict=True):
            assert torch.equal(part[i], expected)


@pytest.mark.parametrize("op", WEIGHT_OPS)
def test_mixed_dtypes_in_a_list(op):
    case = weight_case(op)
    weights = [case.input(dtype).requires_grad_() for dtype in (*FLOATS, *FLOATS)]
    results = case.result(weights)
    assert [r.dtype for r in results] == [*FLOATS, *FLOATS]
    for result, w in zip(results, weights, strict=True):
        assert torch.equal(result, case.result(w))
    sum(r.double().sum() for r in results).backward()
    assert [w.grad.dtype for w in weights] == [*FLOATS, *FLOATS]
    for w in weights:
        single = w.detach().clone().requires_grad_()
        case.result(single).double().sum().backward()
        assert torch.equal(w.grad, single.grad)


@pytest.mark.parametrize("op", WEIGHT_OPS)
@by_dtype()
def test_dtype_argument_rounds_the_result_alone(op, dtype):
    case = weight_case(op)
    for source in FLOATS:
        w = case.input(source).requires_grad_()
        result = case.result(w, dtype=dtype)
        assert result.dtype == dtype
        # Never wider than what it was computed in: float32 for a weight narrower than float64.
        exact = case.result(w, dtype=torch.float64)
        limit = 1e-6 if dtype in (torch.float64, torch.float32) else torch.finfo(dtype).eps
        assert (result.double() - exact).abs().max() <= limit
        result.double().square().sum().backward()
        assert w.grad.dtype == source


@pytest.mark.parametrize("op", [*WEIGHT_OPS, "power_iteration"])
def test_empty_list(op):
    out = getattr(F, op)([])
    expected = {"bjorck": 2, "spectral_normalize": 2, "power_iteration": 3}.get(op, 0)
    if expected:
        assert isinstance(out, tuple) and [list(part) for part in out] == [[]] * expected
    else:
        assert out == []


@pytest.mark.parametrize("op", WEIGHT_OPS)
def test_a_tuple_is_a_list(op):
    case = weight_case(op)
    w = case.input()
    (result,) = case.result((w,))
    assert torch.equal(result, case.result(w))


@pytest.mark.parametrize("op", WEIGHT_OPS)
def test_a_member_that_no_loss_uses_has_gradient_zero(op):
    case = weight_case(op)
    used, unused, constant = (
        case.input().requires_grad_(),
        case.input().requires_grad_(),
        case.input(),
    )
    results = case.result([used, unused, constant])
    results[0].square().sum().backward()
    single = case.input().requires_grad_()
    case.result(single).square().sum().backward()
    assert torch.equal(used.grad, single.grad)
    assert unused.grad is None or not unused.grad.any()
    assert constant.grad is None


@pytest.mark.parametrize("op", WEIGHT_OPS)
@by_dtype((torch.float64, torch.float32))
def test_scale_multiplies_value_and_gradient(op, dtype):
    case = weight_case(op)
    w = case.input(dtype)
    torch.testing.assert_close(case.result(w, scale=4.0), 4 * case.result(w), rtol=1e-6, atol=0)
    torch.testing.assert_close(
        gradient(case, w, scale=4.0), 4 * gradient(case, w), rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("op", WEIGHT_OPS)
@pytest.mark.parametrize("factor", [2.0**-100, 2.0**100])
def test_value_does_not_depend_on_the_weight_magnitude(op, factor):
    case = weight_case(op)
    w = case.input(torch.float32)
    assert torch.equal(case.result(w * factor), case.result(w))


@pytest.mark.parametrize("op", WEIGHT_OPS)
@pytest.mark.parametrize("name", ["wide", "tall", "square", "batch", "row"])
def test_zero_weight_stays_zero(op, name):
    case = weight_case(op, name)
    w = torch.zeros_like(case.input(torch.float32)).requires_grad_()
    result = case.result(w)
    assert not result.any()
    result.sum().backward()
    assert w.grad.isfinite().all()


# -------------------------------------------------------------------------------- NaN, infinity
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("op", WEIGHT_OPS)
@by_dtype()
def test_bad_entries_give_nan_and_do_not_raise(op, dtype, bad):
    for name in ("wide", "tall", "square", "row"):
        case = weight_case(op, name)
        weights = [case.input(dtype), case.input(dtype), case.input(dtype)]
        weights[1][0, 0] = bad
        good, spoiled, other = case.result([w.requires_grad_() for w in weights])
        assert spoiled.isnan().all()
        assert torch.equal(good, case.result(weights[0])) and torch.equal(other, good)
        (good.double().sum() + spoiled.double().sum()).backward()
        assert weights[0].grad.isfinite().all()
        assert weights[1].grad.isnan().any()


def test_bad_entries_spoil_one_row_alone_where_rows_are_normalized():
    w = weight_case("frobenius_normalize").input()
    w[2, 0] = math.nan
    result = F.frobenius_normalize(w, per_row=True)
    assert result[2].isnan().all()
    assert result.isnan().sum() == w.shape[1]


def test_power_iteration_of_nan_is_nan():
    w = weight_case("power_iteration").input()
    w[0, 0] = math.nan
    assert F.power_iteration(w)[0].isnan()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("op", [*WEIGHT_OPS, "power_iteration"])
def test_check_raises_and_names_the_weight(op, bad):
    case = weight_case(op)
    weights = [case.input() for _ in range(4)]
    weights[2][1, 1] = bad
    weights[2][0, 3] = bad
    with pytest.raises(ValueError, match=r"weight 2: expected finite entries, got 2 NaN or inf"):
        case.call(weights, check=True)
    with pytest.raises(ValueError, match=r"weight 0: expected finite entries"):
        case.call(weights[2], check=True)
    case.call(weights[:2], check=True)


# ------------------------------------------------------------------------------ twice derivable
@pytest.mark.parametrize("op", WEIGHT_OPS)
def test_second_derivative_of_a_weight_op_raises(op):
    case = weight_case(op, "wide")
    w = case.input().requires_grad_()
    (first,) = torch.autograd.grad(case.result(w).pow(3).sum(), w, create_graph=True)
    with pytest.raises(RuntimeError, match=r"no autograd formula|differentiate twice"):
        first.sum().backward()


def test_what_an_op_keeps_for_its_backward_is_not_differentiable():
    w = [weight_case("polar_factor").input().requires_grad_()]
    u, scales = [F.initial_vector(w[0].detach())], [1.0]
    spectral = (w, u, scales, torch.float64, 10, 1e-3)
    for results, *others in (
        polar_ops.polar_factor_op(w, scales, torch.float64, "high", "reference"),
        spectral_ops.spectral_normalize(*spectral, "reference"),
        bjorck_ops.bjorck(*spectral, 0.5, 3, 0.0, "reference"),
    ):
        assert results[0].requires_grad
        assert not any(t.requires_grad for t in tensors_in(others))
    _, index = sorting_ops.group_sort_op(w[0], 1, 0, "reference")
    assert not index.requires_grad


@pytest.mark.parametrize("op", WEIGHT_OPS)
def test_autocast_does_not_reach_the_weight(op):
    case = weight_case(op)
    w = case.input(torch.float32).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = case.result(w)
        (inside_gradient,) = torch.autograd.grad(inside.square().sum(), w)
    outside = case.result(w)
    (outside_gradient,) = torch.autograd.grad(outside.square().sum(), w)
    assert torch.equal(inside, outside)
    torch.testing.assert_close(inside_gradient, outside_gradient, rtol=1e-5, atol=1e-6)


# ----------------------------------------------------------------------------------- opcheck
def weights_for_opcheck():
    names = [("wide", "contiguous"), ("tall", "transposed"), ("batch", "contiguous")]
    names += [("batch_deep", "channels_last"), ("square", "offset")]
    return [weight_case("polar_factor", *n).input(torch.float32).requires_grad_() for n in names]


def detached(tensors):
    return [t.detach() for t in tensors]


def weight_op_calls():
    kind = torch.float32
    weights = weights_for_opcheck()
    raw, n = detached(weights), len(weights)
    us, scales = [F.initial_vector(w) for w in raw], [1.0 + i for i in range(n)]
    results, polar_saved = polar_ops.polar_factor_op(raw, scales, kind, "high", "reference")
    spectral = (us, scales, kind, 10, 1e-3)
    bjorck = (*spectral, 0.5, 3, 0.0)
    _, _, triplets = spectral_ops.spectral_normalize(raw, *spectral, "reference")
    grads = [torch.ones_like(w) for w in raw]
    yield polar_ops.polar_factor_op, (weights, scales, kind, "high", "reference")
    yield polar_ops.polar_factor_op, (weights, scales, torch.bfloat16, "fast", "reference")
    yield (
        polar_ops.polar_factor_backward,
        (grads, raw, results, polar_saved, scales, "high", "reference"),
    )
    yield spectral_ops.spectral_normalize, (weights, *spectral, "reference")
    yield (
        spectral_ops.spectral_normalize_backward,
        (grads, raw, triplets, scales, "reference"),
    )
    yield spectral_ops.power_iteration, (raw, us, 5, "reference")
    yield bjorck_ops.bjorck, (weights, *bjorck, "reference")
    yield (
        bjorck_ops.bjorck_backward,
        (grads, raw, triplets, scales, 0.5, 3, 0.0, "reference"),
    )
    for per_row in (False, True):
        yield frobenius_ops.frobenius_normalize, (weights, scales, kind, per_row, "reference")
        yield (
            frobenius_ops.frobenius_normalize_backward,
            (grads, raw, scales, per_row, "reference"),
        )


def data_op_calls():
    x = torch.randn(2, 4, 6, 8, requires_grad=True)
    last = torch.randn(2, 4, 6, 8).contiguous(memory_format=torch.channels_last).requires_grad_()
    for image in (x, last):
        for mode in ("CRD", "DCR"):
            arguments = (2, 1, mode, False, 0.5, "reference")
            yield sampling_ops.space_to_depth, (image, *arguments)
            yield sampling_ops.depth_to_space, (image, *arguments)
        yield sampling_ops.space_to_depth, (image, 2, 3, "CRD", True, 1.0, "reference")
        yield sampling_ops.depth_to_space, (image, 1, 1, "CRD", True, 1.0, "reference")
        yield sorting_ops.group_sort_op, (image, 2, 1, "reference")
        index = sorting_ops.group_sort_op(image.detach(), 4, 3, "reference")[1]
        yield sorting_ops.gather_groups, (image, index, 4, 3, "reference")
        yield sorting_ops.scatter_groups, (image, index, 4, 3, "reference")
        pool = ([2, 3], [2, 2], [1, 0], True, 1e-6, "reference")
        yield pooling_ops.l2_norm_pool2d, (image, *pool)
        pooled = pooling_ops.l2_norm_pool2d(image.detach(), *pool)
        backward = (torch.ones_like(pooled), image.detach(), pooled, *pool)
        yield pooling_ops.l2_norm_pool2d_backward, backward
        mean = ([2, 3], [2, 2], [1, 0], True, 1.5, "reference")
        yield avg_pooling_ops.scaled_avg_pool2d, (image, *mean)
        shape = (list(image.shape), image is last)
        backward = (torch.ones_like(pooled).requires_grad_(), *shape, *mean)
        yield avg_pooling_ops.scaled_avg_pool2d_backward, backward


OPCHECKS = [*weight_op_calls(), *data_op_calls()]


@pytest.mark.parametrize(
    ("op", "arguments"), OPCHECKS, ids=lambda a: getattr(a, "_name", None) or "call"
)
def test_opcheck(op, arguments):
    torch.library.opcheck(op, arguments)


def test_every_registered_op_is_checked():
    registered = {
        name.removeprefix("lipkernels::")
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("lipkernels::")
    }
    assert registered == {op._name for op, _ in OPCHECKS}
