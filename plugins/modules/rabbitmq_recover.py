#!/usr/bin/python
# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: rabbitmq_recover
short_description: Find out what is wrong with the RabbitMQ of this host, and cure it where no decision is needed
version_added: 0.1.0
description:
  - Runs on the host of RabbitMQ and asks systemd and C(rabbitmqctl). Needs no library and no password.
  - Tells apart a unit that is down, starting or masked, a process stopped by a signal, a node whose application is
    stopped, a memory and a disk alarm, all connections in use, a node in maintenance, and one that hangs.
  - Starts the unit or the application, lets the process go on, or waits. One that runs and hangs is restarted only with
    O(restart).
  - What needs a decision fails with what a person must do, and touches nothing.
author:
  - celeryops contributors (@celeryops)
extends_documentation_fragment:
  - celeryops.runbook.attributes.host
options:
  unit:
    description: The systemd unit of RabbitMQ.
    type: str
    default: rabbitmq-server.service
  restart:
    description:
      - Restart a RabbitMQ that runs and does not answer. It ends every connection and loses what is not persistent.
    type: bool
    default: false
  answer_timeout:
    description: Seconds that RabbitMQ has to answer C(rabbitmqctl) before it counts as hanging.
    type: float
    default: 20.0
  timeout:
    description: Seconds that RabbitMQ may need to start.
    type: float
    default: 300.0
seealso:
  - module: celeryops.runbook.rabbitmq_info
"""

EXAMPLES = r"""
- name: Bring RabbitMQ back
  celeryops.runbook.rabbitmq_recover:
"""

RETURN = r"""
state:
  description:
    - What was found, V(healthy), V(down), V(starting), V(stopping), V(masked), V(frozen), V(app_stopped), V(wedged),
      V(memory_alarm), V(disk_alarm), V(file_descriptors), V(max_connections), V(maintenance) or V(no_listener).
  returned: always
  type: str
text:
  description: The same in words.
  returned: always
  type: str
done:
  description: What was done, or would be in check mode.
  returned: success
  type: list
  elements: str
  sample: [start]
seconds:
  description: From the begin until RabbitMQ answered.
  returned: success
  type: float
"""

import os
import signal
import time
from typing import Any

from ansible.module_utils.basic import AnsibleModule

from ansible_collections.celeryops.runbook.plugins.module_utils.engine.errors import CeleryOpsError
from ansible_collections.celeryops.runbook.plugins.module_utils.engine.rabbitnode import (
    HEALTHY,
    SHOWN,
    Finding,
    Unit,
    diagnose,
)

ARGUMENT_SPEC = {
    "unit": {"type": "str", "default": "rabbitmq-server.service"},
    "restart": {"type": "bool", "default": False},
    "answer_timeout": {"type": "float", "default": 20.0},
    "timeout": {"type": "float", "default": 300.0},
}


class Node:
    """The RabbitMQ of this host."""

    def __init__(self, module: AnsibleModule) -> None:
        self.module = module
        self.unit: str = module.params["unit"]
        self.systemd = module.get_bin_path("systemctl", required=True)

    def systemctl(self, verb: str) -> None:
        rc, out, err = self.module.run_command([self.systemd, "--no-block", verb, self.unit])
        if rc:
            raise CeleryOpsError(
                f"systemctl {verb} {self.unit} failed: {(err or out).strip()}. Look at journalctl -u {self.unit}."
            )

    def ctl(self, *command: str, timeout: float) -> tuple[int | None, str]:
        """rabbitmqctl, bounded from without: a node that hangs keeps it for long. None: it did not end in time."""
        bounded = self.module.get_bin_path("timeout", required=True)
        program = self.module.get_bin_path("rabbitmqctl", required=True)
        rc, out, err = self.module.run_command([bounded, "-k", "2", f"{timeout:g}", program, *command])
        return (None if rc in (124, 137) else rc), out or err

    def look(self) -> Finding:
        out = self.module.run_command([self.systemd, "show", "-p", ",".join(SHOWN), self.unit])[1]
        shown = dict(line.split("=", 1) for line in out.splitlines() if "=" in line)
        unit = Unit.of(self.unit, shown, frozen(self.unit))
        code: int | None = None
        output = ""
        if unit.active in ("active", "reloading") and not unit.frozen:
            code, output = self.ctl("--formatter", "json", "status", timeout=self.module.params["answer_timeout"])
        return diagnose(unit, code, output)

    def cure(self, finding: Finding) -> None:
        if finding.cure == "continue":
            for pid in frozen(self.unit):
                os.kill(pid, signal.SIGCONT)
        elif finding.cure == "start_app":
            code, output = self.ctl("start_app", timeout=self.module.params["timeout"])
            if code != 0:
                raise CeleryOpsError(f"rabbitmqctl start_app failed: {output.strip()[-500:] or 'no end in time'}.")
        elif finding.cure != "wait":
            self.module.run_command([self.systemd, "reset-failed", self.unit])
            self.systemctl(finding.cure)

    def wait(self) -> Finding:
        deadline = time.monotonic() + self.module.params["timeout"]
        while True:
            finding = self.look()
            if finding.state == HEALTHY or finding.human or time.monotonic() > deadline:
                return finding
            time.sleep(0.5)


def frozen(unit: str) -> tuple[int, ...]:
    """Processes of the unit that a signal has stopped. The main process may be a shell around Erlang."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/cgroup", encoding="utf-8") as handle:
                if f"/{unit}" not in handle.read():
                    continue
            with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as handle:
                if handle.read().rpartition(")")[2].split()[0] == "T":
                    found.append(int(pid))
        except OSError:
            continue  # it has ended meanwhile
    return tuple(found)


def bring_up(module: AnsibleModule) -> dict[str, Any]:
    for name in ("answer_timeout", "timeout"):
        if module.params[name] <= 0:
            raise CeleryOpsError(f"{name}: must be above 0 seconds, not {module.params[name]:g}.")
    begun = time.monotonic()
    node = Node(module)
    finding = node.look()
    if finding.human:
        raise CeleryOpsError(f"{finding.text} {finding.human}", state=finding.state, text=finding.text)
    if finding.cure == "restart" and not module.params["restart"]:
        raise CeleryOpsError(
            f"{finding.text} To restart it, which ends every connection and loses messages that are not persistent, "
            f"set restart to true.",
            state=finding.state,
            text=finding.text,
        )
    if finding.cure and not module.check_mode:
        node.cure(finding)
        after = node.wait()
        if after.state != HEALTHY:
            raise CeleryOpsError(
                f"after {finding.cure}: {after.text} {after.human or f'Look at journalctl -u {node.unit}.'}",
                state=after.state,
                text=after.text,
            )
    return {
        "changed": finding.cure not in ("", "wait"),
        "state": finding.state,
        "text": finding.text,
        "done": [finding.cure] if finding.cure else [],
        "seconds": round(time.monotonic() - begun, 2),
        "diff": {"before": f"{finding.state}\n", "after": f"{HEALTHY}\n"},
    }


def main() -> None:
    module = AnsibleModule(argument_spec=ARGUMENT_SPEC, supports_check_mode=True)
    try:
        result = bring_up(module)
    except CeleryOpsError as exc:
        module.fail_json(msg=exc.msg, category=exc.category, **exc.data)
    module.exit_json(**result)


if __name__ == "__main__":
    main()
