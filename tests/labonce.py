"""Idempotent tasks for the tests. Each run writes down its begin and its end in the Redis of LABAPP_NOTES_URL."""

# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import os
import time
from typing import Any

from celery import shared_task
from labapp import _notes, app

from celeryops.once import once
from celeryops.tasks import EmailTask, ExternalAPITask, IdempotentTask, MaintenanceTask, ReportTask

__all__ = ["app"]


def note(task: Any, what: str, phase: str) -> None:
    _notes(os.getpid()).rpush(f"once:{phase}:{what}", f"{task.request.id} {os.getpid()}")


@app.task(name="once.work", base=IdempotentTask, bind=True)
def work(self: Any, what: str, seconds: float = 0.0) -> str:
    note(self, what, "begin")
    time.sleep(seconds)
    note(self, what, "end")
    return f"{what} done"


@shared_task(name="once.mail", bind=True)
@once(scope="user", ttl=60, by=["what"])
def mail(self: Any, what: str, user_id: int | None = None, seconds: float = 0.0) -> str:
    note(self, what, "begin")
    time.sleep(seconds)
    note(self, what, "end")
    return f"mail for {user_id}"


@app.task(name="once.short")
@once(ttl=1.0)
def short(what: str, seconds: float = 0.0) -> str:
    note(short, what, "begin")
    time.sleep(seconds)
    note(short, what, "end")
    return what


class Stubborn(IdempotentTask):
    """Fails until its notes say that it has begun so often."""

    abstract = True
    retry_backoff = False
    default_retry_delay = 1
    once_ttl = 60


@app.task(name="once.stubborn", base=Stubborn, bind=True)
def stubborn(self: Any, what: str, failures: int) -> str:
    note(self, what, "begin")
    if _notes(os.getpid()).llen(f"once:begin:{what}") <= failures:
        raise RuntimeError("not yet")
    note(self, what, "end")
    return what


@app.task(name="once.careful", base=IdempotentTask, bind=True, once_lost="refuse")
def careful(self: Any, what: str) -> None:
    note(self, what, "end")


@app.task(name="once.killer", base=IdempotentTask, bind=True)
def killer(self: Any, what: str) -> None:
    note(self, what, "begin")
    os.kill(os.getpid(), 9)


@app.task(name="once.collect")
def collect(results: list[str]) -> list[str]:
    return results


@app.task(name="once.noop", ignore_result=True)
def noop(number: int) -> None:
    """Nothing."""


@app.task(name="once.noop_once", base=IdempotentTask, ignore_result=True)
def noop_once(number: int) -> None:
    """Nothing, once."""


@app.task(name="once.email", base=EmailTask)
def email() -> None:
    """Nothing."""


@app.task(name="once.report", base=ReportTask)
def report() -> None:
    """Nothing."""


@app.task(name="once.maintenance", base=MaintenanceTask)
def maintenance() -> None:
    """Nothing."""


@app.task(name="once.api", base=ExternalAPITask)
def api() -> None:
    """Nothing."""
