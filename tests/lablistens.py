"""A worker says that it listens: Celery's own "ready." comes before its event loop has subscribed to the broadcasts."""

# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import logging
import threading
from typing import Any


def say(sender: Any, **_: Any) -> None:
    info = logging.getLogger("celery.worker").info
    if sender.pool.is_green:  # no event loop; a greenlet subscribes, which has not run yet
        threading.Timer(0.5, info, ["%s listens", sender.hostname]).start()
    else:
        # In the first turn of the loop timers run before the subscription; one timer after another is in a later turn.
        sender.hub.call_later(0.02, sender.hub.call_later, 0.02, info, "%s listens", sender.hostname)
