#!/usr/bin/python
# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: celery_control
short_description: Bring live Celery workers into a wanted state
version_added: 0.1.0
description:
  - Observes the workers, works out what differs, sends only that, and observes again until the state holds.
  - All of it concerns running workers and is lost when they restart. What must last belongs into their units.
  - Pool size, autoscale, consumers, rate limits, time limits, revoked and running tasks are read back from the workers.
  - Whether task events are on cannot be read beforehand. With O(events) check mode says changed; the run says what the
    workers answer.
author:
  - celeryops contributors (@celeryops)
extends_documentation_fragment:
  - celeryops.runbook.connection
  - celeryops.runbook.attributes
attributes:
  check_mode:
    details:
      - The same C(changed) as in the run, except for O(events), which cannot be read beforehand.
options:
  destination:
    description:
      - Names of the workers. All of them must answer before anything is sent.
      - All workers that answer if omitted.
    type: list
    elements: str
  ignore_missing:
    description: Leave out nodes of O(destination) that are not connected, instead of failing. Silent ones still fail.
    type: bool
    default: false
  quiet:
    description:
      - V(true) makes the workers consume nothing. What they already hold they still run.
      - V(false) is only valid with O(consumers), which say what to consume instead.
    type: bool
  pool_size:
    description:
      - Number of pool slots. For prefork, gevent and eventlet pools without an autoscaler.
      - A pool that is to shrink while all its processes run tasks is asked again until enough are free.
    type: int
  expect_pool_size:
    description: Fail unless each worker has this many slots, or O(pool_size) already.
    type: int
  autoscale:
    description: Bounds of a worker started with C(--autoscale).
    type: dict
    suboptions:
      max:
        description: Most slots.
        type: int
        required: true
      min:
        description: Fewest slots.
        type: int
        required: true
  consumers:
    description:
      - Queues to consume, or not.
      - One that is paused (M(celeryops.runbook.celery_queue_pause)) is consumed once it is resumed.
    type: list
    elements: dict
    default: []
    suboptions:
      queue:
        description: Name of the queue.
        type: str
        required: true
      state:
        description: Whether the workers consume it.
        type: str
        choices: [present, absent]
        default: present
      exchange:
        description: Exchange of a queue the application does not declare.
        type: str
      exchange_type:
        description: Type of that exchange.
        type: str
      routing_key:
        description: Routing key of that queue.
        type: str
  rate_limits:
    description:
      - Rate by task name, as in V(10/m). V(0) lifts the limit.
      - A rate holds for each worker, not for the fleet.
    type: dict
    default: {}
  time_limits:
    description: C(soft) and C(hard) seconds by task name. An omitted one stays. Only prefork pools enforce them.
    type: dict
    default: {}
  revoked:
    description:
      - Ids of tasks the workers shall refuse to run. Workers that are down do not hear of it.
      - Only O(terminated) ends tasks that already run.
    type: list
    elements: str
    default: []
  terminated:
    description:
      - Ids of tasks to end, also while they run, by a signal to their pool process. Ids no worker holds are left alone.
      - Not for solo and threads pools.
    type: list
    elements: str
    default: []
  signal:
    description:
      - Signal for O(terminated).
      - Workers that run under C(REMAP_SIGTERM) answer V(SIGTERM) with success, yet the task runs on. This is noticed
        and fails.
    type: str
    choices: [SIGKILL, SIGQUIT, SIGTERM]
    default: SIGKILL
  events:
    description: Whether the workers send task events.
    type: bool
  shutdown:
    description:
      - Stop the workers of O(destination), which must be given, and wait until they have left the broker.
      - They leave first and finish their running tasks then. A service manager may start them again.
    type: bool
    default: false
  timeout:
    description: Seconds one round of questions or commands may take at most.
    type: float
    default: 2.0
  wait_timeout:
    description: Seconds until the wanted state must hold.
    type: float
    default: 30.0
seealso:
  - module: celeryops.runbook.celery_inspect
"""

EXAMPLES = r"""
- name: Quiet one worker before it is stopped
  celeryops.runbook.celery_control:
    environment_file: /etc/celeryops/shop/secret.env
    virtualenv: /srv/shop/current/venv
    destination: [shop-default-1@worker1]
    quiet: true

- name: Eight slots where there were four, and slower mails
  celeryops.runbook.celery_control:
    broker_url: redis://redis1:6379/0
    pool_size: 8
    expect_pool_size: 4
    rate_limits:
      shop.mail.send: 10/m

- name: Consume another queue, and no longer the bulk one
  celeryops.runbook.celery_control:
    broker_url: redis://redis1:6379/0
    destination: [shop-default-1@worker1]
    consumers:
      - queue: urgent
      - queue: bulk
        state: absent

- name: End a task that runs away
  celeryops.runbook.celery_control:
    broker_url: redis://redis1:6379/0
    terminated: [3f0b5c2e-8f4e-4a5b-9a55-0d4d1f0c9a11]
"""

RETURN = r"""
before:
  description: What the workers said beforehand, as far as the options concern it.
  returned: always
  type: dict
  sample:
    shop-default-1@worker1: {queues: [default]}
after:
  description: What they said afterwards; in check mode what they would say.
  returned: always
  type: dict
  sample:
    shop-default-1@worker1: {queues: []}
actions:
  description: The commands that were sent, or would be in check mode.
  returned: always
  type: list
  elements: dict
  sample:
    - {command: cancel_consumer, arguments: {queue: default}, destination: [shop-default-1@worker1]}
not_held:
  description: Ids of O(terminated) that no worker held.
  returned: always
  type: list
  elements: str
missing:
  description: Nodes of O(destination) left out by O(ignore_missing).
  returned: always
  type: list
  elements: str
elapsed:
  description: Seconds from the first question to the proven state.
  returned: always
  type: float
"""

import json
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ansible_collections.celeryops.runbook.plugins.module_utils._module import CeleryModule, above_zero, run
from ansible_collections.celeryops.runbook.plugins.module_utils.engine import pauses
from ansible_collections.celeryops.runbook.plugins.module_utils.engine.control import Control, Request, is_beat
from ansible_collections.celeryops.runbook.plugins.module_utils.engine.errors import (
    CeleryOpsError,
    NodeUnknown,
    NoReply,
    PreconditionFailed,
    WaitTimeout,
)
from ansible_collections.celeryops.runbook.plugins.module_utils.engine.fleet import (
    Conditions,
    Fleet,
    demand,
    observe,
    renew_consumers,
    wait_for,
)
from ansible_collections.celeryops.runbook.plugins.module_utils.engine.plan import (
    Action,
    Consumer,
    Desired,
    NodeState,
    TimeLimit,
    check_nodes,
    describe,
    plan,
    predict,
    still_alive,
)

ARGUMENT_SPEC = {
    "destination": {"type": "list", "elements": "str"},
    "ignore_missing": {"type": "bool", "default": False},
    "quiet": {"type": "bool"},
    "pool_size": {"type": "int"},
    "expect_pool_size": {"type": "int"},
    "autoscale": {
        "type": "dict",
        "options": {"max": {"type": "int", "required": True}, "min": {"type": "int", "required": True}},
    },
    "consumers": {
        "type": "list",
        "elements": "dict",
        "default": [],
        "options": {
            "queue": {"type": "str", "required": True},
            "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
            "exchange": {"type": "str"},
            "exchange_type": {"type": "str"},
            "routing_key": {"type": "str", "no_log": False},
        },
    },
    "rate_limits": {"type": "dict", "default": {}},
    "time_limits": {"type": "dict", "default": {}},
    "revoked": {"type": "list", "elements": "str", "default": []},
    "terminated": {"type": "list", "elements": "str", "default": []},
    "signal": {"type": "str", "choices": ["SIGKILL", "SIGQUIT", "SIGTERM"], "default": "SIGKILL"},
    "events": {"type": "bool"},
    "shutdown": {"type": "bool", "default": False},
    "timeout": {"type": "float", "default": 2.0},
    "wait_timeout": {"type": "float", "default": 30.0},
}
# How long a killed pool process may still be listed.
DEATH_SECONDS = 5.0
# How long until a pool that was too busy to shrink is asked again.
BUSY_SECONDS = 0.5


def time_limits_of(given: Mapping[str, Any]) -> dict[str, TimeLimit]:
    found = {}
    for task, value in given.items():
        if not isinstance(value, dict) or set(value) - {"soft", "hard"}:
            raise PreconditionFailed(
                f"time_limits.{task}: must be a dictionary with soft, hard or both, not {value!r}."
            )
        try:
            numbers = {key: float(seconds) for key, seconds in value.items() if seconds is not None}
        except (TypeError, ValueError):
            raise PreconditionFailed(f"time_limits.{task}: soft and hard are seconds, not {value!r}.") from None
        found[task] = TimeLimit(**numbers)
    return found


def desired_of(params: Mapping[str, Any]) -> Desired:
    scale = params["autoscale"]
    desired = Desired(
        quiet=params["quiet"],
        pool_size=params["pool_size"],
        expect_pool_size=params["expect_pool_size"],
        autoscale=(scale["max"], scale["min"]) if scale else None,
        consumers=tuple(
            Consumer(
                item["queue"], item["state"] == "present", item["exchange"], item["exchange_type"], item["routing_key"]
            )
            for item in params["consumers"]
        ),
        rate_limits={task: str(rate) for task, rate in params["rate_limits"].items()},
        time_limits=time_limits_of(params["time_limits"]),
        revoked=tuple(dict.fromkeys(params["revoked"])),
        terminated=tuple(dict.fromkeys(params["terminated"])),
        signal=params["signal"],
        events=params["events"],
        shutdown=params["shutdown"],
    )
    desired.check()
    destination = params["destination"]
    if desired.shutdown and destination is None:
        raise PreconditionFailed("shutdown: needs destination, the names of the workers to stop; it never means all.")
    if destination is not None and not [name for name in destination if name]:
        raise PreconditionFailed("destination: is empty, which matches nobody. Name workers, or omit it to mean all.")
    beats = [name for name in destination or () if is_beat(name)]
    if beats:
        raise PreconditionFailed(f"destination: {beats[0]} is a beat, which obeys no remote control. Use its unit.")
    above_zero(params, "timeout", "wait_timeout")
    return desired


def look(control: Control, desired: Desired, destination: list[str] | None, everybody: bool = False) -> Fleet:
    return observe(control, desired.questions(), destination=destination, census=everybody)


def targets_of(fleet: Fleet, destination: list[str] | None, ignore_missing: bool) -> tuple[list[str], list[str]]:
    """The workers to act on, and those of the destination left out; refuses who is not there or does not answer."""
    exist = sorted(name for name in fleet.present if not is_beat(name))
    known = f"There are: {', '.join(exist) or 'no workers'}."
    if destination is None:
        if not fleet.workers:
            raise NoReply(f"no worker answers; connected: {fleet.subscribed}. Start the workers, or check broker_url.")
        return fleet.workers, []
    doubled = [name for name in destination if name in fleet.duplicates]
    if doubled:
        raise PreconditionFailed(
            f"destination: {doubled[0]} is the name of more than one node; a command would reach them all. Give each "
            f"worker its own name.",
            duplicates=fleet.duplicates,
        )
    lacking = [name for name in dict.fromkeys(destination) if name not in fleet.workers]
    gone = [name for name in lacking if fleet.nodes[name].connected is False]
    silent = [name for name in lacking if name not in gone]
    if silent:
        raise NoReply(
            f"destination: no answer from {', '.join(silent)} within {fleet.elapsed:.1f} s: stopped, blocked or "
            f"gone. {known}",
            silent=silent,
            answered=exist,
        )
    if gone and not ignore_missing:
        raise NodeUnknown(
            f"destination: no node {', '.join(gone)} is connected to the broker. {known}", missing=gone, answered=exist
        )
    return [name for name in dict.fromkeys(destination) if name not in gone], gone


def states_of(fleet: Fleet, desired: Desired, nodes: list[str]) -> dict[str, NodeState]:
    states = {}
    for name in nodes:
        node = fleet.nodes[name]
        for command, _arguments in desired.questions():
            # A worker without the runtime part knows no pauses.
            if command in node.errors and command != pauses.COMMAND:
                raise NoReply(f"{name}: {command}: {node.errors[command]}. Nothing more was sent.", node=name)
        states[name] = NodeState.read(node.replies)
    return states


def send(control: Control, actions: list[Action]) -> tuple[dict[str, list[Any]], set[str]]:
    """Publish all at once. An error a worker reports ends the module, but for a pool that is too busy to shrink.

    Answers by command, and the nodes of such pools.
    """
    done = control.converse([Request(action.command, action.arguments, action.destination) for action in actions])
    answers: dict[str, list[Any]] = {}
    busy: set[str] = set()
    for action, replies in zip(actions, done.answers, strict=True):
        for reply in replies.replies:
            if action.command == "pool_shrink" and "All processes busy" in (reply.error or ""):
                busy.add(reply.node)
                continue
            if reply.error is not None:
                raise CeleryOpsError(
                    f"{reply.node} refuses {action.command}: {reply.error}.",
                    node=reply.node,
                    actions=[item.as_dict() for item in actions],
                )
            answers.setdefault(action.command, []).append(reply.value)
        if not action.verified and replies.silent_count:
            mute = sorted(set(action.destination) - set(replies.nodes))
            raise NoReply(f"{', '.join(mute)} did not answer {action.command}, and its effect cannot be read back.")
    return answers, busy


def settle(
    control: Control,
    desired: Desired,
    before: dict[str, NodeState],
    nodes: list[str],
    busy: set[str],
    wait_timeout: float,
) -> dict[str, NodeState]:
    """Observe until nothing is left to do. Terminated tasks must have lost their process too."""
    started = asked = time.monotonic()
    pause = 0.02
    readable = replace(desired, events=None)
    while True:
        missing = ""
        states: dict[str, NodeState] = {}
        try:
            states = states_of(look(control, desired, nodes), desired, nodes)
        except (NoReply, KeyError) as exc:
            missing = str(exc)
        left = plan(states, readable) if states else []
        alive = still_alive(before, states, desired.terminated) if states else []
        waited = time.monotonic() - started
        if states and not left:
            if not alive:
                return states
            if waited > DEATH_SECONDS:
                if desired.signal == "SIGKILL":
                    return states  # it ended by itself just before the signal: nothing survives this one
                raise CeleryOpsError(
                    f"terminated: {desired.signal} was answered with success, but still running: {', '.join(alive)}. "
                    f"The worker ignores this signal (REMAP_SIGTERM). Use signal: SIGKILL.",
                    alive=alive,
                )
        if busy and time.monotonic() - asked > BUSY_SECONDS:
            # One process at a time: one that is ending may still be listed.
            sizes = [item for item in left if item.command in ("pool_grow", "pool_shrink")]
            targets = [(item, busy.intersection(item.destination)) for item in sizes]
            send(
                control,
                [replace(item, arguments={"n": 1}, destination=tuple(sorted(who))) for item, who in targets if who],
            )
            asked = time.monotonic()
        if waited > wait_timeout:
            text = missing or "; ".join(str(action) for action in left) or f"still running: {', '.join(alive)}"
            text += f" (all pool processes of {', '.join(sorted(busy))} were busy)" if busy else ""
            raise WaitTimeout(
                f"not as wanted {wait_timeout} s after the commands were sent. Still to do: {text}.",
                left=[action.as_dict() for action in left],
                after=describe(states, desired),
            )
        time.sleep(pause)
        pause = min(pause * 2, 0.5)


def control_workers(module: CeleryModule) -> dict[str, Any]:
    params = module.params
    desired = desired_of(params)
    destination = params["destination"]
    started = time.monotonic()
    with module.broker() as broker, Control(broker, timeout=params["timeout"]) as control:
        if broker.kind == "redis" and (desired.quiet is not None or desired.consumers):
            desired = replace(desired, paused=frozenset(pauses.load(broker)))
        fleet = look(control, desired, destination, everybody=desired.shutdown)
        nodes, missing = targets_of(fleet, destination, params["ignore_missing"])
        if destination is None and fleet.silent_count:
            module.warn(f"{fleet.silent_count} connected node(s) do not answer and are left alone.")
        before = states_of(fleet, desired, nodes)
        for text in check_nodes(before, desired):
            module.warn(text)
        actions = plan(before, desired)
        changed = bool(actions)
        after = predict(before, actions, desired)
        if actions and not module.check_mode:
            if desired.shutdown:
                control.cast([Request(item.command, item.arguments, item.destination) for item in actions])
                conditions = Conditions(gone=tuple(nodes), silent_before=fleet.silent_count)
                waited = wait_for(
                    control,
                    conditions,
                    timeout=params["timeout"],
                    wait_timeout=params["wait_timeout"],
                    interval=0.2,
                )
                demand(waited, params["wait_timeout"])
            else:
                answers, busy = send(control, actions)
                after = settle(control, desired, before, nodes, busy, params["wait_timeout"])
                if broker.kind == "amqp":
                    resized = [item for item in actions if item.command in ("pool_grow", "pool_shrink")]
                    renew_consumers(
                        control, [node for item in resized for node in item.destination or ()], params["wait_timeout"]
                    )
                if desired.events is not None:
                    said = [
                        str(value) for name in ("enable_events", "disable_events") for value in answers.get(name, ())
                    ]
                    others = [action for action in actions if action.verified]
                    changed = bool(others) or any("already" not in text for text in said)
    shown_before, shown_after = describe(before, desired), describe(after, desired)
    held = {task_id for state in before.values() for task_id in state.tasks}
    return {
        "changed": changed,
        "before": shown_before,
        "after": shown_after,
        "diff": {
            "before": json.dumps(shown_before, indent=2, sort_keys=True) + "\n",
            "after": json.dumps(shown_after, indent=2, sort_keys=True) + "\n",
        },
        "actions": [action.as_dict() for action in actions],
        "not_held": [task_id for task_id in desired.terminated if task_id not in held],
        "missing": missing,
        "elapsed": round(time.monotonic() - started, 3),
    }


def main() -> None:
    run(control_workers, ARGUMENT_SPEC, libraries=(), supports_check_mode=True)


if __name__ == "__main__":
    main()
