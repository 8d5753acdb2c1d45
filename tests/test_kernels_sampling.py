"""Permuted copies by kernels for GPUs, beyond what test_op_sampling.py asks of every backend."""

import pytest
import torch
from cases import ANY_DTYPE, FLOATS, by_dtype, device_of, is_interpreted, on_gpu_backends
from kernel_data import any_bytes, assert_moved

from lipkernels import functional as F

OPS = (F.space_to_depth, F.depth_to_space)
MODES = ("CRD", "DCR")

on_kernels = on_gpu_backends("space_to_depth")


@on_kernels
@by_dtype((*ANY_DTYPE, torch.complex64, torch.complex128))
def test_every_format_is_moved_bit_by_bit(dtype, backend):
    for op in OPS:
        for mode in MODES:
            x = any_bytes((2, 12, 4, 8), dtype).to(device_of(backend))  # NaN included
            assert_moved(op, x, 2, backend, mode=mode)
            assert_moved(op, x.permute(0, 2, 3, 1), 2, backend, mode=mode)  # last in memory
            assert_moved(op, x, (2, 1), backend, mode=mode, data_format="channels_last")


# More than one tile, in every dimension; sizes that end within one.
@on_kernels
@pytest.mark.parametrize(
    ("shape", "block"),
    [
        ((2, 4, 64, 48), 2),
        ((1, 8, 33, 42), (3, 1)),
        ((1, 80, 8, 34), (1, 2)),
        ((1, 72, 12, 20), 4),
        ((1, 4, 72, 60), (8, 2)),
        ((1, 9, 36, 39), 3),
        ((1, 4, 130, 70), 1),
        ((3, 16, 14, 14), 2),
    ],
    ids=str,
)
def test_many_tiles(shape, block, backend):
    ph, pw = (block, block) if isinstance(block, int) else block
    n, c, h, w = shape
    dtypes = (torch.int16,) if is_interpreted(backend) else (torch.int16, torch.uint8)
    for op, size in ((OPS[0], shape), (OPS[1], (n, ph * pw * c, h // ph, w // pw))):
        for dtype in dtypes:
            x = any_bytes(size, dtype).to(device_of(backend))
            layouts = (x, x.contiguous(memory_format=torch.channels_last), x.mT.contiguous().mT)
            for mode in MODES:
                for view in layouts:
                    assert_moved(op, view, block, backend, mode=mode)
                for view in (x.movedim(1, -1).contiguous(), x.movedim(1, -1)):
                    last = {"mode": mode, "data_format": "channels_last"}
                    assert_moved(op, view, block, backend, **last)


@on_kernels
def test_expanded_and_overlapping_strides(backend):
    base = any_bytes((1, 4, 6, 8), torch.float32).to(device_of(backend))
    for x in (
        base.expand(3, 4, 6, 8),
        base[:, :1].expand(2, 8, 6, 8),
        base[..., :1].expand(1, 4, 6, 8),
        base[:, :1, :1, :1].expand(2, 4, 6, 8),
        torch.as_strided(base, (2, 4, 4, 4), (3, 2, 5, 1)),
        base.flip(1)[:, ::2],
        base.transpose(1, 2),
        base.transpose(1, 3),
        base.flatten()[1:].unflatten(0, (1, 1, 1, -1))[..., :190].reshape(1, 1, 10, 19)[..., 1:],
    ):
        for op in OPS:
            block = (2, 1) if op is F.space_to_depth else (1, 2)
            if op is F.depth_to_space and x.shape[1] % 2:
                continue
            for mode in MODES:
                assert_moved(op, x, block, backend, mode=mode)


@on_kernels
@by_dtype(FLOATS)
@pytest.mark.parametrize("scale", [0.37, 3.0, 1 / 3, 1e-42, 1e40, 2.0**-1074])
def test_scaled_values_are_the_reference_bit_by_bit(dtype, scale, backend):
    x = torch.randn(2, 8, 6, 10, generator=torch.Generator().manual_seed(0))
    x = x.to(device_of(backend), dtype)
    x[0, 0, 0, :4] = torch.tensor([torch.inf, -torch.inf, torch.nan, 0.0])
    for op in OPS:
        for view in (x, x.contiguous(memory_format=torch.channels_last)):
            got = op(view, 2, scale=scale, backend=backend)
            expected = op(view, 2, scale=scale, backend="reference")
            torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)


@on_kernels
def test_complex_images_and_gradients(backend):
    device = device_of(backend)
    z = torch.randn(1, 4, 4, 4, dtype=torch.complex64, device=device)
    for op in OPS:
        for x in (z, z.conj(), z.imag, z.conj().imag):  # lazy conjugates and negatives
            for scale in (1.0, 0.5):
                got = op(x, 2, scale=scale, backend=backend)
                assert torch.equal(got, op(x, 2, scale=scale, backend="reference"))
        x = torch.randn(1, 4, 4, 4, dtype=torch.float64, device=device, requires_grad=True)

        def call(t, op=op):
            return op(t, (1, 2), mode="DCR", scale=0.7, backend=backend)

        assert torch.autograd.gradcheck(call, x, fast_mode=True)
        assert torch.autograd.gradgradcheck(call, x, fast_mode=True)


@on_kernels
def test_op_and_its_fake_agree(backend):
    x = torch.randn(2, 4, 4, 6, device=device_of(backend), requires_grad=True)
    for name in ("space_to_depth", "depth_to_space"):
        op = getattr(torch.ops.lipkernels, name).default
        torch.library.opcheck(op, (x, 2, 1, "CRD", False, 0.5, backend))


@on_kernels
def test_compiled(backend):
    def function(x):
        return F.depth_to_space(F.space_to_depth(x, 2, backend=backend) * 2, 2, backend=backend)

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 3, 4, 6, device=device_of(backend), requires_grad=True)
    assert torch.equal(compiled(x), 2 * x)
    assert torch.equal(torch.autograd.grad(compiled(x).sum(), x)[0], torch.full_like(x, 2))
