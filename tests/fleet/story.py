# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The example shop on a fleet of test hosts: playbooks, load, watch, ledger. For demo, benchmark and tests."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TOP = Path(__file__).resolve().parents[2]
OUTPUT = TOP / "tests" / "output"
BIN = TOP / ".venv" / "bin"
SHOP = TOP / "examples" / "shop"
LEDGER_DB = 2
# The Celery before that of the example's requirements, for an upgrade.
OLDER = "celery[redis]>=5.6,<5.7\nkombu>=5.6,<5.7\n"
# The controller shares the machine with the hosts it rolls; the hosts are what is measured.
NICE = ("nice", "-n", "10")


class StoryError(Exception):
    """A step did not behave. The message is for people; `log` has the whole output."""

    def __init__(self, message: str, log: Path | None = None) -> None:
        super().__init__(message)
        self.log = log


@dataclass
class Play:
    name: str
    rc: int
    log: Path
    began: float  # unix seconds
    ended: float
    changed: int = 0
    stats: dict[str, Any] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        return self.ended - self.began

    @property
    def text(self) -> str:
        return self.log.read_text(errors="replace")


def wheelhouse() -> Path:
    """Wheels of the example's requirements, of the older ones and of the runtime package, made once for each state."""
    stamp = hashlib.sha256((SHOP / "src" / "requirements.txt").read_bytes() + OLDER.encode())
    for path in sorted([*(TOP / "runtime").rglob("*.py"), *(TOP / "plugins/module_utils/engine").glob("*.py")]):
        stamp.update(path.read_bytes())
    place = OUTPUT / "wheelhouse"
    mark = place / ".stamp"
    if mark.exists() and mark.read_text() == stamp.hexdigest():
        return place
    # pip comes from the system's interpreter: the hosts have the same, so the wheels fit them.
    made = place.with_name(f"wheelhouse.{os.getpid()}")
    source = OUTPUT / f"runtime.{os.getpid()}"
    pip = OUTPUT / "venvs" / "wheels"
    log = OUTPUT / "log" / "wheelhouse.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    try:
        with log.open("w") as out:

            def run(*command: str | Path) -> None:
                done = subprocess.run(
                    command, stdout=out, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, check=False
                )
                if done.returncode:
                    raise StoryError("the wheelhouse was not made", log)

            if not (pip / "bin" / "pip").exists():
                run(os.environ.get("PYTHON", "/usr/bin/python3"), "-m", "venv", pip)
            quiet = ("-q", "--disable-pip-version-check")
            run(pip / "bin" / "pip", "wheel", *quiet, "-w", made, "-r", SHOP / "src" / "requirements.txt")
            run(pip / "bin" / "pip", "wheel", *quiet, "-w", made, *OLDER.split())
            # A copy: setuptools leaves build files beside the sources.
            shutil.copytree(TOP / "runtime", source / "runtime", ignore=shutil.ignore_patterns("build", "*.egg-info"))
            shutil.copytree(TOP / "plugins/module_utils/engine", source / "plugins/module_utils/engine")
            run(pip / "bin" / "pip", "wheel", *quiet, "--no-deps", "-w", made, source / "runtime")
        (made / ".stamp").write_text(stamp.hexdigest())
        shutil.rmtree(place, ignore_errors=True)
        made.rename(place)
    finally:
        shutil.rmtree(made, ignore_errors=True)
        shutil.rmtree(source, ignore_errors=True)
    return place


class Background:
    """A program of examples/shop that runs until it is told to stop and then prints JSON."""

    def __init__(self, command: list[str], environment: Mapping[str, str], log: Path, nice: bool = False) -> None:
        self.log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("w") as errors:
            self.process = subprocess.Popen(
                [*(NICE if nice else ()), *command],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=errors,
                env={**os.environ, **environment},
                start_new_session=True,
                text=True,
            )
        self.began = time.time()

    def running(self) -> bool:
        return self.process.poll() is None

    def _catches(self) -> bool:
        """Whether it has got so far that SIGTERM asks it to end."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return bool(int(status.partition("SigCgt:")[2].split()[0], 16) >> (signal.SIGTERM - 1) & 1)

    def stop(self, timeout: float = 20) -> dict[str, Any]:
        end = time.monotonic() + timeout
        while self.running() and not self._catches() and time.monotonic() < end:
            time.sleep(0.05)
        if self.running():
            self.process.send_signal(signal.SIGTERM)
        try:
            out = self.process.communicate(timeout=timeout)[0]
        except subprocess.TimeoutExpired:
            self.kill()
            raise StoryError(f"{self.process.args} does not stop", self.log) from None
        if self.process.returncode:
            raise StoryError(f"{self.process.args} ended with {self.process.returncode}", self.log)
        return dict(json.loads(out))

    def kill(self) -> None:
        if self.running():
            self.process.kill()
        self.process.wait()


class Story:
    """One fleet with the shop on it."""

    def __init__(self, name: str, hosts: str = "redis1,worker1,worker2") -> None:
        self.name = name
        self.hosts = hosts
        self.output = OUTPUT / name
        self.fleet = OUTPUT / "fleet" / name
        self.inventory = self.fleet / "inventory.yml"
        self.releases = self.output / "releases"
        self.background: list[Background] = []
        self.plays: list[Play] = []
        self.password = secrets.token_hex(8)
        self.address = ""
        self.venv = OUTPUT / "venvs" / "celery-5.7"
        self.cli: tuple[str, ...] = ()  # more words for redis-cli

    # the hosts

    def _fleet(self, *arguments: str) -> str:
        log = self.output / "fleet.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("a") as errors:
            done = subprocess.run(
                [sys.executable, str(TOP / "tests/fleet/fleet.py"), *arguments],
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors, text=True, check=False,
            )  # fmt: skip
        if done.returncode:
            raise StoryError(f"fleet.py {' '.join(arguments)} ended with {done.returncode}", log)
        return done.stdout

    def up(self) -> None:
        """Hosts from nothing, and the variables of the shop in group_vars beside the inventory."""
        self._fleet("up", self.name, "--hosts", self.hosts)
        self.address = next(
            line.split()[-1] for line in (self.fleet / "ssh_config").read_text().splitlines() if "HostName" in line
        )
        folder = self.fleet / "group_vars" / "all"
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(TOP / "examples" / "inventory" / "group_vars" / "all.yml", folder / "10-example.yml")
        secret = folder / "20-fleet.yml"
        secret.touch(mode=0o600)
        own = {
            "shop_redis_password": self.password,
            "shop_releases": str(self.releases),
            "celeryops_wheelhouse": str(OUTPUT / "wheelhouse"),
        }
        secret.write_text(json.dumps(own, indent=2) + "\n")

    def url(self, host: str, db: int) -> str:
        return f"redis://:{self.password}@{host}:6379/{db}"

    def down(self) -> None:
        self._fleet("down", self.name)

    def reboot(self, host: str) -> None:
        """The host goes down and comes up; what is on its disk stays."""
        self._fleet("reboot", self.name, host)

    def kill(self, host: str) -> None:
        """The host is gone at once, until it is booted again."""
        self._fleet("kill", self.name, host)

    def cut(self, host: str, other: str) -> None:
        """The host reaches the other no more; packets are lost without a word."""
        self._fleet("cut", self.name, host, other)

    def join(self, host: str, other: str) -> None:
        self._fleet("join", self.name, host, other)

    def mount(self, host: str, directory: str) -> None:
        """An empty file system of 64 MB, owned by root."""
        self._fleet("mount", self.name, host, directory)

    def unmount(self, host: str, directory: str) -> None:
        self._fleet("unmount", self.name, host, directory)

    def memory(self, host: str, unit: str, megabytes: int) -> None:
        """The kernel gives the processes of a unit so much more, and kills the largest beyond; 0: as before."""
        self._fleet("memory", self.name, host, unit, str(megabytes))

    def ssh(self, host: str, command: str, check: bool = True) -> str:
        done = subprocess.run(
            ["ssh", "-F", str(self.fleet / "ssh_config"), host, command],
            stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        if check and done.returncode:
            raise StoryError(f"ssh {host} {command!r} ended with {done.returncode}: {done.stderr.strip()}")
        return done.stdout.strip()

    def redis(self, *command: str, db: int = 0) -> str:
        done = subprocess.run(
            ["redis-cli", *self.cli, "-h", self.address, "-n", str(db), "--no-auth-warning", *command],
            stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=False,
            env={**os.environ, "REDISCLI_AUTH": self.password},
        )  # fmt: skip
        if done.returncode:
            raise StoryError(f"redis-cli {' '.join(command)}: {done.stderr.strip() or done.stdout.strip()}")
        return done.stdout.strip()

    # the shop

    def make_release(self, release: str, bad: str | None = None, requirements: str = "", settings: str = "") -> None:
        """`requirements` in place of the example's; `settings` are lines of Python after those of the application."""
        target = self.releases / release
        shutil.rmtree(target, ignore_errors=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        command = [
            sys.executable,
            str(SHOP / "make_release.py"),
            release,
            str(target),
            *(["--bad", bad] if bad else []),
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise StoryError(f"make_release.py {release}: {done.stderr.strip()}")
        if requirements:
            (target / "requirements.txt").write_text(requirements)
        if settings:
            with (target / "shop" / "celery.py").open("a") as source:
                source.write(f"\n{settings}\n")

    def ansible_environment(self) -> dict[str, str]:
        return {
            **os.environ,
            "ANSIBLE_COLLECTIONS_PATH": str(OUTPUT / "collections"),
            "ANSIBLE_HOME": str(OUTPUT / "ansible"),
            "ANSIBLE_HOST_KEY_CHECKING": "False",
            "ANSIBLE_PIPELINING": "True",
            "ANSIBLE_NOCOLOR": "1",
            "ANSIBLE_LOCALHOST_WARNING": "0",
            "ANSIBLE_RETRY_FILES_ENABLED": "0",
            "ANSIBLE_SHOW_CUSTOM_STATS": "1",
        }

    def play(self, playbook: str, *arguments: str, expect: bool | None = True, **variables: Any) -> Play:
        """Run a playbook of the collection, or a file. `expect`: must succeed, must fail, or (None) may do either."""
        number = len(self.plays) + 1
        log = self.output / f"{number:02d}-{Path(playbook).stem.removeprefix('celeryops.runbook.')}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        name = playbook if "/" in playbook else f"celeryops.runbook.{playbook}"
        command = [*NICE, str(BIN / "ansible-playbook"), name, "-i", str(self.inventory), *arguments]
        if variables:
            command += ["-e", json.dumps(variables)]
        began = time.time()
        with log.open("w") as out:
            process = subprocess.Popen(
                command, cwd=TOP, env=self.ansible_environment(), stdin=subprocess.DEVNULL, stdout=out,
                stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
            try:
                rc = process.wait()
            except BaseException:
                # Its forks are in its own group: let it tidy up first.
                process.send_signal(signal.SIGTERM)
                try:
                    process.wait(10)
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
                raise
        play = Play(playbook, rc, log, began, time.time())
        text = play.text
        recap = text.partition("PLAY RECAP")[2]
        play.changed = sum(int(word.partition("=")[2]) for word in recap.split() if word.startswith("changed="))
        custom = recap.partition("CUSTOM STATS:")[2].partition("RUN: ")[2]
        if custom.strip():
            play.stats = json.JSONDecoder().raw_decode(custom.strip())[0]
        self.plays.append(play)
        if expect is True and rc:
            raise StoryError(f"{playbook} failed: {failure(text)}", log)
        if expect is False and not rc:
            raise StoryError(f"{playbook} succeeded although it had to fail", log)
        return play

    def client_environment(self) -> dict[str, str]:
        return {
            "CELERY_BROKER_URL": self.url(self.address, 0),
            "CELERY_RESULT_BACKEND": self.url(self.address, 1),
            "SHOP_LEDGER_URL": self.url(self.address, LEDGER_DB),
        }

    def celery(self, code: str) -> Any:
        """The value of `answer` after this code, which has Celery's own `app` of the shop's broker."""
        whole = (
            "import json, os\nfrom celery import Celery\napp = Celery(broker=os.environ['CELERY_BROKER_URL'])\n"
            f"{code}\nprint(json.dumps(answer))"
        )
        done = subprocess.run(
            [str(self.venv / "bin" / "python"), "-c", whole],
            env=self.client_environment(), capture_output=True, text=True, check=True,
        )  # fmt: skip
        return json.loads(done.stdout)

    def start(self, program: str, *arguments: str, nice: bool = False) -> Background:
        command = [str(self.venv / "bin" / "python"), str(SHOP / f"{program}.py"), *arguments]
        started = Background(command, self.client_environment(), self.output / f"{program}.log", nice)
        self.background.append(started)
        return started

    def ledger(self, *arguments: str, strict: bool = False) -> dict[str, Any]:
        command = [str(self.venv / "bin" / "python"), str(SHOP / "ledger.py"), *arguments]
        done = subprocess.run(
            command, env={**os.environ, **self.client_environment()}, stdin=subprocess.DEVNULL, capture_output=True,
            text=True, check=False,
        )  # fmt: skip
        if done.returncode not in (0, 1) or not done.stdout or (strict and done.returncode):
            raise StoryError(f"ledger.py ended with {done.returncode}: {done.stderr.strip()[-500:]}")
        return dict(json.loads(done.stdout))

    def window(self, since: float, until: float) -> dict[str, Any]:
        return dict(self.ledger("--since", f"{since:.3f}", "--until", f"{until:.3f}"))

    def close(self) -> None:
        for one in self.background:
            one.kill()


def failure(text: str) -> str:
    """The message of the last failed task in the output of ansible-playbook."""
    lines = [line for line in text.splitlines() if line.startswith(("[ERROR]:", "fatal: ", "ERROR! "))]
    if not lines:
        return text.strip().splitlines()[-1] if text.strip() else "no output"
    # What a play says at its end, with fail or assert, tells more than the task which began it.
    last = lines[-1]
    position = last.find('"msg": "')
    return (last[position + 8 :].rpartition('"')[0] if position >= 0 else last)[:600]
