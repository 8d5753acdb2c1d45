"""Random calls of what proves: forward errors, radii under rounding, strict weights, factors."""

import copy
import math
from fractions import Fraction

import pytest
import torch
from fuzzing import (
    call,
    contiguous,
    dtypes,
    finite,
    matrices,
    numbers,
    same,
    shapes,
    tensors,
)
from hypothesis import given
from hypothesis import strategies as st
from layer_table import LAYERS
from operator_norm import (
    convolution_matrix,
    is_upper_bound,
    operator_norm,
    transposed_convolution_matrix,
)
from tolerances import SVD
from torch import nn

import lipkernels as lk
import lipkernels.nn as lnn
from lipkernels import certify

PRECISE = (torch.float64, torch.float32)
ORDINARY = st.sampled_from(("normal", "zero", "constant", "ties"))


# ------------------------------------------------------------------------------- strict weights
positive = st.floats(0, exclude_min=True, allow_infinity=False)


@given(numbers | positive, numbers | positive)
def test_largest_norm(k, factor):
    got = call("largest_norm", certify.largest_norm, k, factor)
    if got is None:
        return
    norm = got[0]
    assert (norm >= 0 and norm * factor * (1 + 2.0**-52) <= k) or math.isinf(factor)
    if norm > 1e-300 and math.isfinite(norm * 1.01) and math.isfinite(k):  # not by far too small
        assert Fraction(norm) * Fraction(factor) >= Fraction(k) * (1 - Fraction(1, 2**49))


@given(matrices, st.sampled_from((1.0, 0.3, 2, 1e-3, 1e-45)) | numbers)
def test_shrunk(matrix, limit):
    got = call("shrunk", certify.shrunk, matrix, limit)
    again = call("shrunk", certify.shrunk, contiguous(matrix), limit)
    assert (got is None) == (again is None)
    if got is None:
        return
    result = got[0]
    assert result.dtype == matrix.dtype and result.shape == matrix.shape and finite(result)
    bound, before = certify.spectral_norm_bound(result), certify.spectral_norm_bound(matrix)
    assert bound <= limit
    if matrix.numel() and matrix.dtype.itemsize > 1 and limit < math.inf:
        assert is_upper_bound(result, limit)
    if before <= limit:
        assert same(result, contiguous(matrix))
    elif matrix.dtype in PRECISE and limit >= 1e-3 and before < 1e30:
        # The bound of a multiple of an orthogonal matrix is good to 1e-5 of it.
        assert bound >= limit * (1 - 1e-5)


@given(st.data())
def test_strict(data):
    """What is stored is proved to keep the promise, exactly; or the weight is no number."""
    layer = data.draw(st.sampled_from(LAYERS))
    module = layer.make()
    for p in module.parameters():
        p.data.copy_(data.draw(tensors(shape=st.just(tuple(p.shape)), dtype=st.just(p.dtype))))
    model = nn.Sequential(module).eval()
    sound = all(map(finite, model.parameters()))
    plain = call("vanilla_export", lk.vanilla_export, model, strict=True)
    assert plain is not None or not sound
    if plain is not None:
        assert all(map(finite, plain[0].parameters())) or not sound
    condensed = call("condense", lk.condense, model, strict=True)
    assert condensed is not None or not sound
    if not sound:
        return
    for name, m in model.named_modules():
        if not hasattr(m, "constraint"):
            continue
        exported = plain[0].get_submodule(name)
        if isinstance(exported, nn.Sequential):  # after symmetric padding, which has no rule
            exported = exported[-1]
        assert float(certify.lipschitz_bound(exported)) <= m.lipschitz_constant, name
        matrix = m.matrix(m.raw_weight.detach())
        per_row = getattr(m, "disjoint_neurons", False)
        limit = m.k_coef_lip
        if not per_row:
            limit = certify.largest_norm(limit, m.operator_factor())
        for block in matrix.reshape(-1, *matrix.shape[-2:]):
            for part in block.split(1) if per_row else [block]:
                assert certify.spectral_norm_bound(part) <= limit


# --------------------------------------------------------------------------------- convolutions
CONVOLUTIONS = {nn.Conv1d: 1, nn.Conv2d: 2, nn.ConvTranspose1d: 1, nn.ConvTranspose2d: 2}
odd_kernels = st.lists(st.integers(-1, 4), max_size=3).map(tuple)


@given(st.data())
def test_convolution_factor(data):
    """|conv| <= factor |K|, for the dense matrix of the convolution."""
    cls = data.draw(st.sampled_from(list(CONVOLUTIONS)))
    n, transposed = CONVOLUTIONS[cls], "Transpose" in cls.__name__
    kernel = tuple(data.draw(st.integers(1, 3)) for _ in range(n))
    stride, dilation = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 2))
    padding, groups = data.draw(st.integers(0, 1)), data.draw(st.integers(1, 2))
    modes = ("zeros",) if transposed else ("zeros", "reflect", "replicate", "circular")
    mode = data.draw(st.sampled_from(modes))
    conv = cls(
        2 * groups,
        groups,
        kernel,
        stride,
        padding,
        dilation=dilation,
        groups=groups,
        padding_mode=mode,
    )
    call("convolution_factor", certify.convolution_factor, conv, data.draw(odd_kernels))
    call("convolution_factor", certify.convolution_factor, nn.Linear(2, 2), kernel)
    factor = call("convolution_factor", certify.convolution_factor, conv, kernel)[0]
    sizes = [data.draw(st.integers(2, 5)) for _ in range(n)]
    weight = conv.weight.detach().double()
    norm = max(operator_norm(m) for m in weight.reshape(groups, weight.shape[0] // groups, -1))
    strides, pads, dilations = ([value] * n for value in (stride, padding, dilation))
    reaches = [dilation * (k - 1) for k in kernel]
    if transposed:
        if any((s - 1) * stride - 2 * padding + r < 0 for s, r in zip(sizes, reaches, strict=True)):
            return
        dense = transposed_convolution_matrix(
            weight, sizes, strides, pads, [0] * n, dilations, groups
        )
    else:
        if any(s + 2 * padding <= r for s, r in zip(sizes, reaches, strict=True)):
            return
        both = [(padding, padding)] * n
        dense = convolution_matrix(weight, sizes, strides, both, dilations, groups, mode)
    assert operator_norm(dense) <= norm * factor * (1 + SVD)


# ------------------------------------------------------------------------------- forward passes
class Scalings(nn.Module):
    """z times each of some factors: a layer of one's own, with its own entry in ROUNDINGS."""

    def __init__(self, factors):
        super().__init__()
        self.factors = factors

    def forward(self, z):
        for factor in self.factors:
            z = z * factor
        return z

    def certified_lipschitz_constant(self):
        return abs(math.prod(self.factors)) * (1 + 1e-12)


class Reversed(nn.Module):
    """The features in reverse order: exact."""

    def forward(self, z):
        return z.flip(-1)

    def certified_lipschitz_constant(self):
        return 1.0


def _scalings(module, z):
    prefixes = [abs(math.prod(module.factors[:i])) for i in range(len(module.factors) + 1)]
    n = certify.SCALED * len(module.factors)
    return certify.Roundings(n, gain=max(prefixes)) if module.factors else certify.EXACT


@pytest.fixture(autouse=True, scope="module")
def _own_layers():
    own = {Scalings.forward: _scalings, Reversed.forward: lambda module, z: certify.EXACT}
    certify.ROUNDINGS.update(own)
    yield
    for forward in own:
        del certify.ROUNDINGS[forward]


def _prelu():
    layer = nn.PReLU(4)
    nn.init.normal_(layer.weight)
    return layer


def _batch_norm():
    layer = nn.BatchNorm1d(4)
    layer.running_mean.normal_()
    layer.running_var.uniform_(0.1, 3)
    return layer


def _between(shape, layer, features):
    """``layer`` on images, for vectors of 4."""
    return nn.Sequential(nn.Unflatten(1, shape), layer, nn.Flatten(), nn.Linear(features, 4))


CHAIN = (
    lambda: nn.Linear(4, 4),
    lambda: nn.Linear(4, 4, bias=False),
    lambda: nn.ReLU(),
    lambda: nn.LeakyReLU(-1.5),
    lambda: nn.Hardtanh(-0.7, 0.9),
    lambda: nn.Softshrink(0.3),
    lambda: nn.Dropout(0.3),
    _prelu,
    _batch_norm,
    lambda: _between((1, 4), nn.Conv1d(1, 2, 3, padding=1), 8),
    lambda: _between((2, 2), nn.ConvTranspose1d(2, 1, 3), 4),
    lambda: _between((1, 4), nn.AvgPool1d(2), 2),
    lambda: lnn.SpectralLinear(4, 4, k_coef_lip=3.0),
    lambda: lnn.FrobeniusLinear(4, 4),
    lambda: lnn.GroupSort2(k_coef_lip=0.3),
    lambda: nn.Sequential(lnn.MaxMin(), lnn.SpectralLinear(8, 4)),
    lambda: lnn.HouseHolder(4),
    lambda: lnn.LPReLU(4),
    lambda: lnn.Abs(),
    lambda: _between((1, 2, 2), lnn.ScaledL2NormPool2d(2), 1),
    lambda: Reversed(),
    lambda: Scalings([1.7, -0.3, 2.9]),
    lambda: Scalings([]),
    lambda: nn.Tanh(),  # refused: nobody states its accuracy
    lambda: nn.Softmax(1),  # refused: no rule
)


@st.composite
def chains(draw):
    with torch.random.fork_rng():
        torch.manual_seed(draw(st.integers(0, 99)))
        layers = [make() for make in draw(st.lists(st.sampled_from(CHAIN), min_size=1, max_size=4))]
        head = nn.Linear(4, draw(st.integers(1, 3)))
    model = nn.Sequential(*layers, head)
    model.train(draw(st.integers(0, 9)) == 0)
    return lk.vanilla_export(model) if draw(st.integers(0, 3)) else model


@st.composite
def _inputs(draw):
    if draw(st.integers(0, 2)):
        ordinary = draw(st.integers(0, 2))
        shape = st.integers(0, 3).map(lambda n: (n, 4))
        return draw(tensors(shape, st.sampled_from(PRECISE), ORDINARY if ordinary else None))
    return draw(tensors(shapes(0, 3, 4) | st.just((2, 4)), dtypes(3)))


ANY_RADII = numbers | tensors(shape=shapes(0, 2, 3)) | st.lists(numbers, max_size=3)
RADII = st.sampled_from((0.0, 1e-6, 1e-3, 1.0, 30.0))


def _nearby(x, radius, seed):
    """Of x's format, at most ``radius`` (N,) away, mostly nearly that."""
    step = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    length = torch.linalg.vector_norm(step, dim=1, keepdim=True)
    y = (x.double() + step * (radius[:, None] * (1 - 1e-9)) / length).to(x.dtype)
    inside = torch.linalg.vector_norm(y.double() - x.double(), dim=1) <= radius
    return torch.where(inside[:, None], y, x)


def _computed(model, x):
    with torch.no_grad():
        return model(x).double()


@given(chains(), _inputs(), RADII, ANY_RADII, st.integers(0, 99))
def test_forward_error(model, x, radius, any_radius, seed):
    model = model.to(x.dtype) if x.dtype in PRECISE else model
    got = call("forward_error", certify.forward_error, model, x)
    if got is None:
        return
    error = got[0]
    assert isinstance(error, certify.ForwardError)
    at = call("ForwardError", error.at, any_radius)
    assert at is None or (at[0].shape == x.shape[:1] and bool((at[0] >= 0).all()))
    bound, here = error.at(radius), error.at(0)
    assert bound.shape == x.shape[:1] and bool((bound >= here).all())
    rows = x.reshape(len(x), x[:1].numel()).double().isfinite().all(1)
    assert bool((bound[~rows] == math.inf).all())
    if not (x.dtype in PRECISE and x.dim() == 2):
        return
    if any(hasattr(m, "constraint") for m in model.modules()):
        return  # its weight may be another one in the next forward
    y = _nearby(x, torch.full(x.shape[:1], radius, dtype=torch.float64), seed)
    double = certify.forward_error(copy.deepcopy(model).double(), y.double())
    off = torch.linalg.vector_norm(_computed(model, y) - double.logits, dim=1)
    holds = off <= bound + double.center_error
    assert bool((holds | (bound == math.inf)).all()), (off, bound)


@given(chains(), _inputs(), st.integers(0, 99))
def test_certified_radius_under_rounding(model, x, seed):
    model = model.to(x.dtype) if x.dtype in PRECISE else model
    got = call("certified_radius", certify.certified_radius, model, x)
    if got is None:
        return
    radius = got[0]
    assert radius.shape == x.shape[:1] and finite(radius) and bool((radius >= 0).all())
    if x.dim() != 2 or not bool((radius > 0).any()):
        return
    kept = radius > 0
    x, radius = contiguous(x[kept]), radius[kept]

    def classes(z):
        logits = _computed(model, z)
        return logits.argmax(1) if logits.shape[1] > 1 else logits[:, 0] > 0

    expected = classes(x)
    for trial in range(3):
        assert torch.equal(classes(_nearby(x, radius, seed + trial)), expected)
