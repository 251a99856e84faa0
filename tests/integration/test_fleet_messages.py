# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""queue_purge, queue_restore, queue_move and queue_rescue on real hosts, while the workers go on."""

from __future__ import annotations

import json
import subprocess
import time
from typing import Any

import pytest
from fleet.story import SHOP, Story
from fleet_support import IDLE, send, waiting

pytestmark = pytest.mark.ansible


def test_purge_restore_and_move(shop: Story) -> None:
    ids = send(shop, IDLE, "shop.update_cart", 30)
    order = waiting(shop, IDLE)
    assert order == ids[::2] + ids[1::2]
    purge = {"celeryops_queue": IDLE, "celeryops_confirm": IDLE}
    load = shop.start("load", "--rate", "20", "--slow", "0")
    try:
        plan = shop.play("queue_purge", "--check", "--diff", **purge)
        assert plan.changed == 1 and "would remove 30" in plan.text
        told = plan.stats["celeryops_queue_purge"]
        assert told["ages"] == {"shop.update_cart": {"minute": 30}}
        assert waiting(shop, IDLE) == order
        assert not shop.ssh("worker1", "ls /var/backups/celeryops/shop/*.queue.gz", check=False)

        done = shop.play("queue_purge", **purge).stats["celeryops_queue_purge"]
        assert done["removed"] == 30 and waiting(shop, IDLE) == []
        file = done["file"]
        assert shop.ssh("worker1", f"gzip -t {file} && stat -c %a {file}") == "600"
        again = shop.play("queue_purge", expect=None, **purge)
        assert again.changed == 0

        back = {"celeryops_queue": IDLE, "celeryops_file": file}
        part = {**back, "celeryops_filter": {"ids": ids[:10]}}
        assert "would restore 10" in shop.play("queue_restore", "--check", "--diff", **part).text
        assert waiting(shop, IDLE) == []
        shop.play("queue_restore", **part)
        shop.play("queue_restore", **back)
        twice = shop.play("queue_restore", **back)
        assert twice.changed == 0 and "was restored" in twice.text
        assert sorted(waiting(shop, IDLE)) == sorted(ids)
        truncated = shop.ssh("worker1", f"head -c 900 {file} > {file}.cut.queue.gz; echo {file}.cut.queue.gz")
        cut = shop.play("queue_restore", expect=False, **{**back, "celeryops_file": truncated})
        assert "damaged or cut off" in cut.text and sorted(waiting(shop, IDLE)) == sorted(ids)

        # To a queue that is consumed: they are run there, and only there.
        move = {"celeryops_queue": IDLE, "celeryops_to": "default", "celeryops_filter": {"args": [4]}}
        nothing = {**move, "celeryops_filter": {"tasks": ["shop.nosuch"]}}
        assert "would move 1 " in shop.play("queue_move", "--check", "--diff", **move).text
        assert len(waiting(shop, IDLE)) == 30
        assert shop.play("queue_move", **move).stats["celeryops_queue_move"]["moved"] == 1
        none = shop.play("queue_move", **nothing)
        assert none.changed == 0 and "nothing to move" in none.text
        del move["celeryops_filter"]
        shop.play("queue_move", **move)
        assert shop.play("queue_move", **move, expect=None).changed == 0
    finally:
        load.stop()
        shop.ssh("worker1", "rm -f /var/backups/celeryops/shop/*.queue.gz")
    ledger = shop.ledger("--wait", "60")
    assert (ledger["lost"], ledger["run_twice"]) == ([], [])


def test_rescue_after_kill(shop: Story) -> None:
    """A host's worker is killed and stays down: what it held is done by the other one in seconds, not in an hour."""
    unit = "celery-shop-worker@bulk-1.service"
    started = shop.play("queue_rescue")
    assert started.changed == 0 and "nothing to rescue" in started.text
    code = (
        "from shop.celery import app\n"
        "for _ in range(8): print(app.send_task('shop.sales_report', args=[3.0], queue='reports').id)"
    )
    done = subprocess.run(
        [str(shop.venv / "bin" / "python"), "-c", code],
        cwd=SHOP / "src", env=shop.client_environment(), capture_output=True, text=True, check=True,
    )  # fmt: skip
    ids = done.stdout.split()
    deadline = time.monotonic() + 10
    while int(shop.redis("HLEN", "unacked")) < 4 and time.monotonic() < deadline:
        time.sleep(0.1)
    # Killed all at once, as by a power cut, and not started again.
    shop.ssh("worker2", f"systemctl kill -s KILL {unit}; sleep 0.2; systemctl stop {unit}")
    try:
        plan = shop.play("queue_rescue", "--check", "--diff")
        rescue = shop.play("queue_rescue")
        told, planned = rescue.stats["celeryops_queue_rescue"], plan.stats["celeryops_queue_rescue"]
        assert planned["ids"] == told["ids"] and "would rescue" in plan.text
        assert told["unknown"] == 0 and set(told["queues"]) == {"reports"} and told["rescued"] == 2
        assert set(told["ids"]) <= set(ids)
        deadline = time.monotonic() + 40
        while (waiting(shop, "reports") or int(shop.redis("HLEN", "unacked"))) and time.monotonic() < deadline:
            time.sleep(0.5)
        again = shop.play("queue_rescue")
        assert again.changed == 0 and "nothing to rescue" in again.text
    finally:
        shop.ssh("worker2", f"systemctl reset-failed {unit}; systemctl start {unit}", check=False)
    runs = [json.loads(line) for line in shop.redis("LRANGE", "shop:ledger:runs", "0", "-1", db=2).splitlines()]
    ended = {run["id"] for run in runs if run["phase"] == "end"}
    assert set(ids) <= ended, "every task is done"
    # Those that had begun were run twice, and the ledger is that of all tests.
    shop.redis("DEL", "shop:ledger:runs", "shop:ledger:sent", db=2)


@pytest.mark.parametrize(
    ("playbook", "variables", "words"),
    [
        ("queue_purge", {"celeryops_queue": "default"}, ["celeryops_confirm", "default"]),
        ("queue_purge", {"celeryops_queue": "nosuch", "celeryops_confirm": "nosuch"}, ["no queue 'nosuch'"]),
        ("queue_restore", {"celeryops_queue": "default", "celeryops_file": "/nowhere"}, ["no file /nowhere"]),
        (
            "queue_move",
            {"celeryops_queue": "default", "celeryops_filter": {"task": "x"}},
            ["celeryops_to", "celeryops_filter"],
        ),
        ("queue_rescue", {"celeryops_dead": ["shop-typo-1@worker1"]}, ["no node shop-typo-1@worker1"]),
    ],
)
def test_wrong_input_is_named(shop: Story, playbook: str, variables: dict[str, Any], words: list[str]) -> None:
    play = shop.play(playbook, expect=False, **variables)
    assert all(word in play.text for word in words), play.text[-2000:]
    assert play.changed == 0
