# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Signs every task this process sends, and lets a worker refuse what nobody signed. Inspect command celeryops_signing.

Does nothing unless CELERYOPS_SIGNING_FILE names a file of keys. Producers outside the workers only import this module.
A refused message is told as rejected, by Celery's own signal, before its body is decoded; so it becomes a dead letter.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from typing import Any

from celery import signals
from celery.exceptions import ImproperlyConfigured
from celery.worker.consumer import Consumer
from celery.worker.control import inspect_command

from ._environment import disabled
from .engine import signing

logger = logging.getLogger(__name__)


class SignatureRefused(Exception):
    """This worker runs only what an authorised sender has signed."""


_ring: signing.Ring | None = None
_refused: Counter[str] = Counter()
_passed: Counter[str] = Counter()
_create_task_handler = Consumer.create_task_handler


def _judge(ring: signing.Ring, message: Any) -> str:
    try:
        content = message.content_type, message.content_encoding
        return str(ring.judge(message.headers or {}, content, signing.raw(message.body)))
    except Exception as exc:  # what cannot be judged is not trusted
        return f"it cannot be judged: {exc!r}"


def create_task_handler(self: Any, *args: Any, **kwargs: Any) -> Any:
    handle = _create_task_handler(self, *args, **kwargs)

    def on_task_received(message: Any) -> Any:
        if _ring is None or not (reason := _judge(_ring, message)):
            return handle(message)
        if not _ring.keys().require:
            _passed[reason] += 1
            return handle(message)
        return _refuse(self, message, reason)

    return on_task_received


def _refuse(consumer: Any, message: Any, reason: str) -> None:
    _refused[reason] += 1
    headers = message.headers if isinstance(message.headers, dict) else {}
    logger.error("celeryops: task %s[%s] is refused: %s", headers.get("task"), headers.get("id"), reason)
    # First kept, then removed: a worker killed in between leaves it twice rather than nowhere.
    signals.task_rejected.send(sender=consumer, message=message, exc=SignatureRefused(reason))
    message.reject_log_error(logger, consumer.connection_errors)


@inspect_command(name=signing.COMMAND)
def celeryops_signing(state: Any) -> dict[str, Any]:
    keys = _ring.keys(now=True) if _ring else None
    return {
        "accepts": keys.ids if keys else [],
        "signs": keys.signer if keys else None,
        "require": bool(keys and keys.require),
        "refused": sum(_refused.values()),
        "passed": sum(_passed.values()),
        "problem": _ring.problem if _ring else "",
        "pid": os.getpid(),
    }


def _start() -> None:
    global _ring
    path = os.environ.get(signing.VARIABLE)
    if not path:
        return
    try:
        _ring = signing.Ring(path)
    except signing.SigningError as exc:
        raise ImproperlyConfigured(exc.msg) from None
    signing.sign_publishing(_ring)
    Consumer.create_task_handler = create_task_handler


if "signing" not in disabled():
    _start()
