"""Of `lipkernels.kernels.triton.frobenius`: aligned and unaligned groups, float32 and bfloat16."""

from lipkernels.kernels.triton import frobenius as kernels
from triton_builds import Build

_TABLES = {"table": "*i64", "tiles": "*i32", "places": "*i64"}


def _builds():
    for weight, other in (("fp32", "fp32"), ("fp32", "bf16"), ("bf16", "bf16")):
        tensors = {"weights": f"*{weight}", "results": f"*{other}"}
        gradients = {"weights": f"*{weight}", "grads": f"*{other}", "results": f"*{weight}"}
        forward = {**tensors, **_TABLES, "factors": "*fp64"}
        backward = {**gradients, **_TABLES, "scales": "*fp64", "limit": "fp32"}
        for aligned in (True, False):
            settings = {"num_warps": kernels.WARPS, "registers": 160}
            name = f"{weight}-{other}-{'aligned' if aligned else 'any'}"
            for kernel, signature in (
                (kernels.normalize_rows, forward),
                (kernels.differentiate_rows, backward),
            ):
                constants = {"ALIGNED": aligned, **kernels.BY_ROWS}
                yield Build(kernel, signature, constants, name=name, **settings)
            sums = {"squares": "*fp64", "products": "*fp64"}
            # The last block of a matrix is masked, element by element.
            settings |= {"wide_loads": aligned, "narrow": 80, "name": name}
            for has_grads, width in ((False, 2), (True, 3)):
                signature = {**gradients, **_TABLES, **sums}
                del signature["results"]
                constants = {
                    "ALIGNED": aligned,
                    "HAS_GRADS": has_grads,
                    "WIDTH": width,
                    "BLOCK": kernels.WHOLE["BLOCK"],
                }
                yield Build(kernels.partial_sums, signature, constants, **settings)
            constants = {"ALIGNED": aligned, **kernels.WHOLE}
            forward_sums = {**forward, "squares": "*fp64"}
            yield Build(kernels.normalize, forward_sums, constants, **settings)
            yield Build(kernels.differentiate, {**backward, **sums}, constants, **settings)


BUILDS = list(_builds())
