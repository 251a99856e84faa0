# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The runtime package inside real workers of the Celery this environment holds."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import celery
import pytest

from celeryops import __version__
from celeryops.engine import ledger, tasks
from celeryops.engine.connection import Broker, BrokerSpec
from celeryops.engine.control import Control, Request
from support import PATIENCE, TESTS, RedisServer, Worker, wait_until, workers

RUNTIME = ("--include", "celeryops.worker")
STOPS, STOPS_OF_ONE = 4, 150
POOLS = ("prefork", "solo", "threads", "gevent", "eventlet")


class Systemd:
    """The listening end of a notify socket: every message with the time it came in."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.messages: list[tuple[float, str]] = []
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(str(path))
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        while True:
            try:
                data = self.socket.recv(4096)
            except OSError:
                return
            self.messages.append((time.monotonic(), data.decode()))

    def environment(self, limit: float) -> dict[str, str]:
        return {"NOTIFY_SOCKET": str(self.path), "WATCHDOG_USEC": str(int(limit * 1e6))}

    def having(self, text: str) -> list[str]:
        return [message for _moment, message in self.messages if text in message]

    def pings(self, since: float = 0.0) -> int:
        return sum("WATCHDOG=1" in message for moment, message in self.messages if moment >= since)

    def pings_within(self, seconds: float) -> int:
        started = time.monotonic()
        time.sleep(seconds)
        return self.pings(started)


@pytest.fixture
def systemds(tmp_path: Path) -> Iterator[Callable[[str], Systemd]]:
    """Makes listeners by name."""
    made: list[Systemd] = []

    def make(name: str) -> Systemd:
        made.append(Systemd(tmp_path / f"notify-{name}"))
        return made[-1]

    yield make
    for listener in made:
        listener.socket.close()


def ask(url: str, command: str, **arguments: Any) -> dict[str, Any]:
    with Broker(BrokerSpec.build(url=url)) as broker, Control(broker, timeout=3 * PATIENCE) as control:
        return {reply.node: reply.error or reply.value for reply in control.broadcast(command, arguments).replies}


def send(url: str, name: str, queue: str, *args: Any, **kwargs: Any) -> str:
    with Broker(BrokerSpec.build(url=url)) as broker:
        return tasks.send(broker, tasks.Order(name, queue, args=args, kwargs=kwargs))


def canary(server: RedisServer, queue: str, **kwargs: Any) -> dict[str, Any]:
    token = uuid.uuid4().hex
    send(server.url(), tasks.CANARY_TASK, queue, token=token, **kwargs)
    key = tasks.canary_key("", token)
    answer = wait_until(lambda: server.cli("LRANGE", key, "0", "-1"), 15, f"the canary's answer from {queue}")
    assert 0 < int(server.cli("TTL", key)) <= tasks.CANARY_TTL
    server.cli("DEL", key)
    return json.loads(answer)


def test_every_part_in_every_pool(broker: RedisServer, systemds: Any) -> None:
    listeners = {pool: systemds(pool) for pool in POOLS}
    fleet = {
        pool: Worker(
            broker.url(),
            f"{pool}@lab",
            queues=f"{pool}-a,{pool}-b",
            pool=pool,
            arguments=RUNTIME,
            environment={"CELERYOPS_RELEASE": "v7", **listeners[pool].environment(4)},
        )
        for pool in POOLS
    }

    def each_pings_within(seconds: float) -> dict[str, int]:
        started = time.monotonic()
        time.sleep(seconds)
        return {pool: listeners[pool].pings(started) for pool in POOLS}

    with workers(*fleet.values()):
        expected = {"release": "v7", "celery": celery.__version__, "celeryops": __version__}
        assert ask(broker.url(), "celeryops_release") == {
            f"{pool}@lab": {**expected, "pid": worker.pid} for pool, worker in fleet.items()
        }
        for pool in POOLS:
            ready = wait_until(lambda pool=pool: listeners[pool].having("READY=1"), 5, f"READY=1 of {pool}")
            assert f"STATUS={pool}@lab, release v7, consuming {pool}-a, {pool}-b" in ready[0]
            plain = canary(broker, f"{pool}-b")
            assert plain == {**plain, "node": f"{pool}@lab", "release": "v7", "queue": f"{pool}-b", "value": None}
            assert "error" not in plain
            assert canary(broker, f"{pool}-a", run="lab.add", args=[2, 3])["value"] == 5
        assert canary(broker, "prefork-a", run="lab.fail")["error"] == "ValueError: failed on purpose"
        assert canary(broker, "prefork-a", run="lab.nope")["error"] == "task lab.nope is not registered"
        # The watchdog feeds while the loop turns or has a good reason not to: solo runs the long task inside the loop.
        for pool, worker in fleet.items():
            send(broker.url(), "lab.sleep", f"{pool}-a", 5)
            wait_until(lambda worker=worker: "lab.sleep[" in worker.log.read_text(), 10, "the long task")
        assert min(each_pings_within(4).values()) >= 2
        # It falls silent with the process.
        for worker in fleet.values():
            worker.signal(signal.SIGSTOP)
        time.sleep(0.3)
        assert set(each_pings_within(4).values()) == {0}
        for worker in fleet.values():
            worker.signal(signal.SIGCONT)
        for pool in POOLS:
            wait_until(lambda pool=pool: listeners[pool].pings_within(0.5) >= 1, 15, f"pings of {pool} after SIGCONT")
        # A remote shutdown, which no signal handler sees.
        with Broker(BrokerSpec.build(url=broker.url())) as connection, Control(connection) as control:
            control.cast([Request("shutdown")])
        for pool, worker in fleet.items():
            wait_until(lambda pool=pool: listeners[pool].having("STOPPING=1"), 15, f"STOPPING=1 of {pool}")
            assert worker.process is not None
            worker.process.wait(20)
            assert "celeryops:" not in worker.log.read_text()


def test_broker_away_and_loop_stuck(systemds: Any) -> None:
    systemd = systemds("away")
    with RedisServer() as server:
        environment = systemd.environment(4)
        arguments = ("--include", "celeryops.worker,labstuck")
        with Worker(server.url(), "away@lab", arguments=arguments, environment=environment) as worker:
            wait_until(lambda: systemd.having("consuming celery"), 20, "STATUS at the start")
            server.stop()
            wait_until(lambda: systemd.having("waiting for the broker"), 20, "STATUS without broker")
            assert systemd.pings_within(4) >= 2
            server.start()
            wait_until(
                lambda: "consuming celery" in systemd.messages[-1][1] or systemd.having("consuming celery")[1:],
                30,
                "STATUS",
            )
            wait_until(lambda: ask(server.url(), "ping").get("away@lab"), 30, "the worker's return")
            # The loop stands still, the broker is fine: silence within one limit.
            with Broker(BrokerSpec.build(url=server.url())) as connection, Control(connection, timeout=0.2) as control:
                control.broadcast("lab_hang", {"seconds": 6})
            time.sleep(0.5)
            assert systemd.pings_within(4.5) == 0
            wait_until(lambda: systemd.pings_within(1) >= 1, 15, "pings of the loop that turns again")
            # The loop stands still and the broker is frozen too: a restart could not help.
            assert server.process is not None
            with Broker(BrokerSpec.build(url=server.url())) as connection, Control(connection, timeout=0.2) as control:
                control.broadcast("lab_hang", {"seconds": 9})
            os.kill(server.process.pid, signal.SIGSTOP)
            try:
                time.sleep(3)
                assert systemd.pings_within(4.5) >= 1
            finally:
                os.kill(server.process.pid, signal.SIGCONT)
            assert worker.process is not None and worker.process.poll() is None


def test_parts_that_are_off_or_broken(broker: RedisServer, systemds: Any, tmp_path: Path) -> None:
    off, some = systemds("off"), systemds("some")
    # The canary needs the engine; this engine cannot be imported.
    (tmp_path / "labbroken.py").write_text(
        "import sys\nsys.modules['celeryops.engine.tasks'] = None\nfrom labapp import app\n"
    )
    everything = {
        "CELERYOPS_DISABLE": "notify, watchdog,release,stamp,canary,ledger,held,probe,typo",
        **off.environment(4),
    }
    two = {"CELERYOPS_DISABLE": "notify,canary,probe", "CELERYOPS_RELEASE": "v1", **some.environment(4)}
    broken = {"PYTHONPATH": str(tmp_path), "CELERYOPS_RELEASE": "v1", "CELERYOPS_DISABLE": "probe"}
    url = broker.url()
    fleet = (
        Worker(url, "off@lab", arguments=RUNTIME, environment=everything),
        Worker(url, "some@lab", arguments=RUNTIME, environment=two),
        Worker(url, "broken@lab", app="labbroken", arguments=RUNTIME, environment=broken),
    )
    with workers(*fleet):
        # A worker says that it is ready just before it listens.
        releases = wait_until(lambda: len(told := ask(url, "celeryops_release")) == 3 and told, 10, "all answer")
        assert "unknown command" in releases["off@lab"]
        assert releases["some@lab"]["release"] == releases["broken@lab"]["release"] == "v1"
        for names in ask(url, "registered").values():
            assert not [name for name in names if name.startswith("celeryops")]
        wait_until(lambda: some.pings() >= 3, 15, "pings of the part that is on")
        assert some.having("READY=1") == [] and some.having("STATUS=") == []
        assert off.messages == []
        assert "CELERYOPS_DISABLE names 'typo'" in fleet[0].log.read_text()
        assert "part 'canary' did not load" in fleet[2].log.read_text()
    assert off.messages == []


def test_ledger(broker: RedisServer) -> None:
    program = (
        "import sys, celeryops.stamp\nfrom labapp import app\n"
        "for queue in sys.argv[1:]:\n"
        "    for n in range(30): app.send_task('lab.add', (n, n), queue=queue)\n"
        "    for n in range(5): app.send_task('lab.fail', queue=queue)\n"
        "    app.send_task('lab.add', (1, 1), queue=queue, countdown=1.5)\n"
    )
    fleet = [Worker(broker.url(), f"{pool}@lab", queues=pool, pool=pool, arguments=RUNTIME) for pool in POOLS]
    with workers(*fleet):
        before = ask(broker.url(), "celeryops_ledger")
        assert {(r["begun"], r["ended"]) for r in before.values()} == {(0, 0)}
        environment = {**os.environ, "CELERY_BROKER_URL": broker.url()}
        subprocess.run([sys.executable, "-c", program, *POOLS], cwd=TESTS, check=True, env=environment)
        canary(broker, "prefork", run="lab.add", args=[2, 3])

        def told() -> dict[str, Any]:
            return ask(broker.url(), "celeryops_ledger")

        wait_until(lambda: [r["ended"] for r in told().values()] == [36] * len(POOLS), 20, "36 tasks in each pool")
        for reply in told().values():
            assert (reply["begun"], sum(reply["waits"].values())) == (36, 36), "the canary is not counted"
        found = ledger.account(before, [], told())
        assert (found.ended, found.cut_off, found.uncounted) == (36 * len(POOLS), 0, [])
        # What is counted begins with the ETA, not with the publishing 1.5 s before it. A greenlet pool that has all it
        # may take is not woken by what ends: Celery looks again two seconds later.
        looped = {name: reply for name, reply in told().items() if not name.startswith(("gevent", "eventlet"))}
        waits = ledger.account(before, [], looped)
        assert waits.wait_p50_ms is not None and waits.wait_worst_ms is not None
        assert 1 <= waits.wait_p50_ms <= waits.wait_worst_ms < 1500
        # A pool process that dies takes its task with it; the counters stay, and its successor counts on.
        send(broker.url(), "lab.sleep", "prefork", 60)
        running = wait_until(lambda: ask(broker.url(), "active")["prefork@lab"], 10, "the long task")
        os.kill(running[0]["worker_pid"], signal.SIGKILL)
        wait_until(lambda: not ask(broker.url(), "active")["prefork@lab"], 20, "its end")
        for n in range(4):
            send(broker.url(), "lab.add", "prefork", n, n)
        wait_until(lambda: told()["prefork@lab"]["ended"] == 40, 20, "four more tasks")
        last = told()
        assert ledger.account(before, [{"prefork@lab": last.pop("prefork@lab")}], last).cut_off == 1


def test_stop_of_a_worker_that_is_behind(broker: RedisServer) -> None:
    """Its pool processes have taken tasks and done them, and it has not heard of it when it is told to stop."""
    names = ("lab.noted", "lab.noted_early")
    with Broker(BrokerSpec.build(url=broker.url())) as connection:
        sent = [
            tasks.send(connection, tasks.Order(names[number % 2], "behind", priority=number % 4))
            for number in range(5000)
        ]
    slowest = 0.0
    for _stop in range(STOPS):
        worker = Worker(
            broker.url(), "behind@lab", queues="behind", concurrency=4, environment={"LABAPP_NOTES_URL": broker.url(1)},
            arguments=(*RUNTIME, "--prefetch-multiplier", "4"),
        )  # fmt: skip
        with worker:
            enough = int(broker.cli("LLEN", "lab:begun", db=1)) + STOPS_OF_ONE
            wait_until(lambda enough=enough: int(broker.cli("LLEN", "lab:begun", db=1)) >= enough, 20, "tasks run")
            worker.signal(signal.SIGSTOP)
            time.sleep(0.3)
            worker.signal(signal.SIGINT)
            worker.signal(signal.SIGCONT)
            told = time.monotonic()
            assert worker.process
            worker.process.wait(60)
            slowest = max(slowest, time.monotonic() - told)
    waiting = int(broker.cli("EVAL", "local n = 0 for _, k in ipairs(redis.call('KEYS', 'behind*')) do "
                             "n = n + redis.call('LLEN', k) end return n", "0"))  # fmt: skip
    assert broker.cli("HLEN", "unacked") == "0"
    done = broker.cli("LRANGE", "lab:done", "0", "-1", db=1).split()
    twice = {task for task in done if done.count(task) > 1}
    assert (len(done), twice) == (len(sent) - waiting, set())
    assert slowest < 15, "the pool processes waited for their results to be read"


def test_stamp(broker: RedisServer) -> None:
    program = (
        "import sys, celeryops.stamp\nfrom labapp import app\n"
        "app.send_task('lab.retry', task_id='once', queue='stamped', retry=False)\n"
    )

    def header(disable: str = "") -> Any:
        environment = {**os.environ, "CELERY_BROKER_URL": broker.url(), "CELERYOPS_DISABLE": disable}
        environment.pop("CELERY_RESULT_BACKEND", None)
        subprocess.run([sys.executable, "-c", program], cwd=TESTS, check=True, env=environment)
        return json.loads(broker.cli("LINDEX", "stamped", "0"))["headers"].get("celeryops_published")

    before = time.time()
    assert before <= header() <= time.time()
    assert header("stamp") is None
    # A retry is a new publish and gets a new stamp, from the worker.
    broker.cli("DEL", "stamped")
    first = header()
    arguments = ("--include", "celeryops.worker,labstuck")
    with Worker(broker.url(), "stamp@lab", queues="stamped", arguments=arguments) as worker:
        wait_until(lambda: worker.log.read_text().count("published ") == 2, 20, "the retry")
        stamps = [
            float(line.split("published ")[1].split()[0])
            for line in worker.log.read_text().splitlines()
            if "published " in line
        ]
    assert stamps[0] == first and stamps[1] > first


def describe(*arguments: str, cwd: Path = TESTS, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "celeryops.describe", *arguments],
        cwd=cwd, capture_output=True, text=True, check=False, env={**os.environ, **environment},
    )  # fmt: skip


SHOP = """
import os, subprocess
print("printed while imported")
subprocess.run(["echo", "printed by a child"])
from celery import Celery
app = Celery("described", include=["described_late"])
app.conf.update(
    task_routes={"described.late": {"queue": "slow"}},
    beat_schedule={
        "a": {"task": "described.late", "schedule": 5.0},
        "b": {"task": "x", "schedule": 5.0, "options": {"queue": "own"}},
        "c": {"task": "y", "schedule": 5.0},
    },
    broker_transport_options={"visibility_timeout": 77},
)
"""


def test_describe(tmp_path: Path) -> None:
    (tmp_path / "described.py").write_text(SHOP)
    (tmp_path / "described_late.py").write_text(
        "from celery import shared_task\n@shared_task(name='described.late', acks_late=True)\ndef late(): ...\n"
    )
    done = describe("-A", "described:app", cwd=tmp_path, CELERYOPS_RELEASE="v3")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert "printed while imported" in done.stderr and "printed by a child" in done.stderr
    assert {"described.late", "celeryops.canary"} <= set(found["tasks"])
    assert found["schedule"] == {
        "a": {"task": "described.late", "queue": "slow"},
        "b": {"task": "x", "queue": "own"},
        "c": {"task": "y", "queue": "celery"},
    }
    assert (found["release"], found["celery"], found["visibility_timeout"]) == ("v3", celery.__version__, 77)
    assert found["acks_late"] is False and found["acks_late_tasks"] == ["described.late"]
    assert found["queues"] == ["celery", "own", "slow"]
    told = found["settings"]
    assert {"task_routes", "beat_schedule", "broker_transport_options"} <= set(told["names"])
    assert "task_serializer" not in told["names"] and told["values"]["task_serializer"] == "application/json"
    assert told["values"]["transport_options"] == ["visibility_timeout"]


NAMED = """
class Settings:
    TASK_SERIALIZER = "of something else"
    CELERY_TASK_ACKS_LATE = True
    CELERY_ACCEPT_CONTENT = {"pickle", "json"}
    CELERY_BROKER_URL = "redis://:hidden@h/0"

from celery import Celery
app = Celery("named")
app.config_from_object(Settings, namespace="CELERY")
app.conf.worker_direct = True
"""


def test_describe_tells_settings_without_their_namespace_and_no_secret(tmp_path: Path) -> None:
    (tmp_path / "named.py").write_text(NAMED)
    done = describe("-A", "named:app", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)["settings"]
    assert {"task_acks_late", "accept_content", "broker_url", "worker_direct"} <= set(told["names"])
    assert "task_serializer" not in told["names"] and told["values"]["accept_content"] == [
        "application/json",
        "application/x-python-serialize",
    ]
    assert "hidden" not in done.stdout


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("import nothing_of_that_name", "No module named 'nothing_of_that_name'"),
        ("raise SystemExit('no settings')", "SystemExit: no settings"),
        ("from celery import Celery\napp = Celery(include=['gone_missing'])", "No module named 'gone_missing'"),
    ],
)
def test_describe_says_why_not(tmp_path: Path, source: str, reason: str) -> None:
    (tmp_path / "unfit.py").write_text(source)
    done = describe("-A", "unfit:app", cwd=tmp_path)
    assert done.returncode == 1 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1 and done.stderr.startswith(
        "celeryops.describe: unfit:app does not import:"
    )
    assert reason in done.stderr
