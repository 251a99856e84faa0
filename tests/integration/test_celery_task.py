# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest

from support import Ansible, RedisServer, Worker, celery_venv

pytestmark = pytest.mark.ansible


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    with RedisServer(password="s3cr3t-word") as server, Worker(server.url(), "tasks-1@lab", queues="alpha,beta"):
        yield server


@pytest.fixture
def connection(server: RedisServer) -> dict[str, Any]:
    return {"broker_url": server.url(), "result_backend": server.url(), "virtualenv": str(celery_venv())}


def test_send_wait_and_read(ansible: Ansible, server: RedisServer, connection: dict[str, Any]) -> None:
    task = {"celeryops.runbook.celery_task": {"name": "lab.add", "args": [2, 3], "queue": "alpha", **connection}}
    waited = {"wait": True, "wait_timeout": 20, "return_result": True}
    full = {"celeryops.runbook.celery_task": {**task["celeryops.runbook.celery_task"], **waited, "task_id": "sum-1"}}
    again = {"celeryops.runbook.celery_task": {"task_id": "sum-1", "wait": True, **connection}}
    info = {"task_ids": ["never-heard-of", "sum-1"], **connection}
    sent, done, seen, states, results = ansible.play(
        [
            task,
            full,
            again,
            {"celeryops.runbook.celery_task_info": info},
            {"celeryops.runbook.celery_task_info": {**info, "return_result": True}},
        ]
    )
    assert sent["changed"] and sent["queue"] == "alpha" and sent["task_id"] and sent["state"] is None
    assert done["state"] == "SUCCESS" and done["result"] == 5 and done["task_id"] == "sum-1"
    assert not seen["changed"] and seen["state"] == "SUCCESS" and "result" not in seen
    assert [item["state"] for item in states["tasks"]] == ["PENDING", "SUCCESS"]
    assert states["states"] == {"PENDING": 1, "SUCCESS": 1} and "result" not in states["tasks"][1]
    assert results["tasks"][1]["result"] == 5
    assert "s3cr3t-word" not in ansible.output


def test_message_on_the_broker(ansible: Ansible, server: RedisServer, connection: dict[str, Any]) -> None:
    import json

    server.cli("LPUSH", "idle-queue", "x")
    server.cli("DEL", "idle-queue\x06\x169")
    options = {
        "name": "lab.add",
        "args": [1, 1],
        "queue": "idle-queue",
        "countdown": 60,
        "expires": 90,
        "headers": {"by": "me"},
    }
    before = time.time()
    result = ansible.module("celery_task", {**options, "priority": 9, **connection})
    assert result["changed"], result
    message = json.loads(server.cli("RPOP", "idle-queue\x06\x169"))
    assert message["headers"]["by"] == "me" and message["headers"]["eta"] and message["headers"]["expires"]
    assert before <= message["headers"]["celeryops_published"] <= time.time()
    assert message["properties"]["priority"] == 9
    assert server.cli("EXISTS", "_kombu.binding.idle-queue") == "0"
    server.cli("DEL", "idle-queue")


def test_check_mode_sends_nothing(ansible: Ansible, server: RedisServer, connection: dict[str, Any]) -> None:
    options = {"name": "lab.add", "args": [1, 1], "queue": "alpha", "task_id": "dry-1", "wait": True, **connection}
    result = ansible.module("celery_task", options, check=True)
    assert result["changed"] and result["state"] is None
    assert server.cli("KEYS", "*dry-1*") == ""


def test_failures_are_named(ansible: Ansible, server: RedisServer, connection: dict[str, Any]) -> None:
    base = {"name": "lab.add", "queue": "alpha", **connection}
    cases: list[tuple[dict[str, Any], str, str]] = [
        ({**base, "name": "lab.nope"}, "task_unknown", "lab.nope is not registered"),
        ({**base, "queue": "nowhere"}, "queue_unknown", "no worker consumes nowhere"),
        ({**base, "priority": 10}, "precondition", "priority: must be 0 to 9, not 10"),
        ({**base, "eta": "tomorrow"}, "precondition", "eta: 'tomorrow'"),
        ({**base, "eta": "2026-11-21T06:00:00"}, "precondition", "with a zone"),
        ({key: base[key] for key in base if key != "queue"}, "precondition", "queue: name the queue"),
        ({**connection, "task_id": "x"}, "precondition", "wait: must be true"),
        ({**base, "result_backend": "", "wait": True}, "precondition", "result backend is disabled"),
        ({**base, "name": "lab.fail", "wait": True}, "task_failed", "ended as FAILURE: ValueError"),
        ({**connection, "task_id": "unheard", "wait": True, "wait_timeout": 0.2}, "wait_timeout", "unheard is PENDING"),
    ]
    results = ansible.play([{"celeryops.runbook.celery_task": options} for options, _category, _text in cases])
    for result, (_options, category, text) in zip(results, cases, strict=True):
        assert result.get("failed") and result.get("category") == category and text in result["msg"], result
    assert "s3cr3t-word" not in ansible.output


def test_info_without_backend(ansible: Ansible, server: RedisServer, connection: dict[str, Any]) -> None:
    down = server.url().replace(str(server.port), "1")
    cases = [
        ({**connection, "task_ids": ["a"], "result_backend": ""}, "precondition", "result backend is disabled"),
        ({**connection, "task_ids": []}, "precondition", "task_ids: give at least one id"),
        ({**connection, "task_ids": ["a"], "result_backend": down}, "connection", "result backend:"),
    ]
    results = ansible.play([{"celeryops.runbook.celery_task_info": options} for options, _category, _text in cases])
    for result, (_options, category, text) in zip(results, cases, strict=True):
        assert result.get("failed") and result.get("category") == category and text in result["msg"], result
    assert "s3cr3t-word" not in ansible.output
