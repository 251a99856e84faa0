# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What fails for good is kept: real workers of the Celery this environment holds, a real Redis."""

from __future__ import annotations

import pytest
from dead_support import CAUSES, HARMLESS, entries, send, worker

from support import RedisServer, wait_until


def test_five_causes(broker: RedisServer) -> None:
    with worker(broker) as live:
        kept = send(broker, *CAUSES.values())
        gone = send(broker, *HARMLESS)
        found = wait_until(lambda: len(entries(broker)) >= 5 and entries(broker), 40, "five dead letters")
        wait_until(lambda: live.log.read_text().count("succeeded in") >= 2, 40, "the tasks that end well")
    assert set(found) == set(kept) and not set(gone) & set(entries(broker))
    records = [found[identity]["headers"]["celeryops_dead"] for identity in kept]
    assert [record["reason"] for record in records] == list(CAUSES)
    assert [record["exception"] for record in records] == [
        "ValueError", "TimeLimitExceeded", "WorkerLostError", "NotRegistered", "Reject",
    ]  # fmt: skip
    assert "failed on purpose" in records[0]["text"] and "labdead.py" in records[0]["traceback"]
    assert found[kept[0]]["headers"]["retries"] == 2 and records[0]["priority"] == 6
    assert {record["node"] for record in records} == {"prefork@dead"}
    assert {record["queue"] for record in records} == {"work"}
    assert all(item["properties"]["delivery_info"]["routing_key"] == "work.dead" for item in found.values())
    assert broker.cli("HLEN", "unacked") == "0"


@pytest.mark.parametrize("pool", ["threads", "solo", "gevent", "eventlet"])
def test_other_pools(broker: RedisServer, pool: str) -> None:
    with worker(broker, pool):
        kept = send(broker, ("dead.fail", {}), ("dead.reject", {}), ("dead.nobody_knows", {}))
        send(broker, ("dead.ignore", {}), ("lab.add", {"args": [1, 2]}))
        found = wait_until(lambda: len(entries(broker)) >= 3 and entries(broker), 20, "dead letters")
    assert set(found) == set(kept) == set(entries(broker))


def test_switched_off(broker: RedisServer) -> None:
    with worker(broker, CELERYOPS_DISABLE="deadletter") as live:
        send(broker, ("dead.fail", {}))
        wait_until(lambda: "raised unexpected" in live.log.read_text(), 20, "the failure")
    assert not entries(broker)
