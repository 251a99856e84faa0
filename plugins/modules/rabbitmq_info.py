#!/usr/bin/python
# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: rabbitmq_info
short_description: Queues, connections, alarms and nodes of the RabbitMQ behind a Celery application
version_added: 0.1.0
author:
  - celeryops contributors (@celeryops)
description:
  - Connects as the application does, then asks the management API of RabbitMQ.
  - Where the management API cannot be had, AMQP alone tells less, and O(ignore:unseen) says why. Messages ready and
    consumers of the queues named or consumed, and whether publishers are blocked.
  - Queues that Celery itself makes, for remote control, events and delayed delivery, are left out.
  - Sends one message that has no queue, which RabbitMQ drops. Only who publishes is told that an alarm blocks.
options:
  management_url:
    description:
      - Where the management API is, as C(http://user:password@host:15672). Without a user the broker's own.
      - Default is C(CELERYOPS_MANAGEMENT_URL) of O(environment_file), then port 15672 of the broker's host, or 15671
        with C(amqps), where it is asked if it is there.
      - The user needs the tag C(monitoring), or V(nodes) stays unknown.
    type: str
  queues:
    description: Names of the queues. Without it all; without the management API those that workers consume.
    type: list
    elements: str
    default: []
  timeout:
    description: Seconds to wait for the workers, which are asked only where the management API is missing.
    type: float
    default: 2.0
extends_documentation_fragment:
  - celeryops.runbook.connection
  - celeryops.runbook.attributes.info
seealso:
  - module: celeryops.runbook.celery_health
  - module: celeryops.runbook.rabbitmq_recover
  - module: celeryops.runbook.redis_queue_info
"""

EXAMPLES = r"""
- name: See what the broker holds
  celeryops.runbook.rabbitmq_info:
    environment_file: /etc/celeryops/shop/secret.env
    virtualenv: /srv/shop/current/venv
  register: rabbit
  failed_when: rabbit.alarms | length > 0
"""

RETURN = r"""
source:
  description: V(management), or V(amqp) where the management API cannot be had.
  returned: success
  type: str
unseen:
  description: Why the management API was not asked, and how to mend that; empty if it was.
  returned: success
  type: str
version:
  description: Version of RabbitMQ.
  returned: success
  type: str
  sample: 3.10.8
cluster:
  description: Name of the cluster.
  returned: success
  type: str
blocked:
  description: Whether whoever publishes has to wait, because an alarm is on.
  returned: success
  type: bool
alarms:
  description: Resource alarms, each with C(node) and C(resource). Empty without the management API.
  returned: success
  type: list
  elements: dict
nodes:
  description: The nodes with C(running), memory, disk, connections and C(partitions); null where they cannot be seen.
  returned: success
  type: dict
connections:
  description: How many connections, C(total), by C(users) and C(states); null where they are not to be seen.
  returned: success
  type: dict
  sample: {total: 12, users: {shop: 12}, states: {running: 12}}
queues:
  description: C(type), C(state), C(ready), C(unacked), C(consumers), for quorum queues C(members) and those C(online).
  returned: success
  type: dict
  sample: {orders: {type: quorum, state: running, ready: 3, unacked: 4, consumers: 2, members: 3, online: 3}}
missing:
  description: Those of O(queues) that RabbitMQ does not have.
  returned: success
  type: list
  elements: str
short:
  description: Quorum queues that have lost members, in words.
  returned: success
  type: list
  elements: str
delayed:
  description: Messages with an ETA that RabbitMQ holds back, null where they are not to be seen.
  returned: success
  type: int
"""

import dataclasses
from typing import Any

from ansible_collections.celeryops.runbook.plugins.module_utils._module import CeleryModule, above_zero, run
from ansible_collections.celeryops.runbook.plugins.module_utils.engine import rabbitmq
from ansible_collections.celeryops.runbook.plugins.module_utils.engine.connection import Broker

ARGUMENT_SPEC = {
    "management_url": {"type": "str", "no_log": True},
    "queues": {"type": "list", "elements": "str", "default": []},
    "timeout": {"type": "float", "default": 2.0},
}


def info(module: CeleryModule) -> dict[str, Any]:
    params = module.params
    above_zero(params, "timeout")
    spec = module.broker_spec()
    if params["management_url"]:
        spec = dataclasses.replace(spec, management_url=params["management_url"])
        module.secrets = [*module.secrets, *spec.secrets]
    with Broker(spec) as broker, broker.guard():
        seen = rabbitmq.look(broker, params["queues"], timeout=params["timeout"])
    if spec.management_url and seen.unseen:
        module.warn(seen.unseen)
    wanted = params["queues"]
    queues = {name: row for name, row in seen.queues.items() if not wanted or name in wanted}
    return {
        "changed": False,
        **dataclasses.asdict(seen),
        "queues": queues,
        "short": rabbitmq.short(seen),
        "missing": [name for name in wanted if name not in queues],
    }


def main() -> None:
    run(info, ARGUMENT_SPEC, libraries=("celery",), supports_check_mode=True)


if __name__ == "__main__":
    main()
