# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""task_send, task_status, task_revoke, task_requeue, task_run_inline and results_prune on real hosts."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator
from typing import Any

import pytest
from fleet.story import LEDGER_DB, Play, Story

from support import wait_until

pytestmark = pytest.mark.ansible
LONG = 90


def celery(story: Story, code: str) -> Any:
    """What Celery's own tools say; the code prints JSON."""
    done = subprocess.run(
        [str(story.venv / "bin" / "python"), "-c",
         "import json, os, sys\nfrom celery import Celery\n"
         "app = Celery(broker=os.environ['CELERY_BROKER_URL'], backend=os.environ['CELERY_RESULT_BACKEND'])\n" + code],
        env=story.client_environment(), capture_output=True, text=True, check=True,
    )  # fmt: skip
    return json.loads(done.stdout)


def send(story: Story, name: str, queue: str, rows: list[list[Any]], **options: Any) -> list[str]:
    code = f"print(json.dumps([app.send_task({name!r}, args=r, queue={queue!r}, **{options!r}).id for r in {rows!r}]))"
    return list(celery(story, code))


def active(story: Story) -> set[str]:
    code = "print(json.dumps([t['id'] for ts in (app.control.inspect(timeout=2).active() or {}).values() for t in ts]))"
    return set(celery(story, code))


def begun(story: Story, task_id: str) -> int:
    runs = [
        json.loads(line) for line in story.redis("LRANGE", "shop:ledger:runs", "0", "-1", db=LEDGER_DB).splitlines()
    ]
    return sum(run["id"] == task_id and run["phase"] == "begin" for run in runs)


def results(story: Story, pattern: str = "*") -> set[str]:
    return set(story.redis("KEYS", f"celery-task-meta-{pattern}", db=1).split())


def depth(story: Story, queue: str) -> int:
    return int(story.redis("LLEN", queue))


def refused(story: Story, playbook: str, *words: str, **variables: Any) -> Play:
    play = story.play(playbook, expect=False, **variables)
    assert all(word in play.text for word in words), play.text[-2000:]
    assert "changed=0" in play.text and play.changed == 0
    return play


@pytest.fixture
def busy(shop: Story) -> Iterator[list[str]]:
    """Every slot for reports runs a long one; two more wait."""
    ids = send(shop, "shop.sales_report", "reports", [[LONG]] * 6)
    wait_until(lambda: len(active(shop) & set(ids)) == 4, 30, "four of them run")
    assert depth(shop, "reports") == 2
    yield ids
    left = active(shop) & set(ids)
    celery(shop, f"app.control.revoke({sorted(left)!r}, terminate=True, signal='SIGKILL'); print('null')")
    shop.redis("DEL", "reports")
    wait_until(lambda: not active(shop) & set(ids), 30, "all have ended")


def test_send_and_status(shop: Story) -> None:
    refused(
        shop, "task_send", "celeryops_priority: 10 is not 0 to 9", celeryops_task="shop.selftest", celeryops_priority=10
    )
    refused(shop, "task_send", "Close to it: shop.sales_report", celeryops_task="shop.sale_report")
    refused(shop, "task_status", "celeryops_task_ids: give the ids")
    before = results(shop)
    order = {"celeryops_task": "shop.selftest", "celeryops_wait_timeout": 20, "celeryops_return_result": True}
    dry = shop.play("task_send", "--check", "--diff", **order)
    assert dry.changed == 1 and "would go to default" in dry.text
    assert results(shop) <= before, "nothing was run; old ones may run out meanwhile"

    sent = shop.play("task_send", **order)
    stats = sent.stats["celeryops_task_send"]
    assert (stats["state"], stats["queue"]) == ("SUCCESS", "default") and "Result: ok" in sent.text
    (eta,) = send(shop, "shop.send_reminder", "email", [[1]], countdown=3600)
    wait_until(lambda: depth(shop, "email") == 0, 30, "a worker holds it")
    ids = [stats["task_id"], eta, "not-heard-of"]
    told = shop.play("task_status", celeryops_task_ids=",".join(ids))
    found = {task["task_id"]: task for task in told.stats["celeryops_task_status"]["tasks"]}
    assert found[ids[0]]["state"] == "SUCCESS" and found[ids[0]]["name"] == "shop.selftest"
    assert found[eta]["place"] == "scheduled" and found[eta]["node"].startswith("shop-fast-1@worker")
    assert told.changed == 0 and told.stats["celeryops_task_status"]["nowhere"] == ["not-heard-of"]
    # By id, found at a worker: remembered, and every worker knows.
    gone = shop.play("task_revoke", celeryops_task_ids=[eta])
    assert gone.changed > 0 and gone.stats["celeryops_task_revoke"]["places"] == {"scheduled": 1}
    assert shop.redis("ZSCORE", "celeryops:revokes", eta)
    revoked = celery(shop, "print(json.dumps(app.control.inspect(timeout=2).revoked()))")
    assert len(revoked) == 4 and all(eta in ids for ids in revoked.values())
    assert shop.play("task_revoke", celeryops_task_ids=[eta]).changed == 0


def test_requeue_then_revoke_and_terminate(shop: Story, busy: list[str]) -> None:
    # Their slots are all taken: what is sent again waits behind, so its failure stays the one that was sent again.
    failed = send(shop, "shop.price_line", "default", [["x", "y"]])[0]
    wait_until(lambda: shop.redis("EXISTS", f"celery-task-meta-{failed}", db=1) == "1", 30, "it has failed")
    refused(shop, "task_requeue", "celeryops_task_ids: give ids", "celeryops_exceptions")
    again = {"celeryops_tasks": "shop.price_*", "celeryops_exceptions": "TypeError", "celeryops_queue": "reports"}
    dry = shop.play("task_requeue", "--check", "--diff", **again)
    assert dry.stats["celeryops_task_requeue"]["count"] == 1 and "1 of 1 failed task(s) that fit would be" in dry.text
    assert depth(shop, "reports") == 2
    done = shop.play("task_requeue", **again)
    assert done.changed == 1 and [task["task_id"] for task in done.stats["celeryops_task_requeue"]["tasks"]] == [failed]
    assert depth(shop, "reports") == 3
    second = shop.play("task_requeue", **again)
    assert second.changed == 0 and second.stats["celeryops_task_requeue"]["already_requeued"] == 1
    none = shop.play("task_requeue", celeryops_tasks="shop.nope")
    assert none.changed == 0 and "Nothing fits" in none.text

    # The same task is running: not here too.
    report = {"celeryops_task": "shop.sales_report", "celeryops_task_args": [LONG]}
    refused(shop, "task_run_inline", "the same task, shop.sales_report", "run twice", **report)

    names = {"celeryops_tasks": "shop.sales_report", "celeryops_task_args": [LONG], "celeryops_terminate": True}
    refused(shop, "task_revoke", "celeryops_confirm: must equal celeryops_tasks, shop.sales_report", **names)
    names["celeryops_confirm"] = "shop.sales_report"
    dry = shop.play("task_revoke", "--check", "--diff", **names)
    assert dry.stats["celeryops_task_revoke"]["places"] == {"queued": 2, "running": 4} and dry.changed > 0
    assert depth(shop, "reports") == 3 and len(active(shop) & set(busy)) == 4
    assert not shop.ssh("worker1", "ls /var/backups/celeryops/shop", check=False)

    done = shop.play("task_revoke", **names)
    stats = done.stats["celeryops_task_revoke"]
    assert stats["removed"] == {"reports": 2} and set(stats["ids"]) == set(busy)
    assert not active(shop) & set(busy)
    assert shop.ssh("worker1", f"stat -c %a:%U {stats['saved']['reports']}") == "600:root"
    wait_until(lambda: begun(shop, failed) == 2, 30, "what was sent again runs again")
    assert sum(begun(shop, task) for task in busy) == 4, "the waiting ones never ran"
    second = shop.play("task_revoke", **names)
    assert second.changed == 0 and "Nothing fits" in second.text


def test_run_inline(shop: Story) -> None:
    refused(shop, "task_run_inline", "celeryops_task: name the task")
    refused(shop, "task_run_inline", "Close to it: shop.selftest", celeryops_task="shop.self_test")
    order = {"celeryops_task": "shop.refresh_catalogue", "celeryops_task_id": "inline-1"}
    dry = shop.play("task_run_inline", "--check", **order)
    assert "would run on worker1" in dry.text and begun(shop, "inline-1") == 0
    done = shop.play("task_run_inline", **order)
    assert done.changed == 1 and done.stats["celeryops_task_run_inline"]["state"] == "SUCCESS"
    assert begun(shop, "inline-1") == 1, "with the environment of the workers it finds the ledger"
    told = shop.play("task_run_inline", celeryops_task="shop.selftest", celeryops_return_result=True)
    assert "Result: ok" in told.text


def test_results_prune(shop: Story) -> None:
    def put(name: str, days: int) -> None:
        done = time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime(time.time() - days * 86400 - 60))
        meta = {"status": "SUCCESS", "result": 1, "date_done": done, "task_id": name}
        shop.redis("SET", f"celery-task-meta-{name}", json.dumps(meta), db=1)

    for number in range(20):
        put(f"old-{number}", number)
    assert len(results(shop, "old-*")) == 20
    refused(shop, "results_prune", "celeryops_results_days: give the days", "celeryops_confirm: must equal")
    wanted = {"celeryops_results_days": 7, "celeryops_confirm": "shop"}
    dry = shop.play("results_prune", "--check", "--diff", **wanted)
    assert dry.stats["celeryops_results_prune"]["count"] == 13 and "13 result(s) older than 7 days would go" in dry.text
    assert len(results(shop, "old-*")) == 20
    done = shop.play("results_prune", **wanted)
    assert done.changed == 1 and done.stats["celeryops_results_prune"]["no_expiry"]["count"] == 7
    assert len(results(shop, "old-*")) == 7
    assert shop.play("results_prune", **wanted).changed == 0
    for number in range(7):
        shop.redis("DEL", f"celery-task-meta-old-{number}", db=1)
