"""The C++ library for the CPU: values and gradients, thread counts, instruction sets, calls."""

import array
import os
import threading

import cases
import pytest
import subprocesses
import tolerances
import torch
from cpu_kernels import (
    F32,
    assert_same_bits,
    everything,
    generator,
    instruction_set,
    near_orthogonal,
    oracle,
    results_and_gradients,
    threads,
)
from operator_norm import assert_within

from lipkernels import BackendUnavailableError, use_backend
from lipkernels import functional as F
from lipkernels.kernels.cpu import library as cpu

pytestmark = pytest.mark.skipif(not cpu.is_built(), reason="no C++ library here")

SHAPES = [(1, 1), (1, 7), (9, 1), (2, 2), (64, 64), (200, 300), (300, 200), (230, 600), (513, 17)]
CONDITIONS = (1, 1.5, 3, 3.9, 4.2, 9, 30, 1e3, 1e6)


MIXED = [
    near_orthogonal(150, 260),
    near_orthogonal(260, 150, seed=1),
    near_orthogonal(180, 180, seed=2),
    *(near_orthogonal(20 + i, 64, seed=i) for i in range(20)),
    cases.weight_of_condition((30, 40), 100).float(),
]


# ------------------------------------------------------------------------------ values
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_norms_and_gradients_by_condition(shape):
    for condition in CONDITIONS if min(shape) > 1 else (1,):
        w = cases.weight_of_condition(shape, condition).float()
        (u,), (gradient,) = results_and_gradients([w])
        assert_within(u, 1.0, condition)
        assert bool(torch.isfinite(gradient).all())
        if condition == 1e6:  # beyond what the float64 oracle's own gradient resolves
            continue
        limit = tolerances.POLAR_BY_CONDITION[F32][1000]
        torch.testing.assert_close(u.double(), oracle(w), rtol=0, atol=limit)
        wide = w.double().requires_grad_()
        grad = torch.randn(shape, generator=generator(9)).double()
        (expected,) = torch.autograd.grad(F.polar_factor(wide), wide, grad)
        if shape != (1, 1):  # where it is zero
            limit = tolerances.POLAR_GRADIENT[F32]
            assert torch.dist(gradient.double(), expected) <= limit * expected.norm(), condition


@pytest.mark.parametrize("shape", [(64, 64), (100, 101), (200, 300), (300, 200)], ids=str)
def test_gradients_of_well_conditioned_weights_are_as_good_as_the_references(shape):
    for condition in (1.1, 1.5, 3):
        w = cases.weight_of_condition(shape, condition)
        grad = torch.randn(shape, generator=generator(9))
        wide = w.clone().requires_grad_()
        (expected,) = torch.autograd.grad(F.polar_factor(wide), wide, grad.double())
        _, (gradient,) = results_and_gradients([w.float()])
        error = torch.dist(gradient.double(), expected) / expected.norm()
        assert error <= 3e-6, condition  # 9e-7


@pytest.mark.parametrize("shape", [(300, 300), (520, 530)], ids=str)
def test_small_singular_values_of_large_weights(shape):
    # What belongs to them is left after sums of larger terms, which float32 may never round.
    w = cases.weight_of_condition(shape, 1e4)
    w, grad = w.float(), torch.randn(shape, generator=generator(9))
    (u,), (gradient,) = results_and_gradients([w])
    assert torch.linalg.matrix_norm(u - oracle(w), 2) <= 5e-6  # 3e-6, the margin of the norm
    wide = w.double().requires_grad_()
    (expected,) = torch.autograd.grad(F.polar_factor(wide), wide, grad.double())
    assert torch.dist(gradient.double(), expected) <= 4e-6 * expected.norm()  # 2e-6


# What conjugate gradients see little of until late, or stop early for: the length of their last
# step is told from the steps before.
SPECTRA = {
    "one value": lambda i: torch.ones_like(i),
    "two values": lambda i: 1 + 2.1 * (i % 2),
    "two values of which one is rare": lambda i: 1 + 2.8 * (i == 7),
    "a rare small one": lambda i: 1 - 0.7 * (i == 7),
    "one at each end": lambda i: 1 + (i == 3) - 0.45 * (i == 5),
    "two clusters": lambda i: 1 + 2.1 * (i % 2) + 1e-3 * torch.sin(i),
    "three clusters": lambda i: 1 + (i % 3) + 1e-2 * torch.sin(i),
    "crowded below": lambda i: 1 + 2 * (i / 120) ** 8,
    "crowded above": lambda i: 3 - 2 * (i / 120) ** 8,
}


@pytest.mark.parametrize("shape", [(120, 120), (120, 250)], ids=str)
@pytest.mark.parametrize("name", SPECTRA)
def test_gradients_of_every_spectrum(name, shape):
    values = SPECTRA[name](torch.arange(120, dtype=torch.float64))
    noise = torch.randn(120, 120, generator=generator(), dtype=torch.float64)
    left = torch.linalg.qr(noise)[0]
    noise = torch.randn(shape[::-1], generator=generator(1), dtype=torch.float64)
    right = torch.linalg.qr(noise)[0]
    w = left * values @ right.mT
    grads = {
        "noise": torch.randn(shape, generator=generator(9)),
        "of two directions": torch.outer(left[:, 7], right[:, 5]).float(),
    }
    for kind, grad in grads.items():
        wide = w.clone().requires_grad_()
        (expected,) = torch.autograd.grad(F.polar_factor(wide), wide, grad.double())
        leaf = w.float().requires_grad_()
        (gradient,) = torch.autograd.grad(F.polar_factor(leaf, backend="cpu"), leaf, grad)
        error = torch.dist(gradient.double(), expected) / expected.norm()
        assert error <= 3e-6, kind  # 1.4e-6


def _rank_one_plus(noise, rows, cols):
    left = torch.randn(rows, 1, generator=generator(2))
    right = torch.randn(1, cols, generator=generator(3))
    return left @ right + noise * torch.randn(rows, cols, generator=generator(1))


def _signs(rows, cols):
    i, j = torch.arange(rows)[:, None], torch.arange(cols)[None, :]
    bits = i & j
    parity = sum((bits >> k) & 1 for k in range(8)) % 2
    return 1.0 - 2.0 * parity


_G = generator(4)
NASTY = {
    "constant row": torch.full((1, 3000), 0.1),
    "constant rows": torch.full((3, 3000), 0.1),
    "constant rows and noise": 0.1 + 0.04 * torch.randn(4, 3000, generator=_G),
    "constant column": torch.full((3000, 1), 0.3),
    "signs": _signs(64, 256),
    "signs, wide": _signs(16, 256) * 0.7,
    "random signs": torch.randn(64, 256, generator=_G).sign(),
    "rank one": _rank_one_plus(0.0, 40, 60),
    "rank one and noise": _rank_one_plus(1e-3, 40, 60),
    "duplicates": torch.randn(1, 50, generator=_G).repeat(20, 1),
    "graded": torch.logspace(0, -12, 30)[:, None] * torch.randn(30, 50, generator=_G),
    "denormal": 1e-41 * torch.randn(20, 30, generator=_G),
    "tiny": 1e-30 * torch.randn(20, 30, generator=_G),
    "1e30": 1e30 * torch.randn(20, 30, generator=_G),
    "the range's end": 3e38 * torch.rand(20, 30, generator=_G).sign(),
    "at the library's ends": torch.eye(20, 30) * 1e12,
    "at its other end": torch.eye(20, 30) * 1e-12,
    "zero": torch.zeros(10, 12),
    "zero row": torch.randn(10, 12, generator=_G) * (torch.arange(10)[:, None] > 0),
    "identity": torch.eye(256),
    "ones on a diagonal": torch.eye(70, 300) * 0.3,
}


@pytest.mark.parametrize("name", NASTY)
def test_the_norm_never_exceeds_the_scale(name):
    w = NASTY[name].float()
    for matrix in (w, w.mT):
        for scale in (1.0, 0.3, 7.0):
            for dtype in (F32, torch.bfloat16, torch.float16, torch.float64):
                assert_within(F.polar_factor(matrix, scale, dtype=dtype, backend="cpu"), scale)
            u = F.polar_factor(matrix, scale, backend="cpu")
            assert_within(F.retract(u, scale, backend="cpu"), scale)
            assert_within(F.retract(matrix, scale, backend="cpu"), scale)


@pytest.mark.parametrize("wide", [(24, 60), (128, 300)], ids=str)
@pytest.mark.parametrize("kind", ["noise", "one_direction"])
def test_the_defect_decides_between_a_step_and_a_division(wide, kind):
    # From exactly orthogonal to a defect of 0.4: finish() pays each, and gives away 4e-6 at most.
    m, n = wide
    base = oracle(torch.randn(wide, generator=generator(), dtype=torch.float64))
    noise = torch.randn(wide, generator=generator(1), dtype=torch.float64)
    if kind == "one_direction":
        noise = noise[:, :1] @ base[:1] * 3
    for size in (0.0, 1e-8, 3e-8, 1e-7, 3e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2):
        for w in ((base + size * noise).float(), (base + size * noise).float()[:, : n // 2]):
            # With V = I and p = 1 the product leaves W as it is, and the last step is all there is.
            w, u, scalars = w.contiguous(), torch.empty(w.shape), torch.zeros(2)
            factor, spectrum = torch.empty(m, m), torch.empty(m)
            vectors, p = torch.eye(m, dtype=torch.float64), torch.ones(m, dtype=torch.float64)
            inputs = (w.data_ptr(), vectors.data_ptr(), p.data_ptr(), *vectors.stride())
            outputs = [t.data_ptr() for t in (u, factor, spectrum, scalars)]
            table = array.array("q", (*inputs, *outputs, *w.shape))
            numbers = array.array("d", (1.0, 1 - 1e-6))
            code = cpu.library().lk_polar_from_eigenvectors(
                1, table.buffer_info()[0], numbers.buffer_info()[0], 1
            )
            assert code == 0
            assert torch.equal(factor, vectors.float())
            assert torch.equal(spectrum, p.float())
            assert_within(u, 1.0, size)
            if w.shape[1] == n:
                values = torch.linalg.svdvals(u.double())
                before = torch.linalg.svdvals(w.double())
                defect = float((before.square() - 1).abs().max())
                assert values[-1] >= 1 - defect**2 - 4e-6


def test_neighbours_do_not_matter():
    wide = 40, 70
    entries = {
        "good": near_orthogonal(*wide),
        "nan": torch.full(wide, float("nan")),
        "ill": cases.weight_of_condition(wide, 50).float(),
        "inf": near_orthogonal(*wide).index_fill(0, torch.tensor([3]), float("inf")),
        "very ill": cases.weight_of_condition(wide, 1e5).float(),
        "zero": torch.zeros(wide),
        "huge": 1e30 * near_orthogonal(*wide, seed=5),
        "good too": near_orthogonal(*wide, seed=7),
        "tiny": 1e-35 * near_orthogonal(*wide, seed=8),
    }
    weights = list(entries.values())
    together, gradients = results_and_gradients(weights)
    (batched,), (batched_gradient,) = results_and_gradients([torch.stack(weights)])
    for i, (name, w) in enumerate(entries.items()):
        (alone,), (gradient,) = results_and_gradients([w])
        assert_same_bits([together[i], gradients[i]], [alone, gradient])
        if name in ("nan", "inf"):
            assert bool(alone.isnan().all()) and bool(batched[i].isnan().all())
            continue
        assert_within(alone, 1.0, name)
        assert_within(batched[i], 1.0, name)
        torch.testing.assert_close(batched[i], alone, rtol=0, atol=4e-6)
        assert bool(torch.isfinite(gradient).all())
        if name not in ("very ill", "zero"):
            grad = torch.randn(torch.stack(weights).shape, generator=generator(9))[i]
            leaf = w.double().requires_grad_()
            (expected,) = torch.autograd.grad(F.polar_factor(leaf), leaf, grad.double())
            expected = expected.clamp(-torch.finfo(F32).max, torch.finfo(F32).max)
            error = (batched_gradient[i].double() - expected).abs().max()
            assert error <= 1e-4 * expected.abs().max(), name


def test_batches_are_their_matrices():
    w = torch.stack([near_orthogonal(6, 9, seed=i) for i in range(6)]).view(2, 3, 6, 9)
    u = F.polar_factor(w, backend="cpu")
    assert_same_bits(
        [u.reshape(6, 6, 9)],
        [torch.stack(F.polar_factor(list(w.reshape(6, 6, 9)), backend="cpu"))],
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
def test_the_default_dtype_does_not_matter(dtype):
    weights = [near_orthogonal(8, 20), cases.weight_of_condition((8, 20), 100).float()]
    expected = everything(weights)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        found = [
            *F.polar_factor(weights, backend="cpu"),
            *F.retract([w / 1.01 for w in weights], backend="cpu"),
        ]
    finally:
        torch.set_default_dtype(before)
    assert_same_bits(found, [*expected[:2], *expected[4:6]])


def test_negative_views():
    w = near_orthogonal(8, 20)
    negative = torch._neg_view(w)
    assert negative.is_neg() and negative.is_contiguous()
    assert_same_bits(
        [F.polar_factor(negative, backend="cpu"), F.group_sort(negative, 2, backend="cpu")],
        [F.polar_factor(-w, backend="cpu"), F.group_sort(-w, 2, backend="cpu")],
    )
    g = torch.randn(8, 20)
    assert_same_bits(
        [F.project_tangent(g, negative, backend="cpu"), F.retract(negative, backend="cpu")],
        [F.project_tangent(g, -w, backend="cpu"), F.retract(-w, backend="cpu")],
    )


def test_non_contiguous_weights_and_gradients():
    w = near_orthogonal(20, 12)
    for layout in (w.mT, w[::2], w[:, ::3], w.T[:5]):
        leaf = layout.detach().clone().requires_grad_()
        strided = layout.detach().requires_grad_()
        expanded = torch.ones(1, 1).expand(layout.shape)
        for grad in (expanded, torch.randn(layout.shape[::-1], generator=generator()).mT):
            (a,) = torch.autograd.grad(F.polar_factor(strided, backend="cpu"), strided, grad)
            (b,) = torch.autograd.grad(F.polar_factor(leaf, backend="cpu"), leaf, grad.contiguous())
            assert_same_bits([a.contiguous()], [b])


# ------------------------------------------------------------- instruction sets and threads
@pytest.mark.parametrize("number", range(len(cpu.INSTRUCTION_SETS)), ids=cpu.INSTRUCTION_SETS)
def test_every_instruction_set_agrees_with_the_reference(number):
    weights = [near_orthogonal(*shape) for shape in SHAPES] + [MIXED[-1]]
    with instruction_set(number) as available:
        if not available:
            pytest.skip("not on this processor")
        found = results_and_gradients(weights)
        retracted = F.retract([w / 1.01 for w in weights], backend="cpu")
        for w in NASTY.values():
            assert_within(F.polar_factor(w.float(), backend="cpu"), 1.0)
    expected = results_and_gradients(weights, "reference")
    for u, v in zip(found[0], expected[0], strict=True):
        assert_within(u, 1.0)
        torch.testing.assert_close(u, v, rtol=0, atol=4e-6)
    for g, h in zip(found[1], expected[1], strict=True):
        assert torch.dist(g, h) <= tolerances.POLAR_GRADIENT[F32] * (h.norm() + 1e-2)
    for r, w in zip(retracted, weights, strict=True):
        assert_within(r, 1.0)
        torch.testing.assert_close(r, F.polar_factor(w), rtol=0, atol=1e-3)


@pytest.mark.parametrize("number", range(len(cpu.INSTRUCTION_SETS)), ids=cpu.INSTRUCTION_SETS)
def test_gradients_of_every_size(number):
    # Tiles take subnormal numbers, and what a split leaves of small ones, for zero.
    w = near_orthogonal(210, 230)
    grad = torch.randn(w.shape, generator=generator(9)).double()
    wide = w.double().requires_grad_()
    (expected,) = torch.autograd.grad(F.polar_factor(wide), wide, grad)
    u = F.polar_factor(w)
    projected = F.project_tangent(grad, u.double())
    with instruction_set(number) as available:
        if not available:
            pytest.skip("not on this processor")
        for size in (1e-42, 1e-37, 1e-30, 1e-20, 1e-14, 1e-6, 1e6, 1e20, 1e31, 1e36):
            leaf, small = w.clone().requires_grad_(), (size * grad).float()
            (found,) = torch.autograd.grad(F.polar_factor(leaf, backend="cpu"), leaf, small)
            rounding = 1e-44 * w.numel() ** 0.5  # subnormal numbers are 1.4e-45 apart
            for one, other in (
                (found, expected),
                (F.project_tangent(small, u, backend="cpu"), projected),
            ):
                error = torch.dist(one.double(), size * other)
                assert error <= 4e-6 * size * other.norm() + 2 * rounding, size


@pytest.mark.parametrize("number", range(len(cpu.INSTRUCTION_SETS)), ids=cpu.INSTRUCTION_SETS)
def test_scales_of_every_size(number):
    w, grad = near_orthogonal(210, 230), torch.randn(210, 230, generator=generator(9))
    leaf = w.clone().requires_grad_()
    u = F.polar_factor(leaf, backend="reference")
    (expected,) = torch.autograd.grad(u, leaf, grad)
    u = u.detach()
    projected = F.project_tangent(grad, u, backend="reference")
    with instruction_set(number) as available:
        if not available:
            pytest.skip("not on this processor")
        for scale in (1e-36, 1e-33, 1e-20, 1e-3, 1e3, 1e20, 1e36):
            scaled = F.polar_factor(leaf, scale, backend="cpu")
            assert_within(scaled.detach(), scale)
            (found,) = torch.autograd.grad(scaled, leaf, grad)
            assert torch.dist(found / scale, expected) <= 4e-6 * expected.norm(), scale
            found = F.project_tangent(grad, u * scale, scale, backend="cpu")
            assert torch.dist(found, projected) <= 4e-6 * projected.norm(), scale
            off = ((0.99 * u + 0.01 * w / w.norm()).double() * scale).float()
            retracted = F.retract(off, scale, backend="cpu")
            assert_within(retracted, scale)
            torch.testing.assert_close(retracted / scale, u, rtol=0, atol=1e-4)


def test_fingerprints_do_not_depend_on_the_instruction_set():
    x = torch.randn(1001, generator=generator())
    found = set()
    for number in range(len(cpu.INSTRUCTION_SETS)):
        with instruction_set(number):
            found.add(F.fingerprint(x))
    assert len(found) == 1


def test_fingerprints_see_every_bit():
    x = torch.randn(37, generator=generator())
    before, words = F.fingerprint(x), x.view(torch.int32)
    for i in range(37):
        for bit in range(31):
            words[i] ^= 1 << bit
            assert F.fingerprint(x) != before
            words[i] ^= 1 << bit
    assert F.fingerprint(x) == before
    assert F.fingerprint(x[:36]) != before
    assert F.fingerprint(x.flip(0)) != before
    assert F.fingerprint(-x) != before
    assert F.fingerprint(x[::2]) != F.fingerprint(x[::2] + 1e-3)  # without the library


def test_thread_counts_give_the_same_bits():
    weights = MIXED[:-1]  # the last goes through torch's eigendecomposition and products
    # One that all threads take together, and the others one for each; or each its own.
    for group in ([*weights, near_orthogonal(300, 700, seed=3)], weights):
        with threads(1):
            expected = everything(group)
        for n in (2, 3, 8):
            with threads(n):
                assert_same_bits(everything(group), expected)


def test_long_thin_weights_keep_to_their_share_of_the_scratch_space():
    # Many of them on several threads; then one that fits into what the first left, but barely.
    weights = [torch.randn(1, 30_000, generator=generator(i)) for i in range(40)]
    weights += [near_orthogonal(16, 8_000, seed=i) for i in range(4)]
    expected = F.polar_factor(weights, backend="cpu")
    with threads(4):
        for _ in range(4):
            assert_same_bits(F.polar_factor(weights, backend="cpu"), expected)
    for n in (40_000, 49_900):
        assert_within(F.polar_factor(torch.ones(1, n), backend="cpu"), 1.0)


def test_calls_from_several_threads():
    weights = MIXED[:1] + MIXED[3:12] + MIXED[-1:]
    expected = everything(weights)
    results, errors, start = [], [], threading.Barrier(8)

    def work():
        try:
            # Eigendecompositions are torch's own, whose last bits depend on its thread count.
            torch.set_num_threads(1)
            start.wait()
            for _ in range(2):
                results.append(everything(weights))
        except Exception as error:
            errors.append(error)

    workers = [threading.Thread(target=work) for _ in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not errors and len(results) == 16
    for result in results:
        assert_same_bits(result, expected)


FORK = """
import os, signal, sys, time, torch
import lipkernels.functional as F
torch.set_num_threads(2)
w = torch.nn.init.orthogonal_(torch.empty(200, 300))
w += 0.001 * torch.randn(200, 300)
before = F.polar_factor(w, backend="cpu").numpy().tobytes()
child = os.fork()
if child == 0:  # no operation of torch that has threads: they hang
    os._exit(7 if F.polar_factor(w, backend="cpu").numpy().tobytes() == before else 3)
for _ in range(400):
    done, status = os.waitpid(child, os.WNOHANG)
    if done:
        sys.exit(os.waitstatus_to_exitcode(status))
    time.sleep(0.05)
os.kill(child, signal.SIGKILL)
sys.exit("the child hangs")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_process_computes_the_same():
    done = subprocesses.run(FORK, OMP_NUM_THREADS="2")
    assert done.returncode == 7, done.stderr


# ----------------------------------------------------------------------------------- calls
def test_naming_it_for_what_it_cannot_do():
    with pytest.raises(BackendUnavailableError, match="spectral_normalize has no cpu"):
        F.spectral_normalize(torch.eye(2), backend="cpu")
    with pytest.raises(BackendUnavailableError, match="cpu needs tensors on the CPU, got meta"):
        F.polar_factor(torch.empty(2, 2, device="meta"), backend="cpu")


def test_a_list_of_nothing():
    assert F.polar_factor([], backend="cpu") == []
    assert F.retract([], backend="cpu") == []
    assert F.polar_factor(torch.empty(0, 3), backend="cpu").shape == (0, 3)
    assert F.retract(torch.empty(2, 0, 3), backend="cpu").shape == (2, 0, 3)
    assert cpu.library().lk_polar_forward(0, None, None, None, 4) == 0


# ------------------------------------------------------------------------------------ sorting
def sorting_inputs():
    nan = float("nan")
    yield torch.tensor([[nan, 1.0, 2.0, nan, nan, nan, 3.0, 3.0, -0.0, 0.0, 0.0, -0.0]])
    yield torch.tensor([[float("inf"), -float("inf"), 1e-45, -1e-45, 5.0, 4.0]])
    yield torch.randn(3, 8, 5, 7, generator=generator())
    yield torch.randn(3, 5, 7, 8, generator=generator()).permute(0, 3, 1, 2)
    yield torch.randn(6, 8, generator=generator()).mT[::2].mT[:, :2]
    yield torch.randn(2, 500, 300, generator=generator())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_pairs_are_sorted_as_the_reference_does(dtype):
    for x in sorting_inputs():
        for n in (1, 3):
            with threads(n):
                y = F.group_sort(x.to(dtype), 2, backend="cpu")
            expected = F.group_sort(x.to(dtype), 2, backend="reference")
            bits = {4: torch.int32, 8: torch.int64, 2: torch.int16}[y.itemsize]
            assert torch.equal(y.view(bits), expected.view(bits))  # -0.0 and NaN too
            for dim in range(1, x.dim()):
                if x.shape[dim] % 2 == 0:
                    a = F.group_sort(x.nan_to_num().to(dtype), 2, dim - x.dim(), backend="cpu")
                    assert torch.equal(a, F.group_sort(x.nan_to_num().to(dtype), 2, dim))


def test_ties_and_nan_send_each_gradient_to_one_place():
    x = torch.tensor([[3.0, 3.0, float("nan"), 1.0]], requires_grad=True)
    F.group_sort(x, 2, backend="cpu").backward(torch.tensor([[1.0, 2.0, 3.0, 4.0]]))
    assert x.grad.tolist() == [[1.0, 2.0, 4.0, 3.0]]


@pytest.mark.parametrize("shape", [(2, 6), (2, 4, 3)])
def test_second_derivatives_of_the_sort(shape):
    x = torch.randn(shape, generator=generator(), dtype=torch.float64, requires_grad=True)

    def f(x):
        return F.group_sort(x, 2, backend="cpu").pow(3)

    assert torch.autograd.gradcheck(f, x)
    assert torch.autograd.gradgradcheck(f, x)
    with use_backend("reference"):
        (g,) = torch.autograd.grad(f(x).sum(), x, create_graph=True)
    (h,) = torch.autograd.grad(f(x).sum(), x, create_graph=True)
    assert torch.equal(g, h)
    assert torch.equal(torch.autograd.grad(g.sum(), x)[0], torch.autograd.grad(h.sum(), x)[0])
