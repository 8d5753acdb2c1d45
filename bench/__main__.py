"""`python -m bench`: print the tables that `make bench` measured, and draw the plots."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.report import RESULTS, TABLES, format_result

PLOTS = Path(__file__).parents[1] / "docs" / "bench"


def load(folder: Path) -> dict[str, dict[str, Any]]:
    """The result files of one device, by table."""
    files = {table: folder / f"{table}.json" for table in TABLES}
    return {table: json.loads(f.read_text()) for table, f in files.items() if f.is_file()}


def newest(results: Path) -> Path | None:
    """The device folder that was written to last."""
    written = [(f.stat().st_mtime, f.parent) for t in TABLES for f in results.glob(f"*/{t}.json")]
    return max(written)[1] if written else None


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, or 2 where there is nothing to report."""
    p = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    p.add_argument("--results", type=Path, help="a device's folder (default: the last written)")
    p.add_argument("--plots", type=Path, default=PLOTS, help="where to draw (default: docs/bench)")
    p.add_argument("--no-plots", action="store_true", help="print the tables only")
    options = p.parse_args(argv)
    folder = options.results or newest(RESULTS)
    tables = load(folder) if folder else {}
    if not tables:
        print(f"python -m bench: no results in {folder or RESULTS}: `make bench`", file=sys.stderr)
        return 2
    print("\n\n".join(format_result(result) for result in tables.values()))
    if not options.no_plots:
        from bench import plot  # the only part that needs matplotlib

        options.plots.mkdir(parents=True, exist_ok=True)
        for table, result in tables.items():
            if table in plot.PLOTS:
                file = options.plots / f"{table}.png"
                plot.PLOTS[table](file, result)
                print(f"drawn: {file}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
