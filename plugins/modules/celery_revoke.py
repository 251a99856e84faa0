#!/usr/bin/python
# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: celery_revoke
short_description: Revoke Celery tasks by id, name or arguments, wherever they are
version_added: 0.1.0
description:
  - Finds the tasks in queues and at workers, remembers them as revoked in the broker, tells every worker, and takes the
    waiting ones out of their queues, saved to files first.
  - Workers with the runtime package obey the record from their start on, so a revoked task stays revoked when workers
    restart.
  - Reserved tasks and those with an ETA are refused by the worker that holds them when their turn comes. Running tasks
    go on; M(celeryops.runbook.celery_control) terminates them. A running task that is revoked is not tried again.
  - Redis brokers only.
author:
  - celeryops contributors (@celeryops)
extends_documentation_fragment:
  - celeryops.runbook.connection
  - celeryops.runbook.attributes
options:
  ids:
    description:
      - Task ids. One that is found nowhere is remembered too and refused if it turns up; see RV(not_found).
    type: list
    elements: str
    default: []
  names:
    description: Task names, or patterns as C(shop.send_*). With O(ids) both must hold.
    type: list
    elements: str
    default: []
  args:
    description: Only tasks whose first positional arguments are these.
    type: list
    elements: raw
  kwargs:
    description: Only tasks that have these among their keyword arguments.
    type: dict
  queues:
    description: Look only in these queues. Without it every queue of the broker is read.
    type: list
    elements: str
  confirm:
    description: Without O(ids), must equal O(names), joined by commas.
    type: str
  directory:
    description:
      - Directory on the host for the messages that are taken out of queues, one file a queue, in the format of
        M(celeryops.runbook.redis_queue), which can put them back.
      - Made with mode 0700 if it is not there and something is to be saved.
    type: path
    required: true
  expires:
    description: Seconds for which the ids are remembered.
    type: float
    default: 86400
  max_tasks:
    description: Refuse to revoke more than so many at once, 50000 at most.
    type: int
    default: 50000
  timeout:
    description: Seconds the workers have to answer.
    type: float
    default: 2.0
seealso:
  - module: celeryops.runbook.celery_control
  - module: celeryops.runbook.redis_queue
"""

EXAMPLES = r"""
- name: No more reminders for order 4711
  celeryops.runbook.celery_revoke:
    environment_file: /etc/celeryops/shop/secret.env
    virtualenv: /srv/shop/current/venv
    names: [shop.send_reminder]
    args: [4711]
    confirm: shop.send_reminder
    directory: /var/backups/celeryops/shop
"""

RETURN = r"""
tasks:
  description: The tasks found, at most 1000 of them.
  returned: always
  type: list
  elements: dict
  contains:
    task_id:
      description: The id.
      type: str
      returned: always
    name:
      description: Name of the task.
      type: str
      returned: always
    place:
      description:
        - Where it was found. V(queued), V(reserved), V(scheduled), V(running), or V(unowned) for one that was fetched
          by a worker that does not answer or is dead.
      type: str
      returned: always
    queue:
      description: Its queue.
      type: str
      returned: always
    node:
      description: The worker that holds it.
      type: str
      returned: always
places:
  description: How many were found where.
  returned: always
  type: dict
  sample: {queued: 12, running: 1}
ids:
  description: Every id that is revoked.
  returned: always
  type: list
  elements: str
not_found:
  description: Ids of O(ids) that are in no queue and at no worker. They may be wrong, or have ended.
  returned: always
  type: list
  elements: str
remembered:
  description: Ids that were not remembered before.
  returned: always
  type: int
removed:
  description: Messages taken out of each queue; in check mode those that would be.
  returned: always
  type: dict
  sample: {email: 12}
saved:
  description: The files, by queue.
  returned: always
  type: dict
  sample: {email: /var/backups/celeryops/shop/revoked-email-20261121T081500Z-1f3a9c2e.queue}
unjudged:
  description: Tasks of these names whose arguments cannot be read and which were left alone.
  returned: always
  type: int
workers:
  description: Workers that answer.
  returned: always
  type: list
  elements: str
silent:
  description: How many connected workers did not answer.
  returned: always
  type: int
"""

import os
import time
import uuid
from collections import Counter
from typing import Any

from ansible_collections.celeryops.runbook.plugins.module_utils._module import CeleryModule, above_zero, confirmed, run
from ansible_collections.celeryops.runbook.plugins.module_utils.engine import revokes, savefile
from ansible_collections.celeryops.runbook.plugins.module_utils.engine.control import Control, Request
from ansible_collections.celeryops.runbook.plugins.module_utils.engine.errors import PreconditionFailed
from ansible_collections.celeryops.runbook.plugins.module_utils.engine.queues import RedisQueues, Selection
from ansible_collections.celeryops.runbook.plugins.module_utils.engine.search import Search, Wanted, search

ARGUMENT_SPEC: dict[str, Any] = {
    "ids": {"type": "list", "elements": "str", "default": []},
    "names": {"type": "list", "elements": "str", "default": []},
    "args": {"type": "list", "elements": "raw"},
    "kwargs": {"type": "dict"},
    "queues": {"type": "list", "elements": "str"},
    "confirm": {"type": "str"},
    "directory": {"type": "path", "required": True},
    "expires": {"type": "float", "default": 86400},
    "max_tasks": {"type": "int", "default": revokes.MOST},
    "timeout": {"type": "float", "default": 2.0},
}


def check(params: dict[str, Any]) -> Wanted:
    wanted = Wanted(frozenset(params["ids"]), tuple(params["names"]), params["args"], params["kwargs"])
    wanted.check()
    if not params["ids"]:
        confirmed(params, ",".join(params["names"]), "to revoke by name it")
    if not 1 <= params["max_tasks"] <= revokes.MOST:
        raise PreconditionFailed(f"max_tasks: must be 1 to {revokes.MOST}, not {params['max_tasks']}.")
    above_zero(params, "expires", "timeout")
    return wanted


def path_of(directory: str, queue: str) -> str:
    safe = "".join(char if char.isalnum() or char in "._-" else "_" for char in queue)
    return os.path.join(
        directory, f"revoked-{safe}-{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}-{uuid.uuid4().hex[:8]}.queue"
    )


def prepare(directory: str) -> None:
    """The place for the files must be good before anything is done."""
    with savefile.saving(directory):
        os.makedirs(directory, mode=0o700, exist_ok=True)
    savefile.check_target(path_of(directory, "any"), False)


def revoke(module: CeleryModule) -> dict[str, Any]:
    params = module.params
    wanted = check(params)
    removed: Counter[str] = Counter()
    saved: dict[str, str] = {}
    with module.broker() as broker, Control(broker, timeout=params["timeout"]) as control:
        queues = RedisQueues.of(broker)
        for queue in params["queues"] or ():
            queues.require(queue, option="queues")
        seen = search(broker, control, wanted, queues=params["queues"], most=params["max_tasks"])
        # By name and arguments only what was found; an id counts wherever it is.
        ids = sorted(set(seen.found) | (wanted.ids if not (wanted.names or wanted.by_arguments) else set()))
        fresh = len(set(ids) - set(revokes.load(broker)))
        waiting: dict[str, set[str]] = {}
        for item in seen.at("queued"):
            waiting.setdefault(str(item.queue), set()).add(item.task_id)
        if module.check_mode:
            removed.update({queue: len(tasks) for queue, tasks in waiting.items()})
        elif ids:
            if waiting:
                prepare(params["directory"])
            # The record first, then the workers, then the queues: what is fetched meanwhile is refused.
            fresh = revokes.remember(broker, ids, params["expires"])
            if seen.workers:
                control.cast([Request("revoke", {"task_id": ids})])
            for queue, tasks in sorted(waiting.items()):
                outcome = queues.drop(queue, Selection(ids=frozenset(tasks)), path_of(params["directory"], queue))
                removed[queue] = outcome.count
                if outcome.count and outcome.path:
                    saved[queue] = outcome.path
    return report(params, seen, ids, fresh, dict(removed), saved)


def report(
    params: dict[str, Any], seen: Search, ids: list[str], fresh: int, removed: dict[str, int], saved: dict[str, str]
) -> dict[str, Any]:
    before = {queue: len([item for item in seen.at("queued") if item.queue == queue]) for queue in removed}
    return {
        "changed": bool(fresh or sum(removed.values())),
        "tasks": [item.as_dict() for item in list(seen.found.values())[:1000]],
        "places": dict(Counter(item.place for item in seen.found.values())),
        "ids": ids,
        "not_found": sorted(set(params["ids"]) - set(seen.found)),
        "remembered": fresh,
        "removed": removed,
        "saved": saved,
        "unjudged": seen.unjudged,
        "workers": seen.workers,
        "silent": seen.silent,
        "diff": {
            "before": {"waiting": before, "to be remembered": 0},
            "after": {
                "waiting": {queue: before[queue] - count for queue, count in removed.items()},
                "to be remembered": fresh,
            },
        },
    }


def main() -> None:
    run(revoke, ARGUMENT_SPEC, supports_check_mode=True)


if __name__ == "__main__":
    main()
