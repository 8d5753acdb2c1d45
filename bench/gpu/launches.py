"""How many kernels one call launches, by torch's profiler."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity

# What the device records besides kernels.
_COPIES = ("Memcpy", "Memset")


def count(call: Callable[[], object], device: torch.device) -> dict[str, int] | None:
    """``{"kernels", "copies"}`` of one call, which has been warmed up; None on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    with torch.profiler.profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as p:
        call()
        torch.cuda.synchronize(device)
    record = p.profiler.kineto_results.events()  # pyright: ignore[reportOptionalMemberAccess]
    on_device = [e for e in record if e.device_type() == DeviceType.CUDA]
    names = [e.name() for e in on_device if not e.is_user_annotation()]
    copies = sum(name.startswith(_COPIES) for name in names)
    return {"kernels": len(names) - copies, "copies": copies}
