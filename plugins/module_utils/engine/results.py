# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The result backend as a whole: what is kept there, what can go, which failed tasks can be sent again."""

from __future__ import annotations

import contextlib
import fnmatch
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from typing import Any

from .connection import Broker
from .errors import PreconditionFailed
from .tasks import Order, backend_guard, demand_backend, send

BATCH = 200
# A batch of results is read in one step; a large one by itself.
BATCH_BYTES = 1 << 20
EXAMPLES = 20
# How long a failure that was sent again is remembered.
REMEMBER = 90 * 86400

# Removed only if it is still the result that was judged.   KEYS results...   ARGV their times of end...
_REMOVE = """
local gone = 0
for i, key in ipairs(KEYS) do
  local value = redis.call('GET', key)
  if value and string.find(value, ARGV[i], 1, true) then gone = gone + redis.call('UNLINK', key) end
end
return gone
"""

# Once for each failure, and at one stroke with the message.   KEYS record list   ARGV now until failure message
_SEND_AGAIN = """
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', ARGV[1])
if redis.call('ZSCORE', KEYS[1], ARGV[3]) then return 0 end
redis.call('ZADD', KEYS[1], ARGV[2], ARGV[3])
redis.call('EXPIREAT', KEYS[1], math.ceil(tonumber(ARGV[2])))
redis.call('LPUSH', KEYS[2], ARGV[4])
return 1
"""


def requeued_key(key_prefix: str) -> str:
    return f"{key_prefix}celeryops:requeued"


# What kind of backend


@contextlib.contextmanager
def opened(broker: Broker) -> Iterator[tuple[str, Any]]:
    """("redis" or "sql", Celery's own backend object)."""
    demand_backend(broker)
    broker.celery_app.conf.result_extended = True  # how much of a row is read
    with backend_guard(broker) as backend:
        kind = {"RedisBackend": "redis", "SentinelBackend": "redis", "DatabaseBackend": "sql"}
        found = next((kind[cls.__name__] for cls in type(backend).__mro__ if cls.__name__ in kind), None)
        if found is None:
            raise PreconditionFailed(
                f"the result backend is a {type(backend).__name__}; this works on Redis and on SQL databases only."
            )
        yield found, backend


def _scan(backend: Any, prefix: bytes) -> Iterator[list[bytes]]:
    """Names of keys in batches. SCAN may name a key twice."""
    batch: list[bytes] = []
    special = b"*?[]\\"
    literal = b"".join(b"\\" + bytes([char]) if char in special else bytes([char]) for char in prefix)
    for key in backend.client.scan_iter(match=literal + b"*", count=1000):
        batch.append(key)
        if len(batch) >= BATCH:
            yield batch
            batch = []
    if batch:
        yield batch


def _values(backend: Any, keys: Sequence[bytes], sizes: Sequence[int]) -> Iterator[tuple[bytes, bytes]]:
    part: list[bytes] = []
    weight = 0
    for position, (key, size) in enumerate(zip(keys, sizes, strict=True)):
        part.append(key)
        weight += size
        if weight >= BATCH_BYTES or position == len(keys) - 1:
            for name, value in zip(part, backend.client.mget(part), strict=True):
                if value is not None:
                    yield name, value
            part, weight = [], 0


def parse_time(value: Any) -> datetime | None:
    """When a task ended. Celery writes UTC; older ones without saying so."""
    if isinstance(value, str):
        try:
            value = datetime.fromisoformat(value.replace("Z", "+00:00"))
        except ValueError:
            return None
    if not isinstance(value, datetime):
        return None
    return value if value.tzinfo else value.replace(tzinfo=timezone.utc)


def exception_name(result: Any) -> str | None:
    if isinstance(result, BaseException):
        return type(result).__name__
    return str(result["exc_type"]) if isinstance(result, Mapping) and result.get("exc_type") else None


def failed_name(meta: Mapping[str, Any]) -> str | None:
    """The name of a failed task, as far as the backend has it.

    Of a task it does not know a worker stores the name in the exception alone, and never the arguments, whatever
    result_extended says (C(celery/worker/consumer/consumer.py), on_unknown_task, 5.4 to 5.7).
    """
    if meta.get("name"):
        return str(meta["name"])
    result = meta.get("result")
    if exception_name(result) != "NotRegistered":
        return None
    words = result.args if isinstance(result, BaseException) else result.get("exc_message") if result else None
    return str(words[0]) if isinstance(words, (list, tuple)) and words else None


# Dropping what is old


@dataclass
class Pruned:
    """What was found, and what was removed or would be."""

    backend: str
    count: int = 0
    kept: int = 0
    undated: int = 0
    undecodable: int = 0
    no_expiry: dict[str, Any] = field(default_factory=lambda: {"count": 0, "bytes": 0, "examples": []})
    chord_orphans: dict[str, Any] = field(default_factory=lambda: {"count": 0, "bytes": 0, "examples": []})


def _add(group: dict[str, Any], key: bytes, size: int) -> None:
    group["count"] += 1
    group["bytes"] += size
    if len(group["examples"]) < EXAMPLES:
        group["examples"].append(key.decode(errors="replace"))


def prune(broker: Broker, older_than: float, *, dry: bool) -> Pruned:
    """Remove the results of tasks that ended more than `older_than` seconds ago."""
    with opened(broker) as (kind, backend):
        return _prune_sql(broker, backend, older_than, dry) if kind == "sql" else _prune_redis(backend, older_than, dry)


def _prune_redis(backend: Any, older_than: float, dry: bool) -> Pruned:
    pruned = Pruned("redis")
    before = datetime.now(timezone.utc) - timedelta(seconds=older_than)
    remove = backend.client.register_script(_REMOVE)
    for keys in _scan(backend, backend.task_keyprefix):
        rows = _look(backend, keys, ("ttl", "strlen"))
        sizes = [row[1] if isinstance(row[1], int) else 0 for row in rows]
        old: dict[bytes, str] = {}
        lasting: dict[bytes, int] = {
            key: size for key, size, row in zip(keys, sizes, rows, strict=True) if row[0] == -1
        }
        for key, raw in _values(backend, keys, sizes):
            meta = _decoded(backend, raw)
            done = parse_time(meta.get("date_done")) if meta is not None else None
            if meta is None:
                pruned.undecodable += 1
            elif done is None:
                pruned.undated += 1
            elif done < before:
                old[key] = str(meta["date_done"])
                continue
            pruned.kept += 1
            if key in lasting:
                _add(pruned.no_expiry, key, lasting[key])
        if old:
            gone = len(old) if dry else int(remove(keys=list(old), args=list(old.values())))
            pruned.count += gone
            pruned.kept += len(old) - gone
    for keys in _scan(backend, backend.group_keyprefix):
        for key, row in zip(keys, _look(backend, keys, ("ttl", "idle", "memory")), strict=True):
            ttl, idle, size = row
            if not isinstance(size, int):
                continue
            # The counters of a chord go when its last part ends: idle for long, that part never came.
            counter = key.rpartition(b".")[2] in (b"j", b"t", b"s", b"d", b"c")
            if counter and isinstance(idle, int) and idle > older_than:
                _add(pruned.chord_orphans, key, size)
            if ttl == -1:
                _add(pruned.no_expiry, key, size)
    return pruned


def _look(backend: Any, keys: Sequence[bytes], what: Sequence[str]) -> list[tuple[Any, ...]]:
    pipe = backend.client.pipeline(transaction=False)
    ask: dict[str, Callable[[bytes], Any]] = {
        "ttl": pipe.ttl,
        "strlen": pipe.strlen,
        "idle": lambda key: pipe.object("IDLETIME", key),
        "memory": pipe.memory_usage,
    }
    for key in keys:
        for name in what:
            ask[name](key)
    answers = pipe.execute(raise_on_error=False)
    return [tuple(answers[at : at + len(what)]) for at in range(0, len(answers), len(what))]


def _decoded(backend: Any, raw: bytes) -> Mapping[str, Any] | None:
    try:
        meta = backend.decode(raw)
    except Exception:  # pylint: disable=broad-except  # another serializer, another content
        return None
    return meta if isinstance(meta, Mapping) else None


def _prune_sql(broker: Broker, backend: Any, older_than: float, dry: bool) -> Pruned:
    pruned = Pruned("sql")
    backend.expires = timedelta(seconds=older_than)
    total, old = _count_sql(broker, backend)
    if old and not dry:
        backend.cleanup()
        left = _count_sql(broker, backend)[0]
        pruned.count, pruned.kept = total - left, left
    else:
        pruned.count, pruned.kept = old, total - old
    return pruned


def _count_sql(broker: Broker, backend: Any) -> tuple[int, int]:
    """Rows of tasks and groups: all, and those that Celery's own cleanup takes."""
    session = backend.ResultSession()
    try:
        before = broker.celery_app.now() - backend.expires
        total = old = 0
        for table in (backend.task_cls, backend.taskset_cls):
            rows = session.query(table.id)
            total += rows.count()
            old += rows.filter(table.date_done < before).count()
        return total, old
    finally:
        session.close()


# Sending failed tasks again


@dataclass(frozen=True)
class Failed:
    """Which failed tasks. Every given condition must hold."""

    ids: frozenset[str] = frozenset()
    names: tuple[str, ...] = ()
    exceptions: tuple[str, ...] = ()
    older_than: float | None = None
    newer_than: float | None = None

    def check(self) -> None:
        if not (self.ids or self.names or self.exceptions or self.older_than or self.newer_than):
            raise PreconditionFailed(
                "give ids, names, exceptions, older_than or newer_than: no condition would send every failure again."
            )
        for option, seconds in (("older_than", self.older_than), ("newer_than", self.newer_than)):
            if seconds is not None and seconds < 0:
                raise PreconditionFailed(f"{option}: must not be below 0 seconds, not {seconds:g}.")

    def fits(self, task_id: str, meta: Mapping[str, Any], now: datetime) -> bool:
        if meta.get("status") != "FAILURE" or (self.ids and task_id not in self.ids):
            return False
        name, error = failed_name(meta), exception_name(meta.get("result")) or ""
        # Without a name nobody can tell: it is counted, and never sent.
        if self.names and name and not any(fnmatch.fnmatchcase(name, one) for one in self.names):
            return False
        if self.exceptions and not any(fnmatch.fnmatchcase(error, one) for one in self.exceptions):
            return False
        done = parse_time(meta.get("date_done"))
        age = (now - done).total_seconds() if done else None
        if self.older_than is not None and (age is None or age < self.older_than):
            return False
        return self.newer_than is None or (age is not None and age <= self.newer_than)


@dataclass
class Requeued:
    matched: int = 0  # failed tasks that fit
    sent: list[dict[str, Any]] = field(default_factory=list)
    count: int = 0
    again: int = 0  # sent again before, for the same failure
    nameless: int = 0  # result_extended was off when they ran, or the worker did not know the task
    unknown_tasks: dict[str, int] = field(default_factory=dict)
    unplaced: int = 0
    undecodable: int = 0
    left: int = 0  # beyond `most`
    not_found: list[str] = field(default_factory=list)


def failures(broker: Broker, wanted: Failed, requeued: Requeued) -> Iterator[tuple[str, dict[str, Any]]]:
    """Failed tasks that fit, with what the backend keeps of them."""
    now = datetime.now(timezone.utc)
    seen: set[str] = set()
    with opened(broker) as (kind, backend):
        for task_id, meta in _failures_sql(backend) if kind == "sql" else _results_redis(backend, wanted, requeued):
            if task_id not in seen and wanted.fits(task_id, meta, now):
                seen.add(task_id)
                yield task_id, dict(meta)
    requeued.not_found = sorted(wanted.ids - seen)


def _results_redis(backend: Any, wanted: Failed, requeued: Requeued) -> Iterator[tuple[str, Mapping[str, Any]]]:
    prefix = backend.task_keyprefix
    batches = (
        iter([[backend.get_key_for_task(task_id) for task_id in sorted(wanted.ids)]])
        if wanted.ids
        else _scan(backend, prefix)
    )
    for keys in batches:
        sizes = [row[0] if isinstance(row[0], int) else 0 for row in _look(backend, keys, ("strlen",))]
        for key, raw in _values(backend, keys, sizes):
            meta = _decoded(backend, raw)
            if meta is None:
                requeued.undecodable += 1
            else:
                yield key[len(prefix) :].decode(), meta


def _failures_sql(backend: Any) -> Iterator[tuple[str, Mapping[str, Any]]]:
    session = backend.ResultSession()
    try:
        import sqlalchemy

        table = backend.task_cls.__table__
        columns = {column["name"] for column in sqlalchemy.inspect(session.get_bind()).get_columns(table.name)}
        if "name" not in columns:
            raise PreconditionFailed(
                "result_extended: the table of results has no names and arguments of tasks, so none can be sent "
                "again. Set result_extended = True in the application; it counts for what fails from then on."
            )
        rows = session.query(backend.task_cls.task_id).filter(backend.task_cls.status == "FAILURE")
        ids = [row[0] for row in rows.order_by(backend.task_cls.date_done)]
    finally:
        session.close()
    for task_id in ids:
        yield task_id, backend.get_task_meta(task_id, cache=False)


def requeue(
    broker: Broker,
    wanted: Failed,
    *,
    queue: str | None,
    known: set[str] | None,
    rate: float = 0.0,
    most: int | None = None,
    dry: bool,
) -> Requeued:
    """Send failed tasks again under their own ids. `known`: names of tasks that workers have, None for any."""
    wanted.check()
    requeued = Requeued()
    unknown: Counter[str] = Counter()
    bare = 0  # result_extended was off
    started = time.monotonic()
    with Again(broker) as again:
        for task_id, meta in failures(broker, wanted, requeued):
            requeued.matched += 1
            name, place = meta.get("name"), queue or meta.get("queue")
            failure = f"{task_id} {meta.get('date_done')}"
            if not name:
                requeued.nameless += 1
                bare += "name" not in meta
            elif known is not None and name not in known:
                unknown[str(name)] += 1
            elif not place:
                requeued.unplaced += 1
            elif again.was_sent(failure):
                requeued.again += 1
            elif most is not None and requeued.count >= most:
                requeued.left += 1
            else:
                if not dry:
                    if rate:
                        time.sleep(max(0.0, started + requeued.count / rate - time.monotonic()))
                    args, kwargs = meta.get("args") or (), meta.get("kwargs") or {}
                    order = Order(str(name), str(place), args=args, kwargs=kwargs, task_id=task_id)
                    if not again.send(failure, order):
                        requeued.again += 1
                        continue
                requeued.count += 1
                if len(requeued.sent) < 1000:
                    requeued.sent.append(
                        {
                            "task_id": task_id,
                            "name": name,
                            "queue": place,
                            "error": exception_name(meta.get("result")),
                            "date_done": str(meta.get("date_done")),
                        }
                    )
    requeued.unknown_tasks = dict(unknown)
    if requeued.matched and bare == requeued.matched:
        raise PreconditionFailed(
            f"result_extended: {bare} failed task(s) fit, and the backend keeps neither name nor "
            f"arguments of any, because the application did not set result_extended. Set result_extended = True; it "
            f"counts for what fails from then on. Until then dead letters are the way to send a task again."
        )
    return requeued


class Again:
    """Sends tasks again, once for each failure, by messages exactly as Celery and kombu would put them into Redis."""

    def __init__(self, broker: Broker) -> None:
        self._broker = broker
        self._taken: list[tuple[str, Any]] = []
        self._record = requeued_key(broker.key_prefix)
        self._script = broker.redis.register_script(_SEND_AGAIN)

    def was_sent(self, failure: str) -> bool:
        return self._broker.redis.zscore(self._record, failure) is not None

    def send(self, failure: str, order: Order) -> bool:
        """False where it was sent again before for the same failure."""
        key, raw = self._make(order)
        now = time.time()
        return bool(self._script(keys=[self._record, key], args=[repr(now), repr(now + REMEMBER), failure, raw]))

    def __enter__(self) -> Again:
        with self._broker.guard():
            self._connection = self._broker.celery_app.connection_for_write()
            self._channel = self._connection.default_channel
            self._channel._put = lambda queue, message, **_options: self._taken.append((queue, message))
            self._producer = self._broker.celery_app.amqp.Producer(self._channel, auto_declare=False)
        return self

    def __exit__(self, *_exc: object) -> None:
        self._connection.release()

    def _make(self, order: Order) -> tuple[str, bytes]:
        """(Redis key, message)"""
        from kombu.utils.json import dumps

        self._taken.clear()
        send(self._broker, order, producer=self._producer)
        (queue, message) = self._taken[0]
        step = self._broker.priority_steps[0]
        suffix = f"{self._broker.sep}{step}" if step else ""
        return f"{self._broker.key_prefix}{queue}{suffix}", dumps(message).encode()
