# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""celery_dead_letter_info and celery_dead_letter run by Ansible, beside a real worker whose tasks fail."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support import TESTS, Ansible, RabbitServer, RedisServer, Worker, celery_venv, wait_until

pytestmark = pytest.mark.ansible

SEND = """
import json, sys
from labdead import app
for name, options in json.load(sys.stdin):
    print(app.send_task(name, queue="work", **options).id)
"""


def send(server: RedisServer | RabbitServer, *orders: tuple[str, dict[str, Any]]) -> list[str]:
    done = subprocess.run(
        [str(celery_venv() / "bin" / "python"), "-c", SEND], cwd=TESTS, input=json.dumps(orders), check=True,
        env={"CELERY_BROKER_URL": server.url()}, capture_output=True, text=True,
    )  # fmt: skip
    return done.stdout.split()


def info(**options: Any) -> dict[str, Any]:
    return {"celeryops.runbook.celery_dead_letter_info": options}


def act(**options: Any) -> dict[str, Any]:
    return {"celeryops.runbook.celery_dead_letter": options}


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    with (
        RedisServer() as server,
        Worker(server.url(), "dead@lab", app="labdead", queues="work", arguments=("--include", "celeryops.worker")),
        Worker(server.url(), "bare@lab", app="labdead", queues="other", pool="threads"),
    ):
        yield server


@pytest.fixture
def defaults(server: RedisServer) -> dict[str, Any]:
    return {"broker_url": server.url(), "virtualenv": str(celery_venv())}


@pytest.fixture
def letters(server: RedisServer) -> list[str]:
    """Three that fail whatever one does, and two of a task that nobody knows."""
    server.cli("DEL", "work.dead")
    ids = send(server, *[("dead.fail", {"priority": 3})] * 3, *[("dead.nobody_knows", {"args": ["secret"]})] * 2)
    wait_until(lambda: server.cli("LLEN", "work.dead") == "5", 20, "dead letters")
    return ids


def test_other_modules_tell_dead_letters_from_waiting_tasks(
    ansible: Ansible, server: RedisServer, defaults: dict[str, Any], letters: list[str], tmp_path: Path
) -> None:
    status, revoked = ansible.play(
        [
            {
                "celeryops.runbook.celery_task_info": {
                    "task_ids": letters[-1:],
                    "locate": True,
                    "result_backend": server.url(1),
                }
            },
            {
                "celeryops.runbook.celery_revoke": {
                    "names": ["dead.fail"],
                    "confirm": "dead.fail",
                    "directory": str(tmp_path / "saved"),
                }
            },
        ],
        defaults=defaults,
        check=True,
    )
    (task,) = status["tasks"]
    assert (task["place"], task["queue"], status["nowhere"]) == ("dead", "work.dead", [])
    assert revoked["places"] == {} and revoked["tasks"] == [] and not (tmp_path / "saved").exists()


def test_info(ansible: Ansible, server: RedisServer, defaults: dict[str, Any], letters: list[str]) -> None:
    server.cli("LPUSH", "work.dead", "garbage")
    every, some, shown, missing, empty = ansible.play(
        [
            info(),
            info(queues=["work"], filter={"exceptions": ["Value*"], "newer_than": 600}, show=2, timeout=0),
            info(queues=["work.dead"], filter={"tasks": ["dead.nobody_knows"]}, include_arguments=True, timeout=0),
            info(queues=["nosuch"]),
            info(queues=["work"], filter={"tasks": []}),
        ],
        defaults=defaults,
    )
    work = every["queues"]["work.dead"]
    assert (every["total"], work["depth"], work["matched"], work["undecodable"]) == (6, 6, 5, 1)
    assert work["tasks"] == {"dead.fail": 3, "dead.nobody_knows": 2}
    assert work["reasons"] == {"exception": 3, "unknown_task": 2} and work["complete"] and not work["interrupted"]
    assert every["workers"]["bare@lab"] is None and every["workers"]["dead@lab"]["lost"] == 0
    assert any("bare@lab runs without the runtime part" in line for line in every["summary"])
    assert "secret" not in json.dumps([entry for entry in work["entries"] if "args" in entry])
    found = some["queues"]["work.dead"]
    assert found["matched"] == 3 and len(found["entries"]) == 2 and some["workers"] == {}
    assert {entry["id"] for entry in found["entries"]} < set(letters[:3])
    assert {entry["priority"] for entry in found["entries"]} == {3}
    assert [entry["args"] for entry in shown["queues"]["work.dead"]["entries"]] == [["secret"]] * 2
    assert missing["failed"] and "nosuch" in missing["msg"] and "work.dead" in missing["msg"]
    assert empty["failed"] and "filter.tasks" in empty["msg"]


def test_requeue(ansible: Ansible, server: RedisServer, defaults: dict[str, Any], letters: list[str]) -> None:
    server.cli("LPUSH", "work.dead", "garbage")
    before = server.cli("LRANGE", "work.dead", "0", "-1")
    (plan,) = ansible.play([act(queue="work", state="requeued")], defaults=defaults, check=True)
    assert plan["changed"] and (plan["count"], plan["after"], plan["undecodable"]) == (3, 3, 1)
    assert plan["unknown_tasks"] == {"dead.nobody_knows": 2} and server.cli("LRANGE", "work.dead", "0", "-1") == before
    one, nothing, rest = ansible.play(
        [
            act(queue="work", state="requeued", filter={"ids": [letters[0]]}),
            act(queue="work.dead", state="requeued", filter={"exceptions": ["KeyError"]}),
            act(queue="work", state="requeued", filter={"tasks": ["dead.nobody_knows"]}, registered_only=False),
        ],
        defaults=defaults,
    )
    assert (one["changed"], one["count"], one["tasks"]) == (True, 1, {"dead.fail": 1})
    assert (nothing["changed"], nothing["count"]) == (False, 0)
    assert (rest["count"], rest["unknown_tasks"]) == (2, {})
    # What fails again is there again, once, and as new as its second failure.
    wait_until(lambda: server.cli("LLEN", "work.dead") == "6", 20, "the second failures")


def test_purge(
    ansible: Ansible, server: RedisServer, defaults: dict[str, Any], letters: list[str], tmp_path: Path
) -> None:
    path, other = str(tmp_path / "one"), str(tmp_path / "two")
    purge = {"queue": "work", "state": "purged", "confirm": "work.dead"}
    (plan,) = ansible.play([act(**purge, path=path)], defaults=defaults, check=True)
    assert (plan["changed"], plan["count"], plan["after"]) == (True, 5, 0)
    assert server.cli("LLEN", "work.dead") == "5" and not Path(path).exists()
    some, every, again, back = ansible.play(
        [
            act(**purge, path=path, filter={"reasons": ["unknown_task"]}),
            act(**purge, path=other),
            act(**purge, path=other),
            {"celeryops.runbook.redis_queue": {"queue": "work.dead", "state": "imported", "path": path}},
        ],
        defaults=defaults,
    )
    assert (some["count"], some["after"], some["saved"]["path"]) == (2, 3, path)
    assert (every["count"], every["after"], again["changed"]) == (3, 0, False)
    assert back["count"] == 2 and server.cli("LLEN", "work.dead") == "2"


WRONG: list[tuple[dict[str, Any], list[str]]] = [
    ({"queue": "", "state": "requeued"}, ["queue", "empty"]),
    ({"queue": "nosuch", "state": "requeued"}, ["queue", "nosuch"]),
    ({"queue": "work", "state": "purged", "path": "saved"}, ["confirm", "work.dead", "not set"]),
    ({"queue": "work", "state": "purged", "path": "saved", "confirm": "work"}, ["confirm", "'work'"]),
    ({"queue": "work", "state": "purged", "confirm": "work.dead"}, ["path"]),
    ({"queue": "work", "state": "requeued", "path": "saved"}, ["path"]),
    ({"queue": "work", "state": "requeued", "rate": -1}, ["rate"]),
    ({"queue": "work", "state": "requeued", "max_messages": 0}, ["max_messages"]),
    ({"queue": "work", "state": "requeued", "filter": {"ids": [""]}}, ["filter.ids"]),
    ({"queue": "work", "state": "requeued", "filter": {"older_than": -1}}, ["filter.older_than"]),
    ({"queue": "work", "state": "requeued", "filter": {}}, ["filter"]),
]


def test_wrong_input(
    ansible: Ansible, server: RedisServer, defaults: dict[str, Any], letters: list[str], tmp_path: Path
) -> None:
    before = server.cli("LRANGE", "work.dead", "0", "-1")
    tasks = [
        act(**{name: str(tmp_path / value) if name == "path" else value for name, value in options.items()})
        for options, _words in WRONG
    ]
    found = ansible.play(tasks, defaults=defaults)
    for result, (_options, words) in zip(found, WRONG, strict=True):
        assert result["failed"] and all(word in result["msg"] for word in words), result["msg"]
    assert server.cli("LRANGE", "work.dead", "0", "-1") == before and not (tmp_path / "saved").exists()


def test_rabbitmq(ansible: Ansible, tmp_path: Path) -> None:
    with (
        RabbitServer() as rabbit,
        Worker(rabbit.url(), "dead@lab", app="labdead", queues="work", arguments=("--include", "celeryops.worker"),
               environment={"CELERY_RESULT_BACKEND": ""}) as live,
    ):  # fmt: skip
        defaults = {"broker_url": rabbit.url(), "virtualenv": str(celery_venv())}
        send(rabbit, *[("dead.fail", {})] * 3, *[("dead.nobody_knows", {})] * 2)
        wait_until(lambda: live.log.read_text().count("on purpose") >= 3, 20, "the failures")

        def look() -> dict[str, Any]:
            return ansible.module("celery_dead_letter_info", {"queues": ["work"], "timeout": 0}, defaults=defaults)

        found = wait_until(lambda: (told := look())["total"] == 5 and told, 20, "five dead letters")
        assert found["queues"]["work.dead"]["tasks"] == {"dead.fail": 3, "dead.nobody_knows": 2}
        told, plan = ansible.play(
            [info(show=1, timeout=0.5), act(queue="work", state="requeued", timeout=0.5)], defaults=defaults, check=True
        )
        assert told["workers"]["dead@lab"]["caught"] == 5 and len(told["queues"]["work.dead"]["entries"]) == 1
        assert (plan["changed"], plan["count"], plan["after"]) == (True, 3, 2)
        assert plan["unknown_tasks"] == {"dead.nobody_knows": 2}
        one, missing, purge = ansible.play(
            [
                act(queue="work", state="requeued", max_messages=1, filter={"tasks": ["dead.fail"]}, timeout=0.5),
                act(queue="nosuch", state="requeued"),
                act(queue="work", state="purged", confirm="work.dead", path=str(tmp_path / "saved")),
            ],
            defaults=defaults,
        )
        assert (one["count"], one["tasks"]) == (1, {"dead.fail": 1})
        assert missing["failed"] and "nosuch" in missing["msg"]
        assert purge["failed"] and "Redis brokers only" in purge["msg"]
        wait_until(lambda: look()["total"] == 5, 20, "its second failure")
