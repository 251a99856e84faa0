# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""This worker leaves alone what is paused.

When it starts, reconnects or is told to consume a queue it takes not a single message from it, and it consumes it again
once it is resumed.
"""

from __future__ import annotations

from typing import Any

from celery.bootsteps import RUN
from celery.worker import control
from celery.worker.control import control_command, inspect_command

from . import _records
from .engine import pauses

EVERY = 30.0

# Queues which this worker would consume if they were not paused, with the arguments of add_consumer.
_withheld: dict[str, dict[str, Any]] = {}
_paused: dict[str, pauses.Pause] = {}


def _apply(consumer: Any, found: dict[str, pauses.Pause]) -> None:
    global _paused
    _paused = found
    queues = consumer.app.amqp.queues
    for name in [name for name in queues.consume_from if name in found]:
        consumer.cancel_task_queue(name)
        _withheld.setdefault(name, {})
    # A worker that stops takes up nothing.
    if consumer.blueprint.state == RUN:
        for name in [name for name in _withheld if name not in found]:
            _take_up(consumer, name, _withheld.pop(name))


def _take_up(consumer: Any, queue: str, options: dict[str, Any]) -> None:
    # Before 5.7 Celery does not consume a queue that was cancelled and added again after its next reconnect. This comes
    # first, for the connection may be lost in what follows.
    queues = consumer.app.amqp.queues
    if queue in queues:
        queues.select_add(queues[queue])
    consumer.add_task_queue(queue, **options)


@inspect_command(name=pauses.COMMAND)
def celeryops_pauses(state: Any) -> dict[str, Any]:
    return {"withheld": sorted(_withheld)}


@control_command(name=pauses.APPLY)
def celeryops_apply_pauses(state: Any) -> dict[str, Any]:
    # As Celery does it: gevent and eventlet answer in another greenlet than the one that consumes.
    state.consumer.call_soon(_record.look_again, state.consumer)
    return {"ok": "reading the pauses again"}


_cancel_consumer = control.Panel.data["cancel_consumer"]


def add_consumer(
    state: Any,
    queue: str,
    exchange: str | None = None,
    exchange_type: str | None = None,
    routing_key: str | None = None,
    **options: Any,
) -> Any:
    given = {"exchange": exchange, "exchange_type": exchange_type or "direct", "routing_key": routing_key, **options}
    if queue not in _paused:
        state.consumer.call_soon(_take_up, state.consumer, queue, given)
        return {"ok": f"add consumer {queue}"}
    _withheld[queue] = given
    return {"ok": f"{_paused[queue]}. It is consumed once it is resumed"}


def cancel_consumer(state: Any, queue: str, **options: Any) -> Any:
    _withheld.pop(queue, None)
    return _cancel_consumer(state, queue, **options)


control.Panel.data.update(add_consumer=add_consumer, cancel_consumer=cancel_consumer)
_record = _records.keep(_records.Record("paused queues", pauses.load, _apply, EVERY))
