# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""lock_report and lock_clear on real hosts."""

from __future__ import annotations

import json
import subprocess
import time
from typing import Any

import pytest
from fleet.story import SHOP, Story

pytestmark = pytest.mark.ansible

TASK = "shop.close_day"
CLEAR = {"celeryops_task": TASK, "celeryops_confirm": TASK}
LEDGER = ("shop:ledger:runs", "shop:ledger:sent")


def send(shop: Story, *arguments: Any, **keywords: Any) -> str:
    code = (
        "import json, sys\nfrom shop.celery import app\n"
        f"args, kwargs = json.load(sys.stdin)\nprint(app.send_task({TASK!r}, args=args, kwargs=kwargs).id)"
    )
    done = subprocess.run(
        [str(shop.venv / "bin" / "python"), "-c", code], cwd=SHOP / "src", env=shop.client_environment(),
        input=json.dumps([arguments, keywords]), capture_output=True, text=True, check=True,
    )  # fmt: skip
    return done.stdout.strip()


def runs(shop: Story, phase: str) -> list[str]:
    lines = shop.redis("LRANGE", LEDGER[0], "0", "-1", db=2).splitlines()
    found = [json.loads(line) for line in lines if line]
    return [run["id"] for run in found if run["task"] == TASK and run["phase"] == phase]


def wait_for(shop: Story, phase: str, task_id: str, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while task_id not in runs(shop, phase):
        assert time.monotonic() < deadline, f"{task_id} did not {phase}"
        time.sleep(0.3)


def test_report_and_clear(shop: Story) -> None:
    try:
        done = send(shop, "2026-11-20")
        wait_for(shop, "end", done)
        runs_on = send(shop, "2026-11-21", seconds=45.0)
        wait_for(shop, "begin", runs_on)
        # Sent again, by keyword: left out, whichever host gets it.
        for _number in range(4):
            send(shop, day="2026-11-20", seconds=0.1)
        before = shop.redis("KEYS", "celeryops:once:*")

        report = shop.play("lock_report", celeryops_task="shop.*")
        told = report.stats["celeryops_lock_report"]
        assert report.changed == 0 and told["count"] == {"running": 1, "waiting": 0, "done": 1}
        owners = {lock["task_id"]: lock["owner"] for lock in told["locks"]}
        assert owners == {done: None, runs_on: "alive"} and "1 running" in report.text

        # Its owner runs: nothing is cleared, the marker neither. In check mode the same.
        for mode in ((), ("--check", "--diff")):
            refused = shop.play("lock_clear", *mode, expect=False, **CLEAR)
            assert "runs it" in refused.text and runs_on in refused.text
        only = {**CLEAR, "celeryops_states": ["done"]}
        plan = shop.play("lock_clear", "--check", "--diff", **only)
        assert plan.changed == 1 and "would clear 1 locks" in plan.text
        assert sorted(shop.redis("KEYS", "celeryops:once:*").split()) == sorted(before.split())

        cleared = shop.play("lock_clear", **only)
        assert cleared.changed == 1
        assert [lock["task_id"] for lock in cleared.stats["celeryops_lock_clear"]["cleared"]] == [done]
        again = shop.play("lock_clear", **only)
        assert again.changed == 0 and "nothing to clear" in again.text
        # Now it is done again, and the other one was never disturbed.
        second = send(shop, "2026-11-20")
        wait_for(shop, "end", second)
        wait_for(shop, "end", runs_on, 60)
        assert runs(shop, "end").count(runs_on) == 1 and sorted(runs(shop, "end")) == sorted([done, second, runs_on])
        assert int(shop.redis("HGET", "celeryops:once-skipped", TASK)) == 4
    finally:
        shop.redis("DEL", *LEDGER, db=2)
        left = shop.redis("KEYS", "celeryops:once*").split()
        if left:
            shop.redis("DEL", *left)


@pytest.mark.parametrize(
    ("playbook", "variables", "words"),
    [
        ("lock_clear", {"celeryops_task": TASK}, "celeryops_confirm: must equal celeryops_task, shop.close_day"),
        ("lock_report", {"celeryops_states": ["asleep"]}, "celeryops_states: give a list of running, waiting and done"),
    ],
)
def test_bad_input(shop: Story, playbook: str, variables: dict[str, Any], words: str) -> None:
    refused = shop.play(playbook, expect=False, **variables)
    assert words in refused.text and refused.changed == 0
