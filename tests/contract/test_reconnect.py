# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A worker outlives its broker: it stays the same process, is back soon after the broker is, and forgets no message."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import redis
from kombu.transport.redis import MultiChannelPoller

from celeryops import reconnect
from celeryops.engine import tasks
from celeryops.engine.connection import Broker, BrokerSpec
from support import TESTS, RedisServer, Worker, wait_until

TASKS = 40
RUNTIME = ("--include", "celeryops.worker", "--prefetch-multiplier", "4")


# By itself Celery would try next ten seconds after that: 1, 2, 4, 6, 8, 10, 12 s lie between its attempts.
AWAY = 33


def test_a_worker_that_holds_messages_comes_back(tmp_path: Path) -> None:
    with RedisServer("--appendonly", "yes", "--appendfsync", "always", directory=tmp_path) as server:
        with Broker(BrokerSpec.build(url=server.url())) as connection:
            for _task in range(TASKS):
                tasks.send(connection, tasks.Order("lab.late", "late", args=[0.4]))
        with Worker(server.url(), "late@lab", queues="late", arguments=RUNTIME) as worker:

            def done() -> int:
                return worker.log.read_text().count("succeeded in")

            wait_until(lambda: done() >= 2 and int(server.cli("HLEN", "unacked")) >= 6, 20, "messages are held")
            server.stop()
            time.sleep(AWAY)
            server.start()
            began, before = time.monotonic(), done()
            wait_until(lambda: done() > before + 2, 40, "tasks run again", 0.1)
            took = time.monotonic() - began
            assert worker.process and worker.process.poll() is None, "the worker is the same process"
            assert took < 8
            wait_until(lambda: server.cli("LLEN", "late") == "0", 40, "the rest")


@pytest.mark.parametrize("end", ["the broker returns", "the worker stops", "the worker is killed"])
def test_a_message_that_was_just_fetched_is_not_forgotten(tmp_path: Path, end: str) -> None:
    order = tmp_path / "kill"
    environment = {"LAB_KILL": str(order)}
    if end == "the worker is killed":
        environment |= {"STATE_DIRECTORY": str(tmp_path), "CELERYOPS_INSTANCE": "late-1"}
    with RedisServer("--appendonly", "yes", "--appendfsync", "always", directory=tmp_path) as server:

        def new() -> Worker:
            arguments = ("--include", "labfetched,celeryops.worker")
            return Worker(server.url(), "late@lab", queues="late", arguments=arguments, environment=environment)

        with new() as worker:
            assert server.process
            with Broker(BrokerSpec.build(url=server.url())) as connection:
                order.write_text(str(server.process.pid))
                task = tasks.send(connection, tasks.Order("lab.late", "late", args=[0]))
            wait_until(lambda: "Connection to broker lost" in worker.log.read_text(), 20, "Redis is killed")
            server.stop()
            if end == "the worker stops":
                worker.stop(30)
                assert f"lab.late[{task}], fetched from late when the broker went, is LOST" in worker.log.read_text()
                return
            if end == "the worker is killed":
                worker.kill()
                (kept,) = tmp_path.glob("late-1.fetched-*.json")
                assert kept.stat().st_mode & 0o777 == 0o600
            server.start()
            assert server.cli("HLEN", "unacked") == "0", "the worker has the only copy"
            with new() if end == "the worker is killed" else contextlib.nullcontext(worker) as last:
                wait_until(lambda: "succeeded in" in last.log.read_text(), 20, "the task runs")
                assert f"lab.late[{task}] was fetched when the broker went" in last.log.read_text()
                time.sleep(0.5)
                assert last.log.read_text().count("succeeded in") == 1
            assert (server.cli("HLEN", "unacked"), server.cli("LLEN", "late")) == ("0", "0")
            assert not list(tmp_path.glob("*.fetched-*"))


@pytest.mark.skipif(
    not hasattr(MultiChannelPoller, "maybe_check_brpop_health"), reason="kombu before 5.7 waits for an answer forever"
)
def test_a_message_for_a_connection_that_was_given_up_is_not_forgotten() -> None:
    """A frozen Redis does later what it was told before, also for a worker that waits no more."""
    options = {"socket_timeout": 2, "socket_connect_timeout": 1, "health_check_interval": 2, "polling_interval": 4}
    with (
        RedisServer() as server,
        Broker(BrokerSpec.build(url=server.url())) as connection,
        Worker(
            server.url(), "late@lab", queues="late", arguments=("--include", "celeryops.worker", "--without-heartbeat"),
            environment={"CELERYOPS_TRANSPORT_OPTIONS": json.dumps(options)},
        ) as worker,
        socket.create_connection(("127.0.0.1", server.port)) as producer,
    ):  # fmt: skip
        assert server.process
        worker.freeze()
        time.sleep(4.2)  # what it asked for is answered
        task = tasks.send(connection, tasks.Order("lab.late", "late", args=[0]))
        message = server.cli("RPOP", "late").encode()
        worker.thaw()
        wait_until(lambda: " flags=b " in server.cli("CLIENT", "LIST"), 10, "it asks again")
        os.kill(server.process.pid, signal.SIGSTOP)
        producer.sendall(b"*3\r\n$5\r\nLPUSH\r\n$4\r\nlate\r\n$%d\r\n%s\r\n" % (len(message), message))
        given_up = re.compile("Connection to broker lost|dropping stale connection")
        try:
            wait_until(lambda: given_up.search(worker.log.read_text()), 30, "the worker gives its connection up")
        finally:
            os.kill(server.process.pid, signal.SIGCONT)
        wait_until(lambda: f"{task}] succeeded in" in worker.log.read_text(), 20, "the task runs")
        time.sleep(0.5)
        assert worker.log.read_text().count("succeeded in") == 1
        assert (server.cli("HLEN", "unacked"), server.cli("LLEN", "late")) == ("0", "0")


CHORD = "from celery import chord; from labapp import noted; chord([noted.s(0), noted.s({})])(noted.si(0))"


def test_the_callback_of_a_chord_waits_for_the_broker(tmp_path: Path) -> None:
    """It is sent by the task that ends last, while the broker is away for longer than Celery tries."""
    with (
        RedisServer("--appendonly", "yes", "--appendfsync", "always", directory=tmp_path) as server,
        RedisServer() as notes,
        Worker(
            server.url(), "chord@lab", arguments=RUNTIME, concurrency=1,
            environment={"CELERY_RESULT_BACKEND": notes.url(1), "LABAPP_NOTES_URL": notes.url()},
        ) as worker,
    ):  # fmt: skip

        def send(seconds: float) -> None:
            environment = {**os.environ, **worker.environment}
            subprocess.run([sys.executable, "-c", CHORD.format(seconds)], cwd=TESTS, env=environment, check=True)

        def noted(what: str, count: int) -> None:
            wait_until(lambda: notes.cli("LLEN", f"lab:{what}") == str(count), 20, f"{count} {what}")

        # The process has a connection from then on; without one it would wait for its first.
        send(0)
        noted("done", 3)
        send(4)
        noted("begun", 5)
        server.stop()
        noted("done", 5)
        time.sleep(3)
        server.start()
        noted("done", 6)
        time.sleep(0.5)
        assert notes.cli("LLEN", "lab:begun") == "6", "each once"


@pytest.mark.parametrize(
    ("refuse", "allow"),
    [
        (("CONFIG", "SET", "maxmemory", "1000000"), ("CONFIG", "SET", "maxmemory", "0")),
        (("REPLICAOF", "127.0.0.1", "1"), ("REPLICAOF", "NO", "ONE")),
    ],
    ids=["out of memory", "read-only"],
)
def test_a_worker_waits_for_a_broker_that_takes_no_writes(refuse: tuple[str, ...], allow: tuple[str, ...]) -> None:
    with (
        RedisServer() as server,
        Broker(BrokerSpec.build(url=server.url())) as connection,
        Worker(server.url(), "late@lab", queues="late", arguments=RUNTIME) as worker,
    ):

        def done() -> int:
            return worker.log.read_text().count("succeeded in")

        def send() -> None:
            for _task in range(5):
                tasks.send(connection, tasks.Order("lab.late", "late", args=[0]))

        send()
        wait_until(lambda: done() == 5, 20, "it works")
        worker.freeze()
        send()
        server.cli(*refuse)
        worker.thaw()
        wait_until(lambda: "takes no writes" in worker.log.read_text(), 20, "it notices")
        time.sleep(4)
        assert worker.process and worker.process.poll() is None, "the worker is the same process"
        server.cli(*allow)
        wait_until(lambda: done() >= 10, 20, "the rest")
        time.sleep(0.5)
        assert done() == 10 and worker.process.poll() is None
        assert (server.cli("HLEN", "unacked"), server.cli("LLEN", "late")) == ("0", "0")


def test_a_worker_waits_for_a_broker_that_cannot_save(tmp_path: Path) -> None:
    with (
        RedisServer("--dbfilename", "taken", directory=tmp_path) as server,
        Broker(BrokerSpec.build(url=server.url())) as connection,
        Worker(server.url(), "late@lab", queues="late", arguments=RUNTIME) as worker,
    ):
        tasks.send(connection, tasks.Order("lab.late", "late", args=[2]))
        wait_until(lambda: "received" in worker.log.read_text(), 20, "it runs")
        (tmp_path / "taken").mkdir()  # where the snapshot would go
        server.cli("CONFIG", "SET", "save", "3600 1")
        server.cli("BGSAVE")
        wait_until(lambda: "rdb_last_bgsave_status:err" in server.cli("INFO", "persistence"), 10, "a failed snapshot")
        # As redis-py tells of a command within a pipeline, such as an acknowledgement.
        with redis.Redis.from_url(server.url()) as client, pytest.raises(redis.exceptions.ResponseError) as refused:
            client.pipeline().set("any", "1").execute()
        assert reconnect.refuses(refused.value)
        assert not reconnect.refuses(redis.exceptions.ResponseError("WRONGTYPE Operation against a key"))
        wait_until(lambda: "Cannot connect to" in worker.log.read_text(), 20, "it notices")
        time.sleep(4)
        assert worker.process and worker.process.poll() is None, "the worker is the same process"
        server.cli("CONFIG", "SET", "stop-writes-on-bgsave-error", "no")
        task = tasks.send(connection, tasks.Order("lab.late", "late", args=[0]))
        wait_until(lambda: f"{task}] succeeded in" in worker.log.read_text(), 20, "it works again")
        assert worker.process.poll() is None
