# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The ledger: every task writes down its begin and its end, so that lost and repeated ones can be counted by id."""

from __future__ import annotations

import functools
import json
import os
import time
from collections.abc import Callable
from typing import Any

import redis
from redis import exceptions

RUNS = "shop:ledger:runs"
SENT = "shop:ledger:sent"
# Seconds that the shop outlasts a store which is away or takes no writes. Then the task fails, and counts as lost.
PATIENCE = 60
_AWAY = (
    exceptions.ConnectionError,
    exceptions.TimeoutError,
    exceptions.OutOfMemoryError,
    exceptions.ReadOnlyError,
)


@functools.lru_cache(maxsize=1)
def _client(pid: int) -> redis.Redis:
    """One connection a process: a forked pool child must not share its parent's."""
    return redis.Redis.from_url(os.environ["SHOP_LEDGER_URL"], socket_timeout=10, socket_connect_timeout=10)


def _write(line: str) -> None:
    end = time.monotonic() + PATIENCE
    while True:
        try:
            _client(os.getpid()).rpush(RUNS, line)
            return
        except (*_AWAY, exceptions.ResponseError) as exc:
            # A full disk has no class of its own.
            if not (isinstance(exc, _AWAY) or str(exc).startswith("MISCONF")) or time.monotonic() > end:
                raise
        time.sleep(0.5)


def _record(request: Any, name: str, phase: str) -> None:
    if not os.environ.get("SHOP_LEDGER_URL"):
        return
    record = {
        "id": request.id,
        "task": name,
        "phase": phase,
        "time": time.time(),
        "published": (request.headers or {}).get("celeryops_published"),
        "eta": request.eta,
        "retries": request.retries,
        "queue": (request.delivery_info or {}).get("routing_key"),
        "node": request.hostname,
        "release": os.environ.get("CELERYOPS_RELEASE"),
    }
    _write(json.dumps(record, separators=(",", ":")))


def recorded(work: Callable[..., Any]) -> Callable[..., Any]:
    """For bound tasks, below the task decorator."""

    @functools.wraps(work)
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        _record(self.request, self.name, "begin")
        result = work(self, *args, **kwargs)
        _record(self.request, self.name, "end")
        return result

    return run
