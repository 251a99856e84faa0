# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Beats of the application of the tests on a Redis of their own, and what they sent."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

from celeryops.engine import schedule
from celeryops.engine.connection import Broker, BrokerSpec
from support import LaunchedBeat, RedisServer, wait_until

MEMORY = "celery.beat:Scheduler"  # without a file
OFTEN = {"often": {"task": "lab.add", "schedule": 1.0, "args": [1, 2], "options": {"queue": "often"}}}
RARE = {"rare": {"task": "lab.add", "schedule": 60.0, "args": [1, 2], "options": {"queue": "rare"}}}
LEASE = 3


class Lab:
    def __init__(self, server: RedisServer, place: Path) -> None:
        self.server = server
        self.place = place

    def beat(self, name: str, entries: dict[str, Any] | None = None, *options: str, **environment: str) -> LaunchedBeat:
        own = {"CELERYOPS_BEAT_LEASE": str(LEASE), **environment}
        return LaunchedBeat(self.server.url(), name, self.place / name, entries or OFTEN, *options, **own)

    def broker(self) -> Broker:
        return Broker(BrokerSpec.build(url=self.server.url()))

    def leader(self) -> str:
        with self.broker() as broker:
            found = schedule.leader(broker, "lab")
        return found.host if found else ""

    def wait_leader(self, *names: str, timeout: float = 20) -> str:
        return str(wait_until(lambda: (who := self.leader()) in names and who, timeout, f"{names} leads"))

    def sent(self, queue: str = "often") -> list[float]:
        """When each message was published, oldest first."""
        raw = self.server.cli("--raw", "LRANGE", queue, "0", "-1").splitlines()
        return [json.loads(line)["headers"]["celeryops_published"] for line in reversed(raw)]

    def wait_sent(self, count: int, queue: str = "often", timeout: float = 20) -> None:
        have = len(self.sent(queue))
        wait_until(lambda: len(self.sent(queue)) >= have + count, timeout, f"{count} more in {queue}")

    def apart(self) -> float:
        times = self.sent()
        return min(second - first for first, second in pairwise(times))
