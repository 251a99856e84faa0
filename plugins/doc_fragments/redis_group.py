# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations


class ModuleDocFragment:
    # Primary, replicas and Sentinels of one broker. Addresses are HOST:PORT.
    DOCUMENTATION = r"""
options:
  peers:
    description: All Redis servers of the broker.
    type: list
    elements: str
    required: true
  first:
    description: The one that leads as long as neither a Sentinel nor a replica says otherwise.
    type: str
    required: true
  sentinels:
    description: All Sentinels.
    type: list
    elements: str
    default: []
  master_name:
    description: What the Sentinels call the primary.
    type: str
    required: true
  sentinel_password:
    description: Password of the Sentinels themselves, empty for none.
    type: str
    default: ""
"""
