# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What the runtime tests load into a worker: a loop that hangs on demand, and a task that retries."""

from __future__ import annotations

import time
from typing import Any

from celery import shared_task
from celery.utils.log import get_task_logger
from celery.worker.control import control_command

logger = get_task_logger(__name__)


@control_command(args=[("seconds", float)])
def lab_hang(state: Any, seconds: float) -> dict[str, str]:
    """Runs inside the consumer loop."""
    time.sleep(seconds)
    return {"ok": "awake"}


@shared_task(name="lab.retry", bind=True, max_retries=1)
def retry(self: Any) -> None:
    logger.info("published %s now", self.request.headers["celeryops_published"])
    if self.request.retries == 0:
        raise self.retry(countdown=0.5)
