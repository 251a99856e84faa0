#!/usr/bin/python
# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: celery_silent_info
short_description: Which workers do not do their work, although they may run
version_added: 0.1.0
description:
  - Silent is who does not answer, who does not consume the queues that it is to, and who runs no canary though it has
    no task at work and has begun none meanwhile. Behind a backlog a canary waits its turn, and who works is not silent.
  - A queue that is paused (M(celeryops.runbook.celery_queue_pause)) need not be consumed.
  - Canaries need the runtime package in the workers; without it the other two are looked at. Check mode sends none.
author:
  - celeryops contributors (@celeryops)
extends_documentation_fragment:
  - celeryops.runbook.connection
  - celeryops.runbook.attributes.info
options:
  workers:
    description: The workers to look at.
    type: list
    elements: dict
    required: true
    suboptions:
      node:
        description: Name of the node.
        type: str
        required: true
      queues:
        description: Queues that it is to consume.
        type: list
        elements: str
        default: []
  patience:
    description: Seconds that a worker has to answer, and again to run a canary.
    type: float
    default: 10.0
seealso:
  - module: celeryops.runbook.celery_inspect
  - module: celeryops.runbook.celery_canary
"""

EXAMPLES = r"""
- name: Who has not come back since Redis did
  celeryops.runbook.celery_silent_info:
    environment_file: /etc/celeryops/shop/secret.env
    virtualenv: /srv/shop/current/venv
    workers:
      - {node: shop-fast-1@worker1, queues: [critical, default]}
"""

RETURN = r"""
silent:
  description: Node and why it is silent; empty where all do their work.
  returned: success
  type: dict
  sample: {shop-fast-1@worker1: does not answer}
"""

from typing import Any

from ansible_collections.celeryops.runbook.plugins.module_utils._module import CeleryModule, above_zero, run
from ansible_collections.celeryops.runbook.plugins.module_utils.engine import silence
from ansible_collections.celeryops.runbook.plugins.module_utils.engine.control import Control

ARGUMENT_SPEC = {
    "workers": {
        "type": "list",
        "elements": "dict",
        "required": True,
        "options": {
            "node": {"type": "str", "required": True},
            "queues": {"type": "list", "elements": "str", "default": []},
        },
    },
    "patience": {"type": "float", "default": 10.0},
}


def look(module: CeleryModule) -> dict[str, Any]:
    params = module.params
    above_zero(params, "patience")
    wanted = {worker["node"]: worker["queues"] for worker in params["workers"]}
    if not wanted:
        return {"changed": False, "silent": {}}
    with module.broker() as broker, Control(broker) as control:
        silent = silence.find(broker, control, wanted, params["patience"], canaries=not module.check_mode)
    return {"changed": False, "silent": silent}


def main() -> None:
    run(look, ARGUMENT_SPEC, libraries=("redis", "celery"), supports_check_mode=True)


if __name__ == "__main__":
    main()
