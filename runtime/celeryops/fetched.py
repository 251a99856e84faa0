# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A message that was just fetched when Redis went is given back, not forgotten.

kombu takes a message off its queue (BRPOP), then notes that it is held (ZADD and HSET, `QoS.append`). When Redis goes
between the two, or the answer of the BRPOP is read while the lost connection is cleared away, the worker's memory has
the only copy, and kombu drops it with the connection. Here it is kept, and put back at that end of its queue where the
next one is taken, once the worker has a connection again or, at the latest, when it stops.

Was the note written and only its answer lost, then it is taken back by the same step. Only if somebody else has given
the message back meanwhile (visibility timeout, `queue_rescue`) it runs twice.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

from celery import signals
from celery.worker.consumer import Consumer
from kombu.transport import redis as transport

logger = logging.getLogger(__name__)

# Seconds that a worker without a broker gives to it at its end.
LAST_TRY = 5

_append = transport.QoS.append
_ensure_connected = Consumer.ensure_connected
# Delivery tag -> message, exchange, routing key.
_kept: dict[str, tuple[dict[str, Any], str, str]] = {}


def append(self: Any, message: Any, delivery_tag: str) -> Any:
    try:
        return _append(self, message, delivery_tag)
    except (*self.channel.connection_errors, OSError):
        where = message.delivery_info
        _kept[delivery_tag] = (message._raw, where["exchange"], where["routing_key"])
        raise


def ensure_connected(self: Any, conn: Any) -> Any:
    connected = _ensure_connected(self, conn)
    _give_back(connected)
    return connected


def _give_back(connection: Any) -> None:
    for tag, (raw, _exchange, key) in list(_kept.items()):
        channel = connection.default_channel
        put = functools.partial(_put, channel, tag)
        with channel.conn_or_acquire() as client:
            client.transaction(put, channel.qos.unacked_key)
        del _kept[tag]
        logger.warning("celeryops: %s was fetched when the broker went; it is back in its queue, %s", _name(raw), key)


def _put(channel: Any, tag: str, pipe: Any) -> None:
    pipe.multi()
    channel.qos._remove_from_indices(tag, pipe)
    channel._do_restore_message(*_kept[tag], pipe)


def _name(raw: dict[str, Any]) -> str:
    headers = raw.get("headers") or {}
    return f"{headers.get('task', 'a message')}[{headers.get('id', '')}]"


@signals.worker_shutdown.connect
def _last(sender: Any, **_: Any) -> None:
    if not _kept:
        return
    try:
        with sender.app.connection_for_write(connect_timeout=LAST_TRY) as connection:
            connection.ensure_connection(max_retries=LAST_TRY, interval_start=1, interval_step=0, timeout=LAST_TRY)
            _give_back(connection)
    except Exception as exc:
        for raw, _exchange, key in _kept.values():
            logger.critical("celeryops: LOST: %s of queue %s, fetched when the broker went: %s", _name(raw), key, exc)


transport.QoS.append = append
Consumer.ensure_connected = ensure_connected
