# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .control import Control, Replies, Request, is_beat
from .errors import AuthenticationFailed, ConnectionFailed, NoReply, WaitTimeout

ANSWERED, SILENT, UNKNOWN = "answered", "silent", "unknown"
# Prefetched messages become visible a moment after a consumer was cancelled: idle must hold that long.
IDLE_SECONDS = 1.0
SETTLING = "idle_settling"
BUSY = ("idle", "answers", "not_consumes")


@dataclass
class Node:
    """One node. `connected` is None where nobody can tell whether it is on the broker's channel."""

    state: str
    type: str
    connected: bool | None
    replies: dict[str, Any] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)


@dataclass
class Fleet:
    """What one round of questions showed."""

    nodes: dict[str, Node] = field(default_factory=dict)
    subscribed: int | None = None
    silent_count: int = 0
    duplicates: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    elapsed: float = 0.0
    complete: bool = True  # all that are subscribed have answered
    present: list[str] = field(default_factory=list)  # everybody heard, asked or not

    def in_state(self, state: str) -> list[str]:
        return sorted(name for name, node in self.nodes.items() if node.state == state)

    @property
    def workers(self) -> list[str]:
        """Workers that answered."""
        return [name for name in self.in_state(ANSWERED) if self.nodes[name].type == "worker"]

    def as_dict(self) -> dict[str, Any]:
        return {
            "nodes": {
                name: {
                    "state": node.state,
                    "type": node.type,
                    "connected": node.connected,
                    "replies": node.replies,
                    "errors": node.errors,
                }
                for name, node in sorted(self.nodes.items())
            },
            "subscribed": self.subscribed,
            "answered": self.in_state(ANSWERED),
            "silent": self.in_state(SILENT),
            "unknown": self.in_state(UNKNOWN),
            "duplicates": self.duplicates,
            "silent_count": self.silent_count,
            "refused": self.refused,
            "elapsed": round(self.elapsed, 4),
        }


def observe(
    control: Control,
    commands: Sequence[tuple[str, Mapping[str, Any]]],
    *,
    destination: Sequence[str] | None = None,
    expected: Sequence[str] = (),
    everybody: Sequence[str] = (),
    timeout: float | None = None,
    census: bool = False,
) -> Fleet:
    """Ask `commands` of the destination, and those named in `everybody` of the whole fleet, in one round."""
    targets = tuple(destination) if destination is not None else None
    requests = [Request(command, arguments, targets) for command, arguments in commands]
    if targets is not None:
        requests += [Request(command) for command in everybody]
    else:
        asked = {command for command, _arguments in commands}
        requests += [Request(command) for command in everybody if command not in asked]
    wanted = list(dict.fromkeys([*(destination or ()), *expected]))
    done = control.converse(requests, timeout=timeout, expected=wanted or None, census=census)
    fleet = Fleet(
        subscribed=done.census.subscribed, elapsed=done.elapsed, complete=done.complete, present=done.census.nodes
    )
    for request, answers in zip(requests, done.answers, strict=True):
        _add(fleet, request, answers)
    if not any(request.command == "ping" for request in requests):
        for name in done.census.nodes:
            if targets is None or census or name in wanted:
                fleet.nodes.setdefault(name, Node(ANSWERED, _type(name), True))
    doubled = [*done.census.duplicates, *(name for answers in done.answers for name in answers.duplicates)]
    fleet.duplicates = sorted(set(doubled))
    fleet.refused = [*done.census.refused, *(text for answers in done.answers for text in answers.refused)]
    if fleet.subscribed is not None and (targets is None or census or not requests):
        fleet.silent_count = max(0, fleet.subscribed - done.census.count)
    seen = set(done.census.nodes) | set(fleet.nodes)
    # With all subscribers heard, who is missing is off the channel. Else any silent subscriber may be anyone.
    connected = False if fleet.subscribed is not None and fleet.complete else None
    for name in wanted:
        if name not in seen:
            fleet.nodes[name] = Node(_missing_state(fleet), _type(name), connected)
    for name in wanted:
        if name in done.census.nodes:
            fleet.nodes.setdefault(name, Node(ANSWERED, _type(name), True))
    _note_missing_answers(fleet, requests, control.timeout if timeout is None else timeout)
    return fleet


def _type(name: str) -> str:
    return "beat" if is_beat(name) else "worker"


def _add(fleet: Fleet, request: Request, answers: Replies) -> None:
    for reply in answers.replies:
        node = fleet.nodes.setdefault(reply.node, Node(ANSWERED, _type(reply.node), True))
        if reply.error is not None:
            node.errors[request.command] = reply.error
        else:
            node.replies[request.command] = reply.value


def _missing_state(fleet: Fleet) -> str:
    # Where the broker cannot count, no answer says nothing about the node.
    return UNKNOWN if fleet.subscribed is None else SILENT


def _note_missing_answers(fleet: Fleet, requests: Sequence[Request], timeout: float) -> None:
    for name, node in fleet.nodes.items():
        if node.state != ANSWERED:
            continue
        for request in requests:
            command = request.command
            asked = request.destination is None or name in request.destination
            if asked and request.concerns([name]) and command not in node.replies and command not in node.errors:
                node.errors[command] = f"no answer to this command within {timeout} s"


@dataclass(frozen=True)
class Conditions:
    """What wait_for may ask of a fleet; all that are given must hold together."""

    all_answer: bool = False
    min_nodes: int = 0
    nodes: tuple[str, ...] = ()
    gone: tuple[str, ...] = ()
    release: str = ""
    consumes: tuple[str, ...] = ()
    not_consumes: tuple[str, ...] | bool = ()
    idle: bool = False
    queues_consumed: tuple[str, ...] = ()
    paused: frozenset[str] = frozenset()  # queues that nobody need consume
    silent_before: int = 0  # subscribers known to be silent that are none of `gone`

    @property
    def commands(self) -> list[str]:
        """Inspect commands needed of the destination."""
        found = []
        if self.consumes or self.not_consumes:
            found.append("active_queues")
        if self.release:
            found.append("celeryops_release")
        if self.idle:
            found += ["active", "reserved"]
        return found

    @property
    def everybody(self) -> list[str]:
        """Inspect commands needed of the whole fleet."""
        return ["active_queues"] if self.queues_consumed else []

    def census(self, destination: Sequence[str] | None) -> bool:
        """Whether everybody must be waited for, not the destination alone."""
        everyone = self.all_answer and destination is None
        return bool(everyone or self.min_nodes or self.nodes or self.gone or self.queues_consumed)


@dataclass(frozen=True)
class Unmet:
    """One condition that does not hold: why, and for which node."""

    condition: str
    reason: str
    node: str | None = None

    def as_dict(self) -> dict[str, Any]:
        return {"condition": self.condition, "node": self.node, "reason": self.reason}

    def __str__(self) -> str:
        return f"{self.condition}: {self.node}: {self.reason}" if self.node else f"{self.condition}: {self.reason}"


def judge(
    fleet: Fleet,
    conditions: Conditions,
    *,
    destination: Sequence[str] | None = None,
    expected: Sequence[str] = (),
    idle_for: float | None = None,
) -> list[Unmet]:
    """The conditions the fleet does not meet. `idle_for`: seconds since it was first seen idle without a break."""
    unmet: list[Unmet] = []

    def answers(name: str) -> bool:
        return name in fleet.nodes and fleet.nodes[name].state == ANSWERED

    def silence(name: str) -> str:
        if name in fleet.nodes and fleet.nodes[name].connected is False:
            return "is not connected to the broker"
        return "does not answer"

    wanted = list(dict.fromkeys([*(destination or ()), *expected]))
    if conditions.all_answer:
        unmet += [Unmet("all_answer", silence(name), name) for name in wanted if not answers(name)]
        unnamed = fleet.silent_count - sum(not answers(name) for name in wanted)
        if destination is None and unnamed > 0:
            unmet.append(Unmet("all_answer", f"{unnamed} more subscribed node(s) do not answer"))
        if not fleet.in_state(ANSWERED) and not unmet:
            unmet.append(Unmet("all_answer", "no node is connected to the broker"))
    if conditions.min_nodes and len(fleet.workers) < conditions.min_nodes:
        unmet.append(Unmet("min_nodes", f"{len(fleet.workers)} of {conditions.min_nodes} workers answer"))
    unmet += [Unmet("nodes", silence(name), name) for name in conditions.nodes if not answers(name)]
    others_silent = sum(
        node.state == SILENT and node.connected is not False and name not in conditions.gone
        for name, node in fleet.nodes.items()
    )
    for name in conditions.gone:
        if answers(name):
            unmet.append(Unmet("gone", "still answers", name))
        elif fleet.silent_count > max(others_silent, conditions.silent_before):
            text = f"does not answer, but {fleet.silent_count} subscribed node(s) are silent and it may be one of them"
            unmet.append(Unmet("gone", text, name))

    targets = destination if destination is not None else [*fleet.workers, *expected]
    held = [name for name in dict.fromkeys(targets) if not is_beat(name)]
    node_conditions = conditions.commands
    if node_conditions and not held:
        label = "release" if conditions.release else "idle" if conditions.idle else "consumes"
        unmet.append(Unmet(label, "no worker answers"))
    for name in held if node_conditions else ():
        if not answers(name):
            unmet.append(Unmet("answers", silence(name), name))
            continue
        unmet += _judge_node(fleet.nodes[name], name, conditions)
    settling = conditions.idle and not any(item.condition in BUSY for item in unmet)
    if settling and (idle_for is None or idle_for < IDLE_SECONDS):
        unmet.append(Unmet(SETTLING, f"idle, but not yet for {IDLE_SECONDS} s"))
    for queue in conditions.queues_consumed:
        if queue in conditions.paused:
            continue
        if not any(queue in consumed_queues(node.replies) for node in fleet.nodes.values()):
            unmet.append(Unmet("queues_consumed", f"no node consumes {queue}"))
    return unmet


def consumed_queues(replies: Mapping[str, Any]) -> list[str]:
    return [str(queue.get("name")) for queue in replies.get("active_queues") or () if isinstance(queue, dict)]


def _judge_node(node: Node, name: str, conditions: Conditions) -> list[Unmet]:
    unmet: list[Unmet] = []

    def failed(command: str, condition: str) -> bool:
        if command in node.errors:
            unmet.append(Unmet(condition, f"{command}: {node.errors[command]}", name))
            return True
        return False

    if conditions.release and not failed("celeryops_release", "release"):
        reply = node.replies.get("celeryops_release")
        found = reply.get("release") if isinstance(reply, dict) else reply
        if found != conditions.release:
            unmet.append(Unmet("release", f"runs {found or 'no release'}, not {conditions.release}", name))
    if conditions.consumes or conditions.not_consumes:
        label = "consumes" if conditions.consumes else "not_consumes"
        if not failed("active_queues", label):
            queues = consumed_queues(node.replies)
            lacking = [queue for queue in conditions.consumes if queue not in (*queues, *conditions.paused)]
            if lacking:
                unmet.append(Unmet("consumes", f"does not consume {', '.join(lacking)}", name))
            refused = conditions.not_consumes
            still = queues if refused is True else [queue for queue in queues if queue in (refused or ())]
            if still:
                unmet.append(Unmet("not_consumes", f"still consumes {', '.join(still)}", name))
    if conditions.idle:
        for command in ("active", "reserved"):
            if not failed(command, "idle"):
                count = len(node.replies.get(command) or ())
                if count:
                    unmet.append(Unmet("idle", f"holds {count} {command} task(s)", name))
    return unmet


@dataclass
class Waited:
    fleet: Fleet
    unmet: list[Unmet]
    checks: int
    waited: float


def wait_for(
    control: Control,
    conditions: Conditions,
    commands: Sequence[tuple[str, Mapping[str, Any]]] = (),
    *,
    destination: Sequence[str] | None = None,
    expected: Sequence[str] = (),
    timeout: float = 2.0,
    wait_timeout: float = 60.0,
    interval: float = 0.5,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> Waited:
    """Ask until every condition holds or the time is over. The caller judges `unmet`; only a dead broker raises."""
    asked = {name for name, _arguments in commands}
    needed = [*commands, *((name, {}) for name in conditions.commands if name not in asked)]
    names = list(dict.fromkeys([*expected, *conditions.nodes]))
    started = clock()
    deadline = started + wait_timeout
    idle_since: float | None = None
    last: Waited | None = None
    checks = 0
    while True:
        checks += 1
        now = clock()
        trouble: ConnectionFailed | None = None
        try:
            fleet = observe(
                control,
                needed,
                destination=destination,
                expected=names,
                everybody=conditions.everybody,
                timeout=max(0.2, min(timeout, deadline - now)),
                census=conditions.census(destination),
            )
        except AuthenticationFailed:
            raise
        except ConnectionFailed as exc:
            # A broker that was there may come back in time; one that never was is a wrong argument.
            if last is None:
                raise
            trouble = exc
            idle_since = None
        else:
            now = clock()
            unmet = judge(fleet, conditions, destination=destination, expected=names)
            busy = any(item.condition in BUSY for item in unmet)
            if conditions.idle and not busy:
                idle_since = now if idle_since is None else idle_since
                unmet = judge(fleet, conditions, destination=destination, expected=names, idle_for=now - idle_since)
            else:
                idle_since = None
            last = Waited(fleet, unmet, checks, now - started)
            if not unmet:
                return last
        now = clock()
        if now >= deadline:
            if trouble is not None:
                raise trouble
            if last is None:
                raise RuntimeError("the fleet was never asked")
            last.checks, last.waited = checks, now - started
            return last
        pause = min(interval, deadline - now)
        if idle_since is not None:
            pause = min(pause, max(0.05, idle_since + IDLE_SECONDS - now))
        sleep(pause)


def demand(waited: Waited, wait_timeout: float) -> Fleet:
    """The fleet, or WaitTimeout that says which node fails which condition."""
    if not waited.unmet:
        return waited.fleet
    shown = "; ".join(str(item) for item in waited.unmet[:10])
    more = f"; and {len(waited.unmet) - 10} more" if len(waited.unmet) > 10 else ""
    raise WaitTimeout(
        f"wait_for: not met within {wait_timeout} s: {shown}{more}.",
        unmet=[item.as_dict() for item in waited.unmet],
        checks=waited.checks,
        waited=round(waited.waited, 3),
        **waited.fleet.as_dict(),
    )


def renew_consumers(
    control: Control,
    nodes: Sequence[str],
    wait_timeout: float,
    *,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """RabbitMQ may fix a consumer's prefetch when it begins (quorum queues): those of resized pools begin anew."""
    if not nodes:
        return
    deadline = clock() + wait_timeout

    def consumed() -> dict[str, list[str]]:
        found = observe(control, [("active_queues", {})], destination=nodes).nodes
        return {
            name: sorted(consumed_queues(node.replies))
            for name, node in found.items()
            if "active_queues" in node.replies
        }

    # A worker that starts pool processes may answer late, and without its answer nobody knows what it consumes.
    while mute := sorted(set(nodes) - set(wanted := consumed())):
        if clock() > deadline:
            raise NoReply(
                f"pool_size: the pools have the size, but {', '.join(mute)} did not say within {wait_timeout} s what "
                "they consume. Restart these workers."
            )
        sleep(0.1)

    def tell(command: str, todo: Mapping[str, Sequence[str]]) -> None:
        control.converse(
            [Request(command, {"queue": queue}, (node,)) for node, queues in todo.items() for queue in queues]
        )

    def consuming() -> bool:
        now = consumed()
        return any(set(queues) & set(now.get(node, queues)) for node, queues in wanted.items())

    # What a worker is told within one turn of its loop it does in any order (kombu's hub keeps a set), and who begins
    # before it has ended consumes nothing at last. So one is waited for before the other is told.
    tell("cancel_consumer", wanted)
    while consuming() and clock() < deadline:  # after that, what was cancelled must begin again all the same
        sleep(0.1)
    deadline, lacking = clock() + wait_timeout, dict(wanted)
    while lacking:
        if clock() > deadline:
            raise WaitTimeout(
                f"pool_size: the pools have the size, but after {wait_timeout} s not all consumers are back: "
                + "; ".join(f"{name} consumed {', '.join(queues)}" for name, queues in lacking.items())
                + ". Restart these workers."
            )
        tell("add_consumer", lacking)  # more than once does no harm
        now = consumed()
        lacking = {name: queues for name, queues in wanted.items() if now.get(name) != queues}
        if lacking:
            sleep(0.1)
