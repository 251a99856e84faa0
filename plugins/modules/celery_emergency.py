#!/usr/bin/python
# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: celery_emergency
short_description: The broker's side of an emergency stop and of the way back
version_added: 0.1.0
description:
  - Pauses every queue of an application, writes down what is stopped and cut before it is, gives back what cut
    workers held, and undoes exactly that later.
  - The record is a file with mode 0600 in O(directory), with the arguments of the tasks that were cut, and while the
    stop is in force a key in the broker.
  - It stops no process. The role C(emergency) stops the units between V(begin) and V(end), with
    M(celeryops.runbook.celery_service).
  - Redis brokers only.
author:
  - celeryops contributors (@celeryops)
extends_documentation_fragment:
  - celeryops.runbook.connection
  - celeryops.runbook.result.backend
  - celeryops.runbook.attributes
options:
  name:
    description: Name of the application.
    type: str
    required: true
  step:
    description:
      - V(begin) writes the record, pauses the queues of O(queues) that nobody paused yet, gives running tasks O(wait)
        seconds to end, and adds those to the record that still run. A broker that does not answer is no failure here,
        see RV(undone); the record is then a file only.
      - V(end) gives back what no live worker holds and tells what became of the tasks in the record. With
        O(running=terminate) it takes the messages of those that ran out of their queues, saved to files first.
      - V(find) only reads, the stop that is in force or O(file), and how the broker keeps its data.
      - V(lift) resumes the queues that this stop paused. What an operator paused stays paused.
      - V(close) sends again what was cut, with O(requeue), and ends the stop. With O(file) it only sends.
    type: str
    choices: [begin, end, find, lift, close]
    required: true
  directory:
    description: Directory on the host for the record and the messages. Made with mode 0700 if it is not there.
    type: path
    required: true
  file:
    description: A record that is ended, whose tasks are to be sent again after all. For V(find) and V(close).
    type: path
  units:
    description: For V(begin), the instances that run, by host, each with the name of its node.
    type: dict
    default: {}
  queues:
    description: For V(begin), the queues of the application.
    type: list
    elements: str
    default: []
  running:
    description:
      - What is to become of tasks that run when O(wait) is over. V(finish) and V(requeue) leave those that are
        acknowledged late in their queue; V(terminate) takes them out.
    type: str
    choices: [finish, requeue, terminate]
    default: finish
  wait:
    description: Seconds that running tasks have, for V(begin).
    type: float
    default: 300.0
  by:
    description: Who stops it. Default the user who runs the module.
    type: str
  why:
    description: The reason.
    type: str
  requeue:
    description: For V(close), send again what was cut.
    type: bool
    default: false
  timeout:
    description: Seconds one round of questions may take at most.
    type: float
    default: 2.0
  wait_timeout:
    description: Seconds until all workers must have followed a pause or its end.
    type: float
    default: 30.0
notes:
  - A task that was acknowledged when it began has no message any more. It is sent again from the name and arguments
    that its worker showed, without priority, expiry and the rest of a chain or chord.
  - A task is sent again under its own id, once. That is remembered in the broker for 90 days.
seealso:
  - module: celeryops.runbook.celery_queue_pause
  - module: celeryops.runbook.celery_requeue
  - module: celeryops.runbook.celery_service
"""

EXAMPLES = r"""
- name: Which stop is in force
  celeryops.runbook.celery_emergency:
    environment_file: /etc/celeryops/shop/secret.env
    virtualenv: /srv/shop/current/venv
    name: shop
    step: find
    directory: /var/backups/celeryops/shop
"""

RETURN = r"""
found:
  description: Whether there is a record.
  returned: success
  type: bool
open:
  description: Whether it is that of a stop that is in force afterwards.
  returned: success
  type: bool
id:
  description: Name of the stop.
  returned: success
  type: str
  sample: 20261121T224500Z-1f3a9c2e
file:
  description: The record on this host.
  returned: success
  type: str
since:
  description: When it began, in unix seconds.
  returned: when there is a record
  type: float
by:
  description: Who stopped it.
  returned: when there is a record
  type: str
why:
  description: The reason.
  returned: when there is a record
  type: str
units:
  description: Instances that ran, by host.
  returned: success
  type: dict
  sample: {worker1: [fast-1]}
nodes:
  description: Their nodes.
  returned: success
  type: list
  elements: str
pauses:
  description: Queues that the stop paused.
  returned: success
  type: list
  elements: str
tasks:
  description:
    - Tasks that ran, or were fetched by a worker that ran one, with C(id), C(name), C(queue), C(node) and C(outcome).
    - C(outcome) is V(held) before the units are stopped. Then it is V(waits) for a task that is in its queue, V(ended),
      V(saved) for one whose message was taken into a file, V(cut) for one that nobody has any more, and V(requeued).
  returned: success
  type: list
  elements: dict
files:
  description: Files with messages, and their queues.
  returned: success
  type: dict
before:
  description: Messages that waited when the stop began, by queue.
  returned: success
  type: dict
waiting:
  description: Messages that wait now.
  returned: when the broker answers
  type: dict
paused:
  description: Queues that were paused by this run.
  returned: O(step=begin)
  type: list
  elements: str
busy:
  description: Instances whose tasks are to be cut, by host.
  returned: O(step=begin)
  type: dict
rescued:
  description: Messages given back that no live worker held.
  returned: O(step=end)
  type: int
lifted:
  description: Queues that were resumed.
  returned: O(step=lift)
  type: list
  elements: str
left:
  description: Queues that somebody else paused and that stay so.
  returned: O(step=lift)
  type: list
  elements: str
requeued:
  description: Ids of the tasks sent again by this run.
  returned: O(step=close)
  type: list
  elements: str
keeps:
  description: Whether a restart of the broker keeps its data.
  returned: O(step=find)
  type: bool
undone:
  description: What could not be done, in words.
  returned: success
  type: list
  elements: str
"""

import dataclasses
import getpass
import os
import time
from typing import Any

from ansible_collections.celeryops.runbook.plugins.module_utils._module import CeleryModule, above_zero, run
from ansible_collections.celeryops.runbook.plugins.module_utils.engine import emergency
from ansible_collections.celeryops.runbook.plugins.module_utils.engine.connection import Broker
from ansible_collections.celeryops.runbook.plugins.module_utils.engine.control import Control
from ansible_collections.celeryops.runbook.plugins.module_utils.engine.errors import (
    ConnectionFailed,
    PreconditionFailed,
)
from ansible_collections.celeryops.runbook.plugins.module_utils.engine.queues import RedisQueues
from ansible_collections.celeryops.runbook.plugins.module_utils.engine.survey import broker_facts

ARGUMENT_SPEC: dict[str, Any] = {
    "name": {"type": "str", "required": True},
    "step": {"type": "str", "choices": ["begin", "end", "find", "lift", "close"], "required": True},
    "directory": {"type": "path", "required": True},
    "file": {"type": "path"},
    "units": {"type": "dict", "default": {}},
    "queues": {"type": "list", "elements": "str", "default": []},
    "running": {"type": "str", "choices": list(emergency.RUNNING), "default": emergency.FINISH},
    "wait": {"type": "float", "default": 300.0},
    "by": {"type": "str"},
    "why": {"type": "str"},
    "requeue": {"type": "bool", "default": False},
    "timeout": {"type": "float", "default": 2.0},
    "wait_timeout": {"type": "float", "default": 30.0},
    "result_backend": {"type": "str", "no_log": True},
}
NOTHING: dict[str, Any] = {
    "found": False, "open": False, "id": "", "file": "", "units": {}, "nodes": [], "pauses": [],
    "tasks": [], "files": {}, "before": {}, "waiting": {}, "undone": [],
}  # fmt: skip


def shown(record: emergency.Record | None, path: str) -> dict[str, Any]:
    if record is None:
        return dict(NOTHING)
    return {
        "found": True,
        "open": record.ended is None,
        "file": path,
        **{name: getattr(record, name) for name in ("id", "since", "by", "why", "units", "nodes", "pauses", "files")},
        "tasks": [task.shown for task in record.tasks],
        "before": record.waiting,
        "undone": [],
    }


def waiting(broker: Broker, record: emergency.Record) -> dict[str, int]:
    return {queue: int(row["depth"]) for queue, row in RedisQueues.of(broker).depth(record.queues).items()}


def begin(module: CeleryModule, broker: Broker, stop: emergency.Stop) -> dict[str, Any]:
    params = module.params
    record = emergency.new(
        params["name"], params["by"] or getpass.getuser(), params["why"] or "", params["running"], time.time()
    )
    depths: dict[str, int] = {}
    try:
        with broker.guard(), Control(broker, timeout=params["timeout"]) as control:
            done = stop.begin(
                broker,
                control,
                record,
                units=params["units"],
                queues=params["queues"],
                wait=params["wait"],
                pause_timeout=params["wait_timeout"],
            )
            depths = waiting(broker, done.record)
    except ConnectionFailed as exc:
        done = stop.unheard(record, params["units"], exc.msg)
    # What runs now may still end in time.
    busy = {} if module.check_mode and params["running"] == emergency.FINISH else done.busy
    plan = {"paused": done.paused, "units": params["units"], "tasks": [task.shown for task in done.record.at("held")]}
    return {
        **shown(done.record, done.path),
        "changed": done.changed,
        "undone": done.undone,
        "busy": busy,
        "paused": done.paused,
        "waiting": depths,
        "diff": {"before": {"paused": [], "units": {}, "tasks": []}, "after": plan},
    }


def current(module: CeleryModule, broker: Broker) -> emergency.Record | None:
    """The record that is meant: the one named, else that of the stop in force."""
    params = module.params
    if params["file"]:
        record = emergency.read(params["file"])
        if record.name != params["name"]:
            raise PreconditionFailed(f"file: {params['file']} is of the application {record.name}.")
        return record
    return emergency.load(broker, params["name"]) or emergency.open_file(params["directory"], params["name"])


def end(module: CeleryModule, broker: Broker, stop: emergency.Stop, record: emergency.Record) -> dict[str, Any]:
    with Control(broker, timeout=module.params["timeout"]) as control:
        after, count, undone = stop.end(broker, control, record)
    return {
        **shown(after, emergency.path_of(module.params["directory"], after)),
        "changed": bool(count) or after != record,
        "rescued": count,
        "undone": undone,
        "diff": {"before": {"rescued": 0}, "after": {"rescued": count}},
    }


def find(broker: Broker, record: emergency.Record | None, path: str) -> dict[str, Any]:
    facts = broker_facts(broker)
    return {**shown(record, path), "changed": False, "keeps": bool(facts.get("aof_enabled") or facts.get("save"))}


def lift(module: CeleryModule, broker: Broker, record: emergency.Record, path: str) -> dict[str, Any]:
    params = module.params
    with Control(broker, timeout=params["timeout"]) as control:
        lifted, left, _waiting = emergency.lift(
            broker,
            control,
            record,
            timeout=params["timeout"],
            wait_timeout=params["wait_timeout"],
            warn=module.warn,
            dry=module.check_mode,
        )
    return {
        **shown(record, path),
        "changed": bool(lifted),
        "lifted": lifted,
        "left": left,
        "diff": {"before": {"paused": sorted({*lifted, *left})}, "after": {"paused": left}},
    }


def close(module: CeleryModule, broker: Broker, record: emergency.Record) -> dict[str, Any]:
    directory = os.path.dirname(module.params["file"]) if module.params["file"] else module.params["directory"]
    after = emergency.send_again(broker, record, dry=module.check_mode) if module.params["requeue"] else record
    ids = [old.id for old, new in zip(record.tasks, after.tasks, strict=True) if old != new]
    after = dataclasses.replace(after, ended=after.ended or time.time())
    if not module.check_mode and after != record:
        # The key goes only with the stop that it tells of.
        emergency.keep(broker if record.ended is None else None, directory, after)
    return {
        **shown(after, emergency.path_of(directory, after)),
        "changed": after != record,
        "requeued": ids,
        "diff": {"before": {"sent again": []}, "after": {"sent again": ids}},
    }


def step(module: CeleryModule) -> dict[str, Any]:
    params = module.params
    name = params["step"]
    above_zero(params, "timeout", "wait_timeout")
    if params["wait"] < 0:
        raise PreconditionFailed(f"wait: must not be below 0 seconds, not {params['wait']:g}.")
    if params["file"] and name not in ("find", "close"):
        raise PreconditionFailed(f"file: has no meaning with step {name}.")
    stop = emergency.Stop(params["directory"], timeout=params["timeout"], warn=module.warn, dry=module.check_mode)
    with Broker(module.result_spec()) as broker:
        if broker.kind != "redis":
            raise PreconditionFailed(
                f"broker_url: {broker.endpoint.scheme}:// is not Redis. On this broker stop the units with the "
                f"playbook stop; what waits stays in its queues."
            )
        if name == "begin":
            return begin(module, broker, stop)
        with broker.guard():
            record = current(module, broker)
            path = "" if record is None else params["file"] or emergency.path_of(params["directory"], record)
            if name == "find":
                result = find(broker, record, path)
            elif record is None:
                result = {**NOTHING, "changed": False, "rescued": 0, "lifted": [], "left": [], "requeued": []}
            elif name == "end":
                result = end(module, broker, stop, record)
            elif name == "lift":
                result = lift(module, broker, record, path)
            else:
                result = close(module, broker, record)
            result["waiting"] = waiting(broker, record) if record is not None else {}
    return result


def main() -> None:
    run(step, ARGUMENT_SPEC, libraries=("redis", "celery"), supports_check_mode=True)


if __name__ == "__main__":
    main()
