# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""READY, STATUS and STOPPING for Type=notify units. Does nothing without NOTIFY_SOCKET."""

from __future__ import annotations

from typing import Any

from celery import bootsteps
from celery.signals import worker_init, worker_ready, worker_shutting_down

from . import _link, _sdnotify
from ._environment import disabled, release

_last_status = ""
_stopping = False


def status_line(consumer: Any) -> str:
    if not _link.connected:
        doing = "waiting for the broker"
    else:
        queues = sorted(consumer.app.amqp.queues.consume_from)
        doing = "consuming " + ", ".join(queues) if queues else "consuming no queue"
    return f"STATUS={consumer.hostname}, release {release() or 'unknown'}, {doing}"


def refresh(consumer: Any) -> None:
    """Send STATUS if it differs from what systemd knows."""
    global _last_status
    status = status_line(consumer)
    if status != _last_status and not _stopping and _sdnotify.send(status):
        _last_status = status


def _stop(**_: Any) -> None:
    global _stopping
    if not _stopping:
        _stopping = True
        _sdnotify.send("STOPPING=1", "STATUS=finishing the running tasks")


def _ready(sender: Any, **_: Any) -> None:
    global _last_status
    _last_status = status_line(sender)
    _sdnotify.send("READY=1", _last_status)


class StoppingStep(bootsteps.StartStopStep):
    """Signals tell of SIGTERM and SIGQUIT only; a remote shutdown is first seen here."""

    def close(self, worker: Any) -> None:
        _stop()


def _init(sender: Any, **_: Any) -> None:
    sender.app.steps["worker"].add(StoppingStep)


if _sdnotify.configured() and "notify" not in disabled():
    worker_init.connect(_init)
    worker_ready.connect(_ready)
    worker_shutting_down.connect(_stop)
