# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""celery_release_gate run by Ansible: what waits, what is scheduled, who answers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support import Ansible, RedisServer, Worker, celery_venv, send_task, workers

pytestmark = pytest.mark.ansible

KNOWN = ["lab.add", "lab.sleep"]
SCHEDULE = {"nightly": {"task": "lab.add", "queue": "alpha"}}
NODES = ["one@lab", "two@lab"]


@pytest.fixture(scope="module")
def fleet() -> Iterator[tuple[RedisServer, Worker]]:
    with RedisServer() as server:
        one = Worker(server.url(), "one@lab", queues="alpha")
        two = Worker(server.url(), "two@lab", queues="alpha")
        with workers(one, two):
            yield server, two


def release(path: Path, **fields: Any) -> str:
    path.write_text(json.dumps({"tasks": KNOWN, "schedule": SCHEDULE, "queues": ["alpha"], **fields}))
    return str(path)


def test_what_waits_must_be_known(ansible: Ansible, fleet: tuple[RedisServer, Worker], tmp_path: Path) -> None:
    url = fleet[0].url()
    good = release(tmp_path / "good.json")
    bare = release(tmp_path / "bare.json", tasks=["lab.add"])
    orphan = release(tmp_path / "orphan.json", schedule={"lost": {"task": "lab.gone", "queue": "nobody"}})
    send_task(url, "lab.other", queue="waiting")
    send_task(url, "lab.dead", queue="alpha.dead")
    send_task(url, "lab.foreign", queue="of-another-application")
    defaults = {"broker_url": url, "virtualenv": str(celery_venv())}

    def asked(file: str, *queues: str) -> dict[str, Any]:
        return {"release_file": file, "queues": [*queues, "alpha"], "expected_nodes": NODES}

    waits, passes, lacks, scheduled = ansible.play(
        [{"celeryops.runbook.celery_release_gate": task} for task in (
            asked(good, "waiting"),
            asked(release(tmp_path / "all.json", tasks=[*KNOWN, "lab.other", "lab.dead"]), "waiting"),
            asked(bare),
            asked(orphan),
        )],
        defaults=defaults,
    )  # fmt: skip
    assert waits["failed"] and waits["category"] == "precondition"
    assert waits["unknown_tasks"] == {
        "lab.other": ["waiting in queue waiting (1)"],
        "lab.dead": ["waiting in queue alpha.dead (1)"],
    }
    for part in ("task lab.other, waiting in queue waiting (1), is unknown to the release", "alpha.dead (1)"):
        assert part in waits["msg"]
    assert not passes.get("failed") and not passes["changed"] and passes["waiting"] == {"alpha.dead": 1, "waiting": 1}
    assert passes["nodes"] == {node: ["alpha"] for node in NODES}
    assert set(lacks["unknown_tasks"]) == {"lab.dead"}
    assert "schedule entry lost goes to queue nobody, which no pool consumes" in scheduled["msg"]
    assert scheduled["unknown_tasks"]["lab.gone"] == ["schedule entry lost"]


def test_what_workers_hold_must_be_known(ansible: Ansible, fleet: tuple[RedisServer, Worker], tmp_path: Path) -> None:
    url = fleet[0].url(1)
    with Worker(url, "three@lab", queues="beta", concurrency=1):
        for _number in range(3):
            send_task(url, "lab.sleep", 30, queue="beta")
        (held,) = ansible.play(
            [{"celeryops.runbook.celery_release_gate": {
                "release_file": release(tmp_path / "r.json", tasks=["lab.add"], queues=["beta"], schedule={}),
                "queues": ["beta"], "expected_nodes": ["three@lab"],
            }}],
            defaults={"broker_url": url, "virtualenv": str(celery_venv())},
        )  # fmt: skip
    places = " ".join(held["unknown_tasks"]["lab.sleep"])
    assert "held by workers, from queue beta" in places and "waiting in queue beta" in places


def test_the_fleet_must_be_complete(ansible: Ansible, fleet: tuple[RedisServer, Worker]) -> None:
    server, two = fleet
    asked: dict[str, Any] = {"queues": ["alpha"], "expected_nodes": [*NODES, "gone@lab"], "timeout": 1}
    defaults = {"broker_url": server.url(), "virtualenv": str(celery_venv())}
    missing, excused, wrong = ansible.play(
        [{"celeryops.runbook.celery_release_gate": task} for task in (
            asked, {**asked, "tolerated_nodes": ["gone@lab"]}, {**asked, "queues": []},
        )],
        defaults=defaults,
    )  # fmt: skip
    assert "the fleet is not complete: no answer from gone@lab within 1.0 s" in missing["msg"]
    assert not excused.get("failed")
    assert wrong["failed"] and "queues: must not be empty" in wrong["msg"]
    two.freeze()
    try:
        # Frozen is not stopped: nobody knows which of those that are silent still holds work.
        frozen, unsure = ansible.play(
            [{"celeryops.runbook.celery_release_gate": task} for task in (
                {**asked, "expected_nodes": NODES}, {**asked, "tolerated_nodes": ["gone@lab"]},
            )],
            defaults=defaults,
        )  # fmt: skip
    finally:
        two.thaw()
    assert "no answer from two@lab" in frozen["msg"]
    assert "two@lab" in unsure["msg"] and "gone@lab" in unsure["msg"]


def test_wrong_input(ansible: Ansible, fleet: tuple[RedisServer, Worker], tmp_path: Path) -> None:
    empty = tmp_path / "empty.json"
    empty.write_text("{}")
    results = ansible.play(
        [{"celeryops.runbook.celery_release_gate": {"queues": ["alpha"], "release_file": str(file)}}
         for file in (tmp_path / "none.json", empty)],
        defaults={"broker_url": fleet[0].url(), "virtualenv": str(celery_venv())},
    )  # fmt: skip
    for result, said in zip(results, ("cannot be read", "does not describe a release"), strict=True):
        assert result["failed"] and result["msg"].startswith("release_file: ") and said in result["msg"]
