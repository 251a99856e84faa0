# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

_CHANGES = """
options: {}
attributes:
  check_mode:
    description: Says what would change without changing it.
    support: full
  diff_mode:
    description: Returns what has changed or would change.
    support: full
"""

_READS = """
options: {}
attributes:
  check_mode:
    description: Never changes anything, so it does the same in check mode.
    support: full
  diff_mode:
    description: Returns what has changed or would change.
    support: N/A
"""

_ACTION_GROUP = """
  action_group:
    description: Use C(group/celeryops.runbook.celeryops) in C(module_defaults) to set the connection once.
    support: full
    membership:
      - celeryops.runbook.celeryops
"""

_IDEMPOTENT = """
  idempotent:
    description: When run twice in a row with the same arguments, the second run changes nothing.
    support: full
"""


class ModuleDocFragment:
    DOCUMENTATION = _CHANGES + _ACTION_GROUP
    INFO = _READS + _ACTION_GROUP
    # Modules that act on the host and take no connection.
    HOST = _CHANGES + _IDEMPOTENT
    HOST_INFO = _READS + _IDEMPOTENT
