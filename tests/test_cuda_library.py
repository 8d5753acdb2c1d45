"""The CUDA library: how it is found, loaded, built and installed, and what its errors are."""

import importlib.util
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile

import cuda_builds
import pytest
import simt
import subprocesses
import torch
from cuda_kernels import DEVICE, MARKS

from lipkernels import backends
from lipkernels.kernels.cuda import library

ROOT = pathlib.Path(__file__).resolve().parents[1]
NO_GPP = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ on PATH")
WHY = "from lipkernels import backends; print(backends.missing('cuda'))"


def compiled(tmp_path, source):
    """A shared library of C++ source."""
    file, out = tmp_path / "library.cpp", tmp_path / "library.so"
    file.write_text(source)
    subprocess.run(["g++", "-shared", "-fPIC", "-o", out, file], check=True)
    return out


def loaded(code, **environment):
    done = subprocesses.run(code, **environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


# --------------------------------------------------------------------------------------- loading
@NO_GPP
def test_another_version_of_the_interface_is_refused(tmp_path):
    own = compiled(tmp_path, 'extern "C" int lk_abi_version() { return -7; }')
    assert loaded(WHY, LIPKERNELS_CUDA_LIBRARY=str(own)) == (
        f"its library library.so has version -7 of the interface, expected {library.ABI_VERSION}:"
        " build it again (pip install)"
    )


@NO_GPP
def test_what_is_no_library_of_ours_is_refused(tmp_path):
    own = compiled(tmp_path, 'extern "C" int other() { return 1; }')
    assert "does not load: " in loaded(WHY, LIPKERNELS_CUDA_LIBRARY=str(own))
    own.write_bytes(b"no library")
    assert "its library library.so does not load: " in loaded(WHY, LIPKERNELS_CUDA_LIBRARY=str(own))
    nowhere = str(tmp_path / "nowhere.so")
    assert loaded(WHY, LIPKERNELS_CUDA_LIBRARY=nowhere) == (
        f"LIPKERNELS_CUDA_LIBRARY names no file: {nowhere}"
    )


def test_a_backend_without_its_library_is_unavailable(tmp_path):
    code = """
import torch, lipkernels
from lipkernels.kernels.cuda import library
x = torch.eye(2)
for backend in ("cuda", "auto", None):
    try:
        lipkernels.functional.polar_factor(x, backend=backend)
        print("ran")
    except lipkernels.BackendUnavailableError as error:
        print(error)
try:
    library.library()
except lipkernels.BackendUnavailableError as error:
    print(error)
print(library.is_loaded(), library.is_simt())
"""
    nowhere = str(tmp_path / "nowhere.so")
    first, *others = loaded(code, LIPKERNELS_CUDA_LIBRARY=nowhere).splitlines()
    assert first == "backend 'cuda' cannot run: cuda needs tensors on a CUDA device, got cpu"
    why = f"backend 'cuda' cannot run: LIPKERNELS_CUDA_LIBRARY names no file: {nowhere}"
    assert others == ["ran", "ran", why, "False False"]


@pytest.mark.skipif(not library.is_simt(), reason="the library is no emulation")
def test_an_emulation_takes_tensors_of_the_cpu_where_it_is_named():
    cpu, both = torch.device("cpu"), {"reference": None, "cuda": None}
    assert backends.resolve("op", both, cpu, "cuda") == "cuda"
    assert backends.resolve("op", both, cpu) == "reference"
    with pytest.raises(backends.BackendUnavailableError, match="is an emulation on the CPU here"):
        backends.resolve("op", both, torch.device("cuda", 0), "cuda")
    assert backends.resolve("op", both, torch.device("cuda", 0)) == "reference"


def test_what_a_device_lacks_makes_auto_take_another(monkeypatch):
    monkeypatch.setattr(backends, "_emulated", set())
    monkeypatch.setattr(backends, "_missing", {})
    asked = []

    def why_not(index):
        asked.append(index)
        return "no code for it" if index == 1 else None

    monkeypatch.setattr(backends, "_device_checks", {})
    backends.check_devices("cuda", why_not)
    both = {"reference": None, "cuda": None}
    assert backends.resolve("op", both, torch.device("cuda", 0)) == "cuda"
    assert backends.resolve("op", both, torch.device("cuda")) == "cuda"
    assert backends.resolve("op", both, torch.device("cuda", 1)) == "reference"
    assert asked == [0, -1, 1]
    with pytest.raises(backends.BackendUnavailableError, match="'cuda' cannot run: no code for it"):
        backends.resolve("op", both, torch.device("cuda", 1), "cuda")

    def traced(x):
        name = backends.resolve("op", both, torch.device("cuda", 1))
        return x + (1 if name == "reference" else 2)

    torch._dynamo.reset()
    compiled = torch.compile(traced, fullgraph=True, backend="eager")
    assert compiled(torch.zeros(1)).item() == 1


# ---------------------------------------------------------------------------------------- errors
@pytest.mark.skipif(not library.is_loaded(), reason="the library was not built")
def test_an_error_is_an_exception_with_its_name():
    library.check(0)
    code = 10002 if library.is_simt() else 700
    name = "simtErrorDeadlock" if library.is_simt() else "cudaErrorIllegalAddress"
    with pytest.raises(library.CudaError, match=f"^{name}: ") as caught:
        library.check(code)
    assert caught.value.code == code and isinstance(caught.value, RuntimeError)


class TestKernels:
    pytestmark = MARKS

    def test_a_declared_function_adds_the_stream_and_checks(self):
        x = torch.zeros(4, device=DEVICE)
        call = library.declared(
            "lk_sort_pairs",
            *(library.POINTER,) * 3,
            *(library.INT64,) * 2,
            library.INT,
        )
        with pytest.raises(library.CudaError) as caught:
            call(DEVICE, x.data_ptr(), x.data_ptr(), x.data_ptr(), 2, 1, 99)
        assert caught.value.code == 1
        with pytest.raises(AttributeError, match="lk_no_such_function"):
            library.declared("lk_no_such_function")(DEVICE)


# --------------------------------------------------------------------------------- with and without
NO_NVCC = pytest.mark.skipif(
    cuda_builds.why_no_nvcc() is not None, reason=str(cuda_builds.why_no_nvcc())
)
CALL = """
import torch
from lipkernels import backends
from lipkernels.kernels.cuda import library, sorting
print(backends.missing("cuda"), library.is_simt())
try:
    sorting.group_sort(torch.zeros(1, 2), 2, 1)
except library.CudaError as error:
    print(error)
print(backends.why_not("cuda", torch.device("cuda", 0)))
"""


@NO_NVCC
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_the_library_loads_without_a_gpu_and_a_call_says_what_is_missing(built_for_gpus):
    first, call, why = loaded(CALL, LIPKERNELS_CUDA_LIBRARY=str(built_for_gpus)).splitlines()
    assert first == "None False"
    assert re.match(r"cudaError(InsufficientDriver|NoDevice): ", call), call
    assert why.startswith("its library cannot run on this device: cudaError"), why


@NO_NVCC
def test_the_library_exports_its_interface_and_nothing_else(built_for_gpus):
    said = subprocess.run(
        ["nm", "-D", "--defined-only", built_for_gpus], capture_output=True, text=True, check=True
    ).stdout
    names = [line.split()[-1] for line in said.splitlines()]
    assert {"lk_abi_version", "lk_permuted_copy", "lk_sort_pairs"} <= set(names)
    assert all(name.startswith("lk_") for name in names)  # no other CUDA runtime's functions


# ----------------------------------------------------------------------------------- installation
def build_module():
    return simt.load_build()


def codes(source, *architectures):
    """What nvcc is asked for, by the PTX that it comes from."""
    found = {}
    for word in build_module().generate(architectures, source)[1::2]:
        ptx, code = re.fullmatch(r"arch=compute_(\w+),code=(\w+)", word).groups()
        found.setdefault(ptx, []).append(code)
    return found


def test_architectures():
    build = build_module()
    assert build.generate(["80", "sm_90a"], "power.cu") == [
        *("-gencode", "arch=compute_80,code=sm_80"),
        *("-gencode", "arch=compute_90,code=sm_90a"),
    ]
    with pytest.raises(build.BuildError, match=r"expected names like '80 90a.*got 'hopper'"):
        build.generate(["hopper"], "power.cu")


def test_machine_code_comes_from_as_little_ptx_as_there_can_be():
    build = build_module()
    names = build.ARCHITECTURES.split()
    late = {"90": ["sm_90a", "sm_100f", "sm_120", "compute_90"]}
    assert codes("power.cu", *names) == {"80": ["sm_80"], **late}
    # Nothing runs there, and from PTX for 80 nothing is compiled.
    assert codes("polar_cluster.cu", *names) == {
        "80": ["sm_80", "sm_120"],
        "90": ["sm_90a", "sm_100f", "compute_90"],
    }
    for source in build.WITHOUT_CLUSTERS:
        assert codes(source, *names) == {"80": ["sm_80", *late["90"][:-1], "compute_80"]}
    # Where clusters are is PTX that knows of them.
    assert codes("power.cu", "80+PTX") == {"80": ["sm_80"], "90": ["compute_90"]}
    assert codes("power.cu", "75", "121f") == {"75": ["sm_75"], "90": ["sm_121f"]}
    assert set(build.WITHOUT_CLUSTERS) <= {source.name for source in build.sources()}


def test_architectures_are_selected_by_a_variable(monkeypatch):
    build = build_module()
    monkeypatch.delenv("LIPKERNELS_CUDA_ARCHS", raising=False)
    assert build.wished() == ["80", "90a", "100f", "120+PTX"]
    monkeypatch.setenv("LIPKERNELS_CUDA_ARCHS", " 80;90a, 120 ")
    assert build.wished() == ["80", "90a", "120"]


# Writes a word to what follows -o.
COMPILER = """
echo "$@"
while [ $# -gt 1 ]; do
  if [ "$1" = -o ]; then echo built > "$2"; fi
  shift
done
"""


def script(folder, name, text):
    folder.mkdir(exist_ok=True)
    file = folder / name
    file.write_text(f"#!/bin/sh\n{text}\n")
    file.chmod(0o755)


# Says the steps that it would take for one architecture.
PLANNER = """
echo "asked $@" >> LOG
case "$*" in *--dryrun) ;; *) exit 0;; esac
cat >&2 <<'END'
#$ WORD=said "twice"
#$ ptxas() { echo "ptxas $1, $WORD, $TMPDIR" >> LOG; }; STEP
#$ echo "--image3=kind=elf,sm=100,file=x.sm_100.cubin" >> LOG
#$ rm not_there
END
"""


@pytest.mark.parametrize("step", ["ptxas -arch=sm_100 x", "ptxas -arch=sm_99 x", "false"])
def test_machine_code_of_a_family_from_other_ptx(tmp_path, step):
    log = tmp_path / "log"
    text = PLANNER.replace("STEP", step).replace("LOG", str(log))
    script(tmp_path / "bin", "nvcc", text)
    steps = [sys.executable, build_module().STEPS, str(tmp_path / "bin" / "nvcc")]

    def said(code):
        log.write_text("")
        done = subprocess.run([*steps, "-gencode", code], check=False)
        return done.returncode, log.read_text().splitlines()

    assert said("arch=compute_90,code=sm_100") == (
        0, ["asked -gencode arch=compute_90,code=sm_100"]
    )  # fmt: skip
    status, (asked, *rest) = said("arch=compute_90,code=sm_100f")
    assert status == 0 and asked == "asked -gencode arch=compute_90,code=sm_100 --dryrun"
    if step != "ptxas -arch=sm_100 x":
        assert rest == ["asked -gencode arch=compute_100f,code=sm_100f"]
        return
    ptxas, image = rest
    assert re.fullmatch(r'ptxas -arch=sm_100f, said "twice", /\S+', ptxas)
    assert image == "--image3=kind=elf,sm=100f,file=x.sm_100f.cubin"


@pytest.mark.skipif(cuda_builds.why_no_nvcc() is not None, reason=str(cuda_builds.why_no_nvcc()))
def test_a_step_that_fails_fails_the_build(tmp_path):
    build = build_module()
    source = tmp_path / "a.cu"
    source.write_text('__global__ void f() { asm("no such instruction;"); }')
    command = [sys.executable, str(build.STEPS), build.nvcc(), *build.generate(["100f"], "a.cu")]
    with pytest.raises(build.BuildError, match="Parsing error near 'instruction'"):
        build.objects([source], lambda _: command, "", tmp_path / "cache")


def test_nvcc_of_cuda_home_comes_before_that_on_the_path(tmp_path, monkeypatch):
    build = build_module()
    for name in ("home", "path"):
        script(tmp_path / name / "bin", "nvcc", "") if (tmp_path / name).mkdir() is None else None
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PATH", str(tmp_path / "path" / "bin"))
    assert build.nvcc() == str(tmp_path / "home" / "bin" / "nvcc")
    monkeypatch.delenv("CUDA_HOME")
    monkeypatch.delenv("CUDA_PATH", raising=False)
    assert build.nvcc() == str(tmp_path / "path" / "bin" / "nvcc")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(build.BuildError, match="no nvcc was found in CUDA_HOME or on PATH"):
        build.nvcc()


def test_a_source_is_compiled_again_when_something_changed(tmp_path, monkeypatch):
    build = build_module()
    script(
        tmp_path / "bin",
        "compiler",
        'echo "$@"; while [ "$1" != -o ]; do shift; done; echo x > "$2"',
    )
    command = [str(tmp_path / "bin" / "compiler"), "-O1"]
    source = tmp_path / "a.cu"
    source.write_text("one")
    cache = tmp_path / "cache"

    def objects(*more, about="1"):
        return build.objects([source], lambda _: [*command, *more], about, cache)[0]

    first = objects()
    assert first.is_file() and "-O1 -c" in pathlib.Path(f"{first}.log").read_text()
    assert objects() == first
    assert len({first, objects("-O2"), objects(about="2")}) == 3
    source.write_text('#include "a.h"\n')
    (tmp_path / "a.h").write_text("one")
    second = objects()
    (tmp_path / "other.h").write_text("of no account")
    assert objects() == second != first
    (tmp_path / "a.h").write_text("two")
    assert objects() not in (first, second)


def setup(tmp_path, *command, path=None, **environment):
    """setup.py of a copy of what it builds from, without a compiler for the CPU library."""
    copy = tmp_path / "copy"
    if not copy.exists():
        copy.mkdir()
        for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
            shutil.copy(ROOT / name, copy)
        shutil.copytree(ROOT / "csrc", copy / "csrc")
        (copy / "lipkernels").mkdir()
        (copy / "lipkernels" / "__init__.py").write_text('__version__ = "0"\n')
    env = {k: v for k, v in os.environ.items() if k not in ("CUDA_HOME", "CUDA_PATH")}
    env |= {"LIPKERNELS_CPU": "skip", **environment}
    env["PATH"] = env["PATH"] if path is None else str(path)
    done = subprocess.run(
        [sys.executable, "setup.py", *command],
        cwd=copy, env=env, capture_output=True, text=True, check=False, timeout=600,
    )  # fmt: skip
    return done, copy


needs_setuptools = pytest.mark.skipif(
    importlib.util.find_spec("setuptools") is None, reason="setuptools is not installed"
)
EMPTY = "/nonexistent"


@needs_setuptools
def test_without_nvcc_the_installation_goes_on_and_says_why(tmp_path):
    done, copy = setup(tmp_path, "build_ext", "--inplace", path=EMPTY)
    why = "lipkernels goes without its CUDA library: no nvcc was found in CUDA_HOME or on PATH"
    assert done.returncode == 0, done.stderr
    assert why in done.stdout + done.stderr
    assert (copy / "lipkernels" / "_cuda_not_built.txt").read_text() == why + "\n"
    assert not list(copy.glob("lipkernels/*.so"))
    done, _ = setup(tmp_path, "build_ext", "--inplace", path=EMPTY, LIPKERNELS_CUDA="require")
    assert done.returncode != 0 and why in done.stdout + done.stderr


@needs_setuptools
def test_a_failed_build_says_why_and_the_installation_goes_on(tmp_path):
    script(
        tmp_path / "bin",
        "nvcc",
        'case "$1" in --version) echo 1;; *) echo "no such arch"; exit 3;; esac',
    )
    done, copy = setup(tmp_path, "build_ext", "--inplace", path=tmp_path / "bin")
    assert done.returncode == 0, done.stderr
    why = (copy / "lipkernels" / "_cuda_not_built.txt").read_text()
    assert why in done.stdout + done.stderr
    assert "ended with status 3:\nno such arch" in why
    done, _ = setup(tmp_path, "build", path=tmp_path / "bin", LIPKERNELS_CUDA="require")
    assert done.returncode != 0 and "no such arch" in done.stdout + done.stderr


@needs_setuptools
def test_it_can_be_left_out_or_asked_for_in_other_words(tmp_path):
    done, copy = setup(tmp_path, "build_ext", "--inplace", path=EMPTY, LIPKERNELS_CUDA="skip")
    assert done.returncode == 0 and not (copy / "lipkernels" / "_cuda_not_built.txt").exists()
    done, _ = setup(tmp_path, "--version", LIPKERNELS_CUDA="maybe")
    assert done.returncode != 0
    assert (
        "LIPKERNELS_CUDA: expected one of ('auto', 'require', 'skip'), got 'maybe'" in done.stderr
    )


@needs_setuptools
def test_a_wheel_is_of_a_platform_and_of_no_version_of_python(tmp_path):
    script(tmp_path / "bin", "nvcc", COMPILER)
    path = f"{tmp_path / 'bin'}:/usr/bin:/bin"
    done, copy = setup(tmp_path, "bdist_wheel", path=path, LIPKERNELS_CUDA="require")
    assert done.returncode == 0, done.stderr
    (wheel,) = copy.glob("dist/*.whl")
    assert re.fullmatch(r"lipkernels-0-py3-none-(linux|macosx|win).*\.whl", wheel.name)
    with zipfile.ZipFile(wheel) as content:
        assert content.read("lipkernels/_cuda.so") == b"built\n"
        assert not any("not_built" in name for name in content.namelist())
    done, _ = setup(tmp_path, "sdist", path=path)
    assert done.returncode == 0, done.stderr
    (sdist,) = copy.glob("dist/*.tar.gz")
    with tarfile.open(sdist) as content:
        names = {pathlib.PurePath(*pathlib.PurePath(n).parts[1:]) for n in content.getnames()}
    here = {
        f.relative_to(ROOT) for f in (ROOT / "csrc").rglob("*") if f.suffix in (".h", ".cu", ".cpp")
    }
    assert here <= {pathlib.Path(n) for n in names} and pathlib.Path("csrc/cuda/build.py") in names


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_compilers_tests_of_kernels_are_skipped_with_the_reason():
    kernels = ("sampling", "sorting", "power")
    files = [f"tests/test_cuda_{name}.py" for name in (*kernels, "polar", "builds")]
    files += [f"tests/test_kernels_{name}.py" for name in kernels]
    left_out = (library.VARIABLE, "CUDA_HOME", "CUDA_PATH")
    env = {k: v for k, v in os.environ.items() if k not in left_out}
    options = ("-q", "-rs", "-k", "cuda", "-p", "no:cacheprovider")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *files],
        cwd=ROOT, env={**env, "PATH": EMPTY}, capture_output=True, text=True, check=False,
        timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    skipped = re.findall(r"^SKIPPED \[\d+\] ([^:]+):", done.stdout, re.MULTILINE)
    assert set(skipped) == set(files)
    assert "no g++ on PATH, which the SIMT shim needs" in done.stdout
    assert "no nvcc was found in CUDA_HOME or on PATH" in done.stdout
