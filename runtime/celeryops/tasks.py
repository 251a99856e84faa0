# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Base classes for tasks, with the retries and time limits of their kind: @shared_task(base=EmailTask).

Whatever a class sets, a task or a subclass can set otherwise. Limits in time need the prefork pool.
"""

from __future__ import annotations

from smtplib import SMTPAuthenticationError, SMTPNotSupportedError, SMTPRecipientsRefused, SMTPSenderRefused
from typing import Any

from celery import Task
from celery.exceptions import SoftTimeLimitExceeded

from .once import OnceTask


class IdempotentTask(OnceTask, Task):
    """Sent twice, done once: see celeryops.once. Acknowledged late, so that it survives its worker."""

    abstract = True
    acks_late = True
    reject_on_worker_lost = True
    autoretry_for: tuple[type[BaseException], ...] = (Exception,)
    max_retries = 3
    retry_backoff: Any = 2
    retry_backoff_max = 600
    retry_jitter = True


class EmailTask(Task):
    """Tries again soon, five times, unless the server refuses for good. smtplib's errors are OSErrors."""

    abstract = True
    autoretry_for: tuple[type[BaseException], ...] = (OSError, SoftTimeLimitExceeded)
    dont_autoretry_for = (SMTPAuthenticationError, SMTPNotSupportedError, SMTPRecipientsRefused, SMTPSenderRefused)
    max_retries = 5
    retry_backoff: Any = True
    retry_backoff_max = 60
    retry_jitter = True
    soft_time_limit = 110
    time_limit = 120


class ReportTask(Task):
    """Tries again late, twice. One that takes too long would do so again: that is no reason for a retry."""

    abstract = True
    autoretry_for: tuple[type[BaseException], ...] = (Exception,)
    dont_autoretry_for = (SoftTimeLimitExceeded,)
    max_retries = 2
    retry_backoff: Any = 300
    retry_backoff_max = 3600
    retry_jitter = True
    soft_time_limit = 29 * 60
    time_limit = 30 * 60


class MaintenanceTask(Task):
    """Is not tried again: its next turn comes."""

    abstract = True
    max_retries = 0


class ExternalAPITask(Task):
    """Tries again after what a network does, three times. The errors of requests and urllib are OSErrors."""

    abstract = True
    autoretry_for: tuple[type[BaseException], ...] = (OSError, SoftTimeLimitExceeded)
    max_retries = 3
    retry_backoff: Any = 5
    retry_backoff_max = 300
    retry_jitter = True
    soft_time_limit = 9 * 60 + 30
    time_limit = 10 * 60
