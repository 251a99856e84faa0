# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The playbook game_day: what it refuses, what it causes and cures, and that nothing is left when a cure fails.

The shop has its own load meanwhile, whose ledger knows nothing of probes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fleet.story import Play, Story
from fleet_support import HOSTS, LOCK, marked_fleet
from scorecard import ROWS, all_answer, forget, mains

pytestmark = [pytest.mark.ansible, pytest.mark.timeout(900)]

ALL = ("redis1", *HOSTS)
LEFT = (
    "systemctl list-units --all --plain --no-legend 'celeryops-*'; "
    "ls -d /run/celeryops-fault/* /var/lib/celery-shop/probe-* 2>/dev/null; ip route show type blackhole"
)
# Other than those that the neighbours cause by hand.
FAULTS = ["network_cut", "worker_out_of_memory", "beat_killed", "redis_frozen"]


def left(story: Story) -> str:
    """What a game day may not leave on the hosts."""
    return "".join(story.ssh(host, LEFT, check=False) for host in ALL)


def game_day(story: Story, *arguments: str, expect: bool | None = True, **variables: Any) -> Play:
    return story.play("game_day", *arguments, expect=expect, **{"celeryops_confirm": "shop", **variables})


@pytest.fixture(scope="module")
def marked(shop: Story) -> Iterator[Story]:
    with marked_fleet(shop):
        yield shop


def test_a_fleet_that_is_not_marked_is_refused(shop: Story, tmp_path: Path) -> None:
    before = mains(shop)
    said = game_day(shop, expect=False, celeryops_faults="worker_killed").text
    assert "not marked as hosts of a test fleet: worker1, worker2, redis1" in said and "Nothing was touched" in said
    one = tmp_path / "one.yml"
    one.write_text(json.dumps({"workers": {"hosts": {host: {"celeryops_game_day": True} for host in HOSTS}}}))
    said = game_day(shop, "-i", str(one), expect=False, celeryops_faults="worker_killed").text
    assert "not marked as hosts of a test fleet: redis1;" in said
    said = game_day(shop, expect=False, celeryops_faults="worker_killed", celeryops_game_day=True).text
    assert "celeryops_game_day: every host has it" in said
    assert mains(shop) == before and left(shop) == ""


def test_what_cannot_be_is_refused_and_a_plan_touches_nothing(marked: Story) -> None:
    shop = marked
    before = mains(shop)
    wrong = {"celeryops_confirm": "", "celeryops_faults": "worker_kiled,rabbitmq_killed", "celeryops_fault_seconds": 1}
    said = game_day(shop, expect=False, **wrong).text
    for words in (
        "celeryops_confirm: must equal celeryops_app_name, shop",
        "celeryops_faults: there is no worker_kiled; there are random, redis_killed",
        "celeryops_faults: this fleet cannot have rabbitmq_killed",
        "celeryops_fault_seconds: 1 is no number of seconds",
    ):
        assert words in said
    assert "a worker answers and consumes nothing" in shop.play("game_day", celeryops_faults="list").text
    # Somebody deploys.
    lock = {
        "owner": "anna",
        "token": "1",
        "started": 1.0,
        "renewed": 1.0,
        "controller": "c",
        "pid": 1,
        "release": "v2",
        "step": "x",
    }
    shop.redis("SET", LOCK, json.dumps(lock), "EX", "120")
    try:
        said = game_day(shop, expect=False, celeryops_faults="worker_killed").text
    finally:
        shop.redis("DEL", LOCK)
    assert "anna" in said
    # A worker is down.
    shop.ssh("worker2", "systemctl stop celery-shop-worker@bulk-1")
    try:
        said = game_day(shop, expect=False, celeryops_faults="worker_killed").text
        assert "shop is warning by health_check" in said and "shop-bulk-1@worker2" in said
    finally:
        shop.ssh("worker2", "systemctl start celery-shop-worker@bulk-1")
        all_answer(shop)
    before["worker2 bulk-1"] = mains(shop)["worker2 bulk-1"]
    plan = game_day(shop, "--check", "--diff", celeryops_faults="random", celeryops_seed=7)
    told = plan.stats["celeryops_game_day"]
    assert told["faults"] == [] and len(told["plan"]) == 3 and told["seed"] == 7
    assert mains(shop) == before and left(shop) == "" and shop.redis("EXISTS", LOCK) == "0"


def test_faults_by_name_are_caused_noticed_cured_and_counted(marked: Story, tmp_path: Path) -> None:
    shop = marked
    forget(shop)
    report = tmp_path / "report.md"
    given = {"celeryops_seed": 11, "celeryops_fault_seconds": 20, "celeryops_report": str(report)}
    load = shop.start("load", "--rate", "5", "--slow", "0")
    try:
        play = game_day(shop, celeryops_faults=FAULTS, **given)
    finally:
        load.stop()
    told = play.stats["celeryops_game_day"]
    rows = {row["name"]: row for row in told["faults"]}
    print(play.seconds, json.dumps(rows, indent=1))
    assert list(rows) == FAULTS and told["problems"] == []
    for name, row in rows.items():
        # What the pool process that was killed had begun may be gone, if it is acknowledged early.
        assert row["lost"] == row["sent"] - row["done"] <= (name == "worker_out_of_memory"), row
        assert row["sent"] > 20 and row["cured"] > 0
        assert bool(row["noticed"]) == (name in ("network_cut", "redis_frozen"))
    # The shop's own ledger, whose tasks went through the same queues.
    ledger = shop.ledger("--wait", "60")
    forget(shop)
    assert len(ledger["lost"]) <= 1, ledger["lost"]
    table = report.read_text()
    assert all(
        f"| {row['fault']} | {row['cure']} |" in table and f"| {row['fault']} |" in play.text for row in rows.values()
    )
    assert left(shop) == "" and shop.password not in play.text
    ROWS.extend(told["faults"])


def test_a_seed_repeats_the_choice(marked: Story) -> None:
    shop = marked
    plans = [
        game_day(shop, *check, celeryops_faults="random", celeryops_fault_count=1, celeryops_seed=12).stats[
            "celeryops_game_day"
        ]
        for check in (("--check",), ())
    ]
    assert plans[0]["plan"] == plans[1]["plan"] and plans[1]["problems"] == []
    (row,) = plans[1]["faults"]
    assert row["lost"] == 0 and row["done"] == row["sent"] and left(shop) == ""
    ROWS.extend(plans[1]["faults"])


def test_a_cure_that_fails_ends_red_and_undone(marked: Story) -> None:
    shop = marked
    # The cure refuses its variables.
    broken = ["-e", "celeryops_redis_timeout=soon"]
    play = game_day(
        shop, expect=False, celeryops_faults="redis_stopped,worker_killed", celeryops_game_day_arguments=broken
    )
    told = play.stats["celeryops_game_day"]
    (row,) = told["faults"]
    assert "redis_stopped on redis1: " in row["problem"] and "celeryops_redis_timeout: soon" in row["problem"]
    assert "The fleet is still" not in row["problem"] and row["remark"] == "FAILED"
    assert "not cured: redis_stopped on redis1" in play.text and "Begun: 1 of 2" in play.text
    assert shop.ssh("redis1", "systemctl is-active redis-server") == "active" and left(shop) == ""
    all_answer(shop)
