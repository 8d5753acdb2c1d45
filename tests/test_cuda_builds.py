"""nvcc builds every source for every architecture, within its budget. No GPU is needed."""

import re

import cuda_builds
import pytest
from cuda_builds import ARCHITECTURES, BUDGETS, BUILD

SOURCES = sorted(file.name for file in BUILD.sources())
REASON = cuda_builds.why_no_nvcc()
needs_nvcc = pytest.mark.skipif(REASON is not None, reason=str(REASON))
needs_disassembler = pytest.mark.skipif(
    REASON is not None or cuda_builds.disassembler() is None, reason=REASON or "no cuobjdump"
)
_SPILL = re.compile(r"\b(?:STL|LDL)\b")
_WIDE_LOAD, _WIDE_STORE = re.compile(r"\bLDG\.E\S*\.128\b"), re.compile(r"\bSTG\.E\S*\.128\b")
_MATRIX = re.compile(r"\bHMMA\.16816\.F32\b")


def _plain(architecture):
    """nvcc is asked for sm_100f, and cuobjdump calls it sm_100."""
    return architecture.rstrip("af")


@needs_nvcc
@pytest.mark.parametrize("source", SOURCES)
def test_every_kernel_is_within_its_budget(source):
    log = cuda_builds.objects()[source].with_suffix(".o.log").read_text()
    assert "warning" not in log, log
    found = cuda_builds.usages(log)
    assert {usage.architecture for usage in found} == set(ARCHITECTURES)
    for usage in found:
        budget = cuda_builds.budget_of(source, usage.name)
        assert usage.spills == 0 and usage.stack == 0, usage
        assert usage.registers <= budget.registers, usage
        assert usage.shared <= budget.shared, usage


@needs_nvcc
@pytest.mark.parametrize("budget", BUDGETS, ids=lambda b: f"{b.source}-{b.kernel}")
def test_every_budget_is_of_a_kernel(budget):
    log = cuda_builds.objects()[budget.source].with_suffix(".o.log").read_text()
    names = {usage.name for usage in cuda_builds.usages(log)}
    assert any(cuda_builds.budget_of(budget.source, name) == budget for name in names)


@needs_disassembler
@pytest.mark.parametrize("budget", BUDGETS, ids=lambda b: f"{b.source}-{b.kernel}")
def test_machine_code(budget):
    found = {
        key: code
        for key, code in cuda_builds.machine_code(budget.source).items()
        if cuda_builds.budget_of(budget.source, key[1]) == budget
    }
    wanted = {_plain(architecture) for architecture in ARCHITECTURES}
    assert {_plain(architecture) for architecture, _ in found} == wanted
    on_matrix_units = {_plain(architecture) for architecture in budget.matrix_units}
    for key, code in found.items():
        assert not _SPILL.search(code), key
        assert not budget.wide_loads or _WIDE_LOAD.search(code), key
        assert not budget.wide_stores or _WIDE_STORE.search(code), key
        assert bool(_MATRIX.search(code)) == (_plain(key[0]) in on_matrix_units), key


REPORT = """
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z4goodv' for 'sm_80'
ptxas info    : Function properties for _Z4goodv
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 18 registers, used 1 barriers
ptxas info    : Compiling entry function '_Z3badv' for 'sm_90a'
ptxas info    : Function properties for _Z3badv
    8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 8 bytes cumulative stack size, 1024 bytes smem
"""


def test_a_report_is_read():
    good, bad = cuda_builds.usages(REPORT)
    assert (good.architecture, good.registers, good.spills, good.shared) == ("sm_80", 18, 0, 0)
    assert (bad.name, bad.stack, bad.spills, bad.registers, bad.shared) == (
        "_Z3badv", 8, 16, 255, 1024,
    )  # fmt: skip
    with pytest.raises(ValueError, match="expected ptxas' report"):
        cuda_builds.usages("Compiling entry function 'x' for 'sm_80'\n")
    with pytest.raises(LookupError, match="expected a budget"):
        cuda_builds.budget_of("library.cu", "_Z5otherv")
