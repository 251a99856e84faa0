#!/usr/bin/python
# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: redis_clients
short_description: Close connections to the Redis broker that nobody uses
version_added: 0.1.0
description:
  - Closes connections by their id which have been idle for O(idle) seconds, each looked at again just before.
  - Never one that waits in a blocking pop, subscribes, replicates, monitors or is inside a transaction, and never its
    own. A worker or producer whose pooled connection is closed opens another one when it needs it.
  - Removes reply lists of remote control which nobody reads any more, if O(reply_idle) is given.
author:
  - celeryops contributors (@celeryops)
extends_documentation_fragment:
  - celeryops.runbook.connection
  - celeryops.runbook.attributes
options:
  idle:
    description: Close connections that have been idle for so many seconds, 10 or more. Without it none is closed.
    type: int
  roles:
    description: Only those of these roles, which M(celeryops.runbook.redis_clients_info) explains.
    type: list
    elements: str
    choices: [worker, producer, exporter, operator, unused, other]
    default: []
  hosts:
    description: Only those from these addresses.
    type: list
    elements: str
    default: []
  reply_idle:
    description: Remove reply lists that have been idle for so many seconds, 60 or more. Without it none is removed.
    type: int
seealso:
  - module: celeryops.runbook.redis_clients_info
"""

EXAMPLES = r"""
- name: Close what has been idle for an hour and remove abandoned replies
  celeryops.runbook.redis_clients:
    environment_file: /etc/celeryops/shop/secret.env
    virtualenv: /srv/shop/current/venv
    idle: 3600
    reply_idle: 600
"""

RETURN = r"""
closed:
  description: Connections closed, C(count), by C(roles) and C(hosts).
  returned: success
  type: dict
before:
  description: Connections before, C(count), by C(roles) and C(hosts).
  returned: success
  type: dict
after:
  description: Connections after, C(count); in check mode as it would be.
  returned: success
  type: dict
replies:
  description: Reply lists removed, C(count), and the C(bytes) they took.
  returned: success
  type: dict
"""

from typing import Any

from ansible_collections.celeryops.runbook.plugins.module_utils._module import CeleryModule, run
from ansible_collections.celeryops.runbook.plugins.module_utils.engine import clients
from ansible_collections.celeryops.runbook.plugins.module_utils.engine.errors import PreconditionFailed
from ansible_collections.celeryops.runbook.plugins.module_utils.engine.queues import RedisQueues

ARGUMENT_SPEC: dict[str, Any] = {
    "idle": {"type": "int"},
    "roles": {
        "type": "list",
        "elements": "str",
        "choices": ["worker", "producer", "exporter", "operator", "unused", "other"],
        "default": [],
    },
    "hosts": {"type": "list", "elements": "str", "default": []},
    "reply_idle": {"type": "int"},
}


def tidy(module: CeleryModule) -> dict[str, Any]:
    params, dry = module.params, module.check_mode
    for name, least in (("idle", 10), ("reply_idle", 60)):
        if params[name] is not None and params[name] < least:
            raise PreconditionFailed(f"{name}: must be at least {least} seconds, not {params[name]}: less is in use.")
    if params["idle"] is None and (params["roles"] or params["hosts"]):
        raise PreconditionFailed("idle: say after how many idle seconds those of roles and hosts are closed.")
    found: list[clients.Client] = []
    closed: list[clients.Client] = []
    replies = {"count": 0, "bytes": 0}
    with module.broker() as broker:
        if params["idle"] is not None:
            found, closed = clients.close(
                broker.redis, params["idle"], roles=params["roles"], hosts=params["hosts"], dry=dry
            )
        else:
            found = clients.listed(broker.redis)
        if params["reply_idle"] is not None:
            queues = RedisQueues.of(broker)
            listed = queues.reply_keys(params["reply_idle"], most=0)
            replies = {"count": listed["count"], "bytes": listed["bytes"]}
            if not dry:
                replies["count"] = queues.sweep_replies(params["reply_idle"])
        left = len(found) - len(closed) if dry else len(clients.listed(broker.redis))
    return {
        "changed": bool(closed) or replies["count"] > 0,
        "before": clients.summary(found),
        "after": {"count": left},
        "closed": clients.summary(closed),
        "replies": replies,
        "diff": {
            "before": {"connections": len(found), "abandoned replies": replies["count"]},
            "after": {"connections": len(found) - len(closed), "abandoned replies": 0},
        },
    }


def main() -> None:
    run(tidy, ARGUMENT_SPEC, supports_check_mode=True)


if __name__ == "__main__":
    main()
