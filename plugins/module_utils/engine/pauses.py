# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Queues that nobody shall consume for now: a record in the broker which every worker obeys, whenever it starts."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from typing import Any

from .connection import RedisStore
from .errors import PreconditionFailed
from .records import time_text

# Inspect command: what this worker does not consume because it is paused. Control command: look at the record now.
COMMAND = "celeryops_pauses"
APPLY = "celeryops_apply_pauses"
_AHEAD = re.compile(r"\+(\d+)([smhd])")
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


@dataclass(frozen=True)
class Pause:
    """Why a queue rests. Times are unix seconds; no `until`: nobody said how long; no `since`: it is unreadable."""

    queue: str
    by: str
    why: str
    since: float
    until: float | None = None

    def overdue(self, now: float) -> bool:
        return self.until is not None and now > self.until

    def as_dict(self, now: float) -> dict[str, object]:
        return {**asdict(self), "overdue": self.overdue(now)}

    def __str__(self) -> str:
        if not self.since:
            return f"queue {self.queue} is paused, {self.why}"
        end = f", until {time_text(self.until)}" if self.until is not None else ""
        return f"queue {self.queue} is paused by {self.by} since {time_text(self.since)}{end}: {self.why}"


def pauses_key(key_prefix: str) -> str:
    return f"{key_prefix}celeryops:pauses"


def load(store: RedisStore) -> dict[str, Pause]:
    found = store.redis.hgetall(pauses_key(store.key_prefix))
    return {name: parse(name, raw) for name, raw in sorted((key.decode(errors="replace"), found[key]) for key in found)}


def view(store: RedisStore) -> dict[str, dict[str, object]]:
    """The pauses for people and programs, each with whether its time is over."""
    found = load(store)
    now = now_of(store) if found else 0.0
    return {queue: pause.as_dict(now) for queue, pause in found.items()}


def parse(queue: str, raw: bytes) -> Pause:
    """An entry that cannot be read pauses its queue too: somebody wanted that, and it is seen."""
    try:
        value = json.loads(raw)
        until = value.get("until")
        return Pause(
            queue,
            str(value["by"]),
            str(value["why"]),
            float(value["since"]),
            None if until is None else float(until),
        )
    except (ValueError, TypeError, KeyError, AttributeError):
        return Pause(queue, "", "by an entry that is no pause of this collection: pause it again, or resume it", 0.0)


def save(store: RedisStore, wanted: Mapping[str, Pause | None]) -> None:
    """Write these pauses, or remove where there is None; others stay as they are."""
    key = pauses_key(store.key_prefix)
    pipe = store.redis.pipeline(transaction=True)
    for queue, pause in wanted.items():
        if pause is None:
            pipe.hdel(key, queue)
        else:
            pipe.hset(key, queue, json.dumps(asdict(pause)))
    pipe.execute()


def withheld(replies: Mapping[str, Any]) -> list[str]:
    """The queues a node leaves alone while they are paused; none where it obeys no pause."""
    told = replies.get(COMMAND)
    return [str(queue) for queue in told.get("withheld") or ()] if isinstance(told, dict) else []


def now_of(store: RedisStore) -> float:
    seconds, micros = store.redis.time()
    return float(seconds) + float(micros) / 1e6


def parse_until(text: str, now: float) -> float:
    """A time such as 2026-11-21T18:00:00Z, or from now on such as +90m."""
    ahead = _AHEAD.fullmatch(text)
    if ahead:
        return now + int(ahead[1]) * _SECONDS[ahead[2]]
    try:
        moment = datetime.fromisoformat(re.sub(r"[zZ]$", "+00:00", text))
    except ValueError:
        raise PreconditionFailed(
            f"until: {text!r} is no time. Write it as 2026-11-21T18:00:00Z, or from now on as +90m, +2h or +1d."
        ) from None
    seconds = (moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)).timestamp()
    if seconds <= now:
        raise PreconditionFailed(f"until: {text} is over. Give a time to come.")
    return seconds


def next_pause(held: Pause | None, queue: str, by: str, why: str, until: float | None, now: float) -> Pause:
    """The record that must stand there. What is not given stays; who began, and when, stays in any case."""
    if held is None:
        if not why:
            raise PreconditionFailed(f"why: say why queue {queue} is paused; whoever finds it so will want to know.")
        return Pause(queue, by, why, now, until)
    if not held.since:
        return Pause(queue, by, why or "not said", now, until)
    return Pause(queue, held.by, why or held.why, held.since, held.until if until is None else until)


def plan(
    held: Mapping[str, Pause],
    queues: Sequence[str],
    *,
    paused: bool,
    by: str,
    why: str,
    until: float | None,
    now: float,
) -> dict[str, Pause | None]:
    """What is to be written; nothing where all is as wanted."""
    if not paused:
        return {queue: None for queue in queues if queue in held}
    wanted = {queue: next_pause(held.get(queue), queue, by, why, until, now) for queue in queues}
    return {queue: pause for queue, pause in wanted.items() if pause != held.get(queue)}
