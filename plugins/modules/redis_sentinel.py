#!/usr/bin/python
# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: redis_sentinel
short_description: Let the Sentinel of this host watch a primary
version_added: 0.1.0
description:
  - Writes the file of Sentinel where it does not watch this primary yet. From then on Sentinel owns it; what differs is
    set while it runs. What it reads at its start only is changed while it is stopped, and what it has learnt stays.
  - The primary in the first file is the present one, asked from the other Sentinels and the servers.
  - Does not start Sentinel.
author:
  - celeryops contributors (@celeryops)
extends_documentation_fragment:
  - celeryops.runbook.redis_group
  - celeryops.runbook.attributes.host
options:
  port:
    description: Port of Sentinel.
    type: int
    default: 26379
  password:
    description: Password of the Redis servers. It is handed on in the environment and over standard input only.
    type: str
    default: ""
  auth_user:
    description: User that Sentinel connects to Redis as, of the role V(sentinel). Empty for the administrator.
    type: str
    default: ""
  auth_password:
    description: Password of O(auth_user). Without O(auth_user) it is O(password).
    type: str
    default: ""
  restart:
    description: Whether Sentinel may be stopped for what it reads at its start only. Otherwise that is refused.
    type: bool
    default: true
  bind:
    description: Addresses that Sentinel listens on.
    type: list
    elements: str
    default: ["*", "-::*"]
  quorum:
    description: So many Sentinels must see a primary as down before one of them is replaced.
    type: int
    required: true
  down_after:
    description: Seconds without an answer after which a Sentinel sees a server as down.
    type: float
    default: 5.0
  failover_timeout:
    description: Seconds after which a failover that makes no progress is given up.
    type: float
    default: 60.0
  path:
    description: The file of Sentinel.
    type: path
    default: /etc/redis/sentinel.conf
  directory:
    description: Working directory of Sentinel.
    type: path
    default: /var/lib/redis
  unit:
    description: The systemd unit of Sentinel.
    type: str
    default: redis-sentinel.service
seealso:
  - module: celeryops.runbook.redis_replica
"""

EXAMPLES = r"""
- name: Watch the primary
  celeryops.runbook.redis_sentinel:
    password: "{{ celery_redis_password }}"
    sentinel_password: "{{ celery_redis_sentinel_password }}"
    peers: [192.0.2.11:6379, 192.0.2.12:6379]
    first: 192.0.2.11:6379
    sentinels: [192.0.2.11:26379, 192.0.2.12:26379, 192.0.2.13:26379]
    master_name: shop
    quorum: 2
"""

RETURN = r"""
primary:
  description: Address of the primary where the file was written, else empty.
  returned: success
  type: str
written:
  description: Whether the file was written, so that Sentinel has to be started anew.
  returned: success
  type: bool
set:
  description: Options that were set while Sentinel runs, or would be.
  returned: success
  type: list
  elements: str
"""

import os
import tempfile
from typing import Any

from ansible.module_utils.basic import AnsibleModule

from ansible_collections.celeryops.runbook.plugins.module_utils._redis import GROUP_SPEC, group_of, run, systemctl
from ansible_collections.celeryops.runbook.plugins.module_utils.engine import replication
from ansible_collections.celeryops.runbook.plugins.module_utils.engine.backup import Server
from ansible_collections.celeryops.runbook.plugins.module_utils.engine.errors import (
    ConnectionFailed,
    PreconditionFailed,
)

ARGUMENT_SPEC = {
    **GROUP_SPEC,
    "port": {"type": "int", "default": 26379},
    "password": {"type": "str", "no_log": True, "default": ""},
    "auth_user": {"type": "str", "default": ""},
    "auth_password": {"type": "str", "no_log": True, "default": ""},
    "restart": {"type": "bool", "default": True},
    "bind": {"type": "list", "elements": "str", "default": ["*", "-::*"]},
    "quorum": {"type": "int", "required": True},
    "down_after": {"type": "float", "default": 5.0},
    "failover_timeout": {"type": "float", "default": 60.0},
    "path": {"type": "path", "default": "/etc/redis/sentinel.conf"},
    "directory": {"type": "path", "default": "/var/lib/redis"},
    "unit": {"type": "str", "default": "redis-sentinel.service"},
}


def read(path: str) -> str:
    if not os.path.exists(path):
        return ""
    with open(path, encoding="utf-8", errors="replace") as file:
        return file.read()


def write(module: AnsibleModule, text: str) -> None:
    """Of the user who runs Sentinel: it writes there itself."""
    path = module.params["path"]
    handle, temporary = tempfile.mkstemp(dir=os.path.dirname(path))
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(text)
    owner = os.stat(module.params["directory"])
    os.chown(temporary, owner.st_uid, owner.st_gid)
    module.atomic_move(temporary, path, unsafe_writes=False, keep_dest_attrs=False)


def watch(module: AnsibleModule, _server: Server) -> dict[str, Any]:
    params = module.params
    if not 1 <= params["quorum"] <= max(1, len(params["sentinels"])):
        raise PreconditionFailed(
            f"quorum: {params['quorum']} of {len(params['sentinels'])} Sentinels cannot be reached."
        )
    group = group_of(params, params["password"])
    wanted = replication.Sentinel(
        params["port"],
        params["bind"],
        params["quorum"],
        round(params["down_after"] * 1000),
        round(params["failover_timeout"] * 1000),
        params["directory"],
        params["auth_user"],
        params["auth_password"] if params["auth_user"] else params["password"],
    )
    text = read(params["path"])
    new = not replication.watches(text, group.name)
    fixed = wanted.fixed(group)
    misfits = [] if new else replication.misfits(text, fixed)
    if (new or misfits) and not params["restart"]:
        what = f"does not watch {group.name} yet" if new else f"runs with another {', another '.join(misfits)}"
        raise PreconditionFailed(
            f"the Sentinel of this host {what}, which it reads at its start only. Run site first: it restarts Sentinel."
            f" Its own password (requirepass) is that of sentinel_kwargs in celeryops_transport_options."
        )
    # With the password that it runs with, which its file says.
    server = Server(
        int(replication.line_of(text, "port") or params["port"]),
        replication.line_of(text, "requirepass"),
        group.patience,
    )
    differing: dict[str, str] = {}
    if not new:
        try:
            differing = replication.differing(server, text, wanted, group)
        except ConnectionFailed as exc:
            if not params["restart"]:
                raise ConnectionFailed(
                    f"Sentinel on port {server.port} cannot be told what to connect with: {exc.msg} Start it (systemctl"
                    f" start {params['unit']}) and run again."
                ) from exc
            # Set by the next run, once it is up.
            module.warn(f"Sentinel on port {server.port} does not answer, its settings could not be compared.")
    leader = group.leader() if new else ""
    if not module.check_mode:
        if differing:
            # In one command: between a user and its password it would be refused.
            words = [word for name, value in differing.items() for word in (name, replication.quoted(value))]
            server.ask("SENTINEL", "SET", group.name, *words, hidden=True)
        if new or misfits:
            program = module.get_bin_path("systemctl", required=True)
            if module.run_command([program, "is-active", "--quiet", params["unit"]])[0] == 0:
                systemctl(module, "stop", params["unit"])
            write(module, wanted.begin(group, leader) if new else replication.refit(read(params["path"]), fixed))
    changes = [f"watches {group.name} at {leader}"] if new else [*misfits, *differing]
    return {
        "changed": bool(changes),
        "primary": leader,
        "written": new or bool(misfits),
        "set": sorted(differing),
        "diff": {"before": "", "after": "".join(f"{change}\n" for change in changes)},
    }


def main() -> None:
    run(watch, ARGUMENT_SPEC, common={})


if __name__ == "__main__":
    main()
