#!/usr/bin/python
# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: celery_deploy_lock
short_description: Let only one deploy of an application run at a time
version_added: 0.1.0
description:
  - Takes, renews or gives back the deploy lock of an application, a record in its broker.
  - The lock ends by itself when it is not renewed within O(lease), so a dead controller blocks nobody for long.
author:
  - celeryops contributors (@celeryops)
extends_documentation_fragment:
  - celeryops.runbook.connection
  - celeryops.runbook.attributes
options:
  name:
    description: Name of the application.
    type: str
    required: true
  state:
    description:
      - V(held) takes the lock, or renews it where O(owner) holds it already; fails where another does.
      - V(released) gives it back, only if O(owner) holds it. Fine if nobody does.
    type: str
    choices: [held, released]
    default: held
  owner:
    description: Who deploys, the same text for each task of a run. A second run with the same text resumes the lock.
    type: str
    required: true
  lease:
    description: Seconds until the lock ends unless it is renewed.
    type: float
    default: 900.0
  takeover_token:
    description: Token of another owner's lock to take over. The refusal names it; it fits that one lock only.
    type: str
  controller:
    description: Host that runs the playbook, for the record.
    type: str
  pid:
    description: Process that runs the playbook, for the record.
    type: int
  release:
    description: Release that is deployed, for the record.
    type: str
  step:
    description: What the deploy is about to do, for the record.
    type: str
"""

EXAMPLES = r"""
- name: Only one deploy at a time
  celeryops.runbook.celery_deploy_lock:
    environment_file: /etc/celeryops/shop/secret.env
    virtualenv: /srv/shop/current/venv
    name: shop
    owner: "{{ lookup('ansible.builtin.env', 'USER') }}@{{ lookup('ansible.builtin.pipe', 'hostname') }}"
    release: v2
    step: batch 1

- name: Give it back
  celeryops.runbook.celery_deploy_lock:
    environment_file: /etc/celeryops/shop/secret.env
    virtualenv: /srv/shop/current/venv
    name: shop
    owner: "{{ lookup('ansible.builtin.env', 'USER') }}@{{ lookup('ansible.builtin.pipe', 'hostname') }}"
    state: released
"""

RETURN = r"""
lock:
  description: The lock as it is now, or would be in check mode; null if nobody holds it.
  returned: always
  type: dict
  sample:
    owner: deploy@control1
    token: 5ad1a2e2-7e0c-4f0e-8c7c-0f1b1f3f6a11
    started: 1795233743.2
    renewed: 1795233790.4
    controller: control1
    pid: 4711
    release: v2
    step: batch 1
previous:
  description: The lock as it was before, null if nobody held it.
  returned: always
  type: dict
resumed:
  description: Whether O(owner) held the lock already.
  returned: always
  type: bool
expires_in:
  description: Seconds until the lock ends unless it is renewed.
  returned: always
  type: float
holder:
  description: The lock of the other owner.
  returned: when another owner holds it
  type: dict
"""

import json
from dataclasses import asdict
from typing import Any

from ansible_collections.celeryops.runbook.plugins.module_utils._module import CeleryModule, run
from ansible_collections.celeryops.runbook.plugins.module_utils.engine.errors import PreconditionFailed
from ansible_collections.celeryops.runbook.plugins.module_utils.engine.records import (
    DeployLock,
    DeployLocks,
    deploy_lock_key,
)

ARGUMENT_SPEC = {
    "name": {"type": "str", "required": True},
    "state": {"type": "str", "choices": ["held", "released"], "default": "held"},
    "owner": {"type": "str", "required": True},
    "lease": {"type": "float", "default": 900.0},
    "takeover_token": {"type": "str", "no_log": False},
    "controller": {"type": "str"},
    "pid": {"type": "int"},
    "release": {"type": "str"},
    "step": {"type": "str"},
}


def _shown(lock: DeployLock | None) -> str:
    # Times and token differ in every run and say nothing about what changed.
    values = (
        {key: item for key, item in asdict(lock).items() if key not in ("token", "started", "renewed")} if lock else {}
    )
    return json.dumps(values, indent=2, sort_keys=True) + "\n"


def deploy_lock(module: CeleryModule) -> dict[str, Any]:
    params = module.params
    deploy_lock_key("", params["name"])
    if not params["owner"].strip():
        raise PreconditionFailed("owner: must not be empty. Name who deploys, such as user@controller.")
    if params["lease"] < 1:
        raise PreconditionFailed(f"lease: must be at least 1 second, not {params['lease']}.")
    with module.broker() as broker:
        locks = DeployLocks.of(broker, params["name"])
        if params["state"] == "held":
            change = locks.hold(
                owner=params["owner"],
                lease=params["lease"],
                takeover_token=params["takeover_token"] or "",
                controller=params["controller"] or "",
                pid=params["pid"] or 0,
                release=params["release"] or "",
                step=params["step"] or "",
                dry=module.check_mode,
            )
        else:
            change = locks.release(
                owner=params["owner"], takeover_token=params["takeover_token"] or "", dry=module.check_mode
            )
    return {
        "changed": change.changed,
        "lock": asdict(change.after) if change.after else None,
        "previous": asdict(change.before) if change.before else None,
        "resumed": change.resumed,
        "expires_in": change.expires_in,
        "diff": {"before": _shown(change.before), "after": _shown(change.after)},
    }


def main() -> None:
    run(deploy_lock, ARGUMENT_SPEC, supports_check_mode=True)


if __name__ == "__main__":
    main()
