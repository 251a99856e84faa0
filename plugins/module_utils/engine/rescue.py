# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Messages that were fetched and never acknowledged, by workers that are dead: who holds what, and giving it back.

An entry of `unacked` does not name its worker. Workers with the runtime are asked which of some delivery tags they
hold; of the others the task ids in active, reserved and scheduled are taken. The entries are read before the question,
so one that nobody claims was in the hands of nobody who answers. Whoever is connected and does not answer, or is
stopping, may hold any of them: then nothing is touched, unless the operator names those nodes as dead.

An entry is given back by a script that compares its content and the time it was fetched with what was judged: what
Celery itself gave back meanwhile, or a worker acknowledged, or fetched again, is left alone.
"""

from __future__ import annotations

import json
import re
import time
from bisect import bisect
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from .control import Control, Request, is_beat
from .errors import BadMessage, PreconditionFailed
from .message import Envelope
from .queues import RedisQueues, Selection

HELD_COMMAND = "celeryops_held"
HOLDING = ("active", "reserved", "scheduled")
PAGE = 250
IDS_SHOWN = 1000
STOPPING_SECONDS = 10.0
_IMPATIENT = 0.5
_BATCH_BYTES = 1 << 20

# KEYS unacked index (list)...   ARGV (tag time entry message lists)... where lists are positions in KEYS
_GIVE_BACK = """
local given = {}
for i = 1, #ARGV, 5 do
  local tag, lists = ARGV[i], {}
  local time = redis.call('ZSCORE', KEYS[2], tag)
  local same = time and tonumber(time) == tonumber(ARGV[i + 1]) and redis.call('HGET', KEYS[1], tag) == ARGV[i + 2]
  for position in string.gmatch(ARGV[i + 4], '%d+') do
    lists[#lists + 1] = KEYS[tonumber(position)]
    local kind = redis.call('TYPE', lists[#lists]).ok
    same = same and (kind == 'list' or kind == 'none')
  end
  if same then
    for _, list in ipairs(lists) do redis.call('RPUSH', list, ARGV[i + 3]) end
    redis.call('HDEL', KEYS[1], tag)
    redis.call('ZREM', KEYS[2], tag)
    given[#given + 1] = (i - 1) / 5
  end
end
return given
"""


@dataclass
class Holders:
    """Who claims what, and who may hold something without saying so."""

    tags: set[str] = field(default_factory=set)
    ids: set[str] = field(default_factory=set)
    limited: set[str] = field(default_factory=set)  # tasks that a worker may hold back without showing them
    answered: list[str] = field(default_factory=list)
    silent: int = 0
    suspects: list[str] = field(default_factory=list)  # names the silent ones may have
    stopping: list[str] = field(default_factory=list)
    mute: list[str] = field(default_factory=list)  # answered the ping and not the question

    def doubt(self, dead: Iterable[str]) -> int:
        """How many nodes may hold something and are not named as dead."""
        named = set(dead)
        quiet = set(self.stopping) | set(self.mute)
        # A silent subscriber has no name: each name given accounts for one.
        return len(quiet - named) + max(0, self.silent - len(named - quiet))


@dataclass
class Rescue:
    """What a rescue did, or would do."""

    count: int = 0
    tasks: dict[str, int] = field(default_factory=dict)
    queues: dict[str, int] = field(default_factory=dict)
    by_priority: dict[str, int] = field(default_factory=dict)
    ids: list[str] = field(default_factory=list)
    held: int = 0
    unknown: int = 0
    unselected: int = 0
    unroutable: int = 0
    undecodable: int = 0
    unknown_age: int = 0
    changed_meanwhile: int = 0
    answered: list[str] = field(default_factory=list)
    silent: int = 0
    suspects: list[str] = field(default_factory=list)
    stopping: list[str] = field(default_factory=list)
    elapsed: float = 0.0


@dataclass(frozen=True)
class Entry:
    """One message of `unacked` as it was read."""

    tag: str
    time: float
    raw: bytes
    document: dict[str, Any]
    envelope: Envelope
    exchange: str
    routing_key: str


def rescue(
    queues: RedisQueues,
    control: Control,
    *,
    queue: str | None = None,
    selection: Selection | None = None,
    dead: Sequence[str] = (),
    limit: int | None = None,
    dry: bool = False,
    page: int = PAGE,
) -> Rescue:
    """Give back what no live node holds, the oldest to be consumed first, as Celery's own restore does."""
    started = time.monotonic()
    queues.check_unacked()
    wanted = selection or Selection()
    result = Rescue(by_priority=dict.fromkeys(map(str, queues.steps), 0))
    tasks: Counter[str] = Counter()
    places: Counter[str] = Counter()
    routes = Routes(queues)
    now = queues.now()
    patience: float | None = None
    seen = 0
    if dead:
        demand_dead(ask(queues, control, []), dead)
    for entries in _pages(queues, page, result):
        holders = ask(queues, control, entries, timeout=patience)
        demand_dead(holders, dead)
        result.answered, result.silent = holders.answered, holders.silent
        result.suspects, result.stopping = holders.suspects, sorted({*holders.stopping, *holders.mute})
        doubt = holders.doubt(dead)
        patience = _IMPATIENT if holders.silent else None
        seen += len(entries)
        orphans: list[tuple[Entry, list[tuple[str, int]]]] = []
        for entry in entries:
            verdict = _judge(entry, holders, wanted, now, queue, routes, result)
            if verdict is None:
                continue
            if doubt or entry.envelope.task in holders.limited:
                result.unknown += 1
            elif limit is None or len(orphans) + result.count < limit:
                orphans.append((entry, verdict))
            else:
                result.unselected += 1
        given = orphans if dry else list(_give_back(queues, orphans, result))
        for entry, lists in given:
            tasks[entry.envelope.task] += 1
            result.count += 1
            for name, step in lists:
                places[name] += 1
                result.by_priority[str(step)] += 1
            if len(result.ids) < IDS_SHOWN:
                result.ids.append(entry.envelope.id)
        if limit is not None and result.count >= limit:
            break
        if doubt:
            # The others are as uncertain; asking again and again would only wait for the silent.
            result.unknown += max(0, queues.unacked_count() - seen)
            break
    result.tasks, result.queues = dict(tasks.most_common()), dict(places.most_common())
    result.elapsed = time.monotonic() - started
    return result


def demand_dead(holders: Holders, dead: Sequence[str]) -> None:
    """The operator's word is taken only for nodes that exist and do not answer."""
    alive = sorted(set(dead) & set(holders.answered) - set(holders.mute))
    if alive:
        raise PreconditionFailed(
            f"dead: {', '.join(alive)} answers, so it is alive and what it holds stays with it. Leave it out of dead."
        )
    strange = sorted(set(dead) - {*holders.suspects, *holders.stopping, *holders.mute})
    if strange:
        known = ", ".join(sorted({*holders.suspects, *holders.stopping, *holders.mute})) or "none"
        raise PreconditionFailed(
            f"dead: the broker knows no node {', '.join(strange)} that does not answer. Nodes that do not: {known}."
        )


def ask(queues: RedisQueues, control: Control, entries: Sequence[Entry], *, timeout: float | None = None) -> Holders:
    """Who of the whole fleet holds these entries. Two nodes of one name are two nodes."""
    question = Request(HELD_COMMAND, {"tags": [entry.tag for entry in entries]})
    done = control.converse([question], timeout=timeout, census=True)
    present = [name for name in done.census.nodes if not is_beat(name)]
    due = Counter(reply.node for reply in done.census.replies if not is_beat(reply.node))
    # What answers in a way that is not read may hold anything.
    unread = len(done.census.refused)
    holders = Holders(answered=sorted(present), silent=done.census.silent_count + unread)
    plain: Counter[str] = Counter()
    for reply in done.answers[0].replies:
        if reply.error is None and isinstance(reply.value, list):
            holders.tags.update(map(str, reply.value))
        elif (reply.error or "").startswith("unknown command"):
            plain[reply.node] += 1
        else:
            continue
        due[reply.node] -= 1
    if plain:
        due += _ask_plain(control, plain, holders, timeout)
    holders.mute = sorted(name for name, number in due.items() if number > 0)
    holders.suspects = [name for name in _declared_nodes(queues, control) if name not in present]
    holders.stopping = [name for name in stopping(queues.client, queues.key_prefix) if name not in present]
    return holders


def _ask_plain(control: Control, nodes: Counter[str], holders: Holders, timeout: float | None) -> Counter[str]:
    """Workers without the runtime: ids they show, and tasks they may not show for a rate limit. Returns who is mute."""
    commands = (*HOLDING, "registered")
    done = control.converse([Request(command, {}, tuple(nodes)) for command in commands], timeout=timeout)
    due: Counter[str] = Counter()
    for command, answers in zip(commands, done.answers, strict=True):
        answered = Counter(reply.node for reply in answers.replies if isinstance(reply.value, list))
        due |= nodes - answered
        for reply in answers.replies:
            for item in reply.value if isinstance(reply.value, list) else ():
                if command == "registered":
                    task, _space, rest = str(item).partition(" ")
                    if "rate_limit=" in rest:
                        holders.limited.add(task)
                else:
                    holders.ids.add(str((item.get("request") or item).get("id")))
    return due


def _declared_nodes(queues: RedisQueues, control: Control) -> list[str]:
    """Names under which workers have ever subscribed to remote control."""
    suffix = f".{control.exchange}"
    members = queues.client.smembers(f"{queues.key_prefix}_kombu.binding.{control.exchange}")
    names = (member.decode("utf-8", "replace").rpartition(queues.sep)[2] for member in members)
    return sorted(name.removesuffix(suffix) for name in names if name.endswith(suffix))


def _pages(queues: RedisQueues, size: int, result: Rescue) -> Iterator[list[Entry]]:
    """The entries by the time they were fetched, the latest first. What is fetched meanwhile is not looked at."""
    client, index = queues.client, queues.unacked_index_key
    bound: Any = "+inf"
    at_bound: set[bytes] = set()
    while True:
        found = client.zrevrangebyscore(index, bound, "-inf", start=0, num=size + len(at_bound), withscores=True)
        fresh = [(tag, score) for tag, score in found if tag not in at_bound]
        if not fresh:
            return
        last = fresh[-1][1]
        at_bound = {tag for tag, score in fresh if score == last} | (at_bound if bound == last else set())
        bound = last
        raws = client.hmget(queues.unacked_key, [tag for tag, _score in fresh])
        entries = []
        for (tag, score), raw in zip(fresh, raws, strict=True):
            if raw is None:
                continue  # acknowledged meanwhile
            try:
                entries.append(parse(tag.decode(), score, raw))
            except (BadMessage, UnicodeDecodeError):
                result.undecodable += 1
        if entries:
            yield entries


def parse(tag: str, score: float, raw: bytes) -> Entry:
    try:
        document, exchange, routing_key = json.loads(raw)
    except (ValueError, TypeError, RecursionError) as exc:
        raise BadMessage(f"no entry of unacked: {type(exc).__name__}") from exc
    return Entry(tag, score, raw, document, Envelope.of(document), str(exchange or ""), str(routing_key or ""))


def _judge(
    entry: Entry,
    holders: Holders,
    wanted: Selection,
    now: float,
    queue: str | None,
    routes: Routes,
    result: Rescue,
) -> list[tuple[str, int]] | None:
    """The lists an entry that nobody claims would go to; None if it stays, which is counted."""
    if entry.tag in holders.tags or entry.envelope.id in holders.ids:
        result.held += 1
        return None
    lists = routes.lists(entry)
    if queue is not None and queue not in [name for name, _step in lists]:
        result.unselected += 1
        return None
    if wanted:
        try:
            hit, undated = wanted.judge_envelope(entry.envelope, now)
        except BadMessage:
            result.undecodable += 1
            return None
        if not hit:
            result.unknown_age += undated
            result.unselected += 1
            return None
    if not lists:
        result.unroutable += 1
        return None
    return lists


class Routes:
    """Where kombu would put a message back: the queues bound to its exchange and routing key, in its priority list."""

    def __init__(self, queues: RedisQueues) -> None:
        self._queues = queues
        self._bindings: dict[str, list[dict[str, str]]] | None = None

    def lists(self, entry: Entry) -> list[tuple[str, int]]:
        step = self.step(entry.document)
        return [(name, step) for name in self.names(entry.exchange, entry.routing_key)]

    def names(self, exchange: str, routing_key: str) -> list[str]:
        if not exchange:
            return [routing_key] if routing_key else []
        if self._bindings is None:
            self._bindings = self._queues.bindings()
        bound = self._bindings.get(exchange, [])
        exact = [item["queue"] for item in bound if item["routing_key"] == routing_key]
        found = exact or [item["queue"] for item in bound if item["pattern"] and _fits(item["pattern"], routing_key)]
        return list(dict.fromkeys(found))

    def step(self, document: dict[str, Any]) -> int:
        try:
            priority = max(0, min(9, int(document["properties"]["priority"])))
        except (KeyError, TypeError, ValueError):
            priority = 0
        steps = self._queues.steps
        return steps[bisect(steps, priority) - 1]


def _fits(pattern: str, routing_key: str) -> bool:
    try:
        return re.match(pattern, routing_key) is not None
    except re.error:
        return False


def given_back(document: dict[str, Any]) -> bytes:
    """The message as kombu gives it back: marked, and otherwise the same."""
    document["headers"]["redelivered"] = True
    info = document["properties"].get("delivery_info")
    if isinstance(info, dict):
        info["redelivered"] = True
    return json.dumps(document).encode()


def _give_back(
    queues: RedisQueues, orphans: Sequence[tuple[Entry, list[tuple[str, int]]]], result: Rescue
) -> Iterator[tuple[Entry, list[tuple[str, int]]]]:
    batch: list[tuple[Entry, list[tuple[str, int]]]] = []
    size = 0
    for orphan in orphans:
        batch.append(orphan)
        size += len(orphan[0].raw)
        if size >= _BATCH_BYTES:
            yield from _give_batch(queues, batch, result)
            batch, size = [], 0
    if batch:
        yield from _give_batch(queues, batch, result)


def _give_batch(
    queues: RedisQueues, batch: Sequence[tuple[Entry, list[tuple[str, int]]]], result: Rescue
) -> Iterator[tuple[Entry, list[tuple[str, int]]]]:
    keys = [queues.unacked_key, queues.unacked_index_key]
    positions: dict[str, int] = {}
    args: list[Any] = []
    for entry, lists in batch:
        where = []
        for name, step in lists:
            key = queues.key(name, step)
            if key not in positions:
                keys.append(key)
                positions[key] = len(keys)
            where.append(str(positions[key]))
        args += [entry.tag, repr(entry.time), entry.raw, given_back(entry.document), ",".join(where)]
    given = [int(number) for number in queues.script(_GIVE_BACK)(keys=keys, args=args)]
    result.changed_meanwhile += len(batch) - len(given)
    for number in given:
        yield batch[number]


# Workers that stop


def _stopping_key(key_prefix: str) -> str:
    return f"{key_prefix}celeryops:stopping"


def note_stopping(client: Any, key_prefix: str, node: str) -> None:
    """A worker that stops hears no remote control and may still run tasks. Said again and again until it has ended."""
    seconds, micro = client.time()
    now = float(seconds) + float(micro) / 1e6
    key = _stopping_key(key_prefix)
    pipe = client.pipeline(transaction=True)
    pipe.zremrangebyscore(key, "-inf", now)
    pipe.zadd(key, {node: now + STOPPING_SECONDS})
    pipe.execute()


def forget_stopping(client: Any, key_prefix: str, node: str) -> None:
    client.zrem(_stopping_key(key_prefix), node)


def stopping(client: Any, key_prefix: str) -> list[str]:
    seconds, micro = client.time()
    now = float(seconds) + float(micro) / 1e6
    return sorted(raw.decode() for raw in client.zrangebyscore(_stopping_key(key_prefix), f"({now}", "+inf"))


# Tasks that were sent and are nowhere


def read_ids(path: str) -> list[str]:
    """Ids a producer wrote down as it sent them: one a line, bare or as the member `id` of a line of JSON."""
    found: dict[str, None] = {}
    try:
        with open(path, encoding="utf-8") as handle:
            for number, line in enumerate(handle, 1):
                text = line.strip()
                if not text:
                    continue
                if text.startswith("{"):
                    try:
                        text = json.loads(text)["id"]
                    except (ValueError, KeyError) as exc:
                        raise PreconditionFailed(f"sent: {path}: line {number} is no JSON with a member id.") from exc
                found[str(text)] = None
    except FileNotFoundError as exc:
        raise PreconditionFailed(f"sent: there is no file {path} on this host.") from exc
    except (OSError, UnicodeDecodeError) as exc:
        raise PreconditionFailed(f"sent: cannot read {path}: {exc}.") from exc
    return list(found)


def nowhere(queues: RedisQueues, control: Control, backend: Any, ids: Iterable[str]) -> tuple[list[str], int]:
    """Ids in no queue, held by nobody and without a result: lost, if all nodes answered. And the nodes that did not.

    Looked for in the order in which a task moves. A retry moves the other way, so what is missing is looked for again.
    """
    missing = list(ids)
    silent = 0
    for _look in range(2):
        if not missing:
            break
        known: set[str] = set()
        for name in queues.queues():
            known.update(identity for identity in queues.ids(name) if identity)
        known.update(queues.unacked_ids())
        done = control.converse([Request(command) for command in HOLDING], census=True)
        silent = done.census.silent_count
        for answers in done.answers:
            for reply in answers.replies:
                known.update(str((item.get("request") or item).get("id")) for item in reply.value or ())
        missing = [identity for identity in missing if identity not in known]
        missing = _unfinished(backend, missing)
    return missing, silent


def _unfinished(backend: Any, ids: Sequence[str]) -> list[str]:
    found = []
    for start in range(0, len(ids), 1000):
        part = ids[start : start + 1000]
        if hasattr(backend, "mget"):
            metas = backend.mget([backend.get_key_for_task(identity) for identity in part])
            states = [backend.decode_result(raw)["status"] if raw else "PENDING" for raw in metas]
        else:
            states = [backend.get_task_meta(identity)["status"] for identity in part]
        found += [identity for identity, state in zip(part, states, strict=True) if state not in backend.READY_STATES]
    return found
