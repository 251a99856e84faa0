# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A worker that stops waits for every task that a pool process was given.

The prefork pool of Celery 5.6 and 5.7 forgets, at the stop of its consumer, tasks that a process has and has not yet
been heard to accept. The process runs them, nobody reads that it did, their messages go back to the queue and are run
a second time; and the process waits for half a minute to be heard. That strikes where the main process is behind, as
on a busy host.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from celery import bootsteps
from celery.signals import worker_init


def _given(pool: Any) -> dict[int, Any]:
    """The jobs that a process has or is just being written, written to their end."""
    given = {number: job for number, job in pool._cache.items() if job._accepted or job._write_to}
    for job in given.values():
        writer = getattr(job, "_writer", lambda: None)()
        if writer in pool._active_writers:
            pool._flush_writer(job._write_to, writer)
    return given


def _keeping(pool: Any, flush: Callable[[], None], stopping: Callable[[], bool]) -> Callable[[], None]:
    def kept() -> None:
        given = _given(pool) if stopping() else None
        flush()
        if given is not None:
            pool._cache.clear()
            pool._cache.update((n, job) for n, job in given.items() if not (job.ready() and job._accepted))

    return kept


class FinishStep(bootsteps.StartStopStep):
    requires = ("celery.worker.consumer.tasks:Tasks",)

    def start(self, consumer: Any) -> None:
        pool = getattr(consumer.pool, "_pool", None)
        if not hasattr(pool, "_flush_writer") or getattr(consumer.pool.flush, "__name__", "") == "kept":
            return  # only prefork forgets; and once is enough
        consumer.pool.flush = _keeping(
            pool, consumer.pool.flush, lambda: consumer.controller.blueprint.state != bootsteps.RUN
        )


def _init(sender: Any, **_: Any) -> None:
    sender.app.steps["consumer"].add(FinishStep)


worker_init.connect(_init)
