# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations


# Plain texts, since ansible-test reads them without running this file.
class ModuleDocFragment:
    # Results of tasks, and the backend alone.
    DOCUMENTATION = r"""
options:
  return_result:
    description: Return the result, or the text of the error. It may hold secrets; set C(no_log) on the task then.
    type: bool
    default: false
  result_backend:
    description:
      - URL of the result backend.
      - Taken from C(CELERY_RESULT_BACKEND) in O(environment_file), else from the configuration of O(app), if not given.
    type: str
requirements:
  - celery (from the application's virtual environment, see O(virtualenv))
"""

    BACKEND = r"""
options:
  result_backend:
    description:
      - URL of the result backend.
      - Taken from C(CELERY_RESULT_BACKEND) in O(environment_file), else from the configuration of O(app), if not given.
    type: str
requirements:
  - celery (from the application's virtual environment, see O(virtualenv))
"""
