#!/usr/bin/python
# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: redis_queue
short_description: Purge, move, export, import, filter and rescue messages of Celery queues in Redis
version_added: 0.1.0
description:
  - Works on the waiting messages of one queue, all priority steps included. What workers hold is not touched.
  - With V(rescued) it works on what workers have fetched and not acknowledged, and touches only what no live one holds.
  - Messages are taken aside first, by renaming, so that no worker sees them; every later step moves whole messages at
    once. Workers and producers may go on meanwhile.
  - A run that is killed loses nothing. The next run on the queue, whatever its O(state), finishes the interrupted
    operation if its file is complete and puts the messages back otherwise; see RV(recovered).
  - Messages that cannot be decoded, or are of an unknown envelope, stay where they are and are counted, except that
    V(purged) saves and removes and V(imported) restores every message byte for byte.
author:
  - celeryops contributors (@celeryops)
extends_documentation_fragment:
  - celeryops.runbook.connection
  - celeryops.runbook.attributes
options:
  queue:
    description:
      - Name of the queue.
      - Only V(rescued) can do without; it then gives back messages of every queue of the database.
    type: str
  state:
    description:
      - V(purged) removes the messages, V(dropped) those that O(filter) selects, both saved to O(path) first.
      - V(moved) moves them, or those that O(filter) selects, behind those of O(to). Their routing is rewritten, so that
        a worker that gives one back gives it back there; order and priority stay.
      - V(exported) copies them, or those that O(filter) selects, to O(path) and leaves them. What workers take or
        producers add meanwhile may or may not be in it.
      - V(imported) puts the messages of O(path), or those that O(filter) selects, in front of the queue in their order
        and priority, each once.
      - V(rescued) gives messages back that were fetched by workers which are dead, without waiting for the visibility
        timeout. Every worker is asked what it holds. While a connected node does not answer, or a worker is stopping,
        nothing is touched and all that may be its is counted in RV(unknown).
    type: str
    choices: [purged, dropped, moved, exported, imported, rescued]
    required: true
  confirm:
    description: Must equal O(queue) for V(purged) and V(dropped).
    type: str
  to:
    description: The queue to move to. It must be declared or hold messages, unless O(create) is set.
    type: str
  create:
    description:
      - Let O(to) be a queue that nothing has declared yet, or O(queue) for V(imported) of a file of another queue.
    type: bool
    default: false
  dead:
    description:
      - Names of nodes that do not answer and are surely dead; V(rescued) no longer waits for them.
      - A node that only hangs runs its tasks as well when it wakes up. One that answers is refused here.
    type: list
    elements: str
    default: []
  timeout:
    description: Seconds that nodes have to answer V(rescued).
    type: float
    default: 2.0
  path:
    description:
      - File on the host. Written with mode 0600, in place only when it is complete, synced and read back.
      - A first line of JSON tells id, queue, database, key prefix, time and counts; then each message follows behind
        its length; a last line of JSON has the count and the SHA-256 of all before.
    type: path
  save:
    description: Save the messages before they are removed. Set it to false to remove them for good.
    type: bool
    default: true
  overwrite:
    description: Replace the file O(path). Without it a file that exists is refused when there is something to save.
    type: bool
    default: false
  compress_level:
    description:
      - 1 to 9 compress the file with gzip; 0 does not.
      - On Celery messages of 1 KB level 1 makes a file of about a fifth at 200,000 messages a second and core; level 6
        makes it hardly smaller at half that speed. It runs beside the reading, on another core if there is one.
    type: int
    default: 0
  filter:
    description:
      - Which messages; each given condition must hold. Required for V(dropped).
      - An empty condition is refused, so that an empty list in a variable never selects everything.
      - The other messages keep their order and are behind what workers gave back meanwhile. While the queue is sorted
        its messages are aside and workers only see what arrives.
    type: dict
    suboptions:
      tasks:
        description: Task names, or patterns as C(shop.*).
        type: list
        elements: str
      ids:
        description: Task ids.
        type: list
        elements: str
      older_than:
        description:
          - Seconds since publishing, by the time that C(celeryops.stamp) wrote into the message.
          - A message without it is not selected, and counted in RV(unknown_age).
        type: float
      args:
        description:
          - The first positional arguments, compared as JSON.
          - A message whose arguments cannot be read (pickle, compressed) is not selected, and counted in
            RV(undecodable).
        type: list
        elements: raw
      kwargs:
        description: Some of the keyword arguments, compared as JSON.
        type: dict
  max_messages:
    description:
      - Purge, drop or move at most so many, those consumed next; or rescue at most so many, those fetched last.
    type: int
  accept:
    description:
      - What may be otherwise in V(imported).
      - V(broker), V(queue), V(db), V(key_prefix) that the file comes from another one. For another queue the routing is
        rewritten.
      - V(copy) that the file is from V(exported), so that its messages may run twice.
    type: list
    elements: str
    choices: [broker, queue, db, key_prefix, copy]
    default: []
  batch_size:
    description: Messages a step, 1 to 5000. Larger gains nothing and lets other clients of Redis wait.
    type: int
    default: 500
notes:
  - Each message of a file is imported once. That is remembered in Redis for 30 days, under the file's id.
  - V(rescued) asks through remote control, which every worker must have on. Workers with the runtime part C(held) are
    asked for exact deliveries. Of others the task ids in C(active), C(reserved) and C(scheduled) count, tasks with a
    rate limit are left alone, and one that is stopping cannot be seen.
  - The lock of a run ends 60 seconds after its last step, or at once when its process is seen to be dead.
seealso:
  - module: celeryops.runbook.redis_queue_info
"""

EXAMPLES = r"""
- name: Empty the queue, keep a file
  celeryops.runbook.redis_queue:
    environment_file: /etc/celeryops/shop/secret.env
    virtualenv: /srv/shop/current/venv
    queue: reports
    state: purged
    confirm: reports
    path: /var/backups/reports.queue

- name: And put it all back
  celeryops.runbook.redis_queue:
    environment_file: /etc/celeryops/shop/secret.env
    virtualenv: /srv/shop/current/venv
    queue: reports
    state: imported
    path: /var/backups/reports.queue

- name: Drop yesterday's mails
  celeryops.runbook.redis_queue:
    environment_file: /etc/celeryops/shop/secret.env
    virtualenv: /srv/shop/current/venv
    queue: mail
    state: dropped
    confirm: mail
    filter:
      tasks: [shop.send_*]
      older_than: 86400
    path: /var/backups/mail.queue

- name: Move the slow ones out of the way
  celeryops.runbook.redis_queue:
    environment_file: /etc/celeryops/shop/secret.env
    virtualenv: /srv/shop/current/venv
    queue: orders
    state: moved
    to: slow
    filter:
      tasks: [shop.report]

- name: Give back what dead workers held
  celeryops.runbook.redis_queue:
    environment_file: /etc/celeryops/shop/secret.env
    virtualenv: /srv/shop/current/venv
    state: rescued
"""

RETURN = r"""
count:
  description: Messages removed, moved, copied, restored or rescued.
  returned: success
  type: int
  sample: 1200
by_priority:
  description: The same by priority step.
  returned: success
  type: dict
tasks:
  description:
    - The same by task name.
    - A run with V(purged) or V(exported) does not decode the messages, so these tell it in check mode only.
  returned: when known
  type: dict
ages:
  description:
    - By task name, how many are younger than a C(minute), an C(hour) or a C(day), C(older), or of C(unknown) age.
  returned: in check mode, state is V(purged), V(dropped) or V(moved)
  type: dict
  sample: {"shop.report": {"minute": 3, "hour": 12}}
queues:
  description: Rescued messages by the queue they went back to.
  returned: state is V(rescued)
  type: dict
ids:
  description: Task ids of the rescued messages, at most 1000.
  returned: state is V(rescued)
  type: list
  elements: str
held:
  description: Messages that a live worker holds.
  returned: state is V(rescued)
  type: int
unknown:
  description: Messages that may be held by a node which does not answer or is stopping. They were left alone.
  returned: state is V(rescued)
  type: int
unselected:
  description: Messages that nobody holds and O(queue), O(filter) or O(max_messages) leave out.
  returned: state is V(rescued)
  type: int
unroutable:
  description: Messages that nobody holds and for which no queue is bound. They were left alone.
  returned: state is V(rescued)
  type: int
changed_meanwhile:
  description: Messages that somebody else gave back, fetched or acknowledged meanwhile.
  returned: state is V(rescued)
  type: int
nodes:
  description:
    - Who was asked. C(answered) and C(stopping) are names, C(silent) is the number of connected nodes without an
      answer.
    - C(suspects) are names under which workers were once connected and that did not answer. Dead ones are among them.
  returned: state is V(rescued)
  type: dict
undecodable:
  description: Messages met that cannot be decoded.
  returned: success
  type: int
unknown_age:
  description: Messages not selected because they bear no time.
  returned: success
  type: int
before:
  description: Waiting messages of RV(before.queue), and of RV(before.to) for V(moved). C(unacked) for V(rescued).
  returned: success
  type: dict
  contains:
    queue:
      description: Of O(queue).
      returned: state is not V(rescued)
      type: int
    to:
      description: Of O(to).
      returned: state is V(moved)
      type: int
after:
  description: The same afterwards; in check mode as it would be.
  returned: success
  type: dict
saved:
  description: The file, with C(path), C(id), C(sha256), C(bytes).
  returned: when a file was written or read
  type: dict
already_imported:
  description: When and into which queue the file has been imported before; then nothing was done.
  returned: state is V(imported) and so
  type: str
recovered:
  description:
    - An interrupted operation that was found on the queue, with C(operation), C(started), C(count) and C(action).
    - C(action) is V(finished), V(put_back) or V(undone); in check mode V(pending), and the messages aside are not in
      the other counts.
  returned: when there was one
  type: dict
elapsed:
  description: Seconds spent.
  returned: success
  type: float
"""

from typing import Any

from ansible_collections.celeryops.runbook.plugins.module_utils._module import CeleryModule, above_zero, confirmed, run
from ansible_collections.celeryops.runbook.plugins.module_utils.engine import savefile
from ansible_collections.celeryops.runbook.plugins.module_utils.engine.control import Control
from ansible_collections.celeryops.runbook.plugins.module_utils.engine.errors import PreconditionFailed, QueueUnknown
from ansible_collections.celeryops.runbook.plugins.module_utils.engine.queues import Outcome, RedisQueues, Selection
from ansible_collections.celeryops.runbook.plugins.module_utils.engine.rescue import rescue

ARGUMENT_SPEC: dict[str, Any] = {
    "queue": {"type": "str"},
    "state": {
        "type": "str",
        "required": True,
        "choices": ["purged", "dropped", "moved", "exported", "imported", "rescued"],
    },
    "confirm": {"type": "str"},
    "to": {"type": "str"},
    "create": {"type": "bool", "default": False},
    "dead": {"type": "list", "elements": "str", "default": []},
    "timeout": {"type": "float", "default": 2.0},
    "path": {"type": "path"},
    "save": {"type": "bool", "default": True},
    "overwrite": {"type": "bool", "default": False},
    "compress_level": {"type": "int", "default": 0},
    "filter": {
        "type": "dict",
        "options": {
            "tasks": {"type": "list", "elements": "str"},
            "ids": {"type": "list", "elements": "str"},
            "older_than": {"type": "float"},
            "args": {"type": "list", "elements": "raw"},
            "kwargs": {"type": "dict"},
        },
    },
    "max_messages": {"type": "int"},
    "accept": {
        "type": "list",
        "elements": "str",
        "choices": ["broker", "queue", "db", "key_prefix", "copy"],
        "default": [],
    },
    "batch_size": {"type": "int", "default": 500},
}
REMOVES = ("purged", "dropped")


def selection(params: dict[str, Any]) -> Selection:
    given = params["filter"] or {}
    return Selection(
        tuple(given.get("tasks") or ()),
        frozenset(given.get("ids") or ()),
        given.get("older_than"),
        given.get("args"),
        given.get("kwargs"),
    )


def check(params: dict[str, Any], wanted: Selection) -> None:
    """What can be judged without the broker."""
    state, queue = params["state"], params["queue"]
    if not queue and (state != "rescued" or queue is not None):
        raise PreconditionFailed("queue: is empty. Name the queue.")
    if state in REMOVES:
        confirmed(params, queue, f"state {state} removes messages, so it")
    if (params["to"] is not None) != (state == "moved"):
        raise PreconditionFailed(
            "to: name the queue to move to." if state == "moved" else f"to: has no meaning with state {state}."
        )
    if state == "moved" and params["to"] in ("", queue):
        raise PreconditionFailed("to: must name another queue.")
    if params["dead"] and state != "rescued":
        raise PreconditionFailed(f"dead: has no meaning with state {state}.")
    above_zero(params, "timeout")
    if wanted and state == "purged":
        raise PreconditionFailed("filter: has no meaning with state purged. Use state: dropped.")
    for name, value in (params["filter"] or {}).items():
        if (name in ("tasks", "ids") and value is not None and not all(value or [""])) or value in ([], {}):
            raise PreconditionFailed(f"filter.{name}: is empty or names nothing. Leave it out if it is no condition.")
    if params["filter"] is not None and not wanted and state != "dropped":
        raise PreconditionFailed(
            "filter: holds no condition. Give tasks, ids, older_than, args or kwargs, or leave it out."
        )
    if state == "dropped" and not wanted:
        raise PreconditionFailed(
            "filter: give tasks, ids, older_than, args or kwargs; to remove all messages use state: purged."
        )
    if params["path"] is None and (state in ("exported", "imported") or (state in REMOVES and params["save"])):
        hint = " To remove them without a copy set save: false." if state in REMOVES else ""
        raise PreconditionFailed(f"path: state {state} needs the name of a file on this host.{hint}")
    if params["path"] is not None and state in ("moved", "rescued"):
        raise PreconditionFailed(f"path: has no meaning with state {state}.")
    if not params["save"] and (state not in REMOVES or params["path"] is not None):
        raise PreconditionFailed("save: false goes with state purged or dropped, and without path.")
    if params["max_messages"] is not None:
        if state in ("exported", "imported"):
            raise PreconditionFailed(f"max_messages: has no meaning with state {state}.")
        if params["max_messages"] < 1:
            raise PreconditionFailed(f"max_messages: must be 1 or more, not {params['max_messages']}.")
    if not 0 <= params["compress_level"] <= 9:
        raise PreconditionFailed(f"compress_level: must be 0 to 9, not {params['compress_level']}.")
    if not 1 <= params["batch_size"] <= 5000:
        raise PreconditionFailed(f"batch_size: must be 1 to 5000, not {params['batch_size']}.")
    if wanted.older_than is not None and wanted.older_than < 0:
        raise PreconditionFailed(f"filter.older_than: must be 0 or more seconds, not {wanted.older_than}.")


def forecast(queues: RedisQueues, params: dict[str, Any], wanted: Selection) -> Outcome:
    """What a run would do, counted without touching anything."""
    state, queue, path = params["state"], params["queue"], params["path"]
    outcome = Outcome(state, queue, path=path)
    if state == "imported":
        saved = savefile.verify(path)
        queues.check_import(saved, path, queue, params["accept"])
        outcome.save_id, outcome.sha256 = str(saved.header["id"]), saved.sha256
        outcome.already_imported = queues.imported(outcome.save_id)
        if outcome.already_imported is None:
            found = queues.imports(saved, path, wanted)
            outcome.count, outcome.tasks = found.count, found.tasks
            outcome.undecodable, outcome.unknown_age = found.undecodable, found.unknown_age
        return outcome
    if path is not None:
        again = state in REMOVES and not queues.has_any(queue, wanted)
        savefile.check_target(path, params["overwrite"] or again)
    pending = queues.interrupted(queue)
    if pending is not None:
        outcome.recovered = {**pending, "action": "pending"}
    found = queues.task_names(queue, wanted, limit=params["max_messages"], ages=state != "exported")
    outcome.tasks, outcome.count, outcome.ages = found.tasks, found.count, found.ages
    outcome.undecodable, outcome.unknown_age = found.undecodable, found.unknown_age
    if not wanted and state in ("purged", "exported"):
        # These take every message, decodable or not.
        outcome.count = queues.depth([queue])[queue]["depth"]
        if params["max_messages"] is not None:
            outcome.count = min(outcome.count, params["max_messages"])
    return outcome


def act(queues: RedisQueues, params: dict[str, Any], wanted: Selection) -> Outcome:
    state, queue, path, limit = params["state"], params["queue"], params["path"], params["max_messages"]
    file = {"overwrite": params["overwrite"], "compress_level": params["compress_level"]}
    if state == "purged":
        return queues.purge(queue, path, limit=limit, **file)
    if state == "dropped":
        return queues.drop(queue, wanted, path, limit=limit, **file)
    if state == "moved":
        return queues.move(queue, params["to"], wanted, limit=limit)
    if state == "exported":
        return queues.export(queue, path, selection=wanted, **file)
    return queues.import_(path, queue, selection=wanted, accept=params["accept"])


def change(module: CeleryModule) -> dict[str, Any]:
    params = module.params
    wanted = selection(params)
    check(params, wanted)
    state, queue, to = params["state"], params["queue"], params["to"]
    with module.broker() as broker:
        queues = RedisQueues.of(broker, params["batch_size"])
        if state == "rescued":
            with Control(broker, timeout=params["timeout"]) as control:
                return give_back(queues, control, module, wanted)
        if state != "imported":
            queues.require(queue)
        elif not params["create"] and savefile.read_header(params["path"])["queue"] != queue:
            # The queue that the file was saved from needs no other proof that its name is right.
            known(queues, queue, "queue")
        if to is not None and not params["create"]:
            known(queues, to, "to")
        names = {"queue": queue} if to is None else {"queue": queue, "to": to}
        before = depths(queues, names)
        if module.check_mode:
            outcome = forecast(queues, params, wanted)
            after = dict(before)
            if state != "exported":
                after["queue"] += outcome.count if state == "imported" else -outcome.count
            if to is not None:
                after["to"] += outcome.count
        else:
            outcome = act(queues, params, wanted)
            after = depths(queues, names)
    return report(outcome, before, after)


def give_back(queues: RedisQueues, control: Control, module: CeleryModule, wanted: Selection) -> dict[str, Any]:
    params = module.params
    if params["queue"] is not None:
        known(queues, params["queue"], "queue")
    before = {"unacked": queues.unacked_count()}
    done = rescue(
        queues,
        control,
        queue=params["queue"],
        selection=wanted,
        dead=params["dead"],
        limit=params["max_messages"],
        dry=module.check_mode,
    )
    after = {"unacked": before["unacked"] - done.count if module.check_mode else queues.unacked_count()}
    names = ("count", "tasks", "queues", "by_priority", "ids", "held", "unknown", "unselected", "unroutable")
    return {
        "changed": done.count > 0,
        **{name: getattr(done, name) for name in (*names, "undecodable", "unknown_age", "changed_meanwhile")},
        "nodes": {
            "answered": done.answered,
            "silent": done.silent,
            "stopping": done.stopping,
            "suspects": done.suspects,
        },
        "before": before,
        "after": after,
        "elapsed": round(done.elapsed, 3),
        "diff": {"before": before, "after": {**after, "rescued": done.tasks}},
    }


def known(queues: RedisQueues, queue: str, option: str) -> None:
    try:
        queues.require(queue, option=option)
    except QueueUnknown as exc:
        raise QueueUnknown(f"{exc.msg} If a new queue is meant, set create: true.", **exc.data) from exc


def depths(queues: RedisQueues, names: dict[str, str]) -> dict[str, int]:
    rows = queues.depth(names.values())
    return {name: rows[queue]["depth"] for name, queue in names.items()}


def report(outcome: Outcome, before: dict[str, int], after: dict[str, int]) -> dict[str, Any]:
    result: dict[str, Any] = {
        # An export writes its file even if the queue is empty.
        "changed": outcome.count > 0 or outcome.operation == "exported" or outcome.recovered is not None,
        "count": outcome.count,
        "by_priority": outcome.by_priority,
        "undecodable": outcome.undecodable,
        "unknown_age": outcome.unknown_age,
        "before": before,
        "after": after,
        "elapsed": round(outcome.elapsed, 3),
        **outcome.traces(),
        "diff": {"before": before, "after": after},
    }
    if outcome.tasks is not None:
        result["tasks"] = outcome.tasks
        result["diff"]["after"] = {**after, outcome.operation: outcome.tasks}
    if outcome.ages is not None:
        result["ages"] = outcome.ages
        result["diff"]["after"]["ages"] = outcome.ages
    if outcome.already_imported is not None:
        result["already_imported"] = outcome.already_imported
    return result


def main() -> None:
    run(change, ARGUMENT_SPEC, supports_check_mode=True)


if __name__ == "__main__":
    main()
