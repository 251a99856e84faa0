#!/usr/bin/python
# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: celery_task_info
short_description: States of Celery tasks, and where they are
version_added: 0.1.0
description:
  - Reads the states of tasks by id. The results themselves are returned only if asked for.
  - The result backend knows no difference between a task that waits and one it never heard of; both are V(PENDING).
    With O(locate) queues and workers are asked too.
author:
  - celeryops contributors (@celeryops)
extends_documentation_fragment:
  - celeryops.runbook.connection
  - celeryops.runbook.result
  - celeryops.runbook.attributes.info
options:
  task_ids:
    description: Ids of the tasks.
    type: list
    elements: str
    required: true
  locate:
    description:
      - Look for tasks that have not ended in the queues and at the workers.
      - Reads every queue of the broker, about 0.2 million messages a second.
    type: bool
    default: false
  wait_timeout:
    description: Seconds to wait until all of them have ended. The module fails if they have not by then.
    type: float
    default: 0
  timeout:
    description: Seconds the workers have to answer.
    type: float
    default: 2.0
seealso:
  - module: celeryops.runbook.celery_task
"""

EXAMPLES = r"""
- name: What became of the two reports
  celeryops.runbook.celery_task_info:
    environment_file: /etc/celeryops/shop/secret.env
    virtualenv: /srv/shop/current/venv
    task_ids:
      - 5f0a3a5e-5ad4-4d0c-8a3a-3a7f4f1b2c11
      - 0b8f4d3a-7d0e-4b61-9b7e-2f8a5a0c9d22
"""

RETURN = r"""
tasks:
  description: One entry for each id, in the order given.
  returned: always
  type: list
  elements: dict
  contains:
    task_id:
      description: The id.
      type: str
      returned: always
    state:
      description: Celery's state.
      type: str
      returned: always
      sample: SUCCESS
    ready:
      description: Whether the task has ended.
      type: bool
      returned: always
    name:
      description: Name of the task, if the application sets C(result_extended).
      type: str
      returned: always
    node:
      description: The worker that ran it, if the application sets C(result_extended).
      type: str
      returned: always
    queue:
      description: The queue it came from, if the application sets C(result_extended).
      type: str
      returned: always
    retries:
      description: How often it was tried again, if the application sets C(result_extended).
      type: int
      returned: always
    date_done:
      description: When it ended, ISO 8601.
      type: str
      returned: always
    error:
      description: Name of the exception that ended it.
      type: str
      returned: always
    result:
      description: What it returned, or the text of the exception.
      type: raw
      returned: with O(return_result)
    place:
      description:
        - Where a task that has not ended was found. V(queued) in its queue; V(reserved), V(scheduled), V(running) at a
          worker; V(unowned) fetched by a worker that does not answer or is dead; V(dead) failed for good and is in the
          dead letters of its queue; V(nowhere) in none of them.
        - V(nowhere) may be a wrong id, and a task that has ended and whose result is ignored or expired.
      type: str
      returned: with O(locate) for tasks that have not ended
states:
  description: How many tasks are in which state.
  returned: always
  type: dict
  sample: {SUCCESS: 2}
nowhere:
  description: Ids that neither the result backend nor a queue nor a worker knows.
  returned: with O(locate)
  type: list
  elements: str
silent:
  description: How many connected workers did not answer; a task they hold may be missing or V(unowned).
  returned: with O(locate)
  type: int
"""

from collections import Counter
from typing import Any

from ansible_collections.celeryops.runbook.plugins.module_utils._module import CeleryModule, run
from ansible_collections.celeryops.runbook.plugins.module_utils.engine import tasks
from ansible_collections.celeryops.runbook.plugins.module_utils.engine.connection import Broker
from ansible_collections.celeryops.runbook.plugins.module_utils.engine.control import Control
from ansible_collections.celeryops.runbook.plugins.module_utils.engine.errors import PreconditionFailed
from ansible_collections.celeryops.runbook.plugins.module_utils.engine.search import Wanted, search

ARGUMENT_SPEC = {
    "task_ids": {"type": "list", "elements": "str", "required": True},
    "return_result": {"type": "bool", "default": False},
    "result_backend": {"type": "str", "no_log": True},
    "locate": {"type": "bool", "default": False},
    "wait_timeout": {"type": "float", "default": 0},
    "timeout": {"type": "float", "default": 2.0},
}


def celery_task_info(module: CeleryModule) -> dict[str, Any]:
    params = module.params
    if not params["task_ids"] or not all(task_id.strip() for task_id in params["task_ids"]):
        raise PreconditionFailed("task_ids: give at least one id, and no empty one.")
    with Broker(module.result_spec()) as broker:
        found = tasks.wait_all(broker, params["task_ids"], params["wait_timeout"], with_result=params["return_result"])
        result: dict[str, Any] = {"changed": False, "tasks": found}
        if params["locate"]:
            result.update(locate(broker, found, params["timeout"]))
    result["states"] = dict(Counter(item["state"] for item in found))
    return result


def locate(broker: Broker, found: list[dict[str, Any]], timeout: float) -> dict[str, Any]:
    """Says in each entry where the task is; what cannot be placed, and how many workers are silent."""
    left = [item for item in found if not item["ready"]]
    if not left:
        return {"nowhere": [], "silent": 0}
    with broker.guard(), Control(broker, timeout=timeout) as control:
        seen = search(broker, control, Wanted(frozenset(item["task_id"] for item in left)), dead=True)
    for item in left:
        place = seen.found.get(item["task_id"])
        item["place"] = place.place if place else "nowhere"
        if place:
            item.update(name=place.name, node=place.node or item["node"], queue=place.queue or item["queue"])
    nowhere = [item["task_id"] for item in left if item["place"] == "nowhere" and item["state"] == "PENDING"]
    return {"nowhere": nowhere, "silent": seen.silent}


def main() -> None:
    run(celery_task_info, ARGUMENT_SPEC, libraries=("redis", "celery"), supports_check_mode=True)


if __name__ == "__main__":
    main()
