"""What the random calls found, each as a case of its own."""

import pytest
import torch
from cases import laid_out
from operator_norm import assert_within
from torch import nn

import lipkernels.nn as lnn
from lipkernels import Retractor, certify, metrics, parametrizations
from lipkernels import functional as F


@pytest.mark.parametrize("op", [F.polar_factor, F.frobenius_normalize])
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (7, 2), (40, 40)])
@pytest.mark.parametrize("scale", [0.3, 1.0])
def test_float64_result_of_a_float32_weight_keeps_the_bound(op, shape, scale):
    # Computed in float32 it exceeded the scale by 4e-8.
    for seed in range(10):
        weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        leaf = weight.requires_grad_()
        result = op(leaf, scale, dtype=torch.float64)
        assert result.dtype == torch.float64
        assert_within(result, scale, seed)
        result.sum().backward()
        assert leaf.grad.dtype == torch.float32 and leaf.grad.isfinite().all()


@pytest.mark.parametrize("op", ["spectral_normalize", "bjorck", "frobenius_normalize"])
@pytest.mark.parametrize("layout", ["transposed", "strided", "offset"])
def test_the_layout_of_a_weight_changes_no_bit(op, layout):
    weight = torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(0))
    results = [getattr(F, op)(w) for w in (weight, laid_out(weight, layout))]
    a, b = (r[0] if isinstance(r, tuple) else r for r in results)
    assert torch.equal(a, b)


def test_power_iteration_beyond_the_format_is_still_a_lower_bound():
    weight = torch.tensor([[3.4028e38, -9.9849e37]])
    sigma, _, _ = F.power_iteration(weight, n_iter=1)
    norm = torch.linalg.matrix_norm(weight.double(), 2)
    assert norm > torch.finfo(torch.float32).max
    assert 0.9 * norm < sigma.double() <= norm


def test_power_iteration_from_a_huge_vector():
    weight = torch.tensor([[1.5], [-0.3], [2.0]])
    start = torch.tensor([1.7e308, -1e305, 1e308], dtype=torch.float64)
    sigma, u, _ = F.power_iteration(weight, start, n_iter=1)
    torch.testing.assert_close(sigma, torch.linalg.vector_norm(weight))
    assert u.isfinite().all()


def test_empty_weights_under_a_parametrization():
    for shape in ((0, 0, 0), (0, 3, 2), (3, 0, 2), (0,)):
        assert parametrizations.PolarFactor()(torch.zeros(shape)).shape == shape


def test_exported_sort_of_an_empty_batch():
    for x in (torch.zeros(0, 4), torch.zeros(2, 4, 0)):
        assert lnn.GroupSort(2).vanilla_export()(x).shape == x.shape


IMAGE = torch.zeros(1, 2, 4, 4)
FLOAT8 = torch.float8_e4m3fn
REFUSED = {
    "sort complex": lambda: F.group_sort(IMAGE.cfloat(), 2),
    "sort uint16": lambda: F.group_sort(IMAGE.to(torch.uint16), 2),
    "odd width of nothing": lambda: F.group_sort(torch.zeros(0, 5), 2),
    "sort by a real dim": lambda: F.group_sort(IMAGE, 2, 1.0),
    "max_min uint8": lambda: F.max_min(IMAGE.to(torch.uint8)),  # -x wrapped
    "max_min bool": lambda: F.max_min(IMAGE.bool()),
    "householder integers": lambda: F.householder(IMAGE.long(), torch.ones(1)),  # truncated
    "householder angles": lambda: F.householder(IMAGE, [1.0]),
    "lprelu integers": lambda: F.lprelu(IMAGE.long(), torch.ones(1)),
    "pad by reals": lambda: F.symmetric_pad(IMAGE, (1.0, 1.0)),
    "pad a list": lambda: F.symmetric_pad([1], (1, 1)),
    "pad uint16": lambda: F.symmetric_pad(IMAGE.to(torch.uint16), (1, 1)),
    "pool without channels": lambda: F.l2_norm_pool2d(IMAGE[:, :0], 2),
    "pool beyond the image": lambda: F.l2_norm_pool2d(IMAGE[..., :1, :1], 2, 1, 0, True),
    "average beyond the image": lambda: lnn.ScaledAvgPool2d(3, 1)(IMAGE[..., :2, :2]),
    "average of integers": lambda: lnn.ScaledAdaptiveAvgPool2d()(IMAGE.long()),
    "average of nothing": lambda: lnn.ScaledAdaptiveAvgPool2d()(IMAGE[..., :0]),
    "abs of uint16": lambda: lnn.Abs()(IMAGE.to(torch.uint16)),
    "scaled float8": lambda: F.space_to_depth(IMAGE.to(FLOAT8), 2, scale=2.0),
    "vector as a matrix": lambda: F.initial_vector(torch.zeros(3)),
    "integers as a matrix": lambda: F.initial_vector(torch.zeros(3, 3, dtype=torch.int64)),
    "scales of nothing": lambda: F.spectral_normalize([], [1.0]),
    "scalar weight": lambda: parametrizations.PolarFactor()(torch.tensor(1.0)),
    "small image": lambda: lnn.SpectralConv2d(2, 2, 5)(IMAGE),
    "no pixels": lambda: lnn.SpectralConv2d(2, 2, 1)(IMAGE[..., :0]),
    "small for reflection": lambda: lnn.SpectralConv2d(2, 2, 3, padding=1, padding_mode="reflect")(
        IMAGE[..., :1]
    ),
    "all cropped": lambda: lnn.SpectralConvTranspose2d(2, 2, 3, padding=2)(IMAGE[..., :1, :1]),
    "float8 logits": lambda: metrics.clean_accuracy(torch.zeros(2, 1).to(FLOAT8), torch.zeros(2)),
    "float8 labels": lambda: metrics.clean_accuracy(torch.zeros(2, 1), torch.zeros(2).to(FLOAT8)),
    "float8 targets": lambda: lnn.KRLoss()(torch.zeros(2), torch.zeros(2).to(FLOAT8)),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_a_message(name):
    with pytest.raises((ValueError, TypeError), match=r"(expected|must).*got"):
        REFUSED[name]()


def test_the_smallest_images_are_not_refused():
    for stride in (1, 2, 3):
        for padding in (0, 1):
            layer = lnn.SpectralConv2d(1, 1, 3, stride, padding, padding_mode="circular")
            least = 3 - 2 * padding
            assert layer(torch.zeros(1, 1, least, least)).shape[-2:] == (1, 1)
    transposed = lnn.SpectralConvTranspose2d(1, 1, 3, 2, 2, 1)
    assert transposed(torch.zeros(1, 1, 2, 2)).shape[-2:] == (2, 2)
    assert F.l2_norm_pool2d(torch.ones(1, 1, 1), 2, 2, 0, True).shape == (1, 1, 1)


SCALES = {torch.float32: (1e-30, 1e-20, 1.0, 1e20, 1e30), torch.float64: (1e-200, 1e-30, 1e200)}


@pytest.mark.parametrize(("dtype", "scale"), [(d, s) for d in SCALES for s in SCALES[d]])
def test_tangents_at_any_scale(dtype, scale):
    # The square of the scale underflowed: the gradient of a held weight was NaN, or not projected.
    generator = torch.Generator().manual_seed(0)
    raw, grad = (torch.randn(3, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    unit = F.polar_factor(raw)
    got = F.project_tangent(grad.to(dtype), (unit * scale).to(dtype), scale)
    torch.testing.assert_close(got.double(), F.project_tangent(grad, unit), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_forward_error_of_exact_zeros(dtype):
    # What stood for "no error at all" was above the bound: this machine was said to be at fault.
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 1)).to(dtype)
    error = certify.forward_error(model, torch.zeros(2, 4, dtype=dtype))
    assert bool((error.at(0) < 1e-6).all())


def test_fingerprints_do_not_depend_on_the_layout():
    x = torch.randn(3, 4)
    y = x.t().contiguous().t()
    assert F.fingerprint(x) == F.fingerprint(y)
    y[0, 1] += 1
    assert F.fingerprint(x) != F.fingerprint(y)


LINEAR = nn.Linear(4, 2)
CONV = nn.Conv1d(2, 2, 2)
SAMPLES = torch.zeros(2, 4)
UNFIT = {
    "fingerprint of no tensor": lambda: F.fingerprint(3),
    "fingerprint of nothing": lambda: F.fingerprint(torch.zeros(2, device="meta")),
    "norm by no factor": lambda: certify.largest_norm(1.0, 0),
    "norm of nan": lambda: certify.largest_norm(float("nan"), 1.0),
    "shrunk number": lambda: certify.shrunk(3, 1.0),
    "shrunk to any norm": lambda: certify.shrunk(torch.tensor([[float("nan")]]), float("inf")),
    "factor of a linear layer": lambda: certify.convolution_factor(LINEAR, (3,)),
    "factor of another kernel": lambda: certify.convolution_factor(CONV, (3, 3)),
    "radius of another length": lambda: certify.forward_error(LINEAR, SAMPLES).at([1.0] * 3),
    "radius of words": lambda: certify.forward_error(LINEAR, SAMPLES).at(["1"]),
    "no radius": lambda: certify.forward_error(LINEAR, SAMPLES).at(None),
    "error of no module": lambda: certify.forward_error(3, SAMPLES),
    "error of float8": lambda: certify.forward_error(LINEAR, SAMPLES.to(FLOAT8)),
    "error of another width": lambda: certify.forward_error(LINEAR, torch.zeros(2, 5)),
    "retractor of no module": lambda: Retractor(3),
}


@pytest.mark.parametrize("what", UNFIT)
def test_unfit_arguments_are_refused(what):
    with pytest.raises((TypeError, ValueError), match="expect"):
        UNFIT[what]()
