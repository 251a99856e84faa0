# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""WATCHDOG=1 for systemd, only while the consumer makes progress.

A thread asks the consumer loop, four times per watchdog limit, to send the ping; the loop sends it when it turns. So a
stopped process and a loop that hangs both fall silent, whatever the pool, and systemd restarts the worker.

The thread sends the ping itself where the loop stands still for a good reason:
- the consumer has no broker connection: it reconnects by itself and a restart could not do better;
- the loop hangs and the broker does not answer a probe either;
- a solo pool runs a task, which it does inside the loop; the loop's silence then says nothing;
- the worker is stopping (systemd's stop timeout is in charge).
"""

from __future__ import annotations

import logging
import threading
import time
from typing import Any

from celery.bootsteps import CLOSE, TERMINATE
from celery.concurrency import solo
from celery.signals import worker_ready
from celery.worker import state

from . import _sdnotify, notify
from ._environment import disabled

logger = logging.getLogger(__name__)


class Keeper(threading.Thread):
    def __init__(self, consumer: Any, limit: float) -> None:
        super().__init__(name="celeryops-watchdog", daemon=True)
        self.consumer = consumer
        self.limit = limit
        self.interval = limit / 4
        self.turned = time.monotonic()
        self.show_status = "notify" not in disabled()

    def run(self) -> None:
        while True:
            try:
                self.consumer.call_soon(self.turn)
                if self.excused():
                    self.ping()
            except Exception:
                logger.exception("celeryops: watchdog")
            time.sleep(self.interval)

    def turn(self) -> None:
        """Runs inside the consumer loop."""
        self.turned = time.monotonic()
        self.ping()

    def ping(self) -> None:
        _sdnotify.send("WATCHDOG=1")
        if self.show_status:
            notify.refresh(self.consumer)

    def excused(self) -> bool:
        if self.consumer.connection is None or self.consumer.blueprint.state in (CLOSE, TERMINATE):
            return True
        if isinstance(self.consumer.pool, solo.TaskPool) and state.active_requests:
            return True
        return time.monotonic() - self.turned > self.limit / 2 and not self.broker_answers()

    def broker_answers(self) -> bool:
        """A short look at the broker over a connection of our own."""
        wait = min(2.0, self.interval)
        app = self.consumer.app
        try:
            with app.connection_for_read() as connection:
                connection.connect_timeout = wait
                connection.transport_options = {
                    **(connection.transport_options or {}), "socket_timeout": wait, "socket_connect_timeout": wait,
                }
                connection.default_channel  # noqa: B018  opens a connection and talks to the broker
        except Exception:
            return False
        return True


_keeper: Keeper | None = None


def _ready(sender: Any, **_: Any) -> None:
    global _keeper
    limit = _sdnotify.watchdog_seconds()
    if limit is not None and _keeper is None:
        _keeper = Keeper(sender, limit)
        _keeper.start()


if _sdnotify.configured():
    worker_ready.connect(_ready)
