#!/usr/bin/python
# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: celery_inspect
short_description: Ask Celery workers about their state, and wait until a fleet is as wanted
version_added: 0.1.0
description:
  - Sends any number of inspect commands at once and returns as soon as every connected node has answered.
  - On Redis the broker itself says how many nodes are connected, so a silent node is told from an absent one.
  - With O(wait_for) it asks again until all conditions hold, or fails and says which node fails which condition.
  - Never changes anything.
author:
  - celeryops contributors (@celeryops)
extends_documentation_fragment:
  - celeryops.runbook.connection
  - celeryops.runbook.attributes.info
options:
  commands:
    description:
      - Inspect commands to send.
      - V(celeryops_ledger), V(celeryops_pauses) and V(celeryops_release) are answered by workers started with
        C(--include celeryops.worker).
      - V(celeryops_pauses) tells which queues a worker leaves alone while they are paused.
      - V(memsample) and V(memdump) need C(psutil) beside the worker.
    type: list
    elements: str
    choices:
      - active
      - active_queues
      - celeryops_ledger
      - celeryops_pauses
      - celeryops_release
      - clock
      - conf
      - memdump
      - memsample
      - ping
      - query_task
      - registered
      - report
      - reserved
      - revoked
      - scheduled
      - stats
    default: [ping]
  destination:
    description:
      - Names of the nodes to ask. All nodes if omitted.
      - The conditions V(release), V(consumes), V(not_consumes) and V(idle) of O(wait_for) concern these nodes.
    type: list
    elements: str
  expected_nodes:
    description: Nodes that should be there. Those that do not answer are listed as silent (or unknown).
    type: list
    elements: str
    default: []
  task_ids:
    description: Ids for V(query_task).
    type: list
    elements: str
    default: []
  include_arguments:
    description:
      - Whether the arguments of tasks are returned. They may hold secrets, so the default is their size only
        (C(args_size) and C(kwargs_size), in characters).
    type: bool
    default: false
  fail_on_missing:
    description: Fail when a node of O(destination) or O(expected_nodes), or any connected node, does not answer.
    type: bool
    default: false
  timeout:
    description: Seconds one round of questions may take at most, whatever nodes do.
    type: float
    default: 2.0
  wait_for:
    description: Conditions that must all hold. Asked again every O(wait_interval) until O(wait_timeout) is over.
    type: dict
    suboptions:
      all_answer:
        description: Every connected node (or every node of O(destination)) and all of O(expected_nodes) answer.
        type: bool
        default: false
      min_nodes:
        description: So many workers answer.
        type: int
        default: 0
      nodes:
        description: These nodes answer.
        type: list
        elements: str
        default: []
      gone:
        description: These nodes are gone. While a connected node is silent, that can not be known.
        type: list
        elements: str
        default: []
      release:
        description: The workers run this release, by V(celeryops_release).
        type: str
      consumes:
        description: Each worker consumes all of these queues, those that are paused left out.
        type: list
        elements: str
        default: []
      not_consumes:
        description: No worker consumes any of these queues; V(true) for no queue at all.
        type: raw
      idle:
        description: The workers hold no active or reserved task, for at least one second.
        type: bool
        default: false
      queues_consumed:
        description: Each of these queues has a consumer somewhere in the fleet, or is paused.
        type: list
        elements: str
        default: []
  wait_timeout:
    description: Seconds until O(wait_for) gives up.
    type: float
    default: 60.0
  wait_interval:
    description: Seconds between two rounds.
    type: float
    default: 0.5
seealso:
  - module: celeryops.runbook.celery_control
"""

EXAMPLES = r"""
- name: Ask everything at once
  celeryops.runbook.celery_inspect:
    environment_file: /etc/celeryops/shop/secret.env
    virtualenv: /srv/shop/current/venv
    commands: [ping, active, active_queues, stats]
  register: fleet

- name: Wait until a worker is back with the new release
  celeryops.runbook.celery_inspect:
    broker_url: redis://redis1:6379/0
    destination: [shop-default-1@worker1]
    wait_for:
      release: v2
      consumes: [default]
    wait_timeout: 30

- name: Prove that a quiet worker holds nothing
  celeryops.runbook.celery_inspect:
    broker_url: redis://redis1:6379/0
    destination: [shop-default-1@worker1]
    wait_for:
      not_consumes: true
      idle: true
    wait_timeout: 300
"""

RETURN = r"""
nodes:
  description: Every node that answered, and every node asked for or expected.
  returned: always
  type: dict
  contains:
    state:
      description:
        - V(answered); V(silent) if it did not although asked or expected; V(unknown) if it did not, on a broker that
          cannot count its subscribers.
      type: str
    type:
      description: V(worker), or V(beat) for Celery 5.7's beat, which answers ping only.
      type: str
    connected:
      description: V(false) if it is certainly not on the broker's channel, null if nobody can tell.
      type: bool
    replies:
      description: Answers by command.
      type: dict
    errors:
      description: Errors the node reported, or no answer, by command.
      type: dict
  sample:
    shop-default-1@worker1:
      state: answered
      type: worker
      connected: true
      replies: {ping: {ok: pong}}
      errors: {}
subscribed:
  description: How many nodes the broker counted as connected; null if it cannot count.
  returned: always
  type: int
answered:
  description: Nodes that answered.
  returned: always
  type: list
  elements: str
silent:
  description: Nodes asked for or expected that did not answer.
  returned: always
  type: list
  elements: str
unknown:
  description: The same on a broker that cannot count, where no answer proves nothing.
  returned: always
  type: list
  elements: str
silent_count:
  description: Connected nodes that did not answer in time, named or not, such as stopped or blocked ones.
  returned: always
  type: int
duplicates:
  description: Names used by more than one node. Remote control cannot tell these apart; rename them.
  returned: always
  type: list
  elements: str
refused:
  description: Content types of replies that were not JSON and were not read.
  returned: always
  type: list
  elements: str
broker:
  description: V(redis) or V(amqp), which is RabbitMQ.
  returned: success
  type: str
paused:
  description:
    - The queues that are paused (M(celeryops.runbook.celery_queue_pause)) by name, with C(by), C(why), C(since),
      C(until) and whether that is over, C(overdue).
    - Empty where the broker is not Redis.
  returned: success
  type: dict
elapsed:
  description: Seconds of the last round.
  returned: always
  type: float
waited:
  description: Seconds spent waiting for O(wait_for).
  returned: always
  type: float
checks:
  description: Rounds asked.
  returned: always
  type: int
unmet:
  description: Conditions of O(wait_for) that do not hold, also returned on failure.
  returned: always
  type: list
  elements: dict
  sample:
    - {condition: consumes, node: shop-default-1@worker1, reason: does not consume default}
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ansible_collections.celeryops.runbook.plugins.module_utils._module import CeleryModule, above_zero, run
from ansible_collections.celeryops.runbook.plugins.module_utils.engine import pauses
from ansible_collections.celeryops.runbook.plugins.module_utils.engine.control import Control
from ansible_collections.celeryops.runbook.plugins.module_utils.engine.errors import NoReply, PreconditionFailed
from ansible_collections.celeryops.runbook.plugins.module_utils.engine.fleet import (
    Conditions,
    Fleet,
    demand,
    observe,
    wait_for,
)

COMMANDS = (
    "active",
    "active_queues",
    "celeryops_ledger",
    "celeryops_pauses",
    "celeryops_release",
    "clock",
    "conf",
    "memdump",
    "memsample",
    "ping",
    "query_task",
    "registered",
    "report",
    "reserved",
    "revoked",
    "scheduled",
    "stats",
)
CARRIES_ARGUMENTS = ("active", "reserved", "scheduled", "query_task")

ARGUMENT_SPEC = {
    "commands": {"type": "list", "elements": "str", "choices": list(COMMANDS), "default": ["ping"]},
    "destination": {"type": "list", "elements": "str"},
    "expected_nodes": {"type": "list", "elements": "str", "default": []},
    "task_ids": {"type": "list", "elements": "str", "default": []},
    "include_arguments": {"type": "bool", "default": False},
    "fail_on_missing": {"type": "bool", "default": False},
    "timeout": {"type": "float", "default": 2.0},
    "wait_for": {
        "type": "dict",
        "options": {
            "all_answer": {"type": "bool", "default": False},
            "min_nodes": {"type": "int", "default": 0},
            "nodes": {"type": "list", "elements": "str", "default": []},
            "gone": {"type": "list", "elements": "str", "default": []},
            "release": {"type": "str"},
            "consumes": {"type": "list", "elements": "str", "default": []},
            "not_consumes": {"type": "raw"},
            "idle": {"type": "bool", "default": False},
            "queues_consumed": {"type": "list", "elements": "str", "default": []},
        },
    },
    "wait_timeout": {"type": "float", "default": 60.0},
    "wait_interval": {"type": "float", "default": 0.5},
}


def conditions_of(given: Mapping[str, Any]) -> Conditions:
    refused = given["not_consumes"]
    if isinstance(refused, str):
        refused = True if refused.lower() in ("true", "yes") else [refused]
    if not isinstance(refused, (list, bool, type(None))):
        raise PreconditionFailed(f"wait_for.not_consumes: must be a list of queues or true, not {refused!r}.")
    conditions = Conditions(
        all_answer=given["all_answer"],
        min_nodes=given["min_nodes"],
        nodes=tuple(given["nodes"]),
        gone=tuple(given["gone"]),
        release=given["release"] or "",
        consumes=tuple(given["consumes"]),
        not_consumes=refused if isinstance(refused, bool) else tuple(map(str, refused or ())),
        idle=given["idle"],
        queues_consumed=tuple(given["queues_consumed"]),
    )
    if conditions == Conditions():
        raise PreconditionFailed("wait_for: holds no condition. Name at least one, such as all_answer: true.")
    return conditions


def without_arguments(value: Any) -> Any:
    """Task descriptions with the size of their arguments instead of the arguments."""
    if isinstance(value, list):
        return [without_arguments(item) for item in value]
    if not isinstance(value, dict):
        return value
    result = {}
    for key, item in value.items():
        if key in ("args", "kwargs"):
            result[f"{key}_size"] = len(item if isinstance(item, str) else json.dumps(item))
        elif key not in ("argsrepr", "kwargsrepr"):
            result[key] = without_arguments(item)
    return result


def check(params: Mapping[str, Any]) -> None:
    above_zero(params, "timeout", "wait_interval")
    if params["wait_timeout"] < 0:
        raise PreconditionFailed(f"wait_timeout: must not be negative, not {params['wait_timeout']}.")
    if not params["commands"]:
        raise PreconditionFailed("commands: must not be empty. Omit it to ask for ping.")
    if params["destination"] is not None and not [name for name in params["destination"] if name]:
        raise PreconditionFailed("destination: is empty, which matches nobody. Name nodes, or omit it to ask all.")
    if "query_task" in params["commands"] and not params["task_ids"]:
        raise PreconditionFailed("task_ids: must be given for the command query_task.")


def demand_answers(fleet: Fleet, result: dict[str, Any]) -> None:
    missing = fleet.in_state("silent") + fleet.in_state("unknown")
    unnamed = fleet.silent_count - len([name for name in missing if fleet.nodes[name].connected is not False])
    if not missing and unnamed <= 0 and fleet.nodes:
        return
    parts = []
    if missing:
        parts.append(f"no answer from {', '.join(missing)}")
    if unnamed > 0:
        parts.append(f"{unnamed} more connected node(s) are silent")
    known = ", ".join(sorted({*fleet.present, *fleet.in_state("answered")})) or "nobody"
    raise NoReply(
        f"{'; '.join(parts) or 'no node is connected'} within {result['elapsed']} s; connected: {fleet.subscribed}; "
        f"there are: {known}. Check the names, and whether these workers run.",
        **result,
    )


def inspect(module: CeleryModule) -> dict[str, Any]:
    params = module.params
    check(params)
    conditions = conditions_of(params["wait_for"]) if params["wait_for"] is not None else None
    commands: list[tuple[str, dict[str, Any]]] = [
        (name, {"ids": params["task_ids"]} if name == "query_task" else {})
        for name in dict.fromkeys(params["commands"])
    ]
    common = {"destination": params["destination"], "expected": params["expected_nodes"], "timeout": params["timeout"]}
    with module.broker() as broker, Control(broker) as control:
        paused = pauses.view(broker) if broker.kind == "redis" else {}
        if conditions is None:
            fleet = observe(control, commands, **common)
            extra: dict[str, Any] = {"waited": 0.0, "checks": 1, "unmet": []}
        else:
            waited = wait_for(
                control,
                replace(conditions, paused=frozenset(paused)),
                commands,
                wait_timeout=params["wait_timeout"],
                interval=params["wait_interval"],
                **common,
            )
            fleet = waited.fleet
            extra = {
                "waited": round(waited.waited, 3),
                "checks": waited.checks,
                "unmet": [item.as_dict() for item in waited.unmet],
            }
    if not params["include_arguments"]:
        for node in fleet.nodes.values():
            for command in CARRIES_ARGUMENTS:
                if command in node.replies:
                    node.replies[command] = without_arguments(node.replies[command])
    if conditions is not None:
        demand(waited, params["wait_timeout"])
    result = {"changed": False, "broker": broker.kind, **fleet.as_dict(), **extra, "paused": paused}
    if params["fail_on_missing"]:
        demand_answers(fleet, result)
    return result


def main() -> None:
    run(inspect, ARGUMENT_SPEC, libraries=(), supports_check_mode=True)


if __name__ == "__main__":
    main()
