#!/usr/bin/python
# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: celery_fault
short_description: Cause a fault on a host of a test fleet, and end it
version_added: 0.1.0
author:
  - celeryops contributors (@celeryops)
description:
  - Runs a script as a transient unit of systemd that causes the fault when it starts and ends it when it stops, so
    that the fault ends after O(seconds) even if nobody is there to end it.
  - The role C(game_day) calls it, on hosts that the inventory marks as such of a test fleet. It judges nothing itself.
extends_documentation_fragment:
  - celeryops.runbook.attributes.host
options:
  name:
    description: Name of the fault. The unit is called C(celeryops-fault-NAME.service).
    type: str
    required: true
  state:
    description:
      - V(present) causes the fault unless it lasts already.
      - V(absent) ends it, whatever is left of it; fine if there is none.
    type: str
    choices: [present, absent]
    default: present
  script:
    description:
      - A shell script that is called with V(begin), then with V(hold), which lasts as long as the fault, then with
        V(end).
      - What V(begin) writes into the file C(told) is returned.
      - V(end) must be harmless where the fault was cured meanwhile.
      - Required with O(state=present).
    type: str
  environment:
    description: Environment variables of the script.
    type: dict
    default: {}
  secrets:
    description: More of them that nobody may see.
    type: dict
    default: {}
  environment_file:
    description: An environment file on the host that the script gets too.
    type: path
  seconds:
    description: The fault ends after this time at the latest.
    type: int
    default: 600
"""

EXAMPLES = r"""
- name: Redis is frozen for a minute
  celeryops.runbook.celery_fault:
    name: redis_frozen
    seconds: 60
    script: |
      case $1 in
      begin) systemctl kill --kill-whom=main -s STOP redis-server.service ;;
      hold) exec sleep infinity ;;
      end) systemctl kill --kill-whom=main -s CONT redis-server.service ;;
      esac

- name: It goes on
  celeryops.runbook.celery_fault:
    name: redis_frozen
    state: absent
"""

RETURN = r"""
unit:
  description: The unit that causes and ends the fault.
  returned: always
  type: str
  sample: celeryops-fault-redis_frozen.service
told:
  description: What the script told when it caused the fault, line by line.
  returned: success
  type: list
  elements: str
"""

import os
import re
import shutil
from typing import Any

from ansible.module_utils.basic import AnsibleModule

PLACE = "/run/celeryops-fault"
SHELL = "/bin/sh -eu"
# Within this time a script has caused its fault, or ended it.
PATIENCE = 120


class Fault:
    def __init__(self, module: AnsibleModule) -> None:
        self.module = module
        name = module.params["name"]
        if not re.fullmatch("[a-z][a-z0-9_]{0,40}", name):
            module.fail_json(msg=f"name: {name!r} is no name of a fault; use small letters, digits and underscores.")
        self.unit = f"celeryops-fault-{name}.service"
        self.place = os.path.join(PLACE, name)

    def lasts(self) -> bool:
        rc, _out, _err = self.module.run_command(["systemctl", "is-active", "--quiet", self.unit])
        return bool(rc == 0)

    def path(self, name: str) -> str:
        return os.path.join(self.place, name)

    def write(self, name: str, text: str) -> None:
        handle = os.open(self.path(name), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(handle, "w") as out:
            out.write(text)

    def told(self) -> list[str]:
        try:
            with open(self.path("told"), encoding="utf-8") as text:
                return text.read().splitlines()
        except FileNotFoundError:
            return []

    def journal(self) -> str:
        """What the script said, without what systemd says of its unit."""
        _rc, out, _err = self.module.run_command(["journalctl", "-q", "-u", self.unit, "-n", "20", "-o", "cat"])
        return " / ".join(line for line in str(out).splitlines() if self.unit not in line)

    def begin(self) -> None:
        params = self.module.params
        shutil.rmtree(self.place, ignore_errors=True)
        os.makedirs(PLACE, 0o700, exist_ok=True)
        os.mkdir(self.place, 0o700)
        self.write("script", params["script"])
        values = {**params["environment"], **params["secrets"]}
        self.write("environment", "".join(f"{key}={quoted(value)}\n" for key, value in values.items()))
        # A fault that is over has told so.
        self.write("over", f"{SHELL} {self.path('script')} end && touch {self.path('ended')}\n")
        settings = {
            "Type": "exec",
            "WorkingDirectory": self.place,
            "EnvironmentFile": self.path("environment"),
            "ExecStartPre": f"{SHELL} {self.path('script')} begin",
            "ExecStopPost": f"{SHELL} {self.path('over')}",
            "RuntimeMaxSec": params["seconds"],
            "TimeoutStartSec": PATIENCE,
            "TimeoutStopSec": PATIENCE,
            "KillMode": "mixed",
            "SendSIGHUP": "no",
            "PrivateTmp": "yes",
        }
        command = ["systemd-run", "--quiet", "--collect", "--unit", self.unit]
        command += ["--description", f"Game day: {params['name']}"]
        if params["environment_file"]:
            command += ["--property", f"EnvironmentFile={params['environment_file']}"]
        command += [f"--property={key}={value}" for key, value in settings.items()]
        rc, _out, err = self.module.run_command([*command, *SHELL.split(), self.path("script"), "hold"])
        if rc:
            said = self.journal() or err.strip()
            self.end()
            self.module.fail_json(msg=f"the fault {params['name']} was not caused: {said}", unit=self.unit)

    def end(self) -> None:
        self.module.run_command(["systemctl", "stop", self.unit])
        if not os.path.exists(self.path("ended")):
            self.again()
        shutil.rmtree(self.place, ignore_errors=True)

    def again(self) -> None:
        """The unit was not there any more to end it, or could not."""
        settings = {"WorkingDirectory": self.place, "EnvironmentFile": self.path("environment")}
        over = ["systemd-run", "--quiet", "--collect", "--wait", "--pipe"]
        over += [*(f"--property={key}={value}" for key, value in settings.items()), *SHELL.split(), self.path("over")]
        rc, out, err = self.module.run_command(over)
        if rc:
            self.module.fail_json(
                msg=f"the fault {self.module.params['name']} could not be ended: {err.strip() or out.strip()}. Look at "
                f"{self.place}/script on this host, which says how, do it, and remove that directory.",
                unit=self.unit,
            )


def quoted(value: Any) -> str:
    text = str(value).replace("\\", "\\\\").replace('"', '\\"').replace("`", "\\`").replace("$", "\\$")
    return f'"{text}"'


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "name": {"type": "str", "required": True},
            "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
            "script": {"type": "str"},
            "environment": {"type": "dict", "default": {}},
            "secrets": {"type": "dict", "default": {}, "no_log": True},
            "environment_file": {"type": "path"},
            "seconds": {"type": "int", "default": 600},
        },
        required_if=[("state", "present", ["script"])],
        supports_check_mode=True,
    )
    params = module.params
    if params["seconds"] < 1:
        module.fail_json(msg=f"seconds: must be above 0, not {params['seconds']}.")
    fault = Fault(module)
    lasts, left = fault.lasts(), os.path.isdir(fault.place)
    changed = not lasts if params["state"] == "present" else lasts or left
    told = fault.told() if lasts else []
    if changed and not module.check_mode:
        if params["state"] == "present":
            fault.begin()
            told = fault.told()
        else:
            fault.end()
    here = f"{params['name']} on this host\n"
    before, after = (here if lasts or left else "", here if params["state"] == "present" else "")
    module.exit_json(changed=changed, unit=fault.unit, told=told, diff={"before": before, "after": after})


if __name__ == "__main__":
    main()
