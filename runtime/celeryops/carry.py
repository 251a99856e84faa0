# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What a worker holds when it loses Redis goes with it to its next connection.

kombu gives all of it back while it takes the lost connection apart. If Redis answers, what runs is given back too, and
runs twice. If it does not, nothing is: what was fetched and not begun (reserved, or waiting for its ETA or rate limit),
which Celery forgets, waits for the visibility timeout, an hour by default, and what ends meanwhile is not acknowledged.

Here nothing is given back with the connection. As soon as the worker has another one, what has ended is acknowledged,
what had not begun goes back to that end of its queue where the next one is taken, and what runs is held by the new
connection. Did somebody else give back a message in the meantime (visibility timeout, `queue_rescue`), then it is left
to whoever has it.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import time
from collections.abc import Iterator
from typing import Any

from celery import bootsteps, signals
from celery.worker.consumer import Consumer
from celery.worker.request import Request
from kombu.transport import redis as transport

from . import _link, _pool

logger = logging.getLogger(__name__)

_on_loss = Consumer.on_connection_error_after_connected
_on_close = Consumer.on_close
_append, _ack, _reject = transport.QoS.append, transport.QoS.ack, transport.QoS.reject
_restore_unacked_once = transport.QoS.restore_unacked_once

_losing = False
# Delivery tag -> the message. All that was held, then parted into what a pool process has and what nobody has begun.
_held: dict[str, Any] = {}
_running: dict[str, Any] = {}
_waiting: dict[str, Any] = {}
# Delivery tag -> whether it goes back to its queue: what has ended and could not be said, and what is just being said.
_ended: dict[str, bool] = {}
_saying: dict[str, bool] = {}


def on_loss(self: Any, exc: Exception) -> Any:
    global _losing
    channel = getattr(self.task_consumer, "channel", None)
    qos = channel.qos if isinstance(channel, transport.Channel) else None
    if qos is not None:
        # Celery takes fewer at a time while what runs is not counted, which it is here. With gevent and eventlet it
        # reckons wrongly up to 5.6, and takes one task every two seconds from then on.
        self.app.conf.worker_enable_prefetch_count_reduction = False
    _losing = True
    try:
        return _on_loss(self, exc)
    finally:
        _losing = False
        if qos is not None:
            _take(qos)


def restore_unacked_once(self: Any, *args: Any, **options: Any) -> Any:
    return _take(self) if _losing else _restore_unacked_once(self, *args, **options)


def _take(qos: Any) -> None:
    qos._on_collect.cancel()  # or kombu would give it back at the end of the process
    qos._flush()
    _held.update(qos._delivered)
    qos._delivered.clear()
    qos._delivered.restored = True


def on_close(self: Any) -> None:
    """Celery forgets what is not begun."""
    self.perform_pending_operations()  # without an event loop, up to Celery 5.6, acknowledgements may still be here
    begun = _pool.begun(self.pool)
    _on_close(self)
    # A timer that outlives it begins its task yet.
    begun |= set(_scheduled(self.timer))
    kept = {request.message.delivery_tag for request in begun if not getattr(request, "_already_cancelled", False)}
    while _held:
        tag, message = _held.popitem()  # the newest first, so that the oldest is put last, where the next is taken
        if tag in _saying:
            _ended[tag] = _saying[tag]
        if tag not in _ended:
            (_running if tag in kept else _waiting)[tag] = message


def _scheduled(timer: Any) -> Iterator[Request]:
    for waiting in timer.schedule.queue if timer else ():
        first = next(iter(waiting.entry.args or ()), None)
        # With gevent and eventlet it is a greenlet that waits, and one that was killed stays in the queue for a moment.
        if isinstance(first, Request) and not (waiting.entry.canceled or getattr(waiting, "dead", False)):
            yield first


def append(self: Any, message: Any, delivery_tag: str) -> Any:
    appended = _append(self, message, delivery_tag)
    message.celeryops_held_since = time.time()
    return appended


def ack(self: Any, delivery_tag: str) -> Any:
    with _said(delivery_tag, False):
        acknowledged = _ack(self, delivery_tag)
    if _ended:
        _say(self)  # one that failed while the worker noticed no loss
    return acknowledged


def reject(self: Any, delivery_tag: str, requeue: bool = False) -> Any:
    with _said(delivery_tag, requeue):
        return _reject(self, delivery_tag, requeue=requeue)


@contextlib.contextmanager
def _said(tag: str, requeue: bool) -> Iterator[None]:
    _saying[tag] = requeue
    try:
        yield
    except Exception:  # where greenlets share a connection, one that is just closed raises anything
        _ended[tag] = requeue
        raise
    finally:
        _saying.pop(tag, None)


def settle(channel: Any) -> None:
    """Raises ConnectionError if this connection is lost too; what is not settled then is kept."""
    qos = channel.qos
    _say(qos)
    for tag, message in list(_running.items()):
        message.channel = channel
        qos._delivered[tag] = message
        _running.pop(tag, None)
    given = 0
    for tag, message in list(_waiting.items()):
        given += _link.change(channel, functools.partial(_give_back, qos, tag, message))
        _waiting.pop(tag, None)
    if given:
        logger.warning(
            "celeryops: %s messages were not begun, or were cancelled, when the broker went; they are back", given
        )


def _say(qos: Any) -> None:
    for tag, requeue in list(_ended.items()):
        _link.change(qos.channel, functools.partial(_end, qos, tag, requeue))
        _running.pop(tag, None)
        _ended.pop(tag, None)


def _end(qos: Any, tag: str, requeue: bool, pipe: Any) -> None:
    held = pipe.hget(qos.unacked_key, tag) if requeue else None
    pipe.multi()
    qos._remove_from_indices(tag, pipe)
    if held:
        qos.channel._do_restore_message(*json.loads(held), pipe, True)


def _give_back(qos: Any, tag: str, message: Any, pipe: Any) -> bool:
    held = pipe.hget(qos.unacked_key, tag)
    # kombu's client puts its prefix before the keys of the commands that kombu itself uses.
    prefix = getattr(qos.channel, "global_keyprefix", "") or ""
    since = pipe.zscore(f"{prefix}{qos.unacked_index_key}", tag)
    pipe.multi()
    if not held or since is None or since > message.celeryops_held_since:
        return False
    qos._remove_from_indices(tag, pipe)
    qos.channel._do_restore_message(*json.loads(held), pipe)
    return True


class CarryStep(bootsteps.StartStopStep):
    requires = ("celery.worker.consumer.tasks:Tasks",)

    def start(self, consumer: Any) -> None:
        channel = consumer.task_consumer.channel
        if isinstance(channel, transport.Channel):
            settle(channel)


@signals.worker_init.connect
def _init(sender: Any, **_: Any) -> None:
    sender.app.steps["consumer"].add(CarryStep)


@signals.worker_shutdown.connect
def _last(sender: Any, **_: Any) -> None:
    if not (_ended or _waiting):
        return
    try:
        with _link.last(sender.app) as connection:
            settle(connection.default_channel)
    except Exception as exc:
        logger.critical(
            "celeryops: the broker does not answer (%s). There wait until the visibility timeout, or until"
            " celeryops.runbook.queue_rescue: not begun %s; ended, and will run again: %s",
            exc, [message.headers.get("id") for message in _waiting.values()], list(_ended),
        )  # fmt: skip


Consumer.on_connection_error_after_connected = on_loss
Consumer.on_close = on_close
transport.QoS.append = append
transport.QoS.ack = ack
transport.QoS.reject = reject
transport.QoS.restore_unacked_once = restore_unacked_once
