"""What must be sent to live workers so that they are as wanted. Nothing in here talks to anybody."""

# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from . import pauses
from .errors import PreconditionFailed

RESIZABLE = ("prefork", "gevent", "eventlet")
LIMIT_FIELDS = ("rate_limit", "time_limit", "soft_time_limit")
_RATE = re.compile(r"(\d+(?:\.\d+)?)(?:/([smh]))?")
_SECONDS = {"s": 1.0, "m": 60.0, "h": 3600.0}


@dataclass(frozen=True)
class Consumer:
    queue: str
    present: bool = True
    exchange: str | None = None
    exchange_type: str | None = None
    routing_key: str | None = None

    def arguments(self) -> dict[str, Any]:
        given = {"exchange": self.exchange, "exchange_type": self.exchange_type, "routing_key": self.routing_key}
        return {"queue": self.queue, **{key: value for key, value in given.items() if value is not None}}


@dataclass(frozen=True)
class TimeLimit:
    """Seconds; None leaves the value as it is."""

    soft: float | None = None
    hard: float | None = None


@dataclass(frozen=True)
class Desired:
    """The wanted state of some workers; what is None or empty is left alone."""

    quiet: bool | None = None
    pool_size: int | None = None
    expect_pool_size: int | None = None
    autoscale: tuple[int, int] | None = None  # max, min
    consumers: tuple[Consumer, ...] = ()
    rate_limits: Mapping[str, str] = field(default_factory=dict)
    time_limits: Mapping[str, TimeLimit] = field(default_factory=dict)
    revoked: tuple[str, ...] = ()
    terminated: tuple[str, ...] = ()
    signal: str = "SIGKILL"
    events: bool | None = None
    shutdown: bool = False
    paused: frozenset[str] = frozenset()  # nobody consumes these, whatever is wanted

    def check(self) -> None:
        """Refuse what makes no sense whatever the fleet looks like."""
        if self == Desired(signal=self.signal):
            raise PreconditionFailed(
                "nothing is asked for: give pool_size, consumers, quiet, revoked or another wanted state."
            )
        if self.quiet is False and not self.consumers:
            raise PreconditionFailed("quiet: false needs consumers, which say what the workers shall consume instead.")
        if self.quiet and any(consumer.present for consumer in self.consumers):
            raise PreconditionFailed(
                "quiet: true consumes nothing, so consumers must not ask for a queue to be present."
            )
        states: dict[str, bool] = {}
        for consumer in self.consumers:
            if not consumer.queue:
                raise PreconditionFailed("consumers: a queue needs a name.")
            if states.setdefault(consumer.queue, consumer.present) != consumer.present:
                raise PreconditionFailed(f"consumers: {consumer.queue} is asked to be both present and absent.")
        if self.pool_size is not None and self.pool_size < 1:
            raise PreconditionFailed(f"pool_size: must be at least 1, not {self.pool_size}. Use quiet to stop work.")
        if self.expect_pool_size is not None and self.pool_size is None:
            raise PreconditionFailed("expect_pool_size: is the size pool_size starts from; give pool_size too.")
        if self.autoscale is not None:
            most, least = self.autoscale
            if least < 0 or most < 1 or least > most:
                raise PreconditionFailed(f"autoscale: needs 0 <= min <= max and max >= 1, not min {least}, max {most}.")
            if self.pool_size is not None:
                raise PreconditionFailed(
                    "pool_size and autoscale exclude each other: an autoscaler sets the size itself."
                )
        for task, rate in self.rate_limits.items():
            if rate_per_second(rate) is None:
                raise PreconditionFailed(
                    f"rate_limits.{task}: {rate!r} is no rate. Write 10/s, 10/m or 10/h; 0 lifts it."
                )
        for task, limit in self.time_limits.items():
            if limit.soft is None and limit.hard is None:
                raise PreconditionFailed(f"time_limits.{task}: give soft, hard or both, in seconds.")
            for name, value in (("soft", limit.soft), ("hard", limit.hard)):
                if value is not None and value <= 0:
                    raise PreconditionFailed(f"time_limits.{task}.{name}: must be above 0 seconds, not {value}.")
            if limit.soft is not None and limit.hard is not None and limit.soft > limit.hard:
                raise PreconditionFailed(f"time_limits.{task}: soft {limit.soft} is above hard {limit.hard}.")
        both = sorted(set(self.revoked) & set(self.terminated))
        if both:
            raise PreconditionFailed(f"revoked and terminated both name {both[0]}: terminated revokes it too.")
        others = replace(self, shutdown=False)
        if self.shutdown and others != Desired(signal=self.signal):
            raise PreconditionFailed("shutdown: leaves nothing to set, so no other wanted state may go with it.")

    def questions(self) -> list[tuple[str, dict[str, Any]]]:
        """Inspect commands that show what this state is about."""
        found: list[tuple[str, dict[str, Any]]] = []
        if self.pool_size is not None or self.autoscale is not None or self.terminated or self.time_limits:
            found.append(("stats", {}))
        if self.quiet is not None or self.consumers:
            found.append(("active_queues", {}))
            if self.paused:
                found.append((pauses.COMMAND, {}))
        if self.rate_limits or self.time_limits:
            found.append(("registered", {"taskinfoitems": list(LIMIT_FIELDS), "builtins": True}))
        if self.revoked:
            found.append(("revoked", {}))
        if self.terminated:
            found.append(("query_task", {"ids": list(self.terminated)}))
        return found


@dataclass(frozen=True)
class Task:
    """A task a worker holds: active, reserved, scheduled or ready, and the pool process that runs it."""

    state: str
    pid: int | None = None


@dataclass(frozen=True)
class NodeState:
    """What one worker told about itself; None or empty where it was not asked."""

    pool: str = ""
    processes: tuple[int, ...] = ()
    pool_size: int | None = None
    autoscale: tuple[int, int] | None = None
    queues: tuple[str, ...] | None = None
    withheld: tuple[str, ...] | None = None  # consumed once it is resumed; None where the worker obeys no pause
    limits: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    revoked: frozenset[str] = frozenset()
    tasks: Mapping[str, Task] = field(default_factory=dict)

    @property
    def wanted(self) -> tuple[str, ...]:
        """The queues it consumes, now or after a pause."""
        return (*(self.queues or ()), *(self.withheld or ()))

    @classmethod
    def read(cls, replies: Mapping[str, Any]) -> NodeState:
        stats = replies.get("stats") or {}
        pool = stats.get("pool") or {}
        name = str(pool.get("implementation", "")).split(":", 1)[0].rpartition(".")[2]
        processes = tuple(pid for pid in pool.get("processes") or () if isinstance(pid, int))
        # Prefork's max-concurrency stays what it was at start.
        size = len(processes) if name == "prefork" else pool.get("max-concurrency")
        scaler = stats.get("autoscaler")
        queues = replies.get("active_queues")
        withheld = replies.get(pauses.COMMAND)
        held = replies.get("query_task") or {}
        return cls(
            pool={"thread": "threads"}.get(name, name),
            processes=processes,
            pool_size=size if isinstance(size, int) else None,
            autoscale=(int(scaler["max"]), int(scaler["min"])) if scaler else None,
            queues=tuple(str(queue["name"]) for queue in queues) if queues is not None else None,
            withheld=tuple(map(str, withheld["withheld"])) if withheld is not None else None,
            limits=dict(map(parse_registered, replies.get("registered") or ())),
            revoked=frozenset(map(str, replies.get("revoked") or ())),
            tasks={
                task_id: Task(str(state), (info or {}).get("worker_pid")) for task_id, (state, info) in held.items()
            },
        )


@dataclass(frozen=True)
class Action:
    """One command for some nodes. `verified` tells whether its effect can be read back."""

    command: str
    arguments: Mapping[str, Any]
    destination: tuple[str, ...]
    verified: bool = True

    def as_dict(self) -> dict[str, Any]:
        return {"command": self.command, "arguments": dict(self.arguments), "destination": list(self.destination)}

    def __str__(self) -> str:
        given = ", ".join(f"{key}={value}" for key, value in self.arguments.items())
        return f"{self.command}({given}) on {', '.join(self.destination)}"


def parse_registered(line: str) -> tuple[str, dict[str, str]]:
    """`name [field=value ...]` as registered answers it."""
    name, _sep, rest = line.partition(" [")
    return name, dict(item.split("=", 1) for item in rest.rstrip("]").split() if "=" in item)


def rate_per_second(rate: str | None) -> float | None:
    """0 for no limit, None for what is no rate."""
    if rate is None or rate in ("", "None"):
        return 0.0
    found = _RATE.fullmatch(str(rate))
    return float(found[1]) / _SECONDS[found[2] or "s"] if found else None


def _seconds(text: str | None) -> float | None:
    try:
        return float(text) if text is not None else None
    except ValueError:
        return None


def check_nodes(states: Mapping[str, NodeState], desired: Desired) -> list[str]:
    """Refuse what these workers cannot do, before anything is sent. Returns warnings."""
    warnings = []
    for node, state in sorted(states.items()):
        if desired.pool_size is not None:
            if state.autoscale is not None:
                raise PreconditionFailed(
                    f"pool_size: {node} runs an autoscaler (max {state.autoscale[0]}, min {state.autoscale[1]}), which "
                    f"sets the size itself. Use autoscale.",
                    node=node,
                )
            if state.pool not in RESIZABLE:
                raise PreconditionFailed(
                    f"pool_size: {node} runs a {state.pool or 'unknown'} pool, which cannot be resized while it runs. "
                    f"Change its concurrency and restart it.",
                    node=node,
                )
            expected = desired.expect_pool_size
            if expected is not None and state.pool_size not in (expected, desired.pool_size):
                raise PreconditionFailed(
                    f"expect_pool_size: {node} has {state.pool_size} pool slots, not {expected}. Somebody changed it: "
                    f"look first.",
                    node=node,
                )
        if desired.autoscale is not None and state.autoscale is None:
            raise PreconditionFailed(
                f"autoscale: {node} was started without --autoscale, so it has none to adjust. Use pool_size.",
                node=node,
            )
        for consumer in desired.consumers:
            if consumer.present and consumer.queue in desired.paused and state.withheld is None:
                warnings.append(
                    f"consumers: {consumer.queue} is paused, and {node} runs without the runtime part pause: it "
                    f"was not told to consume it."
                )
        if desired.terminated and state.pool in ("solo", "threads"):
            running = sorted(set(desired.terminated) & set(state.tasks))
            if running:
                raise PreconditionFailed(
                    f"terminated: {node} runs {running[0]} in a {state.pool} pool, which cannot terminate a task. Use "
                    f"revoked for what has not begun.",
                    node=node,
                )
        for option, names in (("rate_limits", desired.rate_limits), ("time_limits", desired.time_limits)):
            for task in names:
                if task not in state.limits:
                    known = [name for name in sorted(state.limits) if not name.startswith("celery.")]
                    shown = ", ".join(known[:20]) + (" ..." if len(known) > 20 else "")
                    raise PreconditionFailed(
                        f"{option}: {node} knows no task {task}. It has: {shown or 'no task at all'}.",
                        node=node,
                        tasks=known,
                    )
        if desired.time_limits and state.pool != "prefork":
            warnings.append(f"time_limits: the {state.pool} pool of {node} does not enforce them; only prefork does.")
    return warnings


def plan(states: Mapping[str, NodeState], desired: Desired) -> list[Action]:
    """The commands that turn these states into the desired one; none when all is as wanted."""
    actions: list[Action] = []
    nodes = sorted(states)

    def add(command: str, arguments: Mapping[str, Any], destination: Sequence[str], verified: bool = True) -> None:
        if destination:
            actions.append(Action(command, arguments, tuple(destination), verified))

    absent = {consumer.queue for consumer in desired.consumers if not consumer.present}
    cancel: dict[str, list[str]] = {}
    for node in nodes:
        for queue in states[node].wanted:
            if desired.quiet or queue in absent:
                cancel.setdefault(queue, []).append(node)
    for queue in sorted(cancel):
        add("cancel_consumer", {"queue": queue}, cancel[queue])
    for consumer in desired.consumers:
        if consumer.present:
            bare = consumer.queue in desired.paused
            lacking = [
                node
                for node in nodes
                if consumer.queue not in states[node].wanted and not (bare and states[node].withheld is None)
            ]
            add("add_consumer", consumer.arguments(), lacking)
    if desired.pool_size is not None:
        steps: dict[int, list[str]] = {}
        for node in nodes:
            steps.setdefault(desired.pool_size - (states[node].pool_size or 0), []).append(node)
        for step in sorted(steps):
            if step:
                add("pool_grow" if step > 0 else "pool_shrink", {"n": abs(step)}, steps[step])
    if desired.autoscale is not None:
        most, least = desired.autoscale
        add("autoscale", {"max": most, "min": least}, [n for n in nodes if states[n].autoscale != desired.autoscale])
    for task, rate in desired.rate_limits.items():
        wanted = rate_per_second(rate)
        differ = [n for n in nodes if rate_per_second(states[n].limits.get(task, {}).get("rate_limit")) != wanted]
        add("rate_limit", {"task_name": task, "rate_limit": rate}, differ)
    for task, limit in desired.time_limits.items():
        # The command sets both values, so an omitted one is sent as it is.
        merged: dict[tuple[float | None, float | None], list[str]] = {}
        for node in nodes:
            found = states[node].limits.get(task, {})
            now = (_seconds(found.get("soft_time_limit")), _seconds(found.get("time_limit")))
            new = (now[0] if limit.soft is None else limit.soft, now[1] if limit.hard is None else limit.hard)
            if new != now:
                merged.setdefault(new, []).append(node)
        for (soft, hard), where in merged.items():
            add("time_limit", {"task_name": task, "soft": soft, "hard": hard}, where)
    by_ids: dict[tuple[str, ...], list[str]] = {}
    for node in nodes:
        new_ids = tuple(task_id for task_id in desired.revoked if task_id not in states[node].revoked)
        by_ids.setdefault(new_ids, []).append(node)
    for ids, where in by_ids.items():
        if ids:
            add("revoke", {"task_id": list(ids)}, where)
    for node in nodes:
        held = [task_id for task_id in desired.terminated if _runs(states[node], task_id)]
        add("terminate", {"signal": desired.signal, "task_id": held}, [node] if held else [])
    if desired.events is not None:
        add("enable_events" if desired.events else "disable_events", {}, nodes, verified=False)
    if desired.shutdown:
        add("shutdown", {}, nodes)
    return actions


def _runs(state: NodeState, task_id: str) -> bool:
    return task_id in state.tasks and state.tasks[task_id].state in ("active", "reserved", "scheduled")


def predict(states: Mapping[str, NodeState], actions: Sequence[Action], desired: Desired) -> dict[str, NodeState]:
    """The states after the actions, for check mode."""
    after = dict(states)
    for action in actions:
        arguments = action.arguments
        for node in action.destination:
            state = after[node]
            queues = state.queues or ()
            if action.command == "cancel_consumer":
                state = replace(state, queues=tuple(queue for queue in queues if queue != arguments["queue"]))
                if state.withheld is not None:
                    left_alone = tuple(queue for queue in state.withheld if queue != arguments["queue"])
                    state = replace(state, withheld=left_alone)
            elif action.command == "add_consumer" and arguments["queue"] in desired.paused:
                state = replace(state, withheld=(*(state.withheld or ()), arguments["queue"]))
            elif action.command == "add_consumer":
                state = replace(state, queues=(*queues, arguments["queue"]))
            elif action.command in ("pool_grow", "pool_shrink"):
                state = replace(state, pool_size=desired.pool_size)
            elif action.command == "autoscale":
                state = replace(state, autoscale=(arguments["max"], arguments["min"]))
            elif action.command == "rate_limit":
                task = arguments["task_name"]
                known = {**state.limits.get(task, {}), "rate_limit": str(arguments["rate_limit"])}
                state = replace(state, limits={**state.limits, task: known})
            elif action.command == "time_limit":
                task = arguments["task_name"]
                values = {"soft_time_limit": arguments["soft"], "time_limit": arguments["hard"]}
                known = {
                    **state.limits.get(task, {}),
                    **{key: str(item) for key, item in values.items() if item is not None},
                }
                state = replace(state, limits={**state.limits, task: known})
            elif action.command == "revoke":
                state = replace(state, revoked=state.revoked | set(arguments["task_id"]))
            elif action.command == "terminate":
                left = {task_id: task for task_id, task in state.tasks.items() if task_id not in arguments["task_id"]}
                state = replace(state, tasks=left)
            elif action.command == "shutdown":
                del after[node]
                continue
            after[node] = state
    return after


def describe(states: Mapping[str, NodeState], desired: Desired) -> dict[str, dict[str, Any]]:
    """The part of the states the desired one is about, for before, after and diff."""
    result: dict[str, dict[str, Any]] = {}
    for node, state in sorted(states.items()):
        shown: dict[str, Any] = {}
        if desired.quiet is not None or desired.consumers:
            shown["queues"] = sorted(state.queues or ())
            if state.withheld:
                shown["paused"] = sorted(state.withheld)
        if desired.pool_size is not None:
            shown["pool_size"] = state.pool_size
        if desired.autoscale is not None and state.autoscale is not None:
            shown["autoscale"] = {"max": state.autoscale[0], "min": state.autoscale[1]}
        if desired.rate_limits:
            shown["rate_limits"] = {
                task: state.limits.get(task, {}).get("rate_limit") for task in sorted(desired.rate_limits)
            }
        if desired.time_limits:
            shown["time_limits"] = {
                task: {
                    "soft": _seconds(state.limits.get(task, {}).get("soft_time_limit")),
                    "hard": _seconds(state.limits.get(task, {}).get("time_limit")),
                }
                for task in sorted(desired.time_limits)
            }
        if desired.revoked:
            shown["revoked"] = [task_id for task_id in desired.revoked if task_id in state.revoked]
        if desired.terminated:
            shown["held"] = {
                task_id: state.tasks[task_id].state for task_id in desired.terminated if _runs(state, task_id)
            }
        if desired.shutdown:
            shown["running"] = True
        result[node] = shown
    return result


def still_alive(before: Mapping[str, NodeState], after: Mapping[str, NodeState], ids: Sequence[str]) -> list[str]:
    """Terminated tasks whose pool process lives on. Under REMAP_SIGTERM a task leaves `active` and runs to its end."""
    alive = []
    for node, state in sorted(before.items()):
        for task_id in ids:
            pid = state.tasks[task_id].pid if _runs(state, task_id) else None
            if pid is not None and node in after and pid in after[node].processes:
                alive.append(f"{task_id} (process {pid} of {node})")
    return alive
