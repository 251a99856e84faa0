# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A worker that stops, or loses its broker, keeps every task that a pool process was given.

The prefork pool of Celery 5.6 and 5.7 forgets then the tasks that a process has and has not yet been heard to accept,
and before 5.6 all of them may be forgotten. The process runs them, nobody reads that it did, their messages go back to
the queue and are run a second time; and at a stop the process waits for half a minute to be heard. That strikes where
the main process is behind, as on a busy host.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from celery import bootsteps
from celery.signals import worker_init

from . import _pool


def _keeping(pool: Any, flush: Callable[[], None]) -> Callable[[], None]:
    def kept() -> None:
        given = _pool.given(pool)
        flush()
        pool._cache.clear()
        pool._cache.update((n, job) for n, job in given.items() if not (job.ready() and job._accepted))

    return kept


class FinishStep(bootsteps.StartStopStep):
    requires = ("celery.worker.consumer.tasks:Tasks",)

    def start(self, consumer: Any) -> None:
        pool = _pool.prefork(consumer.pool)
        if pool is None or getattr(consumer.pool.flush, "__name__", "") == "kept":
            return  # only prefork forgets; and once is enough
        consumer.pool.flush = _keeping(pool, consumer.pool.flush)


def _init(sender: Any, **_: Any) -> None:
    sender.app.steps["consumer"].add(FinishStep)


worker_init.connect(_init)
