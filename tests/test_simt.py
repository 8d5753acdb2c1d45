"""The host shim under the CUDA kernels (csrc/simt): what it computes, which mistakes it sees."""

import ctypes
import pathlib
import platform
import shutil
import subprocess

import pytest
import torch

HERE = pathlib.Path(__file__).resolve().parent
pytestmark = [
    pytest.mark.skipif(shutil.which("g++") is None, reason="the shim is built with g++"),
    pytest.mark.skipif(platform.machine() != "x86_64", reason="the shim is for x86-64"),
]
SEEDS = (0, 1, 2, 3, 4)
DEADLOCK, DIVERGENT, OUT_OF_BOUNDS, MISALIGNED, BAD_CLUSTER, NOT_A_FULL_WARP = range(10002, 10008)
BAD_LAUNCH = 10001


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    built = {}

    def library(*macros):
        if macros not in built:
            out = tmp_path_factory.mktemp("simt") / "kernels.so"
            command = ["g++", "-std=c++17", "-O1", "-DLK_SIMT", "-fPIC", "-shared", "-x", "c++"]
            flags = [f"-D{macro}" for macro in macros]
            subprocess.run([*command, *flags, str(HERE / "simt_kernels.cu"), "-o", out], check=True)
            built[macros] = ctypes.CDLL(str(out))
            built[macros].lk_simt_message.restype = ctypes.c_char_p
        return built[macros]

    return library


@pytest.fixture(scope="module")
def kernels(build):
    return build()


def run(function, *arguments):
    return function(
        *(ctypes.c_void_p(a.data_ptr()) if torch.is_tensor(a) else a for a in arguments)
    )


def numbers(n, seed=0):
    return torch.randn(n, generator=torch.Generator().manual_seed(seed))


def outcomes(library, function, x, *arguments):
    """What the kernel leaves under every seed."""
    found = []
    for seed in SEEDS:
        library.lk_simt_seed(seed)
        y = torch.full_like(x, torch.nan)
        assert run(function, x, y, *arguments) == 0
        found.append(y)
    library.lk_simt_seed(0)
    return found


def test_block_and_warp_barriers(kernels):
    x = numbers(192)
    for y in outcomes(kernels, kernels.run_reverse_block, x, 3):
        assert torch.equal(y, x.view(3, 64).flip(1).reshape(-1))
    x = numbers(64)
    for y in outcomes(kernels, kernels.run_reverse_warp, x):
        assert torch.equal(y, x.view(2, 32).flip(1).reshape(-1))


def test_removed_syncthreads_is_seen(build):
    library, x = build("WITHOUT_SYNCTHREADS"), numbers(192)
    for y in outcomes(library, library.run_reverse_block, x, 3):
        assert not torch.equal(y, x.view(3, 64).flip(1).reshape(-1))
        assert y.isnan().any()  # memory that was read before it was written


def test_removed_syncwarp_is_seen(build):
    library, x = build("WITHOUT_SYNCWARP"), numbers(64)
    for y in outcomes(library, library.run_reverse_warp, x):
        assert not torch.equal(y, x.view(2, 32).flip(1).reshape(-1))


def test_removed_cluster_barrier_is_seen(build, kernels):
    x = numbers(512)
    blocks = x.view(2, 4, 64)
    expected = blocks.roll(-1, 1) + blocks.sum((1, 2), keepdim=True)
    for y in outcomes(kernels, kernels.run_cluster_words, x):
        torch.testing.assert_close(y.view(2, 4, 64), expected, rtol=0, atol=1e-4)
    library = build("WITHOUT_CLUSTER_SYNC")
    assert any(y.isnan().any() for y in outcomes(library, library.run_cluster_words, x))


def test_memory_of_a_block_that_ended_is_seen(build):
    library, x = build("WITHOUT_LAST_CLUSTER_SYNC"), numbers(512)
    library.lk_simt_seed(0)
    assert run(library.run_cluster_words, x, torch.empty(512)) == BAD_CLUSTER


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    ("which", "code"),
    {
        0: 0,
        1: DIVERGENT,  # half of the block, the others at the next barrier
        2: DIVERGENT,  # two barriers instead of one
        3: DEADLOCK,  # a thread has returned
        4: OUT_OF_BOUNDS,  # behind dynamic shared memory
        5: OUT_OF_BOUNDS,  # before it
        6: OUT_OF_BOUNDS,  # behind a static array
        7: DIVERGENT,  # half of a warp, while the others wait for the block
        8: NOT_A_FULL_WARP,
        9: MISALIGNED,
        10: BAD_CLUSTER,
        11: DIVERGENT,  # two warp functions
    }.items(),
)
def test_mistakes(kernels, which, code, seed):
    kernels.lk_simt_seed(seed)
    x, y = numbers(64), torch.empty(64)
    found = run(kernels.run_mistakes, x, y, which)
    if which == 7:
        assert found in (DEADLOCK, DIVERGENT)
    else:
        assert found == code, kernels.lk_simt_message()
    assert (kernels.lk_simt_message() == b"") == (code == 0)
    assert run(kernels.run_mistakes, x, y, 0) == 0  # the next launch is a fresh one
    assert torch.equal(x, y)
    kernels.lk_simt_seed(0)


@pytest.mark.parametrize("which", [12, 13], ids=["dynamic", "static"])
def test_memory_that_nobody_wrote_is_nan(kernels, which):
    y = torch.zeros(64)
    assert run(kernels.run_mistakes, numbers(64), y, which) == 0
    assert y[:16].isnan().all()


def test_launches_that_cuda_refuses(kernels):
    for threads, shared, cluster, blocks in [
        (1025, 0, 1, 1),
        (0, 0, 1, 1),
        (32, 228 << 10, 1, 1),
        (32, 0, 16, 16),
        (32, 0, 4, 6),
        (32, 0, 1, 0),
    ]:
        assert kernels.run_launch(threads, shared, cluster, blocks) == BAD_LAUNCH


def test_warp_words(kernels):
    x, y = numbers(64), torch.empty(6 * 64)
    assert run(kernels.run_warp_words, x, y) == 0
    warps, y = x.view(2, 32), y.view(6, 2, 32)
    torch.testing.assert_close(y[0], warps.sum(1, keepdim=True).expand(2, 32))
    assert torch.equal(y[1][:, :29], warps[:, 3:]) and torch.equal(y[1][:, 29:], warps[:, 29:])
    assert torch.equal(y[2][:, 3:], warps[:, :29]) and torch.equal(y[2][:, :3], warps[:, :3])
    assert torch.equal(y[3], warps[:, 5:6].expand(2, 32))
    votes = ((warps[:, :16] > 0) * 2 ** torch.arange(16)).sum(1, keepdim=True)
    assert torch.equal(y[4], votes.float().expand(2, 32))
    torch.testing.assert_close(y[5], x.sum().expand(2, 32))


def test_products_of_planes(kernels):
    a, b = 100 * numbers(32 * 48).view(32, 48), 100 * numbers(16 * 48, 1).view(16, 48)
    c, d = torch.empty(32, 16), torch.empty(32, 16)
    for seed in SEEDS:
        kernels.lk_simt_seed(seed)
        assert run(kernels.run_product, a, b, c, d) == 0
        exact = a.double() @ b.double().mT
        bound = a.double().abs() @ b.double().abs().mT
        assert ((c - exact).abs() <= 2.0**-21 * bound).all()
        assert torch.equal(c, d)
    kernels.lk_simt_seed(0)


def test_formats(kernels):
    x = torch.cat([numbers(60), torch.tensor([1e-40, 2.0, -3e-45, 60000.0])])
    y = torch.empty(3, 64)
    assert run(kernels.run_formats, x, y) == 0
    assert torch.equal(y[0], x.bfloat16().float())
    assert torch.equal(y[1], x.half().float())
    exact = 2.0 ** torch.floor(torch.log2(x.double().abs()))
    assert torch.equal(y[2].double(), exact)
