"""Of `lipkernels.kernels.triton.bjorck`: every kernel, with each architecture's tiling."""

from lipkernels.kernels.triton import bjorck as kernels
from lipkernels.kernels.triton import planes, products
from lipkernels.kernels.triton.workspace import LANES
from triton_builds import Build

_TABLES = {"table": "*i64", "tiles": "*i32"}
_PLANES = {"hi": "*fp16", "lo": "*fp16"}
_COMMON = {**_TABLES, **_PLANES}
_BACK = {**_COMMON, "taken": "*i32"}
_SLOTS = {"k": "i32", "slot": "i32", "s_slot": "i32"}
_ALIGNED = {"ALIGNED": True, "B": products.B}


def _gram():
    signature = {**_TABLES, "batches": "*i32", **_PLANES, "sums": "*fp32", "before": "*i32"}
    return {**signature, "after": "*i32", "tol": "fp32", "x_slot": "i32", "e_slot": "i32"}


def _step():
    signature = {**_COMMON, "sums": "*fp32", "state": "*i32", "beta": "fp32"}
    return {**signature, "x_slot": "i32", "e_slot": "i32", "out_slot": "i32"}


def _elementwise():
    places = {**_TABLES, "places": "*i64"}
    state = {"sums": "*fp32", "before": "*i32"}
    yield kernels.pack, {"weights": "*fp32", **places, **_PLANES}, {}
    finish = {"results": "*fp32", **places, "multipliers": "*fp64", "batches": "*i32", **_PLANES}
    yield kernels.finish, {**finish, **state, "tol": "fp32"}, {"FIRST": False, "LANES": LANES}
    grads = {"grads": "*fp32", **places, "batches": "*i32", "maxima": "*i32", **_PLANES, **state}
    grads |= {"after": "*i32", "units": "*fp32", "tol": "fp32", "slot": "i32"}
    yield kernels.pack_gradient, grads, {"FIRST": False, "LANES": LANES}
    out = {"out": "*fp32", **places, "scales": "*fp64", **_PLANES, "taken": "*i32"}
    yield kernels.finish_gradient, {**out, "units": "*fp32", "slot": "i32"}, {}


def _builds():
    for tiling, architectures in (
        (products.WITH_POINTERS, (80,)),
        (products.WITH_DESCRIPTORS, (90, 100)),
    ):
        for kernel, signature, constants in (
            (kernels.gram, _gram(), {"FIRST": False, "LANES": LANES}),
            (kernels.step, _step(), {}),
            (kernels.across, {**_BACK, **_SLOTS}, {}),
            (kernels.step_back, {**_BACK, "beta": "fp32", **_SLOTS}, {}),
        ):
            yield Build(
                kernel,
                signature,
                {**constants, **tiling.constants},
                **tiling.options
                | ({"num_stages": kernels.GRAM_STAGES} if kernel is kernels.gram else {}),
                wide_loads=True,
                narrow=80,
                registers=200,
                architectures=architectures,
            )
    for kernel, signature, constants in _elementwise():
        yield Build(
            kernel,
            signature,
            {**constants, **_ALIGNED},
            num_warps=planes.WARPS,
            registers=200,
        )


BUILDS = list(_builds())
