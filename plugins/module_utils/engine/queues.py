# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Queues as kombu keeps them in Redis: one list per queue and priority step, consumed from its right end.

Operations that remove messages first take them aside: RENAME to lists of our own, in one transaction, where no
worker reads. Every later step is one script that checks our lock and moves whole messages between lists, so at any
moment each message is in exactly one list (or in a file that is complete). What a killed run leaves aside is found
by the next run, which finishes the operation if its file is in place and puts the messages back otherwise.
"""

from __future__ import annotations

import contextlib
import fnmatch
import itertools
import json
import os
import socket
import threading
import time
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any, TypeVar

from . import savefile
from .errors import (
    BadMessage,
    CeleryOpsError,
    LockHeld,
    PreconditionFailed,
    QueueUnknown,
    UnknownLayout,
    WrongType,
)
from .message import Envelope, Rerouter, identify, published

LOCK_TTL = 60
IMPORT_MARKER_TTL = 30 * 86400
REPLY_KEY_IDLE = 600
BATCH = 500
# Ages shown before messages are removed: the bound in seconds and what is below it.
_AGES = ((60.0, "minute"), (3600.0, "hour"), (86400.0, "day"), (float("inf"), "older"))
_BATCH_BYTES = 1 << 20
# Lists of our own beside a queue, from the next to be consumed to the newest.
_PARTS = ("odd", "picked", "kept", "scan")
_CONTROL_EXCHANGES = ("celery.pidbox", "reply.celery.pidbox", "celeryev")

_GUARD = """
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return redis.error_reply('CELERYOPS lock lost') end
redis.call('PEXPIRE', KEYS[1], ARGV[2])
"""

_DEPTH = """
local steps, out = tonumber(ARGV[4]), {}
for i = 5 + steps, #ARGV do
  local row = {}
  for s = 5, 4 + steps do
    local n = redis.pcall('LLEN', ARGV[1] .. ARGV[i] .. ARGV[s])
    if type(n) == 'table' then n = '!' .. redis.call('TYPE', ARGV[1] .. ARGV[i] .. ARGV[s]).ok end
    row[#row + 1] = n
  end
  row[#row + 1] = redis.call('EXISTS', ARGV[2] .. ARGV[i] .. ARGV[3])
  out[#out + 1] = table.concat(row, ',')
end
return table.concat(out, ';')
"""

# KEYS lock record (source aside)...   ARGV token ttl (field value)...
_ASIDE = (
    _GUARD
    + """
if redis.call('EXISTS', KEYS[2]) == 1 then return redis.error_reply('CELERYOPS record exists') end
for i = 3, #KEYS, 2 do
  local kind = redis.call('TYPE', KEYS[i]).ok
  if kind ~= 'list' and kind ~= 'none' then return redis.error_reply('CELERYOPS foreign type') end
  if redis.call('EXISTS', KEYS[i + 1]) == 1 then
    return redis.error_reply('CELERYOPS ' .. KEYS[i + 1] .. ' holds messages and no record tells of which operation')
  end
end
for i = 3, #ARGV, 2 do redis.call('HSET', KEYS[2], ARGV[i], ARGV[i + 1]) end
local counts = {}
for i = 3, #KEYS, 2 do
  counts[#counts + 1] = redis.call('LLEN', KEYS[i])
  if counts[#counts] > 0 then redis.call('RENAME', KEYS[i], KEYS[i + 1]) end
end
return counts
"""
)

# KEYS lock record   ARGV token ttl (field value)...
_NOTE = _GUARD + "for i = 3, #ARGV, 2 do redis.call('HSET', KEYS[2], ARGV[i], ARGV[i + 1]) end return 1"

# The n next to be consumed.   KEYS lock source target   ARGV token ttl n
_SHIFT = (
    _GUARD
    + """
local batch = redis.call('LRANGE', KEYS[2], -tonumber(ARGV[3]), -1)
local n = #batch
if n == 0 then return 0 end
for i = 1, math.floor(n / 2) do batch[i], batch[n + 1 - i] = batch[n + 1 - i], batch[i] end
redis.call('LPUSH', KEYS[3], unpack(batch))
redis.call('LTRIM', KEYS[2], 0, -n - 1)
return n
"""
)

# Makes `newer` hold newer followed by older; moves the shorter one.   KEYS lock older newer   ARGV token ttl n
_JOIN = (
    _GUARD
    + """
local older, newer, n = redis.call('LLEN', KEYS[2]), redis.call('LLEN', KEYS[3]), tonumber(ARGV[3])
if older == 0 then return 0 end
if newer < older then
  if newer > 0 then
    local batch = redis.call('LRANGE', KEYS[3], -n, -1)
    local m = #batch
    for i = 1, math.floor(m / 2) do batch[i], batch[m + 1 - i] = batch[m + 1 - i], batch[i] end
    redis.call('LPUSH', KEYS[2], unpack(batch))
    redis.call('LTRIM', KEYS[3], 0, -m - 1)
    if m < newer then return 1 end
  end
  redis.call('RENAME', KEYS[2], KEYS[3])
  return 0
end
local batch = redis.call('LRANGE', KEYS[2], 0, n - 1)
redis.call('RPUSH', KEYS[3], unpack(batch))
redis.call('LTRIM', KEYS[2], #batch, -1)
if #batch == older then return 0 end
return 1
"""
)

# Sorts the n next to be consumed into picked and kept, by a given bitmap or by names already judged. Returns -1 and
# does nothing when it meets a message it cannot judge.
# KEYS lock scan kept picked   ARGV token ttl n bitmap limit judged
_PARTITION = (
    _GUARD
    + """
local batch = redis.call('LRANGE', KEYS[2], -tonumber(ARGV[3]), -1)
local bitmap, limit = ARGV[4], tonumber(ARGV[5])
local judged = bitmap == '' and cjson.decode(ARGV[6])
local find, sub = string.find, string.sub
local kept, picked, counts, done, k, p = {}, {}, {}, 0, 0, 0
local head = '", "content-encoding": "utf-8", "content-type": "application/json", "headers": {"lang": "py", "task": "'
for i = #batch, 1, -1 do
  if p == limit then break end
  local raw, hit = batch[i], nil
  if judged then
    if sub(raw, 1, 10) ~= '{"body": "' then return {-1} end
    local at = find(raw, '"', 11, true)
    if not at or sub(raw, at, at + #head - 1) ~= head then return {-1} end
    at = at + #head
    local stop = find(raw, '"', at, true)
    if not stop or sub(raw, stop, stop + 9) ~= '", "id": "' then return {-1} end
    if sub(raw, stop + 10, stop + 10) == '"' then return {-1} end
    local name = sub(raw, at, stop - 1)
    hit = judged[name]
    if hit == nil then return {-1} end
    if hit == 1 then counts[name] = (counts[name] or 0) + 1 end
  else
    hit = tonumber(sub(bitmap, done + 1, done + 1))
  end
  done = done + 1
  if hit == 1 then
    p = p + 1
    picked[p] = raw
  else
    k = k + 1
    kept[k] = raw
  end
end
if #kept > 0 then redis.call('LPUSH', KEYS[3], unpack(kept)) end
if #picked > 0 then redis.call('LPUSH', KEYS[4], unpack(picked)) end
if done > 0 then redis.call('LTRIM', KEYS[2], 0, -done - 1) end
return {done, #picked, cjson.encode(counts)}
"""
)

# Many messages travel as one argument and their lengths: redis-py sends every large argument by itself.
_SPLIT = """
local function split(lengths, text)
  local list, at, n = {}, 1, 0
  for length in string.gmatch(lengths, '%d+') do
    n = n + 1
    list[n] = string.sub(text, at, at + length - 1)
    at = at + length
  end
  return list, n
end
"""

# KEYS lock source target odd   ARGV token ttl taken (lengths of good) good (lengths of odd) odd
_REROUTE = (
    _GUARD
    + _SPLIT
    + """
local good, n = split(ARGV[4], ARGV[5])
if n > 0 then redis.call('LPUSH', KEYS[3], unpack(good)) end
local odd, m = split(ARGV[6], ARGV[7])
if m > 0 then redis.call('LPUSH', KEYS[4], unpack(odd)) end
redis.call('LTRIM', KEYS[2], 0, -tonumber(ARGV[3]) - 1)
return n
"""
)

# KEYS lock target   ARGV token ttl LPUSH|RPUSH lengths messages
_LOAD = _GUARD + _SPLIT + "return redis.call(ARGV[3], KEYS[2], unpack((split(ARGV[4], ARGV[5]))))"

# KEYS lock record (list)...   ARGV token ttl
_FINISH = (
    _GUARD
    + """
for i = 3, #KEYS do redis.call('UNLINK', KEYS[i]) end
return redis.call('DEL', KEYS[2])
"""
)

# `done` becomes the note of which messages of the file are imported. A value says that all are.
# KEYS lock record marker done noted   ARGV token ttl value seconds
_FINISH_IMPORT = (
    _GUARD
    + """
if ARGV[3] ~= '' then
  redis.call('SET', KEYS[3], ARGV[3], 'EX', ARGV[4])
  redis.call('UNLINK', KEYS[4], KEYS[5])
elseif redis.call('EXISTS', KEYS[4]) == 1 then
  redis.call('RENAME', KEYS[4], KEYS[5])
  redis.call('EXPIRE', KEYS[5], ARGV[4])
end
return redis.call('DEL', KEYS[2])
"""
)

_KEEP = _GUARD + "return 1"

# KEYS (list)...   ARGV idle
_SWEEP = """
local gone = 0
for _, key in ipairs(KEYS) do
  if redis.call('TYPE', key).ok == 'list' and redis.call('OBJECT', 'IDLETIME', key) > tonumber(ARGV[1]) then
    gone = gone + redis.call('UNLINK', key)
  end
end
return gone
"""

_RELEASE = "if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('DEL', KEYS[1]) end return 0"


@dataclass(frozen=True)
class Selection:
    """Which messages: every given condition must hold. Empty means all."""

    tasks: tuple[str, ...] = ()
    ids: frozenset[str] = frozenset()
    older_than: float | None = None
    args: Sequence[Any] | None = None  # the first positional arguments
    kwargs: Mapping[str, Any] | None = None  # some keyword arguments

    def __bool__(self) -> bool:
        return bool(self.tasks or self.ids) or self.older_than is not None or self.by_arguments

    @property
    def by_arguments(self) -> bool:
        return self.args is not None or self.kwargs is not None

    @property
    def by_task_only(self) -> bool:
        return bool(self.tasks) and not self.ids and self.older_than is None and not self.by_arguments

    def has_task(self, name: str) -> bool:
        return not self.tasks or any(name == task or fnmatch.fnmatchcase(name, task) for task in self.tasks)

    def judge(self, raw: bytes, now: float) -> tuple[bool, str, bool]:
        """(wanted, task name, age unknown); BadMessage for what cannot be read."""
        if self.older_than is None and not self.by_arguments:
            task, identity = identify(raw)
            return self.has_task(task) and (not self.ids or identity in self.ids), task, False
        envelope = Envelope.parse(raw)
        wanted, undated = self.judge_envelope(envelope, now)
        return wanted, envelope.task, undated

    def judge_envelope(self, envelope: Envelope, now: float) -> tuple[bool, bool]:
        """(wanted, age unknown) of a message that is read already; BadMessage if its arguments cannot be."""
        if not self.has_task(envelope.task) or (self.ids and envelope.id not in self.ids):
            return False, False
        if self.by_arguments and not envelope.has_arguments(self.args, self.kwargs):
            return False, False
        if self.older_than is None:
            return True, False
        if envelope.published is None:
            return False, True
        return now - envelope.published >= self.older_than, False


@dataclass
class Names:
    """Waiting messages of one queue by task name."""

    tasks: dict[str, int] = field(default_factory=dict)
    undecodable: int = 0
    unknown_age: int = 0
    scanned: int = 0
    complete: bool = True
    count: int = 0
    ages: dict[str, dict[str, int]] = field(default_factory=dict)


@dataclass
class Outcome:
    """What one operation did, or would do."""

    operation: str
    queue: str
    count: int = 0
    tasks: dict[str, int] | None = None
    ages: dict[str, dict[str, int]] | None = None
    by_priority: dict[str, int] = field(default_factory=dict)
    undecodable: int = 0
    unknown_age: int = 0
    path: str | None = None
    save_id: str | None = None
    sha256: str | None = None
    bytes: int | None = None
    already_imported: str | None = None
    recovered: dict[str, Any] | None = None
    elapsed: float = 0.0

    def traces(self) -> dict[str, Any]:
        """For a result: the file that was written or read, and an interrupted operation that was found; if any."""
        found: dict[str, Any] = {}
        if self.save_id is not None:
            found["saved"] = {"path": self.path, "id": self.save_id, "sha256": self.sha256, "bytes": self.bytes}
        if self.recovered is not None:
            found["recovered"] = self.recovered
        return found


@dataclass
class _Lock:
    key: str
    value: str
    kept: float


class _Pace:
    """How many messages a batch may have, so that no batch keeps Redis busy for long."""

    def __init__(self, most: int, average: float = 0.0) -> None:
        self._most = most
        self._average = average

    def seen(self, batch: Sequence[bytes]) -> None:
        if batch:
            self._average = max(sum(map(len, batch)) / len(batch), self._average * 0.5)

    def size(self) -> int:
        return max(1, min(self._most, int(_BATCH_BYTES / self._average))) if self._average else min(self._most, 50)


_Queues = TypeVar("_Queues", bound="RedisQueues")


class RedisQueues:
    """The queues of one Redis database and key prefix."""

    def __init__(
        self,
        client: Any,
        key_prefix: str = "",
        steps: Sequence[int] = (0, 3, 6, 9),
        sep: str = "\x06\x16",
        unacked_key: str = "unacked",
        unacked_index_key: str = "unacked_index",
        *,
        db: int = 0,
        address: str = "",
        batch_size: int = BATCH,
    ) -> None:
        self.client = client
        self.key_prefix = key_prefix
        self.steps = tuple(steps)
        self.sep = sep
        self.unacked_key = key_prefix + unacked_key
        self.unacked_index_key = key_prefix + unacked_index_key
        self.db = db
        self.address = address
        self.batch_size = batch_size
        self._scripts: dict[str, Any] = {}

    @classmethod
    def of(cls: type[_Queues], broker: Any, batch_size: int = BATCH) -> _Queues:
        return cls(
            broker.redis,
            broker.key_prefix,
            broker.priority_steps,
            broker.sep,
            broker.unacked_key,
            broker.unacked_index_key,
            db=broker.db,
            address=broker.spec.address,
            batch_size=batch_size,
        )

    # Names

    def _suffix(self, step: int) -> str:
        return f"{self.sep}{step}" if step else ""

    def key(self, queue: str, step: int) -> str:
        return f"{self.key_prefix}{queue}{self._suffix(step)}"

    def _own(self, queue: str, part: str, step: int | None = None) -> str:
        end = "" if step is None else f":{step}"
        return f"{self.key_prefix}celeryops:queue:{queue}:{part}{end}"

    def _marker(self, identity: str) -> str:
        return f"{self.key_prefix}celeryops:imported:{identity}"

    def _noted(self, identity: str) -> str:
        return f"{self._marker(identity)}:messages"

    # Reading

    def depth(self, queues: Iterable[str]) -> dict[str, dict[str, Any]]:
        """Waiting messages of many queues by priority step, in one pipelined pass."""
        names = list(dict.fromkeys(queues))
        suffixes = [self._suffix(step) for step in self.steps]
        chunk = max(1, 1000 // len(self.steps))
        own = self._own("", "")[: -len(":")]
        pipe = self.client.pipeline(transaction=False)
        for start in range(0, len(names), chunk):
            head = [self.key_prefix, own, ":record", len(suffixes), *suffixes]
            pipe.eval(_DEPTH, 0, *head, *names[start : start + chunk])
        rows = [row for text in pipe.execute() for row in text.decode().split(";")] if names else []
        labels = [str(step) for step in self.steps]
        result: dict[str, dict[str, Any]] = {}
        for name, row in zip(names, rows):
            if "!" in row:
                self._refuse(name, row.split(","))
            *numbers, interrupted = map(int, row.split(","))
            total = sum(numbers)
            result[name] = {
                "depth": total,
                "by_priority": dict(zip(labels, numbers)),
                "exists": total > 0,
                "interrupted": bool(interrupted),
            }
        return result

    def _refuse(self, queue: str, row: Sequence[str]) -> None:
        for step, value in zip(self.steps, row):
            if value.startswith("!"):
                kind, key = value[1:], self.key(queue, step)
                if kind in ("zset", "stream"):
                    raise UnknownLayout(
                        f"queue {queue}: its key {key!r} is a {kind} where kombu keeps a list. Another transport "
                        f"(celery-redis-plus?) owns it; this collection does not touch it.",
                        key=key,
                        type=kind,
                    )
                raise WrongType(
                    f"queue {queue}: its key {key!r} is a {kind} where kombu keeps a list. It is no queue; check the "
                    f"name, key_prefix and the database.",
                    key=key,
                    type=kind,
                )

    def bindings(self) -> dict[str, list[dict[str, str]]]:
        """Queues by exchange, as the last worker or producer to declare them left it. Not a list of live workers."""
        found: dict[str, list[dict[str, str]]] = {}
        prefix = f"{self.key_prefix}_kombu.binding."
        for raw in self.client.scan_iter(match=_literal(prefix) + "*", count=1000, _type="set"):
            exchange = _text(raw)[len(prefix) :]
            entries = self._entries(self.client.sscan_iter(raw, count=1000))
            if entries:
                found[exchange] = entries
        return found

    def _entries(self, members: Iterable[bytes]) -> list[dict[str, str]]:
        parts = (member.split(self.sep) for member in sorted(map(_text, members)))
        return [{"routing_key": p[0], "pattern": p[1], "queue": p[2]} for p in parts if len(p) == 3]

    def _bindings_of(self, exchanges: Iterable[str]) -> dict[str, list[dict[str, str]]]:
        """Like bindings, of these exchanges alone: no walk over the names of all keys."""
        names = sorted(set(exchanges))
        pipe = self.client.pipeline(transaction=False)
        for exchange in names:
            pipe.smembers(f"{self.key_prefix}_kombu.binding.{exchange}")
        answers = zip(names, pipe.execute(raise_on_error=False))
        return {name: self._entries(members) for name, members in answers if isinstance(members, (set, list))}

    def bound(self) -> list[str]:
        """Names of the declared queues, those of remote control and events left out."""
        return sorted(
            {
                entry["queue"]
                for exchange, entries in self.bindings().items()
                if exchange not in _CONTROL_EXCHANGES
                for entry in entries
            }
        )

    def declared(self, queues: Iterable[str]) -> set[str]:
        """Which of these queues are declared. Only the others cost a walk over the names of all keys."""
        names = set(queues)
        if not names:
            return set()
        near = self._bindings_of(names | {"celery"})  # what Celery calls the exchange of a queue, and its default one
        found = {entry["queue"] for entries in near.values() for entry in entries}
        if names - found:
            found |= set(self.bound())
        return names & found

    def queues(self) -> list[str]:
        """Every queue that is declared or has messages. Walks the names of all keys."""
        names = set(self.bound())
        suffixes = [self._suffix(step) for step in self.steps if step]
        foreign = (f"{self.key_prefix}celeryops:",)
        candidates: dict[str, str] = {}
        for raw in self.client.scan_iter(match=_literal(self.key_prefix) + "*", count=1000, _type="list"):
            key = _text(raw)
            if key.startswith(foreign) or key.endswith(".reply.celery.pidbox"):
                continue
            name = key[len(self.key_prefix) :]
            for suffix in suffixes:
                if name.endswith(suffix):
                    name = name[: -len(suffix)]
                    break
            if name not in names:
                candidates[name] = key
        pairs = list(candidates.items())
        for start in range(0, len(pairs), 500):
            pipe = self.client.pipeline(transaction=False)
            for _name, key in pairs[start : start + 500]:
                pipe.lindex(key, -1)
            for (name, _key), raw in zip(pairs[start : start + 500], pipe.execute()):
                with contextlib.suppress(BadMessage):
                    Envelope.parse(raw or b"")
                    names.add(name)
        return sorted(names)

    def require(self, queue: str, *, option: str = "queue") -> dict[str, Any]:
        """Depth of a queue that must exist: it is declared or has messages."""
        row = self.depth([queue])[queue]
        if row["exists"] or row["interrupted"]:
            return row
        if not self.declared([queue]):
            known = self.queues()
            names = ", ".join(known[:30]) + (", ..." if len(known) > 30 else "")
            raise QueueUnknown(
                f"{option}: there is no queue {queue!r} in database {self.db}. "
                + (f"Queues: {names}." if known else "There is no queue at all; check key_prefix and the database."),
                queue=queue,
                known=known[:1000],
            )
        return row

    def task_names(
        self,
        queue: str,
        selection: Selection | None = None,
        *,
        limit: int | None = None,
        most: int | None = None,
        ages: bool = False,
    ) -> Names:
        """Waiting messages by task name, with `ages` by age too; only those selected, if a selection is given. `limit`
        stops after so many hits (the next to be consumed), `most` after so many messages looked at."""
        found = Names()
        counts: Counter[str] = Counter()
        now = self.now()
        wanted = selection or Selection()
        for raw in self._walk(queue, newest_first=limit is None):
            if found.scanned == most or (limit is not None and found.count == limit):
                found.complete = False
                break
            found.scanned += 1
            try:
                hit, task, unknown = wanted.judge(raw, now)
            except BadMessage:
                found.undecodable += 1
                continue
            if hit:
                counts[task] += 1
                found.count += 1
                if ages:
                    label = _age_label(published(raw), now)
                    row = found.ages.setdefault(task, {})
                    row[label] = row.get(label, 0) + 1
            elif unknown:
                found.unknown_age += 1
        found.tasks = dict(counts.most_common())
        return found

    def has_any(self, queue: str, selection: Selection) -> bool:
        """Whether a queue holds a message, or one of those selected."""
        if not selection:
            return bool(self.depth([queue])[queue]["depth"])
        return self.task_names(queue, selection, limit=1).count > 0

    def oldest(self, queues: Iterable[str]) -> dict[str, dict[str, Any] | None]:
        """Of each queue the message that waits longest among the ends of its priority lists."""
        names = list(queues)
        result: dict[str, dict[str, Any] | None] = {}
        now = self.now()
        for start in range(0, len(names), 250):
            part = names[start : start + 250]
            pipe = self.client.pipeline(transaction=False)
            for name in part:
                for step in self.steps:
                    pipe.lindex(self.key(name, step), -1)
            answers = iter(pipe.execute())
            for name in part:
                ends = [(step, raw) for step, raw in ((step, next(answers)) for step in self.steps) if raw is not None]
                found = [self._describe(raw, name, step, now) for step, raw in ends]
                ages = [item["age"] for item in found if item["age"] is not None]
                oldest = max(ages) if ages else None
                result[name] = next((item for item in found if item["age"] == oldest), None)
        return result

    def peek(
        self,
        queue: str,
        count: int = 10,
        *,
        side: str = "front",
        task: str | None = None,
        identity: str | None = None,
        include_arguments: bool = False,
        most: int = 100_000,
    ) -> dict[str, Any]:
        """Some messages from the front (next to be consumed) or the back, decoded."""
        selection = Selection((task,) if task else (), frozenset([identity]) if identity else frozenset())
        now = self.now()
        messages: list[dict[str, Any]] = []
        scanned = 0
        for step in self.steps if side == "front" else tuple(reversed(self.steps)):
            key = self.key(queue, step)
            pages = self._from_front(key) if side == "front" else self._from_back(key)
            for batch in pages:
                for raw in batch:
                    if len(messages) >= count or scanned >= most:
                        break
                    scanned += 1
                    try:
                        wanted = not selection or selection.judge(raw, now)[0]
                    except BadMessage:
                        wanted = False
                    if wanted:
                        messages.append(self._describe(raw, queue, step, now, include_arguments))
                if len(messages) >= count or scanned >= most:
                    break
        return {"messages": messages, "scanned": scanned, "complete": scanned < most}

    def messages(self, queue: str) -> Iterator[bytes]:
        """Every waiting message, undecoded, the newest first: what is consumed meanwhile leaves at the other end."""
        return self._walk(queue, newest_first=True)

    def unacked(self, most: int = 100) -> dict[str, Any]:
        """Messages that workers hold: fetched and not acknowledged, ETA tasks included. The oldest are listed."""
        self.check_unacked()
        now = self.now()
        pipe = self.client.pipeline(transaction=False)
        pipe.hlen(self.unacked_key)
        pipe.zrange(self.unacked_index_key, 0, max(most, 1) - 1, withscores=True)
        count, index = pipe.execute()
        messages = []
        for start in range(0, len(index[:most]), 100):
            part = index[start : min(start + 100, most)]
            raws = self.client.hmget(self.unacked_key, [tag for tag, _score in part])
            for (tag, score), raw in zip(part, raws):
                if raw is not None:
                    messages.append(self._held(tag, raw, now - score))
        return {
            "count": count,
            "oldest_age": round(max(0.0, now - index[0][1]), 3) if index and count else None,
            "messages": messages,
            "undecodable": sum(item["task"] is None for item in messages),
        }

    def check_unacked(self) -> None:
        """Refuse what kombu did not write."""
        self._expect(self.unacked_key, "hash")
        self._expect(self.unacked_index_key, "zset")

    def unacked_count(self) -> int:
        return int(self.client.hlen(self.unacked_key))

    def unacked_ids(self) -> Iterator[str]:
        """Task ids of everything that workers hold, or held when they died."""
        for _tag, raw in self.client.hscan_iter(self.unacked_key, count=200):
            identity = self._held(_tag, raw, 0.0)["id"]
            if identity is not None:
                yield identity

    def ids(self, queue: str) -> Iterator[str]:
        """Task ids of the waiting messages of a queue, those that an interrupted operation has aside too."""
        sources = [self._walk(queue, newest_first=True)]
        sources += [self._pages_of(self._own(queue, part, step)) for part in _PARTS for step in self.steps]
        for raw in itertools.chain(*sources):
            with contextlib.suppress(BadMessage):
                yield identify(raw)[1]

    def unacked_names(self, most: int = 100_000) -> dict[str, dict[str, int]]:
        """Unacked messages by queue and task name. What cannot be decoded is under ''."""
        self._expect(self.unacked_key, "hash")
        seen: Counter[tuple[str, str, str]] = Counter()
        for tag, raw in itertools.islice(self.client.hscan_iter(self.unacked_key, count=200), most):
            item = self._held(tag, raw, 0.0)
            seen[item["exchange"], item["queue"] or "", item["task"] or ""] += 1
        routes = {
            (exchange, entry["routing_key"]): entry["queue"]
            for exchange, entries in self._bindings_of(exchange for exchange, _key, _task in seen if exchange).items()
            for entry in entries
        }
        counts: dict[str, Counter[str]] = {}
        for (exchange, key, task), count in seen.items():
            counts.setdefault(routes.get((exchange, key), key), Counter())[task] += count
        return {queue: dict(names.most_common()) for queue, names in counts.items()}

    def reply_keys(self, idle: float = REPLY_KEY_IDLE, most: int = 1000) -> dict[str, Any]:
        """Reply lists of remote control that nobody will read any more: idle for long. They are only listed."""
        found: dict[str, Any] = {"count": 0, "bytes": 0, "unknown_idle": 0, "keys": []}
        batch: list[bytes] = []

        def look() -> None:
            pipe = self.client.pipeline(transaction=False)
            for key in batch:
                pipe.object("IDLETIME", key)
                pipe.memory_usage(key)
                pipe.pttl(key)
            answers = pipe.execute(raise_on_error=False)
            for position, key in enumerate(batch):
                seconds, size, ttl = answers[3 * position : 3 * position + 3]
                if not isinstance(seconds, int):
                    # No such key any more, or an LFU eviction policy, which keeps no idle time.
                    found["unknown_idle"] += isinstance(size, int)
                elif seconds > idle:
                    found["count"] += 1
                    found["bytes"] += size if isinstance(size, int) else 0
                    if len(found["keys"]) < most:
                        found["keys"].append({"key": _text(key), "idle": seconds, "bytes": size, "expires": ttl >= 0})
            batch.clear()

        pattern = _literal(self.key_prefix) + "*.reply.celery.pidbox"
        for key in self.client.scan_iter(match=pattern, count=1000, _type="list"):
            batch.append(key)
            if len(batch) >= 200:
                look()
        look()
        return found

    def sweep_replies(self, idle: float = REPLY_KEY_IDLE) -> int:
        """Remove the reply lists that reply_keys lists, each looked at again. Returns how many went."""
        gone = 0
        while keys := [item["key"] for item in self.reply_keys(idle)["keys"]]:
            removed = sum(
                int(self.script(_SWEEP)(keys=keys[at : at + 500], args=[int(idle)])) for at in range(0, len(keys), 500)
            )
            gone += removed
            if not removed:
                break
        return gone

    def now(self) -> float:
        """The clock of Redis, the one clock that all readers share."""
        seconds, micro = self.client.time()
        return float(seconds) + float(micro) / 1e6

    def _expect(self, key: str, kind: str) -> None:
        found = _text(self.client.type(key))
        if found not in (kind, "none"):
            raise WrongType(
                f"key {key!r} is a {found} where kombu keeps a {kind}. Check key_prefix, the database and "
                f"transport_options.",
                key=key,
                type=found,
            )

    def _describe(
        self, raw: bytes, queue: str, step: int, now: float, include_arguments: bool = False
    ) -> dict[str, Any]:
        try:
            envelope = Envelope.parse(raw)
        except BadMessage as exc:
            return {"id": None, "task": None, "age": None, "step": step, "bytes": len(raw), "error": exc.msg}
        return {**_summary(envelope, now, include_arguments), "step": step, "bytes": len(raw)}

    def _held(self, tag: bytes, raw: bytes, age: float) -> dict[str, Any]:
        item: dict[str, Any] = {"delivery_tag": _text(tag), "age": round(max(0.0, age), 3)}
        try:
            document, exchange, routing_key = json.loads(raw)
            item.update(exchange=exchange or "", queue=routing_key, id=None, task=None, redelivered=False)
            envelope = Envelope.of(document)
        except (ValueError, TypeError, BadMessage) as exc:
            item.setdefault("queue", None)
            return {**item, "exchange": item.get("exchange", ""), "id": None, "task": None, "error": str(exc)}
        return {**item, "id": envelope.id, "task": envelope.task, "redelivered": envelope.redelivered,
                "eta": envelope.eta}  # fmt: skip

    def _walk(self, queue: str, *, newest_first: bool) -> Iterator[bytes]:
        for step in self.steps:
            key = self.key(queue, step)
            for batch in self._from_back(key) if newest_first else self._from_front(key):
                yield from batch

    def _pages_of(self, key: str) -> Iterator[bytes]:
        for batch in self._from_front(key):
            yield from batch

    def _from_back(self, key: str) -> Iterator[list[bytes]]:
        """A live list from its newest message on. What arrives meanwhile is not looked at; nothing that stays is
        missed or seen twice, because each page begins with the last message of the one before."""
        start = 0
        last: bytes | None = None
        pace = _Pace(max(2, self.batch_size))
        while True:
            size = max(2, pace.size())
            page = self.client.lrange(key, start, start + size - 1)
            if not page:
                return
            fresh = page
            if last is not None:
                try:
                    fresh = page[page.index(last) + 1 :]
                except ValueError:
                    start += len(page)  # all of this page arrived meanwhile or was pushed here from earlier pages
                    continue
            if fresh:
                pace.seen(fresh)
                yield fresh
                last = fresh[-1]
            if len(page) < size:
                return
            start += len(page) - 1

    def _from_front(self, key: str) -> Iterator[list[bytes]]:
        """A list from the next message to be consumed on. Exact where nobody else reads the list."""
        offset = 0
        pace = _Pace(self.batch_size)
        while True:
            page = self.client.lrange(key, -offset - pace.size(), -offset - 1)
            if not page:
                return
            page.reverse()
            offset += len(page)
            pace.seen(page)
            yield page

    # Acting

    def purge(
        self,
        queue: str,
        path: str | None = None,
        *,
        limit: int | None = None,
        overwrite: bool = False,
        compress_level: int = 0,
    ) -> Outcome:
        """Remove the waiting messages; with a path they are in that file first. Without one they are gone."""
        return self._remove("purged", queue, Selection(), path, limit, overwrite, compress_level)

    def drop(
        self,
        queue: str,
        selection: Selection,
        path: str | None = None,
        *,
        limit: int | None = None,
        overwrite: bool = False,
        compress_level: int = 0,
    ) -> Outcome:
        """Remove the selected messages; the others keep their order."""
        if not selection:
            raise PreconditionFailed("filter: holds no condition; to remove all messages use state: purged.")
        return self._remove("dropped", queue, selection, path, limit, overwrite, compress_level)

    def move(self, queue: str, to: str, selection: Selection | None = None, *, limit: int | None = None) -> Outcome:
        """Move messages behind those of another queue, in order and priority, and rewrite their routing."""
        started = time.monotonic()
        if queue == to:
            raise PreconditionFailed(f"to: {to} is the queue itself. Name another one.")
        self.depth([queue, to])
        with self._lock(queue) as lock:
            recovered = self._recover(queue, lock)
            outcome = Outcome("moved", queue, recovered=recovered)
            with self._aside(queue, lock, "moved", selection or Selection(), limit, outcome, to=to):
                self._send(queue, to, lock, outcome)
        outcome.elapsed = time.monotonic() - started
        return outcome

    def export(
        self,
        queue: str,
        path: str,
        *,
        overwrite: bool = False,
        compress_level: int = 0,
        selection: Selection | None = None,
    ) -> Outcome:
        """Copy the waiting messages to a file. Workers go on meanwhile: what they take or what arrives while the copy
        is made may or may not be in it, everything else is, once."""
        started = time.monotonic()
        savefile.check_target(path, overwrite)
        with self._lock(queue) as lock:
            recovered = self._recover(queue, lock)
            outcome = Outcome("exported", queue, recovered=recovered)
            wanted = selection or Selection()
            now = self.now()
            writer = savefile.Writer(
                path,
                self._header("exported", queue, str(uuid.uuid4()), self.depth([queue])[queue]["by_priority"],
                             "newest-first"),
                overwrite=overwrite,
                compress_level=compress_level,
            )  # fmt: skip
            try:
                for step in self.steps:
                    writer.begin(step)
                    for batch in self._from_back(self.key(queue, step)):
                        writer.add(self._wanted(batch, wanted, now, outcome) if wanted else batch)
                        self._keep(lock)
                with self._kept(lock):
                    saved = writer.finish()
                writer.place()
            except BaseException:
                writer.discard()
                raise
            _saved(outcome, saved, writer)
        outcome.elapsed = time.monotonic() - started
        return outcome

    def import_(
        self, path: str, queue: str, *, selection: Selection | None = None, accept: Sequence[str] = ()
    ) -> Outcome:
        """Put the messages of a file, or those selected, in front of the queue (they waited first), in their order and
        priority, each once however often it is called."""
        started = time.monotonic()
        saved = savefile.verify(path)
        self.check_import(saved, path, queue, accept)
        identity = str(saved.header["id"])
        self.depth([queue])
        with self._lock(queue) as lock:
            recovered = self._recover(queue, lock)
            outcome = Outcome("imported", queue, path=path, save_id=identity, sha256=saved.sha256, recovered=recovered)
            before = self.imported(identity)
            if before is not None:
                outcome.already_imported = before
                return outcome
            self._load(queue, saved, path, lock, outcome, selection or Selection())
        outcome.elapsed = time.monotonic() - started
        return outcome

    def imported(self, identity: str) -> str | None:
        """When the save of this id was imported here, if it was in the last 30 days."""
        value = self.client.get(self._marker(identity))
        return None if value is None else _text(value)

    def check_import(self, saved: savefile.Saved, path: str, queue: str, accept: Sequence[str] = ()) -> None:
        header = saved.header
        here = {"broker": self.address, "queue": queue, "db": self.db, "key_prefix": self.key_prefix}
        for name, value in here.items():
            # A file made without an address has none to compare.
            if header.get(name, value) != value and name not in accept:
                raise PreconditionFailed(
                    f"path: {path} was saved from {name} {header[name]!r}, not {value!r}. To import it all the same, "
                    f"add {name} to accept."
                )
        if header["operation"] == "exported" and "copy" not in accept:
            raise PreconditionFailed(
                f"path: {path} is a copy (state exported): its messages stayed in their queue, so importing it can run "
                f"them twice. If that is meant, add copy to accept."
            )
        foreign = sorted(int(step) for step in saved.messages if int(step) not in self.steps)
        if foreign:
            raise PreconditionFailed(
                f"path: {path} has messages of priority step {foreign[0]}, which this broker does not use "
                f"(priority_steps {list(self.steps)}). Set transport_options.priority_steps as when it was saved."
            )

    def interrupted(self, queue: str) -> dict[str, Any] | None:
        """The operation that was killed, or still runs, on a queue, and how many messages it has aside."""
        record = {_text(key): _text(value) for key, value in self.client.hgetall(self._own(queue, "record")).items()}
        if not record:
            return None
        pipe = self.client.pipeline(transaction=False)
        for part in _PARTS:
            for step in self.steps:
                pipe.llen(self._own(queue, part, step))
        return {**record, "messages": sum(pipe.execute()), "running": self._lock_holder(queue) is not None}

    # The steps of an operation

    def _remove(
        self,
        operation: str,
        queue: str,
        selection: Selection,
        path: str | None,
        limit: int | None,
        overwrite: bool,
        compress_level: int,
    ) -> Outcome:
        started = time.monotonic()
        self.depth([queue])
        if path is not None:
            savefile.check_target(path, True)
        with self._lock(queue) as lock:
            recovered = self._recover(queue, lock)
            outcome = Outcome(operation, queue, recovered=recovered)
            if (
                recovered
                and recovered["action"] == "finished"
                and (recovered["operation"], recovered["path"])
                == (
                    operation,
                    path,
                )
            ):
                for name in ("count", "by_priority", "save_id", "sha256", "path"):
                    setattr(outcome, name, recovered[name])
                return outcome
            if path is not None and not overwrite and os.path.lexists(path):
                if not self.has_any(queue, selection):
                    outcome.by_priority = dict.fromkeys(map(str, self.steps), 0)
                    return outcome
                savefile.check_target(path, overwrite)
            with self._aside(queue, lock, operation, selection, limit, outcome, path=path or "") as identity:
                if path is not None and outcome.count:
                    self._save(queue, identity, operation, path, lock, overwrite, compress_level, outcome)
                elif outcome.count:
                    self._finish(queue, lock)
        outcome.elapsed = time.monotonic() - started
        return outcome

    @contextlib.contextmanager
    def _aside(
        self,
        queue: str,
        lock: _Lock,
        operation: str,
        selection: Selection,
        limit: int | None,
        outcome: Outcome,
        **note: str,
    ) -> Iterator[str]:
        """Inside, the picked messages are in lists of our own; afterwards all that is left there is put back."""
        identity = str(uuid.uuid4())
        record = {"id": identity, "operation": operation, "phase": "aside", "host": socket.gethostname(),
                  "started": _iso(time.time()), "path": "", "to": "", **note}  # fmt: skip
        part = "scan" if selection else "picked"
        try:
            if selection or limit is None:
                pairs = [key for step in self.steps for key in (self.key(queue, step), self._own(queue, part, step))]
                self._run(_ASIDE, lock, [self._own(queue, "record"), *pairs], _pairs(record))
                if selection:
                    self._partition(queue, selection, limit, lock, outcome)
            else:
                self._run(_ASIDE, lock, [self._own(queue, "record")], _pairs(record))
                self._take(queue, limit, lock)
            outcome.by_priority = self._lengths(queue, "picked")
            outcome.count = sum(outcome.by_priority.values())
            # The others go back before the slow part begins.
            self._put_back(queue, lock, ("kept", "scan"))
            yield identity
            self._put_back(queue, lock, _PARTS)
            self._run(_FINISH, lock, [self._own(queue, "record")])
        except LockHeld:
            raise
        except BaseException as exc:
            self._give_up(queue, lock, exc)
            raise

    def _give_up(self, queue: str, lock: _Lock, error: BaseException) -> None:
        """After a failure: put the messages back, or say where they are."""
        try:
            recovered = self._recover(queue, lock)
        except Exception as problem:
            text = (
                f"The messages of {queue} are safe in Redis under {self._own(queue, '*')} and could not be put back "
                f"now ({type(problem).__name__}); run the same task again when Redis answers."
            )
        else:
            if recovered is None:
                return
            if recovered["action"] == "finished":
                text = f"The file {recovered['path']} is complete, and its messages have left the queue."
                if recovered["operation"] == "imported":
                    text = "The import is complete all the same: run again to see it, the file is not loaded twice."
            elif recovered["action"] == "undone":
                text = f"{queue} is as it was before."
            else:
                text = f"All {recovered['count']} messages are back in {queue}."
        if isinstance(error, CeleryOpsError):
            error.msg = f"{error.msg} {text}"
            error.args = (error.msg,)

    def _lengths(self, queue: str, part: str) -> dict[str, int]:
        pipe = self.client.pipeline(transaction=False)
        for step in self.steps:
            pipe.llen(self._own(queue, part, step))
        return {str(step): count for step, count in zip(self.steps, pipe.execute())}

    def _pace(self, key: str) -> _Pace:
        pipe = self.client.pipeline(transaction=False)
        pipe.llen(key)
        pipe.memory_usage(key, samples=5)
        count, size = pipe.execute()
        return _Pace(self.batch_size, (size or 0) / count if count else 0.0)

    def _take(self, queue: str, limit: int, lock: _Lock) -> None:
        for step in self.steps:
            source, target = self.key(queue, step), self._own(queue, "picked", step)
            pace = self._pace(source)
            while limit:
                moved = self._run(_SHIFT, lock, [source, target], [min(limit, pace.size())])
                if not moved:
                    break
                limit -= moved

    def _partition(self, queue: str, selection: Selection, limit: int | None, lock: _Lock, outcome: Outcome) -> None:
        now = self.now()
        judged: dict[str, int] = {}
        table = "{}"
        counts: Counter[str] = Counter()
        left = -1 if limit is None else limit
        for step in self.steps:
            scan = self._own(queue, "scan", step)
            keys = [scan, self._own(queue, "kept", step), self._own(queue, "picked", step)]
            size = self._pace(scan).size()
            while left:
                if selection.by_task_only and judged:
                    done, *rest = self._run(_PARTITION, lock, keys, [size, "", left, table])
                    if done == 0:
                        break
                    if done > 0:
                        counts.update(json.loads(rest[1]))
                        left -= rest[0] if left > 0 else 0
                        continue
                batch = self.client.lrange(scan, -size, -1)
                if not batch:
                    break
                batch.reverse()
                marks, names = [], []
                for raw in batch:
                    try:
                        hit, task, unknown = selection.judge(raw, now)
                    except BadMessage:
                        hit, task, unknown = False, "", False
                        outcome.undecodable += 1
                    outcome.unknown_age += unknown
                    marks.append("1" if hit else "0")
                    names.append(task)
                    # The script compares the text as it stands in the message, so no name that JSON would escape.
                    if task and selection.by_task_only and len(judged) < 1000 and json.dumps(task)[1:-1] == task:
                        judged.setdefault(task, int(hit))
                table = json.dumps(judged, ensure_ascii=False)
                done, picked, _none = self._run(_PARTITION, lock, keys, [size, "".join(marks), left, ""])
                counts.update(name for name, mark in zip(names[:done], marks[:done]) if mark == "1")
                left -= picked if left > 0 else 0
        outcome.tasks = dict(counts.most_common())

    def _save(
        self,
        queue: str,
        identity: str,
        operation: str,
        path: str,
        lock: _Lock,
        overwrite: bool,
        compress_level: int,
        outcome: Outcome,
    ) -> None:
        header = self._header(operation, queue, identity, outcome.by_priority, "oldest-first")
        writer = savefile.Writer(path, header, overwrite=overwrite, compress_level=compress_level)
        try:
            for step in self.steps:
                writer.begin(step)
                for batch in self._from_front(self._own(queue, "picked", step)):
                    writer.add(batch)
                    self._keep(lock)
            with self._kept(lock):
                saved = writer.finish()
            if saved.messages != outcome.by_priority:
                raise PreconditionFailed(f"path: {path} has other counts than the queue. Nothing was removed.")
            self._note(queue, lock, phase="placing")
            writer.place()
        except BaseException:
            writer.discard()
            raise
        _saved(outcome, saved, writer)
        self._finish(queue, lock)

    def _finish(self, queue: str, lock: _Lock) -> None:
        self._run(
            _FINISH, lock, [self._own(queue, "record"), *(self._own(queue, "picked", step) for step in self.steps)]
        )

    def _send(self, queue: str, to: str, lock: _Lock, outcome: Outcome) -> None:
        reroute = Rerouter(queue, to)
        counts: Counter[str] = Counter()
        sent: dict[str, int] = {}
        with ThreadPoolExecutor(1) as pool:
            for step in self.steps:
                source = self._own(queue, "picked", step)
                keys = [source, self.key(to, step), self._own(queue, "odd", step)]
                pace = self._pace(source)
                sent[str(step)] = 0
                ready: list[Any] = []
                taken = 0
                while True:
                    # Read the next batch, and rewrite it while Redis stores the one before.
                    batch = self.client.lrange(source, -taken - pace.size(), -taken - 1)
                    batch.reverse()
                    running = pool.submit(self._run, _REROUTE, lock, keys, ready) if ready else None
                    good, odd = [], []
                    for raw in batch:
                        try:
                            task, rerouted = reroute(raw)
                            counts[task] += 1
                            good.append(rerouted)
                        except BadMessage:
                            odd.append(raw)
                    if running is not None:
                        running.result()
                    if not batch:
                        break
                    taken, ready = len(batch), [len(batch), *_joined(good), *_joined(odd)]
                    sent[str(step)] += len(good)
                    outcome.undecodable += len(odd)
                    pace.seen(batch)
        outcome.by_priority, outcome.count, outcome.tasks = sent, sum(sent.values()), dict(counts.most_common())

    def imports(self, saved: savefile.Saved, path: str, selection: Selection) -> Names:
        """The messages of a file that an import would restore now, by task name."""
        found = Names()
        counts: Counter[str] = Counter()
        now = self.now()
        done = self._imported_bits(str(saved.header["id"]))
        number = -1
        for _step, batch in savefile.batches(path, lambda: self.batch_size):
            for raw in batch:
                number += 1
                if _bit(done, number):
                    continue
                try:
                    hit, task, unknown = selection.judge(raw, now)
                except BadMessage:
                    found.undecodable += 1
                    found.count += not selection
                    continue
                found.unknown_age += unknown
                found.count += hit
                counts[task] += hit
        found.tasks = dict(+counts)
        return found

    def _imported_bits(self, identity: str) -> bytes:
        return self.client.get(self._noted(identity)) or b""

    def _load(
        self, queue: str, saved: savefile.Saved, path: str, lock: _Lock, outcome: Outcome, selection: Selection
    ) -> None:
        header = saved.header
        identity = str(header["id"])
        record = {"id": identity, "operation": "imported", "phase": "loading", "host": socket.gethostname(),
                  "started": _iso(time.time()), "path": path, "to": ""}  # fmt: skip
        reroute = Rerouter(header["queue"], queue) if header["queue"] != queue else None
        command = "LPUSH" if header.get("order") == "oldest-first" else "RPUSH"
        counts: Counter[str] = Counter()
        loaded: dict[str, int] = dict.fromkeys(map(str, self.steps), 0)
        now = self.now()
        bits = bytearray(self._imported_bits(identity).ljust(saved.count // 8 + 1, b"\0"))
        number = -1
        self._run(_ASIDE, lock, [self._own(queue, "record")], _pairs(record))
        try:
            pace = _Pace(self.batch_size)
            for step, batch in savefile.batches(path, pace.size):
                pace.seen(batch)
                messages = []
                for raw in batch:
                    number += 1
                    if _bit(bits, number):
                        continue
                    try:
                        hit, task, unknown = selection.judge(raw, now)
                        outcome.unknown_age += unknown
                        if not hit:
                            continue
                        messages.append(reroute(raw)[1] if reroute else raw)
                        counts[task] += 1
                    except BadMessage:
                        outcome.undecodable += 1
                        if reroute is not None or selection:
                            continue
                        messages.append(raw)
                    bits[number >> 3] |= 1 << (number & 7)
                if messages:
                    self._run(_LOAD, lock, [self._own(queue, "picked", step)], [command, *_joined(messages)])
                loaded[str(step)] += len(messages)
            if number + 1 != saved.count:
                raise PreconditionFailed(f"path: {path} changed while it was read. Nothing was imported.")
            whole = not selection or sum(map(int.bit_count, bits)) == saved.count
            if not whole:
                self.client.set(self._own(queue, "done"), bytes(bits), ex=IMPORT_MARKER_TTL)
            self._note(queue, lock, phase="joining", whole="yes" if whole else "")
            self._join_import(queue, identity, lock, whole)
        except LockHeld:
            raise
        except BaseException as exc:
            self._give_up(queue, lock, exc)
            raise
        outcome.by_priority, outcome.count, outcome.tasks = loaded, sum(loaded.values()), dict(counts.most_common())

    def _join_import(self, queue: str, identity: str, lock: _Lock, whole: bool) -> None:
        self._put_back(queue, lock, ("picked",))
        value = f"{_iso(time.time())} into {queue}" if whole else ""
        keys = [self._own(queue, "record"), self._marker(identity), self._own(queue, "done"), self._noted(identity)]
        self._run(_FINISH_IMPORT, lock, keys, [value, IMPORT_MARKER_TTL])

    def _recover(self, queue: str, lock: _Lock) -> dict[str, Any] | None:
        """Finish or undo what a killed run has left aside."""
        record = {_text(key): _text(value) for key, value in self.client.hgetall(self._own(queue, "record")).items()}
        if not record:
            return None
        path, identity = record.get("path", ""), record["id"]
        base = {"operation": record["operation"], "path": path or None, "started": record["started"]}
        here = record["host"] == socket.gethostname()
        if record["operation"] == "imported":
            if record["phase"] == "joining":
                # A record of an older version has no such field; it imported whole files only.
                self._join_import(queue, identity, lock, record.get("whole", "yes") == "yes")
                return {**base, "action": "finished", "count": 0}
            self._finish(queue, lock)
            return {**base, "action": "undone", "count": 0}
        if record["phase"] == "placing" and not here:
            raise PreconditionFailed(
                f"queue: on host {record['host']} a run was interrupted while it put {path} in place. Run the task "
                f"there; it decides by that file.",
                interrupted=record,
            )
        picked = self._lengths(queue, "picked")
        if record["phase"] == "placing" and os.path.exists(path):
            with contextlib.suppress(CeleryOpsError):
                saved = savefile.verify(path)
                if saved.header["id"] == identity and saved.messages == picked:
                    self._put_back(queue, lock, ("odd", "kept", "scan"))
                    self._finish(queue, lock)
                    savefile.remove_partial(savefile.partial_path(path, identity))
                    return {**base, "action": "finished", "count": saved.count, "by_priority": picked,
                            "save_id": identity, "sha256": saved.sha256}  # fmt: skip
        if path and here:
            savefile.remove_partial(savefile.partial_path(path, identity))
        count = self._put_back(queue, lock, _PARTS)
        self._run(_FINISH, lock, [self._own(queue, "record")])
        return {**base, "action": "put_back", "count": count}

    def _put_back(self, queue: str, lock: _Lock, parts: Sequence[str]) -> int:
        """Put our lists back in front of the queue, given from the next to be consumed to the newest."""
        count = 0
        for step in self.steps:
            chain = [self._own(queue, part, step) for part in parts]
            count += sum(self.client.llen(key) for key in chain)
            chain.append(self.key(queue, step))
            for older, newer in itertools.pairwise(chain):
                pace = self._pace(older)
                while self._run(_JOIN, lock, [older, newer], [pace.size()]):
                    pass
        return count

    def _header(
        self, operation: str, queue: str, identity: str, counts: Mapping[str, int], order: str
    ) -> dict[str, Any]:
        return {
            "id": identity,
            "operation": operation,
            "broker": self.address,
            "db": self.db,
            "key_prefix": self.key_prefix,
            "queue": queue,
            "created": _iso(time.time()),
            "order": order,
            "messages": dict(counts),
        }

    def _wanted(self, batch: Sequence[bytes], selection: Selection, now: float, outcome: Outcome) -> list[bytes]:
        result = []
        for raw in batch:
            try:
                hit, _task, unknown = selection.judge(raw, now)
            except BadMessage:
                outcome.undecodable += 1
                continue
            outcome.unknown_age += unknown
            if hit:
                result.append(raw)
        return result

    def _note(self, queue: str, lock: _Lock, **fields: str) -> None:
        self._run(_NOTE, lock, [self._own(queue, "record")], _pairs(fields))

    # The lock

    @contextlib.contextmanager
    def _lock(self, queue: str) -> Iterator[_Lock]:
        """One operation a queue. The value tells whose it is, so that a dead process of this machine frees it."""
        value = json.dumps({"token": uuid.uuid4().hex, **_process(os.getpid())}, sort_keys=True)
        key = self._own(queue, "lock")
        if not self.client.set(key, value, nx=True, px=LOCK_TTL * 1000):
            holder = self._lock_holder(queue, clear=True)
            if holder is not None:
                raise LockHeld(
                    f"queue: another run works on {queue} (host {holder.get('host')}, process {holder.get('pid')}). "
                    f"Wait for its end; if it is dead, its lock ends after {LOCK_TTL} s.",
                    holder=holder,
                )
            if not self.client.set(key, value, nx=True, px=LOCK_TTL * 1000):
                raise LockHeld(f"queue: another run has just begun to work on {queue}. Wait for its end.")
        try:
            yield _Lock(key, value, time.monotonic())
        finally:
            with contextlib.suppress(Exception):
                self.script(_RELEASE)(keys=[key], args=[value])

    def _lock_holder(self, queue: str, *, clear: bool = False) -> dict[str, Any] | None:
        """Who holds the lock, unless it is known to be dead; `clear` removes the lock of the dead."""
        key = self._own(queue, "lock")
        raw = self.client.get(key)
        if raw is None:
            return None
        holder: dict[str, Any] = json.loads(raw)
        alive = _process(int(holder["pid"]))
        if holder["space"] == alive["space"] and holder["begun"] != alive["begun"]:
            if clear:
                self.script(_RELEASE)(keys=[key], args=[raw])
            return None
        return {"host": holder["host"], "pid": holder["pid"]}

    @contextlib.contextmanager
    def _kept(self, lock: _Lock) -> Iterator[None]:
        """Keep the lock alive while a large file is synced and read back, which can take minutes on a slow disk."""
        over = threading.Event()

        def keep() -> None:
            # A failure shows in the next step, which checks the lock itself.
            with contextlib.suppress(Exception):
                while not over.wait(LOCK_TTL / 6):
                    self._run(_KEEP, lock, [], [])

        thread = threading.Thread(target=keep, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def _keep(self, lock: _Lock) -> None:
        """Keep the lock alive while only a file is written."""
        if time.monotonic() - lock.kept > 5:
            lock.kept = time.monotonic()
            self._run(_KEEP, lock, [], [])

    def _run(self, script: str, lock: _Lock, keys: Sequence[str], args: Sequence[Any] = ()) -> Any:
        from redis.exceptions import ResponseError

        try:
            return self.script(script)(keys=[lock.key, *keys], args=[lock.value, LOCK_TTL * 1000, *args])
        except ResponseError as exc:
            if "CELERYOPS lock lost" in str(exc):
                raise LockHeld(
                    "queue: this run stood still for so long that its lock ended and another run took over. Nothing "
                    "is lost; look at the queue and run again."
                ) from exc
            if "CELERYOPS" in str(exc):
                raise PreconditionFailed(f"queue: it changed meanwhile ({exc}). Run again.") from exc
            raise

    def script(self, source: str) -> Any:
        if source not in self._scripts:
            self._scripts[source] = self.client.register_script(source)
        return self._scripts[source]


def _age_label(moment: float | None, now: float) -> str:
    return "unknown" if moment is None else next(label for bound, label in _AGES if now - moment < bound)


def _summary(envelope: Envelope, now: float, include_arguments: bool) -> dict[str, Any]:
    result: dict[str, Any] = {
        "id": envelope.id,
        "task": envelope.task,
        "age": None if envelope.published is None else round(max(0.0, now - envelope.published), 3),
        "eta": envelope.eta,
        "expires": envelope.expires,
        "retries": envelope.retries,
        "priority": envelope.priority,
        "redelivered": envelope.redelivered,
        "routing_key": envelope.routing_key,
        "origin": envelope.origin,
        "protocol": envelope.protocol,
    }
    if include_arguments:
        arguments = envelope.arguments()
        result["args"], result["kwargs"] = (None, None) if arguments is None else arguments
    return result


def _saved(outcome: Outcome, saved: savefile.Saved, writer: savefile.Writer) -> None:
    outcome.path, outcome.save_id, outcome.sha256 = writer.path, str(saved.header["id"]), saved.sha256
    outcome.count, outcome.by_priority, outcome.bytes = saved.count, saved.messages, writer.bytes


def _bit(bits: bytes | bytearray, number: int) -> bool:
    return number >> 3 < len(bits) and bool(bits[number >> 3] >> (number & 7) & 1)


def _joined(messages: Sequence[bytes]) -> tuple[str, bytes]:
    return ",".join([str(len(raw)) for raw in messages]), b"".join(messages)


def _pairs(fields: Mapping[str, str]) -> list[str]:
    return [item for pair in fields.items() for item in pair]


def _process(pid: int) -> dict[str, Any]:
    """Where a process lives, and when it began; pids are only comparable within the same space."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as handle:
            boot = handle.read().strip()
        space = f"{boot}/{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        space = uuid.uuid4().hex  # cannot be told: then only time frees the lock
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as handle:
            begun = handle.read().rpartition(")")[2].split()[19]
    except OSError:
        begun = ""
    return {"host": socket.gethostname(), "pid": pid, "space": space, "begun": begun}


def _text(raw: Any) -> str:
    return raw.decode("utf-8", "surrogateescape") if isinstance(raw, bytes) else str(raw)


def _literal(text: str) -> str:
    """A text for MATCH, its special characters taken literally."""
    return "".join("\\" + char if char in "*?[]\\" else char for char in text)


def _iso(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
