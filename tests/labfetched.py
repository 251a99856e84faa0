# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Loaded into a worker: kills Redis after a message was fetched and before it is noted as held.

The file LAB_KILL names has the process id, and is removed by the one time.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

from kombu.transport import redis as transport

_append = transport.QoS.append


def append(self: Any, message: Any, delivery_tag: str) -> Any:
    order = Path(os.environ["LAB_KILL"])
    if order.exists():
        time.sleep(0.5)  # who sent the message has its answer
        os.kill(int(order.read_text()), signal.SIGKILL)
        order.unlink()
        time.sleep(0.2)
    return _append(self, message, delivery_tag)


transport.QoS.append = append
