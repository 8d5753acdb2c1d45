"""Every op at real sizes: time by backend over the floor, beside the alternatives, with its errors.

One weight at a time (whole models are the business of :mod:`bench.gpu.models`); images of a
128-sample batch. Forward, and forward with backward.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from bench.cases import SHAPES, Case
from bench.gpu import accuracy, contenders, floors, rates
from bench.gpu.baselines import Copy
from bench.gpu.contenders import WEIGHT_OPS, Function, exact, own, rotated, work
from bench.gpu.implementations import REFERENCE
from bench.gpu.queued import copies
from bench.gpu.rows import Contender, measure
from bench.gpu.shapes import Shape
from bench.gpu.table import Row, Table, options
from bench.timing import Budget
from lipkernels import functional as F

BUDGET = Budget(seconds=0.4, least=5, most=40)
TINY = Budget(seconds=0.0, least=1)
OTHER_SHAPES = ((64, 576), (256, 2304), (1024, 1024))
IMAGES = (128, 64, 32, 32)
COPY = "device copy"
# How far an optimizer's step takes a weight from the constraint, for what is to put it back.
STEP = 1e-3
# Without a gradient.
FORWARD_ONLY = ("power_iteration", "retract", "project_tangent")

Problems = list[tuple[list[Tensor], list[Tensor]]]


class Ops:
    """Measures rows with one budget on one device."""

    def __init__(self, device: torch.device, budget: Budget, known: Mapping[str, float]) -> None:
        self.device, self.budget, self.rates = device, budget, known
        self.missing: dict[str, str] = {}

    def _run(
        self,
        op: str,
        function: Function,
        problems: Problems,
        more: Mapping[str, Contender],
        counted: floors.Floors,
        orthogonal: bool | None,
        exactly: Function | None = None,
    ) -> Row:
        ours, missing = own(op, function, problems)
        self.missing |= {f"{op}, {name}": why for name, why in missing.items()}
        truth = exact(exactly or function, *problems[0])

        def check(results: Sequence[Tensor], gradients: Sequence[Tensor]) -> accuracy.Figures:
            if orthogonal is None:
                return accuracy.of_data(results, gradients, truth)
            return accuracy.of_weights(results, gradients, truth, orthogonal)

        row = measure({**ours, **more}, counted, check, self.budget, self.device, self.rates)
        shapes = [list(x.shape) for x in problems[0][0]]
        return {"op": op, "shapes": shapes, "dtype": str(problems[0][0][0].dtype), **row}

    def weight(self, op: str, shape: Shape, kind: str) -> Row:
        """One weight; ``kind``: a kind of :mod:`bench.cases`."""
        weight, cotangent = Case(*shape, kind).tensors(self.device)
        if op == "retract":
            on_it = F.polar_factor(weight, backend=REFERENCE)
            weight = on_it + STEP * cotangent / (shape[0] ** 0.5 + shape[1] ** 0.5)
        problems = rotated([weight], [] if op in FORWARD_ONLY else [cotangent], self.device)
        more: dict[str, Contender] = {}
        if op == "polar_factor":
            more, missing = contenders.others(problems)
            self.missing |= missing
        orthogonal = None if op == "power_iteration" else op in ("polar_factor", "retract")
        counted = floors.of_weights(op, [shape])
        exactly = WEIGHT_OPS["polar_factor"] if op == "retract" else None
        return self._run(op, WEIGHT_OPS[op], problems, more, counted, orthogonal, exactly)

    def project(self, shape: Shape) -> Row:
        """A gradient, projected on the tangent space at an orthogonal weight."""
        weight, grad = Case(*shape, "near_orthogonal").tensors(self.device)
        held = F.polar_factor(weight, backend=REFERENCE)
        problems = rotated([grad, held], [], self.device)

        def project(pair: list[Tensor], backend: str) -> list[Tensor]:
            return [F.project_tangent(pair[0], pair[1], backend=backend)]

        counted = floors.of_weights("project_tangent", [shape])
        return self._run("project_tangent", project, problems, {}, counted, None)

    def image(
        self,
        op: str,
        function: Callable[[Tensor, str], Tensor],
        x: Tensor,
        more: Mapping[str, Callable[[Tensor], Tensor]],
    ) -> Row:
        """An op on images; ``more``: torch's own, by name."""
        shape = function(x, REFERENCE).shape
        grad = torch.randn(shape, device=self.device).to(x.dtype)
        nbytes = x.nbytes + grad.nbytes
        problems: Problems = [
            ([x.clone()], [grad.clone()]) for _ in range(copies(2 * nbytes, self.device))
        ]

        def of_list(inputs: list[Tensor], backend: str) -> list[Tensor]:
            return [function(inputs[0], backend)]

        def torchs(call: Callable[[Tensor], Tensor]) -> Contender:
            return Contender(
                lambda: [work(lambda xs, _: [call(xs[0])], "", *problem) for problem in problems]
            )

        copy = Contender(lambda: [Copy(lambda: (), *p) for p in problems], order=None)
        others = {COPY: copy, **{name: torchs(call) for name, call in more.items()}}
        counted = floors.moved(nbytes, nbytes)
        return self._run(op, of_list, problems, others, counted, None)


def _weights(ops: Ops, tiny: bool) -> dict[str, Callable[[], Row]]:
    shapes = ((4, 6),) if tiny else SHAPES
    some = ((6, 4),) if tiny else OTHER_SHAPES
    cases = [("polar_factor", shape, "near_orthogonal") for shape in shapes]
    cases += [(op, s, "near_orthogonal") for op in WEIGHT_OPS if op != "polar_factor" for s in some]
    kinds = ("gaussian",) if tiny else ("gaussian", "condition_100")
    cases += [("polar_factor", s, kind) for s in some for kind in kinds]
    found = {
        f"{op} {shape[0]}x{shape[1]} {kind}": partial(ops.weight, op, shape, kind)
        for op, shape, kind in cases
    }
    return found | {
        f"project_tangent {shape[0]}x{shape[1]}": partial(ops.project, shape) for shape in some
    }


def _images(ops: Ops, tiny: bool) -> dict[str, Callable[[], Row]]:
    n, c, h, w = (2, 4, 4, 4) if tiny else IMAGES
    deep = (n, 4 * c, h // 2, w // 2)

    def draw(shape: tuple[int, ...], dtype: torch.dtype, last: bool = False) -> Tensor:
        x = torch.randn(shape, device=ops.device).to(dtype)
        return x.contiguous(memory_format=torch.channels_last) if last else x

    def pixel_unshuffle(x: Tensor) -> Tensor:
        return nn.functional.pixel_unshuffle(x, 2)

    def pixel_shuffle(x: Tensor) -> Tensor:
        return nn.functional.pixel_shuffle(x, 2)

    def avg_pool(x: Tensor) -> Tensor:
        return nn.functional.avg_pool2d(x, 2) * 2.0

    found: dict[str, Callable[[], Row]] = {}
    for dtype in (torch.float32,) if tiny else (torch.float32, torch.bfloat16):
        short = str(dtype).removeprefix("torch.")
        found |= {
            f"space_to_depth {short}": lambda dtype=dtype: ops.image(
                "space_to_depth",
                lambda x, b: F.space_to_depth(x, 2, backend=b),
                draw((n, c, h, w), dtype),
                {"torch pixel_unshuffle": pixel_unshuffle},
            ),
            f"depth_to_space {short}": lambda dtype=dtype: ops.image(
                "depth_to_space",
                lambda x, b: F.depth_to_space(x, 2, backend=b),
                draw(deep, dtype),
                {"torch pixel_shuffle": pixel_shuffle},
            ),
            f"group_sort 2 {short}": lambda dtype=dtype: ops.image(
                "group_sort",
                lambda x, b: F.group_sort(x, 2, backend=b),
                draw((n, c, h, w), dtype),
                {},
            ),
            f"l2_norm_pool2d 2 {short}": lambda dtype=dtype: ops.image(
                "l2_norm_pool2d",
                lambda x, b: F.l2_norm_pool2d(x, 2, backend=b),
                draw((n, c, h, w), dtype),
                {},
            ),
            f"scaled_avg_pool2d 2 {short}": lambda dtype=dtype: ops.image(
                "scaled_avg_pool2d",
                lambda x, b: F.scaled_avg_pool2d(x, 2, scale=2.0, backend=b),
                draw((n, c, h, w), dtype),
                {"torch avg_pool2d, scaled": avg_pool},
            ),
        }
    found["group_sort 2 channels_last"] = lambda: ops.image(
        "group_sort",
        lambda x, b: F.group_sort(x, 2, backend=b),
        draw((n, c, h, w), torch.float32, last=True),
        {},
    )
    found["group_sort all channels"] = lambda: ops.image(
        "group_sort",
        lambda x, b: F.group_sort(x, None, backend=b),
        draw((n, c, h, w), torch.float32),
        {},
    )
    return found


def main(argv: Sequence[str] | None = None) -> int:
    found = options("ops", "Every op at real sizes.", argv)
    ops = Ops(found.device, TINY if found.dry_run else BUDGET, rates.read(found.out))
    table = Table("ops", found, ops.missing)
    table.measure(_images(ops, found.dry_run) | _weights(ops, found.dry_run))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
