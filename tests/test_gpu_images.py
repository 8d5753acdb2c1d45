"""Image ops on a GPU, at the sizes of networks: values, gradients, CUDA graphs."""

import pytest
import torch

from lipkernels import backends
from lipkernels import functional as F

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

DEVICE = "cuda"
IMAGES = [(64, 64, 56, 56), (32, 256, 14, 14), (128, 3, 224, 224), (8, 512, 7, 28)]
HALVES = (torch.float32, torch.bfloat16, torch.float16)
LAYOUTS = (torch.contiguous_format, torch.channels_last)


def calls():
    """Each op with each of its settings, as a function of an image and a backend."""
    for mode in ("CRD", "DCR"):
        for data_format in ("channels_first", "channels_last"):
            for scale in (1.0, 0.37):
                others = {"mode": mode, "data_format": data_format, "scale": scale}
                name = f"{mode}-{data_format}-{scale}"
                yield f"down-{name}", lambda x, b, o=others: there_and_back(x, b, o, True)
                yield f"up-{name}", lambda x, b, o=others: there_and_back(x, b, o, False)
    for size in (2, 4, None):
        yield f"sort-{size}", lambda x, b, s=size: grouped(x, b, s)
    for kernel, stride, padding in ((2, 2, 0), (7, 7, 0), (3, 2, 1)):
        window = (kernel, stride, padding)
        yield f"pool-{kernel}", lambda x, b, w=window: F.l2_norm_pool2d(x, *w, backend=b)
        yield f"pool-mean-{kernel}", lambda x, b, w=window: F.scaled_avg_pool2d(x, *w, backend=b)
    yield "pool-all", lambda x, b: F.l2_norm_pool2d(x, tuple(x.shape[-2:]), backend=b)
    yield "pool-mean-all", lambda x, b: F.scaled_avg_pool2d(x, None, backend=b)


def there_and_back(x, backend, others, down):
    x = x.permute(0, 2, 3, 1) if others["data_format"] == "channels_last" else x
    if down:
        return F.space_to_depth(x, (1, 2), backend=backend, **others)
    deep = F.space_to_depth(x, (1, 2), backend="reference", **others)
    return F.depth_to_space(deep, (1, 2), backend=backend, **others)


def grouped(x, backend, size):
    channels = x.shape[1] if size is None else x.shape[1] // size * size
    return F.group_sort(x[:, :channels], size, backend=backend)


CALLS = dict(calls())


def on_kernels():
    """Parametrize a test over (name, backend): the backends of kernels that have the op."""
    parameters = []
    for name in CALLS:
        for backend in ("triton", "cuda"):
            if backend == "cuda" and name.startswith("pool"):
                continue  # it has none
            reason = backends.why_not(backend, torch.device(DEVICE))
            marks = [pytest.mark.skip(reason=reason)] if reason is not None else []
            parameters.append(pytest.param(name, backend, marks=marks, id=f"{name}-{backend}"))
    return pytest.mark.parametrize(("name", "backend"), parameters)


def image(shape, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(DEVICE, dtype)


def value_and_gradient(call, x, backend):
    x = x.detach().requires_grad_()
    y = call(x, backend)
    weights = torch.linspace(-1, 1, y.numel(), device=y.device).view(y.shape).to(y.dtype)
    return y.detach(), torch.autograd.grad(y, x, weights)[0]


def assert_same(name, got, expected):
    if name.startswith("pool"):
        eps = max(torch.finfo(got.dtype).eps, 1e-6)
        torch.testing.assert_close(got, expected, rtol=4 * eps, atol=eps)
    else:
        assert torch.equal(got, expected)


@pytest.mark.parametrize("shape", IMAGES, ids=str)
@on_kernels()
def test_values_and_gradients(name, backend, shape):
    for dtype in HALVES:
        for layout in LAYOUTS:
            x = image(shape, dtype).contiguous(memory_format=layout)
            got = value_and_gradient(CALLS[name], x, backend)
            expected = value_and_gradient(CALLS[name], x, "reference")
            for a, b in zip(got, expected, strict=True):
                assert_same(name, a, b)
            for a, b in zip(got, value_and_gradient(CALLS[name], x, backend), strict=True):
                assert torch.equal(a, b)  # bitwise the same twice


@on_kernels()
def test_captured_in_a_graph(name, backend):
    call, x = CALLS[name], image(IMAGES[0], torch.float16)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        value_and_gradient(call, x, backend)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = value_and_gradient(call, x, backend)
    x.copy_(image(IMAGES[0], torch.float16, seed=1))
    graph.replay()
    torch.cuda.synchronize()
    for a, b in zip(got, value_and_gradient(call, x, "reference"), strict=True):
        assert_same(name, a, b)


def test_auto_takes_kernels_on_a_gpu():
    able = [n for n in ("cuda", "triton") if backends.why_not(n, torch.device(DEVICE)) is None]
    implemented = dict.fromkeys(("reference", "triton", "cuda"))
    expected = [*able, "reference"][0]
    assert backends.resolve("op", implemented, torch.device(DEVICE)) == expected


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
@on_kernels()
def test_a_device_that_is_not_the_current_one(name, backend):
    x = image((4, 8, 16, 16), torch.float32).to("cuda:1")
    with torch.cuda.device(0):
        got = value_and_gradient(CALLS[name], x, backend)
        expected = value_and_gradient(CALLS[name], x, "reference")
    for a, b in zip(got, expected, strict=True):
        assert a.device == x.device
        assert_same(name, a, b)
