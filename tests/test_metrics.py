"""Certified radii against exact arithmetic and against classifiers of known robustness."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lipkernels import metrics

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
finite = st.floats(allow_nan=False, allow_infinity=False)
positive = st.floats(min_value=5e-324, allow_nan=False, allow_infinity=False)


class Bound:
    """What a certificate object looks like to the metrics: something with ``__float__``."""

    def __init__(self, value):
        self.value = value

    def __float__(self):
        return self.value


# ------------------------------------------------------------------------------ values


def test_radius_by_hand():
    logits = torch.tensor([[3.0, 1.0, 0.0], [0.0, -1.0, 5.0], [2.0, 2.0, 1.0]])
    got = metrics.certified_radius(logits, 2.0)
    want = torch.tensor([2.0, 5.0, 0.0], dtype=torch.float64) / (2 * math.sqrt(2))
    torch.testing.assert_close(got, want, rtol=1e-14, atol=0)
    assert got.dtype == torch.float64 and got.shape == (3,)
    with_error = metrics.certified_radius(logits, 2.0, error=0.25)
    want = torch.tensor([1.5, 4.5, 0.0], dtype=torch.float64) / (2 * math.sqrt(2))
    torch.testing.assert_close(with_error, want, rtol=1e-14, atol=0)


def test_radius_of_one_column():
    logits = torch.tensor([[3.0], [-1.0], [0.0]])
    got = metrics.certified_radius(logits, 2.0)
    want = torch.tensor([1.5, 0.5, 0.0], dtype=torch.float64)
    torch.testing.assert_close(got, want, rtol=1e-14, atol=0)
    got = metrics.certified_radius(logits, 2.0, error=2.0)
    torch.testing.assert_close(got, want.new_tensor([0.5, 0.0, 0.0]), rtol=1e-14, atol=0)


def test_error_per_sample():
    logits = torch.tensor([[3.0, 1.0], [3.0, 1.0], [3.0, 1.0]])
    error = torch.tensor([0.0, 0.5, 2.0])
    got = metrics.certified_radius(logits, 1.0, error)
    want = torch.tensor([2.0, 1.0, 0.0], dtype=torch.float64) / math.sqrt(2)
    torch.testing.assert_close(got, want, rtol=1e-14, atol=0)


@pytest.mark.parametrize("dtype", FLOATS)
def test_radius_dtypes(dtype):
    """Every dtype's values are exact in float64: same radius as from the float64 copy."""
    logits = torch.randn(20, 5).to(dtype).requires_grad_()
    got = metrics.certified_radius(logits, 1.5)
    assert not got.requires_grad
    assert torch.equal(got, metrics.certified_radius(logits.double(), 1.5))
    strided = logits.t().contiguous().t()
    assert torch.equal(got, metrics.certified_radius(strided, 1.5))


@pytest.mark.parametrize(
    "bound",
    [2, 2.0, np.float32(2), Fraction(2), Bound(2.0), torch.tensor(2.0), torch.tensor([2.0])],
)
def test_forms_of_bound(bound):
    logits = torch.randn(5, 3)
    want = metrics.certified_radius(logits, 2.0)
    assert torch.equal(metrics.certified_radius(logits, bound), want)


# --------------------------------------------------------------------------- rounding down


def check_below_exact(radius, margin, bound, squared_factor):
    """radius < margin / (sqrt(squared_factor) bound), in rational arithmetic; 0 if margin <= 0."""
    if margin <= 0:
        assert radius == 0
    else:
        assert 0 <= radius < float("inf")
        assert Fraction(radius) ** 2 * squared_factor * bound**2 < margin**2


@settings(max_examples=400, deadline=None)
@given(a=finite, b=finite, error=st.one_of(st.just(0.0), positive), bound=positive)
@example(a=1.0, b=0.0, error=0.0, bound=1.0)
@example(a=1.7e308, b=-1.7e308, error=0.0, bound=5e-324)
@example(a=1.7e308, b=-1.7e308, error=1.7e308, bound=1.0)
@example(a=5e-324, b=0.0, error=0.0, bound=1.0)
@example(a=5e-324, b=0.0, error=0.0, bound=1.7e308)
@example(a=1.0, b=2**-54, error=0.5 - 2**-54, bound=1.0)  # a - b rounds up, then cancels
@example(a=3.0, b=1e-17, error=0.0, bound=1e-3)
def test_radius_is_below_the_exact_one(a, b, error, bound):
    exact_error, exact_bound = Fraction(error), Fraction(bound)
    logits = torch.tensor([[a, b], [b, a]], dtype=torch.float64)
    margin = abs(Fraction(a) - Fraction(b)) - 2 * exact_error
    for radius in metrics.certified_radius(logits, bound, error).tolist():
        check_below_exact(radius, margin, exact_bound, 2)
    (radius,) = metrics.certified_radius(logits[:1, :1], bound, error).tolist()
    check_below_exact(radius, abs(Fraction(a)) - exact_error, exact_bound, 1)


@settings(max_examples=100, deadline=None)
@given(st.fractions(min_value=Fraction(1, 10**6), max_value=10**6))
def test_bound_that_float_rounds_down(bound):
    logits = torch.tensor([[1.0, 0.0]])
    (radius,) = metrics.certified_radius(logits, bound).tolist()
    check_below_exact(radius, Fraction(1), bound, 2)
    (radius,) = metrics.certified_radius(logits[:, :1], bound).tolist()
    check_below_exact(radius, Fraction(1), bound, 1)


def test_rounding_costs_some_ulps_only():
    logits = torch.randn(1000, 4, dtype=torch.float64)
    top = logits.topk(2).values
    naive = (top[:, 0] - top[:, 1]) / (math.sqrt(2) * 1.7)
    got = metrics.certified_radius(logits, 1.7)
    assert (got <= naive).all() and (got >= naive * (1 - 8 * 2**-52)).all()


def test_float_sqrt_two_is_above_the_real_one():
    assert Fraction(math.sqrt(2.0)) ** 2 > 2


# ------------------------------------------------------------------ non-finite and degenerate


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_logits_have_no_radius(bad):
    logits = torch.tensor([[3.0, 1.0, 0.0], [3.0, 1.0, bad], [bad, bad, bad], [bad, 0.0, 1.0]])
    radius = metrics.certified_radius(logits, 1.0)
    assert radius[0] > 0 and radius[1:].tolist() == [0, 0, 0]
    assert metrics.certified_radius(logits[:, 2:], 1.0)[1] == 0
    labels = torch.tensor([0, 0, 0, 0])
    got = metrics.certified_accuracy(logits, labels, 1.0, [0.0, 0.5])
    assert got.tolist() == [0.25, 0.25]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_bound_or_error_has_no_radius(bad):
    for logits in (torch.tensor([[3.0, 1.0]]), torch.tensor([[3.0]])):
        labels = torch.ones(1) if logits.shape[1] == 1 else torch.tensor([0])
        for args in ((bad, 0.0), (Bound(bad), 0.0), (1.0, bad), (1.0, torch.tensor([bad]))):
            assert metrics.certified_radius(logits, *args).tolist() == [0.0]
            got = metrics.certified_accuracy(logits, labels, args[0], [0.0, 1.0], args[1])
            assert got.tolist() == [0.0, 0.0]


def test_tie_is_neither_correct_nor_certified():
    logits = torch.tensor([[2.0, 2.0], [0.0, 0.0]])
    for label in (0, 1):
        labels = torch.tensor([label, label])
        assert metrics.clean_accuracy(logits, labels) == 0
        assert metrics.certified_accuracy(logits, labels, 1.0, [0.0]).tolist() == [0.0]
        assert metrics.clean_accuracy(torch.zeros(2, 1), labels) == 0


def test_empty_batch():
    for c in (1, 3):
        logits, labels = torch.zeros(0, c), torch.zeros(0, dtype=torch.long)
        assert metrics.certified_radius(logits, 1.0).shape == (0,)
        assert metrics.certified_radius(logits, 1.0, torch.zeros(0)).shape == (0,)
        assert math.isnan(metrics.clean_accuracy(logits, labels))
        got = metrics.certified_accuracy(logits, labels, 1.0, [0.0, 1.0])
        assert got.shape == (2,) and got.isnan().all()


# --------------------------------------------------------------- classifiers of known robustness


def upper(norm):
    return norm.item() * (1 + 1e-12)


@pytest.mark.parametrize("n_classes", [2, 3, 10])
def test_linear_classifier(n_classes):
    """Certificate <= exact distance to the nearest decision boundary."""
    gen = torch.Generator().manual_seed(n_classes)
    weight = torch.randn(n_classes, 6, generator=gen, dtype=torch.float64)
    bias = torch.randn(n_classes, generator=gen, dtype=torch.float64)
    x = 3 * torch.randn(200, 6, generator=gen, dtype=torch.float64)
    logits = x @ weight.t() + bias
    bound = upper(torch.linalg.svdvals(weight)[0])
    radius = metrics.certified_radius(logits, bound, error=1e-13)
    assert (radius > 0).all()
    for i, row in enumerate(logits):
        top = row.argmax()
        exact = min(
            (row[top] - row[k]) / (weight[top] - weight[k]).norm()
            for k in range(n_classes)
            if k != top
        )
        assert radius[i] <= exact


def test_linear_classifier_where_the_certificate_is_tight():
    """w and -w: sqrt(2) times the operator norm is |w - (-w)|. 1% beyond the radius it flips."""
    gen = torch.Generator().manual_seed(0)
    w = torch.randn(6, generator=gen, dtype=torch.float64)
    x = torch.randn(100, 6, generator=gen, dtype=torch.float64)
    weight = torch.stack([w, -w])
    logits = x @ weight.t()
    radius = metrics.certified_radius(logits, upper(torch.linalg.svdvals(weight)[0]))
    exact = (x @ w).abs() / w.norm()
    torch.testing.assert_close(radius, exact, rtol=1e-11, atol=0)
    assert (radius <= exact).all()
    towards = -(x @ w).sign().unsqueeze(1) * (w / w.norm()) * radius.unsqueeze(1)
    before = logits.argmax(1)
    assert torch.equal((x + (1 - 1e-9) * towards).matmul(weight.t()).argmax(1), before)
    assert ((x + 1.01 * towards).matmul(weight.t()).argmax(1) != before).all()


def test_binary_linear_classifier():
    gen = torch.Generator().manual_seed(0)
    w = torch.randn(6, generator=gen, dtype=torch.float64)
    x = torch.randn(100, 6, generator=gen, dtype=torch.float64)
    f = x @ w.unsqueeze(1) + 0.3
    radius = metrics.certified_radius(f, upper(w.norm()), error=1e-14)
    exact = f[:, 0].abs() / w.norm()
    assert (radius <= exact).all()
    torch.testing.assert_close(radius, exact, rtol=1e-9, atol=1e-12)


# ----------------------------------------------------------------------------- accuracies


def test_certified_accuracy_against_a_loop():
    gen = torch.Generator().manual_seed(0)
    logits = torch.randn(60, 4, generator=gen)
    labels = torch.randint(4, (60,), generator=gen)
    radii = [0.0, 0.1, 0.4, 2.0]
    radius = metrics.certified_radius(logits, 0.8, 0.01)
    got = metrics.certified_accuracy(logits, labels, 0.8, radii, error=0.01)
    for k, rho in enumerate(radii):
        hits = 0
        for i in range(60):
            top = max(range(4), key=lambda c, i=i: logits[i, c].item())
            hits += int(top == labels[i] and radius[i] > 0 and radius[i] >= rho)
        assert got[k] == hits / 60
    assert 0 < got[2] < got[1] < got[0] and got[3] <= got[2]
    assert got.dtype == torch.float64
    assert got[0] <= metrics.clean_accuracy(logits, labels)
    as_tensor = metrics.certified_accuracy(logits, labels, 0.8, torch.tensor(radii), 0.01)
    torch.testing.assert_close(as_tensor, got, rtol=0, atol=1 / 60)  # float32 radii
    assert torch.equal(metrics.certified_accuracy(logits, labels, 0.8, np.array(radii), 0.01), got)
    assert metrics.certified_accuracy(logits, labels, 0.8, []).shape == (0,)


def test_certified_accuracy_at_the_radius_itself():
    """Certified at the returned radius, which is below the exact one; not one float above it."""
    logits, labels = torch.tensor([[1.0, 0.0]]), torch.tensor([0])
    (radius,) = metrics.certified_radius(logits, 1.0).tolist()
    radii = [radius, math.nextafter(radius, 2.0)]
    assert metrics.certified_accuracy(logits, labels, 1.0, radii).tolist() == [1.0, 0.0]


def test_wrong_predictions_are_not_certified():
    logits = torch.tensor([[5.0, 0.0], [5.0, 0.0]])
    labels = torch.tensor([0, 1])
    assert metrics.clean_accuracy(logits, labels) == 0.5
    got = metrics.certified_accuracy(logits, labels, 1.0, (0, 1, 100))
    assert got.tolist() == [0.5, 0.5, 0.0]


def test_binary_accuracy():
    logits = torch.tensor([[2.0], [-2.0], [2.0], [-2.0]])
    zero_one = torch.tensor([1, 0, 0, 1])
    integers = [torch.int8, torch.uint8, torch.int64]
    forms = [zero_one.to(t) for t in (torch.bool, torch.float32, torch.float16, *integers)]
    forms += [2 * zero_one - 1, (2.0 * zero_one - 1).unsqueeze(1)]
    for labels in forms:
        assert metrics.clean_accuracy(logits, labels) == 0.5
        got = metrics.certified_accuracy(logits, labels, 1.0, [0.0, 1.0, 3.0])
        assert got.tolist() == [0.5, 0.5, 0.0]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int32, torch.int64])
def test_label_dtypes(dtype):
    logits = torch.eye(3)
    assert metrics.clean_accuracy(logits, torch.tensor([0, 1, 1], dtype=dtype)) == 2 / 3


def test_inputs_are_not_mutated():
    logits, labels = torch.randn(5, 3), torch.tensor([0, 1, 2, 0, 1])
    before = logits.clone()
    metrics.certified_accuracy(logits, labels, 1.0, [0.1])
    metrics.clean_accuracy(logits, labels)
    assert torch.equal(logits, before) and labels.tolist() == [0, 1, 2, 0, 1]


# ------------------------------------------------------------------------------- bad input

LOGITS, LABELS = torch.randn(4, 3), torch.tensor([0, 1, 2, 0])


@pytest.mark.parametrize(
    "bad", [LOGITS.long(), LOGITS > 0, LOGITS.to(torch.complex64), LOGITS.tolist()]
)
def test_bad_logits_type(bad):
    with pytest.raises(TypeError, match="logits must"):
        metrics.certified_radius(bad, 1.0)
    with pytest.raises(TypeError, match="logits must"):
        metrics.certified_accuracy(bad, LABELS, 1.0, [0.1])
    with pytest.raises(TypeError, match="logits must"):
        metrics.clean_accuracy(bad, LABELS)


@pytest.mark.parametrize("shape", [(), (3,), (4, 0), (2, 4, 3)])
def test_bad_logits_shape(shape):
    with pytest.raises(ValueError, match="logits must have shape"):
        metrics.certified_radius(torch.zeros(shape), 1.0)


def test_bad_bound():
    for bad in (0, 0.0, -1.0, -float("inf"), Bound(-2.0), torch.tensor(0.0)):
        with pytest.raises(ValueError, match="bound must be > 0"):
            metrics.certified_radius(LOGITS, bad)
    for bad in ("1", b"1", None, True, 1j, [1.0], torch.ones(2), torch.tensor(1j)):
        with pytest.raises(TypeError, match="bound must"):
            metrics.certified_radius(LOGITS, bad)


def test_bad_error():
    for bad in (-1e-9, -float("inf"), torch.tensor([0.0, 0.1, -0.1, 0.0])):
        with pytest.raises(ValueError, match="error must be >= 0"):
            metrics.certified_radius(LOGITS, 1.0, bad)
    with pytest.raises(ValueError, match=r"shape \(4,\), got \(3,\)"):
        metrics.certified_radius(LOGITS, 1.0, torch.zeros(3))
    with pytest.raises(ValueError, match="device"):
        metrics.certified_radius(LOGITS, 1.0, torch.zeros(4, device="meta"))
    for bad in ("0", None, True, torch.zeros(4, dtype=torch.long)):
        with pytest.raises(TypeError, match="error must"):
            metrics.certified_radius(LOGITS, 1.0, bad)


@pytest.mark.parametrize("bad", [LABELS.float(), LABELS > 0, [0, 1, 2, 0]])
def test_bad_labels_type(bad):
    with pytest.raises(TypeError, match="labels must"):
        metrics.clean_accuracy(LOGITS, bad)
    with pytest.raises(TypeError, match="labels must"):
        metrics.certified_accuracy(LOGITS, bad, 1.0, [0.1])


def test_bad_labels_value():
    for bad in (LABELS[:3], LABELS.unsqueeze(1), LABELS.to("meta"), LABELS + 1, LABELS - 1):
        with pytest.raises(ValueError, match="labels must"):
            metrics.clean_accuracy(LOGITS, bad)
    column = LOGITS[:, :1]
    for bad in (LABELS, LABELS.double() / 2, torch.tensor([255, 0, 1, 1], dtype=torch.uint8)):
        with pytest.raises(ValueError, match="single logit column"):
            metrics.clean_accuracy(column, bad)
    with pytest.raises(TypeError, match="real dtype"):
        metrics.clean_accuracy(column, LABELS.to(torch.complex64))


def test_bad_radii():
    for bad in (
        [-0.1],
        [float("nan")],
        [0.1, float("inf")],
        torch.tensor([-1.0]),
        torch.ones(1, 1),
    ):
        with pytest.raises(ValueError, match="radii must"):
            metrics.certified_accuracy(LOGITS, LABELS, 1.0, bad)
    for bad in (0.5, "0.5", {0.5}, {0.5: 1}, [None], ["0.5"]):
        with pytest.raises(TypeError, match=r"radi(i|us) must"):
            metrics.certified_accuracy(LOGITS, LABELS, 1.0, bad)
