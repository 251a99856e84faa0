# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Idempotency: one record for each piece of work, so that it is not done twice.

A record is `running` while its owner renews a lease, `waiting` while its task is on its way to a retry, and `done` for
as long as a repetition is to be left out. It ends by itself in every state, so a dead owner blocks nobody for long.
Redis is the store, on its own clock; an SQL database stands in, on the clocks of the hosts.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import os
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, TypeAlias
from urllib.parse import quote, unquote

from .connection import Broker, BrokerSpec, scrub
from .control import Control
from .errors import ConnectionFailed, LockHeld, PreconditionFailed
from .fleet import Fleet, observe

SCOPES = ("global", "user", "tenant")
RUNNING, WAITING, DONE = "running", "waiting", "done"
STATES = (RUNNING, WAITING, DONE)
# Whose owner is at work, is not, and of whom nobody can tell. Only running records have an owner.
ALIVE, GONE, UNKNOWN = "alive", "gone", "unknown"
LEASE = 30.0
# An owner renews three times in a lease. One that did so just now may live, whoever does not answer.
FRESH = 0.5
BATCH = 500

_PREFIX = "celeryops:once:"
_SKIPPED = "celeryops:once-skipped"

# Taken where there is none, where it waits for this very task, where it is ours already (an answer was lost), and from
# an owner known to be dead, who is named by his token.
_TAKE = """
local now = redis.call('HMGET', KEYS[1], 'state', 'token', 'id', 'info')
if now[1] and now[2] ~= ARGV[1] and now[2] ~= ARGV[5] and not (now[1] == 'waiting' and now[3] == ARGV[2]) then
  now[5] = redis.call('PTTL', KEYS[1])
  return now
end
redis.call('HSET', KEYS[1], 'state', 'running', 'token', ARGV[1], 'id', ARGV[2], 'info', ARGV[3])
redis.call('PEXPIRE', KEYS[1], ARGV[4])
return 1
"""
# Never over another owner's record; over none at all, for that one has run out or was lost with its Redis.
_WRITE = """
local token = redis.call('HGET', KEYS[1], 'token')
if token and token ~= ARGV[1] then return 0 end
if ARGV[5] == '0' then return redis.call('DEL', KEYS[1]) end
redis.call('HSET', KEYS[1], 'state', ARGV[3], 'token', ARGV[1], 'id', ARGV[2], 'info', ARGV[4])
redis.call('PEXPIRE', KEYS[1], ARGV[5])
return 1
"""


@dataclass(frozen=True)
class Record:
    """`process` names one process of one boot of one host; `value` is the result as JSON, None where it is not kept."""

    state: str
    token: str
    task_id: str
    node: str = ""
    process: str = ""
    began: float = 0.0
    attempt: int = 1
    lease: float = LEASE
    value: str | None = None

    def info(self) -> str:
        return json.dumps([self.node, self.process, self.began, self.attempt, self.lease, self.value])

    @classmethod
    def of(cls, state: str, token: str, task_id: str, info: str | bytes) -> Record:
        return cls(state, token, task_id, *json.loads(info))


@dataclass(frozen=True)
class Found:
    key: str
    record: Record
    expires_in: float
    store: str = "redis"

    def as_dict(self) -> dict[str, Any]:
        """Without the value, which may be anything."""
        task, scope = key_parts(self.key)
        values = asdict(self.record)
        kept = values.pop("value") is not None
        return {
            "key": self.key, "task": task, "scope": scope, **values, "value_kept": kept,
            "expires_in": round(self.expires_in, 1), "store": self.store,
        }  # fmt: skip


def key_of(task: str, scope: str, member: str, digest: str) -> str:
    """`member` is the user or tenant. Nothing else of the arguments can be read in a key."""
    where = f"{scope}={quote(member, safe='')}" if scope != "global" else scope
    return f"{_PREFIX}{quote(task, safe='.')}:{where}:{digest}"


def key_parts(key: str) -> tuple[str, str]:
    """Task and scope of a key, the latter as `global`, `user=7` or `tenant=acme`."""
    task, where, _digest = key.removeprefix(_PREFIX).split(":")
    return unquote(task), unquote(where)


class _Connection:
    """A bare connection. Answers come in the order of the commands; some are read with the next one."""

    def __init__(self, client: Any) -> None:
        self._client = client  # gives the connection back when nobody refers to it
        self._connection = client.connection
        self.owed: list[Callable[[Any], None]] = []
        self.writes = False  # whether its Redis is known to have the script

    def send(self, *command: bytes | str | int) -> None:
        """Packed here: redis-py packs for any type and encoding, and takes several times as long."""
        parts = [b"*%d\r\n" % len(command)]
        for part in command:
            data = part if isinstance(part, bytes) else str(part).encode()
            parts.append(b"$%d\r\n%b\r\n" % (len(data), data))
        self._connection.send_packed_command((b"".join(parts),))

    def answer(self) -> Any:
        """Of the last command. What a posted one is answered with an error is never told."""
        from redis.exceptions import ResponseError

        while self.owed:
            told = self.owed.pop(0)
            try:
                answer = self._connection.read_response()
            except ResponseError:
                continue
            told(answer)
        return self._connection.read_response()

    def close(self) -> None:
        """Also after a time limit that struck in the middle: an answer would be taken for that of another command."""
        self.owed.clear()
        self.writes = False
        self._connection.disconnect()


class RedisStore:
    """Keys are without the key prefix everywhere but here. Each thread has a connection of its own."""

    name = "redis"

    def __init__(self, broker: Broker) -> None:
        self.broker = broker
        self._local = threading.local()
        self._opening = threading.Lock()
        self._digests = {script: hashlib.sha1(script.encode()).hexdigest() for script in (_TAKE, _WRITE)}

    def _client(self) -> _Connection:
        """The connection of this thread."""
        found: _Connection | None = getattr(self._local, "connection", None)
        if found is None:
            with self._opening:  # of two clients made at once the loser would take all connections with it
                found = self._local.connection = _Connection(self.broker.redis.client())
        return found

    def _call(self, *command: Any) -> Any:
        """One command on the bare connection: redis-py's own way takes as long again as Redis."""
        from redis.exceptions import ConnectionError as Lost
        from redis.exceptions import ResponseError

        connection = self._client()
        for last in (False, True):
            try:
                connection.send(*command)
                return connection.answer()
            except ResponseError:
                raise
            except BaseException as exc:
                connection.close()
                if last or not isinstance(exc, Lost):
                    raise
        raise AssertionError("the second try returns or raises")

    def _script(self, script: str, key: str, *arguments: Any) -> Any:
        from redis.exceptions import NoScriptError

        full = self.broker.key_prefix + key
        with self.broker.guard():
            try:
                return self._call("EVALSHA", self._digests[script], 1, full, *arguments)
            except NoScriptError:
                return self._call("EVAL", script, 1, full, *arguments)

    def take(self, key: str, record: Record, over: str = "") -> Found | None:
        """None when it is ours now, else what is there."""
        answer = self._script(_TAKE, key, record.token, record.task_id, record.info(), int(record.lease * 1000), over)
        return None if answer == 1 else self._found(key, *answer)

    def write(self, key: str, record: Record, seconds: float) -> bool:
        """Our record as it is now; no seconds, no record. False where another has it."""
        answer = self._script(_WRITE, key, *self._written(record, seconds))
        return bool(answer) or seconds <= 0

    def post(self, key: str, record: Record, seconds: float, told: Callable[[bool], None]) -> None:
        """Write without waiting: `told` hears the answer with that of this thread's next command, or never.

        The first on a connection is waited for: it brings the script.
        """
        full = self.broker.key_prefix + key
        connection = self._client()
        if not connection.writes:
            told(self.write(key, record, seconds))
            connection.writes = True
            return
        try:
            connection.send("EVALSHA", self._digests[_WRITE], 1, full, *self._written(record, seconds))
        except BaseException as exc:
            connection.close()
            with self.broker.guard():
                raise exc
        connection.owed.append(lambda answer: told(bool(answer) or seconds <= 0))

    @staticmethod
    def _written(record: Record, seconds: float) -> tuple[Any, ...]:
        milliseconds = max(1, int(seconds * 1000)) if seconds > 0 else 0
        return record.token, record.task_id, record.state, record.info(), milliseconds

    def remove(self, key: str, token: str) -> bool:
        return bool(self._script(_WRITE, key, token, "", "", "", 0))

    def skipped(self, task: str) -> None:
        with self.broker.guard():
            self._call("HINCRBY", self.broker.key_prefix + _SKIPPED, task, 1)

    def skips(self) -> dict[str, int]:
        with self.broker.guard():
            found = self.broker.redis.hgetall(self.broker.key_prefix + _SKIPPED)
        return {task.decode(): int(count) for task, count in sorted(found.items())}

    def read(self, task: str = "") -> Iterator[Found]:
        """All records, or those of one task."""
        pattern = _PREFIX + (quote(task, safe=".") + ":" if task else "")
        cursor = 0
        while True:
            with self.broker.guard():
                cursor, keys = self.broker.redis.scan(cursor, self._glob(pattern), BATCH)
                pipe = self.broker.redis.pipeline(transaction=False)
                for key in keys:
                    pipe.hmget(key, "state", "token", "id", "info")
                    pipe.pttl(key)
                answers = pipe.execute() if keys else []
            for number, key in enumerate(keys):
                values, left = answers[2 * number : 2 * number + 2]
                if values[0] is not None:
                    state, token, task_id, info = values
                    yield self._found(
                        key.decode().removeprefix(self.broker.key_prefix), state, token, task_id, info, left
                    )
            if not cursor:
                return

    def _glob(self, prefix: str) -> str:
        text = self.broker.key_prefix + prefix
        return "".join(f"\\{char}" if char in "*?[]\\^" else char for char in text) + "*"

    @staticmethod
    def _found(key: str, state: bytes, token: bytes, task_id: bytes, info: bytes, left: int) -> Found:
        return Found(key, Record.of(state.decode(), token.decode(), task_id.decode(), info), max(0, left) / 1000)


class SqlStore:
    """The same records in one table, which is made where it is missing."""

    name = "database"

    def __init__(self, url: str) -> None:
        try:
            import sqlalchemy
        except ImportError as exc:
            raise PreconditionFailed(
                "CELERYOPS_ONCE_DATABASE: the library sqlalchemy is missing. Add it to the application's requirements."
            ) from exc
        self._sql = sqlalchemy
        try:
            self._engine = sqlalchemy.create_engine(url, pool_pre_ping=True)
        except Exception as exc:
            raise PreconditionFailed(
                f"CELERYOPS_ONCE_DATABASE: SQLAlchemy cannot use it: {scrub(exc, url)}. Give a database URL and "
                f"install its driver."
            ) from exc
        self._table = sqlalchemy.Table(
            "celeryops_once",
            sqlalchemy.MetaData(),
            sqlalchemy.Column("digest", sqlalchemy.String(64), primary_key=True),
            sqlalchemy.Column("name", sqlalchemy.Text, nullable=False),
            sqlalchemy.Column("state", sqlalchemy.String(10), nullable=False),
            sqlalchemy.Column("token", sqlalchemy.String(64), nullable=False),
            sqlalchemy.Column("task_id", sqlalchemy.String(255), nullable=False),
            sqlalchemy.Column("info", sqlalchemy.Text, nullable=False),
            sqlalchemy.Column("expires", sqlalchemy.Float(53), nullable=False, index=True),
        )
        self._made = False
        self._url = url

    def _make(self) -> None:
        try:
            self._table.metadata.create_all(self._engine)
        except self._sql.exc.DBAPIError:
            # Another process has just made it: then it is seen now.
            self._table.metadata.create_all(self._engine)
        self._made = True

    def _run(self, work: Callable[[Any], Any]) -> Any:
        try:
            if not self._made:
                self._make()
            with self._engine.begin() as connection:
                return work(connection)
        except self._sql.exc.IntegrityError:
            raise
        except self._sql.exc.SQLAlchemyError as exc:
            text = scrub(str(exc).splitlines()[0], self._url)
            raise ConnectionFailed(f"the database of the locks failed: {text}. Check CELERYOPS_ONCE_DATABASE.") from exc

    def _values(self, key: str, record: Record, seconds: float) -> dict[str, Any]:
        return {
            "digest": _digest(key), "name": key, "state": record.state, "token": record.token,
            "task_id": record.task_id, "info": record.info(), "expires": time.time() + seconds,
        }  # fmt: skip

    def take(self, key: str, record: Record, over: str = "") -> Found | None:
        table = self._table
        values = self._values(key, record, record.lease)
        free = self._sql.or_(
            table.c.expires <= time.time(),
            table.c.token.in_([record.token, over]),
            self._sql.and_(table.c.state == WAITING, table.c.task_id == record.task_id),
        )
        ours = table.update().where(table.c.digest == values["digest"], free).values(**values)
        while True:
            if self._run(lambda connection: connection.execute(ours).rowcount):
                return None
            found = self.look(key)
            if found is not None:
                return found
            try:
                self._run(lambda connection: connection.execute(table.insert().values(**values)))
                return None
            except self._sql.exc.IntegrityError:
                continue  # another was quicker, or what has run out is still there

    def write(self, key: str, record: Record, seconds: float) -> bool:
        if seconds <= 0:
            self.remove(key, record.token)
            return True
        values = self._values(key, record, seconds)
        table = self._table
        mine = self._sql.and_(
            table.c.digest == values["digest"],
            self._sql.or_(table.c.token == record.token, table.c.expires <= time.time()),
        )
        if self._run(lambda connection: connection.execute(table.update().where(mine).values(**values)).rowcount):
            return True
        try:
            self._run(lambda connection: connection.execute(table.insert().values(**values)))
        except self._sql.exc.IntegrityError:
            return False
        return True

    def remove(self, key: str, token: str) -> bool:
        table = self._table
        gone = table.delete().where(table.c.digest == _digest(key), table.c.token == token)
        return bool(self._run(lambda connection: connection.execute(gone).rowcount))

    def look(self, key: str) -> Found | None:
        table = self._table
        one = table.select().where(table.c.digest == _digest(key), table.c.expires > time.time())
        return next(self._rows(one), None)

    def read(self, task: str = "") -> Iterator[Found]:
        wanted = self._table.select().where(self._table.c.expires > time.time())
        yield from (found for found in self._rows(wanted) if not task or key_parts(found.key)[0] == task)

    def in_use(self) -> bool:
        """Whether anything counts that is in here. What no longer does is removed."""
        table, now = self._table, time.time()
        live = self._sql.select(table.c.digest).where(table.c.expires > now).limit(1)
        self._run(lambda connection: connection.execute(table.delete().where(table.c.expires <= now)))
        return bool(self._run(lambda connection: connection.execute(live).first()))

    def _rows(self, query: Any) -> Iterator[Found]:
        for row in self._run(lambda connection: connection.execute(query).fetchall()):
            record = Record.of(row.state, row.token, row.task_id, row.info)
            yield Found(row.name, record, max(0.0, row.expires - time.time()), self.name)


Store: TypeAlias = "RedisStore | SqlStore"


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def process_name(pid: int | None = None) -> str:
    """This process, distinguishable from every other on any host at any time; empty where the system does not tell."""
    pid = pid or os.getpid()
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as handle:
            boot = handle.read().strip()
        return f"{boot}:{os.stat('/proc/self/ns/pid').st_ino}:{pid}:{_started(pid)}"
    except OSError:
        return ""


def _started(pid: int) -> str:
    with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as handle:
        fields = handle.read().rpartition(")")[2].split()
    # A zombie is dead.
    return fields[19] if fields[0] not in "ZX" else ""


def process_is_dead(name: str) -> bool:
    """Whether a process of this host, named by process_name, surely does not run any more."""
    here = process_name().split(":")
    there = name.split(":")
    if len(there) != 4 or len(here) != 4 or there[:2] != here[:2]:
        return False
    try:
        return _started(int(there[2])) != there[3]
    except (FileNotFoundError, ProcessLookupError):
        return True
    except OSError:
        return False


# What operators do


@dataclass(frozen=True)
class Choice:
    """Which records: all that is given must fit."""

    task: str = ""
    scope: str = ""
    states: Collection[str] = STATES
    keys: Collection[str] = ()
    task_ids: Collection[str] = ()

    def fits(self, found: Found) -> bool:
        task, scope = key_parts(found.key)
        return (
            (not self.task or fnmatch.fnmatchcase(task, self.task))
            and (not self.scope or scope == self.scope)
            and found.record.state in self.states
            and (not self.keys or found.key in self.keys)
            and (not self.task_ids or found.record.task_id in self.task_ids)
        )


@dataclass
class Locks:
    """`owners` has ALIVE, GONE or UNKNOWN, and why, for the key of each running record. `count` knows all of them."""

    found: list[Found] = field(default_factory=list)
    count: dict[str, int] = field(default_factory=lambda: dict.fromkeys(STATES, 0))
    owners: dict[str, tuple[str, str]] = field(default_factory=dict)
    skipped: dict[str, int] = field(default_factory=dict)

    def as_list(self) -> list[dict[str, Any]]:
        result = []
        for found in sorted(self.found, key=lambda item: (item.key, item.store)):
            owner, why = self.owners.get(found.key, (None, None))
            result.append({**found.as_dict(), "owner": owner, "why": why})
        return result


def open_stores(broker: Broker | None, database: str) -> list[Store]:
    stores: list[Store] = [RedisStore(broker)] if broker else []
    if database:
        stores.append(SqlStore(database))
    if not stores:
        raise PreconditionFailed(
            "redis_url, database: the broker is not Redis. Give what the workers have in CELERYOPS_ONCE_REDIS or "
            "CELERYOPS_ONCE_DATABASE."
        )
    return stores


def look(stores: Sequence[Store], choice: Choice, most: int | None = None) -> Locks:
    """`most`: so many of those done are enough, of which there may be millions."""
    exact = choice.task if not any(char in choice.task for char in "*?[") else ""
    locks = Locks()
    for store in stores:
        for found in filter(choice.fits, store.read(exact)):
            state = found.record.state
            if state != DONE or most is None or locks.count[DONE] < most:
                locks.found.append(found)
            locks.count[state] += 1
        if isinstance(store, RedisStore):
            locks.skipped = store.skips()
    return locks


def ask_owners(locks: Locks, control: Control, dead: Collection[str] = ()) -> None:
    """Ask the fleet which of the running records' tasks run."""
    if any(found.record.state == RUNNING for found in locks.found):
        judge(locks, observe(control, [("active", {})], census=True), dead)


def judge(locks: Locks, fleet: Fleet, dead: Collection[str] = ()) -> None:
    answered = {name for name in fleet.workers if "active" in fleet.nodes[name].replies}
    for name in sorted(set(dead) & set(fleet.present)):
        raise PreconditionFailed(f"dead: {name} answers. Name only nodes that are surely dead.")
    active: dict[str, set[str]] = {
        name: {str(task.get("id")) for task in fleet.nodes[name].replies["active"]} for name in answered
    }
    everyone = fleet.complete and fleet.subscribed is not None and set(fleet.workers) <= answered
    for found in locks.found:
        record = found.record
        if record.state != RUNNING:
            continue
        runs_on = [name for name, ids in active.items() if record.task_id in ids]
        if runs_on:
            owner, why = ALIVE, f"{', '.join(sorted(runs_on))} runs it"
        elif record.node in answered:
            owner, why = GONE, f"{record.node} does not run it"
        elif record.node in dead:
            owner, why = GONE, f"{record.node} is named as dead"
        elif not everyone:
            owner, why = UNKNOWN, f"{record.node or 'its process'} did not answer"
        elif found.expires_in > record.lease * FRESH:
            owner, why = UNKNOWN, f"{record.node or 'its process'} is not connected, yet it was renewed just now"
        else:
            owner, why = GONE, f"{record.node or 'its process'} is not connected and renews it no more"
        locks.owners[found.key] = owner, why


def demand_dead_owners(locks: Locks) -> None:
    held = [item for item in locks.as_list() if item["owner"] in (ALIVE, UNKNOWN)]
    if not held:
        return
    told = "; ".join(
        f"{item['task']} [{item['task_id']}] {item['scope']}: {item['why']}, ends in {item['expires_in']} s unless "
        f"renewed"
        for item in held[:5]
    )
    more = f"; and {len(held) - 5} more" if len(held) > 5 else ""
    raise LockHeld(
        f"{len(held)} of these locks may have a living owner, so none was cleared: {told}{more}. Wait for the task or "
        f"end it; name in dead a node that is surely dead.",
        locks=held,
    )


def clear(stores: Sequence[Store], locks: Locks) -> list[Found]:
    """Only what is as it was found: who has taken it since keeps it."""
    by_name = {store.name: store for store in stores}
    return [found for found in locks.found if by_name[found.store].remove(found.key, found.record.token)]


def settings(environment: Mapping[str, str]) -> dict[str, str]:
    """What processes are told about the stores."""
    return {
        name: environment.get(variable, "")
        for name, variable in (("redis", "CELERYOPS_ONCE_REDIS"), ("database", "CELERYOPS_ONCE_DATABASE"))
    }


def store_broker(spec: BrokerSpec | None, redis_url: str) -> Broker | None:
    """Where the records are in Redis: the URL, else the broker if it is Redis."""
    if redis_url:
        prefix = spec.key_prefix if spec else ""
        spec = BrokerSpec.build(url=redis_url, key_prefix=prefix)
        if Broker(spec).kind != "redis":
            raise PreconditionFailed("CELERYOPS_ONCE_REDIS: must be a Redis URL, as in redis://host:6379/1.")
    broker = Broker(spec) if spec else None
    return broker if broker and broker.kind == "redis" else None
