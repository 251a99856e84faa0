# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A worker outlives its broker: it stays the same process, is back soon after the broker is, and forgets no message."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from celeryops.engine import tasks
from celeryops.engine.connection import Broker, BrokerSpec
from support import RedisServer, Worker, wait_until

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


@pytest.mark.parametrize("returns", [True, False], ids=["the broker returns", "the worker ends first"])
def test_a_message_that_was_just_fetched_is_not_forgotten(tmp_path: Path, returns: bool) -> None:
    order = tmp_path / "kill"
    arguments = ("--include", "labfetched,celeryops.worker")
    with (
        RedisServer("--appendonly", "yes", "--appendfsync", "always", directory=tmp_path) as server,
        Worker(
            server.url(), "late@lab", queues="late", arguments=arguments, environment={"LAB_KILL": str(order)}
        ) as worker,
    ):
        assert server.process
        with Broker(BrokerSpec.build(url=server.url())) as connection:
            order.write_text(str(server.process.pid))
            task = tasks.send(connection, tasks.Order("lab.late", "late", args=[0]))
        wait_until(lambda: "Connection to broker lost" in worker.log.read_text(), 20, "Redis is killed")
        server.stop()
        if not returns:
            worker.stop(30)
            assert f"LOST: lab.late[{task}] of queue late" in worker.log.read_text()
            return
        server.start()
        assert server.cli("HLEN", "unacked") == "0", "the worker has the only copy"
        wait_until(lambda: "succeeded in" in worker.log.read_text(), 20, "the task runs")
        assert f"lab.late[{task}] was fetched when the broker went" in worker.log.read_text()
        time.sleep(0.5)
        assert worker.log.read_text().count("succeeded in") == 1
        assert (server.cli("HLEN", "unacked"), server.cli("LLEN", "late")) == ("0", "0")
