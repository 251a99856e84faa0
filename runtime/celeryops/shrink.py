# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A pool that shrinks ends idle processes only.

The prefork pool takes a process for idle until it has read that the process accepted its task. pool_shrink and the
autoscaler kill it in that moment, and a task that is acknowledged early is lost (celery/celery#7266).
"""

from __future__ import annotations

from typing import Any

from celery.concurrency.asynpool import AsynPool


def _worker_active(self: Any, worker: Any) -> bool:
    return any(
        worker.pid in job.worker_pids() or worker is job._scheduled_for or worker is job._write_to
        for job in self._cache.values()
    )


AsynPool._worker_active = _worker_active
