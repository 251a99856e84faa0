# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations


class ModuleDocFragment:
    # The locks of idempotent tasks.
    DOCUMENTATION = r"""
options:
  redis_url:
    description:
      - Redis that holds the locks where it is not the broker.
      - Taken from C(CELERYOPS_ONCE_REDIS) in O(environment_file) if not given.
    type: str
  database:
    description:
      - SQLAlchemy URL of the database that holds locks while Redis is away.
      - Taken from C(CELERYOPS_ONCE_DATABASE) in O(environment_file) if not given.
    type: str
  scope:
    description: Only this scope, as V(global), V(user=7) or V(tenant=acme).
    type: str
  task_ids:
    description: Only what these tasks hold or have done.
    type: list
    elements: str
    default: []
  states:
    description: Only these states.
    type: list
    elements: str
    choices: [running, waiting, done]
    default: [running, waiting, done]
  dead:
    description: Nodes that do not answer and are surely dead. One that answers is refused.
    type: list
    elements: str
    default: []
  timeout:
    description: Seconds for the workers to answer whether they run what is locked.
    type: float
    default: 2.0
"""
