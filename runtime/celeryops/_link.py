# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Whether the consumer has its broker: a consumer step, started after a connect and stopped when it is lost."""

from __future__ import annotations

import time
from typing import Any

from celery import bootsteps
from celery.signals import worker_init

connected = False
lost = 0.0  # time.monotonic() of the loss
refused = False  # the broker answers and takes no writes


class LinkStep(bootsteps.StartStopStep):
    requires = ("celery.worker.consumer.tasks:Tasks",)

    def start(self, consumer: Any) -> None:
        global connected
        connected = True

    def stop(self, consumer: Any) -> None:
        global connected, lost
        connected = False
        lost = time.monotonic()


def _init(sender: Any, **_: Any) -> None:
    sender.app.steps["consumer"].add(LinkStep)


worker_init.connect(_init)
