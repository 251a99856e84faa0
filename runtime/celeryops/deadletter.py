# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Keeps what fails for good, the whole message, in QUEUE.dead. Inspect command celeryops_dead_letters: how many.

The main process of a worker has the message as it came and learns how each task ended, whatever the pool. There a
failure is only noted; a thread with a connection of its own sends it on and tries again while the broker is away.
"""

from __future__ import annotations

import collections
import contextlib
import itertools
import logging
import os
import threading
import time
from collections.abc import Iterator
from typing import Any

from celery.exceptions import Ignore, NotRegistered, Reject, Retry, Terminated, TimeLimitExceeded, WorkerLostError
from celery.signals import celeryd_after_setup, task_failure, task_rejected, task_unknown, worker_shutdown
from celery.utils.serialization import get_pickled_exception
from celery.worker.consumer import Consumer
from celery.worker.control import inspect_command
from celery.worker.request import Request

from ._environment import release
from .engine import deadletters

logger = logging.getLogger(__name__)

HELD_MOST = 10_000
HELD_BYTES = 64 << 20
FLUSH_SECONDS = 5.0
_BATCH = 100
_TRIES = 5
_TEXT = 2_000
_TRACEBACK = 16_000


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, "")
    if not text:
        return default
    if not text.isdigit() or int(text) < 1:
        raise ValueError(f"{name}: {text!r} is no whole number above 0")
    return int(text)


MOST = _number("CELERYOPS_DEAD_LETTER_MAX", deadletters.MOST)
MOST_AGE = _number("CELERYOPS_DEAD_LETTER_MAX_AGE", deadletters.MOST_AGE)

_current = threading.local()
_node = ""


class _Sender:
    """Holds the letters that are not in the broker yet, within bounds, and sends them from a thread of its own."""

    def __init__(self) -> None:
        self.caught = self.sent = self.lost = 0
        self._held: collections.deque[deadletters.Letter] = collections.deque()
        self._bytes = 0
        self._more = threading.Condition()
        self._thread: threading.Thread | None = None
        self._app: Any = None
        self._stopping = False

    def put(self, app: Any, letter: deadletters.Letter) -> None:
        with self._more:
            self.caught += 1
            if self._stopping:
                self._lose(letter, "the worker ends")
                return
            if len(self._held) >= HELD_MOST or self._bytes + letter.size > HELD_BYTES:
                self._lose(letter, "too many wait for the broker")
                return
            self._app = app
            self._held.append(letter)
            self._bytes += letter.size
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="celeryops-deadletter", daemon=True)
                self._thread.start()
            self._more.notify_all()

    def waiting(self) -> int:
        return len(self._held)

    def flush(self, seconds: float) -> None:
        """Wait until all are sent, not longer than this; name what is left."""
        deadline = time.monotonic() + seconds
        with self._more:
            while self._held and time.monotonic() < deadline:
                self._more.wait(0.1)
            self._stopping = True
            for letter in self._held:
                self._lose(letter, "the broker is away and the worker ends")
            self._held.clear()

    def _lose(self, letter: deadletters.Letter, why: str) -> None:
        self.lost += 1
        logger.error("celeryops: dead letter of task %s is lost: %s", letter.identity, why)

    def _work(self) -> None:
        pause = 0.0
        connection = None
        while not self._stopping:
            with self._more:
                if not self._held:
                    self._more.wait(60)
                    continue
                batch = list(itertools.islice(self._held, _BATCH))
            try:
                if connection is None:
                    connection = _connect(self._app)
                problems = deadletters.deliver(connection, batch, MOST, MOST_AGE)
            except Exception as exc:  # whatever happens here must not reach the worker
                problems = [exc] * len(batch)
                if not isinstance(exc, _away(connection)):
                    batch[0].tries += 1
            failed = self._account(batch, problems)
            if failed is None:
                pause = 0.0
                continue
            if not pause:
                letter, problem = failed
                logger.warning("celeryops: dead letter of task %s waits for the broker: %r", letter.identity, problem)
            _close(connection)
            connection = None
            pause = min(10.0, pause * 2 or 0.25)
            time.sleep(pause)
        _close(connection)

    def _account(
        self, batch: list[deadletters.Letter], problems: list[Exception | None]
    ) -> tuple[deadletters.Letter, Exception] | None:
        """Drop what is sent, and what the broker refuses again and again; the first that has to wait."""
        first = None
        left = []
        with self._more:
            for letter, problem in zip(batch, problems, strict=True):
                if self._held and self._held[0] is letter:
                    self._held.popleft()
                    self._bytes -= letter.size
                else:
                    break  # the flush was over first
                if problem is None:
                    self.sent += 1
                elif letter.tries >= _TRIES:
                    self._lose(letter, repr(problem))
                else:
                    left.append(letter)
                    first = first or (letter, problem)
            self._held.extendleft(reversed(left))
            self._bytes += sum(letter.size for letter in left)
            self._more.notify_all()
        return first


_sender = _Sender()


def _connect(app: Any) -> Any:
    connection = app.connection_for_write(connect_timeout=3)
    options = dict(connection.transport_options or {})
    if connection.transport.driver_type == "redis":
        options.update(socket_timeout=5, socket_connect_timeout=3)
    else:
        options.update(confirm_publish=True)
    connection.transport_options = options
    return connection


def _away(connection: Any) -> tuple[type[BaseException], ...]:
    """What says that the broker is away, and nothing about the letter."""
    return (OSError, *(connection.connection_errors if connection is not None else (Exception,)))


def _close(connection: Any) -> None:
    if connection is not None:
        try:
            connection.release()
        except Exception:
            logger.debug("celeryops: closing the connection for dead letters", exc_info=True)


def _queue_of(app: Any, exchange: str, routing_key: str) -> str:
    """The queue that a message came from: through the default exchange the routing key names it."""
    if not exchange:
        return routing_key
    bound = [queue for queue in app.amqp.queues.consume_from.values() if queue.exchange.name == exchange]
    exact = [queue.name for queue in bound if queue.routing_key == routing_key]
    return str(exact[0] if exact else bound[0].name if len(bound) == 1 else routing_key)


@contextlib.contextmanager
def _harmless(what: Any) -> Iterator[None]:
    """The task's own path goes on, whatever happens here."""
    try:
        yield
    except Exception:
        logger.exception("celeryops: no dead letter could be made of %r", what)


def _keep(app: Any, message: Any, reason: str, exc: BaseException | None, traceback: str, identity: Any = None) -> None:
    """Note one failure; everything that takes time is left to the thread."""
    with _harmless(message):
        info = message.delivery_info or {}
        exchange, routing_key = info.get("exchange") or "", info.get("routing_key") or ""
        exc = get_pickled_exception(exc) if exc is not None else None
        name = getattr(exc, "exc_cls_name", None) or (type(exc).__name__ if exc is not None else "")
        priority = (message.properties or {}).get("priority")
        record = deadletters.Record(
            time=time.time(),
            reason=reason,
            exception=str(name),
            text=str(exc)[:_TEXT],
            traceback=str(traceback)[-_TRACEBACK:],
            node=_node,
            queue=_queue_of(app, exchange, routing_key),
            exchange=exchange,
            routing_key=routing_key,
            priority=priority if isinstance(priority, int) else None,
            release=release(),
        )
        identity = str(identity or (message.headers or {}).get("id"))
        _sender.put(app, deadletters.Letter.of(message, record, identity))


def _is_own(task: str) -> bool:
    return task.startswith("celeryops.")


_on_failure, _on_timeout, _reject = Request.on_failure, Request.on_timeout, Request.reject
_on_decode_error = Consumer.on_decode_error


def on_failure(self: Any, exc_info: Any, *args: Any, **kwargs: Any) -> Any:
    _current.failed = False
    try:
        return _on_failure(self, exc_info, *args, **kwargs)
    except BaseException:
        _current.failed = True  # the result backend may be away too
        raise
    finally:
        with _harmless(self):
            _ended(self, exc_info)


def _ended(request: Any, exc_info: Any) -> None:
    exc = exc_info.exception
    exc = getattr(exc, "exc", exc) if type(exc).__name__ == "ExceptionWithTraceback" else exc
    lost = isinstance(exc, (WorkerLostError, SystemExit, KeyboardInterrupt))
    if isinstance(exc, (Retry, Terminated)) or (isinstance(exc, Ignore) and not isinstance(exc, Reject)):
        return
    # A lost process may have ended its task before, or the task is sent again: Celery tells by this signal.
    if lost and not _current.failed:
        return
    reason = (
        "rejected" if isinstance(exc, Reject)
        else "time_limit" if isinstance(exc, TimeLimitExceeded)
        else "worker_lost" if lost
        else "exception"
    )  # fmt: skip
    _final(request, reason, exc, exc_info.traceback or "")


def on_timeout(self: Any, soft: bool, timeout: float) -> Any:
    try:
        return _on_timeout(self, soft, timeout)
    finally:
        if not soft:
            with _harmless(self):
                _final(self, "time_limit", TimeLimitExceeded(timeout), "")


def reject(self: Any, requeue: bool = False) -> Any:
    if requeue and not self.acknowledged:
        self._celeryops_goes_back = True
    return _reject(self, requeue=requeue)


def _final(request: Any, reason: str, exc: BaseException, traceback: str) -> None:
    """Keep the message unless it goes back to its queue: rejected to it, or not acknowledged."""
    if getattr(request, "_celeryops_goes_back", False) or not request.acknowledged or _is_own(request.name):
        return
    if not getattr(request, "_celeryops_kept", False):
        request._celeryops_kept = True
        _keep(request.app, request.message, reason, exc, traceback, request.id)


@task_failure.connect
def _failed(**_: Any) -> None:
    _current.failed = True


@task_unknown.connect
def _unknown(sender: Any, message: Any, name: str = "", id: str = "", **_: Any) -> None:
    if not _is_own(str(name)):
        # Celery hands on the KeyError of its look-up.
        _keep(sender.app, message, "unknown_task", NotRegistered(name), "", id)


@task_rejected.connect
def _rejected(sender: Any, message: Any, exc: Any = None, **_: Any) -> None:
    _keep(sender.app, message, "rejected", exc, "")


def on_decode_error(self: Any, message: Any, exc: Exception) -> Any:
    """Celery acknowledges what it cannot decode and sends no signal."""
    try:
        return _on_decode_error(self, message, exc)
    finally:
        _keep(self.app, message, "rejected", exc, "")


@celeryd_after_setup.connect
def _name(sender: str = "", **_: Any) -> None:
    global _node
    _node = sender


@worker_shutdown.connect
def _flush(**_: Any) -> None:
    _sender.flush(FLUSH_SECONDS)


@inspect_command(name=deadletters.COMMAND)
def celeryops_dead_letters(state: Any) -> dict[str, Any]:
    return {"pid": os.getpid(), "caught": _sender.caught, "sent": _sender.sent, "waiting": _sender.waiting(),
            "lost": _sender.lost}  # fmt: skip


Request.on_failure, Request.on_timeout, Request.reject = on_failure, on_timeout, reject
Consumer.on_decode_error = on_decode_error
