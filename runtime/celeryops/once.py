# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A task that is sent twice is done once: decorator `once`, and the guard behind `celeryops.tasks.IdempotentTask`.

The same work is the same task with the same arguments, or with the same of those named in `by`. Whoever begins it holds
a record (engine/once.py) and renews it while it runs; when it has ended well a marker stays for `ttl` seconds.

- A repetition is left out and logged. It returns the kept result of the first run.
- What must not be left out waits while the first run lasts: the same message handed out again, whose first copy may die
  with its worker, and a member of a chain or chord, which has to hand a result on.
- A task that fails for good leaves nothing, so that it can be sent again. One that retries keeps its place meanwhile.
- An owner that was killed is followed at once on its own host, else when its lease has run out.

Work that ends in the instant before its marker is sent, with its process killed there, is done again. So is work of
less than SHORT seconds whose marker was sent to a Redis that went away in that instant, when its process ends within
CONFIRM seconds, before it could see that.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import logging
import os
import threading
import time
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any

from celery import current_task, signals
from celery.exceptions import Ignore, ImproperlyConfigured, Reject, Retry

from ._environment import disabled
from .engine import once as records
from .engine.connection import Broker, BrokerSpec, scrub, tls_from_app
from .engine.errors import CeleryOpsError

logger = logging.getLogger(__name__)

HOUR = 3600.0
# Seconds for which a repetition is left out, by kind of work.
CATEGORIES = {
    "critical": 4 * HOUR,
    "high_priority": 2 * HOUR,
    "reports": 24 * HOUR,
    "mutations": 6 * HOUR,
    "maintenance": 12 * HOUR,
}
MEMBERS = {"user": "user_id", "tenant": "tenant_id"}
# A result larger than this is not kept.
MOST_VALUE = 64 * 1024
# So often a task may take its process with it before it is given up.
MOST_CRASHES = 3
# A store that failed is not asked again for so long: each try may cost the timeout.
REST = 5.0
TIMEOUT = 2.0
# Whether the database holds anything is asked so often.
LOOK_EVERY = 5.0
# A task shorter than this does not wait for the answer to its marker, which would cost it a good part of its time: the
# next task reads it, or the thread that renews writes the marker again after CONFIRM seconds.
SHORT = 0.05
CONFIRM = 1.0


class OnceError(Exception):
    """Base of the errors below."""


class Duplicate(OnceError):
    """The same work runs or was done, and this call needs a result that there is none of."""


class LocksUnavailable(OnceError):
    """Neither Redis nor the database of the locks can be reached, and the policy is to refuse."""


class GaveUp(OnceError):
    """The task has taken its process with it too often."""


@dataclass(frozen=True)
class Policy:
    scope: str = "global"
    category: str = "high_priority"
    ttl: float | None = None
    by: Sequence[str] | None = None
    lost: str | None = None

    def __post_init__(self) -> None:
        def choose(name: str, value: Any, among: Any) -> None:
            if value not in among:
                raise ImproperlyConfigured(f"once: {name} is {value!r}; choose one of {', '.join(among)}")

        choose("scope", self.scope, records.SCOPES)
        choose("category", self.category, CATEGORIES)
        if self.lost is not None:
            choose("lost", self.lost, ("run", "refuse"))
        if self.ttl is not None and not (isinstance(self.ttl, (int, float)) and self.ttl >= 0):
            raise ImproperlyConfigured(f"once: ttl is {self.ttl!r}; give seconds, 0 for no marker")
        by: Any = self.by
        if by is None:
            return
        if not isinstance(by, (list, tuple)) or not all(isinstance(name, str) for name in by):
            raise ImproperlyConfigured(f"once: by is {by!r}; give a list of argument names")
        object.__setattr__(self, "by", tuple(by))

    @property
    def seconds(self) -> float:
        return CATEGORIES[self.category] if self.ttl is None else float(self.ttl)

    def check(self, run: Callable[..., Any]) -> None:
        """Refuse what the function has no argument for."""
        parameters = inspect.signature(run).parameters
        if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
            return
        for name in [*(self.by or ()), *([MEMBERS[self.scope]] if self.scope in MEMBERS else [])]:
            if name not in parameters:
                raise ImproperlyConfigured(f"once: {run.__name__} has no argument {name!r}")


@dataclass
class Work:
    """One run: the record as it is in `store`, where it is held."""

    key: str
    record: records.Record
    store: Any = None
    began: float = field(default_factory=time.monotonic)
    ended: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)


def _plain(value: Any) -> Any:
    from kombu.utils.json import dumps

    return json.loads(dumps(value))


_encoder = json.JSONEncoder(sort_keys=True, default=_plain)


class Arguments:
    """Of a function, by name."""

    def __init__(self, signature: inspect.Signature) -> None:
        self.signature = signature
        kinds = {parameter.kind for parameter in signature.parameters.values()}
        self.names = list(signature.parameters) if kinds <= {inspect.Parameter.POSITIONAL_OR_KEYWORD} else None

    def bind(self, args: Any, kwargs: Any) -> dict[str, Any]:
        """With defaults."""
        if self.names is not None and not kwargs and len(args) == len(self.names):
            return dict(zip(self.names, args, strict=True))  # the same as below, in a tenth of the time
        bound = self.signature.bind(*args, **kwargs)
        bound.apply_defaults()
        values: dict[str, Any] = {}
        for argument, value in bound.arguments.items():
            if self.signature.parameters[argument].kind is inspect.Parameter.VAR_KEYWORD:
                values.update(value)
            else:
                values[argument] = value
        return values


@functools.lru_cache(maxsize=1024)
def _arguments(run: Callable[..., Any]) -> Arguments:
    return Arguments(inspect.signature(run))


def key_of(name: str, policy: Policy, arguments: Arguments, args: Any, kwargs: Any) -> str:
    values = arguments.bind(args, kwargs)
    member = ""
    if policy.scope in MEMBERS:
        argument = MEMBERS[policy.scope]
        if values.get(argument) in (None, ""):
            raise ValueError(f"once: {name} is done once a {policy.scope}, and was sent without {argument}")
        member = str(values[argument])
    if policy.by is not None:
        values = {argument: values.get(argument) for argument in policy.by}
    try:
        text = _encoder.encode(values)
    except Exception as exc:
        raise ValueError(f"once: arguments of {name} cannot be compared ({exc}); name those that count in by") from exc
    digest = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
    key: str = records.key_of(name, policy.scope, member, digest)
    return key


class Keeper:
    """The stores of one application in this process, and the thread that renews what it holds."""

    def __init__(self, app: Any) -> None:
        settings = records.settings(os.environ)
        self.lease = float(os.environ.get("CELERYOPS_ONCE_LEASE") or records.LEASE)
        self.lost = os.environ.get("CELERYOPS_ONCE_LOST") or "run"
        if self.lost not in ("run", "refuse"):
            raise ImproperlyConfigured(f"CELERYOPS_ONCE_LOST is {self.lost!r}; choose run or refuse")
        if self.lease <= 0:
            raise ImproperlyConfigured(f"CELERYOPS_ONCE_LEASE is {self.lease}; give seconds above 0")
        spec = _broker_spec(app)
        broker = records.store_broker(spec, settings["redis"])
        self.redis = records.RedisStore(_hasty(broker.spec)) if broker else None
        self.sql = records.SqlStore(settings["database"]) if settings["database"] else None
        if not self.redis and not self.sql:
            raise ImproperlyConfigured(
                "once: the broker is not Redis; set CELERYOPS_ONCE_REDIS or CELERYOPS_ONCE_DATABASE to a URL"
            )
        self.process = records.process_name()
        self._away: dict[Any, float] = {}
        self._looked, self._sql_counts = -LOOK_EVERY, False
        self._held: dict[str, Work] = {}
        # Markers that were sent, by their token: the work, the marker, its seconds and when it was sent.
        self._sent: dict[str, tuple[Work, records.Record, float, float]] = {}
        self._thread: threading.Thread | None = None
        self._starting = threading.Lock()

    def _stores(self, first: Any = None) -> list[Any]:
        """Those worth a try, the given one first."""
        now = time.monotonic()
        stores = [store for store in (self.redis, self.sql) if store and self._away.get(store, 0.0) <= now]
        return sorted(stores, key=lambda store: store is not first) if first else stores

    def _failed(self, store: Any, exc: Exception) -> None:
        self._away[store] = time.monotonic() + REST
        logger.warning("celeryops: locks in %s: %s", "Redis" if store is self.redis else "the database", scrub(exc))

    def _consult_sql(self) -> bool:
        """Whether the database, which stood in for Redis, still holds what counts."""
        if self.sql is None or self.redis is None or self.sql not in self._stores():
            return False
        if not self._sql_counts or time.monotonic() - self._looked > LOOK_EVERY:
            if time.monotonic() - self._looked <= LOOK_EVERY:
                return False
            self._looked = time.monotonic()
            self._sql_counts = self.sql.in_use()
        return self._sql_counts

    def take(self, work: Work) -> records.Found | None:
        """None when the work is ours."""
        first = None
        try:
            if self._consult_sql() and self.sql and self.sql.look(work.key):
                first = self.sql
        except CeleryOpsError as exc:
            self._failed(self.sql, exc)
        for store in self._stores(first):
            try:
                found = store.take(work.key, work.record)
                if found and found.record.state == records.RUNNING and records.process_is_dead(found.record.process):
                    found = self._follow(store, work, found)
            except CeleryOpsError as exc:
                self._failed(store, exc)
                continue
            if found is None:
                self._hold(work, store)
            return found
        raise LocksUnavailable(f"{work.key}: no store of locks can be reached")

    def _follow(self, store: Any, work: Work, found: records.Found) -> records.Found | None:
        """The owner was killed on this host: its place is free."""
        dead = found.record
        if dead.task_id == work.record.task_id:
            if dead.attempt >= MOST_CRASHES:
                store.remove(work.key, dead.token)
                raise GaveUp(f"the task has taken its process with it {dead.attempt} times; its lock was removed")
            work.record = replace(work.record, attempt=dead.attempt + 1)
        return store.take(work.key, work.record, dead.token)

    def _hold(self, work: Work, store: Any) -> None:
        work.store = store
        if store is self.sql:
            self._sql_counts = True
        self._held[work.record.token] = work
        if self._thread is None:
            with self._starting:
                if self._thread is None:
                    self._thread = threading.Thread(target=self._renew, name="celeryops-once", daemon=True)
                    self._thread.start()

    def holds(self, found: records.Found) -> bool:
        return found.record.token in self._held

    def end(self, work: Work, state: str, seconds: float, value: str | None = None) -> None:
        with work.lock:
            work.ended = True
            self._held.pop(work.record.token, None)
            record = replace(work.record, state=state, value=value)
            if state != records.DONE or time.monotonic() - work.began > SHORT or not self._post(work, record, seconds):
                written = self._write(work, record, seconds)
                if not written and seconds:
                    self._lost(work)

    def _post(self, work: Work, record: records.Record, seconds: float) -> bool:
        """Write without waiting, where the store can. The system sends it, even if this process is killed now.

        Only a process that runs one task after the other: threads and greenlets come and go with their connections.
        """
        if threading.current_thread() is not threading.main_thread():
            return False
        if work.store is not self.redis or self.redis not in self._stores():
            return False

        def told(ours: bool) -> None:
            self._sent.pop(record.token, None)
            if not ours:
                self._outrun(work)

        self._sent[record.token] = (work, record, seconds, time.monotonic())
        try:
            self.redis.post(work.key, record, seconds, told)
        except CeleryOpsError as exc:
            self._sent.pop(record.token, None)
            self._failed(self.redis, exc)
            return False
        return True

    def confirm(self, older: float = 0.0) -> None:
        """Write again what nobody has seen written. The same marker of the same owner: twice is as good as once."""
        now = time.monotonic()
        for token, (work, record, seconds, sent) in list(self._sent.items()):
            if now - sent >= older:
                if not self._write(work, record, seconds):
                    return  # no store can be reached: later
                self._sent.pop(token, None)

    @staticmethod
    def _outrun(work: Work) -> None:
        logger.error("celeryops: %s ran longer than its lock could be renewed, and another has begun it", work.key)

    def _write(self, work: Work, record: records.Record, seconds: float) -> bool:
        """False when no store can be reached."""
        for store in self._stores(work.store):
            try:
                if not store.write(work.key, record, seconds):
                    self._outrun(work)
                    self._held.pop(record.token, None)
            except CeleryOpsError as exc:
                self._failed(store, exc)
                continue
            if store is not work.store and seconds:
                work.store, self._sql_counts = store, self._sql_counts or store is self.sql
            return True
        return False

    @staticmethod
    def _lost(work: Work) -> None:
        logger.error("celeryops: %s could not be written: no store of locks can be reached", work.key)

    def _renew(self) -> None:
        due = time.monotonic() + self.lease / 3
        while True:
            time.sleep(max(0.0, min(CONFIRM, due - time.monotonic())))
            try:
                self.confirm(CONFIRM)
            except Exception:
                logger.exception("celeryops: markers could not be confirmed")
            if time.monotonic() < due:
                continue
            due = time.monotonic() + self.lease / 3
            for work in list(self._held.values()):
                try:
                    with work.lock:
                        if not work.ended and not self._write(work, work.record, self.lease):
                            self._lost(work)
                except Exception:
                    logger.exception("celeryops: %s could not be renewed", work.key)

    def skipped(self, task: str) -> None:
        """Counted for the operator; nothing depends on it."""
        if self.redis and self.redis in self._stores():
            try:
                self.redis.skipped(task)
            except CeleryOpsError as exc:
                self._failed(self.redis, exc)


def _broker_spec(app: Any) -> BrokerSpec | None:
    conf = app.conf
    url = conf.broker_write_url or conf.broker_url or ""
    return BrokerSpec.build(
        url=url if isinstance(url, str) else ";".join(url),
        transport_options=dict(conf.broker_transport_options or {}),
        tls=tls_from_app(conf.broker_use_ssl),
    )


def _hasty(spec: BrokerSpec) -> Broker:
    return Broker(replace(spec, connect_timeout=TIMEOUT, socket_timeout=TIMEOUT))


_keepers: dict[Any, Keeper] = {}
_making = threading.Lock()


def _forget() -> None:
    """A forked pool process must not share its parent's connections, and has none of its threads."""
    global _making
    _keepers.clear()
    _making = threading.Lock()


os.register_at_fork(after_in_child=_forget)


@signals.worker_process_shutdown.connect(weak=False)
def _confirm_all(**_kwargs: Any) -> None:
    for keep in list(_keepers.values()):
        keep.confirm()
        for work, *_marker in list(keep._sent.values()):
            keep._lost(work)


def keeper(app: Any) -> Keeper:
    found = _keepers.get(app)
    if found is None:
        with _making:
            found = _keepers.get(app) or _keepers.setdefault(app, Keeper(app))
    return found


_off = "once" in disabled()


def guard(task: Any, policy: Policy, run: Callable[..., Any], arguments: Arguments, args: Any, kwargs: Any) -> Any:
    """Run it unless it runs or was done. Called inside the task."""
    request = task.request
    if _off or request.called_directly:
        return run(*args, **kwargs)
    keep = keeper(task.app)
    token, node = os.urandom(16).hex(), request.hostname or ""
    record = records.Record(records.RUNNING, token, request.id, node, keep.process, time.time(), 1, keep.lease)
    work = Work(key_of(task.name, policy, arguments, args, kwargs), record)
    try:
        found = keep.take(work)
    except LocksUnavailable as exc:
        if (policy.lost or keep.lost) == "refuse":
            return _later(task, REST, exc)
        logger.warning("celeryops: %s[%s] runs unguarded: %s", task.name, request.id, exc)
        return run(*args, **kwargs)
    if found is not None:
        if request.is_eager and keep.holds(found) and found.record.task_id == request.id:
            return run(*args, **kwargs)  # an eager retry runs inside the run that it repeats
        return _repetition(task, keep, found)
    state, seconds, value = records.DONE, 0.0, None
    try:
        result = run(*args, **kwargs)
        seconds, value = policy.seconds, _kept(task, result)
        return result
    except Retry as exc:
        state, seconds = records.WAITING, _delay(exc) + keep.lease
        raise
    except Ignore:
        seconds = policy.seconds
        raise
    finally:
        keep.end(work, state, seconds, value)


def _kept(task: Any, result: Any) -> str | None:
    if task.ignore_result and not _hands_on(task.request):
        return None
    try:
        text = json.dumps(result)
    except (TypeError, ValueError):
        return None
    return text if len(text) <= MOST_VALUE else None


def _hands_on(request: Any) -> bool:
    """Whether somebody waits for the result: the next of a chain, or the body of a chord."""
    return bool(request.callbacks or request.chain or request.chord)


def _delay(exc: Retry) -> float:
    if isinstance(exc.when, datetime):
        return max(0.0, exc.when.timestamp() - time.time())
    return float(exc.when or 0.0)


def _repetition(task: Any, keep: Keeper, found: records.Found) -> Any:
    request, record = task.request, found.record
    if record.state != records.DONE and (record.task_id == request.id or _hands_on(request)):
        age = max(0.0, time.time() - record.began)
        return _later(task, min(keep.lease / 2, max(1.0, age / 2)), Duplicate(f"{record.task_id} runs the same work"))
    if record.value is None and _hands_on(request):
        raise Duplicate(f"{record.task_id} has done the same work; its result, which the next task needs, is not kept")
    logger.info("celeryops: %s[%s] is left out: %s is %s", task.name, request.id, record.task_id, record.state)
    keep.skipped(task.name)
    return None if record.value is None else json.loads(record.value)


def _later(task: Any, delay: float, reason: OnceError) -> Any:
    """The same message comes again, which costs it no retry."""
    request = task.request
    if request.is_eager:
        raise reason
    logger.info("celeryops: %s[%s] comes again in %.1f s: %s", task.name, request.id, delay, reason)
    try:
        task.signature_from_request(request, countdown=delay, retries=request.retries).apply_async(add_to_parent=False)
    except Exception as exc:
        if task.acks_late:
            raise Reject(exc, requeue=True) from exc
        raise reason from exc
    raise Ignore(str(reason))


def once(
    *,
    scope: str = "global",
    category: str = "high_priority",
    ttl: float | None = None,
    by: Sequence[str] | None = None,
    lost: str | None = None,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator for the function of a task, below the task's own decorator."""
    policy = Policy(scope, category, ttl, by, lost)

    def decorate(work: Callable[..., Any]) -> Callable[..., Any]:
        if not issubclass(type(work), types.FunctionType):
            raise ImproperlyConfigured(
                "once: put @once below @shared_task or @app.task, next to the function: above, workers would run the "
                "task without it"
            )
        policy.check(work)
        signature = inspect.signature(work)
        arguments = Arguments(signature)
        unbound = Arguments(signature.replace(parameters=list(signature.parameters.values())[1:]))

        @functools.wraps(work)
        def run(*args: Any, **kwargs: Any) -> Any:
            task = current_task._get_current_object()
            body = getattr(task, "_orig_run", None) or getattr(task, "run", None)
            if getattr(body, "__func__", body) is not run:
                return work(*args, **kwargs)  # called as a plain function
            if body is not run:  # bound: the task itself is no argument
                return guard(task, policy, functools.partial(work, args[0]), unbound, args[1:], kwargs)
            return guard(task, policy, work, arguments, args, kwargs)

        run.celeryops_once = policy  # type: ignore[attr-defined]
        return run

    return decorate


class OnceTask:
    """What makes a task class idempotent; see celeryops.tasks.IdempotentTask."""

    once_scope: str = "global"
    once_category: str = "high_priority"
    once_ttl: float | None = None
    once_by: Sequence[str] | None = None
    once_lost: str | None = None
    _once: Policy

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls._once = Policy(cls.once_scope, cls.once_category, cls.once_ttl, cls.once_by, cls.once_lost)
        body = cls.__dict__.get("run")
        body = getattr(body, "__func__", body)
        if body is None:
            return
        if hasattr(body, "celeryops_once"):
            raise ImproperlyConfigured(f"once: {cls.__name__} is idempotent by its class; take @once away")
        cls._once.check(body)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        task: Any = self
        if task.request.called_directly:
            return super().__call__(*args, **kwargs)  # type: ignore[misc]
        return guard(task, self._once, task.run, _arguments(task.run), args, kwargs)
