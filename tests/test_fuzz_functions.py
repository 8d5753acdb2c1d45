"""Random calls of functional, metrics, certify and backends: a result that holds, or a refusal."""

import math

import torch
from fuzzing import (
    FLOATS,
    agree,
    call,
    constrained,
    contiguous,
    dtypes,
    finite,
    matrices,
    numbers,
    same,
    scales,
    shapes,
    tensors,
    weights,
)
from hypothesis import assume, given
from hypothesis import strategies as st
from operator_norm import is_upper_bound, operator_norm

from lipkernels import (
    BackendUnavailableError,
    backends,
    certify,
    get_polar_precision,
    metrics,
    polar_precision,
    set_polar_precision,
    use_backend,
)
from lipkernels import functional as F

MODERATE = st.sampled_from(("normal", "zero", "constant", "ties"))
small = st.integers(-2, 6)
pairs = small | st.tuples(small, small) | st.lists(small, max_size=3) | st.just("ab")


def assert_one_lipschitz(function, x, seed, k=1.0):
    """In float64, for values that float64 does not round noticeably."""
    if x.dtype != torch.float64 or not finite(x) or x.numel() == 0 or x.abs().max() > 1e100:
        return
    step = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed), dtype=x.dtype)
    y = x + step
    gap = torch.linalg.vector_norm(function(x) - function(y))
    size = max(1.0, float(x.abs().max()))
    assert float(gap) <= k * float(torch.linalg.vector_norm(x - y)) + 1e-12 * size * x.numel()


# ------------------------------------------------------------------------------------- on data
@given(tensors(), st.none() | small | st.just(2.0), small, st.integers(0, 99))
def test_group_sort(x, size, dim, seed):
    y = agree("group_sort", F.group_sort, x, size, dim)
    if y is None:
        return
    assert y.shape == x.shape and y.dtype == x.dtype
    if x.is_floating_point() and x.dtype in FLOATS and finite(x):
        assert same(y.sort(dim).values if x.numel() else y, x.sort(dim).values if x.numel() else y)
    assert_one_lipschitz(lambda v: F.group_sort(v, size, dim), x, seed)


@given(tensors(), small, st.integers(0, 99))
def test_max_min(x, dim, seed):
    y = agree("max_min", F.max_min, x, dim)
    if y is not None:
        assert y.shape[dim] == 2 * x.shape[dim] and y.dtype == x.dtype
        assert_one_lipschitz(lambda v: F.max_min(v, dim), x, seed)


@given(tensors(), tensors(shape=shapes(0, 2, 3)), small, st.booleans(), st.integers(0, 99))
def test_householder(x, theta, dim, fits, seed):
    if fits and x.dim():
        theta = torch.linspace(
            -9,
            9,
            x.shape[dim % x.dim()] // 2,
            dtype=x.real.dtype if x.is_complex() else torch.float32,
        )
    y = agree("householder", F.householder, x, theta, dim)
    if y is not None:
        assert y.shape == x.shape and y.dtype == x.dtype
        if finite(theta) and theta.dtype == torch.float64:
            assert_one_lipschitz(lambda v: F.householder(v, theta, dim), x, seed, 1 + 1e-12)


@given(tensors(), tensors(shape=shapes(0, 2, 3)), st.booleans(), st.integers(0, 99))
def test_lprelu(x, slope, fits, seed):
    if fits:
        slope = torch.linspace(-3, 3, x.shape[1] if x.dim() > 1 else 1)
    y = agree("lprelu", F.lprelu, x, slope)
    if y is not None:
        assert y.shape == x.shape and y.dtype == x.dtype
        if finite(slope):
            assert_one_lipschitz(lambda v: F.lprelu(v, slope), x, seed)


@given(tensors(), st.lists(st.integers(-1, 4) | st.just(1.0), max_size=7).map(tuple))
def test_symmetric_pad(x, pad):
    y = agree("symmetric_pad", F.symmetric_pad, x, pad)
    if y is not None:
        for i in range(len(pad) // 2):
            assert y.shape[-1 - i] == x.shape[-1 - i] + pad[2 * i] + pad[2 * i + 1]


images = st.tuples(st.integers(0, 3), st.integers(0, 8), st.integers(0, 7), st.integers(0, 7))


@given(
    tensors(shape=images | shapes()),
    pairs,
    st.none() | pairs,
    pairs,
    st.booleans(),
    st.sampled_from((1e-6, 0.0, 1, -1.0, math.nan, "x")),
)
def test_l2_norm_pool2d(x, kernel, stride, padding, ceil, eps):
    y = agree("l2_norm_pool2d", F.l2_norm_pool2d, x, kernel, stride, padding, ceil, eps=eps)
    if y is not None and finite(x) and x.numel() and x.abs().max() < 100:
        assert finite(y) and bool((y >= 0).all()) and y.dtype == x.dtype
        z = x.detach().clone().requires_grad_()
        F.l2_norm_pool2d(z, kernel, stride, padding, ceil, eps=max(eps, 1e-6)).sum().backward()
        assert finite(z.grad)


@given(
    tensors(shape=images | shapes()),
    st.none() | pairs,
    st.none() | pairs,
    pairs,
    st.booleans(),
    numbers,
)
def test_scaled_avg_pool2d(x, kernel, stride, padding, ceil, scale):
    arguments = (kernel, stride, padding, ceil)
    y = agree("scaled_avg_pool2d", F.scaled_avg_pool2d, x, *arguments, scale=scale)
    if y is not None and finite(x) and x.numel() and x.abs().max() < 100 and 1e-3 < scale < 100:
        assert finite(y) and y.dtype == x.dtype
        z = x.detach().clone().requires_grad_()
        F.scaled_avg_pool2d(z, *arguments, scale=scale).sum().backward()
        assert finite(z.grad)


modes = st.sampled_from(("CRD", "DCR", "crd", None))
formats = st.sampled_from(("channels_first", "channels_last", "NCHW"))


@given(tensors(shape=images | shapes()), pairs, modes, formats, numbers)
def test_sampling(x, block, mode, data_format, scale):
    options = {"mode": mode, "data_format": data_format}
    y = agree("space_to_depth", F.space_to_depth, x, block, **options)
    if y is not None:
        assert y.numel() == x.numel() and same(F.depth_to_space(y, block, **options), x)
    agree("space_to_depth", F.space_to_depth, x, block, **options, scale=scale)
    y = agree("depth_to_space", F.depth_to_space, x, block, **options)
    if y is not None:
        assert y.numel() == x.numel() and same(F.space_to_depth(y, block, **options), x)


# ----------------------------------------------------------------------------------- on weights
def checked_weights(name, function, weight, scale, factor=lambda w: 1.0, **options):
    """Bound, shape, dtype, NaN for NaN, finite for finite; the gradient is finite too."""
    got = agree(name, function, weight, scale, **options)
    if got is None:
        return
    for w, k in constrained(name, got, weight, scale, factor, options.get("dtype")):
        # Beyond, the gradient of the squares times the scale overflows by itself.
        if finite(w) and w.numel() and 1e-3 <= k <= 1e3:
            leaf = w.detach().clone().requires_grad_()
            function(leaf, k, **options).double().square().sum().backward()
            assert finite(leaf.grad), f"{name}: gradient {leaf.grad}"


options = st.fixed_dictionaries(
    {"check": st.booleans()}, optional={"dtype": st.sampled_from((*FLOATS, torch.int32))}
)


@given(weights, scales, options)
def test_polar_factor(weight, scale, options):
    checked_weights("polar_factor", F.polar_factor, weight, scale, **options)


@given(weights, scales, options, st.booleans())
def test_frobenius_normalize(weight, scale, options, per_row):
    checked_weights(
        "frobenius_normalize",
        F.frobenius_normalize,
        weight,
        scale,
        lambda m: math.sqrt(m.shape[0]) * (1 + 1e-12) if per_row else 1.0,
        per_row=per_row,
        **options,
    )


counts = st.sampled_from((1, 3, 0, 15, -1, 2.0, True))
tolerances = st.sampled_from((1e-3, 0.0, 1, -1.0, math.nan))


@given(weights, scales, options, counts, tolerances)
def test_spectral_normalize(weight, scale, options, n, tol):
    def function(w, k, **others):
        return F.spectral_normalize(w, k, n_iter=n, tol=tol, **others)[0]

    checked_weights("spectral_normalize", function, weight, scale, **options)


@given(weights, scales, options, counts, tolerances, st.sampled_from((0.5, 0.1, 0, 0.6, -1.0)))
def test_bjorck(weight, scale, options, n, tol, beta):
    def function(w, k, **others):
        return F.bjorck(w, k, beta=beta, n_iter=n, tol=tol, **others)[0]

    checked_weights("bjorck", function, weight, scale, **options)


@given(weights, counts, st.none() | tensors(shape=shapes(0, 2, 7)))
def test_power_iteration(weight, n, u):
    got = call("power_iteration", F.power_iteration, weight, u, n_iter=n)
    if got is None or isinstance(weight, list):
        return
    sigma, left, right = got[0]
    assert left.shape == weight.shape[:-1]
    assert right.shape == (*weight.shape[:-2], weight.shape[-1])
    if finite(weight) and (u is None or finite(u)):
        assert finite(left) and finite(right)
        eps = 1e-5 if weight.dtype != torch.float64 else 1e-12
        for s, w in zip(sigma.reshape(-1), weight.reshape(-1, *weight.shape[-2:]), strict=True):
            assert float(s) <= operator_norm(w) * (1 + eps) + 1e-300


@given(matrices)
def test_initial_vector(weight):
    got = call("initial_vector", F.initial_vector, weight)
    if got is not None:
        assert got[0].shape == weight.shape[:-1] and bool((got[0] != 0).all())


# -------------------------------------------------------------------------------------- metrics
logits = tensors(shape=shapes(2, 2, 5) | shapes(0, 3, 4))
labels = tensors(shape=shapes(1, 1, 5), dtype=st.sampled_from((torch.int64, torch.bool)) | dtypes())
bounds = numbers | st.just(torch.tensor(2.0)) | st.just(certify.LipschitzBound(1.5))
errors = st.just(0.0) | numbers | tensors(shape=shapes(0, 1, 5))
radii = (
    st.lists(numbers, max_size=3) | tensors(shape=shapes(0, 2, 3)) | st.sampled_from((1.0, "ab"))
)


def fitting(f, y, fits):
    if not (fits and f.dim() == 2 and f.shape[1]):
        return y
    return torch.arange(f.shape[0]) % (2 if f.shape[1] == 1 else f.shape[1])


@given(logits, labels, bounds, errors, radii, st.booleans())
def test_metrics(f, y, bound, error, rho, fits):
    y = fitting(f, y, fits)
    radius = call("certified_radius", metrics.certified_radius, f, bound, error)
    if radius is not None:
        assert radius[0].shape == f.shape[:1] and finite(radius[0]) and bool((radius[0] >= 0).all())
    clean = call("clean_accuracy", metrics.clean_accuracy, f, y)
    accuracy = call("certified_accuracy", metrics.certified_accuracy, f, y, bound, rho, error)
    if accuracy is not None and f.shape[0]:
        assert clean is not None and radius is not None
        assert bool((accuracy[0] <= clean[0]).all()) and bool((accuracy[0] >= 0).all())


# -------------------------------------------------------------------------------------- certify
@given(matrices)
def test_spectral_norm_bound(matrix):
    got = call("spectral_norm_bound", certify.spectral_norm_bound, matrix)
    if got is None:
        return
    again = certify.spectral_norm_bound(contiguous(matrix))
    assert math.isclose(got[0], again, rel_tol=1e-8) or got[0] == again
    if not finite(matrix):
        assert got[0] == math.inf
    elif matrix.numel():
        assert is_upper_bound(matrix, got[0])


whole = st.integers(-1, 4)
padding_modes = st.sampled_from(("zeros", "reflect", "replicate", "circular", "symmetric", "same"))


@given(whole, whole, whole, whole, whole, padding_modes, st.none() | st.integers(-1, 12))
def test_window_counts(kernel, stride, left, right, dilation, mode, size):
    one = (kernel, stride, left, right, dilation, mode, size)
    got = call("max_reads", certify.max_reads, *one)
    factor = call(
        "operator_factor",
        certify.operator_factor,
        (kernel,),
        (stride,),
        ((left, right),),
        (dilation,),
        mode,
        None if size is None else (size,),
    )
    assert (got is None) == (factor is None)
    if got is not None:
        assert got[0] >= 0 and factor[0] ** 2 >= got[0] * (1 - 1e-15)
        if size is not None and mode != "zeros":
            assert got[0] <= certify.max_reads(kernel, stride, left, right, dilation, mode)


# ------------------------------------------------------------------------------------- backends
names = st.sampled_from(("auto", "reference", "triton", "cuda", "", "Triton", None, 3, ["auto"]))


@given(names, st.sampled_from(("reference", "auto", "gpu", 1.0)))
def test_backends(name, inner):
    assume(name is not None)

    def run():
        with use_backend(name):
            return F.polar_factor(torch.eye(2), backend=inner)

    try:
        call("use_backend", run)
    except BackendUnavailableError as error:
        assert name in ("triton", "cuda") and "cannot run" in str(error)
    assert backends.resolve("op", {"reference": None}, torch.device("cpu")) == "reference"


@given(st.sampled_from(("high", "fast", "highest", "", None, 3, ["high"])))
def test_precisions(name):
    def run():
        with polar_precision(name):
            set_polar_precision(get_polar_precision())
            return F.polar_factor(torch.eye(2), precision=name)

    call("polar_precision", run)
    assert get_polar_precision() == "high"
