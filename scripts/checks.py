# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Run named steps in stages: the steps of a stage side by side, the stages one after the other.

    python scripts/checks.py lint [STEP ...]
    python scripts/checks.py test [STEP ...]
    python scripts/checks.py ci [STEP ...]      the steps of test, and hosts under load and faults

The output of a step goes to tests/output/log/STEP.log; it is shown when the step fails, and its closing lines
always where the stage asks for it. Every step has its own process group, which is ended with this script.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

TOP = Path(__file__).resolve().parent.parent
LOGS = TOP / "tests" / "output" / "log"


@dataclass(frozen=True)
class Step:
    name: str
    command: str  # run by sh in the checkout
    tail: int = 0  # closing lines of the log shown when the step succeeds
    beside: bool = False  # it times no host under load: runs as a third, and gives way


OWN_FLEET = ["tests/game_day/test_redis_tls.py"]
GAME_DAY = sorted({str(path.relative_to(TOP)) for path in TOP.glob("tests/game_day/test_*.py")} - {*OWN_FLEET})
SHELL = "^#!/(usr/)?bin/(env )?(ba)?sh$"
LINT = [
    [
        Step("ansible-lint", "ansible-lint --profile production --offline --nocolor -q"),
        Step("plugin-docs", "antsibull-docs lint-collection-docs --plugin-docs ."),
        Step("galaxy-importer", "scripts/artifact --check"),
        Step("mypy", "mypy"),
        Step("house", "python scripts/house.py"),
        Step("yamllint", "yamllint --strict ."),
        Step("ruff", "ruff check --output-format concise . && ruff format --quiet --check ."),
        Step("shellcheck", f"git grep -lIE --untracked '{SHELL}' -- ':!*.md' | xargs -r shellcheck"),
        Step("changelog", "antsibull-changelog lint"),
    ]
]
CHEAP = [LINT[0][0], Step("unit", "make -s unit", tail=6), *LINT[0][1:], Step("image", "tests/image/build.sh")]
# Again the longest first, two at a time where hosts are under load: they are timed.
CONTRACT = Step("contract", "nice -n 10 make -s contract", tail=6, beside=True)
INTEGRATION = Step("integration", "nice -n 10 make -s integration", tail=4, beside=True)
MOLECULE = Step("molecule", "nice -n 5 make -s molecule", tail=12, beside=True)
SANITY = Step("sanity", "nice -n 10 make -s sanity", tail=4, beside=True)
FLEET = Step("fleet", "make -s fleet", tail=4)
NIGHT = Step("game-day", f"make -s game-day TABLE= GAME_DAY_FILES='{' '.join(GAME_DAY)}'", tail=24)
# The part of the game day that has a fleet of its own need not wait for the rest of it.
NIGHT_TLS = Step(
    "game-day-tls",
    f"make -s game-day TABLE= GAME_DAY_NAME=game-day-tls GAME_DAY_FILES='{' '.join(OWN_FLEET)}'",
    tail=8,
)
TEST = [CHEAP, [CONTRACT, INTEGRATION, MOLECULE, SANITY]]
CI = [CHEAP, [NIGHT, FLEET, CONTRACT, INTEGRATION, NIGHT_TLS, MOLECULE, SANITY]]
PLANS = {"lint": LINT, "test": TEST, "ci": CI}


# No step takes half as long on two cores of today; one that does hangs.
LIMIT = 3900.0
# Tests that wait for something wait so many times longer than they would alone on the machine.
PATIENCE = "3"
# The second try of .ci/run is one of quiet: a step at a time.
AGAIN = bool(os.environ.get("AGAIN"))


class Stopped(Exception):
    pass


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


def stop(running: dict[str, subprocess.Popen[bytes]]) -> None:
    """Interrupt the leaders and let them clean up; then end what is left of their groups (sh's `&` ignores SIGINT)."""
    for process in running.values():
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGINT)
    end = time.monotonic() + 60  # Molecule removes its hosts
    for name, process in running.items():
        try:
            process.wait(max(0.0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            say(f"{name} ignores the interrupt; killing it")
    for sign in (signal.SIGTERM, signal.SIGKILL):
        for process in running.values():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, sign)
        time.sleep(0.5)


def run_stage(steps: list[Step], jobs: int) -> list[str]:
    """Returns the names of the failed steps."""
    waiting, failed = list(steps), list[str]()
    running: dict[str, subprocess.Popen[bytes]] = {}
    started: dict[str, float] = {}
    by_name = {step.name: step for step in steps}

    def free(step: Step) -> bool:
        if AGAIN:
            return not running
        hosts = sum(not by_name[name].beside for name in running)
        return len(running) <= jobs and (step.beside or hosts < jobs)

    try:
        while waiting or running:
            for step in [*waiting]:
                if not free(step):
                    continue
                waiting.remove(step)
                with (LOGS / f"{step.name}.log").open("wb") as log:
                    running[step.name] = subprocess.Popen(
                        ["sh", "-c", step.command], cwd=TOP, stdin=subprocess.DEVNULL,
                        stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
                    )  # fmt: skip
                started[step.name] = time.monotonic()
                say(f"start  {step.name}")
            time.sleep(0.2)
            late = {name: process for name, process in running.items() if time.monotonic() - started[name] > LIMIT}
            if late:
                say(f"{', '.join(late)}: still running after {LIMIT:.0f} s; ending it")
                stop(late)
            for name in [name for name, process in running.items() if process.poll() is not None]:
                process = running.pop(name)
                seconds = time.monotonic() - started[name]
                lines = (LOGS / f"{name}.log").read_text(errors="replace").splitlines()
                if process.returncode:
                    failed.append(name)
                    say(f"FAILED {name} (exit {process.returncode}, {seconds:.1f} s)")
                    shown = lines[-200:]
                else:
                    say(f"ok     {name} ({seconds:.1f} s)")
                    shown = lines[-by_name[name].tail :] if by_name[name].tail else []
                for line in shown:
                    print(f"         {line}", flush=True)
    except (KeyboardInterrupt, Stopped):
        for sign in (signal.SIGINT, signal.SIGTERM):
            signal.signal(sign, signal.SIG_IGN)
        stop(running)
        raise
    return failed


def main(arguments: list[str]) -> int:
    if not arguments or arguments[0] not in PLANS:
        print(__doc__, file=sys.stderr)
        return 2
    plan, wanted = PLANS[arguments[0]], arguments[1:]
    known = [step.name for stage in plan for step in stage]
    unknown = [name for name in wanted if name not in known]
    if unknown:
        print(f"no such step: {', '.join(unknown)}; the steps are: {', '.join(known)}", file=sys.stderr)
        return 2
    # `make ci ARGS="fleet"` names steps here; the make of a step must not take it for its own arguments.
    for name in ("ARGS", "MAKEFLAGS", "MFLAGS", "MAKEOVERRIDES", "MAKELEVEL"):
        os.environ.pop(name, None)
    os.environ["PATH"] = f"{TOP}/.venv/bin:{os.environ['PATH']}"
    os.environ["ANSIBLE_COLLECTIONS_PATH"] = f"{TOP}/tests/output/collections"
    os.environ["ANSIBLE_HOME"] = f"{TOP}/tests/output/ansible"
    os.environ.setdefault("PATIENCE", PATIENCE)
    LOGS.mkdir(parents=True, exist_ok=True)
    # Hundreds of playbooks: each module is packed and compiled once for all of them.
    payloads = TOP / "tests" / "output" / "payloads"
    shutil.rmtree(payloads, ignore_errors=True)
    os.environ["CELERYOPS_PAYLOADS"] = str(payloads)
    os.environ["ANSIBLE_CALLBACK_PLUGINS"] = str(TOP / "tests" / "callback_plugins")
    os.environ["ANSIBLE_CALLBACKS_ENABLED"] = "celeryops_payloads"

    def terminated(*_: object) -> None:
        raise Stopped

    signal.signal(signal.SIGTERM, terminated)
    # A shell's background job ignores the interrupt, and so would every step.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    jobs = max(1, min(2, os.cpu_count() or 1))
    begin = time.monotonic()
    failed: list[str] = []
    try:
        for stage in plan:
            steps = [step for step in stage if not wanted or step.name in wanted]
            failed += run_stage(steps, jobs)
    except (KeyboardInterrupt, Stopped):
        say("stopped; nothing is left running")
        return 130
    seconds = time.monotonic() - begin
    (LOGS / "failed").write_text(" ".join(failed))
    if failed:
        say(f"{arguments[0]}: FAILED: {', '.join(failed)} ({seconds:.0f} s; logs in tests/output/log)")
        return 1
    say(f"{arguments[0]}: all passed ({seconds:.0f} s)")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
