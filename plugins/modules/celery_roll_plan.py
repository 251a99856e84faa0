#!/usr/bin/python
# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: celery_roll_plan
short_description: What has to be done on a host to bring its workers to a release
version_added: 0.1.0
author:
  - celeryops contributors (@celeryops)
description:
  - Asks the fleet what runs and what it consumes, compares the instances that a host is to run with that and with what
    the host shows, and says which instances a deploy has to replace, which of them should have answered and did not,
    and which pools need an extra instance (surge) meanwhile.
  - What an interrupted deploy has finished is not planned again.
  - Changes nothing. The role C(worker) acts.
extends_documentation_fragment:
  - celeryops.runbook.connection
  - celeryops.runbook.attributes.info
options:
  release:
    description: The release that all instances are to run.
    type: str
    required: true
  current:
    description: The release which C(current) points to on the host.
    type: str
    required: true
  wanted:
    description: The instances that the host is to run.
    type: list
    elements: dict
    required: true
    suboptions:
      instance:
        description: The instance, such as V(default-1).
        type: str
        required: true
      pool:
        description: Its pool.
        type: str
        required: true
      node:
        description: Its node name.
        type: str
        required: true
      queues:
        description: The queues it is to consume.
        type: list
        elements: str
        required: true
  found:
    description:
      - What the host shows of each instance and of each pool's surge instance (C(POOL-surge)) - the C(state) of its
        unit as systemd calls it, the C(release) it runs and the state of its C(process) as in C(/proc/PID/stat).
    type: dict
    required: true
  batch:
    description: Node names on all hosts that are replaced together. What their hosts consume does not count as covered.
    type: list
    elements: str
    required: true
  surge:
    description:
      - V(auto) plans a surge instance for a pool with a queue that nobody outside the batch consumes.
      - V(always) plans one for each pool that is replaced, V(never) none.
    type: str
    choices: [auto, always, never]
    default: auto
  timeout:
    description: Seconds that the fleet has for its answers.
    type: float
    default: 3.0
seealso:
  - module: celeryops.runbook.celery_inspect
"""

EXAMPLES = r"""
- name: Plan what is to be done on worker1
  celeryops.runbook.celery_roll_plan:
    environment_file: /etc/celeryops/shop/secret.env
    virtualenv: /srv/shop/current/venv
    release: v2
    current: v1
    wanted:
      - {instance: default-1, pool: default, node: shop-default-1@worker1, queues: [default]}
    found:
      default-1: {state: active, release: v1, process: S}
    batch: [shop-default-1@worker1]
  register: planned
"""

RETURN = r"""
roll:
  description: The plan.
  returned: success
  type: dict
  contains:
    from:
      description: The release to put the host back to, O(current).
      type: str
    acts:
      description: Whether there is anything to do.
      type: bool
    todo:
      description: Instances to replace. They do not run, run another release or do not consume their queues.
      type: list
      elements: str
    silent:
      description: Nodes that did not answer though their unit is active, and whether the process is stopped.
      type: list
      elements: str
    surge:
      description: Pools that need a surge instance meanwhile.
      type: list
      elements: str
    left:
      description: Pools of which an interrupted deploy left a surge instance that is of no use now.
      type: list
      elements: str
  sample: {from: v1, acts: true, todo: [default-1], silent: [], surge: [default], left: []}
text:
  description: The plan in words.
  returned: success
  type: str
  sample: >-
    would start default-surge on v2, quiet, drain and stop default-1, switch current from v1 to v2, start and prove them
"""

from typing import Any

from ansible_collections.celeryops.runbook.plugins.module_utils._module import CeleryModule, above_zero, run
from ansible_collections.celeryops.runbook.plugins.module_utils.engine import rollout
from ansible_collections.celeryops.runbook.plugins.module_utils.engine.control import Control
from ansible_collections.celeryops.runbook.plugins.module_utils.engine.errors import PreconditionFailed
from ansible_collections.celeryops.runbook.plugins.module_utils.engine.fleet import observe

ARGUMENT_SPEC: dict[str, Any] = {
    "release": {"type": "str", "required": True},
    "current": {"type": "str", "required": True},
    "wanted": {
        "type": "list",
        "elements": "dict",
        "required": True,
        "options": {
            "instance": {"type": "str", "required": True},
            "pool": {"type": "str", "required": True},
            "node": {"type": "str", "required": True},
            "queues": {"type": "list", "elements": "str", "required": True},
        },
    },
    "found": {"type": "dict", "required": True},
    "batch": {"type": "list", "elements": "str", "required": True},
    "surge": {"type": "str", "choices": list(rollout.SURGES), "default": "auto"},
    "timeout": {"type": "float", "default": 3.0},
}


def plan(module: CeleryModule) -> dict[str, Any]:
    params = module.params
    above_zero(params, "timeout")
    wanted = [rollout.Wanted(**{**one, "queues": tuple(one["queues"])}) for one in params["wanted"]]
    unseen = [one.instance for one in wanted if one.instance not in params["found"]]
    if unseen:
        raise PreconditionFailed(f"found: says nothing of {', '.join(unseen)}; give each instance of wanted.")
    try:
        found = {name: rollout.Found.read(here) for name, here in params["found"].items()}
    except (AttributeError, KeyError, TypeError) as error:
        raise PreconditionFailed(f"found: give each entry as the documentation shows it ({error}).") from None
    with module.broker() as broker, Control(broker) as control:
        nodes = [one.node for one in wanted]
        fleet = observe(control, rollout.QUESTIONS, expected=nodes, timeout=params["timeout"]).as_dict()["nodes"]
    roll = rollout.plan(
        wanted,
        found,
        {name: rollout.Heard.read(node) for name, node in fleet.items()},
        release=params["release"],
        current=params["current"],
        batch=params["batch"],
        surge=params["surge"],
    )
    return {"changed": False, "roll": roll.as_dict(), "text": str(roll)}


def main() -> None:
    run(plan, ARGUMENT_SPEC, libraries=(), supports_check_mode=True)


if __name__ == "__main__":
    main()
