"""Which backends can run an op on a device, and why the others cannot."""

from __future__ import annotations

import torch

from lipkernels import backends
from lipkernels.kernels.implemented import IMPLEMENTED

REFERENCE = "reference"


def of(op: str, device: torch.device) -> tuple[list[str], dict[str, str]]:
    """``(backends that can run op, {backend: why it cannot})``, the reference last."""
    able, reasons = [], {}
    for name in backends.BACKENDS[::-1]:
        try:
            able.append(backends.resolve(op, IMPLEMENTED[op], device, name))
        except backends.BackendUnavailableError as error:
            reasons[name] = str(error)
    return able, reasons
