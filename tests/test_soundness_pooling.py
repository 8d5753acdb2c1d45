"""No pool and no resampling exceeds its k: dense matrices, or Jacobians and pairs of points."""

import itertools
import math

import pytest
import torch
from operator_norm import assert_within, jacobian, matrix_of, operator_norm
from tolerances import ATTAINED, CERTIFIED, LAYER_OUTPUT, PAIRS

import lipkernels.nn as lnn
from lipkernels import vanilla_export
from lipkernels.certify import lipschitz_bound

F64 = torch.float64


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def geometries():
    """Kernels to 3 x 3, any stride to 3 or None, padding to half the kernel, either ceil_mode."""
    kernels = ((1, 1), (2, 2), (3, 3), (1, 3), (3, 2))
    strides = (None, (1, 1), (2, 2), (3, 3), (1, 2), (3, 1))
    paddings = ((0, 0), (1, 1), (0, 1))
    for kernel, stride, padding in itertools.product(kernels, strides, paddings):
        if all(2 * p <= k for p, k in zip(padding, kernel, strict=True)):
            for ceil_mode in (False, True):
                yield kernel, stride, padding, ceil_mode


GEOMETRIES = tuple(geometries())
SIZES = ((1, 2), (3, 3), (4, 5), (6, 6))


def usable(pool, size):
    """Sizes that the pool takes: windows fit, and without ceil_mode they cover the image."""
    fit = all(n + 2 * p >= k for n, p, k in zip(size, pool.padding, pool.kernel_size, strict=True))
    try:
        pool(torch.zeros(1, 1, *size))
    except ValueError as error:
        small = "fits in" in str(error) and (not fit or pool.ceil_mode)
        assert small or "divisible" in str(error)
        return False
    return True


# -------------------------------------------------------------------------------- average pools
def summed_windows(x, pool):
    """The sum of each window by slicing, for the windows that torch's pools have."""
    (kh, kw), (sh, sw), (ph, pw) = pool.kernel_size, pool.stride, pool.padding
    h, w = x.shape[-2:]

    def starts(n, k, s, p):
        rounded = math.ceil if pool.ceil_mode else math.floor
        count = rounded((n + 2 * p - k) / s) + 1
        # A window that would start in the right padding is dropped.
        return [i * s - p for i in range(count) if i * s - p < n + p and i * s < n + p]

    rows, columns = starts(h, kh, sh, ph), starts(w, kw, sw, pw)
    out = x.new_zeros(*x.shape[:-2], len(rows), len(columns))
    for i, top in enumerate(rows):
        for j, left in enumerate(columns):
            window = x[..., max(top, 0) : top + kh, max(left, 0) : left + kw]
            out[..., i, j] = window.sum(dim=(-2, -1))
    return out


def test_average_pools():
    n_attained = n_cases = 0
    for case, (kernel, stride, padding, ceil_mode) in enumerate(GEOMETRIES):
        k = (1.0, 0.4, 3.0)[case % 3]
        pool = lnn.ScaledAvgPool2d(kernel, stride, padding, ceil_mode, k_coef_lip=k)
        for size in SIZES:
            if not usable(pool, size):
                continue
            n_cases += 1
            matrix = matrix_of(pool, (1, *size))
            assert_within(matrix, k, (pool, size))
            # It is a multiple of the sum over torch's windows, and never a reversed one.
            x = torch.randn(2, 3, *size, dtype=F64)
            sums = summed_windows(x, pool)
            ratio = (pool(x) * sums).sum() / sums.square().sum()
            assert ratio > 0
            torch.testing.assert_close(pool(x), ratio * sums)
            disjoint = stride is None and not ceil_mode and padding == (0, 0)
            if disjoint:
                assert operator_norm(matrix) >= k * (1 - ATTAINED[F64])
                n_attained += 1
            exported = pool.vanilla_export()
            torch.testing.assert_close(exported(x), pool(x))
            bound = lipschitz_bound(exported).value
            assert_within(matrix, bound, (pool, size))
            assert bound <= k * (1 + CERTIFIED)
            assert lipschitz_bound(pool).value == k
    assert n_cases > 200
    assert n_attained >= 8


def test_reassigned_geometry():
    for make in (lnn.ScaledAvgPool2d, lnn.ScaledL2NormPool2d):
        pool = make(3)
        pool(torch.zeros(1, 1, 6, 6))
        for name, value in (("stride", (1, 1)), ("kernel_size", (2, 4)), ("stride", (2, 1))):
            setattr(pool, name, value)
            if make is lnn.ScaledAvgPool2d:
                assert_within(matrix_of(pool, (1, 6, 6)), 1.0, (name, value))
            else:
                x = torch.zeros(1, 1, 6, 6, dtype=F64)
                x[0, 0, 2, 3] = 1.0  # in every window that could hold it
                assert_within(jacobian(pool, x), 1.0, (name, value))


# The peers' failures: ceil_mode (2 and 3 for a promised 1), divisor_override=1 (4).
def test_ceil_mode_of_the_peers():
    for make in (lnn.ScaledAvgPool2d, lnn.ScaledL2NormPool2d):
        for kernel, stride, size in ((2, 2, 3), (3, 3, 4), (3, 2, 6), (3, 1, 5)):
            pool = make(kernel, stride, ceil_mode=True)
            for _ in range(3):
                x = torch.randn(1, 1, size, size, dtype=F64)
                assert_within(jacobian(pool, x), 1.0, pool)
            corner = torch.zeros(1, 1, size, size, dtype=F64)
            corner[0, 0, -1, -1] = 1.0
            assert_within(jacobian(pool, corner), 1.0, pool)


def test_divisor_override_is_refused():
    for divisor in (1, 2, 4, -1):
        with pytest.raises(ValueError, match=r"divisor_override: expected None .* got"):
            lnn.ScaledAvgPool2d(2, divisor_override=divisor)


def test_uneven_weights_are_refused():
    with pytest.raises(ValueError, match="count_include_pad: expected True with padding"):
        lnn.ScaledAvgPool2d(3, padding=1, count_include_pad=False)
    lnn.ScaledAvgPool2d(3, count_include_pad=False)  # without padding it changes nothing


def test_images_cut_short_are_refused():
    for make in (lnn.ScaledAvgPool2d, lnn.ScaledL2NormPool2d):
        with pytest.raises(ValueError, match=r"divisible by \(2, 2\), got \(5, 4\)"):
            make(2)(torch.zeros(1, 1, 5, 4))
        with pytest.raises(ValueError, match="padding: expected at most half"):
            make(2, padding=2)


# -------------------------------------------------------------------------------- L2-norm pools
def points(size):
    """Random images, sparse ones (a window's norm is steepest there), one with equal entries."""
    shape = (1, 1, *size)
    yield torch.randn(shape, dtype=F64)
    yield torch.randn(shape, dtype=F64) * (torch.rand(shape) < 0.2)
    yield torch.ones(shape, dtype=F64)
    for row, column in {(0, 0), (size[0] // 2, size[1] // 2), (size[0] - 1, size[1] - 1)}:
        one_hot = torch.zeros(shape, dtype=F64)
        one_hot[0, 0, row, column] = 2.0
        yield one_hot


def test_norm_pools():
    n_attained = n_cases = 0
    for case, (kernel, stride, padding, ceil_mode) in enumerate(GEOMETRIES):
        k = (1.0, 0.4, 3.0)[case % 3]
        pool = lnn.ScaledL2NormPool2d(kernel, stride, padding, ceil_mode, k_coef_lip=k)
        best = 0.0
        for size in SIZES[1:]:
            if not usable(pool, size):
                continue
            n_cases += 1
            for x in points(size):
                matrix = jacobian(pool, x)
                assert_within(matrix, k, (pool, size))
                best = max(best, operator_norm(matrix))
                y = x + 0.3 * torch.randn_like(x)
                moved = (pool(x) - pool(y)).norm()
                assert moved <= k * (x - y).norm() * (1 + PAIRS)
                windows = summed_windows(x.square(), pool).sqrt()
                ratio = pool(x).norm() / windows.norm().clamp_min(1e-9)
                torch.testing.assert_close(pool(x), ratio * windows)
            exported = pool.vanilla_export()
            torch.testing.assert_close(exported(x), pool(x))
            assert k * (1 - ATTAINED[F64]) <= lipschitz_bound(exported).value
            assert lipschitz_bound(exported).value <= k * (1 + CERTIFIED)
        # One pixel moves every window that holds it: attained wherever all of them fit.
        n_attained += best >= k * (1 - 1e-5)
    assert n_cases > 120
    assert n_attained > 60


def test_norm_pool_at_zero():
    """An all-zero window has gradient zero, and a step from it no more than its length."""
    pool = lnn.ScaledL2NormPool2d(2, k_coef_lip=2.0)
    zero = torch.zeros(1, 1, 4, 4, dtype=F64)
    assert not jacobian(pool, zero).any()
    step = torch.randn(1, 1, 4, 4, dtype=F64)
    torch.testing.assert_close(pool(step).norm(), 2.0 * step.norm())


# ---------------------------------------------------------------------------------- global pools
@pytest.mark.parametrize("size", [(1, 1), (2, 3), (7, 1), (5, 5)])
@pytest.mark.parametrize("k", [1.0, 0.3, 4.0])
def test_global_pools(size, k):
    average = lnn.ScaledAdaptiveAvgPool2d((1, 1), k_coef_lip=k)
    matrix = matrix_of(average, (2, *size))
    assert_within(matrix, k)
    assert operator_norm(matrix) >= k * (1 - ATTAINED[F64])
    norm = lnn.ScaledAdaptiveL2NormPool2d(1, k_coef_lip=k, eps_grad_sqrt=1e-12)
    for x in points(size):
        assert_within(jacobian(norm, x), k)
        y = torch.randn_like(x)
        assert (norm(x) - norm(y)).norm() <= k * (x - y).norm() * (1 + PAIRS)
        torch.testing.assert_close(norm(x).norm(), k * x.norm())
    for pool in (average, norm):
        bound = lipschitz_bound(pool.vanilla_export()).value
        assert k * (1 - ATTAINED[F64]) <= bound <= k * (1 + CERTIFIED)


# ----------------------------------------------------------------------- invertible down and up
@pytest.mark.parametrize("mode", ["CRD", "DCR"])
@pytest.mark.parametrize("data_format", ["channels_first", "channels_last"])
@pytest.mark.parametrize("k", [1.0, 0.5, 3.0])
def test_resampling_is_an_isometry_times_k(mode, data_format, k):
    for block in (1, 2, (1, 3), (3, 2)):
        keywords = {"mode": mode, "data_format": data_format, "k_coef_lip": k}
        down = lnn.InvertibleDownSampling(block, **keywords)
        up = lnn.InvertibleUpSampling(block, **keywords)
        ph, pw = down.kernel_size
        image, blocks = (2, 2 * ph, 2 * pw), (2 * ph * pw, 2, 1)
        if data_format == "channels_last":
            image, blocks = (*image[1:], image[0]), (*blocks[1:], blocks[0])
        for layer, shape in ((down, image), (up, blocks)):
            matrix = matrix_of(layer, shape)
            eye = torch.eye(matrix.shape[1], dtype=F64) * k * k
            torch.testing.assert_close(matrix.T @ matrix, eye, rtol=1e-14, atol=0)
            assert_within(matrix, k)
            assert lipschitz_bound(layer).value == k
            x = torch.randn(1, *shape)
            torch.testing.assert_close(layer.vanilla_export()(x), layer(x))
            bound = lipschitz_bound(layer.vanilla_export()).value
            assert k <= bound <= k * (1 + CERTIFIED)


# --------------------------------------------------------------------------------- formats
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_pools_in_low_precision(dtype):
    """The scale is a number, not a rounded weight: outputs differ by the output's rounding only."""
    eps = torch.finfo(dtype).eps
    x = torch.randn(1, 2, 6, 6, dtype=F64).to(dtype)
    pools = (
        lnn.ScaledAvgPool2d(3, 1, k_coef_lip=0.77),
        lnn.ScaledL2NormPool2d(3, 1, k_coef_lip=0.77),
        lnn.ScaledAdaptiveAvgPool2d(k_coef_lip=0.77),
        lnn.ScaledAdaptiveL2NormPool2d(k_coef_lip=0.77),
    )
    for pool in pools:
        y = pool(x)
        assert y.dtype == dtype
        exact = pool(x.double())
        error = (y.double() - exact).abs().max()
        assert error <= 4 * eps * exact.abs().max() + LAYER_OUTPUT[F64]


def test_set_klip_factor_takes_effect_at_once():
    for layer in (
        lnn.ScaledAvgPool2d(2),
        lnn.ScaledAdaptiveAvgPool2d(),
        lnn.InvertibleDownSampling(2),
    ):
        layer(torch.zeros(1, 1, 4, 4))
        layer.set_klip_factor(0.25)
        matrix = matrix_of(layer, (1, 4, 4))
        assert_within(matrix, 0.25)
        assert operator_norm(matrix) >= 0.25 * (1 - ATTAINED[F64])


def test_float16_windows_whose_sum_overflows():
    x = torch.full((1, 1, 16, 16), 300.0, dtype=torch.float16)
    layer = lnn.ScaledAvgPool2d(16)
    assert layer(x).item() == 4800.0
    assert vanilla_export(layer)(x).item() == 4800.0
