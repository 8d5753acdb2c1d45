"""Every op once, forward and backward, at small ragged shapes: what compute-sanitizer watches.

compute-sanitizer --tool racecheck python -m bench.gpu.sanitize
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from bench.gpu import implementations
from bench.gpu.contenders import WEIGHT_OPS, work
from bench.gpu.implementations import REFERENCE
from bench.gpu.ops import FORWARD_ONLY
from lipkernels import functional as F

# The last is for clusters of blocks: in the polar factor, and in power iteration.
SHAPES = ((8, 12), (33, 17), (70, 70), (1, 9), (70, 900))
IMAGES = (2, 6, 6, 10)
IMAGE_OPS: dict[str, Callable[[Tensor, str], Tensor]] = {
    "space_to_depth": lambda x, b: F.space_to_depth(x, 2, backend=b),
    "depth_to_space": lambda x, b: F.depth_to_space(x, (1, 2), backend=b),
    "group_sort": lambda x, b: F.group_sort(x, 2, backend=b),
    "l2_norm_pool2d": lambda x, b: F.l2_norm_pool2d(x, 2, backend=b),
    "scaled_avg_pool2d": lambda x, b: F.scaled_avg_pool2d(x, 2, backend=b),
}


def _finite(tensors: Sequence[Tensor]) -> None:
    for x in tensors:
        if not bool(x.isfinite().all()):
            raise RuntimeError(f"expected finite results, got {x}")


def _weights(op: str, backend: str, device: torch.device) -> None:
    weights = [torch.randn(shape, device=device) for shape in SHAPES]
    if op == "project_tangent":
        held = F.polar_factor(weights, backend=REFERENCE)
        _finite(F.project_tangent(weights, held, backend=backend))
        return
    if op in FORWARD_ONLY:
        _finite(work(WEIGHT_OPS[op], backend, weights, ()).forward())
        return
    results, gradients = work(
        WEIGHT_OPS[op], backend, weights, [torch.randn_like(w) for w in weights]
    ).both()
    _finite([*results, *gradients])


def _image(op: str, backend: str, device: torch.device) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(IMAGES, device=device).to(dtype).requires_grad_()
        y = IMAGE_OPS[op](x, backend)
        _finite([y, *torch.autograd.grad(y, x, torch.randn_like(y))])
    if op == "group_sort":
        y, x = F.group_sort(x, None, backend=backend), x.detach()
        _finite([y])


def call(op: str, backend: str, device: torch.device) -> None:
    """One call of ``op``; raises RuntimeError where a result is not finite."""
    (_image if op in IMAGE_OPS else _weights)(op, backend, device)


def main(argv: Sequence[str] | None = None) -> int:
    p = argparse.ArgumentParser(prog="python -m bench.gpu.sanitize", description=__doc__)
    p.add_argument("--device", default="cuda", help="cuda, cuda:N or cpu (default: cuda)")
    device = torch.device(p.parse_args(argv).device)
    torch.manual_seed(0)
    for op in implementations.IMPLEMENTED:
        able, _ = implementations.of(op, device)
        kernels = [name for name in able if name != REFERENCE]
        for backend in kernels or able:
            call(op, backend, device)
            print(f"{op} {backend}", flush=True)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
