#!/usr/bin/python
# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: celery_probe
short_description: Send probe tasks at a steady rate, which workers note on their own hosts
version_added: 0.1.0
author:
  - celeryops contributors (@celeryops)
description:
  - Probes are small tasks of the runtime package (C(celeryops.probe), and C(celeryops.probe_late), which is
    acknowledged late). A worker notes on its own host when it begins and ends one, so that they can be counted whatever
    becomes of the broker.
  - Workers write only where this module has made a directory for the run.
extends_documentation_fragment:
  - celeryops.runbook.attributes.host
options:
  name:
    description: The application's name in units and directories, the variable C(celeryops_app_name).
    type: str
    required: true
  run:
    description: Name of the run, 4 to 32 small letters and digits.
    type: str
    required: true
  state:
    description:
      - V(ready) makes the directory of the run, so that workers of the host note probes. What a run has left for more
        than a day is removed.
      - V(sending) starts to send from this host, as the application's user, in a transient unit of systemd, and waits
        for the broker to take the first.
      - V(stopped) stops sending.
      - V(absent) stops sending and removes the directory of the run.
    type: str
    choices: [ready, sending, stopped, absent]
    required: true
  queues:
    description: The queues to send to, one after the other. Required with O(state=sending).
    type: list
    elements: str
    default: []
  rate:
    description: Probes a second.
    type: float
    default: 20.0
  work:
    description: Seconds that each probe works.
    type: float
    default: 0.02
  seconds:
    description: Sending ends after this time at the latest.
    type: int
    default: 3600
  virtualenv:
    description: The virtual environment of the application. Required with O(state=sending).
    type: path
  environment_file:
    description:
      - The application's environment file on this host, which names the broker. Required with O(state=sending).
    type: path
  state_dir:
    description: The state directory of the worker units. Default C(/var/lib/celery-NAME).
    type: path
seealso:
  - module: celeryops.runbook.celery_probe_info
"""

EXAMPLES = r"""
- name: The workers of the host note probes
  celeryops.runbook.celery_probe:
    name: shop
    run: 1a2b3c
    state: ready

- name: Send twenty a second
  celeryops.runbook.celery_probe:
    name: shop
    run: 1a2b3c
    state: sending
    queues: [orders, mail]
    virtualenv: /srv/shop/current/venv
    environment_file: /etc/celeryops/shop/secret.env
"""

RETURN = r"""
directory:
  description: Where the host keeps what belongs to the run.
  returned: always
  type: str
  sample: /var/lib/celery-shop/probe-1a2b3c
unit:
  description: The unit that sends.
  returned: always
  type: str
  sample: celeryops-probe-shop.service
"""

import glob
import os
import shutil
import time

from ansible.module_utils.basic import AnsibleModule

from ansible_collections.celeryops.runbook.plugins.module_utils._probe import argument_spec, place, read
from ansible_collections.celeryops.runbook.plugins.module_utils.engine import probes

FIRST = 30.0
OLD = 86_400.0


class Sender:
    def __init__(self, module: AnsibleModule, directory: str) -> None:
        self.module = module
        self.directory = directory
        self.unit = f"celeryops-probe-{module.params['name']}.service"

    def show(self, setting: str) -> str:
        _rc, out, _err = self.module.run_command(["systemctl", "show", "--property", setting, "--value", self.unit])
        return str(out).strip()

    def active(self) -> bool:
        return self.show("ActiveState") in ("active", "activating", "deactivating")

    def ours(self) -> bool:
        return f"--run {self.module.params['run']} " in self.show("ExecStart")

    def journal(self) -> str:
        _rc, out, _err = self.module.run_command(["journalctl", "-q", "-u", self.unit, "-n", "5", "-o", "cat"])
        return " / ".join(str(out).split("\n")).strip(" /")

    def start(self) -> None:
        params = self.module.params
        virtualenv = os.path.realpath(params["virtualenv"])
        owner = os.stat(self.directory)
        settings = {
            "User": owner.st_uid,
            "Group": owner.st_gid,
            "EnvironmentFile": params["environment_file"],
            "WorkingDirectory": self.directory,
            "RuntimeMaxSec": params["seconds"],
            "NoNewPrivileges": "yes",
            "TimeoutStopSec": 20,
        }
        command = ["systemd-run", "--quiet", "--collect", "--unit", self.unit, "--description", "Probes of a game day"]
        command += [f"--property={key}={value}" for key, value in settings.items()]
        command += [os.path.join(virtualenv, "bin", "python"), "-m", "celeryops.probe", "--run", params["run"]]
        command += ["--directory", self.directory, "--queues", ",".join(params["queues"])]
        command += ["--rate", f"{params['rate']:g}", "--seconds", f"{params['work']:g}"]
        rc, _out, err = self.module.run_command(command)
        if rc:
            self.module.fail_json(msg=f"the probes could not be started: {err.strip()}", unit=self.unit)
        deadline = time.monotonic() + FIRST
        while not read(os.path.join(self.directory, probes.SENT)):
            if time.monotonic() > deadline or not self.active():
                said = self.journal()
                self.stop()
                self.module.fail_json(
                    msg=f"no probe was taken by the broker within {FIRST:g} s: {said or 'it said nothing'}. Does the "
                    f"release have the runtime package of this collection?",
                    unit=self.unit,
                )
            time.sleep(0.05)

    def stop(self) -> None:
        self.module.run_command(["systemctl", "stop", self.unit])


def forget(state: str) -> None:
    """What a run left whose controller died."""
    for directory in glob.glob(os.path.join(state, "probe-*")):
        if os.path.isdir(directory) and time.time() - os.stat(directory).st_mtime > OLD:
            shutil.rmtree(directory, ignore_errors=True)


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            **argument_spec(),
            "state": {"type": "str", "choices": ["ready", "sending", "stopped", "absent"], "required": True},
            "queues": {"type": "list", "elements": "str", "default": []},
            "rate": {"type": "float", "default": 20.0},
            "work": {"type": "float", "default": 0.02},
            "seconds": {"type": "int", "default": 3600},
            "virtualenv": {"type": "path"},
            "environment_file": {"type": "path"},
        },
        required_if=[("state", "sending", ["virtualenv", "environment_file", "queues"])],
        supports_check_mode=True,
    )
    params = module.params
    if params["rate"] <= 0 or params["rate"] > 1000:
        module.fail_json(msg=f"rate: must be above 0 and at most 1000 a second, not {params['rate']:g}.")
    directory = place(module)
    sender = Sender(module, directory)
    there, active = os.path.isdir(directory), sender.active()
    if active and params["state"] == "sending" and not sender.ours():
        module.fail_json(msg=f"{sender.unit} sends already for another run. Wait for its end, or stop that unit.")
    sends = active and sender.ours()
    changed = {
        "ready": not there,
        "sending": not there or not sends,
        "stopped": sends,
        "absent": there or sends,
    }[params["state"]]
    before = "sent and noted" if sends else "noted" if there else "none"
    after = {"ready": "noted", "sending": "sent and noted", "stopped": "noted", "absent": "none"}[params["state"]]
    if changed and not module.check_mode:
        if params["state"] in ("stopped", "absent") and sends:
            sender.stop()
        if params["state"] in ("ready", "sending") and not there:
            state = os.path.dirname(directory)
            forget(state)
            if not os.path.isdir(state):
                module.fail_json(msg=f"state_dir: there is no {state}. Did a worker of {params['name']} ever run here?")
            os.mkdir(directory, 0o750)
            owner = os.stat(state)
            os.chown(directory, owner.st_uid, owner.st_gid)
        if params["state"] == "sending" and not sends:
            sender.start()
        if params["state"] == "absent":
            shutil.rmtree(directory, ignore_errors=True)
    diff = {"before": f"probes of {params['run']}: {before}\n", "after": f"probes of {params['run']}: {after}\n"}
    module.exit_json(changed=changed, directory=directory, unit=sender.unit, diff=diff)


if __name__ == "__main__":
    main()
