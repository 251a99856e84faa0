# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Redis with replicas under Sentinel: who is what, and a failover in which no acknowledged write is lost.

By itself `SENTINEL FAILOVER` promotes a replica while the old primary goes on taking writes for about ten seconds; all
of them are lost when it becomes a replica. Here writes are paused first, the replica catches up, and the old primary is
made a replica and its clients are sent away as soon as the new one is known to the Sentinels.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from .connection import Broker, scrub
from .errors import ConnectionFailed, PreconditionFailed, WaitTimeout

# Seconds: how often is looked, how long writes may wait, and what a replica may need to catch up.
LOOK, PAUSE, CATCH_UP = 0.05, 15.0, 5.0
# A Sentinel asks a replica for its priority every ten seconds.
NEWS = 15.0
_GONE = ("s_down", "o_down", "disconnected")


@dataclass(frozen=True)
class Watcher:
    """One Sentinel: whom it takes for the primary, or what is wrong with it."""

    address: str
    primary: str = ""
    flags: str = ""
    epoch: int = 0
    others: int = 0
    needed: int = 0  # its quorum
    problem: str = ""


@dataclass(frozen=True)
class Node:
    """One Redis as it says itself, and what speaks against it as a primary."""

    address: str
    role: str = ""  # primary or replica, empty if it does not answer
    link: str = ""
    source: str = ""  # whose replica it is
    offset: int = 0
    silent_for: int = 0  # seconds since a replica heard of its primary
    priority: int = 100
    problem: str = ""


@dataclass(frozen=True)
class View:
    name: str
    sentinels: Sequence[Watcher] = field(default_factory=tuple)
    primary: str = ""
    nodes: Mapping[str, Node] = field(default_factory=dict)
    quorum: str = ""  # why the Sentinels could not agree on a failover, empty if they could

    @property
    def alive(self) -> bool:
        return self.nodes[self.primary].role == "primary" if self.primary in self.nodes else False

    @property
    def agreed(self) -> bool:
        return len({one.primary for one in self.sentinels if not one.problem}) == 1

    @property
    def moving(self) -> bool:
        return any("failover_in_progress" in one.flags for one in self.sentinels)

    @property
    def replicas(self) -> list[Node]:
        """Those that could be promoted, the best first."""
        fit = [node for address, node in self.nodes.items() if address != self.primary and not node.problem]
        return sorted(fit, key=lambda node: (-node.offset, node.priority, node.address))

    def lag(self, node: Node) -> int:
        """Bytes of replication that it is behind the primary, as far as that can be asked."""
        return max(0, self.nodes[self.primary].offset - node.offset) if self.alive else 0

    def unfit(self) -> str:
        found = [f"{a}: {n.problem}" for a, n in sorted(self.nodes.items()) if a != self.primary and n.problem]
        return "; ".join(found) or "the Sentinels know of no replica"


@dataclass(frozen=True)
class Plan:
    """`action`: none, wait (the Sentinels will do it), switch (the primary lives), force (it is dead)."""

    action: str
    target: str
    text: str


def plan(view: View, *, wanted: str = "", force: bool = False) -> Plan:
    """What is to be done; what is unsafe is refused. `wanted`: the primary that shall be, or `any` for a replica."""
    best = view.replicas[0].address if view.replicas else ""
    if view.alive:
        if not wanted or wanted == view.primary:
            return Plan("none", view.primary, f"{view.primary} is the primary and answers")
        target = best if wanted == "any" else wanted
        if target not in [node.address for node in view.replicas]:
            known = view.nodes[target].problem if target in view.nodes else "the Sentinels do not know it"
            why = f"{target}: {known}" if target else view.unfit()
            raise PreconditionFailed(
                f"no healthy replica: {why}. Nothing was touched. Bring a replica back (redis_recover, or site), wait"
                f" until its link is up, and run again.",
                primary=view.primary,
            )
        if view.quorum and not force:
            raise PreconditionFailed(
                f"the Sentinels cannot agree on a failover: {view.quorum}. Nothing was touched. Start those that are"
                f" down, or give force: then the ones that are away learn of it when they come back.",
                primary=view.primary,
            )
        return Plan(
            "switch", target, f"{view.primary} hands over to {target}, {view.lag(view.nodes[target])} bytes behind"
        )
    if not best:
        raise PreconditionFailed(
            f"no healthy replica: the primary {view.primary} does not answer, and {view.unfit()}. Nothing was touched."
            f" Bring the primary back (redis_recover with celeryops_redis_host), or restore a backup (redis_restore).",
            primary=view.primary,
        )
    target = wanted if wanted in [node.address for node in view.replicas] else best
    if force:
        return Plan("force", target, f"{view.primary} does not answer, {target} is promoted")
    if view.quorum:
        raise PreconditionFailed(
            f"the primary {view.primary} does not answer, and the Sentinels cannot agree on a failover: {view.quorum}."
            f" Nothing was touched. Start those that are down, or give force: then {target} is promoted by the one that"
            f" answers.",
            primary=view.primary,
        )
    return Plan("wait", target, f"{view.primary} does not answer, the Sentinels replace it")


def pairs(reply: Any) -> dict[str, str]:
    """A map of Redis, whatever the protocol makes of it."""
    if isinstance(reply, Mapping):
        rows = list(reply.items())
    else:
        flat = list(reply or [])
        rows = list(zip(flat[::2], flat[1::2], strict=False))
    return {_text(key): _text(value) for key, value in rows}


def _text(value: Any) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def _number(values: Mapping[str, str], name: str) -> int:
    text = values.get(name, "")
    return int(text) if text.lstrip("-").isdigit() else 0


class Watch:
    """The Sentinels of a broker and the Redis servers that they know."""

    def __init__(self, broker: Broker) -> None:
        self.broker = broker
        self.name: str = broker.spec.transport_options.get("master_name", "")
        self.sentinels = broker.sentinels()
        self._nodes: dict[str, Any] = {}

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, *_exc: object) -> None:
        for client in [*self.sentinels.values(), *self._nodes.values()]:
            with contextlib.suppress(Exception):
                client.close()

    def node(self, address: str) -> Any:
        if address not in self._nodes:
            host, _colon, port = address.rpartition(":")
            self._nodes[address] = self.broker.node(host, int(port))
        return self._nodes[address]

    def _ask(self, sentinel: Any, *command: str) -> Any:
        return sentinel.execute_command("SENTINEL", *command)

    def _trouble(self, exc: Exception) -> str:
        return scrub(exc, *self.broker.spec.secrets).rstrip(".") or type(exc).__name__

    def _watcher(self, address: str) -> Watcher:
        import redis

        try:
            told = pairs(self._ask(self.sentinels[address], "MASTER", self.name))
        except redis.exceptions.RedisError as exc:
            return Watcher(address, problem=self._trouble(exc))
        return Watcher(
            address,
            primary=f"{told.get('ip')}:{told.get('port')}",
            flags=told.get("flags", ""),
            epoch=_number(told, "config-epoch"),
            others=_number(told, "num-other-sentinels"),
            needed=_number(told, "quorum"),
        )

    def watchers(self) -> list[Watcher]:
        found = [self._watcher(address) for address in self.sentinels]
        if all(one.problem for one in found):
            raise ConnectionFailed(
                f"no Sentinel can be asked for {self.name!r}: {'; '.join(f'{w.address}: {w.problem}' for w in found)}."
                f" Check broker_url, transport_options.master_name and sentinel_kwargs, and start the Sentinels."
            )
        return found

    def _look_at(self, address: str, told: Mapping[str, str]) -> Node:
        import redis

        try:
            info = {str(key): str(value) for key, value in self.node(address).info("replication").items()}
            loading = self.node(address).info("persistence").get("loading")
        except redis.exceptions.RedisError as exc:
            return Node(address, problem=f"does not answer ({self._trouble(exc)})")
        role = "primary" if info.get("role") == "master" else "replica"
        offset = "master_repl_offset" if role == "primary" else "slave_repl_offset"
        node = Node(
            address,
            role=role,
            link=info.get("master_link_status", ""),
            source=f"{info.get('master_host')}:{info.get('master_port')}" if role == "replica" else "",
            offset=_number(info, offset),
            silent_for=max(
                0, _number(info, "master_last_io_seconds_ago"), _number(info, "master_link_down_since_seconds")
            ),
            priority=_number(info, "slave_priority") if role == "replica" else 100,
        )
        down = [flag for flag in told.get("flags", "").split(",") if flag in _GONE]
        problem = ""
        if str(loading) == "1":
            problem = "is loading its data"
        elif role == "replica" and info.get("master_sync_in_progress") == "1":
            problem = "is being copied to"
        elif role == "replica" and node.priority == 0:
            problem = "has replica-priority 0, which forbids it"
        elif down:
            problem = f"is {', '.join(down)} for the Sentinels"
        return replace(node, problem=problem)

    def look(self) -> View:
        found = self.watchers()
        # The Sentinel with the newest configuration is right; others learn of it within seconds.
        best = max((one for one in found if not one.problem), key=lambda one: one.epoch)
        asked = self.sentinels[best.address]
        rows = [pairs(row) for row in self._ask(asked, "REPLICAS", self.name)]
        nodes = {best.primary: self._look_at(best.primary, {})}
        for row in rows:
            address = f"{row.get('ip')}:{row.get('port')}"
            nodes[address] = self._look_at(address, row)
        alive = nodes[best.primary].role == "primary"
        for address, node in list(nodes.items()):
            if address == best.primary or node.problem:
                continue
            problem = ""
            if node.role == "primary":
                problem = "takes itself for a primary; the Sentinels will make it a replica"
            elif alive and node.link != "up":
                problem = f"its link to the primary is {node.link}"
            elif alive and node.source != best.primary:
                problem = f"is a replica of {node.source}"
            nodes[address] = replace(node, problem=problem)
        return View(self.name, tuple(found), best.primary, nodes, self._quorum(asked, found))

    def _quorum(self, sentinel: Any, found: Sequence[Watcher]) -> str:
        import redis

        try:
            self._ask(sentinel, "CKQUORUM", self.name)
        except redis.exceptions.ResponseError as exc:
            away = [f"{one.address} ({one.problem})" for one in found if one.problem]
            return self._trouble(exc) + (f"; away: {', '.join(away)}" if away else "")
        return ""

    def settle(self, timeout: float) -> View:
        """A view in which all Sentinels that answer agree and no failover is under way."""
        deadline = time.monotonic() + timeout
        while True:
            view = self.look()
            if view.agreed and not view.moving:
                return view
            if time.monotonic() > deadline:
                told = ", ".join(f"{one.address} says {one.primary}" for one in view.sentinels if not one.problem)
                raise WaitTimeout(
                    f"the Sentinels of {self.name!r} do not agree within {timeout:g} s: {told}. Look whether they reach"
                    f" one another; SENTINEL RESET {self.name} on the one that is wrong makes it learn anew."
                )
            time.sleep(0.5)

    # acting

    def wait(self, dead: str, timeout: float) -> View:
        """Until the Sentinels have replaced it, or it is back."""
        deadline = time.monotonic() + timeout
        hopeless = False
        while True:
            view = self.look()
            if view.alive and view.agreed and not view.moving:
                return view
            # It takes them some seconds to notice that they cannot agree.
            try:
                plan(view)
                hopeless = False
            except PreconditionFailed:
                if hopeless and not view.moving:
                    raise
                hopeless = True
            if time.monotonic() > deadline:
                raise WaitTimeout(
                    f"the Sentinels have not replaced {dead} within {timeout:g} s. Look at their logs; force promotes"
                    f" {view.replicas[0].address if view.replicas else 'a replica'} at once."
                )
            time.sleep(LOOK * 4)

    def fail_over(self, view: View, do: Plan, timeout: float) -> dict[str, Any]:
        """From the primary to `do.target`. Returns the gap in seconds, during which nothing was written."""
        with self._preferred(view, do.target, timeout):
            if do.action == "switch":
                return self._hand_over(view.primary, do.target, timeout)
            begun = time.monotonic()
            self._order(timeout)
            self._promoted(do.target, timeout)
        return {"gap": round(time.monotonic() - begun, 2), "behind": None}

    @contextlib.contextmanager
    def _preferred(self, view: View, target: str, timeout: float) -> Iterator[None]:
        """The Sentinels promote the replica with the lowest priority that is not 0."""
        rivals = [node for node in view.replicas if node.address != target]
        if not rivals:
            yield
            return
        before = view.nodes[target].priority
        self.node(target).config_set("replica-priority", 1)
        raised = [node for node in rivals if node.priority <= 1]
        for node in raised:
            self.node(node.address).config_set("replica-priority", 2)
        try:
            self._until(
                lambda: all(self._priority(client, target) == 1 for client in self._answering()),
                max(timeout, NEWS),
                f"the Sentinels did not learn that {target} is preferred",
            )
            yield
        finally:
            for node in [view.nodes[target], *raised]:
                with contextlib.suppress(Exception):
                    self.node(node.address).config_set(
                        "replica-priority", before if node.address == target else node.priority
                    )

    def _answering(self) -> list[Any]:
        return [self.sentinels[one.address] for one in self.watchers() if not one.problem]

    def _priority(self, sentinel: Any, target: str) -> int:
        for row in map(pairs, self._ask(sentinel, "REPLICAS", self.name)):
            if f"{row.get('ip')}:{row.get('port')}" == target:
                return _number(row, "slave-priority")
        return -1

    def _until(self, condition: Any, timeout: float, what: str) -> None:
        deadline = time.monotonic() + timeout
        while not condition():
            if time.monotonic() > deadline:
                raise WaitTimeout(f"{what} within {timeout:g} s.")
            time.sleep(LOOK)

    def _order(self, timeout: float) -> None:
        """Tell one Sentinel; it publishes what it did to the others."""
        import redis

        deadline, said = time.monotonic() + timeout, ""
        while time.monotonic() < deadline:
            for client in self._answering():
                try:
                    self._ask(client, "FAILOVER", self.name)
                except redis.exceptions.RedisError as exc:
                    said = self._trouble(exc)
                else:
                    return
            time.sleep(LOOK * 4)
        raise WaitTimeout(f"no Sentinel begins a failover of {self.name!r}: {said}.")

    def _is_primary(self, address: str) -> bool:
        import redis

        try:
            return str(self.node(address).info("replication").get("role")) == "master"
        except redis.exceptions.RedisError:
            return False

    def _promoted(self, target: str, timeout: float) -> None:
        self._until(lambda: self._is_primary(target), timeout, f"{target} was not promoted")
        self._until(
            lambda: any(one.primary == target for one in self.watchers()),
            timeout,
            f"{target} takes writes, but no Sentinel names it",
        )

    def _hand_over(self, primary: str, target: str, timeout: float) -> dict[str, Any]:
        old, new = self.node(primary), self.node(target)
        begun = time.monotonic()
        # Should this end here, writes go on by themselves after that time.
        old.execute_command("CLIENT", "PAUSE", str(int(max(PAUSE, timeout) * 1000)), "WRITE")
        try:
            behind = self._caught_up(old, new, target)
            self._order(timeout)
            self._promoted(target, timeout)
            host, _colon, port = target.rpartition(":")
            # Before as well: who waits for a message would be answered UNBLOCKED, at which Celery by itself ends.
            self._send_away(old)
            # As Sentinel would, eight seconds later: in that time the old primary would take writes that get lost.
            old.execute_command("REPLICAOF", host, port)
            with contextlib.suppress(Exception):  # without a file of configuration there is nothing to rewrite
                old.execute_command("CONFIG", "REWRITE")
            self._send_away(old)
        finally:
            with contextlib.suppress(Exception):
                old.execute_command("CLIENT", "UNPAUSE")
        return {"gap": round(time.monotonic() - begun, 2), "behind": behind}

    def _send_away(self, server: Any) -> None:
        for kind in ("normal", "pubsub"):
            server.execute_command("CLIENT", "KILL", "TYPE", kind)

    def _caught_up(self, old: Any, new: Any, target: str) -> int:
        """Bytes that the replica had to catch up."""
        first = -1
        deadline = time.monotonic() + CATCH_UP
        while True:
            sent = int(old.info("replication")["master_repl_offset"])
            behind = max(0, sent - int(new.info("replication").get("slave_repl_offset", 0)))
            first = behind if first < 0 else first
            if not behind:
                return first
            if time.monotonic() > deadline:
                raise PreconditionFailed(
                    f"{target} is {behind} bytes behind and did not catch up within {CATCH_UP:g} s. Nothing changed,"
                    f" writes go on. Run again when it has less to do, or when its network is faster."
                )
            time.sleep(LOOK / 5)

    def guarded(self, primary: str, timeout: float) -> View:
        """Until the others follow the new primary, as far as they answer; what does not is in the view."""
        deadline = time.monotonic() + timeout
        while True:
            view = self.look()
            waiting = [node for a, node in view.nodes.items() if a != primary and node.role and node.problem]
            if view.agreed and not view.moving and view.primary == primary and not waiting:
                return view
            if time.monotonic() > deadline:
                return view
            time.sleep(0.5)


def described(view: View) -> dict[str, Any]:
    """For people and programs."""
    return {
        "master_name": view.name,
        "primary": view.primary,
        "alive": view.alive,
        "agreed": view.agreed,
        "quorum": view.quorum,
        "sentinels": {one.address: asdict(one) for one in view.sentinels},
        "nodes": {address: {**asdict(node), "lag": view.lag(node)} for address, node in view.nodes.items()},
        "fit": [node.address for node in view.replicas],
    }
