#!/usr/bin/python
# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: celery_schedule
short_description: Disable, enable and trigger entries of beat's schedule
version_added: 0.1.0
description:
  - A disabled entry is passed over by every beat of the application until it is enabled again, over restarts, boots,
    deploys and a move to another host. Beat looks at the record each time before it sends an entry, so it holds from
    the next run on, without a restart. Runs that were passed over are not made up for.
  - A triggered entry is sent once, now, with its own arguments, queue and options, whether it is disabled or not. The
    module waits until a worker has taken it. Its regular times stay as they are.
  - The application is imported in a process of its own, with the environment of the workers.
author:
  - celeryops contributors (@celeryops)
extends_documentation_fragment:
  - celeryops.runbook.schedule
  - celeryops.runbook.connection
  - celeryops.runbook.attributes
options:
  entries:
    description: The entries by name. Exactly one with O(state=triggered).
    type: list
    elements: str
    required: true
  state:
    description: What is wanted of them.
    type: str
    choices: [enabled, disabled, triggered]
    required: true
  by:
    description: Who disables them. Default the user who runs the module.
    type: str
  why:
    description: The reason, required for an entry that is not disabled yet. A new one replaces the former.
    type: str
  timeout:
    description: Seconds one round of questions to the workers may take at most.
    type: float
    default: 2.0
  taken_timeout:
    description: Seconds in which a worker must have taken what was triggered.
    type: float
    default: 30.0
seealso:
  - module: celeryops.runbook.celery_schedule_info
"""

EXAMPLES = r"""
- name: No nightly report until the database is repaired
  celeryops.runbook.celery_schedule:
    environment_file: /etc/celeryops/shop/secret.env
    virtualenv: /srv/shop/current/venv
    application: shop
    app: shop.celery:app
    app_dir: /srv/shop/current/src
    user: shop
    entries: [nightly-sales-report]
    state: disabled
    why: the database is repaired

- name: Run it once, now
  celeryops.runbook.celery_schedule:
    environment_file: /etc/celeryops/shop/secret.env
    virtualenv: /srv/shop/current/venv
    application: shop
    app: shop.celery:app
    app_dir: /srv/shop/current/src
    user: shop
    entries: [nightly-sales-report]
    state: triggered
"""

RETURN = r"""
disabled:
  description: All entries that are disabled afterwards, each in words.
  returned: success
  type: dict
  sample: {nightly-sales-report: "entry nightly-sales-report is disabled by anna since ...: the database is repaired"}
task_id:
  description: Id of the task that was sent; null in check mode.
  returned: with O(state=triggered)
  type: str
task:
  description: Its name.
  returned: with O(state=triggered)
  type: str
queue:
  description: The queue it is sent to.
  returned: with O(state=triggered)
  type: str
taken:
  description: Where it was found last, V(reserved), V(scheduled) or V(running), or V(ended) if no longer anywhere.
  returned: with O(state=triggered)
  type: str
node:
  description: The worker that has it; null if it has ended.
  returned: with O(state=triggered)
  type: str
"""

import getpass
import time
from typing import Any

from ansible_collections.celeryops.runbook.plugins.module_utils import _schedule
from ansible_collections.celeryops.runbook.plugins.module_utils._module import CeleryModule, run
from ansible_collections.celeryops.runbook.plugins.module_utils.engine import pauses, schedule, tasks
from ansible_collections.celeryops.runbook.plugins.module_utils.engine.connection import Broker
from ansible_collections.celeryops.runbook.plugins.module_utils.engine.control import Control
from ansible_collections.celeryops.runbook.plugins.module_utils.engine.errors import (
    PreconditionFailed,
    QueueUnknown,
    WaitTimeout,
)
from ansible_collections.celeryops.runbook.plugins.module_utils.engine.search import Wanted, search

ARGUMENT_SPEC = {
    **_schedule.ARGUMENT_SPEC,
    "entries": {"type": "list", "elements": "str", "required": True},
    "state": {"type": "str", "choices": ["enabled", "disabled", "triggered"], "required": True},
    "by": {"type": "str"},
    "why": {"type": "str"},
    "timeout": {"type": "float", "default": 2.0},
    "taken_timeout": {"type": "float", "default": 30.0},
}


def change(module: CeleryModule, broker: Broker) -> dict[str, Any]:
    """Disable or enable."""
    params = module.params
    application, disable = params["application"], params["state"] == "disabled"
    _schedule.demand_obeying(params, broker)
    found, rests = _schedule.entries(params, broker)
    if not found["scheduler"].endswith("PersistentScheduler"):
        raise PreconditionFailed(
            f"app: beat uses {found['scheduler']}, which has a way of its own to disable an entry. Use that."
        )
    todo = []
    for name in dict.fromkeys(params["entries"]):
        held = rests.get(name)
        if disable:
            _schedule.known(found, name)
            if held is None and not params["why"]:
                raise PreconditionFailed(f"why: say why {name} is disabled; whoever finds it so will want to know.")
            if held is None or (params["why"] and params["why"] != held.why):
                todo.append(name)
        elif held is None:
            _schedule.known(found, name)
        else:
            todo.append(name)  # also one which the schedule no longer has
    before = {name: str(rest) for name, rest in rests.items()}
    for name in todo:
        if not disable:
            del rests[name]
            if not module.check_mode:
                schedule.wake(broker, application, name)
            continue
        by = params["by"] or getpass.getuser()
        if module.check_mode:
            rests[name] = schedule.Rest(name, by, params["why"], pauses.now_of(broker))
        else:
            rests[name] = schedule.rest(broker, application, name, by, params["why"])
    after = {name: str(rest) for name, rest in sorted(rests.items())}
    lines = ["".join(f"{text}\n" for text in side.values()) for side in (before, after)]
    return {"changed": bool(todo), "disabled": after, "diff": {"before": lines[0], "after": lines[1]}}


def demand_taker(broker: Broker, control: Control, task: str, queue: str) -> None:
    """Somebody must be there who takes it."""
    tasks.demand_known(broker, control, task, queue)
    held = pauses.load(broker).get(queue) if broker.kind == "redis" else None
    if held is not None:
        raise PreconditionFailed(f"entries: {held}. Nobody would take it: resume the queue first (queue_resume).")
    consumed = control.broadcast("active_queues")
    if not any(queue in tasks.queue_names(reply.value) for reply in consumed.replies if reply.error is None):
        raise QueueUnknown(f"entries: no worker consumes {queue}. Start one that does.", queue=queue)


def wait_taken(module: CeleryModule, broker: Broker, control: Control, sent: dict[str, Any]) -> tuple[str, str | None]:
    """Where it is once it has left the queue."""
    bound = module.params["taken_timeout"]
    deadline = time.monotonic() + bound
    pause = 0.05
    while True:
        seen = search(broker, control, Wanted(ids=frozenset([sent["task_id"]])), queues=[sent["queue"]])
        item = seen.found.get(sent["task_id"])
        if item is None:
            return "ended", None
        if item.place not in ("queued", "unowned"):
            return item.place, item.node
        if time.monotonic() > deadline:
            raise WaitTimeout(
                f"taken_timeout: no worker has taken {sent['task']} {sent['task_id']} out of {sent['queue']} in "
                f"{bound:g} s. It waits there still and will run: look for it with task_status, or take it back with "
                f"task_revoke.",
                **sent,
            )
        time.sleep(pause)
        pause = min(pause * 2, 1.0)


def trigger(module: CeleryModule, broker: Broker) -> dict[str, Any]:
    params = module.params
    if len(params["entries"]) != 1:
        raise PreconditionFailed("entries: name exactly one entry to trigger.")
    (name,) = params["entries"]
    found, rests = _schedule.entries(params, broker)
    entry = _schedule.known(found, name)
    disabled = {key: str(rest) for key, rest in rests.items()}
    result = {"changed": True, "disabled": disabled, "task": entry["task"], "queue": entry["queue"]}
    with Control(broker, timeout=params["timeout"]) as control:
        demand_taker(broker, control, entry["task"], entry["queue"])
        if module.check_mode:
            return {**result, "task_id": None, "taken": None, "node": None}
        sent = _schedule.of_application(params, {"do": "send", "entry": name})
        place, node = wait_taken(module, broker, control, sent)
    return {**result, **sent, "taken": place, "node": node}


def change_schedule(module: CeleryModule) -> dict[str, Any]:
    params = module.params
    for option in ("timeout", "taken_timeout"):
        if params[option] <= 0:
            raise PreconditionFailed(f"{option}: must be above 0 seconds, not {params[option]:g}.")
    if not params["entries"] or not all(name.strip() for name in params["entries"]):
        raise PreconditionFailed("entries: name at least one entry, and none with an empty name.")
    with module.broker() as broker:
        return (trigger if params["state"] == "triggered" else change)(module, broker)


def main() -> None:
    run(change_schedule, ARGUMENT_SPEC, supports_check_mode=True)


if __name__ == "__main__":
    main()
