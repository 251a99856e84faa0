# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Pauses and revoked tasks that real workers take over from the broker, with the Celery this environment holds."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from celery import Celery

from celeryops.engine import heartbeat, pauses, revokes, tasks
from celeryops.engine.connection import Broker, BrokerSpec
from celeryops.engine.control import Control
from support import TESTS, RedisServer, Worker, wait_until, workers

RUNTIME = ("--include", "celeryops.worker")


class Lab:
    """One Redis that keeps what it has over a restart, and what is seen from outside."""

    def __init__(self, server: RedisServer) -> None:
        self.server = server

    def worker(self, name: str, queues: str = "a,b", pool: str = "threads", **environment: str) -> Worker:
        return Worker(
            self.server.url(), f"{name}@lab", queues=queues, pool=pool, arguments=RUNTIME, environment=environment
        )

    def ask(self, command: str, **arguments: object) -> dict[str, object]:
        with Broker(BrokerSpec.build(url=self.server.url())) as broker, Control(broker) as control:
            return {reply.node: reply.error or reply.value for reply in control.broadcast(command, arguments).replies}

    def consumed(self) -> dict[str, list[str]]:
        return {
            node: sorted(queue["name"] for queue in queues)  # type: ignore[attr-defined]
            for node, queues in self.ask("active_queues").items()
        }

    def wait_consumed(self, **wanted: list[str]) -> None:
        expected = {f"{name}@lab": queues for name, queues in wanted.items()}
        wait_until(lambda: self.consumed() == expected, 20, f"{expected}")

    def write(self, **wanted: pauses.Pause | None) -> None:
        with Broker(BrokerSpec.build(url=self.server.url())) as broker:
            pauses.save(broker, wanted)

    def pause(self, queue: str) -> None:
        self.write(**{queue: pauses.Pause(queue, "me", "a test", time.time())})

    def resume(self, queue: str) -> None:
        self.write(**{queue: None})

    def send(self, name: str, queue: str, *args: object, task_id: str | None = None) -> str:
        with Broker(BrokerSpec.build(url=self.server.url())) as broker:
            return tasks.send(broker, tasks.Order(name, queue, args=args, task_id=task_id))

    def waiting(self, queue: str) -> int:
        return int(self.server.cli("LLEN", queue))


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    with RedisServer("--appendonly", "yes", "--appendfsync", "always", directory=tmp_path) as server:
        yield Lab(server)


def test_a_pause_holds_over_start_restart_and_reconnect(lab: Lab) -> None:
    lab.send("lab.add", "a", 1, 2)
    lab.pause("a")
    with workers(lab.worker("one"), lab.worker("two", pool="prefork")) as (one, _two):
        lab.wait_consumed(one=["b"], two=["b"])
        assert lab.ask(pauses.COMMAND) == {"one@lab": {"withheld": ["a"]}, "two@lab": {"withheld": ["a"]}}
        # The worker restarts.
        one.stop()
        one.start()
        lab.wait_consumed(one=["b"], two=["b"])
        # Redis restarts.
        lab.server.stop()
        lab.server.start()
        lab.wait_consumed(one=["b"], two=["b"])
        assert lab.waiting("a") == 1, "not a single message was taken"
        # An operator's add_consumer does not break a pause, and is not forgotten.
        lab.ask("add_consumer", queue="a")
        lab.ask("cancel_consumer", queue="b")
        lab.wait_consumed(one=[], two=[])
        lab.ask("add_consumer", queue="b")
        # Redis is away while the pause ends.
        lab.resume("a")
        lab.server.stop()
        lab.server.start()
        lab.wait_consumed(one=["a", "b"], two=["a", "b"])
        wait_until(lambda: lab.waiting("a") == 0, 10, "the message")
        # And they are still consumed after one more reconnect.
        lab.server.stop()
        lab.server.start()
        lab.wait_consumed(one=["a", "b"], two=["a", "b"])


def test_a_queue_to_consume_is_not_forgotten_when_redis_goes_before_it_begins(lab: Lab) -> None:
    with workers(lab.worker("one")) as (one,):
        lab.wait_consumed(one=["a", "b"])
        lab.ask("cancel_consumer", queue="b")
        lab.wait_consumed(one=["a"])
        # The worker is told, and Redis dies under the first thing that it does about it.
        one.signal(signal.SIGSTOP)
        with Celery(broker=lab.server.url()) as app:
            app.control.add_consumer("b")
        lab.server.cli("CLIENT", "PAUSE", "60000", "ALL")
        one.signal(signal.SIGCONT)
        time.sleep(1)
        lab.server.stop()
        lab.server.start()
        lab.wait_consumed(one=["a", "b"])


def test_live_workers_follow_when_told(lab: Lab) -> None:
    with workers(lab.worker("one"), lab.worker("other", queues="b")):
        lab.pause("a")
        assert lab.ask(pauses.APPLY) == {f"{name}@lab": {"ok": "reading the pauses again"} for name in ("one", "other")}
        lab.wait_consumed(one=["b"], other=["b"])
        lab.send("lab.add", "a", 1, 2)
        time.sleep(2)  # a read that was under way when the consumer was cancelled gives back what it gets
        assert lab.waiting("a") == 1
        lab.resume("a")
        lab.ask(pauses.APPLY)
        lab.wait_consumed(one=["a", "b"], other=["b"])
        wait_until(lambda: lab.waiting("a") == 0, 10, "the message")


def test_who_was_quieted_in_a_pause_stays_quiet(lab: Lab) -> None:
    lab.pause("a")
    with workers(lab.worker("one")):
        lab.wait_consumed(one=["b"])
        for queue in ("a", "b"):
            lab.ask("cancel_consumer", queue=queue)
        lab.resume("a")
        lab.ask(pauses.APPLY)
        time.sleep(1)
        lab.wait_consumed(one=[])


def test_a_broken_record_harms_nobody(lab: Lab) -> None:
    lab.server.cli("HSET", pauses.pauses_key(""), "a", "no json")
    with workers(lab.worker("one")):
        lab.wait_consumed(one=["b"])
    lab.server.cli("DEL", pauses.pauses_key(""))
    lab.server.cli("SET", pauses.pauses_key(""), "no hash at all")
    with workers(lab.worker("one")) as (one,):
        lab.wait_consumed(one=["a", "b"])
        assert "the paused queues could not be read; the worker runs without them" in one.log.read_text()
        lab.send("lab.add", "a", 1, 2)
        wait_until(lambda: lab.waiting("a") == 0, 10, "the message")


def test_the_parts_can_be_off(lab: Lab) -> None:
    lab.pause("a")
    with workers(lab.worker("one", CELERYOPS_DISABLE="pause,revokes")):
        lab.wait_consumed(one=["a", "b"])


def test_a_revoked_task_is_refused_after_a_restart(lab: Lab) -> None:
    with Broker(BrokerSpec.build(url=lab.server.url())) as broker:
        assert revokes.remember(broker, ["revoked-1", "revoked-2"], 60) == 2
        assert revokes.remember(broker, ["revoked-2", "short"], 1) == 1
        assert 0 < int(lab.server.cli("TTL", revokes.revokes_key(""))) <= 62
    lab.send("lab.add", "a", 1, 1, task_id="revoked-1")
    lab.send("lab.add", "a", 1, 2, task_id="wanted")
    time.sleep(1.1)
    with workers(lab.worker("one")) as (one,):
        wait_until(lambda: "wanted] succeeded" in one.log.read_text(), 10, "the task that is wanted")
        text = one.log.read_text()
        assert "Discarding revoked task: lab.add[revoked-1]" in text and "revoked-1] succeeded" not in text
        assert sorted(lab.ask("revoked")["one@lab"]) == ["revoked-1", "revoked-2"]  # type: ignore[call-overload]


def test_limits_of_tasks_hold_from_the_start(lab: Lab) -> None:
    limits = {
        "rate_limits": {"lab.add": "1/h", "lab.limited": "0"},
        "time_limits": {"lab.sleep": {"hard": 1}, "lab.limited": {"soft": 20, "hard": 30}, "lab.gone": {"soft": 1}},
    }
    with workers(lab.worker("one", pool="prefork", CELERYOPS_TASK_LIMITS=json.dumps(limits))) as (one,):
        items = ["rate_limit", "soft_time_limit", "time_limit"]
        told = str(lab.ask("registered", taskinfoitems=items)["one@lab"])
        assert "lab.add [rate_limit=1/h]" in told and "lab.sleep [time_limit=1.0]" in told
        assert "lab.limited [rate_limit=0 soft_time_limit=20.0 time_limit=30.0]" in told
        assert "limits for the task lab.gone, which this release does not have" in one.log.read_text()
        lab.send("lab.sleep", "a", 20)
        for number in range(3):
            lab.send("lab.add", "b", number, 0)
        wait_until(lambda: "Hard time limit (1.0s) exceeded for lab.sleep" in one.log.read_text(), 15, "the time limit")
        assert one.log.read_text().count("] succeeded in") == 1, "the rate limit holds"


def test_beat_leaves_a_heartbeat_until_it_hangs(lab: Lab, tmp_path: Path) -> None:
    schedule = {"often": {"task": "lab.add", "schedule": 0.5, "args": [1, 2]}}
    code = (
        "import sys, celeryops.heartbeat, labapp\n"
        f"labapp.app.conf.beat_schedule = {schedule!r}\n"
        "from celery.__main__ import main\n"
        f"sys.argv = ['celery', '-A', 'labapp', 'beat', '--schedule', {str(tmp_path / 'schedule')!r}, '--pidfile=']\n"
        "sys.exit(main())"
    )
    url = lab.server.url()

    def seen() -> dict[str, object] | None:
        with Broker(BrokerSpec.build(url=url)) as broker:
            return heartbeat.read(broker, "lab")

    environment = {**os.environ, "CELERY_BROKER_URL": url, "CELERYOPS_APP_NAME": "lab", "CELERYOPS_RELEASE": "v7"}
    with (tmp_path / "log").open("w") as log:
        beat = subprocess.Popen(
            [sys.executable, "-c", code], cwd=TESTS, env=environment, stdout=log, stderr=log, start_new_session=True
        )
    try:
        first = wait_until(lambda: (found := seen()) and found["task"] and found, 20, "the heartbeat")
        assert (first["pid"], first["release"], first["task"]) == (beat.pid, "v7", "lab.add")
        assert 0 <= float(str(first["age"])) < 15 and float(str(first["sent_ago"])) < 15
        wait_until(lambda: (seen() or {})["tick"] > first["tick"], 15, "the next tick")  # type: ignore[operator]
        beat.send_signal(signal.SIGSTOP)
        time.sleep(1)
        before = seen()
        time.sleep(8)
        after = seen()
        assert before and after and float(str(after["age"])) > float(str(before["age"])) + 1.5
    finally:
        beat.kill()
        beat.wait()
    assert "Traceback" not in (tmp_path / "log").read_text()


def test_beat_in_a_worker_has_one_heartbeat(lab: Lab, tmp_path: Path) -> None:
    schedule = {"often": {"task": "lab.add", "schedule": 0.5, "args": [1, 2]}}
    code = (
        "import sys, threading, labapp\n"
        "from celery.signals import before_task_publish\n"
        f"labapp.app.conf.beat_schedule = {schedule!r}\n"
        "@before_task_publish.connect\n"
        "def tell(**_):\n"
        "    names = [thread.name for thread in threading.enumerate()]\n"
        "    print(f'hearts={names.count(\"celeryops-heartbeat\")}', flush=True)\n"
        "from celery.__main__ import main\n"
        "sys.argv = 'celery -A labapp worker -B -c 1 --include celeryops.worker --schedule'.split()\n"
        f"sys.argv.append({str(tmp_path / 'schedule')!r})\n"
        "sys.exit(main())"
    )
    log = tmp_path / "log"
    environment = {**os.environ, "CELERY_BROKER_URL": lab.server.url(), "CELERYOPS_APP_NAME": "lab"}
    with log.open("w") as out:
        process = subprocess.Popen(
            [sys.executable, "-c", code], cwd=TESTS, env=environment, stdout=out, stderr=out, start_new_session=True
        )
    try:
        wait_until(lambda: log.read_text().count("hearts=") >= 2, 20, "two tasks of beat")
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert set(re.findall("hearts=[0-9]+", log.read_text())) == {"hearts=1"}
