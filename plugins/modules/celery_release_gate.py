#!/usr/bin/python
# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: celery_release_gate
short_description: Refuse a release that cannot do the work which waits, or a fleet that is not fit for a deploy
version_added: 0.1.0
author:
  - celeryops contributors (@celeryops)
description:
  - Compares the tasks of a release with the task names that wait in the queues, are held by workers, lie in dead-letter
    queues and are in the release's schedule.
  - Looks whether the broker is fit and whether the fleet is complete.
  - Fails with everything that speaks against the deploy. Never changes anything.
  - On RabbitMQ nobody can look at a waiting message without taking it out. There the task names come from the schedule
    and from what workers hold; if messages wait and the release lacks tasks of the running one, a warning says so.
extends_documentation_fragment:
  - celeryops.runbook.connection
  - celeryops.runbook.attributes.info
options:
  release_file:
    description:
      - The C(release.json) of the release, as the role C(release) leaves it on the host.
      - Without it only broker and fleet are judged.
    type: path
  queues:
    description: Queues which the pools consume. Their dead-letter queues, C(QUEUE.dead), are looked at too.
    type: list
    elements: str
    required: true
  expected_nodes:
    description: Names of the workers that make the fleet complete.
    type: list
    elements: str
    default: []
  tolerated_nodes:
    description: Those of them which may be absent, because an interrupted deploy has stopped them.
    type: list
    elements: str
    default: []
  most:
    description: Messages to look at in each queue. Where more wait, a warning says so.
    type: int
    default: 1000000
  timeout:
    description: Seconds the fleet has to answer.
    type: float
    default: 3.0
seealso:
  - module: celeryops.runbook.celery_inspect
"""

EXAMPLES = r"""
- name: May release v2 be deployed?
  celeryops.runbook.celery_release_gate:
    environment_file: /etc/celeryops/shop/secret.env
    virtualenv: /srv/shop/current/venv
    release_file: /srv/shop/releases/v2/release.json
    queues: [default, email]
    expected_nodes: [shop-default-1@worker1, shop-default-1@worker2]
"""

RETURN = r"""
problems:
  description: What speaks against the deploy.
  returned: always
  type: list
  elements: str
  sample: ["task shop.send_receipt, waiting in queue email (12), is unknown to release v3"]
unknown_tasks:
  description: Task names the release does not know, and where they were found.
  returned: always
  type: dict
  sample: {shop.send_receipt: ["waiting in queue email (12)"]}
waiting:
  description: Messages looked at, by queue.
  returned: always
  type: dict
  sample: {default: 3, email: 12}
nodes:
  description: The workers that answered, with the queues they consume.
  returned: always
  type: dict
"""

import json
from typing import Any

from ansible_collections.celeryops.runbook.plugins.module_utils._module import CeleryModule, run
from ansible_collections.celeryops.runbook.plugins.module_utils.engine.connection import Broker
from ansible_collections.celeryops.runbook.plugins.module_utils.engine.control import Control
from ansible_collections.celeryops.runbook.plugins.module_utils.engine.errors import PreconditionFailed
from ansible_collections.celeryops.runbook.plugins.module_utils.engine.fleet import Fleet, consumed_queues, observe
from ansible_collections.celeryops.runbook.plugins.module_utils.engine.queues import RedisQueues
from ansible_collections.celeryops.runbook.plugins.module_utils.engine.survey import broker_facts

ARGUMENT_SPEC = {
    "release_file": {"type": "path"},
    "queues": {"type": "list", "elements": "str", "required": True},
    "expected_nodes": {"type": "list", "elements": "str", "default": []},
    "tolerated_nodes": {"type": "list", "elements": "str", "default": []},
    "most": {"type": "int", "default": 1_000_000},
    "timeout": {"type": "float", "default": 3.0},
}
KNOWN = ("tasks", "schedule", "queues")


def read_release(path: str) -> dict[str, Any]:
    try:
        with open(path, encoding="utf-8") as handle:
            release = json.load(handle)
    except (OSError, ValueError) as exc:
        raise PreconditionFailed(f"release_file: {path} cannot be read: {exc}. Build the release first.") from exc
    if not isinstance(release, dict) or any(key not in release for key in KNOWN):
        raise PreconditionFailed(f"release_file: {path} does not describe a release. Build the release again.")
    return release


class Gate:
    def __init__(self, broker: Broker, params: dict[str, Any]) -> None:
        self.broker = broker
        self.params = params
        self.problems: list[str] = []
        self.warnings: list[str] = []
        self.unknown: dict[str, list[str]] = {}
        self.waiting: dict[str, int] = {}
        self.queues: dict[str, dict[str, Any]] = {}  # what RabbitMQ has

    def judge_broker(self) -> None:
        facts = broker_facts(self.broker, self.params["queues"])
        if facts.get("alarms") or facts.get("blocked"):
            raise PreconditionFailed("an alarm of RabbitMQ is on, so nothing can be published: see broker_check.")
        self.problems += [f"quorum queue {text}: bring its nodes back" for text in facts.get("short") or ()]
        self.queues = dict(facts.get("queues") or {})
        if facts.get("role", "master") != "master":
            self.problems.append(f"the broker is a {facts['role']}: give the address of the master")
        if facts.get("loading"):
            self.problems.append("the broker is still loading its data: wait until it has")
        policy = facts.get("maxmemory_policy", "noeviction")
        if policy != "noeviction":
            self.warnings.append(f"the broker's maxmemory-policy is {policy}, which may drop tasks; set noeviction")

    def judge_fleet(self) -> Fleet:
        expected = self.params["expected_nodes"]
        tolerated = set(self.params["tolerated_nodes"])
        questions: list[tuple[str, dict[str, Any]]] = [("active_queues", {})]
        if self.broker.kind != "redis":
            questions += [(command, {}) for command in ("registered", "active", "reserved", "scheduled")]
        with Control(self.broker) as control:
            fleet = observe(control, questions, expected=expected, timeout=self.params["timeout"], census=True)
        missing = [name for name in expected if name not in fleet.in_state("answered")]
        # A tolerated node counts as stopped only where all that are connected have answered.
        excused = tolerated if not fleet.silent_count else set()
        unexcused = [name for name in missing if name not in excused]
        if unexcused:
            self.problems.append(
                f"the fleet is not complete: no answer from {', '.join(unexcused)} within {self.params['timeout']} s; "
                f"start or restart it, see its log"
            )
        elif fleet.silent_count > 0:
            self.problems.append(f"{fleet.silent_count} connected worker(s) not in the inventory keep silent")
        if fleet.duplicates:
            self.problems.append(f"several workers share the name {', '.join(fleet.duplicates)}; stop all but one")
        return fleet

    def compare(self, name: str, place: str, tasks: set[str]) -> None:
        if name and name not in tasks:
            self.unknown.setdefault(name, []).append(place)

    def judge_held(self, fleet: Fleet, names: list[str], tasks: set[str]) -> None:
        """RabbitMQ: the tasks that workers have, and what is known of those that wait."""
        for node, seen in sorted(fleet.nodes.items()):
            for command in ("active", "reserved", "scheduled"):
                for row in seen.replies.get(command) or ():
                    task = row.get("request") or row
                    self.compare(str(task.get("name") or task.get("type") or ""), f"held by {node}", tasks)
        self.waiting = {queue: self.queues[queue]["ready"] for queue in names if queue in self.queues}
        told = [text for seen in fleet.nodes.values() for text in seen.replies.get("registered") or ()]
        registered = {str(text).split(" ", 1)[0] for text in told}
        lacking = sorted(name for name in registered - tasks if not name.startswith("celeryops."))
        if lacking and any(self.waiting.values()):
            self.warnings.append(
                f"{sum(self.waiting.values())} messages wait in RabbitMQ, which nobody can look at, and the release "
                f"lacks task {', '.join(lacking)}, which the fleet knows: those among them would become dead letters"
            )

    def judge_waiting(self, names: list[str], tasks: set[str]) -> None:
        queues = RedisQueues.of(self.broker)
        depths = queues.depth(names)
        for queue in names:
            if not depths[queue]["exists"]:
                continue
            found = queues.task_names(queue, most=self.params["most"])
            self.waiting[queue] = found.scanned
            for task, count in found.tasks.items():
                self.compare(task, f"waiting in queue {queue} ({count})", tasks)
            if found.undecodable:
                self.warnings.append(f"queue {queue} holds {found.undecodable} message(s) that cannot be decoded")
            if not found.complete:
                self.warnings.append(f"queue {queue} is longer than {found.scanned} messages; the rest was not read")
        for queue, counts in queues.unacked_names().items():
            if queue in names:
                for task, count in counts.items():
                    self.compare(task, f"held by workers, from queue {queue} ({count})", tasks)

    def judge_release(self, release: dict[str, Any], fleet: Fleet) -> None:
        tasks = set(release["tasks"])
        scheduled = {entry["queue"] for entry in release["schedule"].values() if entry.get("queue")}
        own = sorted({*self.params["queues"], *release["queues"], *scheduled})
        names = [*own, *(f"{queue}.dead" for queue in own)]
        if self.broker.kind == "redis":
            self.judge_waiting(names, tasks)
        else:
            self.judge_held(fleet, names, tasks)
        consumed = {queue for node in fleet.nodes.values() for queue in consumed_queues(node.replies)}
        consumed |= set(self.params["queues"])
        for entry, item in sorted(release["schedule"].items()):
            self.compare(item["task"], f"schedule entry {entry}", tasks)
            if item.get("queue") and item["queue"] not in consumed:
                self.problems.append(
                    f"schedule entry {entry} goes to queue {item['queue']}, which no pool consumes: add it to "
                    f"celeryops_worker_pools"
                )
        for name, places in sorted(self.unknown.items()):
            self.problems.append(f"task {name}, {', '.join(places)}, is unknown to the release")


def gate(module: CeleryModule) -> dict[str, Any]:
    params = module.params
    if not params["queues"]:
        raise PreconditionFailed("queues: must not be empty. Name the queues the pools consume.")
    release = read_release(params["release_file"]) if params["release_file"] else None
    with module.broker() as broker:
        judged = Gate(broker, params)
        judged.judge_broker()
        fleet = judged.judge_fleet()
        if release is not None:
            judged.judge_release(release, fleet)
    result: dict[str, Any] = {
        "problems": judged.problems,
        "unknown_tasks": judged.unknown,
        "waiting": judged.waiting,
        "nodes": {name: consumed_queues(fleet.nodes[name].replies) for name in fleet.workers},
    }
    if judged.problems:
        raise PreconditionFailed("; ".join(judged.problems) + ".", **result)
    for text in judged.warnings:
        module.warn(text)
    return {"changed": False, **result}


def main() -> None:
    run(gate, ARGUMENT_SPEC, supports_check_mode=True)


if __name__ == "__main__":
    main()
