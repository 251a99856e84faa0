"""Workers whose tasks fail for good, and what they left, for the tests of dead letters."""

# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import json
from typing import Any

import redis

from celeryops.engine.connection import Broker, BrokerSpec
from celeryops.engine.control import Control
from celeryops.engine.deadletters import COMMAND
from support import RabbitServer, RedisServer, Worker

RUNTIME = ("--include", "celeryops.worker")
# A task for each reason to fail for good, and tasks that leave no dead letter.
CAUSES: dict[str, tuple[str, dict[str, Any]]] = {
    "exception": ("dead.fail", {"kwargs": {"retries": True}, "priority": 6}),
    "time_limit": ("dead.hang", {}),
    "worker_lost": ("dead.lost", {}),
    "unknown_task": ("dead.nobody_knows", {"args": [1], "expires": 3600}),
    "rejected": ("dead.reject", {}),
}
HARMLESS: list[tuple[str, dict[str, Any]]] = [("dead.ignore", {}), ("dead.back", {}), ("lab.add", {"args": [1, 2]})]


def worker(
    server: RedisServer | RabbitServer, pool: str = "prefork", *, queues: str = "work", **environment: str
) -> Worker:
    if isinstance(server, RabbitServer):
        environment["CELERY_RESULT_BACKEND"] = ""
    return Worker(server.url(), f"{pool}@dead", pool=pool, app="labdead", queues=queues, arguments=RUNTIME,
                  environment=environment)  # fmt: skip


def send(server: RedisServer | RabbitServer, *orders: tuple[str, dict[str, Any]]) -> list[str]:
    """Sent by Celery itself, through the installed library."""
    import celery

    app = celery.Celery("sender", broker=server.url(), set_as_current=False)
    try:
        return [app.send_task(name, **{"queue": "work", **options}).id for name, options in orders]
    finally:
        app.close()


def entries(server: RedisServer, queue: str = "work") -> dict[str, dict[str, Any]]:
    """By task id, as they lie in the list."""
    client = redis.Redis(port=server.port)
    documents = [json.loads(raw) for raw in client.lrange(f"{queue}.dead", 0, -1)]
    found = {item["headers"]["id"]: item for item in documents}
    assert len(found) == len(documents), "nothing is there twice"
    return found


def counts(server: RedisServer) -> dict[str, int]:
    with Broker(BrokerSpec.build(url=server.url())) as broker, Control(broker) as control:
        replies = control.broadcast(COMMAND).replies
    return dict(replies[0].value) if replies else {}
