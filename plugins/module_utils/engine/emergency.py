# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""An emergency stop of one application: what it changed and cut, kept for the way back.

The record is a file on the host acted from and, while the stop lasts, a key in the broker. It is written before
anything is touched and again before anything is cut, so that whatever breaks in between is known afterwards.
"""

from __future__ import annotations

import glob
import json
import os
import time
import uuid
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from . import pauses, savefile
from .connection import Broker, RedisStore
from .control import Control
from .errors import CeleryOpsError, ConnectionFailed, PreconditionFailed, UnknownLayout
from .fleet import IDLE_SECONDS, Fleet, observe
from .pausing import Pausing
from .queues import RedisQueues, Selection
from .rescue import rescue
from .results import Again, parse_time
from .tasks import Order, states

FORMAT, VERSION = "celeryops.emergency", 1
FINISH, REQUEUE, TERMINATE = "finish", "requeue", "terminate"
RUNNING = (FINISH, REQUEUE, TERMINATE)
# What became of a task that a worker had when it was cut. Saved: its message lies in a file. Cut: nobody has it.
HELD, WAITS, ENDED, SAVED, CUT, AGAIN = "held", "waits", "ended", "saved", "cut", "requeued"
_QUESTIONS: list[tuple[str, dict[str, Any]]] = [("active", {}), ("reserved", {})]


@dataclass(frozen=True)
class Task:
    """A task in the hands of a worker. `late`: it is acknowledged when it ends, so its message is in the broker."""

    id: str
    name: str
    args: Any
    kwargs: Any
    queue: str
    node: str
    place: str  # running, reserved
    late: bool
    started: float | None
    outcome: str = HELD

    @property
    def shown(self) -> dict[str, Any]:
        """For reports: arguments may hold secrets."""
        return {key: getattr(self, key) for key in ("id", "name", "queue", "node", "outcome")}


@dataclass(frozen=True)
class Record:
    """One stop. Times are unix seconds of the host acted from."""

    id: str
    name: str
    by: str
    why: str
    running: str
    since: float
    units: dict[str, list[str]] = field(default_factory=dict)  # host -> instances that ran
    nodes: list[str] = field(default_factory=list)
    queues: list[str] = field(default_factory=list)  # every queue of the application
    pauses: list[str] = field(default_factory=list)  # those that this stop paused
    waiting: dict[str, int] = field(default_factory=dict)
    tasks: tuple[Task, ...] = ()
    files: dict[str, str] = field(default_factory=dict)  # file -> queue
    ended: float | None = None

    @property
    def reason(self) -> str:
        """The words of its pauses; by them they are known from those of an operator."""
        return f"emergency stop {self.id}{f': {self.why}' if self.why else ''}; ended by emergency_resume"

    def at(self, *outcomes: str) -> list[Task]:
        return [task for task in self.tasks if task.outcome in outcomes]

    def as_json(self) -> str:
        return json.dumps({"format": FORMAT, "version": VERSION, **asdict(self)}, indent=1) + "\n"


def parse(text: str | bytes, where: str) -> Record:
    try:
        value = json.loads(text)
        if value.pop("format") != FORMAT or value.pop("version") != VERSION:
            raise ValueError("another format")
        value["tasks"] = tuple(Task(**task) for task in value["tasks"])
        return Record(**value)
    except (ValueError, TypeError, KeyError, AttributeError) as exc:
        raise UnknownLayout(f"{where}: holds no record of an emergency stop; it was left as it is.") from exc


def new(name: str, by: str, why: str, running: str, now: float) -> Record:
    stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(now))
    return Record(f"{stamp}-{uuid.uuid4().hex[:8]}", name, by, why, running, now)


# Where it is kept


def emergency_key(key_prefix: str, name: str) -> str:
    return f"{key_prefix}celeryops:emergency:{name}"


def load(store: RedisStore, name: str) -> Record | None:
    """The stop that is in force, by the broker."""
    key = emergency_key(store.key_prefix, name)
    raw = store.redis.get(key)
    return None if raw is None else parse(raw, key)


def path_of(directory: str, record: Record) -> str:
    return os.path.join(directory, f"emergency-{record.name}-{record.id}.json")


def read(path: str) -> Record:
    try:
        with open(path, encoding="utf-8") as handle:
            return parse(handle.read(), path)
    except FileNotFoundError as exc:
        raise PreconditionFailed(f"file: there is no file {path} on this host.") from exc
    except (OSError, UnicodeDecodeError) as exc:
        raise PreconditionFailed(f"file: cannot read {path}: {exc}.") from exc


def open_file(directory: str, name: str) -> Record | None:
    """The stop that is in force, by the files of this host: the broker may have been away."""
    pattern = os.path.join(glob.escape(directory), f"emergency-{glob.escape(name)}-[0-9]*.json")
    for path in sorted(glob.glob(pattern), reverse=True):
        record = read(path)
        if record.ended is None:
            return record
    return None


def write(directory: str, record: Record) -> str:
    """The whole file or the former one, and it outlasts a power cut."""
    path = path_of(directory, record)
    partial = savefile.partial_path(path, "new")
    with savefile.saving(path):
        os.makedirs(directory, mode=0o700, exist_ok=True)
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8") as handle:
            handle.write(record.as_json())
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(partial, path)
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    return path


def keep(broker: Broker | None, directory: str, record: Record) -> str:
    path = write(directory, record)
    if broker is not None:
        key = emergency_key(broker.key_prefix, record.name)
        if record.ended is None:
            broker.redis.set(key, record.as_json())
        else:
            broker.redis.delete(key)
    return path


# What workers hold


def held(fleet: Fleet, nodes: Collection[str]) -> tuple[Task, ...]:
    """What these nodes run or have fetched; tasks with an ETA they give back by themselves."""
    found: dict[str, Task] = {}
    for command, place in (("reserved", "reserved"), ("active", "running")):
        for node in fleet.workers:
            if node not in nodes:
                continue
            for item in fleet.nodes[node].replies.get(command) or ():
                task = Task(
                    id=str(item.get("id")),
                    name=str(item.get("name") or item.get("type")),
                    args=item.get("args"),
                    kwargs=item.get("kwargs"),
                    queue=str((item.get("delivery_info") or {}).get("routing_key") or ""),
                    node=node,
                    place=place,
                    late=place == "running" and not item.get("acknowledged"),
                    started=item.get("time_start"),
                )
                found[task.id] = task
    return tuple(found.values())


def busy(record: Record, units: Mapping[str, Mapping[str, str]]) -> dict[str, list[str]]:
    """host -> instances whose tasks are cut."""
    nodes = {task.node for task in record.at(HELD) if task.place == "running"}
    found = {host: sorted(i for i, node in instances.items() if node in nodes) for host, instances in units.items()}
    return {host: instances for host, instances in found.items() if instances}


# The stop


@dataclass
class Begun:
    record: Record
    path: str = ""
    busy: dict[str, list[str]] = field(default_factory=dict)
    paused: list[str] = field(default_factory=list)
    undone: list[str] = field(default_factory=list)
    changed: bool = False


class Stop:
    """The part of a stop that acts on the broker: before the units are stopped, and after."""

    def __init__(self, directory: str, *, timeout: float, warn: Callable[[str], None], dry: bool) -> None:
        self.directory = directory
        self.timeout = timeout
        self.warn = warn
        self.dry = dry

    def keep(self, broker: Broker | None, record: Record) -> str:
        return path_of(self.directory, record) if self.dry else keep(broker, self.directory, record)

    def unheard(self, record: Record, units: Mapping[str, Mapping[str, str]], error: str) -> Begun:
        """The broker is away: only the units can be stopped, and that is written down."""
        before = open_file(self.directory, record.name)
        after = _with_units(before or record, units)
        path = self.keep(None, after) if after != before else path_of(self.directory, after)
        undone = [f"no queue was paused, and what ran is not known, because the broker does not answer: {error}"]
        return Begun(after, path, undone=undone, changed=after != before)

    def begin(
        self,
        broker: Broker,
        control: Control,
        record: Record,
        *,
        units: Mapping[str, Mapping[str, str]],
        queues: Iterable[str],
        wait: float,
        pause_timeout: float,
    ) -> Begun:
        """Write down, pause, let tasks finish for `wait` seconds, write down what is left."""
        before = load(broker, record.name) or open_file(self.directory, record.name)
        # A second run may be in more of a hurry than the first one.
        current = replace(_with_units(before or record, units), running=record.running)
        store = RedisQueues.of(broker)
        resting = pauses.load(broker)
        wanted = sorted({*queues, *current.queues})
        depths = store.depth(wanted)
        known = store.declared(wanted) | set(resting) | {name for name, row in depths.items() if row["exists"]}
        fresh = [name for name in wanted if name in known and name not in resting]
        own = [name for name in wanted if name in resting and resting[name].why == current.reason]
        if before is None:
            current = replace(current, waiting={name: int(row["depth"]) for name, row in depths.items()})
        current = replace(current, queues=wanted, pauses=sorted({*current.pauses, *fresh}))
        begun = Begun(current, path_of(self.directory, current), paused=fresh, changed=current != before)
        if begun.changed:
            self.keep(broker, current)
        if fresh or own:
            pausing = Pausing(
                broker, control, [*fresh, *own], paused=True,
                timeout=self.timeout, wait_timeout=pause_timeout, warn=self.warn,
            )  # fmt: skip
            try:
                done = pausing.run(by=current.by, why=current.reason, until="", dry=self.dry)
                begun.changed = begun.changed or done.changed
            except ConnectionFailed:
                raise
            except CeleryOpsError as exc:
                begun.undone.append(exc.msg)
        nodes = [node for instances in units.values() for node in instances.values()]
        if nodes:
            fleet = self.settle(control, nodes, 0.0 if self.dry else wait)
            silent = sorted(set(nodes) - set(fleet.workers))
            if silent:
                begun.undone.append(f"what {', '.join(silent)} ran is not known: no answer")
            # A worker that runs nothing is stopped gently and finishes what it still takes up.
            found = held(fleet, nodes)
            cut = {task.node for task in found if task.place == "running"}
            left = tuple(task for task in found if task.node in cut)
            if left:
                kept = [task for task in current.tasks if task.id not in {one.id for one in left}]
                begun.record = replace(current, tasks=(*kept, *left))
                begun.path, begun.changed = self.keep(broker, begun.record), True
        begun.busy = busy(begun.record, units)
        return begun

    def settle(self, control: Control, nodes: Sequence[str], wait: float) -> Fleet:
        """Until nothing runs, or the time is over. What was fetched shows a moment after the consumer is cancelled."""
        deadline = time.monotonic() + wait
        idle_since: float | None = None
        while True:
            fleet = observe(control, _QUESTIONS, expected=nodes, timeout=self.timeout, census=True)
            now = time.monotonic()
            idle_since = (idle_since or now) if not held(fleet, nodes) else None
            if now >= deadline or (idle_since is not None and now - idle_since >= IDLE_SECONDS):
                return fleet
            time.sleep(0.2)

    def end(self, broker: Broker, control: Control, record: Record) -> tuple[Record, int, list[str]]:
        """After the units: what they held goes back to its queue, and it is told what became of what they ran."""
        undone: list[str] = []
        store = RedisQueues.of(broker)
        done = rescue(store, control, dry=self.dry)
        if done.unknown:
            undone.append(
                f"{done.unknown} message(s) may be held by workers that are connected and do not answer; "
                f"queue_rescue gives them back once these are gone"
            )
        after = replace(record, tasks=self._judged(broker, store, record)) if record.at(HELD) else record
        if after.running == TERMINATE and not self.dry:
            after = self._out_of_queues(store, after)
        if after != record and not self.dry:
            keep(broker, self.directory, after)
        return after, done.count, undone

    def _judged(self, broker: Broker, store: RedisQueues, record: Record) -> tuple[Task, ...]:
        wanted = {task.id for task in record.at(HELD)}
        waiting = {one for queue in record.queues for one in store.ids(queue) if one in wanted}
        waiting |= {one for one in store.unacked_ids() if one in wanted}
        results: dict[str, float] = {}
        if broker.spec.result_backend:
            for meta in states(broker, sorted(wanted - waiting)):
                done = parse_time(meta.get("date_done"))
                if meta["state"] in ("SUCCESS", "FAILURE", "REVOKED") and done is not None:
                    results[meta["task_id"]] = done.timestamp()
        return tuple(judge(task, waiting, results) for task in record.tasks)

    def _out_of_queues(self, store: RedisQueues, record: Record) -> Record:
        """Tasks that were terminated do not run again by themselves: their messages go into files."""
        by_queue: dict[str, set[str]] = {}
        for task in record.at(WAITS):
            if task.place == "running":
                by_queue.setdefault(task.queue, set()).add(task.id)
        files, gone = dict(record.files), set[str]()
        for queue, ids in sorted(by_queue.items()):
            safe = "".join(char if char.isalnum() or char in "._-" else "_" for char in queue)
            path = os.path.join(self.directory, f"emergency-{record.name}-{record.id}-{len(files)}-{safe}.queue")
            outcome = store.drop(queue, Selection(ids=frozenset(ids)), path)
            if outcome.count and outcome.path:
                files[outcome.path] = queue
                gone |= ids
        tasks = tuple(replace(t, outcome=SAVED) if t.id in gone else t for t in record.tasks)
        return replace(record, tasks=tasks, files=files)


def _with_units(record: Record, units: Mapping[str, Mapping[str, str]]) -> Record:
    """A second run adds to what the first one stopped."""
    merged = {host: sorted({*record.units.get(host, ()), *units.get(host, ())}) for host in {*record.units, *units}}
    nodes = {*record.nodes, *(node for instances in units.values() for node in instances.values())}
    return replace(record, units={h: merged[h] for h in sorted(merged) if merged[h]}, nodes=sorted(nodes))


def judge(task: Task, waiting: Collection[str], results: Mapping[str, float]) -> Task:
    """What became of a task whose worker is gone. `results`: when tasks ended, by the result backend."""
    if task.outcome != HELD:
        return task
    if task.id in waiting:
        return replace(task, outcome=WAITS)
    # Its message goes when it ends; an older result is that of an earlier run under the same id.
    if task.late or results.get(task.id, 0.0) >= (task.started or float("inf")):
        return replace(task, outcome=ENDED)
    return replace(task, outcome=CUT)


# The way back


def lift(
    broker: Broker,
    control: Control,
    record: Record,
    *,
    timeout: float,
    wait_timeout: float,
    warn: Callable[[str], None],
    dry: bool,
) -> tuple[list[str], list[str], dict[str, int]]:
    """Resume the queues that this stop paused; those that somebody paused stay. (lifted, left, messages waiting)"""
    resting = pauses.load(broker)
    own = [queue for queue in record.pauses if queue in resting and resting[queue].why == record.reason]
    left = sorted(set(resting) & set(record.queues) - set(own))
    if not own:
        return [], left, {}
    done = Pausing(
        broker, control, own, paused=False, timeout=timeout, wait_timeout=wait_timeout, warn=warn
    ).run(by="", why="", until="", dry=dry)  # fmt: skip
    return own, left, done.waiting


def send_again(broker: Broker, record: Record, *, dry: bool) -> Record:
    """What was cut goes back to its queue under its own id, each task once."""
    if dry:
        return replace(record, tasks=tuple(_again(task) for task in record.tasks))
    store = RedisQueues.of(broker)
    for path, queue in record.files.items():
        store.import_(path, queue)
    with Again(broker) as again:
        for task in record.at(CUT):
            order = Order(task.name, task.queue, args=task.args or (), kwargs=task.kwargs or {}, task_id=task.id)
            again.send(f"{task.id} {record.id}", order)
    return replace(record, tasks=tuple(_again(task) for task in record.tasks))


def _again(task: Task) -> Task:
    return replace(task, outcome=AGAIN) if task.outcome in (CUT, SAVED) else task
