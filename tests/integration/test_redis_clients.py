# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Connections of a real Redis: told apart, closed where nobody uses them; a real worker never notices."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from ansible_collections.celeryops.runbook.plugins.module_utils.engine import clients
from ansible_collections.celeryops.runbook.plugins.module_utils.engine.connection import Broker, BrokerSpec
from ansible_collections.celeryops.runbook.plugins.module_utils.engine.queues import RedisQueues
from support import RedisServer, Worker, send_task, task_state, wait_until


@pytest.fixture
def redis(broker: RedisServer) -> Iterator[Any]:
    with Broker(BrokerSpec.build(url=broker.url())) as opened:
        yield opened.redis


def row(number: int, **values: Any) -> dict[str, Any]:
    plain = {
        "id": number,
        "addr": f"10.0.0.{number}:5000",
        "age": 900,
        "idle": 800,
        "flags": "N",
        "cmd": "get",
        "multi": -1,
    }
    return plain | values


def test_roles() -> None:
    found = clients.parse(
        [
            row(1, cmd="brpop", flags="b", addr="10.0.0.9:1"),
            row(2, cmd="psubscribe", psub=2, flags="P", addr="10.0.0.9:2"),
            row(3, cmd="psubscribe", psub=1, flags="P"),
            row(4, cmd="lpush"),
            row(5, cmd="info"),
            row(6, cmd="NULL"),
            row(7, cmd="client|list"),
            row(8, cmd="replconf", flags="S"),
            row(10, cmd="evalsha", addr="10.0.0.9:3"),
            row(11, cmd="get", name="redis_exporter"),
            row(12, cmd="exec", multi=3, flags="x"),
        ],
        mine=7,
    )
    roles = {client.id: client.role for client in found}
    assert roles == {
        1: "worker", 2: "worker", 3: "subscriber", 4: "producer", 5: "exporter", 6: "unused", 7: "operator",
        8: "replication", 10: "worker", 11: "exporter", 12: "producer",
    }  # fmt: skip
    assert [client.id for client in clients.closable(found, 800, mine=7)] == [4, 5, 6, 10, 11]
    assert clients.closable(found, 801) == []
    assert [client.id for client in clients.closable(found, 1, roles=["producer"], hosts=["10.0.0.4"])] == [4]


def test_idle_ones_go_and_a_worker_keeps_its_own(redis: Any, broker: RedisServer) -> None:
    with Worker(broker.url(), "w1@lab") as worker:
        leaked = []
        for _number in range(300):
            one = socket.create_connection(("127.0.0.1", broker.port))
            one.sendall(b"PING\r\n")
            leaked.append(one)
        pops = {one.id for one in clients.listed(redis) if one.kept}
        assert len(pops) >= 2
        assert clients.close(redis, 2, dry=True)[1] == []
        time.sleep(2.5)
        found, dry = clients.close(redis, 2, roles=["unused"], dry=True)
        assert 300 <= len(dry) < len(found) and len(clients.listed(redis)) >= 300
        _found, closed = clients.close(redis, 2)
        assert len(closed) >= 300
        after = {one.id for one in clients.listed(redis)}
        assert pops <= after and len(after) < 30
        assert leaked[0].recv(100) == b"+PONG\r\n" and leaked[0].recv(100) == b""
        task = send_task(broker.url(), "lab.add", 1, 2)
        wait_until(lambda: task_state(broker.url(), task) == "SUCCESS", 10, "the task")
        assert "onnection" not in worker.log.read_text().partition("ready.")[2]
        for one in leaked:
            one.close()


def test_what_is_used_again_meanwhile_stays(redis: Any, broker: RedisServer) -> None:
    one = socket.create_connection(("127.0.0.1", broker.port))
    one.sendall(b"PING\r\n")
    time.sleep(1.5)
    stop = threading.Event()

    def use() -> None:
        while not stop.wait(0.05):
            one.sendall(b"PING\r\n")

    used = threading.Thread(target=use)
    found = clients.listed(redis)
    used.start()
    time.sleep(0.2)
    try:
        before = [client for client in found if client.idle >= 1]
        assert before
        assert clients.close(redis, 1)[1] == []
    finally:
        stop.set()
        used.join()
        one.close()


def test_abandoned_replies_go_and_fresh_ones_stay(redis: Any) -> None:
    queues = RedisQueues(redis)
    for number in range(1200):
        redis.lpush(f"{number}.reply.celery.pidbox", "x")
    redis.lpush("orders", "x")
    assert queues.sweep_replies(1) == 0
    time.sleep(3.1)
    redis.lpush("fresh.reply.celery.pidbox", "x")
    assert queues.reply_keys(1)["count"] == 1200
    assert queues.sweep_replies(1) == 1200
    assert sorted(redis.keys("*")) == [b"fresh.reply.celery.pidbox", b"orders"]
