#!/usr/bin/python
# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: redis_replay
short_description: Deal with the messages that a restored Redis would run again
version_added: 0.1.0
description:
  - A backup holds messages that workers have taken since. Restored, they run again unless somebody looks at them first.
  - V(noted) is called before the restore and refuses while a worker is connected. What dead workers held goes back to
    its queue. It keeps the ids of all messages, and a copy of those that wait.
  - V(settled) is called after it, before a worker starts. What workers held when the backup was made goes back to its
    queue, locks of dead processes are removed, expired messages are saved and dropped, and the others are parked in
    C(restored.QUEUE), which nobody consumes, or released.
  - With what V(noted) wrote it names the tasks that were taken since the backup, and puts back messages that came
    later.
author:
  - celeryops contributors (@celeryops)
extends_documentation_fragment:
  - celeryops.runbook.connection
  - celeryops.runbook.attributes
options:
  state:
    description: What to do.
    type: str
    choices: [noted, settled]
    required: true
  path:
    description:
      - File that V(noted) writes and V(settled) reads, and renames to C(PATH.settled) when it is done. Without it
        V(settled) does not know what was done since.
      - V(noted) adds to one that was not settled, if the data of Redis was replaced since.
    type: path
  directory:
    description: Where files with messages and ids are written. It must exist.
    type: path
    required: true
  replay:
    description: V(park) restored messages for review, or V(release) them to run.
    type: str
    choices: [park, release]
    default: park
  expired:
    description: V(drop) messages whose C(expires) is over, saved first, or V(keep) them.
    type: str
    choices: [drop, keep]
    default: drop
  since:
    description: Unix time of Redis at which it was restored. Messages published later stay where they are.
    type: float
seealso:
  - module: celeryops.runbook.redis_restore
  - module: celeryops.runbook.redis_queue
"""

EXAMPLES = r"""
- name: Park what would run again
  celeryops.runbook.redis_replay:
    environment_file: /etc/celeryops/shop/secret.env
    virtualenv: /srv/shop/current/venv
    state: settled
    path: /var/backups/celeryops/shop/before-restore.json.gz
    directory: /var/backups/celeryops/shop
"""

RETURN = r"""
waiting:
  description: Waiting messages by queue.
  returned: state is V(noted)
  type: dict
held:
  description: Messages that workers held.
  returned: state is V(noted)
  type: int
queues:
  description: Restored messages by queue, those that workers held included.
  returned: state is V(settled)
  type: dict
parked:
  description: Those that were parked, by the queue they were in.
  returned: state is V(settled)
  type: dict
expired:
  description: C(count) and C(ids) of those that were dropped.
  returned: state is V(settled)
  type: dict
repeated:
  description:
    - C(count) and C(ids) of those that were taken or removed between the backup and the restore, so that they are done
      twice if they run. C(file) has all ids where they are more than 1000.
    - Null where it is not known.
  returned: state is V(settled)
  type: dict
later:
  description: C(count) and C(ids) of those that came after the backup, and were put back into their queues.
  returned: state is V(settled)
  type: dict
given_back:
  description: Messages that workers held when the backup was made.
  returned: state is V(settled)
  type: int
unreadable:
  description: Messages that cannot be decoded. They stay in their queue.
  returned: state is V(settled)
  type: int
locks:
  description: Keys of locks that were removed.
  returned: state is V(settled)
  type: list
  elements: str
files:
  description: Files that were written.
  returned: success
  type: raw
"""

import os
from typing import Any

from ansible_collections.celeryops.runbook.plugins.module_utils._module import CeleryModule, run
from ansible_collections.celeryops.runbook.plugins.module_utils.engine import replay
from ansible_collections.celeryops.runbook.plugins.module_utils.engine.control import Control
from ansible_collections.celeryops.runbook.plugins.module_utils.engine.errors import PreconditionFailed
from ansible_collections.celeryops.runbook.plugins.module_utils.engine.queues import RedisQueues

ARGUMENT_SPEC: dict[str, Any] = {
    "state": {"type": "str", "required": True, "choices": ["noted", "settled"]},
    "path": {"type": "path"},
    "directory": {"type": "path", "required": True},
    "replay": {"type": "str", "choices": ["park", "release"], "default": "park"},
    "expired": {"type": "str", "choices": ["drop", "keep"], "default": "drop"},
    "since": {"type": "float"},
}


def write(path: str, text: str) -> None:
    with open(path, "w", encoding="utf-8") as handle:
        handle.write(text)


def act(module: CeleryModule) -> dict[str, Any]:
    params = module.params
    moment = replay.stamp()
    if params["state"] == "noted" and not params["path"]:
        raise PreconditionFailed("path: name the file that state noted is to write.")
    if params["state"] == "settled" and module.check_mode:
        return {"changed": True}
    before = replay.read_note(params["path"]) if params["state"] == "settled" and params["path"] else None
    with module.broker() as broker:
        queues = RedisQueues.of(broker)
        if params["state"] == "noted":
            with Control(broker, timeout=1.0) as control:
                noted = replay.note(queues, control, params["path"], params["directory"], moment, dry=module.check_mode)
            return {"changed": True, **noted}
        since = params["since"] or queues.now() - int(queues.client.info("server")["uptime_in_seconds"]) - 1
        with Control(broker, timeout=1.0) as control:
            done = replay.settle(
                queues,
                control,
                before=before,
                since=since,
                directory=params["directory"],
                moment=moment,
                mutex=broker.unacked_mutex_key,
                park=params["replay"] == "park",
                drop_expired=params["expired"] == "drop",
            )
    lists = {
        name: None if ids is None else replay.listed(ids, f"{params['directory']}/{name}-{moment}.ids", write)
        for name, ids in (("expired", done.expired), ("repeated", done.repeated), ("later", done.later))
    }
    if before is not None:
        os.replace(params["path"], f"{params['path']}.settled")
    acted = bool(done.parked or done.expired or done.later or done.given_back or done.locks)
    return {
        "changed": acted,
        "queues": done.queues,
        "parked": done.parked,
        "given_back": done.given_back,
        "unreadable": done.unreadable,
        "locks": done.locks,
        "files": done.files,
        **lists,
        "diff": {"before": done.queues, "after": {f"{replay.PARKED}{name}": n for name, n in done.parked.items()}},
    }


def main() -> None:
    run(act, ARGUMENT_SPEC, supports_check_mode=True)


if __name__ == "__main__":
    main()
