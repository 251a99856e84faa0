# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Rate and time limits of single tasks which the unit of this worker asks for, from its start on.

CELERYOPS_TASK_LIMITS is JSON: {"rate_limits": {task: rate}, "time_limits": {task: {"soft": seconds, "hard": seconds}}}.
Remote control changes them in a worker that runs; this is what makes them last.
"""

from __future__ import annotations

import json
import logging
import os
from typing import Any

from celery.signals import worker_init
from celery.utils.time import rate

logger = logging.getLogger(__name__)


def _limit(tasks: Any, name: str, **values: Any) -> None:
    if name not in tasks:
        logger.warning("celeryops: limits for the task %s, which this release does not have", name)
        return
    for attribute, value in values.items():
        setattr(tasks[name], attribute, value)


def _init(sender: Any, **_: Any) -> None:
    text = os.environ.get("CELERYOPS_TASK_LIMITS", "")
    if not text:
        return
    try:
        wanted = json.loads(text)
        for name, value in wanted.get("rate_limits", {}).items():
            rate(value)
            _limit(sender.app.tasks, name, rate_limit=value)
        for name, pair in wanted.get("time_limits", {}).items():
            fields = {"soft": "soft_time_limit", "hard": "time_limit"}
            _limit(sender.app.tasks, name, **{fields[key]: float(value) for key, value in pair.items()})
    except Exception:
        logger.exception("celeryops: the limits in CELERYOPS_TASK_LIMITS do not apply")


worker_init.connect(_init)
