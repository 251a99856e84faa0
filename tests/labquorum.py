"""The application of the tests on RabbitMQ: two quorum queues and a classic one."""

# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

from kombu import Queue
from labapp import app

__all__ = ["app"]

app.conf.update(
    task_queues=[
        *(Queue(name, queue_arguments={"x-queue-type": "quorum"}) for name in ("safe", "slow")),
        Queue("quick"),
    ],
    task_default_queue="quick",
    broker_transport_options={"confirm_publish": True},
)
