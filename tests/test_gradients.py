"""Gradients of the constraints: exact ones, of what forward computed, at little memory."""

import pytest
import tolerances
import torch
from cases import FLOATS, WEIGHT_OPS, by_dtype, weight_of_condition
from torch import nn
from torch.func import functional_call

import lipkernels.nn as lnn
from lipkernels import functional as F
from lipkernels import grouped

SHAPES = [(3, 7), (7, 3), (5, 5), (1, 4), (4, 1), (2, 3, 5), (2, 5, 3), (2, 3, 3)]
CONDITIONS = (1, 10, 29, 100, 1000)


def cotangent(shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gradient(function, w, gamma):
    """dL/dW of L = <gamma, function(W)>."""
    w = w.detach().clone().requires_grad_()
    out = function(w)
    out = out[0] if isinstance(out, tuple) else out
    (grad,) = torch.autograd.grad(out, w, gamma.to(out.dtype))
    return grad.detach()


def relative(got, expected):
    return ((got.double() - expected).norm() / expected.norm()).item()


def central_differences(function, w, gamma, h):
    grad = torch.zeros_like(w)
    for i in range(w.numel()):
        step = torch.zeros_like(w)
        step.view(-1)[i] = h
        difference = function(w + step) - function(w - step)
        grad.view(-1)[i] = (gamma * difference).sum() / (2 * h)
    return grad


# ---------------------------------------------------------------------------- the polar factor
def svd_polar_factor(w):
    left, _, right = torch.linalg.svd(w, full_matrices=False)
    return left @ right


def svd_polar_gradient(w, gamma):
    """The derivative of L R^T for W = L S R^T, written with singular vectors; any spectrum > 0."""
    left, s, right = torch.linalg.svd(w, full_matrices=False)
    a = left.mT @ gamma @ right.mT
    rotation = (a - a.mT) / (s[..., :, None] + s[..., None, :])
    beyond_rows = (gamma - left @ (left.mT @ gamma)) @ right.mT
    beyond_columns = left.mT @ (gamma - gamma @ right.mT @ right)
    inside = left @ rotation @ right
    outside = (beyond_rows / s[..., None, :]) @ right + left @ (beyond_columns / s[..., :, None])
    return inside + outside


@pytest.mark.parametrize("shape", SHAPES)
def test_polar_gradcheck(shape):
    w = weight_of_condition(shape, 3).requires_grad_()
    assert torch.autograd.gradcheck(F.polar_factor, w)
    assert torch.autograd.gradcheck(lambda x: F.polar_factor(x, 2.5), w)


@pytest.mark.parametrize("shape", SHAPES)
def test_polar_gradient_by_central_differences(shape):
    gamma = cotangent(shape)
    for condition in CONDITIONS:
        w = weight_of_condition(shape, condition)
        smallest = torch.linalg.svdvals(w).min().item()
        expected = central_differences(svd_polar_factor, w, gamma, 1e-4 * smallest)
        got = gradient(F.polar_factor, w, gamma)
        scale = max(expected.norm().item(), 1.0)  # a 1 x n matrix may have gradient zero
        assert (got - expected).norm() / scale <= tolerances.CENTRAL_DIFFERENCES, condition


@pytest.mark.parametrize("shape", [s for s in SHAPES if min(s) > 1])
def test_polar_gradient_by_svd_autograd(shape):
    gamma = cotangent(shape)
    for condition in CONDITIONS[1:]:  # autograd through an SVD needs distinct singular values
        w = weight_of_condition(shape, condition)
        expected = gradient(svd_polar_factor, w, gamma)
        limit = tolerances.POLAR_GRADIENT[torch.float64]
        assert relative(gradient(F.polar_factor, w, gamma), expected) <= limit, condition


@pytest.mark.parametrize("shape", [*SHAPES[:3], *SHAPES[5:], (16, 27), (40, 40), (64, 20)])
@by_dtype()
def test_polar_gradient_error(shape, dtype):
    gamma = cotangent(shape).to(dtype)
    for condition in CONDITIONS:
        w = weight_of_condition(shape, condition).to(dtype)
        expected = svd_polar_gradient(w.double(), gamma.double())
        got = gradient(F.polar_factor, w, gamma)
        assert got.dtype == dtype
        assert relative(got, expected) <= tolerances.POLAR_GRADIENT[dtype], condition


def test_polar_gradient_of_a_rounded_result():
    # float32 weights with a half-precision result: what autocast asks for.
    w, gamma = weight_of_condition((6, 10), 10).float(), cotangent((6, 10))
    for dtype in FLOATS:
        got = gradient(lambda x, dtype=dtype: F.polar_factor(x, dtype=dtype), w, gamma)
        expected = svd_polar_gradient(w.double(), gamma.to(dtype).double())
        assert relative(got, expected) <= tolerances.POLAR_GRADIENT[torch.float32]


# ---------------------------------------------------------------- spectral and Frobenius norms
@pytest.mark.parametrize("shape", SHAPES)
def test_spectral_gradcheck(shape):
    w = weight_of_condition(shape, 3).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: F.spectral_normalize(x, 2.5)[0], w)


@pytest.mark.parametrize("shape", [*SHAPES, (16, 27)])
@by_dtype()
def test_spectral_gradient_error(shape, dtype):
    gamma = cotangent(shape).to(dtype)

    def oracle(x):
        return x / torch.linalg.svdvals(x)[..., :1, None]

    for condition in (2, 100):
        w = weight_of_condition(shape, condition).to(dtype)
        expected = gradient(oracle, w.double(), gamma.double())
        got = gradient(F.spectral_normalize, w, gamma)
        if expected.norm() < 1e-10:
            expected = expected / expected.norm()  # 1 x 1: zero, and its error absolute
            got = got + expected
        assert relative(got, expected) <= tolerances.NORM_GRADIENT[dtype]


@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_frobenius_gradcheck(shape, per_row):
    w = weight_of_condition(shape, 3).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: F.frobenius_normalize(x, 2.5, per_row=per_row), w)


@pytest.mark.parametrize("per_row", [False, True])
@by_dtype()
def test_frobenius_gradient_error(per_row, dtype):
    def oracle(x):
        return x / x.norm(dim=-1 if per_row else (-2, -1), keepdim=True)

    for shape in ((3, 7), (7, 3), (2, 4, 6), (16, 27)):
        gamma = cotangent(shape).to(dtype)
        w = weight_of_condition(shape, 10).to(dtype)
        expected = gradient(oracle, w.double(), gamma.double())
        got = gradient(lambda x: F.frobenius_normalize(x, per_row=per_row), w, gamma)
        assert relative(got, expected) <= tolerances.NORM_GRADIENT[dtype]


# ----------------------------------------------------------------------------- named Bjorck
def unrolled(w, beta, n_iter):
    """Autograd's own derivative of the loop, with that of the division by sigma."""
    x = w / torch.linalg.matrix_norm(w, 2, keepdim=True)
    for _ in range(n_iter):
        x = (1 + beta) * x - beta * x @ x.mT @ x
    return x


@pytest.mark.parametrize("shape", [(3, 7), (7, 3), (5, 5), (2, 3, 5), (1, 4)])
@pytest.mark.parametrize("beta", [0.5, 0.25])
def test_bjorck_gradient_is_that_of_the_unrolled_loop(shape, beta):
    gamma = cotangent(shape)
    for n_iter in (*range(16), 40):
        for condition in (2, 20):
            w = weight_of_condition(shape, condition)
            expected = gradient(lambda x, n=n_iter: unrolled(x, beta, n), w, gamma)
            got = gradient(lambda x, n=n_iter: F.bjorck(x, beta=beta, n_iter=n), w, gamma)
            assert relative(got, expected) <= tolerances.BJORCK_GRADIENT[torch.float64]


@by_dtype()
def test_bjorck_gradient_error(dtype):
    for shape in ((3, 7), (7, 3), (16, 27)):
        gamma = cotangent(shape).to(dtype)
        for n_iter in (1, 4, 15):
            w = weight_of_condition(shape, 20).to(dtype)
            expected = gradient(lambda x, n=n_iter: unrolled(x, 0.5, n), w.double(), gamma.double())
            got = gradient(lambda x, n=n_iter: F.bjorck(x, n_iter=n), w, gamma)
            assert relative(got, expected) <= tolerances.BJORCK_GRADIENT[dtype]


def test_bjorck_gradient_stops_where_forward_stopped():
    w, gamma = weight_of_condition((3, 7), 20), cotangent((3, 7))
    x, steps = w / torch.linalg.matrix_norm(w, 2), 0
    while True:
        following = 1.5 * x - 0.5 * x @ x.mT @ x
        if (following - x).norm() <= 0.05:
            break
        x, steps = following, steps + 1
    expected = gradient(lambda t: unrolled(t, 0.5, steps), w, gamma)
    got = gradient(lambda t: F.bjorck(t, n_iter=50, tol=0.05), w, gamma)
    assert 2 < steps < 50
    assert relative(got, expected) <= tolerances.BJORCK_GRADIENT[torch.float64]


def test_bjorck_gradcheck():
    w = weight_of_condition((3, 5), 3).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: F.bjorck(x, 2.0, beta=0.3, n_iter=3)[0], w)


# -------------------------------------------------------------------------- what all of them keep
OPS = {
    "polar_factor": F.polar_factor,
    "spectral_normalize": lambda w: F.spectral_normalize(w)[0],
    "bjorck": lambda w: F.bjorck(w, n_iter=5)[0],
    "frobenius_normalize": F.frobenius_normalize,
}
assert set(OPS) == set(WEIGHT_OPS)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("shape", [(3, 7), (7, 3), (5, 5), (2, 3, 5)])
@by_dtype((torch.float64, torch.float32))
def test_gradient_is_orthogonal_to_the_weight(op, shape, dtype):
    # A constraint does not depend on the weight's magnitude: f(cW) = f(W), so <df, W> = 0.
    for condition in (1, 10, 1000):
        w = weight_of_condition(shape, condition).to(dtype)
        grad = gradient(OPS[op], w, cotangent(shape)).double()
        inner = (grad * w.double()).sum((-2, -1))
        sizes = grad.norm(dim=(-2, -1)) * w.double().norm(dim=(-2, -1))
        assert (inner.abs() <= tolerances.RADIAL_GRADIENT[dtype] * sizes).all()


def test_gradient_of_normalized_rows_is_orthogonal_to_each_row():
    w = weight_of_condition((5, 8), 10)
    grad = gradient(lambda x: F.frobenius_normalize(x, per_row=True), w, cotangent((5, 8)))
    assert ((grad * w).sum(1).abs() <= 1e-12 * grad.norm(dim=1)).all()
    assert (grad.norm(dim=1) > 1e-3).all()


def rank_one(shape):
    return torch.outer(torch.arange(1.0, shape[0] + 1), torch.arange(1.0, shape[1] + 1))


def repeated_rows(shape):
    return cotangent((1, shape[1]), 3).expand(shape).clone()


EXTREMES = {
    "zero": lambda shape: torch.zeros(shape),
    "rank_one": rank_one,
    "repeated_rows": repeated_rows,
    "one_entry": lambda shape: torch.nn.functional.pad(
        torch.ones(1, 1), (0, shape[1] - 1, 0, shape[0] - 1)
    ),
    "zero_row": lambda shape: cotangent(shape, 4) * (torch.arange(shape[0]) > 0)[:, None],
    "tiny": lambda shape: cotangent(shape, 5) * 1e-38,
    "subnormal": lambda shape: torch.full(shape, 1e-44, dtype=torch.float64),
    "huge": lambda shape: cotangent(shape, 6) * 1e30,
    "largest": lambda shape: torch.full(shape, 3e38, dtype=torch.float64),
    "wide_range": lambda shape: cotangent(shape, 7) * torch.logspace(-30, 30, shape[1]),
}


@pytest.mark.parametrize("name", EXTREMES)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("shape", [(4, 6), (6, 4), (5, 5)])
def test_gradient_is_finite_at_any_finite_weight(op, name, shape):
    w = EXTREMES[name](shape)
    for dtype in FLOATS:
        limit = torch.finfo(dtype).max
        weight = w.double().clamp(-limit, limit).to(dtype)
        grad = gradient(OPS[op], weight, cotangent(shape))
        assert grad.isfinite().all(), dtype


@pytest.mark.parametrize("op", OPS)
def test_gradient_scales_with_the_inverse_of_the_weight(op):
    w, gamma = weight_of_condition((4, 6), 10).float(), cotangent((4, 6))
    expected = gradient(OPS[op], w, gamma)
    for factor in (2.0**-60, 2.0**80):
        got = gradient(OPS[op], w * factor, gamma)
        assert torch.equal(got * factor, expected)


# ------------------------------------------------------------------------------------ layers
LAYERS = {
    "linear": (lambda **k: lnn.SpectralLinear(5, 4, **k), (2, 5)),
    "linear_tall": (lambda **k: lnn.SpectralLinear(3, 4, k_coef_lip=2.0, **k), (2, 3)),
    "linear_normalized": (lambda **k: lnn.SpectralLinear(5, 4, eps_bjorck=None, **k), (2, 5)),
    "linear_bjorck": (lambda **k: lnn.SpectralLinear(5, 4, maxiter_bjorck=3, **k), (2, 5)),
    "frobenius": (lambda **k: lnn.FrobeniusLinear(5, 4, **k), (2, 5)),
    "frobenius_whole": (lambda **k: lnn.FrobeniusLinear(5, 4, disjoint_neurons=False, **k), (2, 5)),
    "conv1d": (lambda **k: lnn.SpectralConv1d(2, 3, 3, padding=1, **k), (2, 2, 4)),
    "conv2d_groups": (lambda **k: lnn.SpectralConv2d(4, 6, (2, 3), 2, groups=2, **k), (2, 4, 4, 5)),
    "conv2d_symmetric": (
        lambda **k: lnn.SpectralConv2d(1, 2, 3, padding=1, padding_mode="symmetric", **k),
        (1, 1, 3, 3),
    ),
    "conv3d_frobenius": (lambda **k: lnn.FrobeniusConv3d(1, 2, 2, **k), (1, 1, 2, 3, 2)),
    "transposed": (
        lambda **k: lnn.SpectralConvTranspose2d(4, 2, 2, 2, groups=2, **k),
        (1, 4, 2, 2),
    ),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layer_gradcheck(name):
    make, shape = LAYERS[name]
    layer = make(dtype=torch.float64).eval()
    raw = cotangent(layer.raw_weight.shape, 2).requires_grad_()
    x = cotangent(shape, 3).requires_grad_()
    bias = cotangent(layer.bias.shape, 4).requires_grad_()

    def call(weight, bias, x):
        return functional_call(layer, {"weight": weight, "bias": bias}, (x,))

    assert torch.autograd.gradcheck(call, (raw, bias, x))


@pytest.mark.parametrize("name", LAYERS)
def test_gradient_penalty_by_central_differences(name):
    # A gradient penalty differentiates by the weight what was differentiated by the input.
    make, shape = LAYERS[name]
    layer = make(dtype=torch.float64).eval()
    raw = cotangent(layer.raw_weight.shape, 2)
    x = cotangent(shape, 3).requires_grad_()

    def penalty(weight):
        out = functional_call(layer, {"weight": weight, "bias": layer.bias.detach()}, (x,))
        (slope,) = torch.autograd.grad(out.pow(3).sum(), x, create_graph=True)
        return slope.square().sum()

    expected = central_differences(lambda w: penalty(w).detach(), raw, torch.ones(()), 1e-6)
    got = gradient(penalty, raw, torch.ones(()))
    assert relative(got, expected) <= 1e-6


def test_gradients_through_grouped_are_the_same():
    torch.manual_seed(0)
    net = nn.Sequential(
        lnn.SpectralConv2d(2, 4, 3, padding=1),
        lnn.GroupSort2(),
        lnn.SpectralConv2d(4, 4, 3, groups=2),
        nn.Flatten(),
        lnn.SpectralLinear(16, 8),
        lnn.SpectralLinear(8, 8, eps_bjorck=None),
        lnn.SpectralLinear(8, 8, maxiter_bjorck=4),
        lnn.FrobeniusLinear(8, 2),
    ).eval()
    for p in net.parameters():
        nn.init.normal_(p)
    x = torch.randn(3, 2, 4, 4)
    expected_out = net(x)
    expected = torch.autograd.grad(expected_out.pow(3).sum(), list(net.parameters()))
    with grouped(net):
        out = net(x)
    got = torch.autograd.grad(out.pow(3).sum(), list(net.parameters()))
    assert torch.equal(out, expected_out)
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


# ------------------------------------------------------------------------------------ memory
def saved_bytes(function, excluded):
    """Bytes of the storages that backward keeps, without those of ``excluded``."""
    known = {t.untyped_storage().data_ptr() for t in excluded}
    kept = {}

    def pack(t):
        storage = t.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = function()
    assert out.requires_grad
    return sum(kept.values()), out


MEMORY_SHAPES = [(32, 288), (288, 32), (64, 144), (64, 64)]


@pytest.mark.parametrize("shape", MEMORY_SHAPES)
@pytest.mark.parametrize("op", OPS)
def test_bytes_saved_for_backward_by_an_op(op, shape):
    w = cotangent(shape).float().requires_grad_()
    saved, _ = saved_bytes(lambda: OPS[op](w), [w])
    allowed = tolerances.SAVED_RATIO["square" if shape[0] == shape[1] else "other"]
    assert saved <= allowed * w.nbytes


@pytest.mark.parametrize("shape", MEMORY_SHAPES)
@pytest.mark.parametrize(
    "keywords",
    [{}, {"eps_bjorck": None}, {"maxiter_bjorck": 15}, {"disjoint_neurons": True}],
    ids=["polar", "spectral", "bjorck", "frobenius"],
)
def test_bytes_saved_for_backward_by_a_layer(shape, keywords):
    rows, cols = shape
    frobenius = "disjoint_neurons" in keywords
    layer = (lnn.FrobeniusLinear if frobenius else lnn.SpectralLinear)(cols, rows, **keywords)
    x = torch.randn(2, cols)
    inputs = [x, *layer.parameters(), *layer.buffers()]
    saved, _ = saved_bytes(lambda: layer(x), inputs)
    allowed = tolerances.SAVED_RATIO["square" if rows == cols else "other"]
    assert saved <= allowed * layer.raw_weight.nbytes


def test_bytes_saved_by_a_convolution():
    layer = lnn.SpectralConv2d(32, 32, 3, padding=1)
    x = torch.randn(1, 32, 4, 4)
    saved, _ = saved_bytes(lambda: layer(x), [x, *layer.parameters()])
    assert saved <= tolerances.SAVED_RATIO["other"] * layer.raw_weight.nbytes


def test_bytes_saved_by_a_grouped_model():
    net = nn.Sequential(*[lnn.SpectralLinear(144, 48) for _ in range(3)])
    net = nn.ModuleList(net)
    x = torch.randn(2, 144)
    model = _Parallel(net)
    with grouped(model):
        saved, _ = saved_bytes(lambda: model(x), [x, *net.parameters()])
    weights = sum(layer.raw_weight.nbytes for layer in net)
    assert saved <= tolerances.SAVED_RATIO["other"] * weights


class _Parallel(nn.Module):
    def __init__(self, layers):
        super().__init__()
        self.layers = layers

    def forward(self, x):
        return sum(layer(x).sum() for layer in self.layers)
