# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Run tests/benchmark/bench_*.py (all, or those named), print one table, write tests/output/bench.json.

A benchmark prints a JSON list of {name, baseline, ours, ratio, unit, conditions} on stdout and what it is doing on
stderr. It runs in the Celery 5.7 environment. Naming some keeps what an earlier run found with the others.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

TOP = Path(__file__).resolve().parent.parent
OUTPUT = TOP / "tests" / "output" / "bench.json"
FIELDS = {"name", "baseline", "ours", "ratio", "unit", "conditions"}


def run(python: str, script: Path) -> list[dict[str, Any]]:
    """Raises ValueError when it does not end well or prints something else than results."""
    process = subprocess.Popen([python, str(script)], cwd=TOP, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
    try:
        out = process.communicate()[0].decode()
    except BaseException:
        process.send_signal(signal.SIGINT)
        process.wait(60)
        raise
    if process.returncode:
        raise ValueError(f"exit {process.returncode}")
    try:
        results = json.loads(out)
    except ValueError:
        raise ValueError(f"printed no JSON list but {out[:200]!r}") from None
    for entry in results:
        if set(entry) < FIELDS:
            raise ValueError(f"a result lacks {sorted(FIELDS - set(entry))}")
    return list(results)


def number(value: Any) -> str:
    return f"{value:,.4g}" if isinstance(value, float) else "-" if value is None else f"{value:,}"


def table(results: list[dict[str, Any]]) -> str:
    rows = [("name", "baseline", "ours", "ratio", "unit")]
    rows += [(r["name"], number(r["baseline"]), number(r["ours"]), number(r["ratio"]), r["unit"]) for r in results]
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(row[i].rjust(widths[i]) for i in (1, 2, 3)), row[4]]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def main(wanted: list[str]) -> int:
    scripts = sorted((TOP / "tests" / "benchmark").glob("bench_*.py"))
    known = {path.stem.removeprefix("bench_"): path for path in scripts}
    unknown = [name for name in wanted if name not in known]
    if unknown:
        print(f"no such benchmark: {', '.join(unknown)}; there are: {', '.join(known)}", file=sys.stderr)
        return 2
    venv = subprocess.run(
        [str(TOP / "scripts" / "venv"), "5.7"], check=True, capture_output=True, text=True
    ).stdout.strip()
    results: list[dict[str, Any]] = []
    if wanted and OUTPUT.is_file():
        results = json.loads(OUTPUT.read_text())
    failed = []
    for name in wanted or known:
        print(f"{time.strftime('%H:%M:%S')} {name}", file=sys.stderr, flush=True)
        try:
            fresh = run(f"{venv}/bin/python", known[name])
        except ValueError as exc:
            print(f"{known[name].relative_to(TOP)}: {exc}", file=sys.stderr)
            failed.append(name)
            continue
        names = {entry["name"] for entry in fresh}
        results = [entry for entry in results if entry["name"] not in names] + fresh
    OUTPUT.parent.mkdir(parents=True, exist_ok=True)
    OUTPUT.write_text(json.dumps(results, indent=2) + "\n")
    print(table(results))
    print(f"written: {OUTPUT.relative_to(TOP)}")
    if failed:
        print(f"FAILED: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
