"""Loaded into a worker: once a pool process has a task and its word of that is not read, the pool shrinks by one."""

# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import logging
import time
from typing import Any

from celery.signals import worker_ready


@worker_ready.connect
def _arm(sender: Any, **_: Any) -> None:
    pool, tried = sender.pool, []

    def turn() -> None:
        jobs = pool._pool._cache.values()
        if tried or not any(job._write_to and not job._accepted for job in jobs) or pool._pool._active_writers:
            return
        tried.append(True)
        time.sleep(0.3)  # the process begins with its task; this loop, which would read it, stands still
        try:
            pool.shrink(1)
            said = "it shrank"
        except ValueError as exc:
            said = str(exc)
        logging.getLogger("celery.worker").info("shrink: %s", said)

    sender.hub.on_tick.add(turn)
