# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Inspect command celeryops_held: which of some delivery tags does this worker hold, shown by no other command or not.

While a worker stops it hears no remote control and may still run tasks, so it says in the broker that it is stopping
until it has ended. Without either, queue_rescue could take it for dead.
"""

from __future__ import annotations

import logging
import threading
from typing import Any

from celery import bootsteps
from celery.signals import worker_init, worker_shutdown
from celery.worker.control import inspect_command

from .engine import rescue

logger = logging.getLogger(__name__)

_INTERVAL = rescue.STOPPING_SECONDS / 3


@inspect_command(name=rescue.HELD_COMMAND)
def celeryops_held(state: Any, tags: list[str] | None = None) -> list[str]:
    delivered = state.consumer.task_consumer.channel.qos._delivered
    return [tag for tag in tags or () if tag in delivered]


class Notice(threading.Thread):
    """Tells the broker again and again that this worker is stopping."""

    def __init__(self, app: Any, node: str) -> None:
        super().__init__(name="celeryops-stopping", daemon=True)
        self.app = app
        self.node = node
        self.over = threading.Event()
        self.noted = threading.Event()

    def run(self) -> None:
        while not self.over.is_set():
            try:
                with self.app.connection_for_write() as connection:
                    connection.transport_options = {
                        **(connection.transport_options or {}),
                        "socket_timeout": 2.0,
                        "socket_connect_timeout": 2.0,
                    }
                    channel = connection.default_channel
                    if connection.transport.driver_type != "redis":
                        return  # its broker itself gives back what a lost connection held
                    import redis

                    # kombu's own client prefixes some commands and not others.
                    client = redis.Redis(connection_pool=channel.client.connection_pool)
                    prefix = getattr(channel, "global_keyprefix", "") or ""
                    rescue.note_stopping(client, prefix, self.node)
                    self.noted.set()
                    while not self.over.wait(_INTERVAL):
                        rescue.note_stopping(client, prefix, self.node)
                    rescue.forget_stopping(client, prefix, self.node)
            except Exception as exc:
                logger.debug("celeryops: cannot say that this worker stops: %r", exc)
                self.over.wait(_INTERVAL)


_notice: Notice | None = None


def _end() -> None:
    global _notice
    if _notice is not None:
        _notice.over.set()
        _notice.join(2.0)
        _notice = None


class HeldStep(bootsteps.StartStopStep):
    """From the moment the consumer stops, or has lost its broker, until it runs again or the worker has ended."""

    requires = ("celery.worker.consumer.control:Control", "celery.worker.consumer.tasks:Tasks")

    def start(self, consumer: Any) -> None:
        _end()

    def stop(self, consumer: Any) -> None:
        global _notice
        if _notice is None:
            _notice = Notice(consumer.app, consumer.hostname)
            _notice.start()
            # The broker may be away; a stop does not wait for it.
            _notice.noted.wait(1.0)


def _init(sender: Any, **_: Any) -> None:
    sender.app.steps["consumer"].add(HeldStep)


def _over(**_: Any) -> None:
    _end()


worker_init.connect(_init)
worker_shutdown.connect(_over)
