#!/usr/bin/python
# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: celery_requeue
short_description: Send failed Celery tasks again, from the result backend
version_added: 0.1.0
description:
  - Reads failed tasks from the result backend, in Redis or an SQL database, and sends them again under their own ids,
    so that whoever waits for one sees the new result.
  - Needs C(result_extended) in the application at the time of the failure, because only then the backend keeps name and
    arguments.
  - Each failure is sent again once. That is remembered in the broker for 90 days, written at one stroke with the
    message, so that an interrupted run neither loses nor doubles a task. A task that fails anew may be sent again anew.
  - The backend keeps no priority, no expiry, and no rest of a chain or chord. A task is sent as a single one of the
    highest priority. Where that matters, send it again from the dead letters.
  - Redis brokers only.
author:
  - celeryops contributors (@celeryops)
extends_documentation_fragment:
  - celeryops.runbook.connection
  - celeryops.runbook.result.backend
  - celeryops.runbook.attributes
options:
  ids:
    description: Task ids.
    type: list
    elements: str
    default: []
  names:
    description: Task names, or patterns as C(shop.*).
    type: list
    elements: str
    default: []
  exceptions:
    description: Names of the exceptions that ended the tasks, without their modules, or patterns.
    type: list
    elements: str
    default: []
  older_than:
    description: Only what failed at least so many seconds ago.
    type: float
  newer_than:
    description: Only what failed at most so many seconds ago.
    type: float
  queue:
    description: The queue to send to. Without it each task goes where it came from.
    type: str
  rate:
    description: Send at most so many tasks a second; V(0) means as fast as it goes.
    type: float
    default: 0
  max_tasks:
    description: Send at most so many.
    type: int
  registered_only:
    description: Leave out tasks whose name no worker that answers has registered, because workers drop such messages.
    type: bool
    default: true
  timeout:
    description: Seconds the workers have to answer.
    type: float
    default: 2.0
seealso:
  - module: celeryops.runbook.celery_task_info
"""

EXAMPLES = r"""
- name: The mails that failed while the mail server was away, ten a second
  celeryops.runbook.celery_requeue:
    environment_file: /etc/celeryops/shop/secret.env
    virtualenv: /srv/shop/current/venv
    names: [shop.send_*]
    exceptions: [ConnectionRefusedError]
    newer_than: 7200
    rate: 10
"""

RETURN = r"""
count:
  description: Tasks sent again; in check mode those that would be.
  returned: success
  type: int
tasks:
  description: The tasks sent again, at most 1000 of them, with C(task_id), C(name), C(queue), C(error), C(date_done).
  returned: success
  type: list
  elements: dict
matched:
  description: Failed tasks that fit.
  returned: success
  type: int
already_requeued:
  description: Of them, those whose failure was sent again before.
  returned: success
  type: int
nameless:
  description:
    - Of them, those the backend keeps no arguments of, because C(result_extended) was off when they ran or their
      worker did not know the task.
  returned: success
  type: int
unknown_tasks:
  description: Of them, those that no worker has registered, by name.
  returned: success
  type: dict
unplaced:
  description: Of them, those whose queue is not known. Give O(queue).
  returned: success
  type: int
left:
  description: Of them, those beyond O(max_tasks).
  returned: success
  type: int
undecodable:
  description: Results that cannot be read.
  returned: success
  type: int
not_found:
  description: Ids of O(ids) of which the backend knows no failure.
  returned: success
  type: list
  elements: str
"""

from typing import Any

from ansible_collections.celeryops.runbook.plugins.module_utils._module import CeleryModule, run
from ansible_collections.celeryops.runbook.plugins.module_utils.engine import results, tasks
from ansible_collections.celeryops.runbook.plugins.module_utils.engine.connection import Broker
from ansible_collections.celeryops.runbook.plugins.module_utils.engine.errors import PreconditionFailed, QueueUnknown

ARGUMENT_SPEC: dict[str, Any] = {
    "ids": {"type": "list", "elements": "str", "default": []},
    "names": {"type": "list", "elements": "str", "default": []},
    "exceptions": {"type": "list", "elements": "str", "default": []},
    "older_than": {"type": "float"},
    "newer_than": {"type": "float"},
    "queue": {"type": "str"},
    "rate": {"type": "float", "default": 0},
    "max_tasks": {"type": "int"},
    "registered_only": {"type": "bool", "default": True},
    "timeout": {"type": "float", "default": 2.0},
    "result_backend": {"type": "str", "no_log": True},
}


def check(params: dict[str, Any]) -> results.Failed:
    wanted = results.Failed(
        frozenset(params["ids"]),
        tuple(params["names"]),
        tuple(params["exceptions"]),
        params["older_than"],
        params["newer_than"],
    )
    wanted.check()
    if not all(item.strip() for item in (*wanted.ids, *wanted.names, *wanted.exceptions)):
        raise PreconditionFailed("ids, names, exceptions: must not hold an empty text.")
    if params["rate"] < 0:
        raise PreconditionFailed(f"rate: must not be below 0 tasks a second, not {params['rate']:g}.")
    if params["max_tasks"] is not None and params["max_tasks"] < 1:
        raise PreconditionFailed(f"max_tasks: must be 1 or more, not {params['max_tasks']}.")
    return wanted


def known_names(broker: Broker, timeout: float, queue: str | None) -> set[str]:
    """Names that workers have registered. The queue must be one that is consumed."""
    registered, queues = tasks.ask_registered(broker, timeout)
    consumed = {name for _node, names in queues for name in names}
    if queue is not None and queue not in consumed:
        raise QueueUnknown(
            f"queue: no worker consumes {queue}. Consumed are {', '.join(sorted(consumed)) or 'none'}.", queue=queue
        )
    return tasks.registered_names(registered)


def requeue(module: CeleryModule) -> dict[str, Any]:
    params = module.params
    wanted = check(params)
    with Broker(module.result_spec()) as broker, broker.guard():
        tasks.demand_backend(broker)
        known = known_names(broker, params["timeout"], params["queue"]) if params["registered_only"] else None
        done = results.requeue(
            broker,
            wanted,
            queue=params["queue"],
            known=known,
            rate=params["rate"],
            most=params["max_tasks"],
            dry=module.check_mode,
        )
    if done.nameless:
        module.warn(
            f"{done.nameless} failed task(s) fit and cannot be sent again: the backend keeps no arguments of them, "
            f"because result_extended was off when they ran or their worker did not know the task."
        )
    return {
        "changed": done.count > 0,
        "count": done.count,
        "tasks": done.sent,
        "matched": done.matched,
        "already_requeued": done.again,
        "nameless": done.nameless,
        "unknown_tasks": done.unknown_tasks,
        "unplaced": done.unplaced,
        "left": done.left,
        "undecodable": done.undecodable,
        "not_found": done.not_found,
        "diff": {"before": {"sent again": {}}, "after": {"sent again": {x["task_id"]: x["name"] for x in done.sent}}},
    }


def main() -> None:
    run(requeue, ARGUMENT_SPEC, libraries=("redis", "celery"), supports_check_mode=True)


if __name__ == "__main__":
    main()
