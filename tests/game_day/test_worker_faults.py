# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Workers that die, that answer and consume nothing, and that do not reach Redis."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from datetime import datetime

import pytest
from fleet.story import Background, Story
from fleet_support import HOSTS, send
from scorecard import ROWS, Row, all_begin, forget, mains, noticed, runs

from support import PATIENCE, wait_until

pytestmark = pytest.mark.ansible

# Seconds of the cut network; 300 shows what outlasts every timeout, and takes five minutes.
CUT = float(os.environ.get("GAME_DAY_CUT", "10"))


@pytest.fixture
def load(shop: Story) -> Iterator[Background]:
    forget(shop)
    program = shop.start("load", "--rate", "20", "--slow", "0.02")
    time.sleep(2)
    yield program
    if program.running():
        program.stop()
    forget(shop)


def letters(story: Story, queue: str) -> list[str]:
    """Ids of the messages in a list."""
    return [json.loads(line)["headers"]["id"] for line in story.redis("LRANGE", queue, "0", "-1").splitlines() if line]


def active_since(story: Story, node: str) -> float:
    """When systemd had the worker up again (unix seconds)."""
    instance, _at, host = node.removeprefix("shop-").partition("@")
    show = f"systemctl show --timestamp=unix -P ActiveEnterTimestamp celery-shop-worker@{instance}.service"
    return float(story.ssh(host, show).lstrip("@"))


def test_all_workers_are_killed(shop: Story, load: Background) -> None:
    before = mains(shop)
    for host in HOSTS:
        shop.ssh(host, "systemctl kill -s KILL 'celery-shop-worker@*'")
    killed = time.time()
    done = shop.play("queue_rescue")
    cured = all_begin(shop, killed, 60)
    load.stop()
    ledger = shop.ledger("--wait", "60")
    begins = [row for row in runs(shop) if row["phase"] == "begin"]
    begun = {row["id"] for row in begins if row["time"] < killed}
    print(done.stats, ledger["lost"], ledger["run_twice"])
    rescued = set(done.stats["celeryops_queue_rescue"]["ids"])
    again = {row["id"]: row for row in reversed(begins) if row["id"] in rescued and row["time"] > killed}
    due = {id: datetime.fromisoformat(row["eta"]).timestamp() if row["eta"] else 0 for id, row in again.items()}
    # On cgroup v1 systemd may wait half a minute for processes that are gone before it starts the worker again.
    since = {node: max(done.ended, active_since(shop, node)) for node in {row["node"] for row in again.values()}}
    late = max((row["time"] - max(since[row["node"]], due[id]) for id, row in again.items()), default=0.0)
    assert set(again) == rescued and late < 5 * PATIENCE
    # Of each worker at most the one that it had acknowledged early, or just fetched.
    assert len(ledger["lost"]) <= 4 and all(line.split()[0] in begun for line in ledger["run_twice"])
    assert not set(before.values()) & set(mains(shop).values())
    remark = f"{len(rescued)} held, all running again {max(late, 0):.1f} s after playbook and start, or at their ETA"
    remark += "; lost: cut off, acknowledged early" if ledger["lost"] else ""
    ROWS.append(Row("`kill -9` of every worker", "systemd, `queue_rescue`", None, cured, ledger, remark))


def test_a_worker_answers_and_consumes_nothing(shop: Story, load: Background) -> None:
    node = "shop-bulk-1@worker2"
    before = mains(shop)
    since = time.time()
    code = f"answer = [app.control.cancel_consumer(queue, destination=[{node!r}], reply=True) for queue in %r]"
    shop.celery(code % (["reports", "maintenance"],))
    assert node in shop.celery("answer = [name for reply in app.control.ping(timeout=2) for name in reply]")
    seen = noticed(shop, since, node)
    began = time.time()
    done = shop.play("redis_recover").stats["celeryops_redis_recover"]
    assert done["restarted"] == {"worker1": [], "worker2": ["bulk-1"]} and done["state"] == "healthy"
    cured = all_begin(shop, began)
    load.stop()
    ledger = shop.ledger("--wait", "60")
    assert (ledger["lost"], ledger["run_twice"]) == ([], [])
    after = mains(shop)
    assert [name for name in before if before[name] != after[name]] == ["worker2 bulk-1"]
    ROWS.append(Row("a worker answers and consumes nothing", "`redis_recover`", seen, cured, ledger))


def test_tasks_take_more_memory_than_there_is(shop: Story, load: Background) -> None:
    """The kernel kills the pool process; what it ran is a dead letter, and runs where there is memory again."""
    unit, dead = "celery-shop-worker@bulk-1.service", "reports.dead"
    before = mains(shop)
    for host in HOSTS:
        shop.memory(host, unit, 100)
    try:
        since = time.time()
        greedy = sorted(send(shop, "reports", "shop.sales_report", 10, 400))
        wait_until(lambda: sorted(letters(shop, dead)) == greedy, 60, "the kernel kills what takes too much")
        seen = noticed(shop, since, dead)
    finally:
        for host in HOSTS:
            shop.memory(host, unit, 0)
    began = time.time()
    done = shop.play("dead_letter_requeue", celeryops_queue="reports")
    assert done.stats["celeryops_dead_letter_requeue"]["requeued"] == 10
    cured = all_begin(shop, began)
    load.stop()
    ledger = shop.ledger("--wait", "60")
    assert ledger["lost"] == [] and mains(shop) == before
    assert sorted(line.split()[0] for line in ledger["run_twice"]) == greedy
    remark = "those killed, which run again"
    ROWS.append(Row("tasks take more memory than there is", "`dead_letter_requeue`", seen, cured, ledger, remark))


def test_the_network_is_cut(shop: Story, load: Background) -> None:
    before = mains(shop)
    for host in HOSTS:
        shop.cut(host, "redis1")
    try:
        time.sleep(CUT)
    finally:
        for host in HOSTS:
            shop.join(host, "redis1")
        back = time.time()
    cured = all_begin(shop, back, 60)
    rescued = shop.play("queue_rescue").stats
    load.stop()
    ledger = shop.ledger("--wait", "60")
    print(cured, rescued, ledger["run_twice"])
    assert ledger["lost"] == [] and mains(shop) == before
    ROWS.append(Row(f"network cut between workers and Redis, {CUT:.0f} s", "none needed", None, cured, ledger))
