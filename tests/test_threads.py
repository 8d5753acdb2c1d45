"""Eight threads run the same model: each one gets, bit by bit, what one thread alone gets."""

import threading

import pytest
import torch
from constrained_layers import CONSTRAINTS, FROBENIUS, SPECTRAL, linear
from layer_table import CONSTRAINED
from torch import nn

import lipkernels.nn as lnn
from lipkernels import group_weights, grouped, vanilla_export
from lipkernels.certify import lipschitz_bound

THREADS, ROUNDS = 8, 3
# A constraint with a power iteration starts it, in training, where the last forward of any thread
# ended: the results of two forwards differ in their last bits, in one thread as in eight.
REPEATABLE = ("polar", *FROBENIUS)


def in_threads(work):
    """What ``work()`` returns in each round of each thread; an exception in any of them fails."""
    results, errors = [], []
    start = threading.Barrier(THREADS)

    def run():
        try:
            # As many as in the main thread: torch sets a new thread's number at a time of its own,
            # and an operation that is split over two threads sums in another order.
            torch.set_num_threads(1)
            start.wait()
            for _ in range(ROUNDS):
                results.append(work())  # an append is atomic, extend waits
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=run) for _ in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    assert len(results) == THREADS * ROUNDS
    return results


def forward_and_gradients(model, x):
    x = x.clone().requires_grad_()
    y = model(x)
    wanted = [x, *(p for p in model.parameters() if p.requires_grad)]
    return [y.detach(), *torch.autograd.grad(y.square().sum(), wanted)]


def assert_bitwise(results, expected):
    for result in results:
        for a, b in zip(result, expected, strict=True):
            assert torch.equal(a, b), float((a - b).abs().max())


def mlp(constraint):
    torch.manual_seed(0)
    model = nn.Sequential(
        linear(constraint, 40, 20, bias=True),
        lnn.GroupSort2(),
        linear(constraint, 40, 40, bias=True),
        lnn.FullSort(),
        linear(constraint, 3, 40, bias=True),
    )
    return model, torch.randn(9, 20)


def convnet(constraint):
    torch.manual_seed(0)
    keywords = SPECTRAL.get(constraint)
    if keywords is None:
        first = lnn.FrobeniusConv2d(2, 8, 3, padding=1)
        second = lnn.FrobeniusConv2d(8, 8, 2, 2, groups=2)
    else:
        first = lnn.SpectralConv2d(2, 8, 3, padding=1, padding_mode="reflect", **keywords)
        second = lnn.SpectralConv2d(8, 8, 2, 2, groups=2, **keywords)
    pools = (lnn.ScaledL2NormPool2d(2), lnn.InvertibleDownSampling(2))
    last = linear(constraint, 5, 32, bias=True)
    model = nn.Sequential(first, lnn.MaxMin(), pools[0], lnn.HouseHolder(16))
    model += nn.Sequential(lnn.SpectralConv2d(16, 8, 1), second, pools[1], nn.Flatten(), last)
    return model, torch.randn(3, 2, 16, 16)[..., :8, :8]


NETS = {"mlp": mlp, "conv": convnet}


@pytest.mark.parametrize("switch", [False, True], ids=["", "grouped"])
@pytest.mark.parametrize("constraint", CONSTRAINTS)
@pytest.mark.parametrize("net", NETS)
def test_evaluation_is_bitwise_the_same(net, constraint, switch):
    model, x = NETS[net](constraint)
    model.eval()
    alone = forward_and_gradients(model, x)
    if switch:
        group_weights(model)
        expected = forward_and_gradients(model, x)
        torch.testing.assert_close(expected, alone, rtol=1e-5, atol=1e-5)
    else:
        expected = alone
    assert_bitwise(in_threads(lambda: forward_and_gradients(model, x)), expected)
    with torch.no_grad():
        expected = [model(x)]
        assert_bitwise(in_threads(lambda: [model(x)]), expected)


@pytest.mark.parametrize("switch", [False, True], ids=["", "grouped"])
@pytest.mark.parametrize("constraint", CONSTRAINTS)
@pytest.mark.parametrize("net", NETS)
def test_training(net, constraint, switch):
    model, x = NETS[net](constraint)
    if switch:
        group_weights(model)
    expected = forward_and_gradients(model, x)
    results = in_threads(lambda: forward_and_gradients(model, x))
    if constraint in REPEATABLE:
        assert_bitwise(results, expected)
    else:
        for result in results:
            torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5)
    for module in model:
        if hasattr(module, "constraint"):
            assert float(lipschitz_bound(module)) <= module.lipschitz_constant * (1 + 1e-6)


@pytest.mark.parametrize("layer", CONSTRAINED, ids=str)
def test_every_layer(layer):
    module, x = layer.trained().eval(), layer.input()
    expected = forward_and_gradients(module, x)
    assert_bitwise(in_threads(lambda: forward_and_gradients(module, x)), expected)


def test_threads_that_each_turn_grouping_on_and_off():
    # No forward is lost, and none is wrong, while hooks come and go.
    model, x = mlp("polar")
    expected = forward_and_gradients(model.eval(), x)

    def work():
        with grouped(model):
            return forward_and_gradients(model, x)

    for result in in_threads(work):
        torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)
    assert not model._forward_pre_hooks and not model._forward_hooks


def test_a_prepared_weight_belongs_to_its_thread():
    layer = lnn.SpectralLinear(4, 4)
    layer.prepare(layer.weight)
    mine = layer.prepared()
    assert layer.weight is mine
    theirs = []
    thread = threading.Thread(
        target=lambda: theirs.extend((layer.prepared(), layer.weight, layer.release()))
    )
    thread.start()
    thread.join()
    assert theirs[0] is None and theirs[1] is not mine
    assert layer.prepared() is mine
    layer.release()
    assert layer.prepared() is None


def test_grad_modes_and_autocast_are_each_thread_s_own():
    model, x = mlp("polar")
    group_weights(model.eval())
    plain = model(x).detach()
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        cast = model(x)
    turn = iter(range(THREADS * ROUNDS))

    def work():
        how = next(turn) % 3
        if how == 0:
            return torch.equal(model(x).detach(), plain)
        if how == 1:
            with torch.no_grad():
                return torch.equal(model(x), plain)
        with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
            return torch.equal(model(x), cast)

    assert all(in_threads(work))


def test_certificates_and_exports():
    model, x = convnet("polar")
    model.eval()
    bound, expected = lipschitz_bound(model).layers, vanilla_export(model)(x)

    def work():
        return lipschitz_bound(model).layers == bound and torch.equal(
            vanilla_export(model)(x), expected
        )

    assert all(in_threads(work))
