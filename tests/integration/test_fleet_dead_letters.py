# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""dead_letter_report, dead_letter_requeue and dead_letter_purge on real hosts, with tasks that really failed."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest
from fleet.story import LEDGER_DB, SHOP, Story

from support import wait_until

pytestmark = pytest.mark.ansible

RUNS = "shop:ledger:runs"
SEND = """
import sys
from shop.celery import app
task, count = sys.argv[1], int(sys.argv[2])
for number in range(count):
    print(app.send_task(task, args=[number], queue="email", priority=(0, 3)[number % 2]).id)
"""
DEAD = ("email.dead", "maintenance.dead")


def send(story: Story, task: str, count: int) -> list[str]:
    done = subprocess.run(
        [str(story.venv / "bin" / "python"), "-c", SEND, task, str(count)],
        cwd=SHOP / "src", env=story.client_environment(), capture_output=True, text=True, check=True,
    )  # fmt: skip
    return done.stdout.split()


def dead(story: Story) -> list[str]:
    """Ids in the dead letters of email, those that failed first in front."""
    lines = [line for line in story.redis("LRANGE", "email.dead", "0", "-1").splitlines() if line]
    return [json.loads(line)["headers"]["id"] for line in reversed(lines)]


def ended(story: Story, ids: list[str]) -> dict[str, int]:
    """How often each of these tasks came to its end."""
    runs = [json.loads(line) for line in story.redis("LRANGE", RUNS, "0", "-1", db=LEDGER_DB).splitlines() if line]
    found = [run["id"] for run in runs if run["phase"] == "end"]
    return {identity: found.count(identity) for identity in ids}


@pytest.fixture
def letters(shop: Story) -> Iterator[Story]:
    """No dead letters before and after."""
    shop.redis("DEL", *DEAD)
    yield shop
    shop.redis("DEL", *DEAD)
    shop.ssh("worker1", "rm -f /var/backups/celeryops/shop/*.dead-*.queue.gz")


@pytest.fixture
def failed(letters: Story) -> list[str]:
    """Reminders that failed for good because the ledger's key was spoilt; it is mended."""
    kept = letters.redis("EXISTS", RUNS, db=LEDGER_DB) == "1"
    if kept:
        letters.redis("RENAME", RUNS, "kept", db=LEDGER_DB)
    letters.redis("SET", RUNS, "spoilt", db=LEDGER_DB)
    try:
        ids = send(letters, "shop.send_reminder", 20)
        wait_until(lambda: set(dead(letters)) >= set(ids), 30, "twenty dead letters")
    finally:
        letters.redis("DEL", RUNS, db=LEDGER_DB)
        if kept:
            letters.redis("RENAME", "kept", RUNS, db=LEDGER_DB)
    return ids


def test_report_and_requeue(letters: Story, failed: list[str]) -> None:
    shop = letters
    unknown = send(shop, "shop.nosuch", 3)
    wait_until(lambda: set(dead(shop)) == {*failed, *unknown}, 30, "the unknown tasks")
    shop.redis("LPUSH", "email.dead", "garbage")
    before = shop.redis("LRANGE", "email.dead", "0", "-1")

    report = shop.play("dead_letter_report", celeryops_show=3)
    told = report.stats["celeryops_dead_letter_report"]
    email = told["queues"]["email.dead"]
    assert report.changed == 0 and (email["depth"], email["undecodable"]) == (24, 1)
    assert email["tasks"] == {"shop.send_reminder": 20, "shop.nosuch": 3}
    assert email["exceptions"] == {"ResponseError": 20, "NotRegistered": 3}
    assert email["reasons"] == {"exception": 20, "unknown_task": 3}
    assert len(email["entries"]) == 3 and all(told["workers"].values())
    assert "WRONGTYPE" in report.text or "NotRegistered" in report.text

    health = shop.play("health_check", expect=None)
    assert "email.dead: 24 tasks failed for good -> celeryops.runbook.dead_letter_report" in health.text
    assert "queue email.dead" not in health.text, "nobody has to consume them"

    plan = shop.play("dead_letter_requeue", "--check", "--diff", celeryops_queue="email")
    assert plan.changed == 1 and "would requeue 20" in plan.text
    assert shop.redis("LRANGE", "email.dead", "0", "-1") == before

    some = {"celeryops_queue": "email", "celeryops_filter": {"ids": failed[:2], "exceptions": ["Response*"]}}
    assert shop.play("dead_letter_requeue", **some).stats["celeryops_dead_letter_requeue"]["requeued"] == 2
    wait_until(lambda: ended(shop, failed[:2]) == dict.fromkeys(failed[:2], 1), 20, "the first two")

    rest = shop.play("dead_letter_requeue", celeryops_queue="email", celeryops_rate=100)
    done = rest.stats["celeryops_dead_letter_requeue"]
    assert (done["requeued"], done["undecodable"], done["left"]) == (18, 1, 4)
    assert done["unknown_tasks"] == {"shop.nosuch": 3} and "left in place" in rest.text
    wait_until(lambda: all(ended(shop, failed).values()), 20, "all of them")

    again = shop.play("dead_letter_requeue", celeryops_queue="email")
    assert again.changed == 0 and "nothing to requeue" in again.text
    nothing = shop.play("dead_letter_requeue", celeryops_queue="email", celeryops_filter={"tasks": ["shop.pay"]})
    assert nothing.changed == 0 and "no entry is selected" in nothing.text
    assert set(ended(shop, failed).values()) == {1}, "none ran twice"


def test_purge_saves_first(letters: Story) -> None:
    shop = letters
    ids = send(shop, "shop.nosuch", 6)
    wait_until(lambda: set(dead(shop)) == set(ids), 30, "dead letters")
    order = dead(shop)
    purge = {"celeryops_queue": "email", "celeryops_confirm": "email.dead"}
    plan = shop.play("dead_letter_purge", "--check", "--diff", **purge)
    assert plan.changed == 1 and "would remove 6" in plan.text and dead(shop) == order

    some = shop.play("dead_letter_purge", **purge, celeryops_filter={"ids": order[:2]})
    assert some.stats["celeryops_dead_letter_purge"]["removed"] == 2 and dead(shop) == order[2:]
    done = shop.play("dead_letter_purge", **purge).stats["celeryops_dead_letter_purge"]
    assert done["removed"] == 4 and dead(shop) == []
    assert shop.ssh("worker1", f"gzip -t {done['file']} && stat -c %a {done['file']}") == "600"
    again = shop.play("dead_letter_purge", **purge)
    assert again.changed == 0 and "nothing to remove" in again.text

    shop.play("queue_restore", celeryops_queue="email.dead", celeryops_file=done["file"])
    assert dead(shop) == order[2:]


@pytest.mark.parametrize(
    ("playbook", "variables", "words"),
    [
        ("dead_letter_report", {"celeryops_queue": "nosuch"}, ["nosuch"]),
        ("dead_letter_report", {"celeryops_filter": {"task": "x"}}, ["celeryops_filter"]),
        ("dead_letter_requeue", {}, ["celeryops_queue"]),
        ("dead_letter_requeue", {"celeryops_queue": "email", "celeryops_rate": "fast"}, ["celeryops_rate", "fast"]),
        ("dead_letter_requeue", {"celeryops_queue": "email", "celeryops_filter": {"reasons": ["why"]}}, ["reasons"]),
        ("dead_letter_purge", {"celeryops_queue": "email"}, ["celeryops_confirm", "email.dead"]),
        ("dead_letter_purge", {"celeryops_queue": "email", "celeryops_confirm": "email"}, ["celeryops_confirm"]),
    ],
)
def test_wrong_input_is_named(shop: Story, playbook: str, variables: dict[str, Any], words: list[str]) -> None:
    play = shop.play(playbook, expect=False, **variables)
    assert all(word in play.text for word in words), play.text[-2000:]
    assert play.changed == 0
