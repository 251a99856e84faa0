# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The consumer's connection to its broker, as the parts need it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

from celery import bootsteps
from celery.signals import worker_init

# Seconds that a worker without a broker gives to it at its end.
LAST_TRY = 5

# Kept by a consumer step, started after a connect and stopped when it is lost.
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


def change(channel: Any, function: Callable[[Any], Any]) -> Any:
    """What `function` returns, called with a pipeline that watches the messages that are held; it calls multi().

    An answer that Redis takes no writes is raised as ConnectionError: of this Celery reckons with that only.
    """
    from redis import exceptions

    try:
        with channel.conn_or_acquire() as client:
            return client.transaction(function, channel.unacked_key, value_from_callable=True)
    except exceptions.ResponseError as exc:
        raise exceptions.ConnectionError(str(exc)) from exc


@contextlib.contextmanager
def last(app: Any) -> Iterator[Any]:
    """A connection for a worker that ends, if there is one within LAST_TRY seconds."""
    with app.connection_for_write(connect_timeout=LAST_TRY) as connection:
        connection.ensure_connection(max_retries=LAST_TRY, interval_start=1, interval_step=0, timeout=LAST_TRY)
        yield connection


def _init(sender: Any, **_: Any) -> None:
    sender.app.steps["consumer"].add(LinkStep)


worker_init.connect(_init)
