"""What the tests share: scratch Redis servers, real workers in their own process group, modules run by Ansible."""

# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
OUTPUT = TESTS / "output"
COLLECTIONS = OUTPUT / "collections"
# More than 1 where the machine is shared: only how long a test waits for what it wants, never what it wants.
PATIENCE = float(os.environ.get("PATIENCE") or 1)


def needs_ansible(file: Path) -> bool:
    """Whether a test file runs in .venv, and not in the environments of Celery: it says so in its `pytestmark`."""
    text = file.read_text(encoding="utf-8")
    return re.search(r"^pytestmark = .*pytest\.mark\.ansible\b", text, re.MULTILINE) is not None


def link_collection() -> None:
    """Make the checkout importable and usable as celeryops.runbook."""
    link = COLLECTIONS / "ansible_collections" / "celeryops" / "runbook"
    if not link.exists():
        link.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            link.symlink_to(ROOT)


def celery_venv(minor: str = "5.7") -> Path:
    """The virtual environment with Celery: the one the tests run in if they run in one, else celery-MINOR."""
    if (Path(sys.prefix) / "bin" / "celery").exists():
        return Path(sys.prefix)
    path = OUTPUT / "venvs" / f"celery-{minor}"
    if not (path / "bin" / "celery").exists():
        raise RuntimeError(f"{path} is missing: run scripts/venv {minor}")
    return path


def free_port() -> int:
    """Below those that the kernel gives to connections (ip_local_port_range): none of them takes it in between."""
    while True:
        port = random.randrange(15_000, 32_768)
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            return port


def wait_until(
    condition: Callable[[], Any], timeout: float = 30.0, what: str = "condition", interval: float = 0.05
) -> Any:
    """Looks seldom after a while: most looks start a process."""
    timeout *= PATIENCE
    deadline = time.monotonic() + timeout
    pause, longest = interval, max(interval, 0.25)
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what} did not come true in {timeout} s")
        time.sleep(pause)
        pause = min(pause * 1.25, longest)


class RedisServer:
    """A redis-server of our own on a free port, nothing saved."""

    def __init__(self, *arguments: str, password: str = "", directory: Path | None = None) -> None:
        self.port = free_port()
        self.password = password
        self.arguments = arguments
        self.directory = directory or OUTPUT / "redis"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> RedisServer:
        self.directory.mkdir(parents=True, exist_ok=True)
        lines = [f"port {self.port}", "bind 127.0.0.1", 'save ""', "appendonly no", f"dir {self.directory}"]
        if self.password:
            lines.append(f'requirepass "{self.password}"')
        # The configuration comes through stdin: no secret in argv.
        self.process = subprocess.Popen(
            ["redis-server", "-", *self.arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        assert self.process.stdin
        self.process.stdin.write("\n".join([*lines, ""]).encode())
        self.process.stdin.close()
        wait_until(lambda: self.cli("PING") == "PONG", 10, "redis-server")
        return self

    def stop(self) -> None:
        if self.process and self.process.poll() is None:
            self.process.kill()
            self.process.wait()

    def __enter__(self) -> RedisServer:
        return self.start()

    def __exit__(self, *_exc: object) -> None:
        self.stop()

    def url(self, db: int = 0) -> str:
        secret = f":{self.password}@" if self.password else ""
        return f"redis://{secret}127.0.0.1:{self.port}/{db}"

    def cli(self, *command: str, db: int = 0) -> str:
        """Answer of one command through redis-cli, stripped."""
        environment = {**os.environ, "REDISCLI_AUTH": self.password} if self.password else None
        done = subprocess.run(
            ["redis-cli", "-p", str(self.port), "-n", str(db), *command],
            capture_output=True,
            text=True,
            check=False,
            env=environment,
        )
        return done.stdout.strip()

    def keys(self, db: int = 0) -> list[str]:
        return sorted(self.cli("KEYS", "*", db=db).splitlines())


class SentinelSet:
    """A primary, its replicas and Sentinels on free ports, each with a configuration of its own that it may rewrite."""

    def __init__(
        self,
        directory: Path,
        *,
        replicas: int = 1,
        sentinels: int = 3,
        down_after: int = 5000,
        password: str = "sesame",
    ) -> None:
        self.directory, self.password, self.name = directory, password, "lab"
        self.redis_ports = [free_port() for _server in range(replicas + 1)]
        self.sentinel_ports = [free_port() for _server in range(sentinels)]
        self.down_after = down_after
        self.processes: dict[int, subprocess.Popen[bytes]] = {}

    def _spawn(self, port: int, lines: list[str], *arguments: str) -> None:
        place = self.directory / str(port)
        file = place / "redis.conf"
        if not place.exists():
            place.mkdir(parents=True)
            file.write_text("\n".join([f"port {port}", "bind 127.0.0.1", f'dir "{place}"', *lines, ""]))
        self.processes[port] = subprocess.Popen(
            ["redis-server", str(file), *arguments],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip

    def start_redis(self, port: int) -> None:
        secret = [
            f'requirepass "{self.password}"',
            f'masterauth "{self.password}"',
            'save ""',
            "repl-diskless-sync-delay 0",
        ]
        source = [f"replicaof 127.0.0.1 {self.redis_ports[0]}"] if port != self.redis_ports[0] else []
        self._spawn(port, [*secret, *source, "appendonly yes"])
        wait_until(lambda: self.cli(port, "PING") == "PONG", 10, "redis-server")

    def start_sentinel(self, port: int) -> None:
        lines = [
            f"sentinel monitor {self.name} 127.0.0.1 {self.redis_ports[0]} {len(self.sentinel_ports) // 2 + 1}",
            f'sentinel auth-pass {self.name} "{self.password}"',
            f"sentinel down-after-milliseconds {self.name} {self.down_after}",
            f"sentinel failover-timeout {self.name} 20000",
        ]
        self._spawn(port, lines, "--sentinel")

    def start(self) -> SentinelSet:
        for port in self.redis_ports:
            self.start_redis(port)
        for port in self.sentinel_ports:
            self.start_sentinel(port)
        others, replicas = str(len(self.sentinel_ports) - 1), str(len(self.redis_ports) - 1)

        def known() -> bool:
            rows = [self.cli(port, "SENTINEL", "MASTER", self.name).splitlines() for port in self.sentinel_ports]
            told = [dict(zip(row[::2], row[1::2], strict=False)) for row in rows]
            return all((one.get("num-other-sentinels"), one.get("num-slaves")) == (others, replicas) for one in told)

        wait_until(known, 30, "Sentinels that know one another", 0.2)
        for port in self.redis_ports[1:]:
            wait_until(
                lambda port=port: "master_link_status:up" in self.cli(port, "INFO", "replication"), 20, "a replica"
            )
        return self

    def kill(self, port: int) -> None:
        self.processes[port].kill()
        self.processes[port].wait()

    def __enter__(self) -> SentinelSet:
        try:
            return self.start()
        except BaseException:
            self.__exit__()
            raise

    def __exit__(self, *_exc: object) -> None:
        for port in self.processes:
            self.kill(port)

    def cli(self, port: int, *command: str) -> str:
        done = subprocess.run(
            ["redis-cli", "-p", str(port), "--no-auth-warning", *command], capture_output=True, text=True, check=False,
            env={**os.environ, **({"REDISCLI_AUTH": self.password} if port in self.redis_ports else {})},
        )  # fmt: skip
        return done.stdout.strip()

    def primary(self) -> int:
        """The port that the first Sentinel which answers names."""
        for port in self.sentinel_ports:
            told = self.cli(port, "SENTINEL", "GET-MASTER-ADDR-BY-NAME", self.name).splitlines()
            if len(told) == 2:
                return int(told[1])
        raise RuntimeError("no Sentinel answers")

    def url(self, db: int = 0) -> str:
        return ";".join(f"sentinel://:{self.password}@127.0.0.1:{port}/{db}" for port in self.sentinel_ports)


class RabbitServer:
    """A RabbitMQ of our own on free ports, with an epmd of its own, all of it in a directory of ours."""

    def __init__(self, directory: Path | None = None, *, management: bool = False, config: str = "") -> None:
        self.port = free_port()
        self.directory = directory or OUTPUT / "rabbitmq" / str(self.port)
        self.management = free_port() if management else 0
        self.config = config
        self.epmd = free_port()
        self.dist = free_port()
        self.processes: list[subprocess.Popen[bytes]] = []

    @property
    def environment(self) -> dict[str, str]:
        return {
            **os.environ,
            "HOME": str(self.directory),
            "ERL_EPMD_PORT": str(self.epmd),
            "RABBITMQ_NODENAME": f"lab{self.port}@localhost",
            "RABBITMQ_NODE_IP_ADDRESS": "127.0.0.1",
            "RABBITMQ_NODE_PORT": str(self.port),
            "RABBITMQ_DIST_PORT": str(self.dist),
            "RABBITMQ_MNESIA_BASE": str(self.directory / "mnesia"),
            "RABBITMQ_LOG_BASE": str(self.directory / "log"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(self.directory / "plugins"),
            "RABBITMQ_CONFIG_FILE": str(self.directory / "rabbitmq"),
            "RABBITMQ_CONF_ENV_FILE": str(self.directory / "none"),
        }

    def start(self) -> RabbitServer:
        shutil.rmtree(self.directory, ignore_errors=True)
        self.directory.mkdir(parents=True)
        (self.directory / "plugins").write_text(f"[{'rabbitmq_management' if self.management else ''}].\n")
        web = f"management.tcp.ip = 127.0.0.1\nmanagement.tcp.port = {self.management}\n" if self.management else ""
        (self.directory / "rabbitmq.conf").write_text(web + self.config)
        self._spawn(["epmd", "-port", str(self.epmd)])
        return self.run()

    def _spawn(self, command: list[str]) -> None:
        self.processes.append(
            subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                start_new_session=True, env=self.environment, cwd=self.directory,
            )
        )  # fmt: skip

    def run(self) -> RabbitServer:
        """The broker itself, on what it has kept."""
        self._spawn(["/usr/lib/rabbitmq/bin/rabbitmq-server"])
        wait_until(self.listens, 60, "rabbitmq-server")
        return self

    def kill(self) -> None:
        """SIGKILL, as a crash would have it; what it has kept stays."""
        process = self.processes.pop()
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        wait_until(lambda: not self.listens(), 10, "the end of rabbitmq-server")

    def ctl(self, *command: str) -> str:
        """rabbitmqctl as whom the broker runs."""
        done = subprocess.run(
            ["/usr/lib/rabbitmq/bin/rabbitmqctl", *command], stdin=subprocess.DEVNULL, capture_output=True, text=True,
            env=self.environment, cwd=self.directory, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def listens(self) -> bool:
        for port in filter(None, (self.port, self.management)):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                continue
            return False
        return True

    def stop(self) -> None:
        for process in reversed(self.processes):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        self.processes.clear()
        shutil.rmtree(self.directory, ignore_errors=True)

    def __enter__(self) -> RabbitServer:
        return self.start()

    def __exit__(self, *_exc: object) -> None:
        self.stop()

    def url(self) -> str:
        return f"amqp://guest:guest@127.0.0.1:{self.port}//"

    def api(self) -> str:
        return f"http://127.0.0.1:{self.management}"


class Worker:
    """One real worker (or beat) process group. The broker URL goes through the environment."""

    def __init__(
        self,
        url: str,
        name: str,
        *,
        queues: str = "celery",
        pool: str = "prefork",
        concurrency: int = 2,
        app: str = "labapp",
        arguments: tuple[str, ...] = (),
        environment: dict[str, str] | None = None,
        venv: Path | None = None,
    ) -> None:
        self.name = name
        self.environment = {"CELERY_BROKER_URL": url, "CELERY_RESULT_BACKEND": url, **(environment or {})}
        self.command = [
            str((venv or celery_venv()) / "bin" / "celery"), "-A", app, "worker", "-n", name, "-Q", queues, "-P", pool,
            "-c", str(concurrency), "--loglevel", "INFO", "--without-gossip", "--without-mingle", *arguments,
        ]  # fmt: skip
        self.ready = " listens" if app.startswith("lab") else " ready."
        self.process: subprocess.Popen[bytes] | None = None
        self.log = OUTPUT / "logs" / f"{name}-{time.monotonic_ns()}.log"

    @property
    def pid(self) -> int:
        assert self.process
        return self.process.pid

    def spawn(self) -> Worker:
        """Start without waiting until it is ready."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                self.command,
                cwd=TESTS,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1", **self.environment},
            )
        return self

    def wait_ready(self, timeout: float = 30.0) -> Worker:
        def ready() -> bool:
            assert self.process
            if self.process.poll() is not None:
                raise RuntimeError(f"{self.name} ended with {self.process.returncode}:\n{self.log.read_text()[-3000:]}")
            return self.ready in self.log.read_text()

        wait_until(ready, timeout, f"worker {self.name}")
        return self

    def start(self) -> Worker:
        return self.spawn().wait_ready()

    def signal(self, number: int) -> None:
        """Signal the main process only."""
        os.kill(self.pid, number)

    def freeze(self) -> None:
        os.killpg(self.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        os.killpg(self.pid, signal.SIGCONT)

    def kill(self) -> None:
        """SIGKILL of the whole group."""
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)
            self.process.wait()

    def stop(self, timeout: float = 10.0) -> None:
        """Warm stop, then SIGKILL for whatever is left of the group."""
        if self.process is None:
            return
        if self.process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                self.thaw()
                self.signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(timeout)
        self.kill()

    def __enter__(self) -> Worker:
        return self.start()

    def __exit__(self, *_exc: object) -> None:
        self.stop()


class Beat(Worker):
    """A beat that answers ping (Celery 5.7 and later)."""

    def __init__(self, url: str, name: str, schedule: Path, *, app: str = "labapp", venv: Path | None = None) -> None:
        super().__init__(url, name, app=app, venv=venv)
        self.command = [
            str((venv or celery_venv()) / "bin" / "celery"), "-A", app, "beat", "--enable-remote-control",
            "--schedule", str(schedule), "--loglevel", "INFO",
        ]  # fmt: skip
        self.ready = "beat: Starting..."


class LaunchedBeat(Worker):
    """A beat with the parts of the runtime package that the launcher loads, and a schedule of its own."""

    CODE = (
        "import sys, celeryops.stamp, celeryops.heartbeat, celeryops.lead\n"
        "from celery.__main__ import main\nsys.argv = sys.argv[1:]\nsys.exit(main())"
    )

    def __init__(
        self, url: str, name: str, file: Path, schedule: dict[str, Any], *options: str, **environment: str
    ) -> None:
        own = {"CELERYOPS_APP_NAME": "lab", "LABAPP_SCHEDULE": json.dumps(schedule), "CELERYOPS_BEAT_HOST": name}
        super().__init__(url, name, environment={**own, **environment})
        self.command = [
            str(celery_venv() / "bin" / "python"), "-c", self.CODE, "celery", "-A", "labapp", "beat",
            "--schedule", str(file), "--pidfile=", "--loglevel", "INFO", *options,
        ]  # fmt: skip
        self.ready = "beat: Starting..."


@contextlib.contextmanager
def workers(*fleet: Worker) -> Iterator[tuple[Worker, ...]]:
    """Start several at once; all of them end afterwards."""
    try:
        for worker in fleet:
            worker.spawn()
        for worker in fleet:
            worker.wait_ready()
        yield fleet
    finally:
        for worker in fleet:
            if worker.process is not None and worker.process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    worker.thaw()
                    worker.signal(signal.SIGTERM)
        for worker in fleet:
            worker.stop(5.0)


def _in_celery(url: str, code: str, *arguments: Any) -> str:
    """Run code in the Celery environment with the application of the tests; arguments come as JSON."""
    done = subprocess.run(
        [str(celery_venv() / "bin" / "python"), "-c", f"import json, sys, labapp\na = json.load(sys.stdin)\n{code}"],
        cwd=TESTS,
        input=json.dumps(arguments),
        capture_output=True,
        text=True,
        check=False,
        env={
            **os.environ,
            "PYTHONDONTWRITEBYTECODE": "1",
            "CELERY_BROKER_URL": url,
            "CELERY_RESULT_BACKEND": "" if url.startswith("amqp") else url,
        },
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip()


def send_task(url: str, name: str, *args: Any, queue: str = "celery", **kwargs: Any) -> str:
    """Send one task; its id."""
    code = "print(labapp.app.send_task(a[0], args=a[1], kwargs=a[2], queue=a[3]).id)"
    return _in_celery(url, code, name, list(args), kwargs, queue)


def task_state(url: str, task_id: str) -> str:
    return _in_celery(url, "print(labapp.app.AsyncResult(a[0]).state)", task_id)


class Ansible:
    """Runs modules of this collection with the real ansible-playbook on localhost."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.output = ""

    def play(
        self,
        tasks: list[dict[str, Any]],
        *,
        check: bool = False,
        diff: bool = True,
        verbosity: int = 0,
        defaults: dict[str, Any] | None = None,
        environment: dict[str, str] | None = None,
        timeout: float = 240.0,
        expected: int | None = None,
    ) -> list[dict[str, Any]]:
        """Results of the tasks in order, failed ones too. Arguments travel in a 0600 file, never in argv.

        `expected`: how many results there are where that is not one a task, as with a role.
        """
        play = {
            "hosts": "localhost",
            "connection": "local",
            "gather_facts": False,
            "vars": {"ansible_python_interpreter": "{{ ansible_playbook_python }}"},
            "module_defaults": {"group/celeryops.runbook.celeryops": defaults or {}},
            "tasks": [{"name": f"Task {index}", "ignore_errors": True, **task} for index, task in enumerate(tasks)],
        }
        playbook = self.directory / "play.json.yml"
        results = self.directory / "results.jsonl"
        results.write_text("")
        playbook.touch(mode=0o600)
        playbook.write_text(json.dumps([play]))
        link_collection()
        beside = Path(sys.executable).parent / "ansible-playbook"
        program = beside if beside.exists() else ROOT / ".venv" / "bin" / "ansible-playbook"
        command = [str(program), "-i", "localhost,", str(playbook)]
        command += ["--check"] * check + ["--diff"] * diff + ["-" + "v" * verbosity] * bool(verbosity)
        callbacks = ["celeryops_results", os.environ.get("ANSIBLE_CALLBACKS_ENABLED")]  # the latter by `make ci`
        done = subprocess.run(
            command,
            cwd=self.directory,
            capture_output=True,
            text=True,
            check=False,
            timeout=timeout,
            env={
                **os.environ,
                "ANSIBLE_COLLECTIONS_PATH": str(COLLECTIONS),
                "ANSIBLE_CALLBACK_PLUGINS": str(TESTS / "callback_plugins"),
                "ANSIBLE_CALLBACKS_ENABLED": ",".join(filter(None, callbacks)),
                "CELERYOPS_RESULTS": str(results),
                "ANSIBLE_NOCOLOR": "1",
                "ANSIBLE_RETRY_FILES_ENABLED": "0",
                "ANSIBLE_LOCALHOST_WARNING": "0",
                **(environment or {}),
            },
        )
        self.output = done.stdout + done.stderr
        found = [json.loads(line) for line in results.read_text().splitlines()]
        expected = len(tasks) if expected is None else expected
        if len(found) != expected:
            raise RuntimeError(f"{len(found)} results, not {expected}:\n{self.output[-4000:]}")
        return found

    def module(self, name: str, arguments: dict[str, Any], **options: Any) -> dict[str, Any]:
        return self.play([{f"celeryops.runbook.{name}": arguments}], **options)[0]
