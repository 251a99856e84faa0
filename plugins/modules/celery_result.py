#!/usr/bin/python
# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: celery_result
short_description: Drop old results of Celery tasks
version_added: 0.1.0
description:
  - Removes the results of tasks that ended more than O(older_than) seconds ago, in Redis or an SQL database.
  - In Redis the keys are walked in small steps, a key is removed only if it is still the result that was judged, and no
    other key is touched. In SQL databases Celery's own C(backend.cleanup) is used.
  - Results of which no time of end can be read are kept and counted.
  - In Redis it also reports results that never expire, and the counters of chords whose last part never came.
author:
  - celeryops contributors (@celeryops)
extends_documentation_fragment:
  - celeryops.runbook.connection
  - celeryops.runbook.result.backend
  - celeryops.runbook.attributes
options:
  older_than:
    description: Seconds since the end of the task.
    type: float
    required: true
requirements:
  - SQLAlchemy for SQL databases
"""

EXAMPLES = r"""
- name: Results of the last week are enough
  celeryops.runbook.celery_result:
    environment_file: /etc/celeryops/shop/secret.env
    virtualenv: /srv/shop/current/venv
    older_than: "{{ 7 * 86400 }}"
"""

RETURN = r"""
count:
  description: Results removed; in check mode those that would be.
  returned: success
  type: int
kept:
  description: Results kept.
  returned: success
  type: int
backend:
  description: V(redis) or V(sql).
  returned: success
  type: str
undated:
  description: Results in Redis without a time of end, such as those of tasks that run.
  returned: success
  type: int
undecodable:
  description: Results in Redis that cannot be read.
  returned: success
  type: int
no_expiry:
  description: Results and groups in Redis that stay and never expire.
  returned: success
  type: dict
  contains:
    count:
      description: How many.
      type: int
      returned: success
    bytes:
      description: Their size.
      type: int
      returned: success
    examples:
      description: Names of the first of them.
      type: list
      elements: str
      returned: success
chord_orphans:
  description: Counters of chords in Redis that nobody has touched for O(older_than) seconds.
  returned: success
  type: dict
  contains:
    count:
      description: How many.
      type: int
      returned: success
    bytes:
      description: Their size.
      type: int
      returned: success
    examples:
      description: Names of the first of them.
      type: list
      elements: str
      returned: success
elapsed:
  description: Seconds spent.
  returned: success
  type: float
"""

import time
from dataclasses import asdict
from typing import Any

from ansible_collections.celeryops.runbook.plugins.module_utils._module import CeleryModule, above_zero, run
from ansible_collections.celeryops.runbook.plugins.module_utils.engine import results
from ansible_collections.celeryops.runbook.plugins.module_utils.engine.connection import Broker

ARGUMENT_SPEC: dict[str, Any] = {
    "older_than": {"type": "float", "required": True},
    "result_backend": {"type": "str", "no_log": True},
}


def prune(module: CeleryModule) -> dict[str, Any]:
    above_zero(module.params, "older_than")
    started = time.monotonic()
    with Broker(module.result_spec()) as broker:
        pruned = results.prune(broker, module.params["older_than"], dry=module.check_mode)
    return {
        "changed": pruned.count > 0,
        **asdict(pruned),
        "elapsed": round(time.monotonic() - started, 3),
        "diff": {"before": {"results": pruned.kept + pruned.count}, "after": {"results": pruned.kept}},
    }


def main() -> None:
    run(prune, ARGUMENT_SPEC, libraries=("celery",), supports_check_mode=True)


if __name__ == "__main__":
    main()
