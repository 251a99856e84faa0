# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations


class ModuleDocFragment:
    # The schedule of an application, which is imported for it.
    DOCUMENTATION = r"""
options:
  application:
    description: The application's name, the variable C(celeryops_app_name), under which its beat leaves its records.
    type: str
    required: true
  app:
    description: The application, as C(pkg.module:app).
    type: str
    required: true
  virtualenv:
    description: The application's virtual environment on this host, with the runtime package.
    type: path
    required: true
  user:
    description: The user to import the application as, the one of the workers. Without it, the user of this module.
    type: str
"""
