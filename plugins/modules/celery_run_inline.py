#!/usr/bin/python
# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: celery_run_inline
short_description: Run a Celery task here and now, without queue and worker
version_added: 0.1.0
description:
  - Runs a task of the application in a process of its own on this host, with the environment of the workers, and waits
    for its end. A fallback for when no worker can.
  - Refuses while the same task, by id or by name and arguments, waits in a queue or is held or run by a worker, because
    it would run twice.
  - Retries the task asks for are done at once. Its result is returned, not stored.
  - Needs the runtime package in O(virtualenv). Redis brokers only, where the queues can be read.
author:
  - celeryops contributors (@celeryops)
extends_documentation_fragment:
  - celeryops.runbook.connection
  - celeryops.runbook.attributes
attributes:
  check_mode:
    description: Checks everything, the import of the application included, and runs nothing.
  diff_mode:
    support: none
options:
  app:
    description: The application, as C(pkg.module:app).
    type: str
    required: true
  virtualenv:
    description: The application's virtual environment on this host.
    type: path
    required: true
  name:
    description: Name of the task.
    type: str
    required: true
  args:
    description: Positional arguments.
    type: list
    elements: raw
    default: []
  kwargs:
    description: Keyword arguments.
    type: dict
    default: {}
  task_id:
    description: Id of the task, if it had one before; it must not be waiting or running any more.
    type: str
  user:
    description: The user to run it as, the one of the workers. Without it, the user of this module.
    type: str
  run_timeout:
    description: Seconds after which the process and all its children are killed, and the module fails.
    type: float
    default: 300
  ignore_silent:
    description: Run it although a connected worker does not answer and may hold the same task.
    type: bool
    default: false
  return_result:
    description: Return the result, or the text of the error. Results may hold secrets.
    type: bool
    default: false
  timeout:
    description: Seconds the workers have to answer.
    type: float
    default: 2.0
seealso:
  - module: celeryops.runbook.celery_task
  - module: celeryops.runbook.celery_revoke
"""

EXAMPLES = r"""
- name: The nightly report, although all workers are down
  celeryops.runbook.celery_run_inline:
    environment_file: /etc/celeryops/shop/secret.env
    virtualenv: /srv/shop/current/venv
    app: shop:app
    app_dir: /srv/shop/current/src
    user: shop
    name: shop.sales_report
    args: [1.0]
"""

RETURN = r"""
state:
  description: Celery's state of the task; null in check mode.
  returned: always
  type: str
  sample: SUCCESS
task_id:
  description: The id it ran under.
  returned: when run
  type: str
result:
  description: What it returned.
  returned: with O(return_result)
  type: raw
elapsed:
  description: Seconds spent.
  returned: when run
  type: float
"""

import time
from typing import Any

from ansible_collections.celeryops.runbook.plugins.module_utils._module import CeleryModule, above_zero, run
from ansible_collections.celeryops.runbook.plugins.module_utils._session import ask
from ansible_collections.celeryops.runbook.plugins.module_utils.engine.connection import (
    read_environment_file,
    secret_values,
)
from ansible_collections.celeryops.runbook.plugins.module_utils.engine.control import Control
from ansible_collections.celeryops.runbook.plugins.module_utils.engine.errors import (
    CeleryOpsError,
    WaitTimeout,
)
from ansible_collections.celeryops.runbook.plugins.module_utils.engine.search import Wanted, search
from ansible_collections.celeryops.runbook.plugins.module_utils.engine.tasks import TaskFailed, TaskUnknown, alike

ARGUMENT_SPEC: dict[str, Any] = {
    "app": {"type": "str", "required": True},
    "virtualenv": {"type": "path", "required": True},
    "name": {"type": "str", "required": True},
    "args": {"type": "list", "elements": "raw", "default": []},
    "kwargs": {"type": "dict", "default": {}},
    "task_id": {"type": "str"},
    "user": {"type": "str"},
    "run_timeout": {"type": "float", "default": 300},
    "ignore_silent": {"type": "bool", "default": False},
    "return_result": {"type": "bool", "default": False},
    "timeout": {"type": "float", "default": 2.0},
}


class Doubled(CeleryOpsError):
    category = "doubled"


def demand_single(module: CeleryModule) -> None:
    """Refuse a task that is still waiting or running, or of which that cannot be told."""
    params = module.params
    kinds = [Wanted(names=(params["name"],), args=params["args"], kwargs=params["kwargs"], exact=True)]
    if params["task_id"]:
        kinds.append(Wanted(ids=frozenset([params["task_id"]])))
    with module.broker() as broker, Control(broker, timeout=params["timeout"]) as control:
        _redis = broker.redis  # other brokers let nobody look into their queues
        for wanted in kinds:
            seen = search(broker, control, wanted)
            for item in seen.found.values():
                where = f"at {item.node}" if item.node else f"in queue {item.queue}"
                raise Doubled(
                    f"name: the same task, {item.name} with id {item.task_id}, is {item.place} {where}: run here too, "
                    f"it would run twice. Wait for it, or revoke it first (celery_revoke, playbook task_revoke).",
                    **item.as_dict(),
                )
            if seen.unjudged:
                raise Doubled(
                    f"name: {seen.unjudged} task(s) of the name {params['name']} are waiting whose arguments cannot be "
                    f"read; one of them may be the same. Wait for them, or revoke them first."
                )
            if seen.silent and not params["ignore_silent"]:
                raise Doubled(
                    f"{seen.silent} connected worker(s) did not answer and may run the same task. Stop them or make "
                    f"them answer; if they surely do not run it, set ignore_silent."
                )


def execute(params: dict[str, Any], dry: bool) -> dict[str, Any]:
    """Run it in a session of its own; nothing of it is left afterwards."""
    request = {key: params[key] for key in ("name", "args", "kwargs", "task_id")}
    try:
        return ask(params, "inline", {**request, "dry": dry}, params["run_timeout"])
    except TimeoutError:
        raise WaitTimeout(
            f"run_timeout: {params['name']} has not ended after {params['run_timeout']:g} s and was killed with "
            f"its children. What it had done so far stays done. Raise run_timeout if it may take longer."
        ) from None


def run_inline(module: CeleryModule) -> dict[str, Any]:
    params = module.params
    above_zero(params, "run_timeout", "timeout")
    module.secrets += module.broker_spec().secrets
    if params["environment_file"]:
        module.secrets += secret_values(read_environment_file(params["environment_file"]))
    checked = execute(params, dry=True)
    if "known" in checked:
        raise TaskUnknown(
            f"name: {params['app']} has no task {params['name']}. {alike(params['name'], checked['known'])}Correct it.",
            task=params["name"],
        )
    demand_single(module)
    if module.check_mode:
        return {"changed": True, "state": None}
    started = time.monotonic()
    done = execute(params, dry=False)
    result: dict[str, Any] = {
        "changed": True,
        "state": done["state"],
        "task_id": done["task_id"],
        "elapsed": round(time.monotonic() - started, 3),
    }
    if params["return_result"]:
        result["result"] = done["result"]
    if done["state"] != "SUCCESS":
        why = f": {done['error']}" if done["error"] else ""
        raise TaskFailed(
            f"task {params['name']} ended as {done['state']}{why}. Set return_result for its text.", **result
        )
    return result


def main() -> None:
    run(run_inline, ARGUMENT_SPEC, supports_check_mode=True)


if __name__ == "__main__":
    main()
