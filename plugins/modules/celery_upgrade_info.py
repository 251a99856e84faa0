#!/usr/bin/python
# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: celery_upgrade_info
short_description: Tell what would break if a release with other versions of Celery took over
version_added: 0.1.0
author:
  - celeryops contributors (@celeryops)
description:
  - Compares the libraries of the release that runs with those of a release that is built, as their own interpreters
    tell them, the settings of both applications, and what lies in the broker.
  - Applies the changes that Celery and kombu document for 5.3 to 5.7, and returns those which matter here. A version
    whose changes are not known is said to be unknown.
  - Never changes anything, and does not fail because of what it finds. For brokers on Redis.
extends_documentation_fragment:
  - celeryops.runbook.connection
  - celeryops.runbook.attributes.info
options:
  running:
    description: Directory of the release that runs, with C(venv) and C(release.json) in it.
    type: path
    required: true
  release:
    description: Directory of the release that is to take over.
    type: path
    required: true
  queues:
    description: Queues whose messages are looked at. What workers hold is always looked at.
    type: list
    elements: str
    default: []
  most:
    description: Messages to look at in each queue, the newest first. Where more wait, a warning says so.
    type: int
    default: 20000
seealso:
  - module: celeryops.runbook.celery_release_gate
"""

EXAMPLES = r"""
- name: What would break with release v2?
  celeryops.runbook.celery_upgrade_info:
    environment_file: /etc/celeryops/shop/secret.env
    virtualenv: /srv/shop/current/venv
    running: /srv/shop/releases/v1
    release: /srv/shop/releases/v2
    queues: [default, email]
"""

RETURN = r"""
findings:
  description: What applies here, what refuses the upgrade first.
  returned: always
  type: list
  elements: dict
  contains:
    id:
      description: Name of the finding.
      type: str
    severity:
      description: V(refuse) or V(warn).
      type: str
    versions:
      description: The versions that cause it, if versions do.
      type: str
    what:
      description: What happens.
      type: str
    cure:
      description: What to do about it.
      type: str
    source:
      description: The document that says so.
      type: str
  sample:
    - id: control-queue-exclusive
      severity: refuse
      versions: celery 5.6.3 -> 5.7.0, since 5.7
      what: control_queue_exclusive is on by default, and together with control_queue_durable it is an error
      cure: drop control_queue_durable, or set control_queue_exclusive = False
      source: Celery, User Guide, Configuration and defaults, control_queue_exclusive
refused:
  description: Whether a finding refuses the upgrade.
  returned: always
  type: bool
running:
  description: Versions of Python and the libraries in the release that runs.
  returned: always
  type: dict
  sample: {python: 3.11.2, celery: 5.6.3, kombu: 5.6.2, billiard: 4.3.2, redis: 6.4.0}
new:
  description: The same of the release that is to take over.
  returned: always
  type: dict
waiting:
  description: What was read in the broker.
  returned: always
  type: dict
  contains:
    content:
      description: Messages by content type.
      type: dict
    protocols:
      description: Messages by version of Celery's message protocol.
      type: dict
    unreadable:
      description: Messages of no protocol that is known.
      type: int
    held:
      description: Messages that workers hold, those with an ETA among them.
      type: int
"""

import json
import os
from dataclasses import asdict
from typing import Any
from urllib.parse import urlsplit

from ansible_collections.celeryops.runbook.plugins.module_utils._module import CeleryModule, run
from ansible_collections.celeryops.runbook.plugins.module_utils.engine.errors import PreconditionFailed
from ansible_collections.celeryops.runbook.plugins.module_utils.engine.queues import RedisQueues
from ansible_collections.celeryops.runbook.plugins.module_utils.engine.upgrade import (
    PROBE,
    REFUSE,
    Case,
    Release,
    census,
    judge,
)

ARGUMENT_SPEC = {
    "running": {"type": "path", "required": True},
    "release": {"type": "path", "required": True},
    "queues": {"type": "list", "elements": "str", "default": []},
    "most": {"type": "int", "default": 20_000},
}


def read(module: CeleryModule, option: str) -> Release:
    folder = module.params[option]
    python, file = (os.path.join(folder, part) for part in ("venv/bin/python", "release.json"))
    try:
        with open(file, encoding="utf-8") as handle:
            described = json.load(handle)
    except (OSError, ValueError) as exc:
        raise PreconditionFailed(f"{option}: {file} cannot be read: {exc}. Build the release first.") from exc
    if not isinstance(described, dict):
        raise PreconditionFailed(f"{option}: {file} does not describe a release. Build the release again.")
    code, out, err = module.ansible.run_command([python, "-I", "-c", PROBE], handle_exceptions=False)
    if code:
        raise PreconditionFailed(f"{option}: {python} does not tell its libraries: {err.strip()[-300:]}")
    return Release.read(json.loads(out), described)


def upgrade(module: CeleryModule) -> dict[str, Any]:
    params = module.params
    if params["most"] < 1:
        raise PreconditionFailed(f"most: must be at least 1 message, not {params['most']}.")
    running, new = read(module, "running"), read(module, "release")
    if new.values is None:
        raise PreconditionFailed(
            f"release: {params['release']}/release.json does not tell the application's settings: an older version of "
            f"this collection has built it. Build it again under a new id."
        )
    with module.broker() as broker:
        if broker.kind != "redis":
            raise PreconditionFailed("broker_url: what waits is read in a Redis broker only.")
        waiting = census(RedisQueues.of(broker), params["queues"], params["most"])
        transport = urlsplit(broker.spec.url).scheme
    if not waiting.complete:
        module.warn(f"not every message was read: more than {params['most']} wait in a queue or are held")
    findings = judge(Case(running, new, transport, waiting))
    return {
        "changed": False,
        "findings": [asdict(one) for one in findings],
        "refused": any(one.severity == REFUSE for one in findings),
        "running": {"python": running.python, **running.packages},
        "new": {"python": new.python, **new.packages},
        "waiting": {
            "content": dict(waiting.content),
            "protocols": {str(number): count for number, count in waiting.protocols.items()},
            "unreadable": waiting.unreadable,
            "held": waiting.held,
        },
    }


def main() -> None:
    run(upgrade, ARGUMENT_SPEC, supports_check_mode=True)


if __name__ == "__main__":
    main()
