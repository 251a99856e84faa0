#!/usr/bin/python
# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: celery_task_info
short_description: States of Celery tasks from the result backend
version_added: 0.1.0
description:
  - Reads the states of tasks by id. The results themselves are returned only if asked for.
  - The result backend knows no difference between a task that waits and one it never heard of; both are V(PENDING).
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
states:
  description: How many tasks are in which state.
  returned: always
  type: dict
  sample: {SUCCESS: 2}
"""

import dataclasses
from collections import Counter
from typing import Any

from ansible_collections.celeryops.runbook.plugins.module_utils._module import CeleryModule, run
from ansible_collections.celeryops.runbook.plugins.module_utils.engine import tasks
from ansible_collections.celeryops.runbook.plugins.module_utils.engine.connection import Broker
from ansible_collections.celeryops.runbook.plugins.module_utils.engine.errors import PreconditionFailed

ARGUMENT_SPEC = {
    "task_ids": {"type": "list", "elements": "str", "required": True},
    "return_result": {"type": "bool", "default": False},
    "result_backend": {"type": "str", "no_log": True},
}


def celery_task_info(module: CeleryModule) -> dict[str, Any]:
    params = module.params
    if not params["task_ids"] or not all(task_id.strip() for task_id in params["task_ids"]):
        raise PreconditionFailed("task_ids: give at least one id, and no empty one.")
    spec = module.broker_spec()
    backend = params["result_backend"] or spec.result_backend
    if not backend and params["app"]:
        app = tasks.application(params["app"], params["app_dir"], params["environment_file"])
        backend = app.conf.result_backend or ""
    spec = dataclasses.replace(spec, result_backend=backend)
    module.secrets += spec.secrets
    with Broker(spec) as broker:
        found = tasks.states(broker, params["task_ids"], with_result=params["return_result"])
    return {"changed": False, "tasks": found, "states": dict(Counter(item["state"] for item in found))}


def main() -> None:
    run(celery_task_info, ARGUMENT_SPEC, libraries=("redis", "celery"), supports_check_mode=True)


if __name__ == "__main__":
    main()
