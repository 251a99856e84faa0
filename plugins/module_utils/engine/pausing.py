# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Pausing and resuming queues for a whole fleet: the record, the workers that run, and the proof."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from .connection import Broker
from .control import Control, Request
from .errors import NoReply, PreconditionFailed, QueueUnknown, WaitTimeout
from .fleet import Fleet, consumed_queues, observe
from .pauses import APPLY, COMMAND, Pause, load, now_of, parse_until, plan, save, withheld
from .queues import RedisQueues


@dataclass
class Done:
    """What was done, or would be. Nodes by queue; `before` and `after` are the records."""

    before: dict[str, Pause]
    after: dict[str, Pause]
    now: float
    stopped: dict[str, list[str]]
    started: dict[str, list[str]]
    consumers: dict[str, list[str]]
    waiting: dict[str, int]
    changed: bool


class Pausing:
    """One run: the record first, so that nobody who starts meanwhile is missed, then the workers."""

    def __init__(
        self,
        broker: Broker,
        control: Control,
        queues: Iterable[str],
        *,
        paused: bool,
        timeout: float,
        wait_timeout: float,
        warn: Callable[[str], None],
    ) -> None:
        if broker.kind != "redis":
            raise PreconditionFailed(
                f"broker_url: {broker.endpoint.scheme}:// is not Redis, where pauses are kept. On this broker "
                f"celery_control with consumers absent stops the workers that run, until they restart."
            )
        self.broker = broker
        self.control = control
        self.queues = list(dict.fromkeys(queues))
        self.paused = paused
        self.timeout = timeout
        self.wait_timeout = wait_timeout
        self.warn = warn

    def look(self) -> Fleet:
        questions: list[tuple[str, dict[str, Any]]] = [("active_queues", {}), (COMMAND, {})]
        return observe(self.control, questions, timeout=self.timeout, census=True)

    def consumers(self, fleet: Fleet) -> dict[str, list[str]]:
        return {q: [n for n in fleet.workers if q in consumed_queues(fleet.nodes[n].replies)] for q in self.queues}

    def withheld(self, fleet: Fleet) -> dict[str, list[str]]:
        told = {node: withheld(fleet.nodes[node].replies) for node in fleet.workers}
        return {queue: [node for node, queues in told.items() if queue in queues] for queue in self.queues}

    def require(self, fleet: Fleet, held: Mapping[str, Pause]) -> dict[str, int]:
        """Messages that wait, by queue; refuses a queue nobody has heard of."""
        store = RedisQueues.of(self.broker)
        depths = store.depth(self.queues)
        known = {*store.declared(self.queues), *held, *(name for name, row in depths.items() if row["exists"])}
        known.update(*(consumed_queues(fleet.nodes[node].replies) for node in fleet.workers))
        strange = [queue for queue in self.queues if queue not in known]
        if strange:
            there = sorted({*store.queues(), *known})
            raise QueueUnknown(
                f"queues: there is no queue {', '.join(strange)}. Queues: {', '.join(there[:30]) or 'none at all'}.",
                missing=strange,
                known=there[:1000],
            )
        return {queue: int(row["depth"]) for queue, row in depths.items()}

    def tell(self, fleet: Fleet) -> None:
        """Those that obey the record are told to look; the others to cancel, which lasts until they restart."""
        obeying = [node for node in fleet.workers if COMMAND in fleet.nodes[node].replies]
        requests = [Request(APPLY, {}, tuple(obeying))] if obeying else []
        for queue, nodes in self.consumers(fleet).items() if self.paused else ():
            bare = tuple(node for node in nodes if node not in obeying)
            if bare:
                self.warn(
                    f"{', '.join(bare)} runs without the runtime part pause and will consume {queue} after a restart."
                )
                requests.append(Request("cancel_consumer", {"queue": queue}, bare))
        if requests:
            self.control.converse(requests, timeout=self.timeout)

    def lacking(self, fleet: Fleet, wanted: Mapping[str, list[str]]) -> list[str]:
        """What does not hold yet, in words."""
        now = self.consumers(fleet)
        if self.paused:
            return [f"{node} still consumes {queue}" for queue, nodes in now.items() for node in nodes]
        return [
            f"{node} does not consume {queue} yet"
            for queue, nodes in wanted.items()
            for node in nodes
            if node not in now[queue]
        ]

    def settle(self, fleet: Fleet, wanted: Mapping[str, list[str]]) -> Fleet:
        deadline = time.monotonic() + self.wait_timeout
        pause = 0.02
        while True:
            missing = self.lacking(fleet, wanted)
            if not missing and not fleet.silent_count:
                return fleet
            if time.monotonic() > deadline:
                break
            # Who comes up or answers late is told too.
            self.tell(fleet)
            time.sleep(pause)
            pause = min(pause * 2, 1.0)
            fleet = self.look()
        done = "paused" if self.paused else "resumed"
        bound = self.wait_timeout
        text = f"the record says {done} and stays so, workers that start obey it; but after {bound} s "
        if missing:
            raise WaitTimeout(f"{text}{'; '.join(missing)}. Look at these workers, then run again.", missing=missing)
        raise NoReply(
            f"{text}{fleet.silent_count} connected worker(s) do not answer, so nobody knows what they consume. Look at "
            f"them (celery_inspect) or restart them, then run again.",
            answered=fleet.workers,
        )

    def run(self, *, by: str, why: str, until: str, dry: bool) -> Done:
        held, now = load(self.broker), now_of(self.broker)
        fleet = self.look()
        waiting = self.require(fleet, held)
        wanted = plan(
            held,
            self.queues,
            paused=self.paused,
            by=by,
            why=why,
            until=parse_until(until, now) if until else None,
            now=now,
        )
        after = {**held, **{queue: pause for queue, pause in wanted.items() if pause is not None}}
        after = {queue: pause for queue, pause in after.items() if wanted.get(queue, pause) is not None}
        before, goal = self.consumers(fleet), self.withheld(fleet)
        act = {queue: nodes for queue, nodes in (before if self.paused else goal).items() if nodes}
        if not dry:
            if wanted:
                save(self.broker, wanted)
            if wanted or act:
                self.tell(fleet)
                fleet = self.look()
            fleet = self.settle(fleet, goal)
        consumers = self.consumers(fleet)
        if not self.paused and not dry:
            for queue in (queue for queue, nodes in consumers.items() if not nodes):
                self.warn(f"nobody consumes {queue}: start the workers that ought to.")
        return Done(
            before=held,
            after=after,
            now=now,
            stopped=act if self.paused else {},
            started={} if self.paused else act,
            consumers=consumers,
            waiting=waiting,
            changed=bool(wanted or act),
        )
