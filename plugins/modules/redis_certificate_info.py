#!/usr/bin/python
# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: redis_certificate_info
short_description: Would a client take this certificate, and does Redis show one that it takes
version_added: 0.1.0
description:
  - Judges a certificate, its key and its CA as OpenSSL will judge them at a connect, by a handshake in memory. Fails
    with all that is wrong - it has ended or has not begun, the key is of another one, another CA signed it, it is not
    for a name that clients use.
  - With O(server) it connects, verifies what Redis shows there, and fails if it is refused.
  - Reads only. Needs neither a tool nor a library, and writes no key to disk.
author:
  - celeryops contributors (@celeryops)
extends_documentation_fragment:
  - celeryops.runbook.attributes.host_info
options:
  certificate:
    description: The certificate in PEM, and behind it those between it and the CA.
    type: str
    default: ""
  key:
    description: Its private key in PEM, not encrypted.
    type: str
    default: ""
  ca:
    description: Certificates of the CAs to trust, in PEM. Empty with O(server) alone means those of the system.
    type: str
    default: ""
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
  server:
    description: A Redis to connect to, as C(HOST:PORT).
    type: str
  pair:
    description: File on this host with the client's own certificate and key, for O(server).
    type: path
  timeout:
    description: Seconds for the connection.
    type: float
    default: 5.0
seealso:
  - module: celeryops.runbook.redis_certificate
"""

EXAMPLES = r"""
- name: Would the new certificate do
  celeryops.runbook.redis_certificate_info:
    certificate: "{{ lookup('ansible.builtin.file', 'redis.crt') }}"
    key: "{{ vault_redis_key }}"
    ca: "{{ lookup('ansible.builtin.file', 'ca.crt') }}"
    names: [redis1]

- name: What Redis shows, as this host sees it
  celeryops.runbook.redis_certificate_info:
    server: redis1:6379
    ca: "{{ lookup('ansible.builtin.file', 'ca.crt') }}"
"""

RETURN = r"""
certificate:
  description: The certificate given, or else the one that Redis shows.
  returned: success
  type: dict
  sample:
    subject: redis1
    issuer: shop CA
    names: [redis1, 10.0.0.5]
    begins: 2026-11-01 00:00 UTC
    ends: 2027-01-30 00:00 UTC
    fingerprint: 8fee4859ff99c1909fe3654b76e55f662329ad20633c504b93c2b523f3ba96f0
days:
  description: Days until it ends.
  returned: success
  type: float
shown:
  description: Fingerprint of what the O(server) shows; empty without it.
  returned: success
  type: str
"""

from dataclasses import asdict
from typing import Any

from ansible.module_utils.basic import AnsibleModule

from ansible_collections.celeryops.runbook.plugins.module_utils.engine import certificates
from ansible_collections.celeryops.runbook.plugins.module_utils.engine.errors import CeleryOpsError, PreconditionFailed


def look(params: dict[str, Any]) -> certificates.Facts:
    host, _colon, port = params["server"].rpartition(":")
    if not host or not port.isdigit():
        raise PreconditionFailed(f"server: {params['server']} is not HOST:PORT, such as redis1:6379.")
    return certificates.look(
        host.strip("[]"), int(port), ca=params["ca"], pair=params["pair"] or "", timeout=params["timeout"]
    )


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "certificate": {"type": "str", "default": ""},
            "key": {"type": "str", "default": "", "no_log": True},
            "ca": {"type": "str", "default": ""},
            "names": {"type": "list", "elements": "str", "default": []},
            "purpose": {"type": "str", "choices": list(certificates.VARIABLES), "default": "server"},
            "server": {"type": "str"},
            "pair": {"type": "path"},
            "timeout": {"type": "float", "default": 5.0},
        },
        required_one_of=[("certificate", "server")],
        supports_check_mode=True,
    )
    params = module.params
    facts, shown = None, ""
    try:
        if params["certificate"]:
            verdict = certificates.judge(
                params["certificate"], params["key"], params["ca"], names=params["names"], purpose=params["purpose"]
            )
            facts = verdict.facts
            if verdict.strict:
                module.warn(
                    f"an application on Python 3.13 or newer refuses {facts.subject}: {verdict.strict}. Have it and its"
                    " CA issued with the extensions that RFC 5280 asks for (openssl x509v3_config)."
                )
        if params["server"]:
            seen = look(params)
            shown = seen.fingerprint
            facts = facts or seen
    except CeleryOpsError as error:
        module.fail_json(msg=error.msg, category=error.category)
    if facts is None:
        module.fail_json(msg="certificate: is empty, and no server is given")
    told = asdict(facts)
    told.update(begins=certificates.day(facts.begins), ends=certificates.day(facts.ends))
    module.exit_json(changed=False, certificate=told, days=round(facts.days(), 1), shown=shown)


if __name__ == "__main__":
    main()
