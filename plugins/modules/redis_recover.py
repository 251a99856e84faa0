#!/usr/bin/python
# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: redis_recover
short_description: Find out what is wrong with the Redis of this host, and cure it where no decision is needed
version_added: 0.1.0
description:
  - Tells apart a Redis that is down, loading, stopped by a signal, a replica, out of memory or disk or clients, that
    has a broken append-only file or another password, and one that hangs.
  - Starts it, lets it go on, waits for it, or cuts off what a crash left half written at the end of the append-only
    file, after keeping a copy.
  - What would lose data or needs to be decided fails with what a person must do, and touches nothing.
author:
  - celeryops contributors (@celeryops)
extends_documentation_fragment:
  - celeryops.runbook.redis_server
  - celeryops.runbook.attributes.host
options:
  cut:
    description:
      - Repair an append-only file that is damaged in its midst too. All that comes after the damage is lost, but for
        the copy that is kept.
    type: bool
    default: false
  config:
    description: The configuration of Redis. Says where its data is when it does not answer.
    type: path
    default: /etc/redis/redis.conf
  unit:
    description: The systemd unit of Redis.
    type: str
    default: redis-server.service
  timeout:
    description: Seconds that Redis may need to load its data.
    type: float
    default: 600.0
seealso:
  - module: celeryops.runbook.redis_restore
"""

EXAMPLES = r"""
- name: Bring Redis back
  celeryops.runbook.redis_recover:
    password: "{{ celery_redis_password }}"
"""

RETURN = r"""
state:
  description:
    - What was found, V(healthy), V(down), V(loading), V(frozen), V(aof_truncated), V(aof_damaged), V(base_damaged),
      V(disk_full), V(snapshot_failed), V(out_of_memory), V(replica), V(wrong_password), V(max_clients), V(busy) or
      V(wedged).
  returned: always
  type: str
text:
  description: The same in words.
  returned: always
  type: str
done:
  description: What was done, in order.
  returned: success
  type: list
  elements: str
copy:
  description: Directory with the append-only file as it was before a repair, empty without one.
  returned: success
  type: str
cut:
  description: Bytes that a repair cut off.
  returned: success
  type: int
seconds:
  description: From the begin until Redis answered.
  returned: success
  type: float
"""

import os
import signal
import time
from typing import Any

from ansible.module_utils.basic import AnsibleModule

from ansible_collections.celeryops.runbook.plugins.module_utils._redis import run, systemctl
from ansible_collections.celeryops.runbook.plugins.module_utils.engine import backup, recover, restore
from ansible_collections.celeryops.runbook.plugins.module_utils.engine.errors import CeleryOpsError

ARGUMENT_SPEC = {
    "cut": {"type": "bool", "default": False},
    "config": {"type": "path", "default": "/etc/redis/redis.conf"},
    "unit": {"type": "str", "default": "redis-server.service"},
    "timeout": {"type": "float", "default": 600.0},
}


def main_pid(module: AnsibleModule) -> int:
    systemd = module.get_bin_path("systemctl", required=True)
    shown = module.run_command([systemd, "show", "-P", "MainPID", module.params["unit"]])[1].strip()
    return int(shown) if shown.isdigit() else 0


def bring_up(module: AnsibleModule, server: backup.Server) -> dict[str, Any]:
    params, begun = module.params, time.monotonic()
    settings = backup.read_settings(params["config"])
    pid = main_pid(module)
    finding = recover.diagnose(server, settings, pid)
    cure = finding.cure
    if finding.state == "aof_damaged" and params["cut"]:
        cure = "repair"
    if finding.human and not cure:
        raise CeleryOpsError(f"{finding.text} {finding.human}", state=finding.state, text=finding.text)
    result: dict[str, Any] = {
        "changed": cure not in ("", "wait"),
        "state": finding.state,
        "text": finding.text,
        "done": [cure] if cure else [],
        "copy": "",
        "cut": 0,
        "diff": {"before": f"{finding.state}\n", "after": "healthy\n"},
    }
    if cure and not module.check_mode:
        if cure == "repair":
            # Systemd may be starting it again and again.
            systemctl(module, "stop", params["unit"])
            result |= recover.repair(settings, finding)
        if cure == "continue":
            os.kill(pid, signal.SIGCONT)
        elif cure != "wait":
            module.run_command([module.get_bin_path("systemctl", required=True), "reset-failed", params["unit"]])
            systemctl(module, "start", params["unit"])
        restore.wait_loaded(server, params["timeout"])
        after = recover.diagnose(server, settings, main_pid(module))
        if after.state != "healthy":
            raise CeleryOpsError(f"{after.text} {after.human}", state=after.state, text=after.text)
    result["seconds"] = round(time.monotonic() - begun, 2)
    return result


def main() -> None:
    run(bring_up, ARGUMENT_SPEC)


if __name__ == "__main__":
    main()
