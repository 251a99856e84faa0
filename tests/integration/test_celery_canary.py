# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from support import Ansible, RedisServer, Worker, celery_venv, workers

pytestmark = pytest.mark.ansible

WITH_RUNTIME = ("--include", "celeryops.worker")


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    with RedisServer() as server:
        url = server.url()
        prefix = {"LABAPP_KEY_PREFIX": "lab."}
        fleet = (
            Worker(
                url,
                "one@lab",
                queues="alpha,beta",
                arguments=WITH_RUNTIME,
                environment={"CELERYOPS_RELEASE": "v1", **prefix},
            ),
            Worker(
                url, "two@lab", queues="beta", arguments=WITH_RUNTIME, environment={"CELERYOPS_RELEASE": "v2", **prefix}
            ),
            Worker(url, "bare@lab", queues="gamma", environment=prefix),
        )
        with workers(*fleet):
            yield server


@pytest.fixture
def connection(server: RedisServer) -> dict[str, Any]:
    return {"broker_url": server.url(), "key_prefix": "lab.", "virtualenv": str(celery_venv())}


def asked(result: dict[str, Any]) -> set[tuple[str, str]]:
    return {(answer["node"], answer["queue"]) for answer in result["answers"]}


def test_every_pair_answers(ansible: Ansible, server: RedisServer, connection: dict[str, Any]) -> None:
    by_node, by_dict, by_queue, dry = ansible.play(
        [
            {"celeryops.runbook.celery_canary": {"nodes": ["one@lab", "two@lab"], **connection}},
            {
                "celeryops.runbook.celery_canary": {
                    "queues": {"beta": ["two@lab"], "alpha": []},
                    "run": "lab.add",
                    "args": [2, 3],
                    "expect": 5,
                    **connection,
                }
            },
            {"celeryops.runbook.celery_canary": {"queues": ["alpha"], "release": "v1", **connection}},
            {"celeryops.runbook.celery_canary": {"queues": ["alpha"], **connection}, "check_mode": True},
        ]
    )
    assert asked(by_node) == {("one@lab", "alpha"), ("one@lab", "beta"), ("two@lab", "beta")}, by_node
    assert not by_node["changed"]
    assert asked(by_dict) == {("two@lab", "beta"), ("one@lab", "alpha")}
    assert {answer["value"] for answer in by_dict["answers"]} == {5}
    assert asked(by_queue) == {("one@lab", "alpha")}
    assert dry["answers"] == [] and dry["sent"] == {} and dry["pairs"] == {"alpha": []}
    assert server.cli("KEYS", "*celeryops:canary*") == ""


def test_what_is_wrong_is_named(ansible: Ansible, server: RedisServer, connection: dict[str, Any]) -> None:
    def case(**options: Any) -> dict[str, Any]:
        return {"celeryops.runbook.celery_canary": {**options, **connection}}

    cases = [
        (case(queues=["alpha"], release="v9"), "canary", "runs release v1, not v9"),
        (case(queues=["alpha"], run="lab.add", args=[1, 1], expect=5), "canary", "answers 2, not 5"),
        (case(queues=["alpha"], run="lab.fail"), "canary", "ValueError: failed on purpose"),
        (case(queues=["alpha"], run="lab.nope"), "task_unknown", "one@lab has no task lab.nope"),
        (case(queues=["gamma"]), "task_unknown", "bare@lab has no task celeryops.canary"),
        (case(queues=["delta"]), "queue_unknown", "consumes delta"),
        (case(queues=["alpha"], nodes=["two@lab"]), "queue_unknown", "two@lab does not consume alpha"),
        (case(nodes=["nobody@lab"]), "node_unknown", "nobody@lab does not answer"),
        (case(), "precondition", "queues: name the queues"),
        (case(queues="alpha"), "precondition", "queues: must be a list"),
        (case(queues=["alpha"], expect=5), "precondition", "expect: has no meaning without run"),
    ]
    results = ansible.play([task for task, _category, _text in cases])
    for result, (_task, category, text) in zip(results, cases, strict=True):
        assert result.get("failed") and result.get("category") == category and text in result["msg"], result


def test_a_busy_worker_is_missed(ansible: Ansible, server: RedisServer, connection: dict[str, Any]) -> None:
    options = {"name": "lab.sleep", "args": [4], "queue": "hold", **connection}
    with Worker(
        server.url(), "busy@lab", queues="hold", concurrency=1, pool="threads",
        arguments=WITH_RUNTIME, environment={"LABAPP_KEY_PREFIX": "lab."},
    ):  # fmt: skip
        sent, result = ansible.play(
            [
                {"celeryops.runbook.celery_task": options},
                {
                    "celeryops.runbook.celery_canary": {
                        "queues": ["hold"],
                        "nodes": ["busy@lab"],
                        "timeout": 1,
                        **connection,
                    }
                },
            ]
        )
        assert sent["changed"], sent
        assert result["category"] == "canary" and result["missing"] == [{"node": "busy@lab", "queue": "hold"}], result
        assert "busy@lab did not answer from queue hold within 1.0 s" in result["msg"]
