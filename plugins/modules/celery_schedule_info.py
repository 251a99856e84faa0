#!/usr/bin/python
# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: celery_schedule_info
short_description: Look at the schedule of beat
version_added: 0.1.0
description:
  - Returns every entry of the application's C(beat_schedule), when it ran last and is due next, where it is sent, and
    whether it is disabled.
  - When entries ran is known from the records that beat leaves in Redis, so it is right whichever host runs beat.
  - The application is imported in a process of its own, with the environment of the workers.
author:
  - celeryops contributors (@celeryops)
extends_documentation_fragment:
  - celeryops.runbook.schedule
  - celeryops.runbook.connection
  - celeryops.runbook.attributes.info
options:
  arguments:
    description: Return the arguments and options of the entries too. They may hold secrets.
    type: bool
    default: false
  file:
    description: The file of beat's schedule, without a suffix; it is looked at whether it can be read.
    type: path
seealso:
  - module: celeryops.runbook.celery_schedule
  - module: celeryops.runbook.celery_schedule_file
"""

EXAMPLES = r"""
- name: Look at the schedule
  celeryops.runbook.celery_schedule_info:
    environment_file: /etc/celeryops/shop/secret.env
    virtualenv: /srv/shop/current/venv
    application: shop
    app: shop.celery:app
    app_dir: /srv/shop/current/src
    user: shop
"""

RETURN = r"""
entries:
  description: The entries by name. Times are unix seconds; C(last) is null for one that never ran.
  returned: success
  type: dict
  sample:
    nightly:
      task: shop.sales_report
      schedule: "crontab: 30 2 * * * (m/h/dM/MY/d)"
      queue: reports
      last: 1795000000.0
      next: 1795086400.0
      runs: 12
      disabled: null
disabled:
  description: The entries that are disabled, with C(by), C(why) and C(since), also such as the schedule does not have.
  returned: success
  type: dict
leader:
  description: Host and process of the beat that leads; null if none does.
  returned: success
  type: dict
file:
  description:
    - All C(files) of O(file), the processes which have them open (C(open_in)), and the C(error) if they cannot be read.
      A file that is open is in use by beat and is not read.
  returned: with O(file)
  type: dict
"""

from dataclasses import asdict
from typing import Any

from ansible_collections.celeryops.runbook.plugins.module_utils import _schedule
from ansible_collections.celeryops.runbook.plugins.module_utils._module import CeleryModule, run
from ansible_collections.celeryops.runbook.plugins.module_utils.engine import schedule

ARGUMENT_SPEC = {
    **_schedule.ARGUMENT_SPEC,
    "arguments": {"type": "bool", "default": False},
    "file": {"type": "path"},
}


def schedule_info(module: CeleryModule) -> dict[str, Any]:
    params = module.params
    with module.broker() as broker:
        found, rests = _schedule.entries(params, broker)
        leader = schedule.leader(broker, params["application"]) if broker.kind == "redis" else None
    if not found["scheduler"].endswith("PersistentScheduler"):
        module.warn(f"beat uses {found['scheduler']}, which may have entries that the configuration does not have.")
    for name, entry in found["entries"].items():
        entry["disabled"] = str(rests[name]) if name in rests else None
        if not params["arguments"]:
            for key in ("args", "kwargs", "options"):
                del entry[key]
    result: dict[str, Any] = {
        "changed": False,
        "entries": found["entries"],
        "disabled": {name: asdict(rest) for name, rest in rests.items()},
        "leader": leader and {"host": leader.host, "pid": leader.pid, "since": leader.since},
    }
    if params["file"]:
        files = _schedule.files(params["file"])
        holders = _schedule.holders(params["file"])
        # While beat has it open much of it is in beat's memory; that it could open it says enough.
        error = _schedule.read(params, params["file"])[1] if files and not holders else ""
        result["file"] = {"files": files, "open_in": holders, "error": error or None}
    return result


def main() -> None:
    run(schedule_info, ARGUMENT_SPEC, supports_check_mode=True)


if __name__ == "__main__":
    main()
