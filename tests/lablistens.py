"""A worker says that it listens: Celery's own "ready." comes before its event loop has subscribed to the broadcasts."""

# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import logging
from typing import Any


def say(sender: Any, **_: Any) -> None:
    # In the first turn of the loop timers run before the subscription; one timer after another is in a later turn.
    info = logging.getLogger("celery.worker").info
    sender.hub.call_later(0.02, sender.hub.call_later, 0.02, info, "%s listens", sender.hostname)
