#!/usr/bin/python
# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: celery_queue_pause
short_description: Pause queues for the whole fleet until they are resumed
version_added: 0.1.0
description:
  - Keeps in the broker which queues nobody shall consume, who said so and why. Every worker with the runtime package
    obeys it when it starts, when it reconnects, and when it is told to consume such a queue. So a pause outlasts
    restarts, boots, new workers and a restart of Redis.
  - The workers that run are told at once. The module waits until none of them consumes a paused queue, or until those
    which left it alone consume it again.
  - A worker without the runtime part C(pause) is told to cancel its consumer, and consumes again after a restart.
  - Tasks which workers hold already are finished. Producers are not held up; messages wait in the queue.
author:
  - celeryops contributors (@celeryops)
extends_documentation_fragment:
  - celeryops.runbook.connection
  - celeryops.runbook.attributes
options:
  queues:
    description: The queues. Each must be declared, hold messages, be consumed or be paused.
    type: list
    elements: str
    required: true
  state:
    description: Whether they are paused or consumed by the workers that ought to.
    type: str
    choices: [paused, resumed]
    default: paused
  by:
    description: Who pauses them. Default the user who runs the module.
    type: str
  why:
    description: The reason, required for a queue that is not paused yet. A new one replaces that of an earlier pause.
    type: str
  until:
    description:
      - How long it is meant to last, as V(2026-11-21T18:00:00Z) or from now on as V(+90m), V(+2h), V(+1d), which counts
        anew with every run.
      - A pause does not end by itself. When its time is over M(celeryops.runbook.celery_health) warns.
    type: str
  timeout:
    description: Seconds one round of questions may take at most.
    type: float
    default: 2.0
  wait_timeout:
    description: Seconds until all workers must have followed.
    type: float
    default: 30.0
seealso:
  - module: celeryops.runbook.celery_control
  - module: celeryops.runbook.celery_inspect
"""

EXAMPLES = r"""
- name: No mails while the mail server is repaired
  celeryops.runbook.celery_queue_pause:
    environment_file: /etc/celeryops/shop/secret.env
    virtualenv: /srv/shop/current/venv
    queues: [mail]
    why: mail server is repaired
    until: +2h

- name: Mails again
  celeryops.runbook.celery_queue_pause:
    environment_file: /etc/celeryops/shop/secret.env
    virtualenv: /srv/shop/current/venv
    queues: [mail]
    state: resumed
"""

RETURN = r"""
paused:
  description: All queues that are paused afterwards, with C(by), C(why), C(since), C(until) and C(overdue).
  returned: success
  type: dict
  sample: {mail: {by: anna, why: mail server is repaired, since: 1795000000.0, until: null, overdue: false}}
stopped:
  description: Nodes that stopped consuming, by queue.
  returned: success
  type: dict
  sample: {mail: [shop-default-1@worker1]}
started:
  description: Nodes that consume again, by queue.
  returned: success
  type: dict
consumers:
  description: Nodes that consume each of O(queues) afterwards.
  returned: success
  type: dict
waiting:
  description: Messages in each of O(queues).
  returned: success
  type: dict
  sample: {mail: 12}
elapsed:
  description: Seconds until the workers had followed.
  returned: success
  type: float
"""

import getpass
import json
import time
from typing import Any

from ansible_collections.celeryops.runbook.plugins.module_utils._module import CeleryModule, above_zero, run
from ansible_collections.celeryops.runbook.plugins.module_utils.engine.control import Control
from ansible_collections.celeryops.runbook.plugins.module_utils.engine.errors import PreconditionFailed
from ansible_collections.celeryops.runbook.plugins.module_utils.engine.pausing import Pausing

ARGUMENT_SPEC = {
    "queues": {"type": "list", "elements": "str", "required": True},
    "state": {"type": "str", "choices": ["paused", "resumed"], "default": "paused"},
    "by": {"type": "str"},
    "why": {"type": "str"},
    "until": {"type": "str"},
    "timeout": {"type": "float", "default": 2.0},
    "wait_timeout": {"type": "float", "default": 30.0},
}


def pause_queues(module: CeleryModule) -> dict[str, Any]:
    params = module.params
    above_zero(params, "timeout", "wait_timeout")
    if not params["queues"] or not all(queue.strip() for queue in params["queues"]):
        raise PreconditionFailed("queues: name at least one queue, and none with an empty name.")
    started = time.monotonic()
    with module.broker() as broker, Control(broker, timeout=params["timeout"]) as control:
        done = Pausing(
            broker,
            control,
            params["queues"],
            paused=params["state"] == "paused",
            timeout=params["timeout"],
            wait_timeout=params["wait_timeout"],
            warn=module.warn,
        ).run(
            by=params["by"] or getpass.getuser(),
            why=params["why"] or "",
            until=params["until"] or "",
            dry=module.check_mode,
        )
    shown = [{queue: str(pause) for queue, pause in sorted(side.items())} for side in (done.before, done.after)]
    return {
        "changed": done.changed,
        "paused": {queue: pause.as_dict(done.now) for queue, pause in sorted(done.after.items())},
        "stopped": done.stopped,
        "started": done.started,
        "consumers": done.consumers,
        "waiting": done.waiting,
        "elapsed": round(time.monotonic() - started, 3),
        "diff": {
            "before": json.dumps(shown[0], indent=2) + "\n",
            "after": json.dumps(shown[1], indent=2) + "\n",
        },
    }


def main() -> None:
    run(pause_queues, ARGUMENT_SPEC, supports_check_mode=True)


if __name__ == "__main__":
    main()
