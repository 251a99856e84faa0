# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What the two modules of dead letters share."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from .engine.connection import Broker
from .engine.control import Control
from .engine.deadletters import REASONS, DeadLetters, DeadSelection, dead_queue, origin_queue
from .engine.errors import PreconditionFailed, QueueUnknown
from .engine.tasks import ask_registered, queue_names, registered_names

FILTER_SPEC: dict[str, Any] = {
    "type": "dict",
    "options": {
        "tasks": {"type": "list", "elements": "str"},
        "ids": {"type": "list", "elements": "str"},
        "exceptions": {"type": "list", "elements": "str"},
        "reasons": {"type": "list", "elements": "str", "choices": list(REASONS)},
        "older_than": {"type": "float"},
        "newer_than": {"type": "float"},
    },
}


def selection(given: dict[str, Any] | None, known: Iterable[str] | None = None) -> DeadSelection:
    """The filter; an empty condition is refused, so that an empty list in a variable never selects everything."""
    found = {name: value for name, value in (given or {}).items() if value is not None}
    for name, value in found.items():
        if isinstance(value, list) and not all(value or [""]):
            raise PreconditionFailed(f"filter.{name}: is empty or names nothing. Leave it out if it is no condition.")
        if isinstance(value, float) and value < 0:
            raise PreconditionFailed(f"filter.{name}: must be 0 or more seconds, not {value:g}.")
    if given is not None and not found:
        raise PreconditionFailed(f"filter: holds no condition. Give one of {', '.join(given)}, or leave filter out.")
    return DeadSelection(
        tasks=tuple(found.get("tasks", ())),
        ids=frozenset(found.get("ids", ())),
        older_than=found.get("older_than"),
        exceptions=tuple(found.get("exceptions", ())),
        reasons=tuple(found.get("reasons", ())),
        newer_than=found.get("newer_than"),
        known=None if known is None else frozenset(known),
    )


def names(queues: Iterable[str]) -> list[str]:
    """Names of dead-letter queues, given those or the queues they belong to."""
    found = [queue if queue.endswith(".dead") else dead_queue(queue) for queue in queues]
    for queue in found:
        origin_queue(queue)
    return list(dict.fromkeys(found))


def require(dead: DeadLetters, queues: Iterable[str]) -> None:
    """An empty dead-letter queue does not exist in Redis, so the queue that it belongs to proves the name."""
    empty = {name: origin_queue(name) for name, row in dead.depth(queues).items() if not row["exists"]}
    depths, declared = dead.depth(empty.values()), dead.declared(empty.values())
    for name, origin in empty.items():
        if not depths[origin]["exists"] and origin not in declared and dead.interrupted(name) is None:
            raise QueueUnknown(
                f"queue: there is neither a queue {origin!r} nor dead letters of it. With dead letters: "
                f"{', '.join(dead.names()) or 'none'}.",
                queue=name,
            )


def known_tasks(broker: Broker, queue: str, timeout: float) -> set[str]:
    """What the workers know that consume the queue; where nobody does, all of them."""
    registered, queues = ask_registered(broker, timeout)
    return registered_names(registered, {node for node, names in queues if queue in names} or None)


def consumed(broker: Broker, timeout: float) -> list[str]:
    """The queues that workers consume."""
    with Control(broker, timeout=timeout) as control:
        asked = control.broadcast("active_queues")
    return sorted({queue for reply in asked.replies for queue in queue_names(reply.value)})
