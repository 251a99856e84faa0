# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""celery_emergency run by Ansible, the whole way, with a real worker that is killed where the role kills it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support import Ansible, RedisServer, Worker, send_task, wait_until

pytestmark = pytest.mark.ansible

NODE = "lab-fast-1@one"
UNITS = {"one": {"fast-1": NODE}}
LONG = 300


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    with RedisServer() as server:
        yield server


def worker(server: RedisServer) -> Worker:
    return Worker(server.url(), NODE, queues="mail,bulk", concurrency=2, arguments=("--include", "celeryops.worker"))


@pytest.fixture
def step(ansible: Ansible, server: RedisServer, venv: Path, tmp_path: Path) -> Any:
    def run(name: str, check: bool = False, failed: bool = False, **options: Any) -> dict[str, Any]:
        given = {
            "name": "lab", "step": name, "directory": str(tmp_path / "saved"), "by": "anna", "why": "fire",
            "broker_url": server.url(), "result_backend": server.url(), "virtualenv": str(venv),
        }  # fmt: skip
        if name == "begin":
            given.update(units=UNITS, queues=["mail", "bulk"], wait=2)
        done = ansible.module("celery_emergency", {**given, **options}, check=check)
        assert bool(done.get("failed")) is failed, done
        return done

    return run


def files(tmp_path: Path) -> list[str]:
    return sorted(os.listdir(tmp_path / "saved")) if (tmp_path / "saved").exists() else []


@pytest.mark.parametrize("running", ["requeue", "terminate"])
def test_the_whole_way(step: Any, server: RedisServer, tmp_path: Path, running: str) -> None:
    server.cli("FLUSHALL")
    first = worker(server).start()
    try:
        early = send_task(server.url(), "lab.sleep", LONG, "geheim", queue="mail")
        late = send_task(server.url(), "lab.late", LONG, queue="bulk")
        wait_until(lambda: first.log.read_text().count("received") >= 2, 20, "both")
        would = step("begin", check=True, running=running)
        assert would["changed"] and would["busy"] == {"one": ["fast-1"]} and would["paused"] == ["bulk", "mail"]
        assert {task["id"] for task in would["tasks"]} == {early, late}
        assert files(tmp_path) == [] and server.cli("EXISTS", "celeryops:pauses", "celeryops:emergency:lab") == "0"

        begun = step("begin", running=running)
        assert begun["undone"] == [] and begun["busy"] == {"one": ["fast-1"]}
        assert "geheim" not in json.dumps(begun), "arguments are in the record, not in the result"
        kept = json.loads(Path(begun["file"]).read_text())
        assert kept == json.loads(server.cli("GET", "celeryops:emergency:lab"))
        assert {task["id"]: (task["args"], task["late"]) for task in kept["tasks"]} == {
            early: ([LONG, "geheim"], False),
            late: ([LONG], True),
        }
    finally:
        first.kill()
    send_task(server.url(), "lab.add", 1, 2, queue="mail")
    ended = step("end")
    outcomes = {task["id"]: task["outcome"] for task in ended["tasks"]}
    assert ended["rescued"] == 1 and outcomes == {early: "cut", late: "saved" if running == "terminate" else "waits"}
    assert server.cli("LLEN", "bulk") == ("0" if running == "terminate" else "1") and server.cli("LLEN", "mail") == "1"
    assert not step("end")["changed"] and not step("begin", running=running, units={})["changed"]
    found = step("find")
    assert found["open"] and found["units"] == {"one": ["fast-1"]} and found["keeps"] is False
    with worker(server) as second:
        would = step("lift", check=True)
        assert would["lifted"] == ["bulk", "mail"] and server.cli("HLEN", "celeryops:pauses") == "2"
        assert step("lift")["lifted"] == ["bulk", "mail"] and not step("lift")["changed"]
        would = step("close", check=True, requeue=True)
        expected = sorted([early, late] if running == "terminate" else [early])
        assert sorted(would["requeued"]) == expected and step("find")["open"]
        # Ended without sending; then sent after all, from the record, once.
        closed = step("close")
        assert closed["requeued"] == [] and not closed["open"] and not step("find")["found"]
        file = begun["file"]
        sent = step("close", file=file, requeue=True)
        assert sorted(sent["requeued"]) == expected
        wait_until(lambda: all(one in second.log.read_text() for one in (early, late)), 20, "they run again")
        assert not step("close", file=file, requeue=True)["changed"]
        second.kill()  # they run for long


def test_what_an_operator_paused_stays(step: Any, server: RedisServer, tmp_path: Path) -> None:
    server.cli("FLUSHALL")
    mine = {"queue": "mail", "by": "bert", "why": "repair", "since": 1795000000.0, "until": None}
    with worker(server):
        server.cli("HSET", "celeryops:pauses", "mail", json.dumps(mine))
        begun = step("begin")
        assert begun["paused"] == begun["pauses"] == ["bulk"] and begun["busy"] == {} and begun["tasks"] == []
        assert json.loads(server.cli("HGET", "celeryops:pauses", "mail")) == mine
        lifted = step("lift")
        assert lifted["lifted"] == ["bulk"] and lifted["left"] == ["mail"]
        assert server.cli("HKEYS", "celeryops:pauses") == "mail"


def test_a_broker_that_is_away(step: Any, server: RedisServer, tmp_path: Path) -> None:
    server.cli("FLUSHALL")
    away = {"broker_url": "redis://127.0.0.1:1/0"}
    begun = step("begin", **away)
    assert begun["changed"] and "no queue was paused" in begun["undone"][0] and begun["busy"] == {}
    assert json.loads(Path(begun["file"]).read_text())["units"] == {"one": ["fast-1"]}
    assert not step("begin", **away)["changed"] and len(files(tmp_path)) == 1
    # It is back: the record of the host counts.
    assert step("find")["id"] == begun["id"]
    step("close")


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("begin", {"wait": -1}, ["wait"]),
        ("lift", {"file": "/x"}, ["file", "step lift"]),
        ("close", {"file": "/nowhere.json"}, ["/nowhere.json"]),
        ("find", {"broker_url": "amqp://localhost//"}, ["not Redis", "stop"]),
        ("find", {"broker_url": "redis://127.0.0.1:1/0"}, ["127.0.0.1:1"]),
    ],
)
def test_wrong_input(step: Any, tmp_path: Path, name: str, options: dict[str, Any], words: list[str]) -> None:
    done = step(name, failed=True, **options)
    assert all(word in done["msg"] for word in words), done["msg"]
    assert files(tmp_path) == []
