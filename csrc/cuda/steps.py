"""nvcc, with machine code for families from any PTX: ``python steps.py nvcc OPTION ...``.

ptxas makes code for a family (sm_100f) from PTX for every architecture before it, as it does for
others; nvcc refuses to ask it. So nvcc is asked for sm_100 and says what it would do (--dryrun),
and that is done with the name that was meant. Where nvcc says something else than is expected here,
it gets its own way: PTX for each family.
"""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence

_FAMILY = re.compile(r"(arch=compute_\d+,code=sm_(\d+))f")
_SETTING = re.compile(r"(\w+)=(.*)")


def planned(command: Sequence[str], folder: str) -> tuple[str, dict[str, str]] | None:
    """nvcc's steps as a shell's script, and their environment; None where nvcc is to do it itself.

    ``folder``: for the files between the steps.
    """
    families = [match for word in command if (match := _FAMILY.fullmatch(word))]
    if not families:
        return None
    asked = [_FAMILY.sub(r"\1", word) for word in command]
    environment = {**os.environ, "TMPDIR": folder}
    said = subprocess.run(
        [*asked, "--dryrun"], env=environment, capture_output=True, text=True, check=False
    ).stderr
    lines = [line[3:] for line in said.splitlines() if line.startswith("#$ ")]
    settings = list(itertools.takewhile(_SETTING.fullmatch, lines))
    environment.update(line.split("=", 1) for line in settings)
    # What nvcc would remove is in the folder.
    script = "\n".join(line for line in lines[len(settings) :] if not line.startswith("rm "))
    for _, number in (match.groups() for match in families):
        script = re.sub(rf"\bsm([_=]){number}\b", rf"sm\g<1>{number}f", script)
        if not (f"ptxas -arch=sm_{number}f " in script and f",sm={number}f," in script):
            return None
    return script, environment


def main(command: Sequence[str]) -> int:
    """The exit status of nvcc, or of the step that failed."""
    with tempfile.TemporaryDirectory() as folder:
        plan = planned(command, folder)
        if plan is not None:
            script, environment = plan
            return subprocess.run(["sh", "-e", "-c", script], env=environment).returncode
    own = [_FAMILY.sub(r"arch=compute_\2f,code=sm_\2f", word) for word in command]
    return subprocess.run(own).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
