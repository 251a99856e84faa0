# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""WATCHDOG=1 for systemd, only while the consumer makes progress.

A thread asks the consumer loop, four times per watchdog limit, to send the ping; the loop sends it when it turns. So a
stopped process and a loop that hangs both fall silent, whatever the pool, and systemd restarts the worker.

The thread sends the ping itself where the loop stands still for a good reason:
- the consumer has lost its broker and a probe finds none either, or one that takes no writes, or it had no time yet to
  reconnect;
- the loop hangs and the broker does not answer a probe;
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

from . import _link, _sdnotify, notify
from ._environment import disabled

logger = logging.getLogger(__name__)

# Celery's own pause between two attempts to reconnect grows to half a minute.
RECONNECT_SECONDS = 60.0


class Keeper(threading.Thread):
    def __init__(self, consumer: Any, limit: float) -> None:
        super().__init__(name="celeryops-watchdog", daemon=True)
        self.consumer = consumer
        self.limit = limit
        self.interval = limit / 4
        self.turned = time.monotonic()
        self.away = 0.0
        self.probe: Probe | None = None
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
        if self.consumer.blueprint.state in (CLOSE, TERMINATE):
            return True
        if isinstance(self.consumer.pool, solo.TaskPool) and state.active_requests:
            return True
        now = time.monotonic()
        if _link.connected:
            return now - self.turned > self.limit / 2 and not self.broker_answers()
        if _link.refused or not self.broker_answers():
            self.away = now
        return now - max(self.away, _link.lost) < max(self.limit, RECONNECT_SECONDS)

    def broker_answers(self) -> bool:
        """Whether a probe succeeds in short time. A slow one goes on by itself: the next ping must not wait for it."""
        if self.probe is None:
            self.probe = Probe(self.consumer.app, self.interval)
            self.probe.start()
        self.probe.join(min(1.0, self.interval / 2))
        if self.probe.is_alive():
            return False
        answered = self.probe.answered
        self.probe = None
        return answered


class Probe(threading.Thread):
    """One look at the broker over a connection of our own."""

    def __init__(self, app: Any, wait: float) -> None:
        super().__init__(name="celeryops-probe", daemon=True)
        self.app = app
        self.wait = wait
        self.answered = False

    def run(self) -> None:
        try:
            with self.app.connection_for_read() as connection:
                connection.connect_timeout = self.wait
                connection.transport_options = {
                    **(connection.transport_options or {}),
                    "socket_timeout": self.wait,
                    "socket_connect_timeout": self.wait,
                }
                connection.default_channel  # noqa: B018  opens a connection and talks to the broker
                self.answered = True
        except Exception as exc:
            logger.debug("celeryops: the broker does not answer: %r", exc)


_keeper: Keeper | None = None


def _ready(sender: Any, **_: Any) -> None:
    global _keeper
    limit = _sdnotify.watchdog_seconds()
    if limit is not None and _keeper is None:
        _keeper = Keeper(sender, limit)
        _keeper.start()


if _sdnotify.configured():
    worker_ready.connect(_ready)
