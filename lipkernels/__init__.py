"""lipkernels: Lipschitz-constrained layers for PyTorch."""

from lipkernels import backends, certify, checkpoint, functional, metrics, nn, parametrizations
from lipkernels.backends import BackendUnavailableError, use_backend
from lipkernels.export import condense, vanilla_export
from lipkernels.group import group_weights, grouped
from lipkernels.precision import get_polar_precision, polar_precision, set_polar_precision
from lipkernels.retract import Retractor

__version__ = "0.1.0"

__all__ = [
    "BackendUnavailableError",
    "Retractor",
    "__version__",
    "backends",
    "certify",
    "checkpoint",
    "condense",
    "functional",
    "get_polar_precision",
    "group_weights",
    "grouped",
    "metrics",
    "nn",
    "parametrizations",
    "polar_precision",
    "set_polar_precision",
    "use_backend",
    "vanilla_export",
]
