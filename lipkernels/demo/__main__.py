"""`python -m lipkernels.demo`: see --help."""

import json
import sys
from collections.abc import Sequence

import torch

from lipkernels.demo import options, report


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo with the options `argv` (default: the command line); returns the exit status.

    0; 1 if a certified sample broke or the reloaded model differs; 2 if a package is missing.
    A wrong option exits with status 2.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    opts = options.parse(argv)
    if opts.threads is not None:
        torch.set_num_threads(opts.threads)

    def say(line: str) -> None:
        print(line, file=sys.stderr if opts.json else sys.stdout, flush=True)

    try:
        # Imported here, so that --help works where the extra packages are missing.
        from lipkernels.demo import story

        result = story.run(opts, argv, say)
    except ModuleNotFoundError as error:
        print(f"{options.PROG}: error: {error}", file=sys.stderr)
        extra = "audit" if opts.audit else "demo"
        print(f"What it needs: pip install 'lipkernels[{extra}]'", file=sys.stderr)
        return 2
    if opts.json:
        print(json.dumps(result, indent=2))
    else:
        print(f"\n{report.format_table(result)}\n\n{report.format_checks(result)}")
    faults = result["audit"]["broken"] + result["export"]["predictions_that_differ"]
    faults += result["autoattack"]["broken"] if opts.audit else 0
    return 0 if faults == 0 else 1


if __name__ == "__main__":
    sys.exit(main())
