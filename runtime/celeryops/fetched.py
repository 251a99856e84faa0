# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A message that was just fetched when Redis went, or took no more writes, is given back, not forgotten.

kombu takes a message off its queue (BRPOP), then notes that it is held (ZADD and HSET, `QoS.append`). When Redis goes
between the two, or the answer of the BRPOP is read while the lost connection is cleared away, the worker's memory has
the only copy, and kombu drops it with the connection. Here it is kept, with systemd in a file of STATE_DIRECTORY too,
and put back at that end of its queue where the next one is taken, once the worker has a connection again: this process,
at its end at the latest, or the next one of this instance.

Was the note written and only its answer lost, then it is taken back by the same step. Only if somebody else has given
the message back meanwhile (visibility timeout, `queue_rescue`) it runs twice.

A connection may also be given up while its BRPOP has no answer yet: a command on another one timed out, or kombu (since
5.7) saw none for 26 seconds. Was Redis only frozen, or the network cut, then both get on later as if nothing had been:
the kernel still delivers the command, Redis takes a message off, and nobody would read it. So such a connection is not
closed. A thread waits for its answer and gives back what comes.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import socket
import struct
import threading
import time
import weakref
from pathlib import Path
from typing import Any

from celery import signals
from celery.worker.consumer import Consumer
from kombu.transport import redis as transport
from redis import exceptions
from redis.connection import AbstractConnection

from . import _link

logger = logging.getLogger(__name__)

# After how many seconds without a word TCP asks whether the peer is there, how often then, and how many times: as long
# as TCP of Linux tries to deliver an answer (tcp_retries2), and a peer that forgot the connection says so at once.
KEEPALIVE = {"TCP_KEEPIDLE": 60, "TCP_KEEPINTVL": 60, "TCP_KEEPCNT": 14}

_append = transport.QoS.append
_brpop_start = transport.Channel._brpop_start
_disconnect = AbstractConnection.disconnect
_ensure_connected = Consumer.ensure_connected
# Delivery tag -> message, exchange, routing key.
_kept: dict[str, tuple[dict[str, Any], str, str]] = {}
_looked = False
_giving = threading.Lock()


def append(self: Any, message: Any, delivery_tag: str) -> Any:
    try:
        return _append(self, message, delivery_tag)
    except (*self.channel.connection_errors, exceptions.ResponseError, OSError):
        where = message.delivery_info
        _keep(delivery_tag, message._raw, where["exchange"], where["routing_key"])
        raise


def brpop_start(self: Any, *args: Any, **options: Any) -> Any:
    started = _brpop_start(self, *args, **options)
    if self._in_poll:
        self._in_poll._celeryops_channel = weakref.ref(self)
    return started


def disconnect(self: Any, *args: Any, **options: Any) -> Any:
    channel = getattr(self, "_celeryops_channel", lambda: None)()
    # A child of the pool closes only its copy.
    if channel is not None and channel._in_poll is self and self._sock is not None and self.pid == os.getpid():
        try:
            _leave_open(channel, self)
        except Exception:
            logger.exception("celeryops: a connection to Redis is closed although it was asked for a message")
    return _disconnect(self, *args, **options)


def _leave_open(channel: Any, connection: Any) -> None:
    found, parser, poller = connection._sock, connection._parser, channel.connection.cycle
    connection._sock = None
    connection.set_parser(type(parser))
    poller.poller.unregister(found)
    poller._fd_to_chan.pop(found.fileno(), None)
    poller._chan_to_sock.pop((channel, channel.client, "BRPOP"), None)
    # Should this process end first, then what is not delivered shall not be.
    found.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    found.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if found.family in (socket.AF_INET, socket.AF_INET6):
        for name, value in KEEPALIVE.items():
            found.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    found.settimeout(None)
    answer = functools.partial(_answer, found, parser, channel.connection.client.clone())
    threading.Thread(target=answer, name="celeryops-fetched", daemon=True).start()


def _answer(found: socket.socket, parser: Any, broker: Any) -> None:
    """Read what a connection that was given up still brings, and give it back."""
    try:
        answer = parser.read_response()
    except (OSError, exceptions.RedisError):
        return  # the connection is dead, and with it what may have been on its way
    finally:
        found.close()
    if not isinstance(answer, list | tuple):
        return
    message = json.loads(answer[1])
    properties = message["properties"]
    tag, where = properties["delivery_tag"], properties["delivery_info"]
    _keep(tag, message, where["exchange"], where["routing_key"])
    while tag in _kept:
        try:
            with broker.clone() as connection:
                connection.ensure_connection()
                _give_back(connection, -1)
        except (*broker.connection_errors, exceptions.ResponseError, OSError):
            time.sleep(1)


def _file(tag: str) -> Path | None:
    directory = os.environ.get("STATE_DIRECTORY")
    return Path(directory) / f"{os.environ.get('CELERYOPS_INSTANCE', '')}.fetched-{tag}.json" if directory else None


def _keep(tag: str, *message: Any) -> None:
    _kept[tag] = message
    if path := _file(tag):
        try:
            with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600), "w") as out:
                json.dump(message, out)
        except (OSError, TypeError, ValueError):
            logger.exception("celeryops: %s is kept in memory only", path)


def _find() -> None:
    """What the former process of this instance could not give back."""
    global _looked
    mark = None if _looked else _file("*")
    _looked = True
    for path in mark.parent.glob(mark.name) if mark else ():
        # One that is cut off was never whole: its message is still in the memory that wrote it, or in the log.
        with contextlib.suppress(ValueError):
            raw, exchange, key = json.loads(path.read_text())
            _kept.setdefault(path.stem.partition(".fetched-")[2], (raw, exchange, key))


def ensure_connected(self: Any, conn: Any) -> Any:
    connected = _ensure_connected(self, conn)
    if connected.transport.driver_type == "redis":
        _find()
        _give_back(connected)
    return connected


def _give_back(connection: Any, patience: float = 0) -> None:
    """`patience`: seconds for another thread that is at it, -1 as long as it takes."""
    if _giving.acquire(timeout=patience):
        try:
            _put_all(connection)
        finally:
            _giving.release()


def _put_all(connection: Any) -> None:
    for tag, (raw, _exchange, key) in list(_kept.items()):
        channel = connection.default_channel
        _link.change(channel, functools.partial(_put, channel, tag))
        del _kept[tag]
        if path := _file(tag):
            path.unlink(missing_ok=True)
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
        with _link.last(sender.app) as connection:
            _give_back(connection, _link.LAST_TRY)
        if _kept:
            raise TimeoutError("the broker does not answer")
    except Exception as exc:
        for tag, (raw, _exchange, key) in _kept.items():
            path = _file(tag)
            if path and path.exists():
                said = f"is in {path} until the next worker of this instance gives it back"
            else:
                said = "is LOST"
            logger.critical("celeryops: %s, fetched from %s when the broker went, %s: %s", _name(raw), key, said, exc)


transport.QoS.append = append
transport.Channel._brpop_start = brpop_start
AbstractConnection.disconnect = disconnect  # type: ignore[method-assign]
Consumer.ensure_connected = ensure_connected
