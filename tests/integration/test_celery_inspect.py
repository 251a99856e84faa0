# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""celery_inspect run by Ansible against real workers."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support import Ansible, RedisServer, Worker, free_port, send_task, wait_until, workers

pytestmark = pytest.mark.ansible
PASSWORD = "hunter2-of-the-broker"
NAMES = ["a@lab", "b@lab", "c@lab"]


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    with RedisServer(password=PASSWORD) as server:
        yield server


@pytest.fixture(scope="module")
def fleet(server: RedisServer) -> Iterator[tuple[Worker, ...]]:
    with workers(*(Worker(server.url(), name) for name in NAMES)) as fleet:
        yield fleet


@pytest.fixture
def inspect(ansible: Ansible, server: RedisServer, venv: Path) -> Any:
    def run(*tasks: dict[str, Any], **options: Any) -> list[dict[str, Any]]:
        defaults = {"broker_url": server.url(), "virtualenv": str(venv), **options.pop("defaults", {})}
        found = ansible.play(
            [{"celeryops.runbook.celery_inspect": task} for task in tasks], defaults=defaults, **options
        )
        assert PASSWORD not in ansible.output + json.dumps(found)
        return found

    return run


def test_one_run_answers_everything_and_hides_arguments(inspect: Any, server: RedisServer) -> None:
    with workers(Worker(server.url(1), "busy@lab")) as (worker,):
        task_id = send_task(server.url(1), "lab.sleep", 60, secret="in-the-arguments")
        wait_until(lambda: task_id in worker.log.read_text(), what="the task")
        query = {"commands": ["ping", "active", "query_task", "stats", "conf", "report"], "task_ids": [task_id]}
        hidden, shown, failed = inspect(
            query,
            {**query, "include_arguments": True},
            {"wait_for": {"idle": True}, "wait_timeout": 0.1, "commands": ["active"]},
            defaults={"broker_url": server.url(1)},
            verbosity=3,
            check=True,
        )
        worker.kill()
    assert hidden["answered"] == ["busy@lab"] and hidden["subscribed"] == 1 and not hidden["changed"]
    assert "in-the-arguments" not in json.dumps(hidden) + json.dumps(failed)
    active = [task for node in hidden["nodes"].values() for task in node["replies"]["active"]]
    assert [task["id"] for task in active] == [task_id]
    assert active[0]["kwargs_size"] > 10 and active[0]["name"] == "lab.sleep"
    assert "in-the-arguments" in json.dumps(shown)
    assert failed["failed"] and failed["category"] == "wait_timeout"
    assert any(item["condition"] == "idle" and "active" in item["reason"] for item in failed["unmet"])


def test_wait_for(inspect: Any, fleet: tuple[Worker, ...]) -> None:
    met, unmet, missing, lenient, release = inspect(
        {
            "wait_for": {"all_answer": True, "min_nodes": 3, "consumes": ["celery"], "idle": True, "gone": ["z@lab"]},
            "expected_nodes": NAMES,
        },
        {"wait_for": {"consumes": ["celery", "nope"], "queues_consumed": ["nope"]}, "wait_timeout": 1},
        {"destination": ["z@lab"], "fail_on_missing": True},
        {"destination": ["z@lab", "a@lab"]},
        {"wait_for": {"release": "v2"}, "destination": ["a@lab"], "wait_timeout": 0.5},
    )
    assert met["unmet"] == [] and met["checks"] >= 2 and not met["changed"]
    assert (
        unmet["failed"] and "a@lab: does not consume nope" in unmet["msg"] and "no node consumes nope" in unmet["msg"]
    )
    assert 1 <= unmet["waited"] < 2 and unmet["checks"] >= 2 and unmet["answered"] == NAMES
    assert missing["failed"] and missing["category"] == "no_reply"
    assert "no answer from z@lab" in missing["msg"] and "there are: a@lab, b@lab, c@lab" in missing["msg"]
    assert "failed" not in lenient
    assert lenient["nodes"]["z@lab"] == {
        "state": "silent", "type": "worker", "connected": False, "replies": {}, "errors": {},
    }  # fmt: skip
    assert release["failed"] and "--include celeryops.worker" in release["msg"]


def test_killed_and_frozen_workers_are_told_from_idle_ones(inspect: Any, server: RedisServer) -> None:
    names = ["frozen@lab", "killed@lab", "idle@lab"]
    fleet = [Worker(server.url(2), name) for name in names]
    with workers(*fleet):
        fleet[1].kill()
        fleet[0].signal(signal.SIGSTOP)
        common = {"broker_url": server.url(2), "expected_nodes": names, "commands": ["active"], "timeout": 1}
        plain, failed = inspect(common, {**common, "wait_for": {"all_answer": True}, "wait_timeout": 2})
        fleet[0].signal(signal.SIGCONT)
    assert (plain["subscribed"], plain["silent_count"], plain["answered"]) == (2, 1, ["idle@lab"])
    assert plain["silent"] == ["frozen@lab", "killed@lab"]
    assert plain["nodes"]["idle@lab"]["replies"] == {"active": []}
    assert 1 <= plain["elapsed"] < 1.2
    assert failed["failed"] and "frozen@lab" in failed["msg"] and "killed@lab" in failed["msg"]
    assert failed["waited"] < 3.5


def test_double_names(inspect: Any, server: RedisServer) -> None:
    with workers(Worker(server.url(3), "twin@lab"), Worker(server.url(3), "twin@lab")):
        (found,) = inspect({"broker_url": server.url(3)})
    assert (found["duplicates"], found["subscribed"], found["answered"]) == (["twin@lab"], 2, ["twin@lab"])


def test_nobody_there(inspect: Any, server: RedisServer) -> None:
    found, failed = inspect({"broker_url": server.url(9)}, {"broker_url": server.url(9), "fail_on_missing": True})
    assert (found["subscribed"], found["answered"], found["nodes"]) == (0, [], {})
    assert found["elapsed"] < 0.5
    assert failed["failed"] and "no node is connected" in failed["msg"]


def test_the_connection_in_an_environment_file(
    ansible: Ansible, server: RedisServer, fleet: tuple[Worker, ...], venv: Path, tmp_path: Path
) -> None:
    path = tmp_path / "secret.env"
    path.touch(mode=0o600)
    path.write_text(f'# the broker\nCELERY_BROKER_URL="{server.url()}"\n')
    found = ansible.module("celery_inspect", {"environment_file": str(path), "virtualenv": str(venv)}, verbosity=4)
    assert found["answered"] == NAMES
    assert PASSWORD not in ansible.output + json.dumps(found)


def test_under_another_python_the_module_respawns(
    ansible: Ansible, server: RedisServer, fleet: tuple[Worker, ...], venv: Path, tmp_path: Path
) -> None:
    """A venv without a site-packages directory of this minor version is run by its own interpreter."""
    odd = tmp_path / "venv"
    (odd / "bin").mkdir(parents=True)
    (odd / "bin" / "python").write_text(f'#!/bin/sh\ntouch "{tmp_path}/ran"\nexec "{venv}/bin/python" "$@"\n')
    (odd / "bin" / "python").chmod(0o755)
    found = ansible.module("celery_inspect", {"broker_url": server.url(), "virtualenv": str(odd)})
    assert found["answered"] == NAMES
    assert (tmp_path / "ran").exists()


def test_bad_input_is_one_clear_error_without_the_secret(inspect: Any, server: RedisServer, tmp_path: Path) -> None:
    url = server.url()
    cases: list[tuple[dict[str, Any], str, str]] = [
        ({"broker_url": url.replace(PASSWORD, "wrong-guess")}, "authentication", "authentication failed"),
        ({"broker_url": url.replace(f":{PASSWORD}@", "")}, "authentication", "gives no password"),
        ({"broker_url": server.url(77)}, "connection", "database 77 does not exist"),
        ({"broker_url": f"redis://:{PASSWORD}@127.0.0.1:{free_port()}/0"}, "connection", "cannot be reached"),
        ({"broker_url": f"kafka://:{PASSWORD}@h"}, "precondition", "kafka is not supported"),
        ({"virtualenv": "/nowhere"}, "precondition", "virtualenv: there is no /nowhere/bin/python"),
        ({"broker_url": "", "environment_file": str(tmp_path / "none")}, "precondition", "environment_file"),
        ({"wait_for": {}}, "precondition", "wait_for: holds no condition"),
        ({"wait_for": {"not_consumes": 3}}, "precondition", "wait_for.not_consumes"),
        ({"commands": ["query_task"]}, "precondition", "task_ids"),
        ({"destination": []}, "precondition", "destination: is empty"),
        ({"timeout": 0}, "precondition", "timeout: must be above 0"),
        ({"transport_options": {"priority_steps": "x", "password": "in-options"}}, "precondition", "priority_steps"),
        ({"broker_url": url.replace("redis:", "rediss:"), "socket_timeout": 1}, "connection", "TLS"),
    ]
    found = inspect(*(arguments for arguments, _unused, _unused in cases), verbosity=3)
    for (arguments, category, part), result in zip(cases, found, strict=True):
        assert result.get("failed"), arguments
        assert (result["category"], part in result["msg"]) == (category, True), result["msg"]
        assert "wrong-guess" not in json.dumps(result) and "in-options" not in json.dumps(result)
