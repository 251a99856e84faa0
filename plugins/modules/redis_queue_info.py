#!/usr/bin/python
# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: redis_queue_info
short_description: Depth and contents of Celery queues in Redis
version_added: 0.1.0
description:
  - Counts the waiting messages of any number of queues over all priority steps, in one pass.
  - On request tells what waits by task name, the oldest message, what workers hold, and some messages themselves.
  - Never changes anything and never unpickles a body.
author:
  - celeryops contributors (@celeryops)
extends_documentation_fragment:
  - celeryops.runbook.connection
  - celeryops.runbook.attributes.info
options:
  queues:
    description:
      - Names of the queues.
      - Without it all queues that are declared (bindings) or hold task messages.
      - Finding these walks the names of all keys of the database, about two seconds for a million keys. Name the queues
        where many results lie in the same database.
      - A named queue that is empty costs part of that walk if neither its own exchange nor Celery's default one has it.
    type: list
    elements: str
  fail_on_missing:
    description: Fail when one of O(queues) is neither declared nor holds a message.
    type: bool
    default: false
  task_names:
    description:
      - Count the waiting messages of each queue by task name, and those that workers hold.
      - Reads the messages, bounded by O(max_scan).
    type: bool
    default: false
  oldest:
    description: Tell the message of each queue that waits longest, by the time that C(celeryops.stamp) wrote into it.
    type: bool
    default: false
  unacked:
    description:
      - Tell what workers have fetched and not acknowledged; tasks with an ETA are among them.
      - The entries are of all queues of the database and do not name the worker.
    type: bool
    default: false
  max_messages:
    description: How many unacknowledged messages, the oldest first, and how many reply keys are listed.
    type: int
    default: 1000
  max_scan:
    description: How many messages of one queue O(task_names) and O(peek) look at.
    type: int
    default: 2000000
  peek:
    description: Show some waiting messages of one queue.
    type: dict
    suboptions:
      queue:
        description: Name of the queue.
        type: str
        required: true
      count:
        description: How many.
        type: int
        default: 10
      side:
        description: Start with those consumed next (V(front)) or those that came last (V(back)).
        type: str
        choices: [front, back]
        default: front
      task:
        description: Only messages of this task; a name or a pattern as C(shop.*).
        type: str
      id:
        description: Only the message with this task id.
        type: str
      include_arguments:
        description: Show the arguments too. They may hold secrets; then set C(no_log) on the task.
        type: bool
        default: false
  reply_keys:
    description:
      - Tell the reply lists of remote control that nobody has read for ten minutes.
      - They are only listed.
    type: bool
    default: false
  sent:
    description:
      - File on the host with ids of tasks that producers sent, one a line, bare or as the member C(id) of a JSON line.
      - Tells which of them are in no queue, with no worker and without a result; a worker killed in the moment between
        fetching a message and recording it takes the message with it, and only who sent it knows its id.
      - Needs the result backend. A task whose result is ignored or expired cannot be told from a lost one.
    type: path
seealso:
  - module: celeryops.runbook.redis_queue
  - module: celeryops.runbook.celery_inspect
"""

EXAMPLES = r"""
- name: How much waits
  celeryops.runbook.redis_queue_info:
    environment_file: /etc/celeryops/shop/secret.env
    virtualenv: /srv/shop/current/venv
    queues: [orders, mail]
    fail_on_missing: true
  register: waiting

- name: What waits in every queue, and for how long
  celeryops.runbook.redis_queue_info:
    environment_file: /etc/celeryops/shop/secret.env
    virtualenv: /srv/shop/current/venv
    task_names: true
    oldest: true
    unacked: true

- name: The next five reports
  celeryops.runbook.redis_queue_info:
    environment_file: /etc/celeryops/shop/secret.env
    virtualenv: /srv/shop/current/venv
    queues: [reports]
    peek:
      queue: reports
      count: 5
      task: shop.report_*
"""

RETURN = r"""
queues:
  description: By name of the queue.
  returned: success
  type: dict
  sample:
    orders:
      depth: 12
      by_priority: {"0": 10, "3": 0, "6": 2, "9": 0}
      exists: true
      interrupted: false
  contains:
    depth:
      description: Waiting messages.
      returned: success
      type: int
    by_priority:
      description: The same by priority step; 0 is the most urgent.
      returned: success
      type: dict
    exists:
      description: Whether the queue is declared or holds messages.
      returned: success
      type: bool
    interrupted:
      description:
        - Whether M(celeryops.runbook.redis_queue) works on the queue, or was killed and has messages aside.
        - Running it again puts them back.
      returned: success
      type: bool
    paused:
      description:
        - Who paused the queue, C(by), C(why), C(since), C(until) and whether that is C(overdue); null if nobody.
      returned: success
      type: dict
    aside:
      description: That operation, since when, how many messages it has aside, and whether it still runs.
      returned: when interrupted
      type: dict
    tasks:
      description: Waiting messages by task name.
      returned: with O(task_names)
      type: dict
    unacked_tasks:
      description: Messages of the queue that workers hold, by task name.
      returned: with O(task_names)
      type: dict
    undecodable:
      description: Messages that are no task messages or cannot be decoded.
      returned: with O(task_names)
      type: int
    complete:
      description: Whether all messages were looked at.
      returned: with O(task_names)
      type: bool
    oldest:
      description:
        - The message that waits longest, with C(id), C(task) and C(age) in seconds.
        - The age is null when it has no time stamp, all is null for an empty queue.
      returned: with O(oldest)
      type: dict
total:
  description: Waiting messages of all these queues.
  returned: success
  type: int
unacked:
  description: What workers hold.
  returned: with O(unacked)
  type: dict
  contains:
    count:
      description: How many.
      returned: success
      type: int
    oldest_age:
      description: Seconds since the oldest was fetched; null without any.
      returned: success
      type: float
    messages:
      description:
        - The oldest of them, with C(id), C(task), C(age), C(redelivered), C(delivery_tag).
        - C(queue) is the routing key.
      returned: success
      type: list
      elements: dict
    undecodable:
      description: How many of those listed cannot be decoded.
      returned: success
      type: int
peek:
  description: The messages wanted by O(peek), with C(id), C(task), C(age), C(eta), C(retries) and more.
  returned: with O(peek)
  type: list
  elements: dict
undecodable:
  description: Messages in all places looked at that cannot be decoded.
  returned: with O(task_names), O(unacked) or O(peek)
  type: int
lost:
  description: Ids of O(sent) that are nowhere.
  returned: with O(sent)
  type: list
  elements: str
silent:
  description: Connected nodes that did not answer; early acknowledged tasks that they run are among RV(lost).
  returned: with O(sent)
  type: int
reply_keys:
  description: Leaked reply lists, their C(count) and C(bytes), and the C(keys) with their idle seconds.
  returned: with O(reply_keys)
  type: dict
elapsed:
  description: Seconds spent with Redis.
  returned: success
  type: float
"""

import time
from typing import Any

from ansible_collections.celeryops.runbook.plugins.module_utils._module import CeleryModule, run
from ansible_collections.celeryops.runbook.plugins.module_utils.engine import pauses
from ansible_collections.celeryops.runbook.plugins.module_utils.engine.connection import Broker
from ansible_collections.celeryops.runbook.plugins.module_utils.engine.control import Control
from ansible_collections.celeryops.runbook.plugins.module_utils.engine.errors import PreconditionFailed, QueueUnknown
from ansible_collections.celeryops.runbook.plugins.module_utils.engine.queues import RedisQueues
from ansible_collections.celeryops.runbook.plugins.module_utils.engine.rescue import nowhere, read_ids

ARGUMENT_SPEC: dict[str, Any] = {
    "queues": {"type": "list", "elements": "str"},
    "fail_on_missing": {"type": "bool", "default": False},
    "task_names": {"type": "bool", "default": False},
    "oldest": {"type": "bool", "default": False},
    "unacked": {"type": "bool", "default": False},
    "max_messages": {"type": "int", "default": 1000},
    "max_scan": {"type": "int", "default": 2000000},
    "peek": {
        "type": "dict",
        "options": {
            "queue": {"type": "str", "required": True},
            "count": {"type": "int", "default": 10},
            "side": {"type": "str", "choices": ["front", "back"], "default": "front"},
            "task": {"type": "str"},
            "id": {"type": "str"},
            "include_arguments": {"type": "bool", "default": False},
        },
    },
    "reply_keys": {"type": "bool", "default": False},
    "sent": {"type": "path"},
}


def check(params: dict[str, Any]) -> None:
    for name in ("max_messages", "max_scan"):
        if params[name] < 1:
            raise PreconditionFailed(f"{name}: must be 1 or more, not {params[name]}.")
    if params["peek"] and params["peek"]["count"] < 1:
        raise PreconditionFailed(f"peek.count: must be 1 or more, not {params['peek']['count']}.")
    if params["queues"] is not None and not all(params["queues"]):
        raise PreconditionFailed("queues: a name is empty. Leave queues out to see all of them.")


def info(module: CeleryModule) -> dict[str, Any]:
    params = module.params
    check(params)
    with module.broker() as broker:
        queues = RedisQueues.of(broker)
        started = time.monotonic()
        names = params["queues"] if params["queues"] is not None else queues.queues()
        found = queues.depth(names)
        judge_missing(queues, found, params["fail_on_missing"])
        result: dict[str, Any] = {"queues": found, "total": sum(row["depth"] for row in found.values())}
        undecodable = 0
        paused = pauses.view(broker)
        for name, row in found.items():
            row["paused"] = paused.get(name)
            if row["interrupted"]:
                row["aside"] = queues.interrupted(name)
        if params["task_names"]:
            held = queues.unacked_names(params["max_scan"])
            for name, row in found.items():
                waiting = queues.task_names(name, most=params["max_scan"])
                row.update(
                    tasks=waiting.tasks,
                    unacked_tasks=held.get(name, {}),
                    undecodable=waiting.undecodable,
                    complete=waiting.complete,
                )
                undecodable += waiting.undecodable
        if params["oldest"]:
            for name, message in queues.oldest(found).items():
                found[name]["oldest"] = message
        if params["unacked"]:
            result["unacked"] = queues.unacked(params["max_messages"])
            undecodable += result["unacked"]["undecodable"]
        if params["peek"]:
            peek = params["peek"]
            queues.require(peek["queue"], option="peek.queue")
            result["peek"] = queues.peek(
                peek["queue"],
                peek["count"],
                side=peek["side"],
                task=peek["task"],
                identity=peek["id"],
                include_arguments=peek["include_arguments"],
                most=params["max_scan"],
            )["messages"]
            undecodable += sum(message["task"] is None for message in result["peek"])
        if params["task_names"] or params["unacked"] or params["peek"]:
            result["undecodable"] = undecodable
        if params["reply_keys"]:
            result["reply_keys"] = queues.reply_keys(most=params["max_messages"])
        if params["sent"] is not None:
            result["lost"], result["silent"] = account(broker, queues, params["sent"])
        result["elapsed"] = round(time.monotonic() - started, 6)
    return {"changed": False, **result}


def account(broker: Broker, queues: RedisQueues, path: str) -> tuple[list[str], int]:
    if not broker.spec.result_backend:
        raise PreconditionFailed(
            "sent: without a result backend a finished task cannot be told from a lost one. Give app or an "
            "environment_file that names CELERY_RESULT_BACKEND."
        )
    with Control(broker) as control:
        return nowhere(queues, control, broker.celery_app.backend, read_ids(path))


def judge_missing(queues: RedisQueues, found: dict[str, dict[str, Any]], fail: bool) -> None:
    """An empty queue has no key in Redis; it exists if it is declared."""
    empty = [name for name, row in found.items() if not row["exists"]]
    if not empty:
        return
    declared = queues.declared(empty)
    for name in empty:
        found[name]["exists"] = name in declared or found[name]["interrupted"]
    missing = [name for name in empty if not found[name]["exists"]]
    if missing and fail:
        known = queues.queues()
        raise QueueUnknown(
            f"queues: there is no queue {', '.join(missing)}. Queues: {', '.join(known[:30]) or 'none at all'}.",
            missing=missing,
            known=known[:1000],
        )


def main() -> None:
    run(info, ARGUMENT_SPEC, supports_check_mode=True)


if __name__ == "__main__":
    main()
