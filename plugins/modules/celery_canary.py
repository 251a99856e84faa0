#!/usr/bin/python
# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: celery_canary
short_description: Prove that workers take tasks from their queues and run them
version_added: 0.1.0
description:
  - Sends small tasks (C(celeryops.canary) of the runtime package) through the queues until every wanted worker has
    answered from every wanted queue, and fails with the list of those that did not or answered wrong.
  - Any consumer of a queue may take a canary. Where other workers share a queue, more are sent until the wanted ones
    have had theirs; at most 1000 a queue. They expire by themselves.
  - The answers go to the broker, so no result backend is needed.
author:
  - celeryops contributors (@celeryops)
extends_documentation_fragment:
  - celeryops.runbook.connection
  - celeryops.runbook.attributes
attributes:
  check_mode:
    description: Asks the workers whether they could answer, and sends nothing.
  diff_mode:
    support: N/A
    description: Never changes anything that lasts.
options:
  queues:
    description:
      - The queues to prove, as a list. Every node of O(nodes) must answer from each, or any one if O(nodes) is empty.
      - Or a dict of queue to list of nodes.
      - Left out, the queues are those which each of O(nodes) consumes.
    type: raw
  nodes:
    description: The workers that must answer, by node name.
    type: list
    elements: str
    default: []
  run:
    description: A registered task of the application, such as its self-test, that the canary runs on the spot.
    type: str
  args:
    description: Positional arguments of O(run).
    type: list
    elements: raw
    default: []
  kwargs:
    description: Keyword arguments of O(run).
    type: dict
    default: {}
  expect:
    description: What O(run) must return.
    type: raw
  release:
    description: The release every answering worker must run (C(CELERYOPS_RELEASE)).
    type: str
  timeout:
    description: Seconds until all must have answered.
    type: float
    default: 30.0
requirements:
  - celery (from the application's virtual environment, see O(virtualenv))
seealso:
  - module: celeryops.runbook.celery_inspect
  - module: celeryops.runbook.celery_task
"""

EXAMPLES = r"""
- name: The new worker takes tasks from all its queues and passes the self-test
  celeryops.runbook.celery_canary:
    environment_file: /etc/celeryops/shop/secret.env
    virtualenv: /srv/shop/current/venv
    nodes: [shop-fast-1@worker1]
    run: shop.selftest
    expect: ok
    release: v2

- name: Somebody works on the critical queue
  celeryops.runbook.celery_canary:
    environment_file: /etc/celeryops/shop/secret.env
    virtualenv: /srv/shop/current/venv
    queues: [critical]
    timeout: 5
"""

RETURN = r"""
answers:
  description: The first answer of every pair of node and queue.
  returned: always
  type: list
  elements: dict
  sample:
    - node: shop-fast-1@worker1
      queue: critical
      release: v2
      value: ok
      error: null
      seconds: 0.021
sent:
  description: How many canaries were sent to each queue.
  returned: always
  type: dict
  sample: {critical: 2}
elapsed:
  description: Seconds until the last answer.
  returned: always
  type: float
pairs:
  description: Which nodes had to answer from which queue; an empty list means any one.
  returned: success
  type: dict
  sample: {critical: [shop-fast-1@worker1]}
missing:
  description: Pairs of node and queue that did not answer.
  returned: failure
  type: list
  elements: dict
wrong:
  description: Pairs of node and queue that answered wrong, and why.
  returned: failure
  type: list
  elements: dict
"""

from typing import Any

from ansible_collections.celeryops.runbook.plugins.module_utils._module import CeleryModule, above_zero, run
from ansible_collections.celeryops.runbook.plugins.module_utils.engine import tasks
from ansible_collections.celeryops.runbook.plugins.module_utils.engine.control import Control
from ansible_collections.celeryops.runbook.plugins.module_utils.engine.errors import PreconditionFailed

ARGUMENT_SPEC = {
    "queues": {"type": "raw"},
    "nodes": {"type": "list", "elements": "str", "default": []},
    "run": {"type": "str"},
    "args": {"type": "list", "elements": "raw", "default": []},
    "kwargs": {"type": "dict", "default": {}},
    "expect": {"type": "raw"},
    "release": {"type": "str"},
    "timeout": {"type": "float", "default": 30.0},
}


def _queues(value: Any) -> list[str] | dict[str, list[str]] | None:
    def names(found: Any) -> bool:
        return isinstance(found, list) and all(isinstance(name, str) and name.strip() for name in found)

    if value is None or names(value):
        return value
    if isinstance(value, dict) and all(isinstance(key, str) and names(nodes) for key, nodes in value.items()):
        return value
    raise PreconditionFailed(
        "queues: must be a list of queue names, or a dict of queue name to list of node names; quote names that "
        "look like numbers."
    )


def celery_canary(module: CeleryModule) -> dict[str, Any]:
    params = module.params
    queues = _queues(params["queues"])
    above_zero(params, "timeout")
    for option in ("args", "kwargs", "expect"):
        if params[option] not in (None, [], {}) and not params["run"]:
            raise PreconditionFailed(f"{option}: has no meaning without run. Name the task to run.")
    canary = tasks.Canary(
        run=params["run"],
        args=params["args"],
        kwargs=params["kwargs"],
        expect=params["expect"],
        release=params["release"],
    )
    with module.broker() as broker:
        with Control(broker) as control:
            wanted = tasks.pairs(control, queues, params["nodes"], params["run"])
        proof = tasks.Proof() if module.check_mode else tasks.prove(broker, wanted, canary, params["timeout"])
    return {
        "changed": False,
        "pairs": wanted,
        "answers": proof.answers,
        "sent": proof.sent,
        "elapsed": proof.elapsed,
    }


def main() -> None:
    run(celery_canary, ARGUMENT_SPEC, libraries=("redis", "celery"), supports_check_mode=True)


if __name__ == "__main__":
    main()
