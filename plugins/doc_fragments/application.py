# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations


class ModuleDocFragment:
    # An application on a host.
    DOCUMENTATION = r"""
options:
  name:
    description: The application's name in units and directories, the variable C(celeryops_app_name).
    type: str
    required: true
  config_dir:
    description: The directory of the application's environment files. Default C(/etc/celeryops/NAME).
    type: path
"""
