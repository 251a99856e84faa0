"""What the tests of idempotent tasks share."""

# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import gc
import importlib
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import redis

from support import RedisServer, Worker


@pytest.fixture(scope="module")
def lab() -> Iterator[Any]:
    """labonce in this process, with a Redis of its own as `server`: broker and results in database 0, notes in 1."""
    with RedisServer() as server, pytest.MonkeyPatch.context() as patch:
        patch.setenv("CELERY_BROKER_URL", server.url())
        patch.setenv("CELERY_RESULT_BACKEND", server.url())
        patch.setenv("LABAPP_NOTES_URL", server.url(1))
        for name in ("labapp", "labonce"):
            patch.delitem(sys.modules, name, raising=False)
        labonce = importlib.import_module("labonce")
        patch.setattr(labonce, "server", server, raising=False)
        yield labonce
        # Results that are still known would look for their Redis again and again when it is gone.
        gc.collect()
        labonce.app.backend.result_consumer.stop()


def worker(
    server: RedisServer, name: str, queue: str, *, pool: str = "prefork", concurrency: int = 2, **environment: str
) -> Worker:
    return Worker(
        server.url(), f"{name}@lab", queues=queue, pool=pool, concurrency=concurrency, app="labonce",
        arguments=("--include", "celeryops.worker"), environment={"LABAPP_NOTES_URL": server.url(1), **environment},
    )  # fmt: skip


def notes(server: RedisServer, what: str, phase: str = "end") -> list[list[str]]:
    """[task id, pid] of each run of this work."""
    with redis.Redis.from_url(server.url(1), decode_responses=True) as client:
        return [line.split() for line in client.lrange(f"once:{phase}:{what}", 0, -1)]


def ids(server: RedisServer, what: str, phase: str = "end") -> list[str]:
    return [note[0] for note in notes(server, what, phase)]


def drained(server: RedisServer, queue: str) -> bool:
    return server.cli("LLEN", queue) == "0" and server.cli("HLEN", "unacked") == "0"


def records(server: RedisServer, task: str) -> list[str]:
    return server.cli("KEYS", f"celeryops:once:{task}:*").split()
