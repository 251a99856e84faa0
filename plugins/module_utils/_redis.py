# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Private to the collection: modules that act on the Redis of their own host, without a library."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from typing import Any

from ansible.module_utils.basic import AnsibleModule

from .engine.backup import Server
from .engine.errors import AuthenticationFailed, CeleryOpsError, ConnectionFailed, PreconditionFailed
from .engine.replication import Group, resolve

ARGUMENT_SPEC: dict[str, Any] = {
    "port": {"type": "int", "default": 6379},
    "password": {"type": "str", "no_log": True, "default": ""},
}

# Doc fragment redis_group.
GROUP_SPEC: dict[str, Any] = {
    "peers": {"type": "list", "elements": "str", "required": True},
    "first": {"type": "str", "required": True},
    "sentinels": {"type": "list", "elements": "str", "default": []},
    "master_name": {"type": "str", "required": True},
    "sentinel_password": {"type": "str", "no_log": True, "default": ""},
}


def group_of(params: Mapping[str, Any], password: str) -> Group:
    peers, first = [resolve(address) for address in params["peers"]], resolve(params["first"])
    if first not in peers:
        raise PreconditionFailed(f"first: {params['first']} is not one of peers.")
    return Group(
        peers,
        first,
        [resolve(address) for address in params["sentinels"]],
        params["master_name"],
        password,
        params["sentinel_password"],
    )


def reach(server: Server, before: str, dry: bool) -> Server | None:
    """The Redis that runs, asked with the password it takes; None where it is down, or is still to be installed."""
    if dry and shutil.which("redis-cli") is None:
        return None
    refused: AuthenticationFailed | None = None
    for password in dict.fromkeys((server.password, before, "")):
        candidate = Server(server.port, password, server.timeout)
        try:
            candidate.ask("PING")
        except AuthenticationFailed as exc:
            refused = refused or exc
        except ConnectionFailed:
            return None
        else:
            return candidate
    raise AuthenticationFailed(
        f"Redis on port {server.port} takes neither celery_redis_password nor celeryops_redis_password_before. To"
        " change the administrator's password give the present one as celeryops_redis_password_before."
    ) from refused


def run(body: Callable[[AnsibleModule, Server], dict[str, Any]], argument_spec: dict[str, Any]) -> None:
    """Run one module: `body` returns the result or raises CeleryOpsError."""
    module = AnsibleModule(argument_spec={**ARGUMENT_SPEC, **argument_spec}, supports_check_mode=True)
    server = Server(module.params["port"], module.params["password"])
    try:
        result = body(module, server)
    except CeleryOpsError as exc:
        module.fail_json(msg=exc.msg, category=exc.category, **exc.data)
    module.exit_json(**result)


def systemctl(module: AnsibleModule, verb: str, unit: str) -> None:
    command = [module.get_bin_path("systemctl", required=True), verb, unit]
    rc, out, err = module.run_command(command)
    if rc:
        raise CeleryOpsError(f"systemctl {verb} {unit} failed: {(err or out).strip()}. Look at journalctl -u {unit}.")
