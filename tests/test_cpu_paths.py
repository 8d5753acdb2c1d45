"""The polar factor and the sort by the op, by autograd functions, by itself: one result."""

import cases
import pytest
import torch
from cpu_kernels import F32, assert_same_bits, generator, near_orthogonal
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from lipkernels import functional as F
from lipkernels.kernels import polar, sorting
from lipkernels.kernels.cpu import library as cpu
from lipkernels.kernels.eager import is_plain_eager

pytestmark = pytest.mark.skipif(not cpu.is_built(), reason="no C++ library here")


class Subclass(torch.Tensor):
    pass


def test_plain_eager_is_recognized():
    x = torch.ones(2, 4)
    assert is_plain_eager((x, torch.nn.Parameter(x)))
    assert is_plain_eager(())
    seen = []

    def record(y):
        seen.append(is_plain_eager((y,)))
        return y * 2

    with FakeTensorMode() as mode:
        record(torch.ones(2))
        record(mode.from_tensor(x))
    make_fx(record)(x)
    make_fx(record, tracing_mode="fake")(x)
    torch.func.vmap(record)(x)
    torch.func.grad(lambda y: record(y).sum())(x)
    torch.func.jvp(record, (x,), (x,))
    torch.jit.trace(record, (x,), check_trace=False)
    with torch.device("cpu"):
        record(x)
    record(x.as_subclass(Subclass))
    record(torch.empty(2, device="meta"))
    record(torch._neg_view(x))
    assert len(seen) == 12 and not any(seen)
    assert torch.compile(lambda y: y + is_plain_eager((y,)), backend="eager")(x).eq(1).all()


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_both_paths_give_the_same_bits(backend):
    weights = [near_orthogonal(6, 9), near_orthogonal(9, 6)]
    weights.append(cases.weight_of_condition((30, 40), 100).float())
    grads = [torch.randn(w.shape, generator=generator(3)) for w in weights]
    found = []
    for path in (polar.polar_factor, lambda *a: polar.polar_factor_op(*a)[0]):
        leaves = [w.clone().requires_grad_() for w in weights]
        results = path(leaves, [1.0, 2.0, 0.5], F32, "high", backend)
        found.append(
            [r.detach() for r in results] + list(torch.autograd.grad(results, leaves, grads))
        )
    assert_same_bits(*found)
    x = torch.randn(4, 6, 5, generator=generator())
    found = []
    for path in (sorting.group_sort, lambda *a: sorting.group_sort_op(*a)[0]):
        leaf = x.clone().requires_grad_()
        y = path(leaf, 2, 1, backend)
        found.append([y.detach(), *torch.autograd.grad(y, leaf, torch.cos(x))])
    assert_same_bits(*found)


ALONE = {
    "square": near_orthogonal(12, 12),
    "wide": near_orthogonal(12, 70),
    "tall": near_orthogonal(70, 12),
    "one row": torch.randn(1, 9, generator=generator()),
    "ill-conditioned": cases.weight_of_condition((30, 40), 8).float(),
    "very ill-conditioned": cases.weight_of_condition((40, 30), 1e4).float(),
    "extreme": 1e30 * near_orthogonal(8, 12),
    "zero": torch.zeros(4, 5),
    "not finite": torch.full((3, 4), float("nan")),
}


@pytest.mark.parametrize("name", ALONE)
def test_a_matrix_by_itself_gives_the_same_bits(name):
    w = ALONE[name]
    noise = torch.randn(w.shape, generator=generator(3))
    grads = {
        "contiguous": noise,
        "transposed": noise.T.contiguous().T,
        "expanded": torch.ones(()).expand(w.shape),
        "negative": torch._neg_view(noise),
    }
    for scale in (1.0, 0.3):
        for grad in grads.values():
            found = []
            for weights in ([w], [w, near_orthogonal(3, 4)]):
                leaf, *others = (x.clone().requires_grad_() for x in weights)
                result = F.polar_factor([leaf, *others], scale, backend="cpu")[0]
                found.append([result.detach(), *torch.autograd.grad(result, leaf, grad)])
            assert_same_bits(*found)


def test_a_matrix_by_itself_keeps_what_the_others_do():
    w = near_orthogonal(12, 70).requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        F.polar_factor(w, backend="cpu")
    assert [tuple(t.shape) for t in kept] == [(12, 70), (12, 70), (12 * 12 + 12 + 2,)]
    with torch.no_grad():
        assert not F.polar_factor(w, backend="cpu").requires_grad
    result = F.polar_factor(w, backend="cpu")
    with torch.no_grad():
        w.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        result.sum().backward()


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_no_second_derivative_of_the_polar_factor_on_either_path(backend):
    constant = torch.randn(6, 9, generator=generator())
    for path in (polar.polar_factor, lambda *a: polar.polar_factor_op(*a)[0]):
        for n in (1, 2):
            for loss in (lambda u: u.square().sum() + u.sum(), lambda u: (u * constant).sum()):
                leaf = near_orthogonal(6, 9).requires_grad_()
                u = path([leaf, near_orthogonal(3, 4)][:n], [1.0] * n, F32, "high", backend)[0]
                (gradient,) = torch.autograd.grad(loss(u), leaf, create_graph=True)
                # Never left out in silence beside something that can be differentiated.
                with pytest.raises(RuntimeError):
                    (gradient.sum() + u.sum()).backward()


@pytest.mark.parametrize("shape", [(24, 24), (24, 48), (48, 24), (150, 150)], ids=str)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e38], ids=str)
def test_gradients_that_are_not_finite_stay_so(shape, bad):
    weights = [near_orthogonal(*shape), cases.weight_of_condition(shape, 1e3).float()]
    for w in weights:
        grad = bad * torch.randn(shape, generator=generator()).abs().clamp_min(1)
        if bad != 1e38:
            grad = torch.randn(shape, generator=generator())
            grad[0, 0] = bad
        leaf = w.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(F.polar_factor(leaf, backend="cpu"), leaf, grad)
        assert not gradient.isfinite().all()


def test_a_result_that_nobody_uses():
    a, b = near_orthogonal(4, 6).requires_grad_(), near_orthogonal(5, 3).requires_grad_()
    u, _ = F.polar_factor([a, b], backend="cpu")
    u.sum().backward()
    alone = a.detach().clone().requires_grad_()
    F.polar_factor(alone, backend="cpu").sum().backward()
    assert_same_bits([a.grad], [alone.grad])
    assert b.grad is None or not bool(b.grad.any())
