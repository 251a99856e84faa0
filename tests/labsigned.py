"""The application of the tests of signed tasks. Everything is sent to the queue LABSIGNED_QUEUE."""

# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import os
from typing import Any

import lablistens
import redis
from celery import Celery, signals

app = Celery("labsigned", broker=os.environ["CELERY_BROKER_URL"], backend=os.environ["CELERY_RESULT_BACKEND"])
app.conf.update(
    task_default_queue=os.environ.get("LABSIGNED_QUEUE", "celery"),
    accept_content=["json", "pickle"],
    broker_connection_retry_on_startup=True,
    worker_prefetch_multiplier=1,
    beat_schedule={"mark": {"task": "lab.mark", "schedule": 0.5, "args": [0]}},
)
signals.worker_ready.connect(lablistens.say)


def note(key: str, text: str) -> None:
    redis.Redis.from_url(os.environ["CELERY_BROKER_URL"]).rpush(key, text)


@signals.task_rejected.connect
def rejected(message: Any, exc: Exception, **_: Any) -> None:
    note("lab:rejected", f"{message.headers['id']} {type(exc).__name__}: {exc}")


@app.task(name="lab.mark", bind=True)
def mark(self: Any, number: int) -> int:
    """Notes that it ran."""
    note("lab:marks", self.request.id)
    return number


@app.task(name="lab.danger", bind=True)
def danger(self: Any, number: int) -> int:
    return int(mark.run(number))


@app.task(name="lab.add")
def add(x: Any, y: Any) -> Any:
    return x + y


@app.task(name="lab.total")
def total(numbers: list[int]) -> int:
    return sum(numbers)


@app.task(name="lab.total_of_one")
def total_of_one(number: int) -> int:
    return number


@app.task(name="lab.again", bind=True, max_retries=2)
def again(self: Any) -> int:
    """Succeeds with its second retry."""
    if self.request.retries < 2:
        raise self.retry(countdown=0.1)
    return int(self.request.retries)


@app.task(name="lab.again_with", bind=True, max_retries=1)
def again_with(self: Any, number: int) -> int:
    if not self.request.retries:
        raise self.retry(countdown=0.2)
    return number + 1
