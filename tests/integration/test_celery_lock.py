# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""celery_lock and celery_lock_info run by Ansible against real workers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from support import Ansible, RedisServer, Worker, send_task, wait_until

pytestmark = pytest.mark.ansible

LOCK, INFO = "celeryops.runbook.celery_lock", "celeryops.runbook.celery_lock_info"
CLEAR = {"task": "once.work", "confirm": "once.work"}


def begun(server: RedisServer, what: str) -> int:
    return int(server.cli("LLEN", f"once:begin:{what}", db=1))


def test_list_and_clear(ansible: Ansible, broker: RedisServer, venv: Path) -> None:
    url = broker.url()

    def play(*tasks: dict[str, Any], **options: Any) -> list[dict[str, Any]]:
        return ansible.play(list(tasks), defaults={"broker_url": url, "virtualenv": str(venv)}, **options)

    worker = Worker(
        url, "locks@lab", app="labonce", arguments=("--include", "celeryops.worker"),
        environment={"LABAPP_NOTES_URL": broker.url(1), "CELERYOPS_ONCE_LEASE": "30"},
    )  # fmt: skip
    with worker:
        done = send_task(url, "once.work", "done")
        mail = send_task(url, "once.mail", "post", user_id=7)
        runs = send_task(url, "once.work", "runs", 60.0)
        wait_until(lambda: begun(broker, "runs") and len(broker.keys()) and begun(broker, "done"), 20, "the tasks")
        wait_until(lambda: "mail for 7" in worker.log.read_text() and "done done" in worker.log.read_text(), 20, "two")
        everything, some, refused, same, wrong = play(
            {INFO: {}},
            {INFO: {"task": "once.m*", "scope": "user=7", "states": ["done"]}},
            {LOCK: CLEAR},
            {LOCK: {**CLEAR, "states": ["done"]}, "check_mode": True},
            {LOCK: {**CLEAR, "dead": ["locks@lab"]}},
        )
        (few,) = play({INFO: {"most": 1}})
        assert few["count"] == everything["count"] and len(few["locks"]) == 2
        assert everything["count"] == {"running": 1, "waiting": 0, "done": 2} and not everything["changed"]
        by_id = {lock["task_id"]: lock for lock in everything["locks"]}
        assert set(by_id) == {done, mail, runs}
        running = by_id[runs]
        assert (running["owner"], running["why"]) == ("alive", "locks@lab runs it")
        assert (by_id[done]["owner"], by_id[done]["value_kept"], by_id[done]["attempt"]) == (None, True, 1)
        assert 7000 < by_id[done]["expires_in"] <= 7200
        assert [(lock["task_id"], lock["scope"]) for lock in some["locks"]] == [(mail, "user=7")]
        # A live owner: nothing is cleared, not even the marker beside it.
        assert refused["failed"] and refused["category"] == "lock_held"
        assert "locks@lab runs it" in refused["msg"] and [lock["task_id"] for lock in refused["locks"]] == [runs]
        assert same["changed"] and [lock["task_id"] for lock in same["cleared"]] == [done]
        assert wrong["failed"] and "dead: locks@lab answers" in wrong["msg"]
        cleared, again, rest = play(
            {LOCK: {**CLEAR, "states": ["done"]}}, {LOCK: {**CLEAR, "states": ["done"]}}, {INFO: {"task": "once.work"}}
        )
        assert cleared["changed"] and "done global" in cleared["diff"]["before"] and not again["changed"]
        assert [lock["task_id"] for lock in rest["locks"]] == [runs]
        # Cleared, so the same is done again.
        send_task(url, "once.work", "done")
        wait_until(lambda: begun(broker, "done") == 2, 10, "the second run")
        worker.kill()
    # Its node is away, but it renewed a moment ago: only who knows better may say that it is dead.
    now, named = play(
        {LOCK: {**CLEAR, "states": ["running"]}}, {LOCK: {**CLEAR, "dead": ["locks@lab"]}, "check_mode": True}
    )
    assert now["failed"] and ("renewed just now" in now["msg"] or "did not answer" in now["msg"])
    assert named["changed"] and {lock["task_id"] for lock in named["cleared"]} >= {runs}


@pytest.mark.parametrize(
    ("module", "arguments", "words"),
    [
        (LOCK, {"task": "once.work"}, "confirm: must equal task, once.work"),
        (LOCK, {"task": "once.*", "confirm": "once.*"}, "task: once.* is a pattern"),
        (LOCK, {**CLEAR, "scope": "team=1"}, "scope: 'team=1' is none of global, user=ID"),
        (INFO, {"timeout": 0}, "timeout: must be above 0"),
        (INFO, {"redis_url": "amqp://x"}, "CELERYOPS_ONCE_REDIS: must be a Redis URL"),
        (INFO, {"database": "sqlite:////nowhere/at/all.db"}, "the database of the locks failed"),
    ],
)
def test_bad_input(
    ansible: Ansible, broker: RedisServer, venv: Path, module: str, arguments: dict[str, Any], words: str
) -> None:
    (result,) = ansible.play([{module: arguments}], defaults={"broker_url": broker.url(), "virtualenv": str(venv)})
    assert result["failed"] and words in result["msg"]
