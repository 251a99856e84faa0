# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A worker that lost its broker stays, and is back within seconds after the broker is.

Celery waits 2, 4, 6 and at last 30 seconds between two attempts, so the longer the broker was away the longer a worker
stays away after it. The number of attempts (broker_connection_max_retries) is stretched by as much as they are closer.

Celery 5.7 takes the lost connection apart at once. What still acknowledges or gives back a message through it, as a
task that ends then, meets an AttributeError in place of the error of a connection that Celery reckons with, and the
worker ends with all its tasks.

A Redis that answers and takes no writes (out of memory, disk full, read-only replica) is away as well. Celery ends at
the first command that is refused, and at every start takes another message off a queue and loses it.

What a task sends, and the callback of a chord above all, is lost if the broker is away for the second that Celery
tries: workers try for a minute, unless the application has a task_publish_retry_policy of its own.
"""

from __future__ import annotations

import functools
import logging
import re
import time
from typing import Any

from celery import signals
from celery.app.defaults import DEFAULTS
from celery.worker.consumer import Consumer
from celery.worker.state import maybe_shutdown
from kombu.transport import redis as transport
from redis import exceptions

from . import _link

logger = logging.getLogger(__name__)

# Seconds: the longest wait here, and Celery's.
INTERVAL, CELERYS = 3.0, 30.0

# Waits of 0 to 1 s, a minute in all.
PUBLISHES = 60

# What a master that takes no writes answers, and to who waits for a message when it becomes a replica; redis-py strips
# the code where it has a class for it, and puts the command before it in a pipeline.
_CLASSES = ("OutOfMemoryError", "ReadOnlyError")
_CODES = re.compile(r"(?:^|: )(?:MISCONF|NOREPLICAS|UNBLOCKED)\b")

_ensure_connected = Consumer.ensure_connected
_connparams = transport.Channel._connparams


def refuses(exc: BaseException) -> bool:
    return type(exc).__name__ in _CLASSES or bool(_CODES.search(str(exc)))


def _often(ensure: Any) -> Any:
    @functools.wraps(ensure)
    def ensure_connection(errback: Any = None, max_retries: int | None = None, **kwargs: Any) -> Any:
        retries = max_retries and int(max_retries * CELERYS / INTERVAL)
        return ensure(errback, retries, **{"interval_start": 1, "interval_max": INTERVAL, **kwargs})

    return ensure_connection


def _connect(self: Any, conn: Any) -> Any:
    conn.ensure_connection = _often(conn.ensure_connection)
    try:
        return _ensure_connected(self, conn)
    finally:
        del conn.ensure_connection


def ensure_connected(self: Any, conn: Any) -> Any:
    connected = _connect(self, conn)
    if connected.transport.driver_type != "redis":
        return connected
    if not isinstance(self.loop, _Loop):
        self.loop = _Loop(self.loop)
    seconds = 0
    while refusal := _refusal(connected):
        if not _link.refused:
            logger.warning("celeryops: the broker takes no writes: %s Waiting until it does.", refusal)
        _link.refused = True
        # A Sentinel may name another one next time, and mostly does a second later.
        connected.collect()
        seconds = min(seconds + 1, int(INTERVAL))
        for _second in range(seconds):
            maybe_shutdown()
            time.sleep(1)
        connected = _connect(self, conn)
    _link.refused = False
    return connected


def _refusal(connection: Any) -> str:
    try:
        with connection.default_channel.conn_or_acquire() as client:
            client.set("celeryops:writable", "", px=1)
    except exceptions.ResponseError as exc:
        # Whatever else is wrong shows where it matters.
        return str(exc) if refuses(exc) else ""
    return ""


class _Loop:
    """The consumer's loop; what a broker that takes no writes answers is the loss of the connection."""

    def __init__(self, loop: Any) -> None:
        self.loop = loop

    def __call__(self, *args: Any) -> Any:
        try:
            return self.loop(*args)
        except exceptions.ResponseError as exc:
            if not refuses(exc):
                raise
            raise exceptions.ConnectionError(str(exc)) from exc


def connparams(self: Any, *args: Any, **kwargs: Any) -> Any:
    if getattr(self.connection, "client", None) is None:
        raise exceptions.ConnectionError("the connection was lost, and the worker has another one")
    return _connparams(self, *args, **kwargs)


@signals.worker_init.connect
def _init(sender: Any, **_: Any) -> None:
    conf, usual = sender.app.conf, DEFAULTS["task_publish_retry_policy"]
    if conf.task_publish_retry_policy == usual:
        conf.task_publish_retry_policy = {**usual, "max_retries": PUBLISHES}


Consumer.ensure_connected = ensure_connected
transport.Channel._connparams = connparams
