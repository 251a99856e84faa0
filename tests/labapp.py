"""The application of the tests. Broker and result backend come from the environment."""

# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import json
import os
import time
from functools import lru_cache
from typing import Any

import lablistens
import redis
from celery import Celery, signals

app = Celery("labapp", broker=os.environ.get("CELERY_BROKER_URL"), backend=os.environ.get("CELERY_RESULT_BACKEND"))
app.conf.update(
    broker_connection_retry_on_startup=True,
    worker_prefetch_multiplier=1,
    beat_schedule=json.loads(os.environ.get("LABAPP_SCHEDULE") or "{}"),
    result_extended=bool(os.environ.get("LABAPP_EXTENDED")),
    worker_cancel_long_running_tasks_on_connection_loss=bool(os.environ.get("LABAPP_CANCEL")),
    broker_transport_options={
        option: os.environ[name]
        for option, name in (("global_keyprefix", "LABAPP_KEY_PREFIX"), ("master_name", "LABAPP_MASTER_NAME"))
        if name in os.environ
    }
    | json.loads(os.environ.get("CELERYOPS_TRANSPORT_OPTIONS") or "{}"),
)
signals.worker_ready.connect(lablistens.say)


@app.task(name="lab.add")
def add(x: int, y: int) -> int:
    return x + y


@app.task(name="lab.fail")
def fail(text: str = "failed on purpose") -> None:
    raise ValueError(text)


@app.task(name="lab.flaky", bind=True, autoretry_for=(KeyError,), retry_kwargs={"max_retries": 2, "countdown": 0})
def flaky(self: Any, failures: int) -> int:
    """Succeeds after so many retries."""
    if self.request.retries < failures:
        raise KeyError(failures)
    return int(self.request.retries)


@app.task(name="lab.sleep")
def sleep(seconds: float, secret: str = "") -> float:
    time.sleep(seconds)
    return seconds


@app.task(name="lab.late", acks_late=True)
def late(seconds: float) -> float:
    time.sleep(seconds)
    return seconds


@lru_cache(maxsize=1)
def _notes(_pid: int) -> redis.Redis:
    """One connection a process: a forked pool child must not share its parent's."""
    return redis.Redis.from_url(os.environ["LABAPP_NOTES_URL"])


def _note(task_id: str, seconds: float = 0) -> None:
    """Begin and end, in the database of LABAPP_NOTES_URL."""
    client = _notes(os.getpid())
    client.rpush("lab:begun", task_id)
    time.sleep(seconds)
    client.rpush("lab:done", task_id)


@app.task(name="lab.noted", bind=True, acks_late=True)
def noted(self: Any, seconds: float = 0) -> None:
    _note(self.request.id, seconds)


@app.task(name="lab.noted_early", bind=True)
def noted_early(self: Any) -> None:
    _note(self.request.id)


@app.task(name="lab.limited", rate_limit="10/m", time_limit=60, soft_time_limit=50)
def limited() -> str:
    return "done"
