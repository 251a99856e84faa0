# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Private to the collection: modules that act on the Redis of their own host, without a library."""

from __future__ import annotations

import contextlib
import grp
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from ansible.module_utils.basic import AnsibleModule

from .engine.backup import Server
from .engine.errors import AuthenticationFailed, CeleryOpsError, ConnectionFailed, PreconditionFailed
from .engine.replication import Group, resolve

ARGUMENT_SPEC: dict[str, Any] = {
    "port": {"type": "int", "default": 6379},
    "password": {"type": "str", "no_log": True, "default": ""},
    "socket": {"type": "path", "default": ""},
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
        candidate = replace(server, password=password)
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


def run(
    body: Callable[[AnsibleModule, Server], dict[str, Any]],
    argument_spec: dict[str, Any],
    common: Mapping[str, Any] | None = None,
) -> None:
    """Run one module: `body` returns the result or raises CeleryOpsError."""
    module = AnsibleModule(
        argument_spec={**(ARGUMENT_SPEC if common is None else common), **argument_spec}, supports_check_mode=True
    )
    server = Server(module.params["port"], module.params["password"], socket=module.params.get("socket", ""))
    try:
        result = body(module, server)
    except CeleryOpsError as exc:
        module.fail_json(msg=exc.msg, category=exc.category, **exc.data)
    module.exit_json(**result)


def write(path: str, text: str, group: str, mtime: float | None = None, mode: int = 0o640) -> None:
    """At once and whole, root's and the group's."""
    temporary = f"{path}.{os.getpid()}"
    try:
        number = grp.getgrnam(group).gr_gid
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as handle:
            handle.write(text)
            handle.flush()
            os.fsync(handle.fileno())
            os.fchown(handle.fileno(), 0 if os.geteuid() == 0 else -1, number)
            os.fchmod(handle.fileno(), mode)
            if mtime is not None:
                os.utime(handle.fileno(), (mtime, mtime))
        os.replace(temporary, path)
    except OSError as exc:
        raise CeleryOpsError(f"path: {path} cannot be written: {exc.strerror}. Run as root (become).") from exc
    except KeyError as exc:
        raise CeleryOpsError(f"group: there is no group {group} on this host; the role makes it.") from exc
    finally:
        with contextlib.suppress(OSError):
            os.unlink(temporary)


def systemctl(module: AnsibleModule, verb: str, unit: str) -> None:
    command = [module.get_bin_path("systemctl", required=True), verb, unit]
    rc, out, err = module.run_command(command)
    if rc:
        raise CeleryOpsError(f"systemctl {verb} {unit} failed: {(err or out).strip()}. Look at journalctl -u {unit}.")
