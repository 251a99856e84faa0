# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A pool that shrinks under load: no process goes with its task."""

from __future__ import annotations

import json

import pytest

from support import RedisServer, Worker, send_task, wait_until


@pytest.mark.parametrize(
    ("off", "state"), [("", "SUCCESS"), ("shrink", "FAILURE")], ids=["with the part", "as Celery does it"]
)
def test_a_process_that_was_just_given_a_task_stays(redis_server: RedisServer, off: str, state: str) -> None:
    include = ("--include", "celeryops.worker,labshrink")
    environment = {"CELERYOPS_DISABLE": off}
    with Worker(redis_server.url(), "s@lab", concurrency=1, arguments=include, environment=environment) as worker:
        key = f"celery-task-meta-{send_task(redis_server.url(), 'lab.sleep', 1.0)}"
        wait_until(lambda: "shrink: " in worker.log.read_text(), what="the pool to be shrunk")
        found = json.loads(wait_until(lambda: redis_server.cli("GET", key), what="the end of the task"))
        assert found["status"] == state, worker.log.read_text()
        assert ("All processes busy" in worker.log.read_text()) == (state == "SUCCESS")
