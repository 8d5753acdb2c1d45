"""Retraction and projection in Triton, against the reference in float64."""

import cases
import pytest
import torch
from bad_weights import BAD_WEIGHTS, bad_weight

pytest.importorskip("triton")

from lipkernels import backends
from lipkernels import functional as F
from lipkernels.reference import retract as reference

DEVICE = cases.device_of("triton")
pytestmark = [] if backends.is_interpreted() else [pytest.mark.gpu]

SHAPES = [(5, 9), (9, 4), (2, 6, 7), (6, 6), (1, 5)]
SCALES = [1.5, 0.7, 1.0, 1e-3, 1.0]
NARROW = (torch.float32, torch.float16, torch.bfloat16)
PROJECTION = {torch.float32: 1e-6, **{d: torch.finfo(d).eps for d in NARROW[1:]}}  # 3e-7
RETRACTION = {torch.float32: 3e-6, **{d: 2 * torch.finfo(d).eps for d in NARROW[1:]}}  # 1e-6


def near_the_constraint(shape, scale, step, dtype, seed=0):
    w = F.polar_factor(cases.weight_of_condition(shape, 5, seed), backend="reference")
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(shape, generator=generator, dtype=torch.float64)
    return (scale * (w + step * noise)).to(dtype).to(DEVICE)


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_projection_is_the_references(dtype):
    weights = [near_the_constraint(s, k, 1e-3, dtype) for s, k in zip(SHAPES, SCALES, strict=True)]
    for magnitude in (1.0, 1e-3, 1e3):
        grads = [(torch.randn(s) * magnitude).to(dtype).to(DEVICE) for s in SHAPES]
        results = F.project_tangent(grads, weights, SCALES, backend="triton")
        for d, g, w, k in zip(results, grads, weights, SCALES, strict=True):
            assert d.dtype == dtype
            expected = reference.project(g.double().cpu(), w.double().cpu(), k)
            room = PROJECTION[dtype] * torch.linalg.norm(g.double().cpu())
            assert torch.linalg.norm(d.double().cpu() - expected) <= room


def test_projection_of_mixed_formats_and_of_nan():
    w = near_the_constraint((5, 9), 1.0, 1e-3, torch.float32)
    grads = [torch.randn(5, 9, dtype=d, device=DEVICE) for d in (torch.float64, torch.float16)]
    results = F.project_tangent([*grads, grads[1]], [w, w, w.double()], backend="triton")
    assert [r.dtype for r in results] == [torch.float64, torch.float16, torch.float16]
    expected = reference.project(grads[0], w, 1.0)  # whose implementation float64 takes
    torch.testing.assert_close(results[0], expected, rtol=0, atol=0)
    grads[1][0, 0] = torch.nan
    assert F.project_tangent(grads[1], w, backend="triton").isnan().all()


# float32 has every distance; what is rounded in the other formats is the same result.
@pytest.mark.parametrize(
    ("step", "dtype"),
    [
        *((step, torch.float32) for step in (0.0, 1e-3, 0.1)),
        *((step, torch.float16) for step in (0.0, 0.1)),
        (1e-3, torch.bfloat16),
    ],
    ids=str,
)
def test_retraction_is_the_polar_factor_within_the_scale(step, dtype):
    weights = [near_the_constraint(s, k, step, dtype) for s, k in zip(SHAPES, SCALES, strict=True)]
    results = F.retract(weights, SCALES, backend="triton")
    for x, w, k in zip(results, weights, SCALES, strict=True):
        assert x.dtype == dtype
        assert torch.linalg.svdvals(x.double().cpu()).max() <= k
        exact = F.polar_factor(w.double(), k, backend="reference")
        assert (x.double() - exact).abs().max() <= k * RETRACTION[dtype]


def test_retraction_of_bad_weights_stays_within_the_scale():
    # A wide one and a tall one in turns: the kernels transpose it, and do the same.
    turns = [(name, i % 2) for i, name in enumerate(BAD_WEIGHTS)]
    weights = [bad_weight(name, SHAPES[i], torch.float32).to(DEVICE) for name, i in turns]
    results = F.retract(weights, [SCALES[i] for _, i in turns], backend="triton")
    for x, (name, i) in zip(results, turns, strict=True):
        assert torch.linalg.svdvals(x.double().cpu()).max() <= SCALES[i], name
