# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations


class ModuleDocFragment:
    # Which dead letters.
    DOCUMENTATION = r"""
options:
  filter:
    description:
      - Which entries; each given condition must hold. Without it all.
      - An empty condition is refused.
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
      exceptions:
        description: Names of exceptions without their module, or patterns as C(*Timeout).
        type: list
        elements: str
      reasons:
        description: How they failed.
        type: list
        elements: str
        choices: [exception, time_limit, worker_lost, unknown_task, rejected]
      older_than:
        description: Only failures at least so many seconds ago.
        type: float
      newer_than:
        description: Only failures at most so many seconds ago.
        type: float
"""
