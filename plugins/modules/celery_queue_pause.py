#!/usr/bin/python
# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: celery_queue_pause
short_description: Pause queues for the whole fleet until they are resumed
version_added: 0.1.0
description:
  - Keeps in the broker which queues nobody shall consume, who said so and why. Every worker with the runtime package
    obeys it when it starts, when it reconnects, and when it is told to consume such a queue. So a pause outlasts
    restarts, boots, new workers and a restart of Redis.
  - The workers that run are told at once. The module waits until none of them consumes a paused queue, or until those
    which left it alone consume it again.
  - A worker without the runtime part C(pause) is told to cancel its consumer, and consumes again after a restart.
  - Tasks which workers hold already are finished. Producers are not held up; messages wait in the queue.
author:
  - celeryops contributors (@celeryops)
extends_documentation_fragment:
  - celeryops.runbook.connection
  - celeryops.runbook.attributes
options:
  queues:
    description: The queues. Each must be declared, hold messages, be consumed or be paused.
    type: list
    elements: str
    required: true
  state:
    description: Whether they are paused or consumed by the workers that ought to.
    type: str
    choices: [paused, resumed]
    default: paused
  by:
    description: Who pauses them. Default the user who runs the module.
    type: str
  why:
    description: The reason, required for a queue that is not paused yet. A new one replaces that of an earlier pause.
    type: str
  until:
    description:
      - How long it is meant to last, as V(2026-11-21T18:00:00Z) or from now on as V(+90m), V(+2h), V(+1d), which counts
        anew with every run.
      - A pause does not end by itself. When its time is over M(celeryops.runbook.celery_health) warns.
    type: str
  timeout:
    description: Seconds one round of questions may take at most.
    type: float
    default: 2.0
  wait_timeout:
    description: Seconds until all workers must have followed.
    type: float
    default: 30.0
seealso:
  - module: celeryops.runbook.celery_control
  - module: celeryops.runbook.celery_inspect
"""

EXAMPLES = r"""
- name: No mails while the mail server is repaired
  celeryops.runbook.celery_queue_pause:
    environment_file: /etc/celeryops/shop/secret.env
    virtualenv: /srv/shop/current/venv
    queues: [mail]
    why: mail server is repaired
    until: +2h

- name: Mails again
  celeryops.runbook.celery_queue_pause:
    environment_file: /etc/celeryops/shop/secret.env
    virtualenv: /srv/shop/current/venv
    queues: [mail]
    state: resumed
"""

RETURN = r"""
paused:
  description: All queues that are paused afterwards, with C(by), C(why), C(since), C(until) and C(overdue).
  returned: success
  type: dict
  sample: {mail: {by: anna, why: mail server is repaired, since: 1795000000.0, until: null, overdue: false}}
stopped:
  description: Nodes that stopped consuming, by queue.
  returned: success
  type: dict
  sample: {mail: [shop-default-1@worker1]}
started:
  description: Nodes that consume again, by queue.
  returned: success
  type: dict
consumers:
  description: Nodes that consume each of O(queues) afterwards.
  returned: success
  type: dict
waiting:
  description: Messages in each of O(queues).
  returned: success
  type: dict
  sample: {mail: 12}
elapsed:
  description: Seconds until the workers had followed.
  returned: success
  type: float
"""

import getpass
import json
import time
from collections.abc import Mapping
from typing import Any

from ansible_collections.celeryops.runbook.plugins.module_utils._module import CeleryModule, run
from ansible_collections.celeryops.runbook.plugins.module_utils.engine import pauses
from ansible_collections.celeryops.runbook.plugins.module_utils.engine.connection import Broker
from ansible_collections.celeryops.runbook.plugins.module_utils.engine.control import Control, Request
from ansible_collections.celeryops.runbook.plugins.module_utils.engine.errors import (
    NoReply,
    PreconditionFailed,
    QueueUnknown,
    WaitTimeout,
)
from ansible_collections.celeryops.runbook.plugins.module_utils.engine.fleet import Fleet, consumed_queues, observe
from ansible_collections.celeryops.runbook.plugins.module_utils.engine.queues import RedisQueues

ARGUMENT_SPEC = {
    "queues": {"type": "list", "elements": "str", "required": True},
    "state": {"type": "str", "choices": ["paused", "resumed"], "default": "paused"},
    "by": {"type": "str"},
    "why": {"type": "str"},
    "until": {"type": "str"},
    "timeout": {"type": "float", "default": 2.0},
    "wait_timeout": {"type": "float", "default": 30.0},
}


class Pausing:
    """One run: the record first, so that nobody who starts meanwhile is missed, then the workers."""

    def __init__(self, module: CeleryModule, broker: Broker, control: Control) -> None:
        self.params = module.params
        self.module = module
        self.broker = broker
        self.control = control
        self.queues: list[str] = list(dict.fromkeys(module.params["queues"]))
        self.paused = module.params["state"] == "paused"

    def look(self) -> Fleet:
        questions: list[tuple[str, dict[str, Any]]] = [("active_queues", {}), (pauses.COMMAND, {})]
        return observe(self.control, questions, timeout=self.params["timeout"], census=True)

    def consumers(self, fleet: Fleet) -> dict[str, list[str]]:
        return {q: [n for n in fleet.workers if q in consumed_queues(fleet.nodes[n].replies)] for q in self.queues}

    def withheld(self, fleet: Fleet) -> dict[str, list[str]]:
        told = {node: pauses.withheld(fleet.nodes[node].replies) for node in fleet.workers}
        return {queue: [node for node, queues in told.items() if queue in queues] for queue in self.queues}

    def require(self, fleet: Fleet, held: Mapping[str, pauses.Pause]) -> dict[str, int]:
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
        obeying = [node for node in fleet.workers if pauses.COMMAND in fleet.nodes[node].replies]
        requests = [Request(pauses.APPLY, {}, tuple(obeying))] if obeying else []
        for queue, nodes in self.consumers(fleet).items() if self.paused else ():
            bare = tuple(node for node in nodes if node not in obeying)
            if bare:
                self.module.warn(
                    f"{', '.join(bare)} runs without the runtime part pause and will consume {queue} after a restart."
                )
                requests.append(Request("cancel_consumer", {"queue": queue}, bare))
        if requests:
            self.control.converse(requests, timeout=self.params["timeout"])

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
        deadline = time.monotonic() + self.params["wait_timeout"]
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
        bound = self.params["wait_timeout"]
        text = f"the record says {done} and stays so, workers that start obey it; but after {bound} s "
        if missing:
            raise WaitTimeout(f"{text}{'; '.join(missing)}. Look at these workers, then run again.", missing=missing)
        raise NoReply(
            f"{text}{fleet.silent_count} connected worker(s) do not answer, so nobody knows what they consume. Look at "
            f"them (celery_inspect) or restart them, then run again.",
            answered=fleet.workers,
        )


def pause_queues(module: CeleryModule) -> dict[str, Any]:
    params = module.params
    for name in ("timeout", "wait_timeout"):
        if params[name] <= 0:
            raise PreconditionFailed(f"{name}: must be above 0 seconds, not {params[name]}.")
    if not params["queues"] or not all(queue.strip() for queue in params["queues"]):
        raise PreconditionFailed("queues: name at least one queue, and none with an empty name.")
    started = time.monotonic()
    with module.broker() as broker, Control(broker, timeout=params["timeout"]) as control:
        if broker.kind != "redis":
            raise PreconditionFailed(
                f"broker_url: {broker.endpoint.scheme}:// is not Redis, where pauses are kept. On this broker "
                f"celery_control with consumers absent stops the workers that run, until they restart."
            )
        pausing = Pausing(module, broker, control)
        held, now = pauses.load(broker), pauses.now_of(broker)
        fleet = pausing.look()
        waiting = pausing.require(fleet, held)
        wanted = pauses.plan(
            held,
            pausing.queues,
            paused=pausing.paused,
            by=params["by"] or getpass.getuser(),
            why=params["why"] or "",
            until=pauses.parse_until(params["until"], now) if params["until"] else None,
            now=now,
        )
        after = {**held, **{queue: pause for queue, pause in wanted.items() if pause is not None}}
        after = {queue: pause for queue, pause in after.items() if wanted.get(queue, pause) is not None}
        before = pausing.consumers(fleet)
        goal = pausing.withheld(fleet)
        act = {queue: nodes for queue, nodes in (before if pausing.paused else goal).items() if nodes}
        if not module.check_mode:
            if wanted:
                pauses.save(broker, wanted)
            if wanted or act:
                pausing.tell(fleet)
                fleet = pausing.look()
            fleet = pausing.settle(fleet, goal)
        consumers = pausing.consumers(fleet)
        if not pausing.paused and not module.check_mode:
            for queue in (queue for queue, nodes in consumers.items() if not nodes):
                module.warn(f"nobody consumes {queue}: start the workers that ought to.")
    shown = [{queue: str(pause) for queue, pause in sorted(side.items())} for side in (held, after)]
    return {
        "changed": bool(wanted or act),
        "paused": {queue: pause.as_dict(now) for queue, pause in sorted(after.items())},
        "stopped": act if pausing.paused else {},
        "started": {} if pausing.paused else act,
        "consumers": consumers,
        "waiting": waiting,
        "elapsed": round(time.monotonic() - started, 3),
        "diff": {
            "before": json.dumps(shown[0], indent=2) + "\n",
            "after": json.dumps(shown[1], indent=2) + "\n",
        },
    }


def main() -> None:
    run(pause_queues, ARGUMENT_SPEC, supports_check_mode=True)


if __name__ == "__main__":
    main()
