# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Applies what operators left in the broker to this worker.

It is read after every connect, before the consumer takes a message, when somebody asks for it, and now and then: a look
that failed is made up for. A part names what it reads and how it is applied; both happen in the consumer loop, so an
older look never undoes a newer one. Without Redis there are no records.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from celery import bootsteps
from celery.signals import worker_init

from .engine.connection import LinkedStore, RedisStore

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Record:
    name: str
    read: Callable[[RedisStore], Any]
    apply: Callable[[Any, Any], None]
    every: float

    def look(self, consumer: Any) -> None:
        store = LinkedStore.of(consumer.connection)
        if store is not None:
            self.apply(consumer, self.read(store))

    def look_again(self, consumer: Any) -> None:
        """For the loop, which must not see an exception."""
        try:
            self.look(consumer)
        except Exception:
            logger.warning("celeryops: the %s could not be read, the last known count", self.name, exc_info=True)


_records: list[Record] = []


def keep(record: Record) -> Record:
    _records.append(record)
    return record


class RecordsStep(bootsteps.StartStopStep):
    # After Tasks there is a consumer, which takes no message before the event loop begins.
    requires = ("celery.worker.consumer.tasks:Tasks",)

    def __init__(self, consumer: Any, **options: Any) -> None:
        super().__init__(consumer, **options)
        self.timers: list[Any] = []

    def start(self, consumer: Any) -> None:
        for record in _records:
            try:
                record.look(consumer)
            except consumer.connection_errors:
                raise  # the connection is lost again: Celery makes a new one and comes back here
            except Exception:
                logger.exception("celeryops: the %s could not be read; the worker runs without them", record.name)
            self.timers.append(consumer.timer.call_repeatedly(record.every, record.look_again, (consumer,)))

    def stop(self, consumer: Any) -> None:
        while self.timers:
            self.timers.pop().cancel()

    shutdown = stop


def _init(sender: Any, **_: Any) -> None:
    sender.app.steps["consumer"].add(RecordsStep)


worker_init.connect(_init)
