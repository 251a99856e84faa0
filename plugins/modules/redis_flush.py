#!/usr/bin/python
# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: redis_flush
short_description: Remove all keys of the Redis of this host
version_added: 0.1.0
description:
  - For a host of development. Removes every key of every database, which is all work that waits, runs or is scheduled,
    of every application on that Redis. Make a backup first; the playbook C(redis_flush) does.
  - Refuses a replica, and a primary whose replicas would be emptied too.
author:
  - celeryops contributors (@celeryops)
extends_documentation_fragment:
  - celeryops.runbook.redis_server
  - celeryops.runbook.attributes.host
options:
  confirm:
    description: Must be V(all keys).
    type: str
    required: true
seealso:
  - module: celeryops.runbook.redis_backup
  - module: celeryops.runbook.redis_queue
"""

EXAMPLES = r"""
- name: Begin with an empty broker
  celeryops.runbook.redis_flush:
    password: "{{ celery_redis_password }}"
    confirm: all keys
"""

RETURN = r"""
databases:
  description: How many keys each database had.
  returned: success
  type: dict
  sample: {"0": 17, "1": 4}
removed:
  description: How many keys were removed; in check mode how many would be.
  returned: success
  type: int
"""

from typing import Any

from ansible.module_utils.basic import AnsibleModule

from ansible_collections.celeryops.runbook.plugins.module_utils._redis import run
from ansible_collections.celeryops.runbook.plugins.module_utils.engine.backup import Server
from ansible_collections.celeryops.runbook.plugins.module_utils.engine.errors import PreconditionFailed
from ansible_collections.celeryops.runbook.plugins.module_utils.engine.replication import may_flush

ARGUMENT_SPEC = {"confirm": {"type": "str", "required": True}}


def keys(server: Server) -> dict[str, int]:
    """Of each database that has any."""
    found = server.info("keyspace")
    return {
        name.removeprefix("db"): int(value.partition("keys=")[2].partition(",")[0])
        for name, value in sorted(found.items())
        if name.startswith("db")
    }


def flush(module: AnsibleModule, server: Server) -> dict[str, Any]:
    if module.params["confirm"] != "all keys":
        raise PreconditionFailed("confirm: must be 'all keys'; every key of every database is removed.")
    may_flush(server)
    found = keys(server)
    if found and not module.check_mode:
        server.ask("FLUSHALL", "SYNC", timeout=600)
    return {
        "changed": bool(found),
        "databases": found,
        "removed": sum(found.values()),
        "diff": {"before": "".join(f"database {name}: {number} keys\n" for name, number in found.items()), "after": ""},
    }


def main() -> None:
    run(flush, ARGUMENT_SPEC)


if __name__ == "__main__":
    main()
