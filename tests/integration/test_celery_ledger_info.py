# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""celery_ledger_info run by Ansible against real workers, with the runtime package and without."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from support import Ansible, RedisServer, Worker, _in_celery, send_task, wait_until, workers

pytestmark = pytest.mark.ansible

LOOK = "celeryops.runbook.celery_ledger_info"


def test_what_the_fleet_did(ansible: Ansible, broker: RedisServer, venv: Path) -> None:
    url = broker.url()
    defaults = {"broker_url": url, "virtualenv": str(venv)}
    runtime = ("--include", "celeryops.worker")
    stays, ends = (
        Worker(url, f"{name}@lab", queues=name, pool="solo", arguments=runtime) for name in ("stays", "ends")
    )

    def succeeded(count: int) -> None:
        wait_until(lambda: stays.log.read_text().count("] succeeded in") == count, 10, f"{count} tasks")

    with workers(stays, ends, Worker(url, "plain@lab", queues="plain", pool="solo")):
        for name in ("stays", "plain"):
            send_task(url, "lab.add", 1, 1, queue=name)
        succeeded(1)
        (first,) = ansible.play([{LOOK: {}, "check_mode": True}], defaults=defaults)
        nodes = first["nodes"]
        assert not first["changed"] and "tasks" not in first
        assert nodes.keys() == {"stays@lab", "ends@lab", "plain@lab"}
        assert nodes["plain@lab"] is None, "it ran a task, and keeps no ledger"
        told = {name: (found["pid"], found["begun"], found["ended"]) for name, found in nodes.items() if found}
        assert told == {"stays@lab": (stays.pid, 1, 1), "ends@lab": (ends.pid, 0, 0)}

        # A wait that this test makes itself, so that its length is known.
        stays.freeze()
        before = time.monotonic()
        _in_celery(url, "import celeryops.stamp\nlabapp.app.send_task('lab.add', [2, 2], queue='stays')")
        after = time.monotonic()
        time.sleep(1.0)
        least = time.monotonic() - after
        stays.thaw()
        succeeded(2)
        most = time.monotonic() - before
        ends.kill()

        drained = {"ends@lab": {**nodes["ends@lab"], "begun": 3, "ended": 2}}
        lost, known, refused = ansible.play(
            [{LOOK: {"since": nodes}}, {LOOK: {"since": nodes, "drained": [drained]}}, {LOOK: {"timeout": 0}}],
            defaults=defaults,
        )
    tasks = lost["tasks"]
    assert not lost["changed"] and (tasks["begun"], tasks["ended"], tasks["wait_tasks"]) == (1, 1, 1)
    waits = {tasks[f"wait_{name}_ms"] / 1000 for name in ("p50", "p99", "worst")}
    assert len(waits) == 1 and 0.99 * least <= min(waits) <= 1.2 * most, (least, waits, most)
    assert (tasks["cut_off"], tasks["uncounted"]) == (0, ["ends@lab", "plain@lab"])
    # Whoever tells the last ledger of a worker that stopped learns what it did and left unfinished.
    tasks = known["tasks"]
    assert (tasks["begun"], tasks["ended"], tasks["cut_off"], tasks["uncounted"]) == (4, 3, 1, ["plain@lab"])
    assert refused["failed"] and refused["category"] == "precondition"
    assert "timeout: must be above 0 seconds" in refused["msg"]
