# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Dead letters: what failed for good, whole, in QUEUE.dead; and the way back.

An entry is the message as it came, with one more header, the last one: celeryops_dead, which says what happened. It
is a message of kombu's layout in the list of the most urgent step, whatever its priority was.
"""

from __future__ import annotations

import base64
import contextlib
import fnmatch
import json
import re
import time
import uuid
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from typing import Any

from .connection import LinkedStore
from .errors import BadMessage, PreconditionFailed
from .message import PUBLISHED_HEADER, Envelope, identify
from .queues import _GUARD, _SPLIT, Outcome, RedisQueues, Selection, _joined, _literal, _Lock, _text

HEADER = "celeryops_dead"
COMMAND = "celeryops_dead_letters"
SUFFIX = ".dead"
REASONS = ("exception", "time_limit", "worker_lost", "unknown_task", "rejected")
MOST = 50_000
MOST_AGE = 180 * 86400
# A push that is sent again because its answer was lost must not make a second entry.
_TOKEN_TTL = 600
_AMQP_PROPERTIES = ("priority", "correlation_id", "reply_to")

# KEYS list token counters   ARGV message most oldest queue ttl
PUSH = """
if redis.call('EXISTS', KEYS[2]) == 1 then return 0 end
local length = redis.call('LPUSH', KEYS[1], ARGV[1])
redis.call('SET', KEYS[2], 1, 'EX', ARGV[5])
redis.call('HINCRBY', KEYS[3], 'captured:' .. ARGV[4], 1)
local over = length - tonumber(ARGV[2])
if over > 0 then
  redis.call('LTRIM', KEYS[1], 0, ARGV[2] - 1)
  redis.call('HINCRBY', KEYS[3], 'dropped:' .. ARGV[4], over)
end
for _ = 1, 100 do
  local raw = redis.call('LINDEX', KEYS[1], -1)
  local at = raw and string.match(raw, '"celeryops_dead": {"time": ([0-9.]+)')
  if not at or tonumber(at) >= tonumber(ARGV[3]) then break end
  redis.call('RPOP', KEYS[1])
  redis.call('HINCRBY', KEYS[3], 'dropped:' .. ARGV[4], 1)
end
return 1
"""

# KEYS lock source odd (target)...   ARGV token ttl taken (lengths messages) of odd and of each target
_REQUEUE = (
    _GUARD
    + _SPLIT
    + """
for i = 3, #KEYS do
  local list, n = split(ARGV[2 * i - 2], ARGV[2 * i - 1])
  if n > 0 then redis.call('LPUSH', KEYS[i], unpack(list)) end
end
redis.call('LTRIM', KEYS[2], 0, -tonumber(ARGV[3]) - 1)
return 1
"""
)

# No string can hold these quotes unescaped, and the record holds neither objects nor lists, so both ends are exact.
_BEGIN = b', "celeryops_dead": {'
_END = b'}}, "properties": {'
_RETRIES = re.compile(rb'(, "retries": )(\d+)(, "timelimit": )')
_STAMP = re.compile(rb'("celeryops_published": )[0-9.]+')
_PRIORITY = re.compile(rb', "priority": (\d+)[,}]')
_NO_EXPIRES = b', "expires": null, '


@dataclass(frozen=True)
class Record:
    """What happened. `time` comes first in the message: the script that keeps the cap reads it there."""

    time: float
    reason: str
    exception: str
    text: str
    traceback: str
    node: str
    queue: str
    exchange: str
    routing_key: str
    priority: int | None
    release: str | None


def dead_queue(queue: str) -> str:
    return queue + SUFFIX


def origin_queue(queue: str) -> str:
    if not queue.endswith(SUFFIX) or queue == SUFFIX:
        raise PreconditionFailed(
            f"queue: {queue!r} is no dead-letter queue. Their names end in {SUFFIX}, such as orders{SUFFIX}."
        )
    return queue[: -len(SUFFIX)]


def counters_key(key_prefix: str) -> str:
    return f"{key_prefix}celeryops:dead:counters"


@dataclass
class Letter:
    """An entry on its way into the broker. The token makes sending it again harmless."""

    message: Any  # of kombu
    record: Record
    identity: str
    size: int
    token: str = field(default_factory=lambda: uuid.uuid4().hex)
    tries: int = 0

    @classmethod
    def of(cls, message: Any, record: Record, identity: str) -> Letter:
        return cls(message, record, identity, len(message.body or b"") + len(record.traceback))

    @property
    def headers(self) -> dict[str, Any]:
        found = {name: value for name, value in (self.message.headers or {}).items() if name != HEADER}
        return {**found, HEADER: asdict(self.record)}

    def compose(self) -> bytes:
        return compose(self.message, self.headers, dead_queue(self.record.queue))


def compose(message: Any, headers: Mapping[str, Any], queue: str) -> bytes:
    """A message of kombu as it lies in a queue in Redis. What JSON has not, as a time in a header of AMQP, as text."""
    body = message.body or b""
    raw = body.encode() if isinstance(body, str) else bytes(body)
    properties = {name: value for name, value in (message.properties or {}).items() if name != "application_headers"}
    return json.dumps(
        {
            "body": base64.b64encode(raw).decode(),
            "content-encoding": message.content_encoding or "utf-8",
            "content-type": message.content_type or "application/json",
            "headers": headers,
            "properties": {
                **properties,
                "delivery_info": {"exchange": "", "routing_key": queue},
                "delivery_tag": str(uuid.uuid4()),
                "body_encoding": "base64",
            },
        },
        default=str,
    ).encode()


def deliver(connection: Any, letters: Sequence[Letter], most: int, age: float) -> list[Exception | None]:
    """Put entries into their dead-letter queues, each once however often it is tried, and keep the cap. For each what
    the broker had against it; may raise when the broker is away."""
    store = LinkedStore.of(connection)
    if store is not None:
        return push(store.redis, store.key_prefix, letters, most, time.time() - age)
    found: list[Exception | None] = []
    for letter in letters:
        try:
            publish(connection, letter, most, age)
        except connection.connection_errors as exc:
            return [*found, *[exc] * (len(letters) - len(found))]
        except Exception as exc:
            letter.tries += 1
            found.append(exc)
        else:
            found.append(None)
    return found


def push(client: Any, key_prefix: str, letters: Sequence[Letter], most: int, oldest: float) -> list[Exception | None]:
    script = client.register_script(PUSH)
    pipe = client.pipeline(transaction=False)
    found: list[Exception | None] = []
    for letter in letters:
        queue = dead_queue(letter.record.queue)
        keys = [key_prefix + queue, f"{key_prefix}celeryops:dead:token:{letter.token}", counters_key(key_prefix)]
        try:
            script(keys, [letter.compose(), most, oldest, queue, _TOKEN_TTL], client=pipe)
        except (TypeError, ValueError) as exc:  # a header that JSON cannot hold
            found.append(exc)
        else:
            found.append(None)
    answers = iter(pipe.execute(raise_on_error=False))
    for position, letter in enumerate(letters):
        answer = found[position] or next(answers)
        found[position] = answer if isinstance(answer, Exception) else None
        # A replica, full memory or a full disk may pass; these do not.
        letter.tries += isinstance(answer, (TypeError, ValueError)) or "WRONGTYPE" in str(answer)
    return found


def publish(connection: Any, letter: Letter, most: int, age: float) -> None:
    """Put one entry into a durable queue of an AMQP broker and wait until the broker has confirmed it."""
    name = dead_queue(letter.record.queue)
    declare_amqp(connection, name, most, age)
    with connection.channel() as channel:
        send_amqp(connection.Producer(channel), name, letter.message, letter.message.body, letter.headers)


def send_amqp(producer: Any, queue: str, message: Any, body: Any, headers: Mapping[str, Any]) -> None:
    """Like this message, with this body and these headers."""
    properties = {name: (message.properties or {}).get(name) for name in _AMQP_PROPERTIES}
    producer.publish(
        body or b"", exchange="", routing_key=queue, headers=dict(headers),
        content_type=message.content_type or "application/json", content_encoding=message.content_encoding or "utf-8",
        delivery_mode=2, **{name: value for name, value in properties.items() if value is not None},
    )  # fmt: skip


def declare_amqp(connection: Any, name: str, most: int, age: float) -> None:
    """A queue that exists stays as it is: RabbitMQ refuses other limits for it."""
    channel = connection.channel()
    try:
        channel.queue_declare(name, passive=True)
    except connection.channel_errors:  # and the broker has closed the channel
        arguments = {"x-max-length": most, "x-message-ttl": int(age * 1000)}
        with connection.channel() as fresh:
            fresh.queue_declare(name, durable=True, auto_delete=False, arguments=arguments)
    else:
        channel.close()


def read_record(raw: bytes) -> dict[str, Any]:
    """The record of an entry; BadMessage where there is none."""
    start = raw.find(_BEGIN)
    end = raw.find(_END, start)
    if start >= 0 and end >= 0:
        with contextlib.suppress(ValueError):
            found = json.loads(raw[start + len(_BEGIN) - 1 : end + 1])
            if isinstance(found, dict):
                return found
    found = Envelope.parse(raw).document["headers"].get(HEADER)
    if not isinstance(found, dict) or not isinstance(found.get("time"), (int, float)):
        raise BadMessage(f"no dead letter: the header {HEADER} is missing")
    return found


@dataclass(frozen=True)
class DeadSelection(Selection):
    """Which dead letters. `older_than` and `newer_than` count from the failure; `known` are the tasks that may go."""

    exceptions: tuple[str, ...] = ()
    reasons: tuple[str, ...] = ()
    newer_than: float | None = None
    known: frozenset[str] | None = None

    def __bool__(self) -> bool:
        return super().__bool__() or self._of_record or self.known is not None

    @property
    def _of_record(self) -> bool:
        return bool(self.exceptions or self.reasons) or self.older_than is not None or self.newer_than is not None

    @property
    def by_task_only(self) -> bool:
        return bool(self) and not self.ids and not self._of_record and not self.by_arguments

    def has_task(self, name: str) -> bool:
        return super().has_task(name) and (self.known is None or name in self.known)

    def judge(self, raw: bytes, now: float) -> tuple[bool, str, bool]:
        task, identity = identify(raw)
        wanted = self.has_task(task) and (not self.ids or identity in self.ids)
        if wanted and self.by_arguments:
            wanted = Envelope.parse(raw).has_arguments(self.args, self.kwargs)
        return wanted and (not self._of_record or self._has_record(read_record(raw), now)), task, False

    def _has_record(self, record: dict[str, Any], now: float) -> bool:
        age, exception = now - record["time"], str(record.get("exception"))
        return (
            (not self.exceptions or any(fnmatch.fnmatchcase(exception, item) for item in self.exceptions))
            and (not self.reasons or record.get("reason") in self.reasons)
            and (self.older_than is None or age >= self.older_than)
            and (self.newer_than is None or age <= self.newer_than)
        )


class Revival:
    """Makes a dead letter the message that it was: for its queue, in its priority, tried anew."""

    def __init__(self, queue: str, steps: Iterable[int], now: float) -> None:
        self._queue = queue
        self._steps = sorted(steps)
        self._now = now
        self._dead = f'"delivery_info": {{"exchange": "", "routing_key": {json.dumps(dead_queue(queue))}}}'.encode()
        self._live = f'"delivery_info": {{"exchange": "", "routing_key": {json.dumps(queue)}}}'.encode()
        self._stamp = b"\\g<1>" + json.dumps(now).encode()

    def step(self, priority: int | None) -> int:
        """The list that kombu puts this priority in."""
        wanted = max(0, min(9, priority or 0))
        return max((step for step in self._steps if step <= wanted), default=self._steps[0])

    def __call__(self, raw: bytes) -> tuple[str, int, bytes]:
        """(task, step, message); BadMessage for what is no dead letter."""
        return self._quick(raw) or self._thorough(raw)

    def _quick(self, raw: bytes) -> tuple[str, int, bytes] | None:
        start = raw.find(_BEGIN)
        end = raw.find(_END, start) if start >= 0 else -1
        if end < 0:
            return None
        head, tail = raw[:start], raw[end + 1 :]
        if head.count(_NO_EXPIRES) != 1 or tail.count(self._dead) != 1 or tail.count(b'"delivery_info"') != 1:
            return None
        head, retries = _RETRIES.subn(rb"\g<1>0\g<3>", head)
        priorities = _PRIORITY.findall(tail)
        if retries != 1 or len(priorities) > 1:
            return None
        task, _identity = identify(raw)
        head = _STAMP.sub(self._stamp, head)
        return task, self.step(int(priorities[0]) if priorities else 0), head + tail.replace(self._dead, self._live)

    def _thorough(self, raw: bytes) -> tuple[str, int, bytes]:
        envelope = Envelope.parse(raw)
        document = envelope.document
        headers = document["headers"]
        if not isinstance(headers.pop(HEADER, None), dict):
            raise BadMessage(f"no dead letter: the header {HEADER} is missing")
        fields = headers
        if envelope.protocol == 1:
            fields = json.loads(base64.b64decode(document["body"]))
        if "retries" in fields:
            fields["retries"] = 0
        if is_over(fields.get("expires"), self._now):
            fields["expires"] = None
        if envelope.protocol == 1:
            document["body"] = base64.b64encode(json.dumps(fields).encode()).decode()
        if PUBLISHED_HEADER in headers:
            headers[PUBLISHED_HEADER] = self._now
        document["properties"]["delivery_info"] = {"exchange": "", "routing_key": self._queue}
        return envelope.task, self.step(envelope.priority), json.dumps(document).encode()


def is_over(expires: Any, now: float) -> bool:
    """Whether this time, which Celery writes as ISO 8601, has passed."""
    if not isinstance(expires, str):
        return False
    try:
        moment = datetime.fromisoformat(expires.replace("Z", "+00:00"))
    except ValueError:
        return False
    return (moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)).timestamp() <= now


def survey(
    messages: Iterable[bytes],
    selection: DeadSelection,
    now: float,
    *,
    most: int = 100_000,
    show: int = 0,
    include_arguments: bool = False,
) -> dict[str, Any]:
    """Counts of what is selected, and the first `show` of it. `most`: entries to look at."""
    counts: dict[str, Counter[str]] = {"tasks": Counter(), "exceptions": Counter(), "reasons": Counter()}
    result: dict[str, Any] = {"matched": 0, "undecodable": 0, "oldest_age": None, "newest_age": None}
    entries: list[dict[str, Any]] = []
    scanned, complete = 0, True
    for raw in messages:
        if scanned == most:
            complete = False
            break
        scanned += 1
        try:
            hit, task, _unknown = selection.judge(raw, now)
            record = read_record(raw)
        except BadMessage:
            result["undecodable"] += 1
            continue
        if not hit:
            continue
        result["matched"] += 1
        age = round(max(0.0, now - record["time"]), 3)
        result["oldest_age"] = max(age, result["oldest_age"] or 0.0)
        result["newest_age"] = min(age, age if result["newest_age"] is None else result["newest_age"])
        counts["tasks"][task] += 1
        counts["exceptions"][str(record.get("exception"))] += 1
        counts["reasons"][str(record.get("reason"))] += 1
        if len(entries) < show:
            entries.append(_entry(raw, record, age, include_arguments))
    named = {name: dict(counter.most_common()) for name, counter in counts.items()}
    return {**result, **named, "scanned": scanned, "complete": complete, "entries": entries}


class DeadLetters(RedisQueues):
    """The dead-letter queues of one Redis database. Purging with a file is inherited; here is the way back.

    A requeue takes the entries aside and moves them in whole batches, each by one script, as a move does: a run that
    is killed leaves each entry in exactly one place, and the next run puts back what is aside.
    """

    rate = 0.0

    def names(self) -> list[str]:
        """Every dead-letter queue that holds an entry. Walks the names of all keys."""
        pattern = _literal(self.key_prefix) + "*" + SUFFIX
        found = (
            _text(key)[len(self.key_prefix) :] for key in self.client.scan_iter(match=pattern, count=1000, _type="list")
        )
        return sorted(name for name in found if name != SUFFIX and not name.startswith("celeryops:"))

    def dropped(self) -> dict[str, int]:
        """Entries that the cap has dropped so far, by dead-letter queue."""
        counts = self.client.hgetall(counters_key(self.key_prefix))
        pairs = ((_text(name).partition(":"), int(count)) for name, count in counts.items())
        return {queue: count for (kind, _colon, queue), count in pairs if kind == "dropped"}

    def look(self, queue: str, selection: DeadSelection, **options: Any) -> dict[str, Any]:
        """What lies there, newest first: see `survey`."""
        return survey(self.messages(queue), selection, self.now(), **options)

    def requeue(self, queue: str, selection: DeadSelection, *, limit: int | None = None, rate: float = 0.0) -> Outcome:
        """Send the selected entries back to where they came from, at most `rate` a second."""
        self.rate = rate
        outcome = self.move(queue, origin_queue(queue), selection, limit=limit)
        outcome.operation = "requeued"
        return outcome

    def _send(self, queue: str, to: str, lock: _Lock, outcome: Outcome) -> None:
        revive = Revival(to, self.steps, self.now())
        counts: Counter[str] = Counter()
        sent = dict.fromkeys(map(str, self.steps), 0)
        started, done = time.monotonic(), 0
        for source_step in self.steps:
            source = self._own(queue, "picked", source_step)
            keys = [source, self._own(queue, "odd", source_step), *(self.key(to, step) for step in self.steps)]
            pace = self._pace(source)
            while True:
                size = min(pace.size(), max(1, int(self.rate / 2))) if self.rate else pace.size()
                batch = self.client.lrange(source, -size, -1)
                if not batch:
                    break
                batch.reverse()
                pace.seen(batch)
                odd: list[bytes] = []
                good: dict[int, list[bytes]] = {step: [] for step in self.steps}
                for raw in batch:
                    try:
                        task, step, message = revive(raw)
                    except (BadMessage, ValueError):
                        odd.append(raw)
                        continue
                    counts[task] += 1
                    good[step].append(message)
                parts = [item for part in (odd, *good.values()) for item in _joined(part)]
                self._run(_REQUEUE, lock, keys, [len(batch), *parts])
                outcome.undecodable += len(odd)
                for step, messages in good.items():
                    sent[str(step)] += len(messages)
                done += len(batch)
                while self.rate and time.monotonic() - started < done / self.rate:
                    time.sleep(min(1.0, max(0.01, done / self.rate - (time.monotonic() - started))))
                    self._keep(lock)
        outcome.by_priority, outcome.count, outcome.tasks = sent, sum(sent.values()), dict(counts.most_common())


def _entry(raw: bytes, record: dict[str, Any], age: float, include_arguments: bool) -> dict[str, Any]:
    envelope = Envelope.parse(raw)
    entry = {"id": envelope.id, "task": envelope.task, "age": age, "retries": envelope.retries, **record}
    if include_arguments:
        entry["args"], entry["kwargs"] = envelope.arguments() or (None, None)
    return entry
