"""Imports run one way, and importing the package needs torch alone."""

import ast
import pathlib
import sys

import pytest
import subprocesses

import lipkernels

PACKAGE = pathlib.Path(lipkernels.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))

# What each room may import of the package. The rooms of its own are left out.
ALLOWED = {
    "reference": set(),
    "backends": set(),
    "backends/__main__": None,  # an application: it asks every room
    "precision": set(),
    "kernels": {"reference", "backends"},
    "functional": {"kernels", "backends", "precision", "reference"},
    "constraints": {"functional"},
    "certify": set(),
    "nn": {"constraints", "functional", "reference", "certify"},
    "parametrizations": {"constraints", "functional"},
    "group": {"nn"},
    "retract": {"constraints", "functional", "nn"},
    "export": {"nn"},
    "metrics": set(),
    "checkpoint": {"certify"},
    "demo": None,  # an application: anything
    "__init__": None,
}
THIRD_PARTY = {
    "demo": {"torch", "numpy", "matplotlib", "mlxtend", "pyautoattack", "sklearn", "tqdm"},
    "kernels/triton": {"triton"},  # a folder that is imported when one of its ops runs
}


def room(path):
    own = path.relative_to(PACKAGE)
    name = own.with_suffix("").as_posix()
    return name if name in ALLOWED else own.parts[0].removesuffix(".py")


def imported(path):
    """Dotted names, absolute, of everything that the file imports, wherever in it."""
    parts = ("lipkernels", *path.relative_to(PACKAGE).with_suffix("").parts)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(parts[: len(parts) - node.level]) if node.level else ""
            module = ".".join(part for part in (base, node.module or "") if part)
            # `from lipkernels import functional` imports lipkernels.functional.
            yield from (f"{module}.{alias.name}" for alias in node.names)


def test_every_room_has_a_rule():
    assert {room(path) for path in FILES} == set(ALLOWED)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_run_one_way(path):
    here = room(path)
    for name in imported(path):
        first, _, rest = name.partition(".")
        if first == "lipkernels":
            there = rest.partition(".")[0]
            if ALLOWED[here] is not None:
                assert there == here or there in ALLOWED[here], name
        else:
            folder = path.parent.relative_to(PACKAGE).as_posix()
            allowed = {"torch", *THIRD_PARTY.get(here, ()), *THIRD_PARTY.get(folder, ())}
            assert first in allowed or first in sys.stdlib_module_names, name
        assert "tests" not in name.split(".") and "bench" not in name.split("."), name


def test_kernels_in_triton_are_imported_by_themselves_alone():
    # Others name them to `lipkernels.kernels.lazy`.
    for path in FILES:
        if path.parent.name != "triton":
            assert not any("kernels.triton" in name for name in imported(path)), path


def test_certify_imports_torch_and_itself_alone():
    for path in FILES:
        if room(path) == "certify":
            for name in imported(path):
                first = name.partition(".")[0]
                assert first in ("torch", *sys.stdlib_module_names) or name.startswith(
                    "lipkernels.certify"
                ), (path, name)


def test_rooms_import_in_this_order():
    # A cycle would show as a room that is reached from itself.
    for start in ALLOWED:
        reached, todo = set(), [start]
        while todo:
            for following in ALLOWED[todo.pop()] or ():
                assert following != start
                if following not in reached:
                    reached.add(following)
                    todo.append(following)


def test_importing_needs_torch_alone():
    code = """
extras = ("matplotlib", "mlxtend", "sklearn", "tqdm", "scipy", "pandas", "hypothesis")
block(*extras)
import lipkernels
assert "triton" not in sys.modules  # Triton is imported where its kernels run
assert not set(extras) & {name.partition(".")[0] for name in sys.modules}
assert "lipkernels.demo" not in sys.modules
sys.meta_path.pop(0)  # torch asks for the specs of packages that it does not import
import torch
y = lipkernels.nn.SpectralLinear(3, 2)(torch.zeros(1, 3))
lipkernels.certify.lipschitz_bound(lipkernels.nn.SpectralLinear(3, 2))
lipkernels.vanilla_export(lipkernels.nn.GroupSort2())
assert not set(extras) & {name.partition(".")[0] for name in sys.modules}
print(lipkernels.__version__)
"""
    done = subprocesses.run(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == lipkernels.__version__


def test_importing_leaves_torch_as_it_is():
    code = """
import torch
before = (torch.get_default_dtype(), torch.get_num_threads(), torch.initial_seed(),
          torch.is_grad_enabled(), torch.are_deterministic_algorithms_enabled(),
          torch.get_float32_matmul_precision(), torch.random.get_rng_state().tolist())
import warnings
with warnings.catch_warnings():
    warnings.simplefilter("error")
    import lipkernels
after = (torch.get_default_dtype(), torch.get_num_threads(), torch.initial_seed(),
         torch.is_grad_enabled(), torch.are_deterministic_algorithms_enabled(),
         torch.get_float32_matmul_precision(), torch.random.get_rng_state().tolist())
assert before == after, (before[:-1], after[:-1])
assert not torch.cuda.is_initialized()
"""
    done = subprocesses.run(code)
    assert done.returncode == 0, done.stderr


def test_public_names():
    for name in lipkernels.__all__:
        assert hasattr(lipkernels, name), name
    assert (PACKAGE / "py.typed").exists()
