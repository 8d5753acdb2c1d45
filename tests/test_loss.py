"""Losses against slow loops in plain Python, their gradients, and what they refuse."""

import copy
import math
import pickle
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lipkernels.nn import loss as L

# ---------------------------------------------------------------------------- slow references
# f: list of rows of logits; y: rows of +1/-1 (binary) or class indices. Each returns a list of
# per-sample values.


def slow_kr(f, y):
    n, c = len(f), len(f[0])
    values = [0.0] * n
    for k in range(c):
        n_pos = sum(1 for i in range(n) if y[i][k] > 0)
        n_neg = n - n_pos
        if n_pos and n_neg:
            for i in range(n):
                weight = n / n_pos if y[i][k] > 0 else -n / n_neg
                values[i] += weight * f[i][k] / c
    return values


def slow_hinge(f, y, m):
    return [
        sum(max(0.0, m / 2 - (1 if b > 0 else -1) * a) for a, b in zip(fi, yi, strict=True))
        / len(fi)
        for fi, yi in zip(f, y, strict=True)
    ]


def slow_hkr(f, y, alpha, m):
    pairs = zip(slow_hinge(f, y, m), slow_kr(f, y), strict=True)
    return [alpha * h - (1 - alpha) * k for h, k in pairs]


def signs(f, y):
    return [[1 if k == yi else -1 for k in range(len(fi))] for fi, yi in zip(f, y, strict=True)]


def slow_hinge_multi(f, y, m):
    values = []
    for fi, yi in zip(f, y, strict=True):
        c = len(fi)
        total = (c - 1) * max(0.0, m / 2 - fi[yi])
        total += sum(max(0.0, m / 2 + fi[k]) for k in range(c) if k != yi)
        values.append(total / c)
    return values


def slow_hkr_multi(f, y, alpha, m):
    pairs = zip(slow_hinge_multi(f, y, m), slow_kr(f, signs(f, y)), strict=True)
    return [alpha * h - (1 - alpha) * k for h, k in pairs]


def slow_categorical(f, y, m):
    return [
        max(0.0, m - fi[yi] + max(a for k, a in enumerate(fi) if k != yi))
        for fi, yi in zip(f, y, strict=True)
    ]


def slow_soft(f, y, alpha, m, temperature, mean):
    t = min(max(temperature * m / max(mean, m), 0.005), 250.0)
    values = []
    for fi, yi in zip(f, y, strict=True):
        wrong = [a for k, a in enumerate(fi) if k != yi]
        e = [math.exp(t * (a - max(wrong))) for a in wrong]
        w = [a / sum(e) for a in e]
        kr = sum(a * b for a, b in zip(w, wrong, strict=True)) - fi[yi]
        hinge = max(0.0, m / 2 - fi[yi])
        hinge += sum(a * max(0.0, m / 2 + b) for a, b in zip(w, wrong, strict=True))
        values.append((1 - alpha) * kr + alpha * hinge)
    return values


def slow_lse(f, y, alpha, temperature, penalty, m):
    values = []
    for fi, yi in zip(f, y, strict=True):
        g = [temperature * a for a in fi]
        wrong = [a for k, a in enumerate(g) if k != yi]
        if len(wrong) == 1:
            s = wrong[0]
        else:
            t = math.log(len(wrong)) / (m * penalty / 2)
            s = math.log(sum(math.exp(t * a) for a in wrong)) / t
        hinge = max(0.0, m / 2 - g[yi]) + max(0.0, m / 2 + s)
        values.append((1 - alpha) * (s - g[yi]) + alpha * hinge)
    return values


def slow_cross_entropy(f, y, inverse, offset=0.0):
    values = []
    for fi, yi in zip(f, y, strict=True):
        z = [inverse * (a - (offset if k == yi else 0.0)) for k, a in enumerate(fi)]
        values.append((math.log(sum(math.exp(a) for a in z)) - z[yi]) / inverse)
    return values


def slow_bce(f, y, tau):
    return [
        [
            math.log1p(math.exp(-tau * a * (1 if b > 0 else -1))) / tau
            for a, b in zip(fi, yi, strict=True)
        ]
        for fi, yi in zip(f, y, strict=True)
    ]


BINARY = {
    "KR": (L.KRLoss, {}, slow_kr),
    "NegKR": (L.NegKRLoss, {}, lambda f, y: [-v for v in slow_kr(f, y)]),
    "HingeMargin": (L.HingeMarginLoss, {"min_margin": 1.5}, lambda f, y: slow_hinge(f, y, 1.5)),
    "HKR": (L.HKRLoss, {"alpha": 0.7}, lambda f, y: slow_hkr(f, y, 0.7, 1.0)),
    "HKR-0": (L.HKRLoss, {"alpha": 0}, lambda f, y: slow_hkr(f, y, 0.0, 1.0)),
    "HKR-1": (L.HKRLoss, {"alpha": 1, "min_margin": 3}, lambda f, y: slow_hinge(f, y, 3.0)),
    "TauBCE": (L.TauBCEWithLogitsLoss, {"tau": 3.0}, lambda f, y: slow_bce(f, y, 3.0)),
}
MULTI = {
    "KRMulti": (L.KRMulticlassLoss, {}, lambda f, y: slow_kr(f, signs(f, y))),
    "HingeMulti": (
        L.HingeMulticlassLoss,
        {"min_margin": 1.5},
        lambda f, y: slow_hinge_multi(f, y, 1.5),
    ),
    "HKRMulti": (
        L.HKRMulticlassLoss,
        {"alpha": 0.7, "min_margin": 0.5},
        lambda f, y: slow_hkr_multi(f, y, 0.7, 0.5),
    ),
    "HKRMulti-1": (L.HKRMulticlassLoss, {"alpha": 1}, lambda f, y: slow_hinge_multi(f, y, 1.0)),
    "Soft": (
        L.SoftHKRMulticlassLoss,
        {"alpha": 0.75, "min_margin": 0.5, "temperature": 3.0},
        lambda f, y: slow_soft(f, y, 0.75, 0.5, 3.0, mean=0.5),
    ),
    "Lse": (
        L.LseHKRMulticlassLoss,
        {"alpha": 0.75, "temperature": 2.0, "penalty": 0.8, "min_margin": 1.5},
        lambda f, y: slow_lse(f, y, 0.75, 2.0, 0.8, 1.5),
    ),
    "Lse-default": (L.LseHKRMulticlassLoss, {}, lambda f, y: slow_lse(f, y, 1.0, 1.0, 1.0, 1.0)),
    "Categorical": (
        L.CategoricalHingeLoss,
        {"min_margin": 1.5},
        lambda f, y: slow_categorical(f, y, 1.5),
    ),
    "TauCE": (L.TauCrossEntropyLoss, {"tau": 3.0}, lambda f, y: slow_cross_entropy(f, y, 3.0)),
    "MarginCE": (
        L.MarginCrossEntropyLoss,
        {"temperature": 0.4, "offset": 1.2},
        lambda f, y: slow_cross_entropy(f, y, 1 / 0.4, offset=1.2),
    ),
}
ALL = BINARY | MULTI
# Two terms cancel in KR, hence absolute as well as relative; float32 covers 16-bit inputs, which
# are exact in float32 and computed there.
TOL = {torch.float64: {"rtol": 1e-12, "atol": 1e-12}, torch.float32: {"rtol": 1e-5, "atol": 1e-5}}


def data(name, n=9, c=4, dtype=torch.float64, seed=0):
    """Logits (n, c), labels (+1/-1 or indices), for the loss ``name``."""
    gen = torch.Generator().manual_seed(seed)
    logits = (1.5 * torch.randn(n, c, generator=gen, dtype=torch.float64)).to(dtype)
    if name in MULTI:
        return logits, torch.randint(c, (n,), generator=gen)
    return logits, torch.where(torch.rand(n, c, generator=gen) > 0.4, 1, -1)


def make(name, **kwargs):
    """The loss, in eval mode: the running mean of SoftHKR would move with each call."""
    cls, defaults, _ = ALL[name]
    return cls(**defaults, **kwargs).eval()


@pytest.mark.parametrize("shape", [(9, 4), (1, 3), (2, 2), (30, 7)])
@pytest.mark.parametrize("name", ALL)
def test_values(name, shape):
    logits, target = data(name, *shape)
    want = np.array(ALL[name][2](logits.tolist(), target.tolist()))
    got = make(name, reduction="none")(logits, target)
    assert got.shape == want.shape and got.dtype == logits.dtype
    np.testing.assert_allclose(got.numpy(), want, **TOL[torch.float64])
    for reduction, value in (("mean", want.mean()), ("sum", want.sum()), ("auto", want.mean())):
        got = make(name, reduction=reduction)(logits, target)
        assert got.shape == ()
        np.testing.assert_allclose(got.item(), value, **TOL[torch.float64])
    assert make(name).reduction == make(name, reduction="auto").reduction == "mean"


@pytest.mark.parametrize("name", BINARY)
def test_binary_column(name):
    logits, target = data(name, 8, 1)
    want = ALL[name][2](logits.tolist(), target.tolist())
    loss = make(name, reduction="none")
    for f, y in ((logits, target), (logits[:, 0], target[:, 0]), (logits[:, 0], target)):
        got = loss(f, y)
        np.testing.assert_allclose(got.reshape(-1), np.ravel(want), **TOL[torch.float64])
    torch.testing.assert_close(loss(logits, target[:, 0]), loss(logits, target), rtol=0, atol=0)


@pytest.mark.parametrize("name", ALL)
def test_gradcheck(name):
    logits, target = data(name, 5, 3)
    logits.requires_grad_()
    for reduction in ("none", "mean"):
        loss = make(name, reduction=reduction)
        assert torch.autograd.gradcheck(lambda x, loss=loss: loss(x, target), logits)


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e4, 1e30])
@pytest.mark.parametrize("name", ALL)
def test_gradient_is_finite(name, scale):
    logits, target = data(name, dtype=torch.float32)
    logits = (scale * logits).requires_grad_()
    value = make(name)(logits, target)
    value.backward()
    assert value.isfinite() and logits.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ALL)
def test_dtype(name, dtype):
    logits, target = data(name, dtype=dtype)
    logits.requires_grad_()
    value = make(name)(logits, target)
    value.backward()
    assert value.dtype == torch.float32 and logits.grad.dtype == dtype
    exact = logits.detach().double().requires_grad_()
    want = make(name)(exact, target)
    want.backward()
    torch.testing.assert_close(value.double(), want, **TOL[torch.float32])
    # The only rounding of the gradient below float32 is the cast to the logits' dtype.
    torch.testing.assert_close(logits.grad, exact.grad.to(dtype))


@pytest.mark.parametrize("name", ALL)
def test_non_contiguous_and_unmutated(name):
    logits, target = data(name)
    strided = logits.t().contiguous().t()
    before, labels = strided.clone(), target.clone()
    torch.testing.assert_close(make(name)(strided, target), make(name)(logits, target))
    assert torch.equal(strided, before) and torch.equal(target, labels)


@pytest.mark.parametrize("name", ALL)
def test_empty_batch(name):
    logits, target = data(name, 0, 3)
    logits.requires_grad_()
    for reduction in ("mean", "sum"):
        value = make(name, reduction=reduction)(logits, target)
        assert value.item() == 0
        (grad,) = torch.autograd.grad(value, logits)
        assert grad.shape == (0, 3)
    assert len(make(name, reduction="none")(logits, target)) == 0


INTEGERS = [torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8]


@pytest.mark.parametrize("name", BINARY)
def test_forms_of_binary_labels(name):
    logits, target = data(name)
    want = make(name)(logits, target)
    zero_one = target > 0
    for dtype in [torch.bool, torch.float32, torch.float64, torch.bfloat16, *INTEGERS]:
        assert torch.equal(make(name)(logits, zero_one.to(dtype)), want)
    assert torch.equal(make(name)(logits, target.float()), want)


@pytest.mark.parametrize("name", MULTI)
def test_forms_of_class_labels(name):
    logits, index = data(name)
    want = make(name)(logits, index)
    for dtype in INTEGERS:
        assert torch.equal(make(name)(logits, index.to(dtype)), want)
    one_hot = F.one_hot(index, logits.shape[1])
    for dtype in [torch.bool, torch.float32, torch.float64, *INTEGERS]:
        torch.testing.assert_close(make(name)(logits, one_hot.to(dtype)), want)
    if name != "TauCE":
        assert torch.equal(make(name)(logits, 2 * one_hot - 1), want)


# ------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("name", ALL)
def test_bad_input(name):
    logits, target = data(name, 6, 3)
    loss = make(name)
    for bad in (logits.long(), logits > 0, logits.to(torch.complex64), logits.tolist()):
        with pytest.raises(TypeError, match="input must"):
            loss(bad, target)
    with pytest.raises(TypeError, match="target must"):
        loss(logits, target.tolist())
    with pytest.raises(TypeError, match="target must"):
        loss(logits, target.to(torch.complex64))
    with pytest.raises(ValueError, match=r"target must .* got \(5"):
        loss(logits, target[:5])
    with pytest.raises(ValueError, match="device"):
        loss(logits, target.to("meta"))
    with pytest.raises(ValueError, match="input must have shape"):
        loss(logits[0, 0], target)
    with pytest.raises(ValueError, match="reduction must be"):
        make(name, reduction="max")
    with pytest.raises(ValueError, match="reduction must be"):
        make(name, reduction=False)


@pytest.mark.parametrize("name", BINARY)
def test_bad_binary_labels(name):
    logits, target = data(name, 6, 3)
    for bad in (2, -2, 0.5, float("nan")):
        labels = target.double()
        labels[2, 1] = bad
        with pytest.raises(ValueError, match="labels 0/1 or -1"):
            make(name)(logits, labels)
    # -1 as an unsigned integer is not -1
    with pytest.raises(ValueError, match="got 255"):
        make(name)(logits, target.to(torch.uint8))
    with pytest.raises(ValueError, match="target must have the shape of input"):
        make(name)(logits, target.t())
    with pytest.raises(ValueError, match="input must have shape"):
        make(name)(logits[None], target[None])


@pytest.mark.parametrize("name", MULTI)
def test_bad_class_labels(name):
    logits, index = data(name, 6, 3)
    for bad in (3, -1, 100):
        labels = index.clone()
        labels[2] = bad
        with pytest.raises(ValueError, match=rf"\[0, 3\), got {bad}"):
            make(name)(logits, labels)
    for bad in (index.float(), index > 0):
        with pytest.raises(TypeError, match="class indices must have an integer dtype"):
            make(name)(logits, bad)
    if name == "TauCE":
        for bad in (-1.0, 1.5, float("nan")):
            with pytest.raises(ValueError, match=r"probabilities must lie in \[0, 1\]"):
                make(name)(logits, torch.full_like(logits, bad))
        return
    one_hot = F.one_hot(index, 3)
    none, two = one_hot.clone(), one_hot.clone()
    none[1], two[1] = 0, 1
    for bad in (none, two):
        with pytest.raises(ValueError, match="exactly one positive label"):
            make(name)(logits, bad)
    with pytest.raises(ValueError, match="labels 0/1"):
        make(name)(logits, 2 * one_hot)
    for bad in (logits[:, :1], logits[0], logits[None]):
        with pytest.raises(ValueError, match="C >= 2"):
            make(name)(bad, index)


ARGUMENTS = [
    (L.HingeMarginLoss, {}, "min_margin", 0.0),
    (L.HKRLoss, {"alpha": 0.5}, "min_margin", 0.0),
    (L.HKRLoss, {}, "alpha", 0.0),
    (L.HingeMulticlassLoss, {}, "min_margin", 0.0),
    (L.HKRMulticlassLoss, {"alpha": 0.5}, "min_margin", 0.0),
    (L.HKRMulticlassLoss, {}, "alpha", 0.0),
    (L.CategoricalHingeLoss, {}, "min_margin", 0.0),
    (L.SoftHKRMulticlassLoss, {}, "alpha", 0.0),
    (L.SoftHKRMulticlassLoss, {}, "alpha_mean", 0.0),
    (L.SoftHKRMulticlassLoss, {}, "min_margin", None),
    (L.SoftHKRMulticlassLoss, {}, "temperature", None),
    (L.LseHKRMulticlassLoss, {}, "alpha", 0.0),
    (L.LseHKRMulticlassLoss, {}, "min_margin", None),
    (L.LseHKRMulticlassLoss, {}, "penalty", None),
    (L.LseHKRMulticlassLoss, {}, "temperature", None),
    (L.TauCrossEntropyLoss, {}, "tau", None),
    (L.TauBCEWithLogitsLoss, {}, "tau", None),
    (L.MarginCrossEntropyLoss, {}, "temperature", None),
    (L.MarginCrossEntropyLoss, {}, "offset", 0.0),
]


@pytest.mark.parametrize(("cls", "others", "name", "zero"), ARGUMENTS)
def test_bad_arguments(cls, others, name, zero):
    """``zero``: 0.0 where zero is allowed, None where it is not."""
    for bad in (-0.1, float("nan"), float("inf"), *([0.0] if zero is None else [])):
        with pytest.raises(ValueError, match=f"{name} must be"):
            cls(**others, **{name: bad})
    for bad in ("1", None, True, torch.tensor(1.0)):
        with pytest.raises(TypeError, match=f"{name} must be"):
            cls(**others, **{name: bad})
    if zero is not None:
        cls(**others, **{name: zero})
    assert f"{name}=0.25" in repr(cls(**others, **{name: np.float32(0.25)}))


def test_alpha_mean_above_one():
    with pytest.raises(ValueError, match="alpha_mean must lie"):
        L.SoftHKRMulticlassLoss(alpha_mean=1.01)


@pytest.mark.parametrize(
    "cls", [L.HKRLoss, L.HKRMulticlassLoss, L.SoftHKRMulticlassLoss, L.LseHKRMulticlassLoss]
)
def test_alpha_above_one(cls):
    with pytest.warns(UserWarning, match="alpha=0.9 in") as record:
        assert cls(alpha=9).alpha == pytest.approx(0.9)
    assert record[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cls(alpha=1).alpha == 1


@pytest.mark.parametrize("cls", [L.KRLoss, L.NegKRLoss, L.HKRLoss, L.HKRMulticlassLoss])
def test_arguments_that_are_not_there(cls):
    """A positional multi_gpu of other libraries must not be read as something else."""
    positional = (0.5, 1.0) if "HKR" in cls.__name__ else ()
    with pytest.raises(TypeError):
        cls(*positional, False)
    with pytest.raises(TypeError):
        cls(*positional, multi_gpu=True)


# ------------------------------------------------------------------------- what is particular


def test_kr_by_hand():
    f = torch.tensor([1.0, 5.0, 2.0, 0.0])
    y = torch.tensor([1, 1, 1, 0])
    assert L.KRLoss()(f, y).item() == pytest.approx(8 / 3)
    assert L.NegKRLoss()(f, y).item() == pytest.approx(-8 / 3)
    values = L.KRLoss(reduction="none")(f, y)
    torch.testing.assert_close(values, torch.tensor([4 / 3, 20 / 3, 8 / 3, 0.0]))
    loss = L.HKRLoss(0.5, min_margin=2.0)  # hinge: 0, 0, 0, 1
    assert loss(f, y).item() == pytest.approx(0.5 * 0.25 - 0.5 * 8 / 3)


@pytest.mark.parametrize("label", [0, 1])
def test_kr_of_one_class_is_zero(label):
    f = torch.randn(5, 1, dtype=torch.float64, requires_grad=True)
    y = torch.full((5, 1), label)
    value = L.NegKRLoss()(f, y)
    value.backward()
    assert value.item() == 0 and f.grad.abs().max() == 0
    hinge = L.HingeMarginLoss()(f, y)
    torch.testing.assert_close(L.HKRLoss(0.3)(f, y), 0.3 * hinge)


def test_kr_does_not_push_the_bias():
    """A shift of all logits leaves KR as it is, whichever classes the batch has."""
    f = torch.randn(6, 5, dtype=torch.float64)
    y = torch.tensor([0, 0, 2, 2, 2, 0])  # classes 1, 3, 4 are missing
    bias = torch.zeros(5, dtype=torch.float64, requires_grad=True)
    value = L.KRMulticlassLoss()(f + bias, y)
    value.backward()
    torch.testing.assert_close(bias.grad, torch.zeros(5, dtype=torch.float64), atol=1e-15, rtol=0)
    present = slow_kr(f[:, [0, 2]].tolist(), signs([[0, 0]] * 6, [k // 2 for k in y.tolist()]))
    assert value.item() == pytest.approx(np.mean(present) * 2 / 5)


def test_large_batch_of_half_precision():
    """N / N+ overflows float16 here; the loss does not."""
    f = torch.ones(100_000, 1, dtype=torch.float16)
    y = torch.zeros(100_000, 1)
    y[0] = 1
    f[0] = 3
    assert L.KRLoss()(f, y).item() == pytest.approx(2.0, rel=1e-4)


def test_hinge_multiclass_balances_the_true_class():
    f = torch.tensor([[0.0, 0.0, 0.0, 0.0]], requires_grad=True)
    L.HingeMulticlassLoss()(f, torch.tensor([1])).backward()
    torch.testing.assert_close(f.grad, torch.tensor([[0.25, -0.75, 0.25, 0.25]]))


def test_categorical_hinge_zero_means_radius():
    logits, target = data("Categorical", 200, 4)
    values = L.CategoricalHingeLoss(0.5, reduction="none")(logits, target)
    top = logits.topk(2).values
    satisfied = (logits.argmax(1) == target) & (top[:, 0] - top[:, 1] >= 0.5)
    assert satisfied.any() and torch.equal(values == 0, satisfied)


def test_lse_is_a_smooth_maximum():
    f = torch.tensor([[0.0, 3.0, 3.0, 3.0], [0.0, 3.0, -9.0, -9.0]], dtype=torch.float64)
    y = torch.tensor([0, 0])
    # alpha 0 and a zero true logit: the value is s
    s = L.LseHKRMulticlassLoss(0.0, penalty=0.5, min_margin=2.0, reduction="none")(f, y)
    torch.testing.assert_close(s, torch.tensor([3.5, 3.0], dtype=torch.float64))


def test_lse_of_two_classes():
    f = torch.tensor([[1.0, 0.5]], dtype=torch.float64, requires_grad=True)
    value = L.LseHKRMulticlassLoss(0.0)(f, torch.tensor([0]))
    value.backward()
    assert value.item() == -0.5 and f.grad.tolist() == [[-1.0, 1.0]]


def test_soft_running_mean():
    loss = L.SoftHKRMulticlassLoss(0.75, 0.5, alpha_mean=0.9, temperature=2.0)
    mean = 0.5
    for seed in range(3):
        f, y = data("Soft", seed=seed)
        f = 4 * f
        mean = 0.9 * mean + 0.1 * f.abs().mean().item()
        got = loss(f, y).item()
        want = np.mean(slow_soft(f.tolist(), y.tolist(), 0.75, 0.5, 2.0, mean))
        assert got == pytest.approx(want, rel=1e-6)  # the mean is kept in float32
        assert loss.current_mean.item() == pytest.approx(mean, rel=1e-6)
    before = loss.current_mean.clone()
    loss.eval()(f, y)
    loss.train()(f[:0], y[:0])
    loss(torch.full_like(f, float("nan")), y)
    loss(torch.full_like(f, float("inf")), y)
    assert torch.equal(loss.current_mean, before)
    loss(1e9 * f, y)
    assert loss.current_mean.item() == 1000


def test_soft_state_travels():
    loss = L.SoftHKRMulticlassLoss(min_margin=0.5)
    assert list(loss.state_dict()) == ["current_mean"] and not list(loss.parameters())
    loss(*data("Soft"))
    assert loss.current_mean.item() != 0.5
    fresh = L.SoftHKRMulticlassLoss(min_margin=0.5)
    fresh.load_state_dict(loss.state_dict())
    for twin in (fresh, copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        assert torch.equal(twin.current_mean, loss.current_mean)


def test_soft_temperature_is_a_constant_of_the_gradient():
    f, y = data("Soft")
    loss = L.SoftHKRMulticlassLoss(alpha_mean=0.0)
    x = f.clone().requires_grad_()
    (got,) = torch.autograd.grad(loss(x, y), x)
    x = f.clone().requires_grad_()
    (want,) = torch.autograd.grad(loss.eval()(x, y), x)  # eval keeps the mean just computed
    torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_soft_limits():
    """A large temperature picks the largest wrong logit; a small one averages them."""
    f, y = torch.tensor([[0.0, 1.0, 0.5]]), torch.tensor([0])
    sharp = L.SoftHKRMulticlassLoss(alpha=0.0, temperature=1000.0).eval()
    flat = L.SoftHKRMulticlassLoss(alpha=0.0, temperature=0.005).eval()
    assert sharp(f, y).item() == pytest.approx(1.0)
    assert flat(f, y).item() == pytest.approx(0.75, abs=1e-3)


def test_margin_cross_entropy_of_zero_offset_is_cross_entropy():
    f, y = data("MarginCE")
    torch.testing.assert_close(L.MarginCrossEntropyLoss(1.0, 0.0)(f, y), F.cross_entropy(f, y))
    assert (L.MarginCrossEntropyLoss().temperature, L.MarginCrossEntropyLoss().offset) == (0.5, 1.0)


def test_margin_cross_entropy_of_small_temperature_is_the_hinge():
    f, y = data("MarginCE")
    got = L.MarginCrossEntropyLoss(1e-4, 1.3, "none")(f, y)
    want = L.CategoricalHingeLoss(1.3, "none")(f, y)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-4 * math.log(4))


@pytest.mark.parametrize(("temperature", "offset"), [(0.01, 0.0), (0.5, 1.0), (10.0, 100.0)])
def test_margin_cross_entropy_gradient(temperature, offset):
    f, y = data("MarginCE")
    f.requires_grad_()
    L.MarginCrossEntropyLoss(temperature, offset, "sum")(f, y).backward()
    one_hot = F.one_hot(y, f.shape[1]).double()
    want = ((f.detach() - offset * one_hot) / temperature).softmax(1) - one_hot
    torch.testing.assert_close(f.grad, want)
    assert f.grad.norm(dim=1).max() <= math.sqrt(2) + 1e-12


# Index targets, with each of torch's arguments; class probabilities; extra and missing dimensions.
WEIGHT = torch.tensor([0.5, 2.0, 1.0])
TORCH_CE = [
    ({}, (6, 3), "index"),
    ({"weight": WEIGHT}, (6, 3), "index"),
    ({"ignore_index": 1}, (6, 3), "index"),
    ({"weight": WEIGHT, "ignore_index": 1, "label_smoothing": 0.2}, (6, 3), "index"),
    ({"weight": WEIGHT, "label_smoothing": 0.2}, (6, 3, 2, 2), "index"),
    ({"weight": WEIGHT}, (3,), "index"),
    ({}, (6, 3), "probability"),
    ({"weight": WEIGHT, "label_smoothing": 0.2}, (6, 3), "probability"),
    ({"weight": WEIGHT}, (6, 3, 4), "probability"),
    ({}, (3,), "probability"),
]


@pytest.mark.parametrize("tau", [1.0, 5.0])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize(("kwargs", "shape", "kind"), TORCH_CE)
def test_tau_cross_entropy_is_torchs(kwargs, shape, kind, reduction, tau):
    torch.manual_seed(0)
    f = torch.randn(shape, dtype=torch.float64)
    dim = 0 if len(shape) == 1 else 1
    y = torch.randn(shape).softmax(dim)
    y = y.argmax(dim) if kind == "index" else y
    got = L.TauCrossEntropyLoss(tau, **kwargs, reduction=reduction)(f, y)
    kwargs = {k: v.double() if torch.is_tensor(v) else v for k, v in kwargs.items()}
    y = y if kind == "index" else y.double()
    want = F.cross_entropy(tau * f, y, reduction=reduction, **kwargs) / tau
    torch.testing.assert_close(got, want)


def test_tau_cross_entropy_of_ignored_targets():
    f = torch.randn(4, 3, requires_grad=True)
    value = L.TauCrossEntropyLoss(2.0)(f, torch.full((4,), -100))
    value.backward()
    assert value.item() == 0 and f.grad.abs().max() == 0


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_tau_bce_is_torchs(reduction):
    torch.manual_seed(0)
    f, y = torch.randn(6, 3, dtype=torch.float64), torch.rand(6, 3) > 0.5
    loss = L.TauBCEWithLogitsLoss(4.0, WEIGHT, reduction=reduction, pos_weight=3 * WEIGHT)
    want = F.binary_cross_entropy_with_logits(
        4 * f, y.double(), WEIGHT.double(), pos_weight=3 * WEIGHT.double(), reduction=reduction
    )
    torch.testing.assert_close(loss(f, y), want / 4)
    assert isinstance(loss, torch.nn.BCEWithLogitsLoss)


# ----------------------------------------------------------------- where labels are not read


@pytest.mark.parametrize("name", ALL)
def test_nothing_is_read_off_the_cpu(name):
    """The meta device has no values: reading one would raise."""
    logits, target = data(name)
    value = make(name).to("meta")(logits.to("meta"), target.to("meta"))
    assert value.device.type == "meta" and value.shape == ()


@pytest.mark.parametrize("name", ALL)
def test_compiles_whole(name):
    logits, target = data(name)
    loss = make(name)
    got = torch.compile(loss, fullgraph=True, backend="aot_eager")(logits, target)
    torch.testing.assert_close(got, loss(logits, target))


def test_exports():
    assert sorted(L.__all__) == sorted({cls.__name__ for cls, _, _ in ALL.values()})
