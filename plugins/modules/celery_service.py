#!/usr/bin/python
# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: celery_service
short_description: Start, stop and restart the worker instances or the beat of a host
version_added: 0.1.0
author:
  - celeryops contributors (@celeryops)
description:
  - Brings the systemd units which the roles C(worker) and C(beat) have installed into the wanted state, all units of
    the host in one task.
  - Starting waits until the unit says that it is ready. Stopping lets running tasks finish, for a bounded time.
  - Restarting takes one instance after the other, so that a host never stops consuming altogether.
  - Needs no broker and no Celery.
extends_documentation_fragment:
  - celeryops.runbook.application
  - celeryops.runbook.attributes.host
options:
  kind:
    description: Whether this is about the worker instances or about beat.
    type: str
    choices: [worker, beat]
    default: worker
  instances:
    description:
      - The worker instances, such as V(default-1). Not used for beat.
      - With O(state=managed) these are to exist and no others; an empty list removes all.
      - With another state the default is every instance that is enabled on the host.
    type: list
    elements: str
  state:
    description:
      - V(managed) enables and starts what is named, restarts what runs with an older configuration (O(restart)), and
        stops, disables and forgets every other instance of the application on this host.
      - V(absent) stops and disables the units and removes the instances' environment files.
      - V(restarted) always restarts, V(started) and V(stopped) act only where needed.
    type: str
    choices: [managed, started, stopped, restarted, absent]
    default: managed
  restart:
    description: With O(state=managed), restart running units whose configuration files are newer than the process.
    type: bool
    default: true
  stop_timeout:
    description:
      - Seconds after which a unit that still has not stopped is killed. The units' own bounds usually end it earlier;
        a process that is frozen ends here.
      - With V(0) the units are killed at once, and their tasks are cut.
    type: int
    default: 345
  unit_dir:
    description: Where the units are installed.
    type: path
    default: /etc/systemd/system
attributes:
  idempotent:
    support: partial
    details:
      - Not with O(state=restarted).
seealso:
  - module: celeryops.runbook.celery_host_info
"""

EXAMPLES = r"""
- name: Two instances and no others
  celeryops.runbook.celery_service:
    name: shop
    instances: [default-1, reports-1]

- name: Stop every instance of this host, within ten minutes
  celeryops.runbook.celery_service:
    name: shop
    state: stopped
    stop_timeout: 600
"""

RETURN = r"""
started:
  description: Units that were started.
  returned: success
  type: list
  elements: str
  sample: [celery-shop-worker@default-1.service]
stopped:
  description: Units that were stopped.
  returned: success
  type: list
  elements: str
restarted:
  description: Units that were restarted.
  returned: success
  type: list
  elements: str
enabled:
  description: Units that were enabled, to run after a boot.
  returned: success
  type: list
  elements: str
removed:
  description: Units that were disabled and forgotten.
  returned: success
  type: list
  elements: str
stale:
  description: Units that run with an older configuration and were not restarted, because of O(restart=false).
  returned: success
  type: list
  elements: str
killed:
  description: Units that did not stop in O(stop_timeout) seconds and were killed. Their running tasks are lost or,
    if acknowledged late, come back after the broker's visibility timeout.
  returned: success
  type: list
  elements: str
seconds:
  description: How long each unit took to stop or start.
  returned: success
  type: dict
  sample: {"celery-shop-worker@default-1.service": 1.9}
"""

import contextlib
import glob
import os
import re
import signal
import time
from typing import Any

from ansible.module_utils.basic import AnsibleModule

from ansible_collections.celeryops.runbook.plugins.module_utils._host import Processes, parse_show

PROPERTIES = (
    "Id",
    "LoadState",
    "ActiveState",
    "SubState",
    "UnitFileState",
    "ExecMainStartTimestampMonotonic",
    "FragmentPath",
    "DropInPaths",
    "NeedDaemonReload",
    "StatusText",
    "Result",
)
RUNS = ("active", "reloading")
ENDED = ("inactive", "failed")


def signal_process(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


class Service:
    def __init__(self, module: AnsibleModule) -> None:
        self.module = module
        self.name: str = module.params["name"]
        self.beat = module.params["kind"] == "beat"
        self.config_dir: str = module.params["config_dir"] or f"/etc/celeryops/{self.name}"
        self.target = f"celery-{self.name}.target"
        self.done: dict[str, list[str]] = {
            key: [] for key in ("started", "stopped", "restarted", "enabled", "removed", "stale", "killed")
        }
        self.seconds: dict[str, float] = {}

    def systemctl(self, *arguments: str, fail: bool = True) -> tuple[int, str, str]:
        rc, out, err = self.module.run_command([self.module.get_bin_path("systemctl", required=True), *arguments])
        if rc and fail:
            self.module.fail_json(msg=f"systemctl {arguments[0]} failed: {err.strip() or out.strip()}", **self.result())
        return rc, out, err

    def result(self) -> dict[str, Any]:
        acted = any(self.done[key] for key in ("started", "stopped", "restarted", "enabled", "removed", "killed"))
        return {"changed": acted, "seconds": self.seconds, **self.done}

    def unit(self, instance: str) -> str:
        return f"celery-{self.name}-worker@{instance}.service"

    def instance(self, unit: str) -> str:
        return unit.partition("@")[2].removesuffix(".service")

    def wants(self) -> str:
        return os.path.join(self.module.params["unit_dir"], f"{self.target}.wants")

    def enabled(self) -> list[str]:
        """What a boot would start."""
        if self.beat:
            unit = f"celery-{self.name}-beat.service"
            return [unit] if os.path.islink(os.path.join(self.wants(), unit)) else []
        found = glob.glob(os.path.join(glob.escape(self.wants()), f"celery-{self.name}-worker@*.service"))
        return sorted(os.path.basename(path) for path in found)

    def known(self) -> list[str]:
        """Every unit of the kind there is a trace of: enabled, configured or loaded."""
        if self.beat:
            return [f"celery-{self.name}-beat.service"]
        found = set(self.enabled())
        for path in glob.glob(os.path.join(glob.escape(self.config_dir), "worker-*.env")):
            found.add(self.unit(os.path.basename(path)[len("worker-") : -len(".env")]))
        pattern = f"celery-{self.name}-worker@*.service"
        listed = self.systemctl("list-units", "--all", "--plain", "--no-legend", "--full", pattern)[1]
        found.update(line.split()[0] for line in listed.splitlines() if line.split())
        return sorted(found)

    def show(self, units: list[str]) -> dict[str, dict[str, str]]:
        if not units:
            return {}
        return parse_show(self.systemctl("show", "--property=" + ",".join(PROPERTIES), *units)[1])

    def is_stale(self, unit: str, properties: dict[str, str]) -> bool:
        """Does the process run with an older configuration than the one on disk?"""
        started = int(properties.get("ExecMainStartTimestampMonotonic") or 0) / 1e6
        if not started:
            return False
        started += time.time() - time.clock_gettime(time.CLOCK_MONOTONIC)
        paths = [os.path.join(self.config_dir, "secret.env"), properties.get("FragmentPath", "")]
        paths += properties.get("DropInPaths", "").split()
        if self.beat:
            paths.append(os.path.join(self.config_dir, "beat.env"))
        else:
            paths.append(os.path.join(self.config_dir, f"worker-{self.instance(unit)}.env"))
        return any(os.path.getmtime(path) > started for path in paths if path and os.path.exists(path))

    def start(self, units: list[str], done: str = "started") -> None:
        if not units:
            return
        self.done[done].extend(units)
        if self.module.check_mode:
            return
        begin = time.monotonic()
        # All at once: systemd starts them side by side and returns when each is ready or has failed.
        rc = self.systemctl("start", *units, fail=False)[0]
        for unit in units:
            self.seconds[unit] = round(self.seconds.get(unit, 0) + time.monotonic() - begin, 1)
        bad = [u for u, properties in self.show(units).items() if properties.get("ActiveState") not in RUNS]
        if rc or bad:
            self.fail_start(bad or units)

    def fail_start(self, units: list[str]) -> None:
        journal = self.module.get_bin_path("journalctl")
        logs: dict[str, list[str]] = {}
        for unit in units:
            command = [journal, "-u", unit, "-n", "15", "--no-pager", "-o", "cat"]
            logs[unit] = self.module.run_command(command)[1].splitlines() if journal else []
        said = "; ".join(f"{unit}: {(self.telling(lines) or 'no message')}" for unit, lines in logs.items())
        self.module.fail_json(
            msg=f"did not start: {said}. Look at journalctl -u {units[0]}",
            logs=logs,
            failed_units=units,
            **self.result(),
        )

    @staticmethod
    def telling(lines: list[str]) -> str:
        """The line of a log that most likely says why."""
        for line in reversed(lines):
            if re.search(r"(Error|Exception|error:|is not a complete release)", line) and "systemd" not in line:
                return line.strip()
        return lines[-1].strip() if lines else ""

    def stop(self, units: list[str], done: str = "stopped") -> None:
        """All at once; each may take its time, none more than the bound."""
        if not units:
            return
        self.done[done].extend(units)
        if self.module.check_mode:
            return
        begin = time.monotonic()
        end = begin + self.module.params["stop_timeout"]
        killed: set[str] = set()
        if not self.module.params["stop_timeout"]:
            self.kill(units)
            killed = set(units)
            self.done["killed"] = sorted(killed)
        self.systemctl("stop", "--no-block", *units)
        left = set(units)
        while left:
            for unit, properties in self.show(sorted(left)).items():
                if properties.get("ActiveState") in ENDED:
                    left.discard(unit)
                    self.seconds[unit] = round(time.monotonic() - begin, 1)
            if not left:
                break
            if time.monotonic() > end + 60:
                self.module.fail_json(
                    msg=f"still not stopped, though killed: {', '.join(sorted(left))}", **self.result()
                )
            if time.monotonic() > end and left - killed:
                self.kill(sorted(left - killed))
                killed |= left
                self.done["killed"] = sorted(killed)
            time.sleep(0.1)
        # A unit that was killed or whose tasks were cancelled is no failure to keep showing.
        failed = [u for u, properties in self.show(units).items() if properties.get("ActiveState") == "failed"]
        if failed:
            self.systemctl("reset-failed", *failed, fail=False)

    def kill(self, units: list[str]) -> None:
        """Pool processes first, their parent frozen so that it does not take their tasks for failed. Where systemd is
        told of no empty cgroup (v1), it waits for its own timeout if any process outlives the main one."""
        shown = parse_show(self.systemctl("show", "--property=Id,MainPID", *units)[1])
        mains = [int(properties["MainPID"]) for properties in shown.values() if int(properties.get("MainPID") or 0)]
        for pid in mains:
            signal_process(pid, signal.SIGSTOP)
        processes = Processes()
        children = [child for pid in mains for child in processes.tree(pid) if child != pid]
        for pid in children:
            signal_process(pid, signal.SIGKILL)
        deadline = time.monotonic() + 5
        while any(map(Processes().runs, children)) and time.monotonic() < deadline:
            time.sleep(0.02)
        self.systemctl("kill", "--signal=SIGKILL", *units, fail=False)

    def remove(self, units: list[str]) -> None:
        if not units:
            return
        shown = self.show(units)
        self.stop([u for u in units if shown.get(u, {}).get("ActiveState", "inactive") not in ENDED])
        enabled = [unit for unit in self.enabled() if unit in units]
        workers = [] if self.beat else units
        files = [os.path.join(self.config_dir, f"worker-{self.instance(unit)}.env") for unit in workers]
        files = [path for path in files if os.path.exists(path)]
        kept = {os.path.join(self.config_dir, f"worker-{self.instance(u)}.env"): u for u in units}
        self.done["removed"].extend(sorted({*enabled, *(kept[path] for path in files)}))
        if self.module.check_mode:
            return
        if enabled:
            self.systemctl("disable", "--quiet", *enabled)
        for path in files:
            os.unlink(path)

    def restart(self, units: list[str]) -> None:
        for unit in units:
            self.stop([unit], "restarted")
            if not self.module.check_mode:
                self.done["restarted"].remove(unit)
            else:
                continue
            self.start([unit], "restarted")

    def manage(self, wanted: list[str]) -> None:
        self.remove([unit for unit in self.known() if unit not in wanted])
        missing = [unit for unit in wanted if unit not in self.enabled()]
        if wanted and not self.module.check_mode:
            missing_target = self.systemctl("is-enabled", self.target, fail=False)[1].strip() != "enabled"
            units = missing + ([self.target] if missing_target else [])
            if units:
                self.systemctl("enable", "--quiet", *units)
            self.systemctl("start", self.target)
        self.done["enabled"].extend(missing)
        shown = self.show(wanted)
        running = [unit for unit in wanted if shown.get(unit, {}).get("ActiveState") in RUNS]
        stale = [unit for unit in running if self.is_stale(unit, shown[unit])]
        self.start([unit for unit in wanted if unit not in running])
        if self.module.params["restart"]:
            self.restart(stale)
        else:
            self.done["stale"] = stale

    def run(self) -> dict[str, Any]:
        state, instances = self.module.params["state"], self.module.params["instances"]
        named_by_application = instances is None and state in ("started", "stopped", "restarted")
        if named_by_application and not os.path.exists(os.path.join(self.module.params["unit_dir"], self.target)):
            self.module.fail_json(
                msg=f"name: no application {self.name} is installed on this host: {self.target} is missing in"
                f" {self.module.params['unit_dir']}; check the name, or run the role first"
            )
        if self.beat:
            named = self.known()
        elif instances is None:
            if state == "managed":
                self.module.fail_json(msg="state is managed but all of the following are missing: instances")
            named = self.known() if state == "absent" else self.enabled()
        else:
            bad = [i for i in instances if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", i)]
            if bad:
                self.module.fail_json(msg=f"instances: {bad[0]!r} is no name of an instance, such as default-1")
            named = [self.unit(instance) for instance in instances]
        if state == "managed":
            self.manage(named)
        elif state == "absent":
            self.remove(named)
        else:
            shown = self.show(named)
            unknown = [u for u in named if shown.get(u, {}).get("LoadState") != "loaded"]
            if unknown and state != "stopped" and not self.module.check_mode:
                self.module.fail_json(msg=f"not installed on this host: {', '.join(unknown)}; run the role first")
            active = {u: shown.get(u, {}).get("ActiveState", "inactive") for u in named}
            if state == "started":
                self.start([u for u in named if active[u] not in RUNS])
            elif state == "stopped":
                self.stop([u for u in named if active[u] not in ENDED])
            else:
                self.restart(named)
        return self.result()


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "name": {"type": "str", "required": True},
            "kind": {"type": "str", "choices": ["worker", "beat"], "default": "worker"},
            "instances": {"type": "list", "elements": "str"},
            "state": {
                "type": "str",
                "choices": ["managed", "started", "stopped", "restarted", "absent"],
                "default": "managed",
            },
            "restart": {"type": "bool", "default": True},
            "stop_timeout": {"type": "int", "default": 345},
            "config_dir": {"type": "path"},
            "unit_dir": {"type": "path", "default": "/etc/systemd/system"},
        },
        supports_check_mode=True,
    )
    service = Service(module)
    before = service.show(service.known())
    result = service.run()
    after = service.show(service.known())
    states = [
        "".join(f"{u}: {p.get('ActiveState')} {p.get('UnitFileState')}\n" for u, p in sorted(shown.items()))
        for shown in (before, after)
    ]
    if module.check_mode:
        states[1] = "".join(f"{key}: {', '.join(units)}\n" for key, units in service.done.items() if units)
    module.exit_json(diff={"before": states[0], "after": states[1]}, **result)


if __name__ == "__main__":
    main()
