#!/usr/bin/python
# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: redis_certificate
short_description: Certificate and trusted CAs of a host for TLS to Redis, in steps that shut nobody out
version_added: 0.1.0
description:
  - Keeps a certificate with its key in one file, so that both change at once, and the CAs that this host trusts in
    another. Clients read them at each connect. With O(tell) the Redis of this host takes them up too, without a restart
    and without closing a connection.
  - A fleet changes them in three steps, each done on all hosts before the next begins. What would not do is refused
    before anything is written, as M(celeryops.runbook.redis_certificate_info) does.
author:
  - celeryops contributors (@celeryops)
extends_documentation_fragment:
  - celeryops.runbook.redis_server
  - celeryops.runbook.attributes.host
options:
  certificate:
    description: The certificate in PEM, and behind it those between it and the CA. Empty where the host only trusts.
    type: str
    default: ""
  key:
    description: Its private key in PEM, not encrypted.
    type: str
    default: ""
  ca:
    description: Certificates of the CAs to trust, in PEM.
    type: str
    required: true
  names:
    description: Names and addresses that clients connect to; the certificate must be for each.
    type: list
    elements: str
    default: []
  purpose:
    description: Whose certificate it is, V(server) for that of Redis.
    type: str
    choices: [server, client]
    default: server
  path:
    description: File of certificate and key, root's and O(group)'s, mode 0640.
    type: path
    required: true
  ca_path:
    description: File of the CAs, mode 0644.
    type: path
    required: true
  group:
    description: Who may read the key beside root.
    type: str
    default: redis
  step:
    description:
      - V(trust) trusts O(ca) and goes on trusting those before. The certificate is written only where there is none.
      - V(serve) writes the certificate too.
      - V(finish) trusts O(ca) only, and removes O(path) where there is no O(certificate).
    type: str
    choices: [trust, serve, finish]
    default: trust
  tell:
    description: Whether the Redis of this host uses these files and is to read them again.
    type: bool
    default: false
seealso:
  - module: celeryops.runbook.redis_certificate_info
"""

EXAMPLES = r"""
- name: Another certificate for the Redis that runs
  celeryops.runbook.redis_certificate:
    certificate: "{{ lookup('ansible.builtin.file', 'redis.crt') }}"
    key: "{{ vault_redis_key }}"
    ca: "{{ lookup('ansible.builtin.file', 'ca.crt') }}"
    names: [redis1]
    path: /etc/redis/celeryops.pem
    ca_path: /etc/redis/celeryops-ca.pem
    password: "{{ vault_redis_password }}"
    step: serve
    tell: true
"""

RETURN = r"""
certificate:
  description: The certificate in the file from now on, in words; empty for none.
  returned: success
  type: str
  sample: redis1, from shop CA, until 2027-01-30 00:00 UTC, SHA-256 8fee4859ff99c190
serves:
  description: Whether the file holds the certificate asked for.
  returned: success
  type: bool
left:
  description: CAs that are trusted beside those asked for, in words. O(step=finish) takes them away.
  returned: success
  type: list
  elements: str
  sample: ["shop CA (1ad5ba699bb7afe2)"]
told:
  description: Whether the Redis that runs uses the files; false where it is down, or was started without them.
  returned: success
  type: bool
"""

import os
import shutil
from typing import Any

from ansible.module_utils.basic import AnsibleModule

from ansible_collections.celeryops.runbook.plugins.module_utils._redis import run, write
from ansible_collections.celeryops.runbook.plugins.module_utils.engine import certificates
from ansible_collections.celeryops.runbook.plugins.module_utils.engine.backup import Refused, Server
from ansible_collections.celeryops.runbook.plugins.module_utils.engine.errors import CeleryOpsError, PreconditionFailed

ARGUMENT_SPEC: dict[str, Any] = {
    "certificate": {"type": "str", "default": ""},
    "key": {"type": "str", "default": "", "no_log": True},
    "ca": {"type": "str", "required": True},
    "names": {"type": "list", "elements": "str", "default": []},
    "purpose": {"type": "str", "choices": list(certificates.VARIABLES), "default": "server"},
    "path": {"type": "path", "required": True},
    "ca_path": {"type": "path", "required": True},
    "group": {"type": "str", "default": "redis"},
    "step": {"type": "str", "choices": list(certificates.STEPS), "default": "trust"},
    "tell": {"type": "bool", "default": False},
}


def read(path: str, mode: int) -> tuple[str, bool]:
    """The text, and whether the file has this mode."""
    try:
        with open(path, encoding="utf-8") as handle:
            return handle.read(), os.fstat(handle.fileno()).st_mode & 0o777 == mode
    except FileNotFoundError:
        return "", False
    except (OSError, UnicodeDecodeError) as exc:
        raise PreconditionFailed(f"{path} cannot be read: {exc}. Run as root (become), or remove it.") from exc


def uses(server: Server, path: str) -> bool:
    """Does a Redis run here with this file."""
    if shutil.which("redis-cli") is None:
        return False
    try:
        return server.ask("CONFIG", "GET", "tls-cert-file").splitlines()[1:] == [path]
    except CeleryOpsError:
        return False  # it is down, or takes the password only after its restart


def tell(server: Server, path: str, ca_path: str) -> None:
    """Redis reads the files again although their names stay; connections stay too."""
    try:
        server.ask("CONFIG", "SET", "tls-cert-file", path, "tls-key-file", path, "tls-ca-cert-file", ca_path)
    except Refused as exc:
        raise CeleryOpsError(
            f"Redis does not take the certificate up: {exc.msg}. It goes on with the former. Look at its log; it must"
            f" be able to read {path} and {ca_path}."
        ) from exc


def bring(module: AnsibleModule, server: Server) -> dict[str, Any]:
    params, dry, step = module.params, module.check_mode, module.params["step"]
    path, ca_path = params["path"], params["ca_path"]
    if params["certificate"]:
        certificates.judge(
            params["certificate"], params["key"], params["ca"], names=params["names"], purpose=params["purpose"]
        )
    elif not certificates.blocks(params["ca"]):
        raise PreconditionFailed(f"{certificates.CA}: holds no certificate in PEM; give its contents, or its file.")
    pair, fits = read(path, 0o640)
    trusts, open_to_all = read(ca_path, 0o644)
    wanted = certificates.joined(params["certificate"], params["key"]) if params["certificate"] else ""
    after = pair if pair and (step == "trust" or (step == "serve" and not wanted)) else wanted
    bundle, left = certificates.trusted(trusts, params["ca"], step)
    # Who trusts more comes before who shows another one.
    files = [
        (ca_path, trusts, bundle, 0o644, open_to_all),
        (path, pair, after, 0o640, fits),
    ]
    todo = [(name, text, mode) for name, before, text, mode, well in files if text != before or (text and not well)]
    live = params["tell"] and uses(server, path)
    stale = live and certificates.shown(server.host, server.port) not in ("", certificates.leaf(after))
    if not dry:
        for name, text, mode in todo:
            if text:
                write(name, text, params["group"] if mode == 0o640 else "root", mode=mode)
            else:
                os.unlink(name)
        if live and (todo or stale or step != "trust"):
            try:
                tell(server, path, ca_path)
            except CeleryOpsError:
                for name, before, _text, mode, _well in files:
                    if before:
                        write(name, before, params["group"] if mode == 0o640 else "root", mode=mode)
                raise
            if certificates.shown(server.host, server.port) not in ("", certificates.leaf(after)):
                raise CeleryOpsError(
                    f"Redis on port {server.port} was told to read {path} again and still shows another certificate."
                )
    return {
        "changed": bool(todo or stale),
        "certificate": certificates.text_of(after, bundle, params["purpose"]),
        "serves": not wanted or after == wanted,
        "left": left,
        "told": live,
        "diff": {
            "before_header": path,
            "after_header": path,
            "before": describe(pair, trusts, params["purpose"]),
            "after": describe(after, bundle, params["purpose"]),
        },
    }


def describe(pair: str, trusts: str, purpose: str) -> str:
    shows = [f"shows {certificates.text_of(pair, trusts, purpose)}"] if pair else []
    trusted = (f"trusts {certificates.label(block)}" for block in certificates.blocks(trusts))
    return "".join(f"{line}\n" for line in [*shows, *trusted])


def main() -> None:
    run(bring, ARGUMENT_SPEC)


if __name__ == "__main__":
    main()
