# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations


class ModuleDocFragment:
    # The Redis on the host that the module runs on.
    DOCUMENTATION = r"""
options:
  port:
    description: Port of the Redis on this host. It is asked with C(redis-cli).
    type: int
    default: 6379
  password:
    description: Its password, empty for none. It is handed on in the environment only.
    type: str
    default: ""
  socket:
    description:
      - Its unix socket. Where there is such a file Redis is asked there and not on O(port), which then may speak TLS.
    type: path
    default: ""
"""
