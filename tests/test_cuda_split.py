"""Mixed lists on the backend "cuda": who computes which weight, with the same results."""

import pytest
import tolerances
import torch
from cases import weight_of_condition
from cuda_kernels import DEVICE, MARKS

from lipkernels import backends
from lipkernels import functional as F
from lipkernels.kernels.cuda import split

pytestmark = MARKS
SHAPES = [(5, 7), (9, 4), (6, 6), (4, 12)]
DTYPES = [torch.float32, torch.float32, torch.float64, torch.bfloat16]


def weights():
    found = []
    for i, (shape, dtype) in enumerate(zip(SHAPES, DTYPES, strict=True)):
        w = weight_of_condition(shape, 3, seed=i).to(DEVICE, dtype)
        found.append(w.requires_grad_())
    return found


@pytest.fixture
def fitting(monkeypatch):
    """Says which shapes fit which family's kernels, and whether Triton can run."""

    def choose(triton, **unfit):
        def fits(family):
            return lambda weight: tuple(weight.shape) not in unfit.get(family, ())

        monkeypatch.setattr(split, "_fits", fits)
        if not triton:
            monkeypatch.setitem(backends._missing, "triton", "left out")
        elif backends.why_not("triton", DEVICE) is not None:
            pytest.skip("Triton cannot run here")

    return choose


def test_names(fitting):
    fitting(False, a=[(9, 4)], b=[(5, 7)])
    assert split.by_size("a")(weights()) == ["cuda", "reference", "reference", "cuda"]
    names = split.backward_by_size("b", "a")(weights())
    assert names == ["recomputed", "reference", "reference", "cuda"]


def test_names_where_triton_can_run(fitting):
    fitting(True, a=[(9, 4)], b=[(5, 7)])
    assert split.by_size("a")(weights()) == ["cuda", "triton", "reference", "cuda"]
    assert split.backward_by_size("b", "a")(weights()) == ["triton", "cuda", "reference", "cuda"]


def assert_near(op, limits, call):
    truth, own = weights(), weights()
    expected = call([w.double() for w in truth], "reference")
    got = call(own, "cuda")
    for g, e, w in zip(got, expected, own, strict=True):
        assert g.dtype == w.dtype
        limit = tolerances.WEIGHT_VALUES[op][w.dtype]
        torch.testing.assert_close(g.double(), e, rtol=0, atol=limit)
    grads = [torch.linspace(-1, 2, g.numel(), device=DEVICE).view(g.shape) for g in got]
    wide = [g.to(x.dtype).double() for g, x in zip(grads, got, strict=True)]
    found = torch.autograd.grad(got, own, [g.to(x.dtype) for g, x in zip(grads, got, strict=True)])
    for g, e in zip(found, torch.autograd.grad(expected, truth, wide), strict=True):
        assert torch.dist(g.double(), e.double()) <= limits[g.dtype] * e.double().norm()


UNFIT = {
    "nothing": {},
    "forward": {"polar": [(9, 4)], "bjorck": [(9, 4)]},
    "backward": {"polar_backward": [(5, 7), (4, 12)]},
    "both": {"polar": [(5, 7)], "polar_backward": [(5, 7), (9, 4)], "bjorck": [(5, 7)]},
}


@pytest.mark.parametrize("unfit", UNFIT)
@pytest.mark.parametrize("triton", [False, True])
def test_polar_factors_of_a_mixed_list(fitting, triton, unfit):
    fitting(triton, **UNFIT[unfit])
    limits = tolerances.POLAR_GRADIENT
    assert_near("polar_factor", limits, lambda ws, b: F.polar_factor(ws, backend=b))


@pytest.mark.parametrize("unfit", ["nothing", "forward"])
@pytest.mark.parametrize("triton", [False, True])
def test_bjorck_of_a_mixed_list(fitting, triton, unfit):
    fitting(triton, **UNFIT[unfit])
    limits = tolerances.BJORCK_GRADIENT

    def call(ws, backend):
        return F.bjorck(ws, n_iter=3, backend=backend)[0]

    assert_near("bjorck", limits, call)


@pytest.mark.parametrize("triton", [False, True])
def test_power_iteration_of_a_mixed_list(fitting, triton):
    fitting(triton, power=[(9, 4)])
    own = [w.detach() for w in weights()]
    got = F.power_iteration(own, n_iter=4, backend="cuda")
    expected = F.power_iteration([w.double() for w in own], n_iter=4, backend="reference")
    for parts, references in zip(got, expected, strict=True):
        for part, reference in zip(parts, references, strict=True):
            torch.testing.assert_close(part.double(), reference.double(), rtol=1e-5, atol=1e-5)
