#!/usr/bin/python
# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: redis_restore
short_description: Make a backup the data of the Redis on this host
version_added: 0.1.0
description:
  - Judges the backup, unpacks it beside the data, stops Redis, moves the old data aside, and starts Redis with the
    restored data. Where Redis has an append-only file the snapshot becomes the base of a new one, since Redis would
    not look at it otherwise.
  - The old data stays in its directory, in C(before-restore-TIME). If the restored data does not load, it is put back.
  - Refuses a replica, and a Redis that Sentinels watch. In check mode those of O(sentinels) may still do so.
  - Stop workers and beat first. M(celeryops.runbook.redis_replay) then deals with what would run again. The playbook
    C(redis_restore) does all of it.
author:
  - celeryops contributors (@celeryops)
extends_documentation_fragment:
  - celeryops.runbook.redis_server
  - celeryops.runbook.attributes.host
options:
  file:
    description: The backup on this host, of M(celeryops.runbook.redis_backup), or a bare RDB.
    type: path
    required: true
  source:
    description:
      - V(rdb) restores the snapshot, which was whole when the backup was made.
      - V(aof) restores the append-only file of the backup. Its last command may be cut off; Redis then leaves it out.
    type: str
    choices: [rdb, aof]
    default: rdb
  accept:
    description: V(origin) accepts a backup of another host or port, or a bare RDB, which does not say whose it is.
    type: list
    elements: str
    choices: [origin]
    default: []
  address:
    description: Address HOST:PORT of this Redis, as the Sentinels name it. Needed with O(sentinels).
    type: str
    default: ""
  sentinels:
    description: Addresses HOST:PORT of the Sentinels that may watch this Redis at other times.
    type: list
    elements: str
    default: []
  master_name:
    description: What the Sentinels call the primary.
    type: str
    default: ""
  sentinel_password:
    description: Password of the Sentinels themselves, empty for none.
    type: str
    default: ""
  config:
    description: The configuration of Redis. Says where its data is when it does not answer.
    type: path
    default: /etc/redis/redis.conf
  unit:
    description: The systemd unit of Redis.
    type: str
    default: redis-server.service
  timeout:
    description: Seconds that Redis may need to load the data.
    type: float
    default: 600.0
attributes:
  idempotent:
    support: none
    details:
      - Each run restores.
seealso:
  - module: celeryops.runbook.redis_backup
  - module: celeryops.runbook.redis_replay
"""

EXAMPLES = r"""
- name: Would this backup do
  celeryops.runbook.redis_restore:
    password: "{{ celery_redis_password }}"
    file: /var/backups/celeryops/shop/redis-20261121T123000Z.tar.gz
  check_mode: true

- name: Restore it
  celeryops.runbook.redis_restore:
    password: "{{ celery_redis_password }}"
    file: /var/backups/celeryops/shop/redis-20261121T123000Z.tar.gz
"""

RETURN = r"""
note:
  description: What the backup says of itself.
  returned: success
  type: dict
bytes:
  description: Size of the unpacked backup.
  returned: success
  type: int
aside:
  description: Directory with the old data. Empty in check mode.
  returned: success
  type: str
moved:
  description: What was moved there.
  returned: success
  type: list
  elements: str
loaded:
  description: Keys in all databases after the start.
  returned: not in check mode
  type: int
rdb:
  description: C(keys) of the snapshot, how many of them have C(expires), and are C(expired).
  returned: not in check mode
  type: dict
answered:
  description: Whether Redis answered before.
  returned: success
  type: bool
"""

import socket
from typing import Any

from ansible.module_utils.basic import AnsibleModule

from ansible_collections.celeryops.runbook.plugins.module_utils._redis import run, systemctl
from ansible_collections.celeryops.runbook.plugins.module_utils.engine import backup, replication, restore
from ansible_collections.celeryops.runbook.plugins.module_utils.engine.errors import CeleryOpsError

ARGUMENT_SPEC = {
    "file": {"type": "path", "required": True},
    "source": {"type": "str", "choices": ["rdb", "aof"], "default": "rdb"},
    "accept": {"type": "list", "elements": "str", "choices": ["origin"], "default": []},
    "address": {"type": "str", "default": ""},
    "sentinels": {"type": "list", "elements": "str", "default": []},
    "master_name": {"type": "str", "default": ""},
    "sentinel_password": {"type": "str", "no_log": True, "default": ""},
    "config": {"type": "path", "default": "/etc/redis/redis.conf"},
    "unit": {"type": "str", "default": "redis-server.service"},
    "timeout": {"type": "float", "default": 600.0},
}


def bring_back(module: AnsibleModule, server: backup.Server) -> dict[str, Any]:
    params = module.params
    sentinels = [replication.resolve(address) for address in params["sentinels"]]
    group = replication.Group([], "", sentinels, params["master_name"], "", params["sentinel_password"])
    me = replication.resolve(params["address"]) if sentinels else ""
    replication.may_restore(server, group, me, stopped=not module.check_mode)
    try:
        settings, answered = server.settings(), True
    except CeleryOpsError:
        settings, answered = backup.read_settings(params["config"]), False
    plan = restore.judge(
        params["file"],
        settings,
        port=params["port"],
        host=socket.gethostname(),
        source=params["source"],
        accept=params["accept"],
    )
    result = {
        "changed": True,
        "note": plan.note,
        "bytes": plan.bytes,
        "answered": answered,
        "aside": "",
        "moved": [],
        "diff": {"before": f"{settings['dir']}\n", "after": f"{settings['dir']} from {params['file']}\n"},
    }
    if not module.check_mode:
        result |= restore.put(
            plan,
            settings,
            server,
            lambda: systemctl(module, "stop", params["unit"]),
            lambda: systemctl(module, "start", params["unit"]),
            timeout=params["timeout"],
        )
    return result


def main() -> None:
    run(bring_back, ARGUMENT_SPEC)


if __name__ == "__main__":
    main()
