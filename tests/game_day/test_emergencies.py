# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""emergency_stop, emergency_resume and emergency_restart on real hosts, under load, and with the broker away."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from fleet.story import LEDGER_DB, Story
from fleet_support import HOSTS

from support import wait_until

pytestmark = pytest.mark.ansible

QUEUES = ["critical", "default", "email", "maintenance", "reports"]
LONG = 120
UNITS = {host: ["bulk-1", "fast-1"] for host in HOSTS}
ALL = {"celeryops_confirm": "shop"}


def running(story: Story) -> dict[str, str]:
    """unit on host -> main process, of all that runs."""
    found = {}
    for host in HOSTS:
        shown = story.ssh(host, "systemctl show -p Id,MainPID 'celery-shop-worker@*' celery-shop-beat.service")
        for block in shown.split("\n\n"):
            lines = dict(line.partition("=")[::2] for line in block.splitlines())
            if lines.get("MainPID", "0") != "0":
                found[f"{lines['Id']} {host}"] = lines["MainPID"]
    return found


def paused(story: Story) -> list[str]:
    return sorted(story.redis("HKEYS", "celeryops:pauses").split())


def record(story: Story, path: str) -> dict[str, Any]:
    return dict(json.loads(story.ssh("worker1", f"cat {path}")))


def active(story: Story) -> set[str]:
    code = "answer = [t['id'] for ts in (app.control.inspect(timeout=2).active() or {}).values() for t in ts]"
    return set(story.celery(code))


def begun(story: Story, ids: list[str]) -> list[int]:
    lines = story.redis("LRANGE", "shop:ledger:runs", "0", "-1", db=LEDGER_DB).splitlines()
    runs = [json.loads(line) for line in lines]
    return [sum(run["id"] == one and run["phase"] == "begin" for run in runs) for one in ids]


@pytest.fixture
def fleet(shop: Story) -> Iterator[Story]:
    """Whatever the test did, afterwards all runs and nothing is paused."""
    yield shop
    shop.ssh("redis1", "systemctl start redis-server")
    files = "ls /var/backups/celeryops/shop/emergency-* 2>/dev/null"
    if len(running(shop)) < 5 or shop.redis("EXISTS", "celeryops:emergency:shop") == "1":
        shop.play("emergency_resume", expect=None)
        shop.play("start")
    if paused(shop):
        shop.play("queue_resume", celeryops_queues=paused(shop))
    if shop.ssh("worker1", files, check=False):
        shop.ssh("worker1", "rm -f /var/backups/celeryops/shop/emergency-*")
    # What was cut has begun twice.
    shop.redis("DEL", "shop:ledger:runs", "shop:ledger:sent", db=LEDGER_DB)


@pytest.mark.timeout(600)  # it may be the one that sets up the fleet
def test_stopped_under_load_and_brought_back(fleet: Story) -> None:
    shop = fleet
    # An operator's pause, which the stop must neither take over nor lift.
    mine = {"queue": "email", "by": "anna", "why": "mail server down", "since": 1795000000.0, "until": None}
    shop.redis("HSET", "celeryops:pauses", "email", json.dumps(mine))
    late, early = (
        shop.celery(f"answer = [app.send_task({name!r}, args={args!r}, queue={queue!r}).id for _ in range(2)]")
        for name, args, queue in (
            ("shop.sales_report", [LONG], "reports"),
            ("shop.reserve_stock", [1, LONG], "critical"),
        )
    )
    load = shop.start("load", "--rate", "20", "--slow", "0")
    try:
        wait_until(lambda: active(shop) >= {*late, *early}, 40, "the long ones", 0.5)
        before = running(shop)
        assert len(before) == 5
        terminate = {**ALL, "celeryops_emergency_running": "terminate", "celeryops_why": "double charges"}
        would = shop.play("emergency_stop", "--check", "--diff", **terminate)
        told = would.stats["celeryops_emergency_stop"]
        assert would.changed and {task["id"] for task in told["tasks"]} >= {*late, *early}
        assert running(shop) == before and paused(shop) == ["email"]
        assert shop.redis("EXISTS", "celeryops:emergency:shop") == "0"
        assert not shop.ssh("worker1", "ls /var/backups/celeryops/shop/emergency-*", check=False)

        done = shop.play("emergency_stop", **terminate)
        told = done.stats["celeryops_emergency_stop"]
        assert running(shop) == {} and told["undone"] == [] and paused(shop) == QUEUES
        outcomes = {task["id"]: task["outcome"] for task in told["tasks"]}
        assert {outcomes[one] for one in late} == {"saved"} and {outcomes[one] for one in early} == {"cut"}
        assert set(outcomes) == {*late, *early}, "short tasks had the time to end"
        kept = record(shop, told["file"])
        assert shop.ssh("worker1", f"stat -c %a:%U {told['file']}") == "600:root"
        assert {task["id"]: task["args"] for task in kept["tasks"]} == {
            **{one: [LONG] for one in late},
            **{one: [1, LONG] for one in early},
        }
        assert kept["units"] == UNITS and "email" not in kept["pauses"]
        assert int(shop.redis("HLEN", "unacked")) == 0, "nothing is held by nobody"

        again = shop.play("emergency_stop", **terminate)
        assert again.changed == 0 and again.stats["celeryops_emergency_stop"]["id"] == told["id"]
        refused = shop.play("emergency_restart", expect=False)
        assert "an emergency stop is in force" in refused.text and refused.changed == 0

        # A host boots: its workers come up and take nothing.
        waiting = int(shop.redis("LLEN", "default"))
        shop.ssh("worker2", "systemctl start celery-shop-worker@fast-1.service")
        queues = shop.celery("answer = app.control.inspect(timeout=1).active_queues()")
        assert queues == {"shop-fast-1@worker2": []} and int(shop.redis("LLEN", "default")) >= waiting > 0

        back = shop.play("emergency_resume", celeryops_emergency_requeue=True)
        told = back.stats["celeryops_emergency_resume"]
        assert sorted(told["requeued"]) == sorted([*late, *early]) and told["not_requeued"] == []
        assert set(running(shop)) == set(before) and paused(shop) == ["email"]
        assert told["still_paused"] == ["email"]
        wait_until(lambda: begun(shop, [*late, *early]) == [2] * 4, 40, "what was cut begins again", 0.5)
        nothing = shop.play("emergency_resume", celeryops_emergency_requeue=True)
        assert nothing.changed == 0 and "nothing to resume" in nothing.text
    finally:
        load.stop()
        ids = [*late, *early]
        shop.celery(f"answer = app.control.revoke({ids!r}, terminate=True, signal='SIGKILL')")
    shop.play("queue_resume", celeryops_queues="email")
    ledger = shop.ledger("--wait", "60")
    assert ledger["lost"] == []
    assert {line.split()[0] for line in ledger["run_twice"]} == {*late, *early}


def test_a_broker_that_is_down_does_not_prevent_it(fleet: Story) -> None:
    shop = fleet
    before = running(shop)
    shop.ssh("redis1", "systemctl stop redis-server")
    stop = shop.play("emergency_stop", expect=False, **ALL, celeryops_stop_timeout=5)
    assert running(shop) == {} and "no queue was paused" in stop.text
    shop.ssh("redis1", "systemctl start redis-server")
    kept = record(shop, stop.stats["celeryops_emergency_stop"]["file"])
    assert kept["units"] == UNITS and kept["pauses"] == []
    would = shop.play("emergency_resume", "--check", "--diff")
    assert would.changed and running(shop) == {}
    shop.play("emergency_resume")
    assert set(running(shop)) == set(before)


def test_restart_of_everything_under_load(fleet: Story) -> None:
    shop = fleet
    before = running(shop)
    redis = shop.ssh("redis1", "systemctl show -p MainPID --value redis-server")
    load = shop.start("load", "--rate", "20", "--slow", "0")
    try:
        done = shop.play("emergency_restart", celeryops_emergency_redis=True, celeryops_health_window=0)
        told = done.stats["celeryops_emergency_restart"]
        assert told["verdict"] in ("healthy", "warning") and told["killed"] == []
        after = running(shop)
        assert set(after) == set(before) and not set(after.values()) & set(before.values())
        assert shop.ssh("redis1", "systemctl show -p MainPID --value redis-server") != redis
    finally:
        load.stop()
    ledger = shop.ledger("--wait", "60")
    assert ledger["lost"] == []


@pytest.mark.parametrize(
    ("playbook", "variables", "words"),
    [
        ("emergency_stop", {}, ["celeryops_confirm", "must equal celeryops_app_name, shop"]),
        ("emergency_stop", {**ALL, "celeryops_emergency_running": "x"}, ["celeryops_emergency_running", "terminate"]),
        ("emergency_resume", {"celeryops_emergency_file": "/x"}, ["celeryops_emergency_file", "requeue"]),
        ("emergency_restart", {"celeryops_emergency_redis": "maybe"}, ["celeryops_emergency_redis: maybe"]),
    ],
)
def test_wrong_input_is_named_and_nothing_touched(
    shop: Story, playbook: str, variables: dict[str, Any], words: list[str]
) -> None:
    before = running(shop)
    play = shop.play(playbook, expect=False, **variables)
    assert all(word in play.text for word in words) and play.changed == 0, play.text[-2000:]
    assert running(shop) == before and shop.redis("EXISTS", "celeryops:pauses", "celeryops:emergency:shop") == "0"
