#!/usr/bin/python
# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: celery_lock
short_description: Clear locks of an idempotent Celery task
version_added: 0.1.0
description:
  - Removes locks that idempotent tasks (C(celeryops.tasks.IdempotentTask), C(celeryops.once.once)) have left, so that
    the same work can be done again before they end by themselves.
  - Refuses, and removes nothing, where the owner of one of them still runs or where that cannot be told.
  - What another task has taken since it was looked at stays.
author:
  - celeryops contributors (@celeryops)
extends_documentation_fragment:
  - celeryops.runbook.connection
  - celeryops.runbook.locks
  - celeryops.runbook.attributes
options:
  task:
    description: Name of the task.
    type: str
    required: true
  confirm:
    description: Must equal O(task).
    type: str
seealso:
  - module: celeryops.runbook.celery_lock_info
"""

EXAMPLES = r"""
- name: Let the day be closed again
  celeryops.runbook.celery_lock:
    environment_file: /etc/celeryops/shop/secret.env
    virtualenv: /srv/shop/current/venv
    task: shop.close_day
    confirm: shop.close_day

- name: Of a node that burnt down, for one tenant
  celeryops.runbook.celery_lock:
    environment_file: /etc/celeryops/shop/secret.env
    virtualenv: /srv/shop/current/venv
    task: shop.invoice
    scope: tenant=acme
    states: [running]
    dead: [shop-bulk-1@worker3]
    confirm: shop.invoice
"""

RETURN = r"""
cleared:
  description: The locks that were removed, or would be in check mode, as celery_lock_info lists them.
  returned: always
  type: list
  elements: dict
locks:
  description: The locks that stand in the way.
  returned: when the owner of one may live
  type: list
  elements: dict
"""

from typing import Any

from ansible_collections.celeryops.runbook.plugins.module_utils._locks import find_locks, lock_argument_spec
from ansible_collections.celeryops.runbook.plugins.module_utils._module import CeleryModule, run
from ansible_collections.celeryops.runbook.plugins.module_utils.engine.errors import PreconditionFailed
from ansible_collections.celeryops.runbook.plugins.module_utils.engine.once import clear, demand_dead_owners


def lock(module: CeleryModule) -> dict[str, Any]:
    params = module.params
    if any(char in params["task"] for char in "*?["):
        raise PreconditionFailed(f"task: {params['task']} is a pattern. Name one task.")
    if params["confirm"] != params["task"]:
        raise PreconditionFailed(f"confirm: must equal task, {params['task']}, to clear its locks.")
    with find_locks(module) as (stores, locks):
        demand_dead_owners(locks)
        if not module.check_mode:
            locks.found = clear(stores, locks)
        cleared = locks.as_list()
    lines = [f"{item['state']} {item['scope']} {item['task_id']} {item['key']}" for item in cleared]
    return {
        "changed": bool(cleared),
        "cleared": cleared,
        "diff": {"before": "".join(f"{line}\n" for line in lines), "after": ""},
    }


def main() -> None:
    spec = lock_argument_spec()
    spec["task"]["required"] = True
    run(lock, {**spec, "confirm": {"type": "str"}}, supports_check_mode=True)


if __name__ == "__main__":
    main()
