#!/usr/bin/python
# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: celery_ledger_info
short_description: What Celery workers have done since an earlier look
version_added: 0.1.0
description:
  - Asks every worker for its ledger, which the runtime package keeps (V(celeryops_ledger) of
    M(celeryops.runbook.celery_inspect)) - how many tasks it began and ended, and how long they had waited in the queue.
  - With O(since) it says what the fleet did in between, stopped and new workers included.
author:
  - celeryops contributors (@celeryops)
extends_documentation_fragment:
  - celeryops.runbook.connection
  - celeryops.runbook.attributes.info
options:
  since:
    description: The RV(nodes) of an earlier look.
    type: dict
  drained:
    description:
      - Last ledgers of workers that have been drained and stopped since, each a dictionary of node and ledger.
      - The figures of a worker that stopped and is not named here are lost, and it is listed as uncounted.
    type: list
    elements: dict
    default: []
  timeout:
    description: Seconds to wait for the workers.
    type: float
    default: 2.0
seealso:
  - module: celeryops.runbook.celery_inspect
"""

EXAMPLES = r"""
- name: Look at the ledgers
  celeryops.runbook.celery_ledger_info:
    environment_file: /etc/celeryops/shop/secret.env
    virtualenv: /srv/shop/current/venv
  register: before

- name: What happened since
  celeryops.runbook.celery_ledger_info:
    environment_file: /etc/celeryops/shop/secret.env
    virtualenv: /srv/shop/current/venv
    since: "{{ before.nodes }}"
  register: after
"""

RETURN = r"""
nodes:
  description: The ledger of each worker that answered; null for one that keeps none.
  returned: always
  type: dict
  sample:
    shop-default-1@worker1: {pid: 812, since: 1795243601.4, begun: 5230, ended: 5229, waits: {"8": 5201, "22": 29}}
tasks:
  description: What all workers did since O(since). The runtime's own tasks, such as the canary, are not counted.
  returned: with O(since)
  type: dict
  contains:
    begun:
      description: Tasks begun.
      type: int
    ended:
      description: Tasks ended, well or not.
      type: int
    cut_off:
      description: Tasks that a worker of O(drained) had begun and not ended when it stopped.
      type: int
    wait_tasks:
      description: Tasks whose time in the queue is known, by the header C(celeryops_published).
      type: int
    wait_p50_ms:
      description:
        - Half of them waited at most so many milliseconds, from their publishing (or ETA) to their begin.
        - At most 19 % too high.
      type: float
    wait_p99_ms:
      description: The same for 99 of 100.
      type: float
    wait_worst_ms:
      description: The same for all.
      type: float
    uncounted:
      description: Workers whose figures are not in the sums - they keep no ledger, or ended with it.
      type: list
      elements: str
  sample:
    begun: 6651
    ended: 6649
    cut_off: 0
    wait_tasks: 6651
    wait_p50_ms: 4.0
    wait_p99_ms: 19.0
    wait_worst_ms: 1450.0
    uncounted: []
"""

from typing import Any

from ansible_collections.celeryops.runbook.plugins.module_utils._module import CeleryModule, above_zero, run
from ansible_collections.celeryops.runbook.plugins.module_utils.engine.control import Control
from ansible_collections.celeryops.runbook.plugins.module_utils.engine.fleet import observe
from ansible_collections.celeryops.runbook.plugins.module_utils.engine.ledger import COMMAND, account

ARGUMENT_SPEC = {
    "since": {"type": "dict"},
    "drained": {"type": "list", "elements": "dict", "default": []},
    "timeout": {"type": "float", "default": 2.0},
}


def ledger(module: CeleryModule) -> dict[str, Any]:
    params = module.params
    above_zero(params, "timeout")
    with module.broker() as broker, Control(broker) as control:
        fleet = observe(control, [(COMMAND, {})], timeout=params["timeout"])
    nodes = {name: fleet.nodes[name].replies.get(COMMAND) for name in fleet.workers}
    result: dict[str, Any] = {"changed": False, "nodes": nodes}
    if params["since"] is not None:
        result["tasks"] = account(params["since"], params["drained"], nodes).as_dict()
    return result


def main() -> None:
    run(ledger, ARGUMENT_SPEC, supports_check_mode=True)


if __name__ == "__main__":
    main()
