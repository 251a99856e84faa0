# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A Sentinel that is down is passed over at once. Workers and beat load this; producers may import it.

Before every connection kombu asks the Sentinels in turn, and redis-py tries one that is down eleven times, for four to
five seconds, and one whose host is gone for minutes. The host that took the primary with it mostly had a Sentinel too.
What the application sets in `sentinel_kwargs` counts.
"""

from __future__ import annotations

from typing import Any

from kombu.transport import redis as transport

from ._environment import disabled

# Seconds for one Sentinel.
PATIENCE = 1.0

_managed_pool = transport.SentinelChannel._sentinel_managed_pool


def managed_pool(self: Any, *args: Any, **kwargs: Any) -> Any:
    from redis.backoff import NoBackoff
    from redis.retry import Retry

    own = getattr(self, "sentinel_kwargs", None) or {}
    bounds = {"socket_connect_timeout": PATIENCE, "socket_timeout": PATIENCE, "retry": Retry(NoBackoff(), 0)}
    self.sentinel_kwargs = {**bounds, **own}
    return _managed_pool(self, *args, **kwargs)


if "sentinel" not in disabled():
    transport.SentinelChannel._sentinel_managed_pool = managed_pool
