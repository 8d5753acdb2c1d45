"""Thousands of training steps: the bound and the memory stay where they are.

``--soak-steps`` sets how many (500 by default). A way to train is a function of the model and the
optimizer that gives a context manager; add one to WAYS and the same test soaks it.
"""

import contextlib
import gc
import math
import pathlib
import sys

import pytest
import torch
from operator_norm import assert_within
from torch import nn

import lipkernels.nn as lnn
from lipkernels import Retractor, grouped
from lipkernels.certify import lipschitz_bound

K = 1.5
LOOSENESS = 1e-6  # of the certificate of float32 weights that are orthogonal to rounding
PAGE = 4096


def net():
    torch.manual_seed(0)
    return lnn.Sequential(
        lnn.SpectralConv2d(1, 4, 3, padding=1, padding_mode="circular"),
        lnn.GroupSort2(),
        lnn.ScaledL2NormPool2d(2),
        nn.Flatten(),
        lnn.SpectralLinear(16, 16, eps_bjorck=None),
        lnn.MaxMin(),
        lnn.SpectralLinear(32, 16, maxiter_bjorck=5),
        lnn.HouseHolder(16),
        lnn.FrobeniusLinear(16, 3, disjoint_neurons=False),
        k_coef_lip=K,
    )


WAYS = {
    "reparametrized": lambda model, optimizer: contextlib.nullcontext(),
    "grouped": lambda model, optimizer: grouped(model),
    "retracted": lambda model, optimizer: Retractor(model).attach(optimizer),
}


def resident_bytes():
    return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * PAGE


def live_tensors():
    return sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())


def check_bound(model):
    """The certificate, and the promise of each layer against an SVD of the weight as stored."""
    bound = float(lipschitz_bound(model))
    assert bound <= K * (1 + LOOSENESS), bound
    for layer in model:
        if hasattr(layer, "constraint"):
            matrix = layer.matrix(layer.weight.detach())
            assert_within(matrix, layer.matrix_scale(), type(layer).__name__)
    return bound


def learning_rate(step, steps):
    """Sensible, silly for a tenth of the time, sensible again, vanishing."""
    if 0.4 * steps <= step < 0.5 * steps:
        return 100.0
    return 0.0 if step >= 0.9 * steps else 3e-3


@pytest.mark.parametrize("way", WAYS)
def test_soak(way, request):
    steps = request.config.getoption("--soak-steps")
    model = net()
    optimizer = torch.optim.Adam(model.parameters())
    loss_of = lnn.MarginCrossEntropyLoss()
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(64, 1, 4, 4, generator=generator)
    labels = nn.functional.lp_pool2d(images, 2, 2).flatten(1)[:, :3].argmax(1)
    measured, bounds = [], []
    losses = torch.full((steps,), math.nan)
    settled = max(50, steps // 10)  # caches are filled by then
    with WAYS[way](model, optimizer):
        for step in range(steps):
            if step >= settled and step % max(1, steps // 20) == 0:
                bounds.append(check_bound(model))
                gc.collect()
                measured.append((resident_bytes(), live_tensors(), sys.getallocatedblocks()))
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, steps)
            optimizer.zero_grad()
            loss = loss_of(model(images), labels)
            loss.backward()
            optimizer.step()
            losses[step] = loss.detach()
        bounds.append(check_bound(model))
    before, after = losses[0].item(), losses[int(0.4 * steps) - 1].item()
    assert after < 0.9 * before and losses.isfinite().all()  # it did train
    assert all(p.isfinite().all() for p in model.parameters())
    resident, tensors, blocks = zip(*measured, strict=True)
    print(
        f"\n{way}: {steps} steps, bound {min(bounds):.9f} to {max(bounds):.9f} for k = {K};"
        f" resident memory {resident[0] / 2**20:.1f} MiB at step {settled},"
        f" {resident[-1] / 2**20:.1f} at the last ({max(resident) / 2**20:.1f} at most);"
        f" {tensors[0]} tensors, then {min(tensors)} to {max(tensors)};"
        f" {blocks[-1] - blocks[1]:+} Python objects; loss {before:.2f} to {after:.2f}"
    )
    assert len(set(tensors[1:])) == 1, tensors  # optimizer state is made with the first step
    assert max(resident) - resident[0] < 8 * 2**20, resident
    # The interpreter's own come to 100 to 950, whether the run is long or short.
    assert blocks[-1] - blocks[1] < 2000, blocks
