# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Where tasks are now: waiting in a queue, held or run by a worker, or held by nobody alive."""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from .connection import Broker
from .control import Control
from .deadletters import SUFFIX
from .errors import BadMessage, PreconditionFailed
from .fleet import observe
from .message import Envelope, identify
from .queues import RedisQueues

# What a worker says of a task, the surest first: a task that begins meanwhile may be in two answers.
PLACES = {"active": "running", "scheduled": "scheduled", "reserved": "reserved"}


@dataclass(frozen=True)
class Wanted:
    """Which tasks. Every given condition must hold; ids and names are lists of alternatives."""

    ids: frozenset[str] = frozenset()
    names: tuple[str, ...] = ()
    args: Sequence[Any] | None = None
    kwargs: Mapping[str, Any] | None = None
    exact: bool = False  # exactly these arguments, not only these first ones and these names

    def check(self) -> None:
        if not (self.ids or self.names):
            raise PreconditionFailed(
                "give ids or names: arguments alone would match tasks of every kind, and no condition all of them."
            )
        if not all(item.strip() for item in (*self.ids, *self.names)):
            raise PreconditionFailed("ids, names: must not hold an empty text.")

    def identity(self, name: str, task_id: str) -> bool:
        return (not self.ids or task_id in self.ids) and (
            not self.names or any(name == one or fnmatch.fnmatchcase(name, one) for one in self.names)
        )

    @property
    def by_arguments(self) -> bool:
        return self.args is not None or self.kwargs is not None

    def arguments(self, args: Any, kwargs: Any) -> bool:
        """Whether the arguments fit, compared as JSON has them."""
        if not isinstance(args, (list, tuple)) or not isinstance(kwargs, Mapping):
            return False
        have, named = _plain(args), _plain(kwargs)
        first, some = _plain(self.args or []), _plain(self.kwargs or {})
        if self.exact:
            return bool(have == first and named == some)
        return bool(have[: len(first)] == first and all(key in named and named[key] == some[key] for key in some))


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value, default=str))


@dataclass(frozen=True)
class Found:
    task_id: str
    name: str
    place: str  # queued, running, scheduled, reserved, unowned, dead
    queue: str | None = None
    node: str | None = None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class Search:
    """What a search found. `unjudged` are tasks whose name fits and whose arguments cannot be read."""

    found: dict[str, Found] = field(default_factory=dict)
    unjudged: int = 0
    workers: list[str] = field(default_factory=list)
    silent: int = 0  # connected nodes that did not answer
    scanned: int = 0

    def at(self, *places: str) -> list[Found]:
        return [item for item in self.found.values() if item.place in places]


def search(
    broker: Broker,
    control: Control,
    wanted: Wanted,
    *,
    queues: Sequence[str] | None = None,
    most: int = 50_000,
    dead: bool = False,
) -> Search:
    """Queues first, workers last: a task that moves on meanwhile is seen at its later place. Dead letters, which wait
    for nobody, only with `dead`."""
    wanted.check()
    result = Search()
    held: dict[str, Found] = {}
    if broker.kind == "redis":
        redis_queues = RedisQueues.of(broker)
        names = redis_queues.queues() if queues is None else queues
        letters = [name for name in names if queues is None and name.endswith(SUFFIX)]
        for queue in [*(letters if dead else ()), *(name for name in names if name not in letters)]:
            place = "dead" if queue in letters else "queued"
            for raw in redis_queues.messages(queue):
                _note(result.found, _judged(raw, wanted, result), place, queue, most)
        for queue, document in _unacked(broker):
            _note(held, _judged(document, wanted, result), "unowned", queue, most)
    fleet = observe(control, [(command, {}) for command in PLACES])
    result.workers, result.silent = fleet.workers, fleet.silent_count
    for command, place in PLACES.items():
        for node in fleet.workers:
            for item in fleet.nodes[node].replies.get(command) or ():
                request = item.get("request") or item
                name, task_id = str(request.get("name") or request.get("type")), str(request.get("id"))
                seen = result.found.get(task_id)
                if not wanted.identity(name, task_id) or (seen is not None and seen.place in PLACES.values()):
                    continue
                if wanted.by_arguments and not wanted.arguments(request.get("args"), request.get("kwargs")):
                    continue
                came_from = (request.get("delivery_info") or {}).get("routing_key")
                result.found[task_id] = Found(task_id, name, place, came_from, node)
    # Held by somebody and shown by nobody: its worker is dead or silent, and it will come back.
    for task_id, item in held.items():
        result.found.setdefault(task_id, item)
    return result


def _judged(raw: Any, wanted: Wanted, result: Search) -> tuple[str, str] | None:
    """Name and id of a message that fits, else None."""
    result.scanned += 1
    try:
        if isinstance(raw, bytes):
            name, task_id = identify(raw)
            if not wanted.identity(name, task_id):
                return None
            if not wanted.by_arguments:
                return name, task_id
        envelope = Envelope.parse(raw) if isinstance(raw, bytes) else Envelope.of(raw)
    except BadMessage:
        return None
    if not wanted.identity(envelope.task, envelope.id):
        return None
    if wanted.by_arguments:
        arguments = envelope.arguments()
        if arguments is None:
            result.unjudged += 1
            return None
        if not wanted.arguments(*arguments):
            return None
    return envelope.task, envelope.id


def _note(found: dict[str, Found], hit: tuple[str, str] | None, place: str, queue: str, most: int) -> None:
    if hit is None:
        return
    found[hit[1]] = Found(hit[1], hit[0], place, queue)
    if len(found) > most:
        raise PreconditionFailed(
            f"more than {most} tasks fit. Name them more narrowly, or purge the queue {queue} with redis_queue.",
            queue=queue,
        )


def _unacked(broker: Broker) -> Iterator[tuple[str, Any]]:
    """(routing key, message) of everything that was fetched and not acknowledged."""
    for _tag, raw in broker.redis.hscan_iter(broker.key_prefix + broker.unacked_key, count=200):
        try:
            document, _exchange, routing_key = json.loads(raw)
        except (ValueError, TypeError):
            continue
        yield str(routing_key), document
