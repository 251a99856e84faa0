#!/usr/bin/python
# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: celery_beat_info
short_description: Find every beat of an application and judge which one is the right one
version_added: 0.1.0
description:
  - Joins what was seen on the hosts (M(celeryops.runbook.celery_host_info)) with what the broker knows, which is who
    leads, the last tick, and with Celery 5.7 who answers a ping.
  - Says what each host has to do so that exactly the wanted beat runs, and what stands against it. It does none of it.
author:
  - celeryops contributors (@celeryops)
extends_documentation_fragment:
  - celeryops.runbook.connection
  - celeryops.runbook.attributes.info
options:
  application:
    description: The application's name, the variable C(celeryops_app_name), under which its beat leaves its records.
    type: str
    required: true
  hosts:
    description:
      - What M(celeryops.runbook.celery_host_info) returned, by host, with C(reachable) and, if false, C(error).
    type: dict
    required: true
  wanted:
    description: The hosts that are to run beat.
    type: list
    elements: str
    required: true
  lost:
    description: Hosts that are surely down. They need not be reachable, and their beat must have stopped ticking.
    type: list
    elements: str
    default: []
  moved_from:
    description: The host on which beat leads now and shall not any more.
    type: str
    default: ""
  silent_after:
    description: Seconds without a tick after which a beat that runs is to be restarted.
    type: float
    default: 300.0
  timeout:
    description: Seconds a beat has to answer the ping.
    type: float
    default: 2.0
  wait_timeout:
    description: Seconds until the wanted beat, as O(hosts) show it, must tick; 0 asks for no tick.
    type: float
    default: 0.0
seealso:
  - module: celeryops.runbook.celery_host_info
  - module: celeryops.runbook.celery_beat_stop
"""

EXAMPLES = r"""
- name: Which beats are there
  celeryops.runbook.celery_beat_info:
    environment_file: /etc/celeryops/shop/secret.env
    virtualenv: /srv/shop/current/venv
    application: shop
    hosts: "{{ seen }}"
    wanted: [worker1]
"""

RETURN = r"""
found:
  description: Every beat process, in words.
  returned: success
  type: list
  elements: str
  sample: ["worker1 (pid 812, celery-shop-beat.service)"]
problems:
  description: What stands against doing anything, each with its cure.
  returned: success
  type: list
  elements: str
acts:
  description: What is to be done, in words.
  returned: success
  type: list
  elements: str
end:
  description:
    - Processes to be ended, by host, each with C(pid) and C(began), for M(celeryops.runbook.celery_beat_stop).
  returned: success
  type: dict
remove:
  description: Hosts whose unit is to be stopped and disabled.
  returned: success
  type: list
  elements: str
start:
  description: Hosts whose unit is to be started.
  returned: success
  type: list
  elements: str
restart:
  description: Hosts whose beat is frozen or silent.
  returned: success
  type: list
  elements: str
leader:
  description: The host and process of the beat that leads; null if none does.
  returned: success
  type: dict
  sample: {host: worker1, pid: 812, since: 1795000000.0, release: v1}
heartbeat:
  description: The last tick, as M(celeryops.runbook.celery_health) returns it in C(beat).
  returned: success
  type: dict
answered:
  description: Nodes of beats that answered a ping.
  returned: success
  type: list
  elements: str
"""

import time
from typing import Any

from ansible_collections.celeryops.runbook.plugins.module_utils._module import CeleryModule, run
from ansible_collections.celeryops.runbook.plugins.module_utils.engine import beats, heartbeat, schedule
from ansible_collections.celeryops.runbook.plugins.module_utils.engine.connection import Broker
from ansible_collections.celeryops.runbook.plugins.module_utils.engine.control import Control, is_beat
from ansible_collections.celeryops.runbook.plugins.module_utils.engine.errors import PreconditionFailed, WaitTimeout

ARGUMENT_SPEC = {
    "application": {"type": "str", "required": True},
    "hosts": {"type": "dict", "required": True},
    "wanted": {"type": "list", "elements": "str", "required": True},
    "lost": {"type": "list", "elements": "str", "default": []},
    "moved_from": {"type": "str", "default": ""},
    "silent_after": {"type": "float", "default": 300.0},
    "timeout": {"type": "float", "default": 2.0},
    "wait_timeout": {"type": "float", "default": 0.0},
}


def look(module: CeleryModule, broker: Broker, answered: list[str]) -> beats.Seen:
    params = module.params
    redis = broker.kind == "redis"  # elsewhere there are no records
    return beats.Seen(
        hosts=params["hosts"],
        wanted=params["wanted"],
        leader=schedule.leader(broker, params["application"]) if redis else None,
        heartbeat=heartbeat.read(broker, params["application"]) if redis else None,
        answered=answered,
        lost=params["lost"],
        moved_from=params["moved_from"],
        silent_after=params["silent_after"],
    )


def settle(module: CeleryModule, broker: Broker, seen: beats.Seen) -> beats.Seen:
    """Wait until the wanted beat ticks."""
    bound = module.params["wait_timeout"]
    deadline = time.monotonic() + bound
    while True:
        missing = beats.lacking(seen)
        if not missing:
            return seen
        if time.monotonic() > deadline:
            raise WaitTimeout(
                f"{missing}, {bound:g} s after it was started. Look at its log: journalctl -u "
                f"celery-{module.params['application']}-beat",
                missing=missing,
            )
        time.sleep(0.3)
        seen = look(module, broker, list(seen.answered))


def beat_info(module: CeleryModule) -> dict[str, Any]:
    params = module.params
    for option in ("timeout", "silent_after"):
        if params[option] <= 0:
            raise PreconditionFailed(f"{option}: must be above 0 seconds, not {params[option]:g}.")
    if not params["wanted"]:
        raise PreconditionFailed("wanted: name the host that is to run beat.")
    with module.broker() as broker:
        with Control(broker, timeout=params["timeout"]) as control:
            answered = [reply.node for reply in control.broadcast("ping").replies if is_beat(reply.node)]
        seen = look(module, broker, answered)
        if params["wait_timeout"] > 0 and broker.kind == "redis":
            seen = settle(module, broker, seen)
    found = beats.plan(seen)
    leader = seen.leader
    return {
        "changed": False,
        "found": found.found,
        "problems": found.problems,
        "acts": found.acts,
        "end": found.end,
        "remove": found.remove,
        "start": found.start,
        "restart": found.restart,
        "leader": leader
        and {"host": leader.host, "pid": leader.pid, "since": leader.since, "release": leader.release or None},
        "heartbeat": seen.heartbeat,
        "answered": sorted(seen.answered),
    }


def main() -> None:
    run(beat_info, ARGUMENT_SPEC, supports_check_mode=True)


if __name__ == "__main__":
    main()
