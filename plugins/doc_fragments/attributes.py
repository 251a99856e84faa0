# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations


# Plain texts, since ansible-test reads them without running this file.
class ModuleDocFragment:
    DOCUMENTATION = r"""
options: {}
attributes:
  check_mode:
    description: Says what would change without changing it.
    support: full
  diff_mode:
    description: Returns what has changed or would change.
    support: full
  action_group:
    description: Use C(group/celeryops.runbook.celeryops) in C(module_defaults) to set the connection once.
    support: full
    membership:
      - celeryops.runbook.celeryops
"""

    INFO = r"""
options: {}
attributes:
  check_mode:
    description: Never changes anything, so it does the same in check mode.
    support: full
  diff_mode:
    description: Returns what has changed or would change.
    support: N/A
  action_group:
    description: Use C(group/celeryops.runbook.celeryops) in C(module_defaults) to set the connection once.
    support: full
    membership:
      - celeryops.runbook.celeryops
"""

    # Modules that act on the host and take no connection.
    HOST = r"""
options: {}
attributes:
  check_mode:
    description: Says what would change without changing it.
    support: full
  diff_mode:
    description: Returns what has changed or would change.
    support: full
  idempotent:
    description: When run twice in a row with the same arguments, the second run changes nothing.
    support: full
"""

    HOST_INFO = r"""
options: {}
attributes:
  check_mode:
    description: Never changes anything, so it does the same in check mode.
    support: full
  diff_mode:
    description: Returns what has changed or would change.
    support: N/A
  idempotent:
    description: When run twice in a row with the same arguments, the second run changes nothing.
    support: full
"""
