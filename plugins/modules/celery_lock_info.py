#!/usr/bin/python
# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: celery_lock_info
short_description: Locks of idempotent Celery tasks
version_added: 0.1.0
description:
  - Lists what idempotent tasks (C(celeryops.tasks.IdempotentTask), C(celeryops.once.once)) hold and have done, and says
    whether the owner of each lock still runs.
author:
  - celeryops contributors (@celeryops)
extends_documentation_fragment:
  - celeryops.runbook.connection
  - celeryops.runbook.locks
  - celeryops.runbook.attributes.info
options:
  task:
    description: Only tasks of this name, or of names that match this pattern, as V(shop.*).
    type: str
  most:
    description: How many locks of what is done to list at most; there may be millions. All others are listed.
    type: int
    default: 1000
seealso:
  - module: celeryops.runbook.celery_lock
"""

EXAMPLES = r"""
- name: What is locked, and by whom
  celeryops.runbook.celery_lock_info:
    environment_file: /etc/celeryops/shop/secret.env
    virtualenv: /srv/shop/current/venv
    states: [running, waiting]
"""

RETURN = r"""
locks:
  description: The locks, in the order of their keys. Arguments and results of tasks are not in them.
  returned: always
  type: list
  elements: dict
  contains:
    key:
      description: Name of the record.
      type: str
    task:
      description: Name of the task.
      type: str
    scope:
      description: V(global), V(user=ID) or V(tenant=ID).
      type: str
    state:
      description:
        - V(running) while it runs, V(waiting) while it is on its way to a retry, V(done) while it keeps repetitions
          from being done.
      type: str
    task_id:
      description: Id of the task that holds it or has done the work.
      type: str
    node:
      description: Where it ran last.
      type: str
    owner:
      description: V(alive), V(gone) or V(unknown) where RV(locks[].state) is V(running), else null.
      type: str
    why:
      description: What that was concluded from.
      type: str
    attempt:
      description: Which attempt it is, counted over pool processes that died.
      type: int
    began:
      description: When the run began, in unix seconds of its host.
      type: float
    expires_in:
      description: Seconds until the lock ends, unless it is renewed.
      type: float
    lease:
      description: Seconds for which an owner holds it without renewing.
      type: float
    store:
      description: V(redis) or V(database).
      type: str
    value_kept:
      description: Whether the result is kept for repetitions.
      type: bool
    token:
      description: Names this one holding of the lock.
      type: str
    process:
      description: Names the process.
      type: str
  sample:
    - key: celeryops:once:shop.close_day:global:0b9c...
      task: shop.close_day
      scope: global
      state: running
      task_id: 33e3...
      node: shop-bulk-1@worker1
      owner: alive
      why: shop-bulk-1@worker1 runs it
      attempt: 1
      began: 1795233743.2
      expires_in: 27.3
      lease: 30.0
      store: redis
      value_kept: false
      token: 5ad1...
      process: 0c2a...:4026531836:4711:81234
count:
  description: How many locks are in each state, listed or not.
  returned: always
  type: dict
  sample: {running: 1, waiting: 0, done: 12}
skipped:
  description: How many repetitions of each task were left out since Redis was new.
  returned: always
  type: dict
  sample: {shop.close_day: 3}
"""

from typing import Any

from ansible_collections.celeryops.runbook.plugins.module_utils._locks import find_locks, lock_argument_spec
from ansible_collections.celeryops.runbook.plugins.module_utils._module import CeleryModule, run
from ansible_collections.celeryops.runbook.plugins.module_utils.engine.errors import PreconditionFailed


def lock_info(module: CeleryModule) -> dict[str, Any]:
    if module.params["most"] < 0:
        raise PreconditionFailed(f"most: must not be below 0, as {module.params['most']} is.")
    with find_locks(module, module.params["most"]) as (_stores, locks):
        listed = locks.as_list()
    return {
        "changed": False,
        "locks": listed,
        "count": locks.count,
        "skipped": locks.skipped,
    }


def main() -> None:
    run(lock_info, {**lock_argument_spec(), "most": {"type": "int", "default": 1000}}, supports_check_mode=True)


if __name__ == "__main__":
    main()
