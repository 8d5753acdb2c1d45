"""No convolution exceeds its k, on any image: dense matrices by definition, float64 SVD.

Each geometry is tried with kernels whose matrix is square orthogonal, where the bound is attained
on some image size, and with worst cases of other kinds (constant, one tap, random).
"""

import itertools
import random

import pytest
import torch
from bad_weights import BAD_WEIGHTS, bad_weight
from constrained_layers import FORMATS, SPECTRAL, set_raw, weight_in
from operator_norm import (
    assert_within,
    convolution_matrix,
    excess,
    matrix_of,
    operator_norm,
    transposed_convolution_matrix,
)
from tolerances import ATTAINED, CERTIFIED, LAYER_OUTPUT
from torch import nn

import lipkernels.nn as lnn
from lipkernels.certify import lipschitz_bound, max_reads

MODES = ("zeros", "reflect", "replicate", "circular", "symmetric")
SPECTRAL_CONV = {1: lnn.SpectralConv1d, 2: lnn.SpectralConv2d, 3: lnn.SpectralConv3d}
FROBENIUS_CONV = {1: lnn.FrobeniusConv1d, 2: lnn.FrobeniusConv2d, 3: lnn.FrobeniusConv3d}
TRANSPOSED = {
    1: lnn.SpectralConvTranspose1d,
    2: lnn.SpectralConvTranspose2d,
    3: lnn.SpectralConvTranspose3d,
}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


# ----------------------------------------------------------------------------------- geometry
def allowed(size, padding, mode):
    if mode == "reflect":
        return padding < size
    return mode in ("zeros", "replicate") or padding <= size


def fits(size, kernel, padding, dilation):
    return size + 2 * padding >= dilation * (kernel - 1) + 1


def pads_of(layer):
    """(left, right) of each dimension as a user reads them off the constructor's arguments."""
    kernel = layer.raw_weight.shape[2:]
    if layer.padding == "valid":
        return [(0, 0)] * len(kernel)
    if layer.padding == "same":
        totals = [d * (k - 1) for d, k in zip(layer.dilation, kernel, strict=True)]
        return [(total // 2, total - total // 2) for total in totals]
    return [(p, p) for p in layer.padding]


def dense(layer, size, weight=None):
    """The layer's exact matrix on images of ``size``, from its weight as stored."""
    weight = layer.weight.detach() if weight is None else weight
    geometry = (layer.stride, pads_of(layer), layer.dilation, layer.groups, layer.padding_mode)
    return convolution_matrix(weight, size, *geometry)


def dense_transposed(layer, size, weight=None):
    weight = layer.weight.detach() if weight is None else weight
    return transposed_convolution_matrix(
        weight,
        size,
        layer.stride,
        layer.padding,
        layer.output_padding,
        layer.dilation,
        layer.groups,
    )


def assert_forward_is(layer, matrix, size):
    """The layer computes this matrix (plus its bias, which is zero here) and not something else."""
    x = torch.randn(2, layer.in_channels, *size, dtype=layer.raw_weight.dtype)
    y = layer(x).detach().double().flatten(1)
    expected = x.double().flatten(1) @ matrix.T
    atol = LAYER_OUTPUT[layer.raw_weight.dtype] * max(1.0, float(expected.abs().max()))
    torch.testing.assert_close(y, expected, rtol=0, atol=atol)


# -------------------------------------------------------------------- one dimension, all of them
GEOMETRIES_1D = tuple(
    itertools.product(range(1, 6), range(1, 4), range(1, 4), range(5))
)  # kernel, stride, dilation, padding
SIZES_1D = (1, 2, 3, 5, 8, 11)


def sizes_1d(kernel, dilation, padding, mode):
    return [n for n in SIZES_1D if allowed(n, padding, mode) and fits(n, kernel, padding, dilation)]


@pytest.mark.parametrize("mode", MODES)
def test_square_orthogonal_kernels_1d(mode):
    """225 geometries on six sizes; and where the largest count occurs the bound is attained."""
    failures = []
    n_attained = 0
    for kernel, stride, dilation, padding in GEOMETRIES_1D:
        k = (1.0, 0.5, 2.0)[(kernel + stride) % 3]
        layer = lnn.SpectralConv1d(
            1,
            kernel,
            kernel,
            stride,
            padding,
            dilation,
            bias=False,
            padding_mode=mode,
            k_coef_lip=k,
        )
        most = max_reads(kernel, stride, padding, padding, dilation, mode)
        for size in sizes_1d(kernel, dilation, padding, mode):
            matrix = dense(layer, (size,))
            assert_forward_is(layer, matrix, (size,))
            over = excess(matrix, k)
            if over:
                failures.append((kernel, stride, dilation, padding, size, over))
            if max_reads(kernel, stride, padding, padding, dilation, mode, size) == most:
                assert operator_norm(matrix) >= k * (1 - ATTAINED[torch.float32])
                n_attained += 1
    assert not failures
    assert n_attained > 200


def bad_kernels(shape):
    yield torch.ones(shape)
    tap = torch.zeros(shape)
    tap[0, 0, 0] = 3.0
    yield tap
    yield torch.randn(shape)


@pytest.mark.parametrize("kind", ["polar", "spectral", "bjorck_1_step", "frobenius"])
@pytest.mark.parametrize("mode", MODES)
def test_bad_kernels_1d(mode, kind):
    failures = []
    for case, (kernel, stride, dilation, padding) in enumerate(GEOMETRIES_1D):
        if (case + MODES.index(mode)) % 3:  # a third of them for each kind
            continue
        geometry = (kernel, stride, padding, dilation)
        if kind == "frobenius":
            layer = lnn.FrobeniusConv1d(2, 2, *geometry, padding_mode=mode)
        else:
            layer = lnn.SpectralConv1d(2, 2, *geometry, padding_mode=mode, **SPECTRAL[kind])
        for weight in bad_kernels((2, 2, kernel)):
            set_raw(layer, weight)
            for size in sizes_1d(kernel, dilation, padding, mode)[-3:]:
                over = excess(dense(layer, (size,)), 1.0)
                if over:
                    failures.append((geometry, size, over))
    assert not failures


@pytest.mark.parametrize("mode", MODES)
def test_input_size_is_sound_and_tight(mode):
    """The factor for one image size: attained by a square orthogonal kernel on that size."""
    n_tighter = 0
    for kernel, stride, dilation, padding in GEOMETRIES_1D[::2]:
        for size in sizes_1d(kernel, dilation, padding, mode)[:3]:
            layer = lnn.SpectralConv1d(
                1, kernel, kernel, stride, padding, dilation, padding_mode=mode, input_size=size
            )
            matrix = dense(layer, (size,))
            assert_within(matrix, 1.0, layer)
            if max_reads(kernel, stride, padding, padding, dilation, mode, size) == 0:
                assert not matrix.any()  # the taps meet nothing but padding
                continue
            assert operator_norm(matrix) >= 1 - ATTAINED[torch.float32], layer
            with pytest.raises(ValueError, match=r"expected the spatial size"):
                layer(torch.zeros(1, 1, size + 1))
            anywhere = lnn.SpectralConv1d(
                1, kernel, kernel, stride, padding, dilation, padding_mode=mode
            )
            n_tighter += layer.operator_factor() < anywhere.operator_factor()
    assert n_tighter > 20


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("mode", MODES)
def test_same_padding(mode):
    failures = []
    for kernel, dilation in itertools.product(range(1, 6), range(1, 4)):
        for known in (False, True):
            for size in (1, 2, 4, 7, 9):
                if not allowed(size, dilation * (kernel - 1) - dilation * (kernel - 1) // 2, mode):
                    continue
                layer = lnn.SpectralConv1d(
                    1,
                    kernel,
                    kernel,
                    padding="same",
                    dilation=dilation,
                    padding_mode=mode,
                    bias=False,
                    input_size=size if known else None,
                )
                matrix = dense(layer, (size,))
                assert_forward_is(layer, matrix, (size,))
                if excess(matrix, 1.0):
                    failures.append((kernel, dilation, size, known))
    assert not failures


def test_valid_padding():
    layer = lnn.SpectralConv1d(2, 3, 3, padding="valid", bias=False)
    matrix = dense(layer, (6,))
    assert_forward_is(layer, matrix, (6,))
    assert_within(matrix, 1.0)


# ----------------------------------------------------------------------------- two and three dims
def random_geometries(n_dims, n, seed):
    """Random geometries, uneven in their dimensions, with an image on which the padding works."""
    rng = random.Random(seed)
    found = []
    while len(found) < n:
        mode = rng.choice(MODES)
        kernel = tuple(rng.randint(1, 3 if n_dims == 2 else 2) for _ in range(n_dims))
        stride = tuple(rng.randint(1, 3) for _ in range(n_dims))
        dilation = tuple(rng.randint(1, 3 if n_dims == 2 else 2) for _ in range(n_dims))
        padding = tuple(rng.randint(0, 3 if n_dims == 2 else 1) for _ in range(n_dims))
        size = tuple(rng.randint(1, 5 if n_dims == 2 else 3) for _ in range(n_dims))
        groups = rng.choice((1, 1, 2))
        channels = (groups, groups * rng.randint(1, 3))
        if rng.random() < 0.3:
            channels = (2 * groups, groups)
        ok = all(
            allowed(s, p, mode) and fits(s, k, p, d)
            for s, p, k, d in zip(size, padding, kernel, dilation, strict=True)
        )
        if ok:
            found.append((mode, channels, kernel, stride, padding, dilation, groups, size))
    return found


@pytest.mark.parametrize("kind", ["polar", "spectral", "frobenius"])
@pytest.mark.parametrize(("n_dims", "n"), [(2, 120), (3, 50)])
def test_many_dimensions(n_dims, n, kind):
    failures = []
    for case, geometry in enumerate(random_geometries(n_dims, n, seed=len(kind))):
        mode, (c_in, c_out), kernel, stride, padding, dilation, groups, size = geometry
        k = (1.0, 3.0, 0.2)[case % 3]
        others = {"bias": False, "padding_mode": mode, "k_coef_lip": k}
        if case % 4 == 0:
            others["input_size"] = size
        arguments = (c_in, c_out, kernel, stride, padding, dilation, groups)
        if kind == "frobenius":
            layer = FROBENIUS_CONV[n_dims](*arguments, **others)
        else:
            layer = SPECTRAL_CONV[n_dims](*arguments, **others, **SPECTRAL[kind])
        if case % 3 == 0:
            set_raw(layer, torch.ones_like(layer.raw_weight))
        matrix = dense(layer, size)
        assert_forward_is(layer, matrix, size)
        over = excess(matrix, k)
        if over:
            failures.append((geometry, over))
        bound = lipschitz_bound(layer).value
        assert operator_norm(matrix) <= bound <= k * (1 + CERTIFIED), geometry
    assert not failures


def test_attained_in_two_dimensions():
    """Factors multiply over the dimensions, and the product is attained."""
    for mode in MODES:
        for stride, dilation in (((1, 1), (1, 1)), ((2, 1), (2, 1)), ((1, 3), (1, 1))):
            layer = lnn.SpectralConv2d(1, 6, (2, 3), stride, 1, dilation, padding_mode=mode)
            least = 2 if mode == "reflect" else 1
            sizes = itertools.product(range(least, 6), range(least, 7))
            norms = [operator_norm(dense(layer, size)) for size in sizes]
            assert 1 - ATTAINED[torch.float32] <= max(norms) <= 1.0


# ------------------------------------------------------------------- the cases where peers failed
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "geometry",
    [
        {"kernel_size": 3, "padding": 1},
        {"kernel_size": 3, "padding": 1, "stride": 2},
        {"kernel_size": 3, "padding": 1, "stride": 3},
        {"kernel_size": 5, "padding": 4},
        {"kernel_size": 3, "padding": 2},
        {"kernel_size": 3, "stride": 2, "dilation": 2},
        {"kernel_size": 3, "padding": (1, 0)},
        {"kernel_size": 3, "padding": (0, 2)},
        {"kernel_size": (1, 3), "padding": (3, 1), "stride": (3, 1)},
        {"kernel_size": 1, "padding": 2, "stride": 2},
    ],
    ids=str,
)
def test_peers_failures(geometry, mode):
    for c_in, c_out in ((1, 9), (1, 1), (3, 2)):
        layer = lnn.SpectralConv2d(c_in, c_out, bias=False, padding_mode=mode, **geometry)
        for size in ((5, 5), (6, 7)):
            for weight in (layer.raw_weight.detach().clone(), torch.ones_like(layer.raw_weight)):
                set_raw(layer, weight)
                matrix = dense(layer, size)
                assert_forward_is(layer, matrix, size)
                assert_within(matrix, 1.0, (geometry, size))


@pytest.mark.parametrize("constraint", SPECTRAL)
def test_peers_failures_transposed(constraint):
    """3 -> 64 channels, kernel 5, stride 2 (NaN there); kernel 2, stride 2, sigma alone (2.0)."""
    for c_in, c_out, kernel in ((3, 64, 5), (3, 4, 2)):
        layer = lnn.SpectralConvTranspose2d(
            c_in, c_out, kernel, stride=2, bias=False, **SPECTRAL[constraint]
        )
        set_raw(layer, torch.randn_like(layer.raw_weight))
        # The last two dimensions of the output are exchangeable: the Gram matrix is small.
        matrix = dense_transposed(layer, (2, 2))
        assert_within(matrix, 1.0, layer)


# ------------------------------------------------------------------------ transposed convolutions
@pytest.mark.parametrize("kind", ["square", "constant", "random", "spectral"])
def test_transposed_1d(kind):
    failures = []
    n_attained = n_cases = 0
    for kernel, stride, dilation, padding in GEOMETRIES_1D:
        for output_padding in range(max(stride, dilation)):
            # Square orthogonal: c_in rows, c_out * kernel columns.
            c_in, c_out = (kernel, 1) if kind == "square" else (2, 2)
            layer = lnn.SpectralConvTranspose1d(
                c_in,
                c_out,
                kernel,
                stride,
                padding,
                output_padding,
                dilation=dilation,
                bias=False,
                **SPECTRAL["spectral" if kind == "spectral" else "polar"],
            )
            if kind == "constant":
                set_raw(layer, torch.ones_like(layer.raw_weight))
            elif kind != "square":
                set_raw(layer, torch.randn_like(layer.raw_weight))
            size = 2 + (kernel + padding) % 5
            extent = (size - 1) * stride - 2 * padding + dilation * (kernel - 1)
            if extent + output_padding + 1 < 1:
                continue
            matrix = dense_transposed(layer, (size,))
            assert_forward_is(layer, matrix, (size,))
            over = excess(matrix, 1.0)
            if over:
                failures.append((kernel, stride, dilation, padding, output_padding, over))
            n_attained += operator_norm(matrix) >= 1 - ATTAINED[torch.float32]
            n_cases += 1
    assert not failures
    assert n_cases > 300
    if kind == "square":
        assert n_attained > 100


@pytest.mark.parametrize(("n_dims", "n"), [(2, 80), (3, 40)])
def test_transposed_in_many_dimensions(n_dims, n):
    rng = random.Random(n)
    checked = 0
    while checked < n:
        kernel = tuple(rng.randint(1, 3) for _ in range(n_dims))
        stride = tuple(rng.randint(1, 3) for _ in range(n_dims))
        dilation = tuple(rng.randint(1, 2) for _ in range(n_dims))
        padding = tuple(rng.randint(0, 2) for _ in range(n_dims))
        limits = [max(s, d) for s, d in zip(stride, dilation, strict=True)]
        extra = tuple(rng.randint(0, limit - 1) for limit in limits)
        groups = rng.choice((1, 2))
        size = tuple(rng.randint(1, 3 if n_dims == 2 else 2) for _ in range(n_dims))
        outputs = [
            (i - 1) * s - 2 * p + d * (k - 1) + e + 1
            for i, s, p, d, k, e in zip(size, stride, padding, dilation, kernel, extra, strict=True)
        ]
        if min(outputs) < 1 or torch.tensor(outputs).prod() > 150:
            continue
        k_lip = rng.choice((1.0, 0.3, 2.0))
        layer = TRANSPOSED[n_dims](
            rng.choice((1, 3)) * groups,
            rng.choice((1, 2)) * groups,
            kernel,
            stride,
            padding,
            extra,
            groups,
            False,
            dilation,
            k_coef_lip=k_lip,
            **SPECTRAL[rng.choice(("polar", "spectral", "bjorck"))],
        )
        if rng.random() < 0.5:
            set_raw(layer, torch.rand_like(layer.raw_weight))
        matrix = dense_transposed(layer, size)
        assert_forward_is(layer, matrix, size)
        assert_within(matrix, k_lip, layer)
        assert operator_norm(matrix) <= lipschitz_bound(layer).value <= k_lip * (1 + CERTIFIED)
        checked += 1


def test_transposed_output_size_argument():
    """An output size chosen in forward stays within the bound: it only crops."""
    layer = lnn.SpectralConvTranspose1d(2, 2, 3, stride=2, padding=1, bias=False).double()
    for length in (7, 8):
        matrix = matrix_of(lambda x, n=length: layer(x, [n]), (2, 4))
        assert matrix.shape[0] == 2 * length
        assert_within(matrix, 1.0)


# ---------------------------------------------------------------- geometry changed after the fact
def test_reassigned_stride_dilation_and_mode():
    """The factor follows the attributes that forward reads, in either direction."""
    for mode, other in itertools.product(MODES, MODES):
        layer = lnn.SpectralConv2d(1, 9, 3, stride=3, padding=1, bias=False, padding_mode=other)
        set_raw(layer, torch.ones_like(layer.raw_weight))
        layer(torch.randn(1, 1, 6, 6))
        changes = (
            ("stride", (1, 2)),
            ("stride", (1, 1)),
            ("dilation", (2, 1)),
            ("padding_mode", mode),
            ("stride", (2, 2)),
            ("dilation", (2, 2)),
        )
        for name, value in changes:
            setattr(layer, name, value)
            matrix = dense(layer, (7, 6))
            assert_forward_is(layer, matrix, (7, 6))
            assert_within(matrix, 1.0, (name, value, mode, other))
            bound = lipschitz_bound(layer).value
            assert operator_norm(matrix) <= bound <= 1 + CERTIFIED


def test_reassigned_padding():
    """Zero padding follows ``padding``; the others pad as torch does, as they were built."""
    layer = lnn.SpectralConv1d(1, 3, 3, padding=1, bias=False, input_size=4)
    layer.padding = (3,)
    matrix = dense(layer, (4,))
    assert_forward_is(layer, matrix, (4,))
    assert_within(matrix, 1.0)
    for mode in MODES[1:]:
        layer = lnn.SpectralConv1d(1, 3, 3, padding=1, bias=False, padding_mode=mode).double()
        layer.padding = (3,)
        assert_within(matrix_of(layer, (1, 5)), 1.0, mode)


def test_reassigned_dilation_with_same_padding():
    for mode in MODES:
        layer = lnn.SpectralConv1d(
            1, 3, 3, padding="same", bias=False, padding_mode=mode, input_size=5
        ).double()
        for dilation in ((2,), (1,)):
            layer.dilation = dilation
            assert_within(matrix_of(layer, (1, 5)), 1.0, (mode, dilation))


def test_reassigned_integers():
    """An integer where torch keeps a tuple: torch's forward takes it, and so does the factor."""
    layer = lnn.SpectralConv2d(1, 4, 2, stride=2, bias=False).double()
    layer.stride, layer.dilation = 1, 1
    assert_within(matrix_of(layer, (1, 4, 4)), 1.0)
    assert lipschitz_bound(layer).value <= 1 + CERTIFIED


def test_another_kernel_in_place():
    """A Parameter of another kernel size: forward goes by the weight, and so does the factor."""
    for layer in (
        lnn.SpectralConv1d(1, 5, 1, padding=2, bias=False, dtype=torch.float64),
        lnn.SpectralConvTranspose1d(5, 1, 1, bias=False, dtype=torch.float64),
    ):
        shape = (*layer.raw_weight.shape[:2], 5)
        layer.weight = nn.Parameter(torch.randn(shape, dtype=torch.float64))
        matrix = matrix_of(layer, (layer.in_channels, 6))
        assert_within(matrix, 1.0)
        assert operator_norm(matrix) >= 0.9
        assert operator_norm(matrix) <= lipschitz_bound(layer).value <= 1 + CERTIFIED


# --------------------------------------------------------------------- formats and weights gone bad
@pytest.mark.parametrize("fmt", FORMATS, ids=str)
@pytest.mark.parametrize("kind", ["polar", "spectral", "bjorck", "frobenius", "transposed"])
def test_bad_weights_in_every_format(kind, fmt):
    failures = []
    k = 0.7
    for case, name in enumerate(BAD_WEIGHTS):
        others = {"k_coef_lip": k, "dtype": fmt.weight, "bias": False}
        mode = MODES[case % len(MODES)]
        if kind == "transposed":
            layer = lnn.SpectralConvTranspose1d(4, 4, 3, 2, 1, 1, 2, **others)
            size, matrix_from = (3,), dense_transposed
        else:
            geometry = (4, 6, 3, 1, 1, 1, 2)
            others["padding_mode"] = mode
            if kind == "frobenius":
                layer = lnn.FrobeniusConv1d(*geometry, **others)
            else:
                layer = lnn.SpectralConv1d(*geometry, **others, **SPECTRAL[kind])
            size, matrix_from = (4,), dense
        set_raw(layer, bad_weight(name, tuple(layer.raw_weight.shape), fmt.weight))
        for training in (True, False):
            weight = weight_in(layer.train(training), fmt)
            over = excess(matrix_from(layer, size, weight), k)
            if over:
                failures.append((name, mode, training, over))
        with fmt.context(), torch.no_grad():
            y = layer(torch.zeros(1, 4, 4, dtype=fmt.weight))
        assert y.dtype == fmt.stored
        assert not y.any()
    assert not failures


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_forward_uses_the_weight_that_was_checked(fmt):
    """One-hot images read the kernel back, bit by bit."""
    layer = lnn.SpectralConv1d(2, 3, 3, bias=False, dtype=fmt.weight, k_coef_lip=1.1)
    transposed = lnn.SpectralConvTranspose1d(2, 3, 3, bias=False, dtype=fmt.weight)
    one_hot = torch.eye(6, dtype=fmt.weight).reshape(6, 2, 3)
    with fmt.context(), torch.no_grad():
        read = layer(one_hot)[:, :, 0].T.reshape(3, 2, 3)
        assert torch.equal(read, layer.weight)
        pixels = torch.eye(2, dtype=fmt.weight)[:, :, None]
        assert torch.equal(transposed(pixels), transposed.weight)
    assert read.dtype == fmt.stored


@pytest.mark.parametrize("make", [*SPECTRAL_CONV.values(), *FROBENIUS_CONV.values()])
def test_silly_learning_rate(make):
    n_dims = next(n for n in (1, 2, 3) if make in (SPECTRAL_CONV[n], FROBENIUS_CONV[n]))
    size = (4,) * n_dims if n_dims < 3 else (3, 3, 3)
    layer = make(2, 2, 2, padding=1, padding_mode="reflect", groups=2)
    optimizer = torch.optim.SGD(layer.parameters(), lr=1e4, momentum=0.9)
    for _ in range(3):
        y = layer.train()(torch.randn(4, 2, *size))
        optimizer.zero_grad()
        (y * torch.randn_like(y)).sum().backward()
        optimizer.step()
        for training in (False, True):
            assert_within(dense(layer.train(training), size), 1.0)
    assert layer.raw_weight.abs().max() > 10


def test_exports_have_the_same_norm():
    """The exported convolution is the same map, symmetric padding included."""
    for mode in MODES:
        layer = lnn.SpectralConv2d(2, 3, (3, 2), (2, 1), (1, 2), padding_mode=mode, k_coef_lip=0.6)
        exported = layer.vanilla_export().double()
        matrix = matrix_of(exported, (2, 5, 4))
        torch.testing.assert_close(matrix, dense(layer, (5, 4)), rtol=0, atol=1e-12)
        assert_within(matrix, 0.6, mode)


# ------------------------------------------------------------------------------------- refusals
def test_impossible_geometry_is_refused():
    with pytest.raises(ValueError, match="size: expected at least 5"):
        lnn.SpectralConv1d(1, 1, 3, padding=4, padding_mode="reflect", input_size=4)
    with pytest.raises(ValueError, match="size: expected at least 4"):
        lnn.SpectralConv1d(1, 1, 3, padding=4, padding_mode="symmetric", input_size=3)
    with pytest.raises(ValueError, match="size: expected at least 5"):
        lnn.SpectralConv1d(1, 1, 5, input_size=3)
    with pytest.raises(ValueError, match="at least 1, got 3, 0 and 1"):
        lnn.SpectralConv1d(1, 1, 3, stride=0)
    with pytest.raises(ValueError, match="padding_mode"):
        lnn.SpectralConv1d(1, 1, 3, padding_mode="mirror")
    with pytest.raises(ValueError, match="input_size: expected 2 positive integers"):
        lnn.SpectralConv2d(1, 1, 3, input_size=(0, 4))
    with pytest.raises(ValueError, match="zeros"):
        lnn.SpectralConvTranspose1d(1, 1, 3, padding_mode="reflect")
