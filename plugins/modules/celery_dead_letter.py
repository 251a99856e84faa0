#!/usr/bin/python
# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: celery_dead_letter
short_description: Requeue or purge the dead letters of a Celery queue
version_added: 0.1.0
description:
  - V(requeued) sends entries back to the queue they came from, in their priority, their retries counted anew, an
    expiry that has passed left out. V(purged) saves them to a file and removes them.
  - Entries move in whole batches, each by one script in Redis. A run that is killed loses none and doubles none; the
    next run on the queue puts back what is aside, see RV(recovered).
  - What cannot be decoded, and what no worker would know, stays where it is and is counted.
author:
  - celeryops contributors (@celeryops)
extends_documentation_fragment:
  - celeryops.runbook.connection
  - celeryops.runbook.dead_letters
  - celeryops.runbook.attributes
options:
  queue:
    description: The queue, with or without C(.dead).
    type: str
    required: true
  state:
    description: What to do with the entries.
    type: str
    choices: [requeued, purged]
    required: true
  confirm:
    description: Must equal the name of the dead-letter queue, such as C(orders.dead), for V(purged).
    type: str
  max_messages:
    description: Take at most so many, those that failed first.
    type: int
  rate:
    description: Requeue at most so many a second; 0 for no bound.
    type: float
    default: 0
  registered_only:
    description:
      - Leave entries in place whose task is unknown to the workers that consume the queue. They would come back.
    type: bool
    default: true
  timeout:
    description: Seconds the workers have to answer.
    type: float
    default: 2.0
  path:
    description:
      - File on the host for V(purged). M(celeryops.runbook.redis_queue) with
        O(celeryops.runbook.redis_queue#module:state=imported) puts it back.
    type: path
  overwrite:
    description: Replace the file O(path).
    type: bool
    default: false
  compress_level:
    description: 1 to 9 compress the file with gzip; 0 does not.
    type: int
    default: 1
notes:
  - On RabbitMQ only V(requeued). Each 100 entries are one transaction of the broker, so a run that is killed neither
    loses nor doubles; a broker that dies in a commit may have an entry in both queues. What is looked at and stays is
    marked as redelivered.
seealso:
  - module: celeryops.runbook.celery_dead_letter_info
"""

EXAMPLES = r"""
- name: The mails that failed while the mail server was away, fifty a second
  celeryops.runbook.celery_dead_letter:
    environment_file: /etc/celeryops/shop/secret.env
    virtualenv: /srv/shop/current/venv
    queue: email
    state: requeued
    filter:
      exceptions: [ConnectionRefusedError]
    rate: 50

- name: What failed a month ago
  celeryops.runbook.celery_dead_letter:
    environment_file: /etc/celeryops/shop/secret.env
    virtualenv: /srv/shop/current/venv
    queue: email
    state: purged
    confirm: email.dead
    filter:
      older_than: 2592000
    path: /var/backups/email.dead.queue.gz
"""

RETURN = r"""
count:
  description: Entries requeued or removed; in check mode those that would be.
  returned: success
  type: int
tasks:
  description: The same by task name, where it is known.
  returned: success
  type: dict
unknown_tasks:
  description: Entries that the filter selects and no worker knows, by task name. They stay.
  returned: success
  type: dict
undecodable:
  description: Entries that cannot be read. They stay, unless everything is purged.
  returned: success
  type: int
before:
  description: Entries in the queue.
  returned: success
  type: int
after:
  description: The same afterwards; in check mode as it would be.
  returned: success
  type: int
saved:
  description: The file, with C(path), C(id), C(sha256), C(bytes).
  returned: when a file was written
  type: dict
recovered:
  description: An interrupted operation that was found on the queue, with C(operation), C(started), C(count), C(action).
  returned: when there was one
  type: dict
elapsed:
  description: Seconds spent moving.
  returned: success
  type: float
"""

from typing import Any

from ansible_collections.celeryops.runbook.plugins.module_utils import _dead_letters
from ansible_collections.celeryops.runbook.plugins.module_utils._module import CeleryModule, above_zero, confirmed, run
from ansible_collections.celeryops.runbook.plugins.module_utils.engine import savefile
from ansible_collections.celeryops.runbook.plugins.module_utils.engine.connection import Broker
from ansible_collections.celeryops.runbook.plugins.module_utils.engine.deadletters import (
    DeadLetters,
    DeadSelection,
    origin_queue,
)
from ansible_collections.celeryops.runbook.plugins.module_utils.engine.deadletters_amqp import AmqpDeadLetters
from ansible_collections.celeryops.runbook.plugins.module_utils.engine.errors import PreconditionFailed
from ansible_collections.celeryops.runbook.plugins.module_utils.engine.queues import Outcome

# What was done, entries before and after, and what no worker of the queue knows.
Done = tuple[Outcome, int, int, dict[str, int]]
ARGUMENT_SPEC: dict[str, Any] = {
    "queue": {"type": "str", "required": True},
    "state": {"type": "str", "required": True, "choices": ["requeued", "purged"]},
    "confirm": {"type": "str"},
    "filter": _dead_letters.FILTER_SPEC,
    "max_messages": {"type": "int"},
    "rate": {"type": "float", "default": 0},
    "registered_only": {"type": "bool", "default": True},
    "timeout": {"type": "float", "default": 2.0},
    "path": {"type": "path"},
    "overwrite": {"type": "bool", "default": False},
    "compress_level": {"type": "int", "default": 1},
}


def check(params: dict[str, Any]) -> str:
    """What can be judged without the broker; the name of the dead-letter queue."""
    if not params["queue"]:
        raise PreconditionFailed("queue: is empty. Name the queue.")
    queue = _dead_letters.names([params["queue"]])[0]
    if params["state"] == "purged":
        confirmed(params, queue, "purging removes entries, so it")
        if params["path"] is None:
            raise PreconditionFailed("path: state purged needs the name of a file on this host.")
        if params["rate"]:
            raise PreconditionFailed("rate: has no meaning with state purged.")
    elif params["path"] is not None:
        raise PreconditionFailed("path: has no meaning with state requeued.")
    above_zero(params, "timeout")
    if params["rate"] < 0:
        raise PreconditionFailed(f"rate: must not be below 0 a second, not {params['rate']:g}.")
    if params["max_messages"] is not None and params["max_messages"] < 1:
        raise PreconditionFailed(f"max_messages: must be 1 or more, not {params['max_messages']}.")
    if not 0 <= params["compress_level"] <= 9:
        raise PreconditionFailed(f"compress_level: must be 0 to 9, not {params['compress_level']}.")
    return queue


def forecast(dead: DeadLetters, params: dict[str, Any], queue: str, wanted: DeadSelection) -> Outcome:
    """What a run would do, counted without touching anything."""
    outcome = Outcome(params["state"], queue)
    pending = dead.interrupted(queue)
    if pending is not None:
        outcome.recovered = {**pending, "action": "pending"}
    found = dead.task_names(queue, wanted, limit=params["max_messages"])
    outcome.count, outcome.tasks, outcome.undecodable = found.count, found.tasks, found.undecodable
    if not wanted:
        outcome.count = min(dead.depth([queue])[queue]["depth"], params["max_messages"] or 1 << 62)
        if params["state"] == "requeued":
            outcome.count -= found.undecodable
    if params["path"] is not None and outcome.count:
        savefile.check_target(params["path"], params["overwrite"])
    return outcome


def act(dead: DeadLetters, params: dict[str, Any], queue: str, wanted: DeadSelection) -> Outcome:
    limit = params["max_messages"]
    if params["state"] == "requeued":
        return dead.requeue(queue, wanted, limit=limit, rate=params["rate"])
    file = {"overwrite": params["overwrite"], "compress_level": params["compress_level"]}
    if wanted:
        return dead.drop(queue, wanted, params["path"], limit=limit, **file)
    return dead.purge(queue, params["path"], limit=limit, **file)


def on_redis(module: CeleryModule, broker: Broker, queue: str, wanted: DeadSelection) -> Done:
    params = module.params
    dead = DeadLetters.of(broker)
    _dead_letters.require(dead, [queue])
    before, unknown = dead.depth([queue])[queue]["depth"], {}
    pending = dead.interrupted(queue)
    if params["state"] == "requeued" and params["registered_only"] and (pending or dead.has_any(queue, wanted)):
        known = _dead_letters.known_tasks(broker, origin_queue(queue), params["timeout"])
        unknown = {name: n for name, n in dead.task_names(queue, wanted).tasks.items() if name not in known}
        if unknown or pending:  # what an interrupted run has aside is seen by nobody
            wanted = _dead_letters.selection(params["filter"], known)
    if module.check_mode:
        outcome = forecast(dead, params, queue, wanted)
        return outcome, before, before - outcome.count, unknown
    return act(dead, params, queue, wanted), before, dead.depth([queue])[queue]["depth"], unknown


def on_amqp(module: CeleryModule, broker: Broker, queue: str, wanted: DeadSelection) -> Done:
    params = module.params
    if params["state"] == "purged":
        raise PreconditionFailed(
            "state: purged saves to a file first, which is for Redis brokers only. On RabbitMQ move the entries away "
            "with its shovel, or remove them with rabbitmqctl purge_queue."
        )
    with broker.guard(), broker.celery_app.connection_for_write() as connection:
        dead = AmqpDeadLetters(connection)
        before = dead.require(queue)
        found = dead.look(queue, wanted)
        unknown: dict[str, int] = {}
        if params["registered_only"] and found["matched"]:
            known = _dead_letters.known_tasks(broker, origin_queue(queue), params["timeout"])
            unknown = {name: n for name, n in found["tasks"].items() if name not in known}
            wanted = _dead_letters.selection(params["filter"], known)
        if module.check_mode:
            tasks = {name: n for name, n in found["tasks"].items() if name not in unknown}
            outcome = Outcome("requeued", queue, sum(tasks.values()), tasks, undecodable=found["undecodable"])
            outcome.count = min(outcome.count, params["max_messages"] or outcome.count)
            return outcome, before, before - outcome.count, unknown
        outcome = dead.requeue(queue, wanted, limit=params["max_messages"], rate=params["rate"])
        return outcome, before, before - outcome.count, unknown


def change(module: CeleryModule) -> dict[str, Any]:
    params = module.params
    queue = check(params)
    wanted = _dead_letters.selection(params["filter"])
    with module.broker() as broker:
        way = on_redis if broker.kind == "redis" else on_amqp
        outcome, before, after, unknown = way(module, broker, queue, wanted)
    if unknown:
        texts = ", ".join(f"{name} ({count})" for name, count in sorted(unknown.items()))
        module.warn(f"{queue}: left in place, because no worker of the queue knows the task: {texts}.")
    return {
        "changed": outcome.count > 0 or outcome.recovered is not None,
        "queue": queue,
        "count": outcome.count,
        "tasks": outcome.tasks or {},
        "unknown_tasks": unknown,
        "undecodable": outcome.undecodable,
        "before": before,
        "after": after,
        "elapsed": round(outcome.elapsed, 3),
        **outcome.traces(),
        "diff": {"before": {queue: before}, "after": {queue: after, params["state"]: outcome.tasks or outcome.count}},
    }


def main() -> None:
    run(change, ARGUMENT_SPEC, supports_check_mode=True)


if __name__ == "__main__":
    main()
