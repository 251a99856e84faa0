#!/usr/bin/python
# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: celery_probe_info
short_description: Count the probe tasks that the workers of a host have noted
version_added: 0.1.0
author:
  - celeryops contributors (@celeryops)
description:
  - Reads what the workers of the host noted about the probes that M(celeryops.runbook.celery_probe) sends; asks neither
    broker nor workers.
  - Waits on request until all workers have begun one, or until nothing is noted any more.
  - On the host that sends, and with the results of the other hosts in O(noted), tells what became of them all.
extends_documentation_fragment:
  - celeryops.runbook.attributes.host_info
options:
  name:
    description: The application's name in units and directories, the variable C(celeryops_app_name).
    type: str
    required: true
  run:
    description: Name of the run, 4 to 32 small letters and digits.
    type: str
    required: true
  instances:
    description: The worker instances of the host that are to begin a probe after O(since), such as V(default-1).
    type: list
    elements: str
    default: []
  since:
    description: Seconds since 1970 on the controller's clock; the clocks of the hosts have to agree.
    type: float
    default: 0.0
  timeout:
    description: Seconds to wait for O(instances), and for O(quiet). Whoever has not begun by then is in RV(missing).
    type: float
    default: 0.0
  quiet:
    description: Wait until nothing was noted for so many seconds, and what had begun has ended.
    type: float
    default: 0.0
  noted:
    description: The RV(noted) of every worker host. Given on the host that sends, RV(account) is returned.
    type: list
    elements: dict
  state_dir:
    description: The state directory of the worker units. Default C(/var/lib/celery-NAME).
    type: path
seealso:
  - module: celeryops.runbook.celery_probe
"""

EXAMPLES = r"""
- name: Wait until both workers of the host work again
  celeryops.runbook.celery_probe_info:
    name: shop
    run: 1a2b3c
    instances: [fast-1, bulk-1]
    since: 1795324512.4
    timeout: 60
"""

RETURN = r"""
noted:
  description: What the workers of the host noted.
  returned: always
  type: dict
  contains:
    begun:
      description: Number of a probe, and how often it was begun.
      type: dict
    done:
      description: The probes that were done.
      type: list
    times:
      description: When probes were begun, in seconds since 1970.
      type: list
    first:
      description: When each instance began its first one after O(since).
      type: dict
missing:
  description: Those of O(instances) that have begun none.
  returned: always
  type: list
  elements: str
account:
  description: What became of the probes of the run.
  returned: with O(noted)
  type: dict
  contains:
    sent:
      description: How many the broker has acknowledged.
      type: int
    refused:
      description: How many it has not.
      type: int
    done:
      description: How many of those sent were done.
      type: int
    lost:
      description: Those that were sent and not done.
      type: list
    lost_late:
      description: Those of them that are acknowledged late.
      type: list
    lost_begun:
      description: Those of them that a worker had begun.
      type: list
    run_twice:
      description: Those that were begun more than once.
      type: list
    gap:
      description: The longest time in which no worker began one, in seconds.
      type: float
"""

import os
import time
from typing import Any

from ansible.module_utils.basic import AnsibleModule

from ansible_collections.celeryops.runbook.plugins.module_utils._probe import argument_spec, notes, place, read
from ansible_collections.celeryops.runbook.plugins.module_utils.engine import probes

PAUSE = 0.1


def size(directory: str) -> int:
    with os.scandir(directory) as entries:
        return sum(entry.stat().st_size for entry in entries if entry.name.endswith(probes.NOTES))


def settle(directory: str, quiet: float, deadline: float) -> None:
    last, since = size(directory), time.monotonic()
    while time.monotonic() < deadline:
        if time.monotonic() - since >= quiet:
            found = probes.summary(notes(directory))
            if set(found["begun"]) <= {str(number) for number in found["done"]}:
                return
        time.sleep(PAUSE)
        now = size(directory)
        if now != last:
            last, since = now, time.monotonic()


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            **argument_spec(),
            "instances": {"type": "list", "elements": "str", "default": []},
            "since": {"type": "float", "default": 0.0},
            "timeout": {"type": "float", "default": 0.0},
            "quiet": {"type": "float", "default": 0.0},
            "noted": {"type": "list", "elements": "dict"},
        },
        supports_check_mode=True,
    )
    params = module.params
    directory = place(module)
    if not os.path.isdir(directory):
        module.fail_json(msg=f"run: there is no {directory} on this host. Make it with celery_probe, state ready.")
    deadline = time.monotonic() + params["timeout"]
    if params["quiet"]:
        settle(directory, params["quiet"], deadline)
    while True:
        found = probes.summary(notes(directory), params["since"])
        missing = sorted(set(params["instances"]) - set(found["first"]))
        if not missing or time.monotonic() >= deadline:
            break
        time.sleep(PAUSE)
    result: dict[str, Any] = {"noted": found, "missing": missing}
    if params["noted"] is not None:
        sent = {number: when for _phase, number, when in probes.parse(read(os.path.join(directory, probes.SENT)))}
        refused = read(os.path.join(directory, probes.REFUSED)).strip()
        result["account"] = probes.account(sent, int(refused or 0), params["noted"])
    module.exit_json(changed=False, **result)


if __name__ == "__main__":
    main()
