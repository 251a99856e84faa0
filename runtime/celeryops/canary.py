# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Task celeryops.canary: proves that this worker takes tasks from a queue and runs them.

The answer goes to the broker, so no result backend is needed.
"""

from __future__ import annotations

import logging
from typing import Any

from celery import shared_task

from ._environment import release
from .engine import tasks

logger = logging.getLogger(__name__)


@shared_task(name=tasks.CANARY_TASK, bind=True, acks_late=False, ignore_result=True, max_retries=0)
def canary(
    self: Any, token: str, run: str | None = None, args: list[Any] | None = None, kwargs: dict[str, Any] | None = None
) -> None:
    answer: dict[str, Any] = {
        "token": token,
        "node": self.request.hostname,
        "release": release(),
        "queue": (self.request.delivery_info or {}).get("routing_key"),
    }
    try:
        if run is None:
            answer["value"] = None
        elif run not in self.app.tasks:
            answer["error"] = f"task {run} is not registered"
        else:
            answer["value"] = self.app.tasks[run].apply(args=args, kwargs=kwargs, throw=True).result
    except (Exception, SystemExit) as exc:
        answer["error"] = f"{type(exc).__name__}: {exc}"
    try:
        with self.app.connection_for_write() as connection:
            tasks.answer_canary(connection, token, answer)
    except Exception:
        logger.exception("celeryops: the canary's answer could not be sent")
