#!/usr/bin/python
# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: celery_task
short_description: Send a Celery task, wait for one, or both
version_added: 0.1.0
description:
  - Sends a task to a queue, and waits for its end if told to.
  - Without O(name) it waits for the task O(task_id) that was sent before.
  - The message goes straight to the queue and declares nothing. It carries the header C(celeryops_published).
  - Arguments are shown in logs like those of any module; set C(no_log) on the task where they or the result are secret.
author:
  - celeryops contributors (@celeryops)
extends_documentation_fragment:
  - celeryops.runbook.connection
  - celeryops.runbook.result
  - celeryops.runbook.attributes
attributes:
  check_mode:
    description: Checks everything and sends nothing. Waiting for a task sent before is done in check mode too.
  diff_mode:
    support: none
options:
  name:
    description: Name of the task to send.
    type: str
  args:
    description: Positional arguments.
    type: list
    elements: raw
    default: []
  kwargs:
    description: Keyword arguments.
    type: dict
    default: {}
  queue:
    description: The queue to send to. Needed unless O(app) is given, whose routes then decide.
    type: str
  priority:
    description:
      - 0 to 9. On Redis V(0) is the most urgent, and what a message without priority has; V(9) is the least urgent.
      - On RabbitMQ it is the other way round.
    type: int
  countdown:
    description: Seconds from now before which the task must not run. Not together with O(eta).
    type: float
  eta:
    description: Time before which the task must not run, ISO 8601 with a zone. Not together with O(countdown).
    type: str
  expires:
    description: Seconds from now after which the task must not be run any more.
    type: float
  task_id:
    description: Id of the task to send; one is made if it is left out. Without O(name), the task to wait for.
    type: str
  headers:
    description: Additional message headers.
    type: dict
    default: {}
  registered_only:
    description:
      - Refuse a task name which no worker that answers has registered, because workers drop such messages.
      - Also refuse a queue that no worker consumes and the broker does not know.
    type: bool
    default: true
  wait:
    description: Wait until the task has ended. Needs a result backend, and a task whose result is not ignored.
    type: bool
    default: false
  wait_timeout:
    description: Seconds to wait. The module fails if the task has not ended by then, or has failed.
    type: float
    default: 60.0
seealso:
  - module: celeryops.runbook.celery_task_info
  - module: celeryops.runbook.celery_canary
"""

EXAMPLES = r"""
- name: Rebuild the catalogue now and wait for it
  celeryops.runbook.celery_task:
    environment_file: /etc/celeryops/shop/secret.env
    virtualenv: /srv/shop/current/venv
    name: shop.refresh_catalogue
    queue: maintenance
    wait: true
    wait_timeout: 120

- name: A report in ten minutes, with the application's own routes
  celeryops.runbook.celery_task:
    environment_file: /etc/celeryops/shop/secret.env
    virtualenv: /srv/shop/current/venv
    app: shop:app
    app_dir: /srv/shop/current/src
    name: shop.sales_report
    args: [1.5]
    countdown: 600

- name: Wait for a task sent before
  celeryops.runbook.celery_task:
    environment_file: /etc/celeryops/shop/secret.env
    virtualenv: /srv/shop/current/venv
    task_id: 5f0a3a5e-5ad4-4d0c-8a3a-3a7f4f1b2c11
    wait: true
"""

RETURN = r"""
task_id:
  description: Id of the task; null in check mode if none was given.
  returned: success
  type: str
queue:
  description: The queue the task was sent to.
  returned: when sent
  type: str
state:
  description: Celery's state of the task, as in V(SUCCESS). Null without O(wait).
  returned: always
  type: str
result:
  description: What the task returned.
  returned: with O(return_result) and O(wait)
  type: raw
"""

import dataclasses
from typing import Any

from ansible_collections.celeryops.runbook.plugins.module_utils._module import CeleryModule, run
from ansible_collections.celeryops.runbook.plugins.module_utils.engine import tasks
from ansible_collections.celeryops.runbook.plugins.module_utils.engine.connection import Broker
from ansible_collections.celeryops.runbook.plugins.module_utils.engine.control import Control
from ansible_collections.celeryops.runbook.plugins.module_utils.engine.errors import PreconditionFailed

ARGUMENT_SPEC = {
    "name": {"type": "str"},
    "args": {"type": "list", "elements": "raw", "default": []},
    "kwargs": {"type": "dict", "default": {}},
    "queue": {"type": "str"},
    "priority": {"type": "int"},
    "countdown": {"type": "float"},
    "eta": {"type": "str"},
    "expires": {"type": "float"},
    "task_id": {"type": "str"},
    "headers": {"type": "dict", "default": {}},
    "registered_only": {"type": "bool", "default": True},
    "wait": {"type": "bool", "default": False},
    "wait_timeout": {"type": "float", "default": 60.0},
    "return_result": {"type": "bool", "default": False},
    "result_backend": {"type": "str", "no_log": True},
}


def celery_task(module: CeleryModule) -> dict[str, Any]:
    params = module.params
    name, task_id = params["name"], params["task_id"]
    if name is None and not params["wait"]:
        raise PreconditionFailed("wait: must be true where only task_id is given. Give name to send a task.")
    if params["wait_timeout"] < 0:
        raise PreconditionFailed(f"wait_timeout: must not be below 0 seconds, not {params['wait_timeout']}.")
    spec = module.broker_spec()
    app = None
    if params["app"] and ((name and not params["queue"]) or not (params["result_backend"] or spec.result_backend)):
        app = tasks.application(params["app"], params["app_dir"], params["environment_file"])
    backend = params["result_backend"] or spec.result_backend or (app.conf.result_backend if app else "") or ""
    spec = dataclasses.replace(spec, result_backend=backend)
    module.secrets += spec.secrets
    order = _order(params, app) if name else None
    result: dict[str, Any] = {"changed": False, "task_id": task_id, "state": None}
    with Broker(spec) as broker, broker.guard():
        if params["wait"]:
            tasks.demand_backend(broker)
        if order:
            result.update(changed=True, queue=order.queue)
            if params["registered_only"]:
                with Control(broker) as control:
                    tasks.demand_known(broker, control, order.name, order.queue)
            if module.check_mode:
                return result
            result["task_id"] = tasks.send(broker, order)
        if params["wait"]:
            found = tasks.wait(broker, result["task_id"], params["wait_timeout"], with_result=params["return_result"])
            result["state"] = found["state"]
            if "result" in found:
                result["result"] = found["result"]
            if found["state"] != "SUCCESS":
                why = f": {found['error']}" if found["error"] else ""
                raise tasks.TaskFailed(
                    f"task {result['task_id']} ended as {found['state']}{why}. See the log of its worker, or set "
                    f"return_result.",
                    **result,
                )
    return result


def _order(params: dict[str, Any], app: Any) -> tasks.Order:
    queue = params["queue"]
    if queue is None:
        if app is None:
            raise PreconditionFailed("queue: name the queue, or give app (with app_dir) so that its routes decide.")
        queue = tasks.route(app, params["name"], params["args"], params["kwargs"])
    order = tasks.Order(
        params["name"],
        queue,
        args=params["args"],
        kwargs=params["kwargs"],
        priority=params["priority"],
        countdown=params["countdown"],
        eta=tasks.parse_eta(params["eta"]) if params["eta"] else None,
        expires=params["expires"],
        task_id=params["task_id"],
        headers=params["headers"],
    )
    order.check()
    return order


def main() -> None:
    run(
        celery_task,
        ARGUMENT_SPEC,
        libraries=("redis", "celery"),
        supports_check_mode=True,
        required_one_of=[("name", "task_id")],
        mutually_exclusive=[("countdown", "eta")],
    )


if __name__ == "__main__":
    main()
