"""The application of the tests, with tasks that fail in every way."""

# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import functools
import os
import signal
import time
from typing import Any

from celery.exceptions import Ignore, Reject
from labapp import app

__all__ = ["app"]


@app.task(name="dead.fail", bind=True, max_retries=2)
def fail(self: Any, retries: bool = False) -> None:
    try:
        raise ValueError("failed on purpose")
    except ValueError as exc:
        if retries:
            raise self.retry(exc=exc, countdown=0) from exc
        raise


@app.task(name="dead.fail_later", ignore_result=True)
def fail_later(seconds: float) -> None:
    """Says nothing to the result backend, which may be away."""
    time.sleep(seconds)
    raise ValueError("failed later")


@app.task(name="dead.hang", time_limit=1)
def hang() -> None:
    time.sleep(60)


@app.task(name="dead.lost")
def lost() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@app.task(name="dead.back", bind=True, acks_late=True, reject_on_worker_lost=True)
def back(self: Any) -> None:
    """Goes back to its queue once, then succeeds."""
    if not (self.request.delivery_info or {}).get("redelivered"):
        os.kill(os.getpid(), signal.SIGKILL)


@app.task(name="dead.reject", acks_late=True)
def reject() -> None:
    raise Reject("no use", requeue=False)


@app.task(name="dead.ignore")
def ignore() -> None:
    raise Ignore()


@functools.lru_cache(maxsize=1)
def _redis(pid: int) -> Any:
    import redis

    return redis.Redis.from_url(os.environ["CELERY_BROKER_URL"])


@app.task(name="dead.once", bind=True, ignore_result=True)
def once(self: Any) -> None:
    """Counts the runs of its id in Redis."""
    _redis(os.getpid()).hincrby("runs", self.request.id, 1)
