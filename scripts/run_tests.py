# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Run test files, each in the environment it belongs to (tests/support.py, needs_ansible).

    python scripts/run_tests.py --name NAME --environments "ansible 5.7" [--jobs N [--first "NAME ..."]] FILE ...
        [ARGUMENT ...]

A FILE may be a folder; what names no file goes to pytest.
ansible: .venv; 5.X: tests/output/venvs/celery-5.X, made when it is missing. With --jobs every file is a run of its own
and at most so many are done at once, as long as the processors have time to spare: test_NAME.py of --first, which take
longest, then the largest. Their output goes to tests/output/log/NAME, and is shown where a test fails.

AGAIN=1 runs only the files that failed in the last run of this name.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

TOP = Path(__file__).resolve().parent.parent
OUTPUT = TOP / "tests" / "output"
sys.path.insert(0, str(TOP / "tests"))

from support import needs_ansible

NOTHING_COLLECTED = 5
INTERRUPTED = 2


@dataclass
class Job:
    environment: str
    files: list[str]
    log: Path | None
    cache: Path
    process: subprocess.Popen[bytes] | None = None
    began: float = field(default_factory=time.monotonic)

    @property
    def title(self) -> str:
        return f"{' '.join(self.files)} in {self.environment}"

    def start(self, python: str, arguments: list[str]) -> None:
        command = [python, "-m", "pytest", *self.files, "-o", f"cache_dir={self.cache.relative_to(TOP)}", *arguments]
        with contextlib.ExitStack() as stack:
            out = None
            if self.log:
                self.log.parent.mkdir(parents=True, exist_ok=True)
                out = stack.enter_context(self.log.open("wb"))
            self.began = time.monotonic()
            # A session of its own: an interrupt reaches it once, from here.
            self.process = subprocess.Popen(
                command, cwd=TOP, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT if out else None,
                start_new_session=True,
            )  # fmt: skip

    def failed_files(self) -> list[str]:
        try:
            tests = json.loads((self.cache / "v" / "cache" / "lastfailed").read_text())
        except (OSError, ValueError):
            tests = {}
        failed = {test.partition("::")[0] for test in tests}
        return [name for name in self.files if name in failed] or self.files


class Spare:
    """Whether the processors had time to spare since the last job began, as /proc/stat tells."""

    SECONDS = 3.0  # a look back shorter than this would take a pause of a busy machine for idleness
    SHARE = 0.2

    def __init__(self) -> None:
        self.began()

    def began(self) -> None:
        self.at, self.idle, self.all = (time.monotonic(), *self.look())

    @staticmethod
    def look() -> tuple[int, int]:
        """Idle and all time so far, of all processors (proc(5): user nice system idle ...)."""
        times = [int(word) for word in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
        return times[3], sum(times)

    def __call__(self) -> bool:
        if time.monotonic() - self.at < self.SECONDS:
            return False
        before_idle, before_all = self.idle, self.all
        self.began()
        return self.idle - before_idle >= self.SHARE * (self.all - before_all)


def environment_python(environment: str) -> str:
    if environment == "ansible":
        return str(TOP / ".venv" / "bin" / "python")
    made = subprocess.run([str(TOP / "scripts" / "venv"), environment], stdout=subprocess.PIPE, text=True, check=False)
    if made.returncode:
        raise SystemExit(f"scripts/venv {environment} failed")
    return f"{made.stdout.strip()}/bin/python"


def test_files(paths: list[str]) -> list[str]:
    found = []
    for path in map(Path, paths):
        found += sorted(path.glob("**/test_*.py")) if path.is_dir() else [path]
    return [str(path) for path in found]


def end(running: list[Job]) -> None:
    for sign in (signal.SIGINT, signal.SIGTERM):
        signal.signal(sign, signal.SIG_IGN)
    # Twice, for an import or a destructor may have swallowed the first one.
    for sign, seconds in ((signal.SIGINT, 30), (signal.SIGINT, 15), (signal.SIGKILL, 5)):
        alive = [job.process for job in running if job.process and job.process.poll() is None]
        for process in alive:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, sign)
        deadline = time.monotonic() + seconds
        for process in alive:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline - time.monotonic()))


def report(job: Job, status: int) -> None:
    if job.log is None:
        return
    lines = job.log.read_text(errors="replace").splitlines()
    last = re.sub("^=+ | =+$", "", lines[-1]) if lines else ""
    print(f"{'ok    ' if status in (0, NOTHING_COLLECTED) else 'FAILED'} {job.title}: {last}", flush=True)
    if status not in (0, NOTHING_COLLECTED):
        print(*(f"  {line}" for line in lines), sep="\n", flush=True)


def run_all(waiting: list[Job], jobs: int, pythons: dict[str, str], arguments: list[str]) -> dict[str, list[Job]]:
    """The jobs by how they ended: passed, failed, empty."""
    ended: dict[str, list[Job]] = {"passed": [], "failed": [], "empty": []}
    running: list[Job] = []
    spare = Spare()
    try:
        while waiting or running:
            while waiting and len(running) < jobs and (not running or spare()):
                job = waiting.pop(0)
                job.start(pythons[job.environment], arguments)
                running.append(job)
                spare.began()
            time.sleep(0.2)
            for job in running[:]:
                status = job.process.poll() if job.process else None
                if status is not None:
                    running.remove(job)
                    report(job, status)
                    ended["passed" if status == 0 else "empty" if status == NOTHING_COLLECTED else "failed"].append(job)
                    if status == INTERRUPTED:
                        raise KeyboardInterrupt
    except KeyboardInterrupt:
        end(running)
        raise
    return ended


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", required=True)
    parser.add_argument("--environments", required=True)
    parser.add_argument("--jobs", type=int, default=0)
    parser.add_argument("--first", type=str.split, default=[])
    given, rest = parser.parse_known_args()
    paths = [item for item in rest if not item.startswith("-") and Path(item.partition("::")[0]).exists()]
    arguments = [item for item in rest if item not in paths]
    files = test_files(paths)
    environments = given.environments.split()
    os.environ["PATH"] = f"{TOP}/.venv/bin:{os.environ['PATH']}"
    logs = OUTPUT / "log" / given.name
    memory = OUTPUT / "log" / f"{given.name}.failed.json"
    failed_before: dict[str, list[str]] | None = None
    if os.environ.get("AGAIN") and memory.exists():
        failed_before = json.loads(memory.read_text()) or None

    waiting: list[Job] = []
    for environment in environments:
        mine = [name for name in files if needs_ansible(Path(name.partition("::")[0])) == (environment == "ansible")]
        if failed_before is not None:
            mine = [name for name in mine if name in failed_before.get(environment, [])]
        if not given.jobs:
            groups = [mine] if mine else []
        else:
            groups = [[name] for name in mine]
        for group in groups:
            label = environment if not given.jobs else f"{environment}-{Path(group[0]).stem}"
            log = logs / f"{label}.log" if given.jobs else None
            waiting.append(Job(environment, group, log, OUTPUT / "pytest_cache" / given.name / label))
    if given.jobs:
        last = len(given.first)
        places = {f"test_{name}": place for place, name in enumerate(given.first)}

        def turn(job: Job) -> tuple[int, int]:
            file = Path(job.files[0].partition("::")[0])
            return places.get(file.stem, last), -file.stat().st_size

        waiting.sort(key=turn)
    needed = sorted({job.environment for job in waiting})
    with ThreadPoolExecutor() as pool:
        pythons = dict(zip(needed, pool.map(environment_python, needed)))

    def terminated(*_: object) -> None:
        raise KeyboardInterrupt

    # A shell's background job ignores the interrupt, and so would every run.
    for sign in (signal.SIGINT, signal.SIGTERM):
        signal.signal(sign, terminated)
    began = time.monotonic()
    try:
        ended = run_all(waiting, given.jobs or 1, pythons, arguments)
    except KeyboardInterrupt:
        print("interrupted", flush=True)
        return INTERRUPTED
    if not ended["passed"] and not ended["failed"]:
        print(f"no test matches: {' '.join(rest)}", file=sys.stderr)
        return NOTHING_COLLECTED
    again: dict[str, list[str]] = {}
    for job in ended["failed"]:
        again.setdefault(job.environment, []).extend(job.failed_files())
    memory.parent.mkdir(parents=True, exist_ok=True)
    memory.write_text(json.dumps(again))
    if given.jobs:
        print(f"{len(ended['passed'])} runs passed, {len(ended['failed'])} failed ({time.monotonic() - began:.0f} s)")
    return 1 if ended["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
