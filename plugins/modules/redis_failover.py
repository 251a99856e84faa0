#!/usr/bin/python
# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: redis_failover
short_description: Another primary for a Redis under Sentinel, planned or because the primary is dead
version_added: 0.1.0
description:
  - Where the primary lives, writes are paused, the replica catches up, the Sentinels promote it, and the old primary
    becomes its replica at once. No write that was acknowledged is lost.
  - Where the primary is dead, waits until the Sentinels have replaced it, or with O(force) has one of them do it at
    once. What the replica had not received is lost, as with any asynchronous replication.
  - Without O(wanted) a primary that answers is left alone.
  - Refuses where no replica is healthy, and where the Sentinels could not agree, before anything is touched.
author:
  - celeryops contributors (@celeryops)
extends_documentation_fragment:
  - celeryops.runbook.connection
  - celeryops.runbook.attributes
options:
  wanted:
    description: Address HOST:PORT that shall be the primary, or V(any) for a replica, the one that is least behind.
    type: str
  force:
    description: Promote a replica although the Sentinels cannot agree, or have not done it yet.
    type: bool
    default: false
  timeout:
    description: Seconds for each step. A dead primary is replaced after the Sentinels' own time to notice.
    type: float
    default: 60.0
seealso:
  - module: celeryops.runbook.redis_sentinel_info
"""

EXAMPLES = r"""
- name: Free a host for maintenance
  celeryops.runbook.redis_failover:
    environment_file: /etc/celeryops/shop/secret.env
    virtualenv: /srv/shop/current/venv
    wanted: 192.0.2.12:6379
"""

RETURN = r"""
action:
  description: What was found to do, V(none), V(switch), V(wait) or V(force).
  returned: success
  type: str
text:
  description: The same in words.
  returned: success
  type: str
before:
  description: Address of the primary before.
  returned: success
  type: str
primary:
  description: Address of the primary now, or that would be.
  returned: success
  type: str
gap:
  description: Seconds in which no write was taken, as far as this module caused it; null otherwise.
  returned: success
  type: float
behind:
  description: Bytes that the replica had to catch up while writes were paused; null where nothing was paused.
  returned: success
  type: int
fit:
  description: Replicas that could be promoted now, the best first.
  returned: success
  type: list
  elements: str
unfit:
  description: Others, and why not.
  returned: success
  type: dict
seconds:
  description: From the begin until the others follow.
  returned: success
  type: float
"""

import time
from typing import Any

from ansible_collections.celeryops.runbook.plugins.module_utils._module import CeleryModule, above_zero, run
from ansible_collections.celeryops.runbook.plugins.module_utils.engine import sentinel
from ansible_collections.celeryops.runbook.plugins.module_utils.engine.replication import resolve

ARGUMENT_SPEC = {
    "wanted": {"type": "str"},
    "force": {"type": "bool", "default": False},
    "timeout": {"type": "float", "default": 60.0},
}


def fail_over(module: CeleryModule) -> dict[str, Any]:
    params, begun = module.params, time.monotonic()
    above_zero(params, "timeout")
    wanted = params["wanted"] or ""
    wanted = wanted if wanted in ("", "any") else resolve(wanted)
    with module.broker() as broker, sentinel.Watch(broker) as watch:
        view = watch.settle(params["timeout"])
        before = view.primary
        todo = first = sentinel.plan(view, wanted=wanted, force=params["force"])
        done: dict[str, Any] = {"gap": None, "behind": None}
        primary = todo.target
        if not module.check_mode:
            if todo.action == "wait":
                view = watch.wait(before, params["timeout"])
                # Any of them may be promoted, or the old one be back.
                todo = sentinel.plan(view, wanted="" if wanted == "any" else wanted)
            if todo.action in ("switch", "force"):
                done = watch.fail_over(view, todo, params["timeout"])
            primary = todo.target
            view = watch.guarded(primary, params["timeout"] if first.action != "none" else 0)
    return {
        "changed": primary != before,
        "action": first.action,
        "text": first.text,
        "before": before,
        "primary": primary,
        **done,
        "fit": [node.address for node in view.replicas if node.address != primary],
        "unfit": {address: node.problem for address, node in view.nodes.items() if node.problem and address != primary},
        "seconds": round(time.monotonic() - begun, 2),
        "diff": {"before": f"primary {before}\n", "after": f"primary {primary}\n"},
    }


def main() -> None:
    run(fail_over, ARGUMENT_SPEC, supports_check_mode=True)


if __name__ == "__main__":
    main()
