# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Beat tells the broker that it ticks: when last, what it sent last, from which host and process.

Celery 5.7 can let beat answer ping (beat_enable_remote_control). This works with every Celery and says more.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from typing import Any

from celery.signals import beat_init

from ._environment import disabled, release
from .engine import heartbeat
from .engine.connection import LinkedStore

logger = logging.getLogger(__name__)

# Beat would sleep up to five minutes between two ticks: too long to tell it from one that hangs.
TICK_SECONDS = 30.0
WRITE_SECONDS = 5.0


class Heart(threading.Thread):
    """Writes the last tick from a thread of its own: a broker that is away holds up no schedule."""

    def __init__(self, app: Any, application: str) -> None:
        super().__init__(name="celeryops-heartbeat", daemon=True)
        self.app = app
        self.application = application
        self.news = threading.Event()
        self.tick = 0.0  # time.monotonic()
        self.sent: tuple[float, str] | None = None
        self.complained = False

    def ticked(self) -> None:
        self.tick = time.monotonic()
        self.news.set()

    def run(self) -> None:
        while True:
            self.news.wait()
            self.news.clear()
            try:
                self.write()
                self.complained = False
            except Exception as exc:
                if not self.complained:
                    logger.warning("celeryops: the heartbeat of beat could not be written: %r", exc)
                self.complained = True
            time.sleep(WRITE_SECONDS)

    def write(self) -> None:
        with self.app.connection_for_write() as connection:
            store = LinkedStore.of(connection)
            if store is None:
                return
            now = time.monotonic()
            ages = {"tick": now - self.tick}
            beat = {
                "host": socket.gethostname(),
                "pid": os.getpid(),
                "release": release() or "",
                "sent": "",
                "task": "",
            }
            if self.sent is not None:
                ages["sent"], beat["task"] = now - self.sent[0], self.sent[1]
            heartbeat.write(store, self.application, beat, ages)


def attach(scheduler: Any, heart: Heart) -> None:
    """Hear of every tick and of everything sent, whatever the kind of scheduler."""
    tick, apply_async = scheduler.tick, scheduler.apply_async

    def ticking(*args: Any, **kwargs: Any) -> Any:
        seconds = tick(*args, **kwargs)
        heart.ticked()
        return min(seconds, TICK_SECONDS) if isinstance(seconds, (int, float)) else seconds

    def sending(entry: Any, *args: Any, **kwargs: Any) -> Any:
        result = apply_async(entry, *args, **kwargs)
        heart.sent = (time.monotonic(), str(entry.task))
        return result

    scheduler.tick, scheduler.apply_async = ticking, sending


def _init(sender: Any, **_: Any) -> None:
    application = os.environ.get("CELERYOPS_APP_NAME", "")
    if not application:
        return
    try:
        heart = Heart(sender.app, application)
        attach(sender.scheduler, heart)
        heart.start()
    except Exception:
        logger.exception("celeryops: beat runs without a heartbeat")


if "heartbeat" not in disabled():
    # Sent by every beat; one in a worker (-B) sends beat_embedded_init as well, which would start a second heart.
    beat_init.connect(_init)
