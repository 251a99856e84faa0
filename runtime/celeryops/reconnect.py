# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A worker that lost its broker stays, and is back within seconds after the broker is.

Celery waits 2, 4, 6 and at last 30 seconds between two attempts, so the longer the broker was away the longer a worker
stays away after it. The number of attempts (broker_connection_max_retries) is stretched by as much as they are closer.

Celery 5.7 takes the lost connection apart at once. What still acknowledges or gives back a message through it, as a
task that ends then, meets an AttributeError in place of the error of a connection that Celery reckons with, and the
worker ends with all its tasks.
"""

from __future__ import annotations

import functools
from typing import Any

from celery.worker.consumer import Consumer
from kombu.transport import redis as transport

# Seconds: the longest wait here, and Celery's.
INTERVAL, CELERYS = 3.0, 30.0

_ensure_connected = Consumer.ensure_connected
_connparams = transport.Channel._connparams


def _often(ensure: Any) -> Any:
    @functools.wraps(ensure)
    def ensure_connection(errback: Any = None, max_retries: int | None = None, **kwargs: Any) -> Any:
        retries = max_retries and int(max_retries * CELERYS / INTERVAL)
        return ensure(errback, retries, **{"interval_start": 1, "interval_max": INTERVAL, **kwargs})

    return ensure_connection


def ensure_connected(self: Any, conn: Any) -> Any:
    conn.ensure_connection = _often(conn.ensure_connection)
    try:
        return _ensure_connected(self, conn)
    finally:
        del conn.ensure_connection


def connparams(self: Any, *args: Any, **kwargs: Any) -> Any:
    if self.connection.client is None:
        raise transport.redis.exceptions.ConnectionError("the connection was lost, and the worker has another one")
    return _connparams(self, *args, **kwargs)


Consumer.ensure_connected = ensure_connected
transport.Channel._connparams = connparams
