"""Where, with what and how a measurement was made: the head of every result file."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
from pathlib import Path
from typing import Any

import torch

_PACKAGES = ("torch", "lipkernels", "deel-torchlip", "orthogonium", "numpy", "pytest-benchmark")


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE)
        if found:
            return found[1].strip()
    return platform.processor() or platform.machine()


def device_name(device: torch.device) -> str:
    """ "AMD EPYC, 2 cores", or the GPU's name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_cpu_name()}, {os.cpu_count()} cores"


def folder_name(device: torch.device) -> str:
    """The device as the name of a folder: "cpu-AMD-EPYC-2-cores"."""
    return re.sub(r"[^A-Za-z0-9.]+", "-", f"{device.type} {device_name(device)}").strip("-")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def about(device: torch.device, command: str) -> dict[str, Any]:
    """The command, the device, threads, the load by others, versions."""
    return {
        "command": command,
        "device": str(device),
        "device_name": device_name(device),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "versions": {
            "python": platform.python_version(),
            **{package: _version(package) for package in _PACKAGES},
        },
    }
