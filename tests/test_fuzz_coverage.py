"""No public name is left out of the random calls: a new one fails here until it has its own."""

import pathlib
import re

import pytest

import lipkernels as lk
from lipkernels import certify, checkpoint, functional, metrics, nn, parametrizations

HERE = pathlib.Path(__file__).parent
SOURCES = "\n".join(
    path.read_text() for path in HERE.glob("test_fuzz_*.py") if path != pathlib.Path(__file__)
)

# Names that are no calls, and what stands for them.
NO_CALL = {
    "__version__",
    "BackendUnavailableError",
    "CheckpointError",
    "CHAIN_FORWARDS",
    "LAYER_FORWARDS",
    "LipschitzModule",  # the base class of all layers
    "ScaledAdaptativeL2NormPool2d",  # the same class as ScaledAdaptiveL2NormPool2d
    *("backends", "certify", "checkpoint", "functional", "metrics", "nn", "parametrizations"),
}


def own_names(module):
    """Of a module without ``__all__``: what it defines itself, without an underscore."""
    return [
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and getattr(value, "__module__", None) == module.__name__
    ]


PUBLIC = [
    *lk.__all__,
    *functional.__all__,
    *nn.__all__,
    *certify.__all__,
    *checkpoint.__all__,
    *own_names(metrics),
    *own_names(parametrizations),
]


@pytest.mark.parametrize("name", sorted(set(PUBLIC) - NO_CALL))
def test_every_public_name_is_called(name):
    assert re.search(rf"\b{name}\b", SOURCES), f"no random call of {name}"


def test_names_of_two_modules_are_called_in_both():
    for module in ("certify", "metrics"):
        assert f"{module}.certified_radius" in SOURCES, module


def test_public_names_are_found():
    assert len(set(PUBLIC)) > 80 and {"certified_radius", "PolarFactor", "save"} <= set(PUBLIC)
    assert set(PUBLIC) >= NO_CALL
