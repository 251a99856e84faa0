#!/usr/bin/python
# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: celery_beat_stop
short_description: End beat processes that no unit of the collection runs
version_added: 0.1.0
author:
  - celeryops contributors (@celeryops)
description:
  - Ends processes which M(celeryops.runbook.celery_host_info) found, each named by its number and by when it began, so
    that no other process is ever hit.
  - A process gets SIGTERM, and after O(stop_timeout) seconds SIGKILL. One that is frozen is thawed first.
  - Fails if something starts such a beat again, and names it.
  - Needs no broker and no Celery.
extends_documentation_fragment:
  - celeryops.runbook.application
  - celeryops.runbook.attributes.host
options:
  app:
    description:
      - The application as Celery's C(-A) takes it. A beat that was started by hand is known by it.
    type: str
    default: ""
  root:
    description: The directory of the releases. Default C(/srv/NAME).
    type: path
  processes:
    description: The processes. One that has ended meanwhile is passed over.
    type: list
    elements: dict
    required: true
    suboptions:
      pid:
        description: Its number.
        type: int
        required: true
      began:
        description: When it began, in the kernel's ticks.
        type: int
        required: true
  stop_timeout:
    description: Seconds after which a process that has not ended is killed.
    type: float
    default: 10.0
seealso:
  - module: celeryops.runbook.celery_host_info
  - module: celeryops.runbook.celery_beat_info
"""

EXAMPLES = r"""
- name: End a beat that somebody started by hand
  celeryops.runbook.celery_beat_stop:
    name: shop
    app: shop.celery:app
    processes:
      - {pid: 4711, began: 882113}
"""

RETURN = r"""
ended:
  description: The processes that were ended.
  returned: success
  type: list
  elements: int
killed:
  description: Those of them that had to be killed.
  returned: success
  type: list
  elements: int
"""

import os
import signal
import time
from typing import Any

from ansible.module_utils.basic import AnsibleModule

from ansible_collections.celeryops.runbook.plugins.module_utils._host import Processes, beats, is_beat

# Seconds in which a supervisor would have started it anew.
AGAIN = 2.0


def alive(pid: int, began: int) -> bool:
    processes = Processes()
    return processes.began.get(pid) == began and processes.state[pid] not in "ZX"


def end(module: AnsibleModule, pid: int, began: int, stop_timeout: float) -> str:
    """How it ended: nothing if it had, else `ended` or `killed`."""
    try:
        handle = os.pidfd_open(pid)  # from here on it is this process or none
    except ProcessLookupError:
        return ""
    try:
        processes = Processes()
        if processes.began.get(pid) != began or processes.state[pid] in "ZX":
            return ""
        if not is_beat(processes.arguments(pid)) or "worker" in processes.arguments(pid):
            module.fail_json(msg=f"processes: {pid} is no beat of its own. Look again with celery_host_info.")
        if module.check_mode:
            return "ended"
        for number, bound, how in ((signal.SIGTERM, stop_timeout, "ended"), (signal.SIGKILL, 10.0, "killed")):
            try:
                signal.pidfd_send_signal(handle, number)
                signal.pidfd_send_signal(handle, signal.SIGCONT)
            except ProcessLookupError:
                return how
            deadline = time.monotonic() + bound
            while time.monotonic() < deadline:
                if not alive(pid, began):
                    return how
                time.sleep(0.05)
    finally:
        os.close(handle)
    module.fail_json(msg=f"beat {pid} has not ended, though it was killed. Look at it: cat /proc/{pid}/status")
    raise SystemExit  # for type checkers


def started_again(module: AnsibleModule, before: set[int]) -> list[dict[str, Any]]:
    """Beats without a unit of ours which were not there before: somebody watches over them."""
    name = module.params["name"]
    root = module.params["root"] or f"/srv/{name}"
    deadline = time.monotonic() + AGAIN
    while True:
        found = [beat for beat in beats(Processes(), {}, module.params["app"], root) if beat["pid"] not in before]
        if found or time.monotonic() > deadline:
            return found
        time.sleep(0.2)


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "name": {"type": "str", "required": True},
            "config_dir": {"type": "path"},
            "app": {"type": "str", "default": ""},
            "root": {"type": "path"},
            "processes": {
                "type": "list",
                "elements": "dict",
                "required": True,
                "options": {"pid": {"type": "int", "required": True}, "began": {"type": "int", "required": True}},
            },
            "stop_timeout": {"type": "float", "default": 10.0},
        },
        supports_check_mode=True,
    )
    if module.params["stop_timeout"] <= 0:
        module.fail_json(msg=f"stop_timeout: must be above 0 seconds, not {module.params['stop_timeout']:g}.")
    before = set(Processes().parent)
    done: dict[int, str] = {}
    for process in module.params["processes"]:
        how = end(module, process["pid"], process["began"], module.params["stop_timeout"])
        if how:
            done[process["pid"]] = how
    result = {
        "changed": bool(done),
        "ended": sorted(done),
        "killed": sorted(pid for pid, how in done.items() if how == "killed"),
        "diff": {"before": "".join(f"beat {pid}\n" for pid in sorted(done)), "after": ""},
    }
    again = started_again(module, before) if done and not module.check_mode else []
    if again:
        places = ", ".join(f"pid {beat['pid']} in {beat['service'] or 'no unit'}" for beat in again)
        module.fail_json(
            msg=f"beat was ended and something starts it again: {places}. Stop and disable that, then run again.",
            again=again,
            **result,
        )
    module.exit_json(**result)


if __name__ == "__main__":
    main()
