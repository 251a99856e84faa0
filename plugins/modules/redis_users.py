#!/usr/bin/python
# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: redis_users
short_description: Users of the Redis of this host, in steps that shut nobody out
version_added: 0.1.0
description:
  - Writes the users into the file of C(aclfile), passwords as SHA-256 only, and tells the Redis that runs. Redis is not
    restarted, and no connection is closed but those of a user who goes.
  - O(step=prepare) adds users and passwords and takes none away, so that what runs with an earlier password goes on.
    O(step=finish) leaves those of O(users) only.
  - The user C(default) is the administrator of Redis, which roles and modules on its host are. Its password is
    O(password).
author:
  - celeryops contributors (@celeryops)
extends_documentation_fragment:
  - celeryops.runbook.redis_server
  - celeryops.runbook.attributes.host
options:
  password_before:
    description: The administrator's password until now, needed where it is to change while Redis runs.
    type: str
    default: ""
  users:
    description: The users beside the administrator.
    type: list
    elements: dict
    default: []
    suboptions:
      name:
        description: Name of the user.
        type: str
        required: true
      role:
        description:
          - What the user may do. V(worker) and V(beat) reach all keys of the application; V(producer) sends to
            O(users[].queues) and reads results; V(exporter) reads figures and events; V(operator) is for the modules of
            this collection; with O(replicas) also for a failover.
          - V(replica) and V(sentinel) are for the replicas and the Sentinels themselves.
          - V(other) may only connect, the rest comes from O(users[].keys) and O(users[].rules).
        type: str
        choices: [worker, beat, producer, exporter, operator, replica, sentinel, other]
        required: true
      password:
        description: Its password.
        type: str
        required: true
      queues:
        description: Queues that a producer sends to. Default O(queues).
        type: list
        elements: str
      databases:
        description: Databases it may choose. Default O(databases).
        type: list
        elements: int
      keys:
        description: More patterns of keys, such as V(cart:*).
        type: list
        elements: str
        default: []
      rules:
        description: More rules, as C(ACL SETUSER) takes them, such as V(+geoadd). They come last.
        type: list
        elements: str
        default: []
  queues:
    description: Queues of the application.
    type: list
    elements: str
    default: []
  key_prefix:
    description: The C(global_keyprefix) of the application.
    type: str
    default: ""
  databases:
    description: Databases of the broker and the result backend.
    type: list
    elements: int
    default: [0]
  replicas:
    description: How many replicas there are under Sentinel.
    type: int
    default: 0
  links:
    description:
      - Hosts of the other Redis servers. That they still replicate over a connection made with an earlier password does
        not hold up O(step=finish), since M(celeryops.runbook.redis_replica) has given them the new one.
    type: list
    elements: str
    default: []
  path:
    description: The file that C(aclfile) of the configuration names.
    type: path
    default: /etc/redis/celeryops.acl
  group:
    description: Group of the file, which root owns, mode 0640. Redis reads it and does not write it.
    type: str
    default: redis
  step:
    description: How far to go.
    type: str
    choices: [prepare, finish]
    default: prepare
  settle:
    description:
      - With O(step=finish), seconds to wait until no connection is left that is older than the newest password of its
        user. If some are left then, nothing is taken away, and the module fails.
    type: float
    default: 0.0
  confirm:
    description: Users which lose what O(step=finish) takes although such connections are left.
    type: list
    elements: str
    default: []
seealso:
  - module: celeryops.runbook.redis_clients_info
"""

EXAMPLES = r"""
- name: A worker, a shop that sends to two queues, and this collection
  celeryops.runbook.redis_users:
    password: "{{ vault_redis_password }}"
    queues: [default, email]
    users:
      - {name: worker, role: worker, password: "{{ vault_redis_worker }}"}
      - {name: shop, role: producer, password: "{{ vault_redis_shop }}"}
      - {name: operator, role: operator, password: "{{ vault_redis_operator }}"}
"""

RETURN = r"""
users:
  description: Each user with its C(role), how many C(passwords) it takes, how many C(connections) it has.
  returned: success
  type: dict
left:
  description: What O(step=finish) would still take away, V(password) or V(user), by user.
  returned: success
  type: dict
finished:
  description: Whether these are exactly the users asked for.
  returned: success
  type: bool
applied:
  description: Whether the Redis that runs has been told; false where it is down or was started without the file.
  returned: success
  type: bool
"""

import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

from ansible.module_utils.basic import AnsibleModule

from ansible_collections.celeryops.runbook.plugins.module_utils._redis import reach, run, write
from ansible_collections.celeryops.runbook.plugins.module_utils.engine import acl, clients
from ansible_collections.celeryops.runbook.plugins.module_utils.engine.backup import Server
from ansible_collections.celeryops.runbook.plugins.module_utils.engine.errors import (
    PreconditionFailed,
    WaitTimeout,
)
from ansible_collections.celeryops.runbook.plugins.module_utils.engine.replication import resolve

USER = {
    "name": {"type": "str", "required": True},
    "role": {"type": "str", "required": True, "choices": list(acl.ROLES)},
    "password": {"type": "str", "required": True, "no_log": True},
    "queues": {"type": "list", "elements": "str"},
    "databases": {"type": "list", "elements": "int"},
    "keys": {"type": "list", "elements": "str", "default": [], "no_log": False},
    "rules": {"type": "list", "elements": "str", "default": []},
}
ARGUMENT_SPEC: dict[str, Any] = {
    "password_before": {"type": "str", "no_log": True, "default": ""},
    "users": {"type": "list", "elements": "dict", "default": [], "options": USER},
    "queues": {"type": "list", "elements": "str", "default": []},
    "key_prefix": {"type": "str", "default": "", "no_log": False},
    "databases": {"type": "list", "elements": "int", "default": [0]},
    "replicas": {"type": "int", "default": 0},
    "links": {"type": "list", "elements": "str", "default": []},
    "path": {"type": "path", "default": "/etc/redis/celeryops.acl"},
    "group": {"type": "str", "default": "redis"},
    "step": {"type": "str", "choices": list(acl.STEPS), "default": "prepare"},
    "settle": {"type": "float", "default": 0.0},
    "confirm": {"type": "list", "elements": "str", "default": []},
}


def wanted(params: Mapping[str, Any]) -> list[acl.User]:
    acl.check(params["users"])
    found = [acl.administrator(params["password"])]
    for user in params["users"]:
        layout = acl.Layout(
            prefix=params["key_prefix"],
            queues=tuple(params["queues"] if user["queues"] is None else user["queues"]),
            databases=tuple(params["databases"] if user["databases"] is None else user["databases"]),
            replicas=params["replicas"],
        )
        rules = acl.rules(user["role"], layout, keys=user["keys"], extra=user["rules"])
        found.append(acl.User(user["name"], rules, (acl.digest(user["password"]),)))
    return found


def connections(server: Server) -> list[clients.Client]:
    rows = (dict(word.partition("=")[::2] for word in row.split()) for row in server.ask("CLIENT", "LIST").splitlines())
    return clients.parse(rows)


def older(server: Server, losing: Mapping[str, str], since: float, links: Sequence[str]) -> dict[str, list[str]]:
    """Hosts that are still connected as a user who goes, or since before the newest password of a user was there."""
    ours = {resolve(f"{host}:{server.port}").rpartition(":")[0] for host in links}
    found: dict[str, list[str]] = {}
    for client in connections(server):
        # CLIENT LIST counts whole seconds.
        early = losing.get(client.user) == "user" or client.age + 1 > time.time() - since
        linked = "S" in client.flags and client.host in ours
        if client.user in losing and early and not linked and client.command != "client|list":
            found.setdefault(client.user, []).append(client.host)
    return {user: sorted(set(hosts)) for user, hosts in found.items()}


def bring(module: AnsibleModule, server: Server) -> dict[str, Any]:
    params, dry = module.params, module.check_mode
    want = wanted(params)
    running = reach(server, params["password_before"], dry)
    path = params["path"]
    try:
        with open(path, encoding="utf-8") as handle:
            text = handle.read()
        since = os.path.getmtime(path)
    except FileNotFoundError:
        text, since = "", time.time()
    except OSError as exc:
        raise PreconditionFailed(f"path: {path} cannot be read: {exc.strerror}. Run as root (become).") from exc
    listed = running.ask("ACL", "LIST") if running else ""
    # One without the file takes it at its restart.
    live = running is not None and running.ask("CONFIG", "GET", "aclfile").splitlines()[1:] == [path]
    written, had = acl.parse(text), acl.parse(listed)
    found = acl.known(written, had)
    gentle = acl.plan(found, want, "prepare")
    plan = acl.plan(found, want, params["step"])
    waited: dict[str, list[str]] = {}
    if params["step"] == "finish" and live and running:
        losing = {name: what for name, what in gentle.left.items() if name not in params["confirm"]}
        end = time.monotonic() + (0 if dry else params["settle"])
        while waited := older(running, losing, since, params["links"]):
            if time.monotonic() >= end:
                break
            time.sleep(0.5)
        plan = gentle if waited else plan
    after = acl.text(plan.users)
    changed = after != text
    before, shown = acl.readable(written, had), {user.name: user for user in plan.users}
    if not dry:
        if changed and running:
            prove(running, plan)
        if live and running:
            has = tell(running, server, plan)
            if has.keys() != had.keys() or not all(user.same(had[name]) for name, user in has.items()):
                changed, before, shown = True, had, has
        if after != text:
            # Its time is that of the newest password: who is connected since before may have used another.
            keep = since if text and not acl.turned(found, plan.users) else None
            write(path, after, params["group"], keep)
    elif live:
        known = [user.name in found and {*found[user.name].hashes} == {*user.hashes} for user in plan.users]
        changed = changed or not all(known) or bool(plan.gone)
    if waited and not dry:
        names = ", ".join(f"{user} (from {', '.join(hosts)})" for user, hosts in waited.items())
        raise WaitTimeout(
            f"still connected since before the new password: {names}. They go on, and the old password is accepted."
            f" Restart them and run again, or give their users as celeryops_confirm={','.join(waited)}: then they are"
            " refused when they connect again.",
            left=plan.left,
        )
    count: dict[str, int] = {}
    if live and running and not dry:
        for client in connections(server):
            count[client.user] = count.get(client.user, 0) + 1
    roles = {user["name"]: user["role"] for user in params["users"]}
    return {
        "changed": changed,
        "users": {
            user.name: {
                "role": roles.get(user.name, "administrator" if user.name == acl.ADMINISTRATOR else ""),
                "passwords": len(user.hashes),
                "connections": count.get(user.name, 0),
            }
            for user in plan.users
        },
        "left": plan.left,
        "finished": not plan.left,
        "applied": live,
        "diff": {
            "before_header": path,
            "after_header": path,
            "before": acl.describe(before),
            "after": acl.describe(shown),
        },
    }


def tell(running: Server, server: Server, plan: acl.Plan) -> dict[str, acl.User]:
    """Bring the Redis that runs to the plan, the administrator last. The users it has then, as it tells them."""
    for user in [*plan.users[1:], plan.users[0]]:
        running.ask("ACL", "SETUSER", user.name, "reset", *user.words, hidden=True)
    # From here on it may take the new password only.
    for name in plan.gone:
        server.ask("ACL", "DELUSER", name)
    return acl.parse(server.ask("ACL", "LIST"))


def prove(running: Server, plan: acl.Plan) -> None:
    """Redis does not start with a file that it does not understand: let it try each user, off, under another name."""
    name = "celeryops-probe"
    try:
        for user in plan.users[1:]:
            running.ask("ACL", "SETUSER", name, "reset", *user.words, "off", hidden=True)
    finally:
        running.ask("ACL", "DELUSER", name)


def main() -> None:
    run(bring, ARGUMENT_SPEC)


if __name__ == "__main__":
    main()
