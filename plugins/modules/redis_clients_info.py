#!/usr/bin/python
# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: redis_clients_info
short_description: Who is connected to the Redis broker
version_added: 0.1.0
description:
  - Counts connections by role and host as far as C(CLIENT LIST) tells, and lists those idle for longest.
  - Counts reply lists of remote control which nobody reads any more.
author:
  - celeryops contributors (@celeryops)
extends_documentation_fragment:
  - celeryops.runbook.connection
  - celeryops.runbook.attributes.info
options:
  most:
    description: List at most so many connections, the longest idle first.
    type: int
    default: 100
  reply_idle:
    description: Seconds after which nobody reads a reply list any more.
    type: int
    default: 600
notes:
  - A role is a guess from what a connection did last. V(worker) pops, or is on a host where another one does;
    V(subscriber) subscribes elsewhere, such as an event monitor; V(producer) sent last; V(exporter) asks for figures;
    V(operator) is this module or a shell; V(unused) has said nothing since it came; V(other) is the rest, idle pool
    connections mostly.
seealso:
  - module: celeryops.runbook.redis_clients
"""

EXAMPLES = r"""
- name: Who is connected
  celeryops.runbook.redis_clients_info:
    environment_file: /etc/celeryops/shop/secret.env
    virtualenv: /srv/shop/current/venv
"""

RETURN = r"""
count:
  description: Connections.
  returned: success
  type: int
maxclients:
  description: Most that this Redis takes. Null where the user may not ask.
  returned: success
  type: int
roles:
  description: By role C(count), C(oldest_idle) in seconds and C(bytes).
  returned: success
  type: dict
  sample: {"worker": {"count": 12, "oldest_idle": 3, "bytes": 25600}}
hosts:
  description: Connections by address they come from, the 50 with most.
  returned: success
  type: dict
clients:
  description: Single connections. C(kept) says why one is never closed.
  returned: success
  type: list
  elements: dict
reply_keys:
  description: Abandoned reply lists, C(count), C(bytes), and of C(unknown_idle) age.
  returned: success
  type: dict
"""

from typing import Any

from ansible_collections.celeryops.runbook.plugins.module_utils._module import CeleryModule, run
from ansible_collections.celeryops.runbook.plugins.module_utils.engine import clients
from ansible_collections.celeryops.runbook.plugins.module_utils.engine.queues import RedisQueues

ARGUMENT_SPEC = {
    "most": {"type": "int", "default": 100},
    "reply_idle": {"type": "int", "default": 600},
}


def look(module: CeleryModule) -> dict[str, Any]:
    with module.broker() as broker:
        found = clients.listed(broker.redis)
        replies = RedisQueues.of(broker).reply_keys(module.params["reply_idle"], most=0)
        limit = clients.limit(broker.redis)
    shown = sorted(found, key=lambda client: -client.idle)[: max(0, module.params["most"])]
    del replies["keys"]
    return {
        "changed": False,
        **clients.summary(found),
        "maxclients": limit,
        "clients": [clients.describe(client) for client in shown],
        "reply_keys": replies,
    }


def main() -> None:
    run(look, ARGUMENT_SPEC, supports_check_mode=True)


if __name__ == "__main__":
    main()
