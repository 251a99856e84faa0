#!/usr/bin/python
# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: celery_signing_info
short_description: Which keys Celery workers accept, and which keys signed the messages that wait
version_added: 0.1.0
author:
  - celeryops contributors (@celeryops)
description:
  - Asks every worker for its signing keys, by id, and counts the messages in the queues and with the workers by the key
    that signed them. It reads every waiting message.
  - It does not verify signatures, which the workers do. For brokers on Redis.
extends_documentation_fragment:
  - celeryops.runbook.connection
  - celeryops.runbook.attributes.info
options:
  keys:
    description: Ids of the keys that workers are to accept. What others signed, and what is not signed, is RV(leaving).
    type: list
    elements: str
    default: []
  unsigned:
    description: Whether unsigned messages are to be refused, so that they count as RV(leaving).
    type: bool
    default: true
  wait_timeout:
    description: Seconds to wait until nothing is RV(leaving) any more. That it is not so is no failure.
    type: float
    default: 0
  timeout:
    description: Seconds to wait for the workers.
    type: float
    default: 2.0
seealso:
  - module: celeryops.runbook.celery_signing_keys
"""

EXAMPLES = r"""
- name: Do all workers accept the new key, and does anything still need the old one?
  celeryops.runbook.celery_signing_info:
    environment_file: /etc/celeryops/shop/secret.env
    virtualenv: /srv/shop/current/venv
    keys: [2026-12]
"""

RETURN = r"""
nodes:
  description: What each worker that answered says; null for one without the runtime part C(signing).
  returned: always
  type: dict
  sample:
    shop-fast-1@worker1:
      {accepts: [2026-12, 2026-11], signs: 2026-11, require: true, refused: 0, passed: 0, problem: "", pid: 812}
not_ready:
  description: Workers that do not sign, or do not accept all O(keys), and workers that kept silent. In words.
  returned: always
  type: list
  elements: str
messages:
  description:
    - Key, queue and number of the messages that wait. V(unsigned) stands for no key. The queue is empty for messages
      that workers hold.
  returned: always
  type: dict
  sample: {2026-11: {reports: 3, "": 1}}
dead:
  description: The same for dead letters. They do not hold anything up.
  returned: always
  type: dict
leaving:
  description: The part of RV(messages) that workers take now and would refuse if they accepted O(keys) only.
  returned: always
  type: dict
refused:
  description: How many messages the workers that answered have refused since they started.
  returned: always
  type: int
"""

import time
from typing import Any

from ansible_collections.celeryops.runbook.plugins.module_utils._module import CeleryModule, run
from ansible_collections.celeryops.runbook.plugins.module_utils.engine import signing
from ansible_collections.celeryops.runbook.plugins.module_utils.engine.control import Control
from ansible_collections.celeryops.runbook.plugins.module_utils.engine.errors import PreconditionFailed
from ansible_collections.celeryops.runbook.plugins.module_utils.engine.fleet import observe
from ansible_collections.celeryops.runbook.plugins.module_utils.engine.queues import RedisQueues

ARGUMENT_SPEC = {
    "keys": {"type": "list", "elements": "str", "default": [], "no_log": False},
    "unsigned": {"type": "bool", "default": True},
    "wait_timeout": {"type": "float", "default": 0.0},
    "timeout": {"type": "float", "default": 2.0},
}


def info(module: CeleryModule) -> dict[str, Any]:
    params = module.params
    if params["timeout"] <= 0 or params["wait_timeout"] < 0:
        raise PreconditionFailed("timeout: must be above 0 seconds, and wait_timeout not below.")
    with module.broker() as broker, Control(broker) as control:
        fleet = observe(control, [(signing.COMMAND, {})], timeout=params["timeout"])
        nodes = {name: fleet.nodes[name].replies.get(signing.COMMAND) for name in fleet.workers}
        queues = RedisQueues.of(broker)
        end = time.monotonic() + params["wait_timeout"]
        while True:
            messages, dead = signing.census(queues)
            leaving = signing.leaving(messages, nodes, params["keys"], params["unsigned"])
            if not leaving or time.monotonic() >= end:
                break
            time.sleep(min(1.0, max(0.0, end - time.monotonic())))
    not_ready = signing.not_ready(nodes, params["keys"])
    if fleet.silent_count:
        not_ready.append(f"{fleet.silent_count} connected worker(s) did not answer within {params['timeout']:g} s")
    return {
        "changed": False,
        "nodes": nodes,
        "not_ready": not_ready,
        "messages": messages,
        "dead": dead,
        "leaving": leaving,
        "refused": sum(told["refused"] for told in nodes.values() if told),
    }


def main() -> None:
    run(info, ARGUMENT_SPEC, supports_check_mode=True)


if __name__ == "__main__":
    main()
