# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Inspect command celeryops_ledger: how many tasks this worker began and ended, and how long they had waited.

Tasks run in pool processes and the command is answered by the main process, so the counters lie in memory that both
share: made before the pool forks, one slot for each pool process, which nobody else writes.
"""

from __future__ import annotations

import mmap
import os
import threading
import time
from datetime import datetime
from typing import Any

from billiard import current_process
from celery.signals import task_postrun, task_prerun, worker_process_init
from celery.worker.control import inspect_command

from .engine.ledger import BUCKETS, COMMAND, bucket
from .stamp import HEADER

SLOTS = 512
_WIDTH = 2 + BUCKETS
_counters = memoryview(mmap.mmap(-1, SLOTS * _WIDTH * 8)).cast("q")
_since = time.time()
# Slot 0 belongs to the main process: the pools solo, threads, gevent and eventlet run their tasks there.
_slot = 0
_lock = threading.Lock()


@worker_process_init.connect
def _take_slot(**_: Any) -> None:
    global _slot
    # A replaced process has the index of its predecessor and counts on.
    index = getattr(current_process(), "index", None)
    _slot = 1 + (index if isinstance(index, int) else os.getpid()) % (SLOTS - 1)


def _waited(request: Any) -> float | None:
    """Milliseconds since the task could have begun."""
    published = getattr(request, HEADER, None) or (getattr(request, "headers", None) or {}).get(HEADER)
    if not isinstance(published, float):
        return None
    if request.eta:
        eta = request.eta if isinstance(request.eta, datetime) else datetime.fromisoformat(str(request.eta))
        published = max(published, eta.timestamp())
    return max(0.0, time.time() - published) * 1000


def _from_queue(task: Any) -> Any:
    """The request of a task of the application that came from a queue; None for an eager one and for the canary."""
    request = getattr(task, "request", None)
    if request is None or request.called_directly or request.is_eager or task.name.startswith("celeryops."):
        return None
    return request


@task_prerun.connect
def _begun(task: Any = None, **_: Any) -> None:
    request = _from_queue(task)
    if request is None:
        return
    try:
        waited = _waited(request)
    except (ValueError, OverflowError, TypeError):
        waited = None
    with _lock:
        base = _slot * _WIDTH
        _counters[base] += 1
        if waited is not None:
            _counters[base + 2 + bucket(waited)] += 1


@task_postrun.connect
def _ended(task: Any = None, **_: Any) -> None:
    if _from_queue(task) is None:
        return
    with _lock:
        _counters[_slot * _WIDTH + 1] += 1


@inspect_command(name=COMMAND)
def celeryops_ledger(state: Any) -> dict[str, Any]:
    begun = ended = 0
    waits: dict[str, int] = {}
    for base in range(0, SLOTS * _WIDTH, _WIDTH):
        if _counters[base]:
            begun += _counters[base]
            ended += _counters[base + 1]
            for number in range(BUCKETS):
                if count := _counters[base + 2 + number]:
                    waits[str(number)] = waits.get(str(number), 0) + count
    return {"pid": os.getpid(), "since": _since, "begun": begun, "ended": ended, "waits": waits}
