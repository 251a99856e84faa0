#!/usr/bin/python
# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: celery_dead_letter_info
short_description: Look into the dead letters of Celery queues
version_added: 0.1.0
description:
  - Counts what the runtime part C(deadletter) has kept of tasks that failed for good, by task, exception and reason.
  - Reads only.
author:
  - celeryops contributors (@celeryops)
extends_documentation_fragment:
  - celeryops.runbook.connection
  - celeryops.runbook.dead_letters
  - celeryops.runbook.attributes
  - celeryops.runbook.attributes.info
options:
  queues:
    description:
      - Queues, with or without C(.dead). Without it all that hold dead letters.
    type: list
    elements: str
  show:
    description: Entries of each queue to show, the newest first; 0 for none.
    type: int
    default: 10
  include_arguments:
    description: Show arguments, which may hold secrets.
    type: bool
    default: false
  most:
    description: Entries of each queue to look at, the newest ones; 1 or more.
    type: int
    default: 100000
  timeout:
    description: Seconds the workers have to say what they caught; 0 does not ask them.
    type: float
    default: 2.0
notes:
  - RabbitMQ tells no names of queues, so without O(queues) those are looked at that workers consume. What is looked at
    is marked as redelivered there.
seealso:
  - module: celeryops.runbook.celery_dead_letter
"""

EXAMPLES = r"""
- name: What failed for good in the last hour
  celeryops.runbook.celery_dead_letter_info:
    environment_file: /etc/celeryops/shop/secret.env
    virtualenv: /srv/shop/current/venv
    filter:
      newer_than: 3600
"""

RETURN = r"""
queues:
  description: By dead-letter queue.
  returned: success
  type: dict
  contains:
    depth:
      description: Entries in it.
      returned: always
      type: int
    matched:
      description: Of those looked at, the ones that O(filter) selects.
      returned: always
      type: int
    tasks:
      description: Those by task.
      returned: always
      type: dict
    exceptions:
      description: Those by exception.
      returned: always
      type: dict
    reasons:
      description: Those by reason.
      returned: always
      type: dict
    oldest_age:
      description: Seconds since the first failure of those; none if there is none.
      returned: always
      type: float
    newest_age:
      description: Seconds since the last one.
      returned: always
      type: float
    undecodable:
      description: Entries that cannot be read, or are no dead letters of this collection.
      returned: always
      type: int
    dropped:
      description: Entries that were over the cap and were dropped, since the counter began. None on RabbitMQ.
      returned: always
      type: int
    interrupted:
      description: An interrupted run left entries aside; the next requeue or purge of the queue takes care of them.
      returned: always
      type: bool
    complete:
      description: Whether all entries were looked at.
      returned: always
      type: bool
    entries:
      description:
        - The newest ones, with C(id), C(task), C(age), C(retries), C(reason), C(exception), C(text), C(traceback),
          C(node), C(queue), C(exchange), C(routing_key), C(priority), C(release).
      returned: always
      type: list
      elements: dict
total:
  description: Entries in all these queues.
  returned: success
  type: int
workers:
  description:
    - By node what it has caught since it started, with C(caught), C(sent), C(waiting) for the broker and C(lost).
    - None for a node that runs without the runtime part, so that its failures are not kept.
  returned: success
  type: dict
summary:
  description: The same in lines for people.
  returned: success
  type: list
  elements: str
"""

from typing import Any

from ansible_collections.celeryops.runbook.plugins.module_utils import _dead_letters
from ansible_collections.celeryops.runbook.plugins.module_utils._module import CeleryModule, run
from ansible_collections.celeryops.runbook.plugins.module_utils.engine.connection import Broker
from ansible_collections.celeryops.runbook.plugins.module_utils.engine.control import Control, is_beat
from ansible_collections.celeryops.runbook.plugins.module_utils.engine.deadletters import (
    COMMAND,
    DeadLetters,
    DeadSelection,
    dead_queue,
)
from ansible_collections.celeryops.runbook.plugins.module_utils.engine.deadletters_amqp import AmqpDeadLetters
from ansible_collections.celeryops.runbook.plugins.module_utils.engine.errors import PreconditionFailed

ARGUMENT_SPEC: dict[str, Any] = {
    "queues": {"type": "list", "elements": "str"},
    "filter": _dead_letters.FILTER_SPEC,
    "show": {"type": "int", "default": 10},
    "include_arguments": {"type": "bool", "default": False},
    "most": {"type": "int", "default": 100_000},
    "timeout": {"type": "float", "default": 2.0},
}


def watchers(broker: Broker, timeout: float) -> dict[str, dict[str, Any] | None]:
    """node -> what its runtime part says; None where it has none."""
    if not timeout:
        return {}
    with Control(broker, timeout=timeout) as control:
        asked = control.many([("ping", {}), (COMMAND, {})])
    nodes = {reply.node for reply in asked["ping"].replies if not is_beat(reply.node)}
    told = {reply.node: reply.value for reply in asked[COMMAND].replies if reply.error is None}
    return {node: told.get(node) for node in sorted(nodes)}


def counted(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.items())


def summary(queues: dict[str, dict[str, Any]], workers: dict[str, dict[str, Any] | None]) -> list[str]:
    lines = []
    for name, found in queues.items():
        if not found["matched"]:
            lines.append(f"{name}: {found['depth']} entries, none of them selected")
        else:
            lines.append(
                f"{name}: {found['depth']} entries, {found['matched']} selected, {found['newest_age']:.0f} to "
                f"{found['oldest_age']:.0f} s old; tasks: {counted(found['tasks'])}; "
                f"exceptions: {counted(found['exceptions'])}; reasons: {counted(found['reasons'])}"
            )
        for key, text in (
            ("undecodable", "cannot be read; they stay"),
            ("dropped", "were over the cap and dropped since the counter began"),
        ):
            if found[key]:
                lines.append(f"{name}: {found[key]} {text}")
        if found["interrupted"]:
            lines.append(f"{name}: an interrupted run left entries aside; the next requeue or purge puts them back")
        lines += [
            f"  {entry['id']} {entry['task']} {entry['reason']} {entry['age']:.0f} s ago on {entry['node']}: "
            f"{entry['exception']}: {entry['text'][:200]}"
            for entry in found["entries"]
        ]
    lines = lines or ["no dead letters"]
    for node, told in workers.items():
        if told is None:
            lines.append(f"{node} runs without the runtime part deadletter: what fails there is not kept")
        elif told["waiting"] or told["lost"]:
            lines.append(f"{node} could not hand over {told['waiting']} yet and has lost {told['lost']}")
    return lines


def on_redis(broker: Broker, params: dict[str, Any], wanted: DeadSelection, options: dict[str, Any]) -> dict[str, Any]:
    dead = DeadLetters.of(broker)
    if params["queues"] is None:
        queues = dead.names()
    else:
        queues = _dead_letters.names(params["queues"])
        _dead_letters.require(dead, queues)
    depths, dropped = dead.depth(queues), dead.dropped()
    return {
        queue: {
            "depth": depths[queue]["depth"],
            "interrupted": depths[queue]["interrupted"],
            "dropped": dropped.get(queue, 0),
            **dead.look(queue, wanted, **options),
        }
        for queue in queues
    }


def on_amqp(broker: Broker, params: dict[str, Any], wanted: DeadSelection, options: dict[str, Any]) -> dict[str, Any]:
    with broker.guard(), broker.celery_app.connection_for_write() as connection:
        dead = AmqpDeadLetters(connection)
        if params["queues"] is None:
            names = map(dead_queue, _dead_letters.consumed(broker, params["timeout"] or 2.0))
            depths = {name: depth for name in names if (depth := dead.depth(name))}
        else:
            depths = {name: dead.require(name) for name in _dead_letters.names(params["queues"])}
        return {
            queue: {"depth": depth, "interrupted": False, "dropped": None, **dead.look(queue, wanted, **options)}
            for queue, depth in depths.items()
        }


def look(module: CeleryModule) -> dict[str, Any]:
    params = module.params
    wanted = _dead_letters.selection(params["filter"])
    for name, least in (("show", 0), ("most", 1), ("timeout", 0)):
        if params[name] < least:
            raise PreconditionFailed(f"{name}: must be {least} or more, not {params[name]:g}.")
    options = {name: params[name] for name in ("most", "show", "include_arguments")}
    with module.broker() as broker:
        found = (on_redis if broker.kind == "redis" else on_amqp)(broker, params, wanted, options)
        workers = watchers(broker, params["timeout"])
    return {
        "changed": False,
        "queues": found,
        "total": sum(item["depth"] for item in found.values()),
        "workers": workers,
        "summary": summary(found, workers),
    }


def main() -> None:
    run(look, ARGUMENT_SPEC, supports_check_mode=True)


if __name__ == "__main__":
    main()
