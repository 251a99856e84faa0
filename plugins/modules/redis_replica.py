#!/usr/bin/python
# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: redis_replica
short_description: Make the Redis of this host a replica of the present primary
version_added: 0.1.0
description:
  - Asks the Sentinels, then the other servers, who is the primary now. The inventory counts only where nobody knows.
  - Makes this Redis its replica, unless it is the primary or a replica already. One that was promoted stays it.
  - Sets what this Redis gives to its primary, also where it leads at the moment.
  - Redis keeps both in its own configuration, as it does after a failover.
author:
  - celeryops contributors (@celeryops)
extends_documentation_fragment:
  - celeryops.runbook.redis_server
  - celeryops.runbook.redis_group
  - celeryops.runbook.attributes.host
options:
  address:
    description: Address of this Redis, one of O(peers).
    type: str
    required: true
  password_before:
    description: The administrator's password until now, needed in check mode where it is to change.
    type: str
    default: ""
  user:
    description: User that replicas connect as, of the role V(replica). Empty for the administrator.
    type: str
    default: ""
  user_password:
    description: Password of O(user). Without O(user) it is O(password).
    type: str
    default: ""
  discard:
    description: Whether keys that this Redis has may be lost. Otherwise it is left as it is, and the module fails.
    type: bool
    default: false
  timeout:
    description: Seconds that the first copy may need.
    type: float
    default: 600.0
seealso:
  - module: celeryops.runbook.redis_sentinel
"""

EXAMPLES = r"""
- name: Follow the primary
  celeryops.runbook.redis_replica:
    password: "{{ celery_redis_password }}"
    address: 192.0.2.12:6379
    peers: [192.0.2.11:6379, 192.0.2.12:6379]
    first: 192.0.2.11:6379
    sentinels: [192.0.2.11:26379, 192.0.2.12:26379, 192.0.2.13:26379]
    master_name: shop
"""

RETURN = r"""
role:
  description: V(primary) or V(replica).
  returned: success
  type: str
primary:
  description: Address of the primary.
  returned: success
  type: str
handed:
  description: What was otherwise of the user and the password that this Redis gives to its primary.
  returned: success
  type: list
  elements: str
discarded:
  description: Keys that were lost, or would be.
  returned: success
  type: int
"""

from typing import Any

from ansible.module_utils.basic import AnsibleModule

from ansible_collections.celeryops.runbook.plugins.module_utils._redis import GROUP_SPEC, group_of, reach, run
from ansible_collections.celeryops.runbook.plugins.module_utils.engine import replication
from ansible_collections.celeryops.runbook.plugins.module_utils.engine.backup import Server
from ansible_collections.celeryops.runbook.plugins.module_utils.engine.errors import PreconditionFailed

ARGUMENT_SPEC = {
    **GROUP_SPEC,
    "address": {"type": "str", "required": True},
    "password_before": {"type": "str", "no_log": True, "default": ""},
    "user": {"type": "str", "default": ""},
    "user_password": {"type": "str", "no_log": True, "default": ""},
    "discard": {"type": "bool", "default": False},
    "timeout": {"type": "float", "default": 600.0},
}


def follow(module: AnsibleModule, server: Server) -> dict[str, Any]:
    params = module.params
    group, me = group_of(params, params["password"]), replication.resolve(params["address"])
    if me not in group.peers:
        raise PreconditionFailed(f"address: {params['address']} is not one of peers.")
    # Until now it may take another one; where it does not answer, what follows says so.
    server = (reach(server, params["password_before"], True) if module.check_mode else None) or server
    password = params["user_password"] if params["user"] else params["password"]
    handed = replication.hand(server, params["user"], password, dry=module.check_mode)
    done = replication.attach(
        server, group, me, discard=params["discard"], timeout=params["timeout"], dry=module.check_mode
    )
    before = "primary of its own" if done["changed"] else f"{done['role']}, primary {done['primary']}"
    return {
        **done,
        "changed": done["changed"] or bool(handed),
        "handed": handed,
        "diff": {
            "before": before + "\n",
            "after": f"{done['role']}, primary {done['primary']}\n" + "".join(f"another {name}\n" for name in handed),
        },
    }


def main() -> None:
    run(follow, ARGUMENT_SPEC)


if __name__ == "__main__":
    main()
