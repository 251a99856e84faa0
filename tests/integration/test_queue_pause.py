# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""celery_queue_pause run by Ansible against real workers, and how the other modules see a pause."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support import Ansible, RedisServer, Worker, send_task, wait_until, workers

pytestmark = pytest.mark.ansible

RUNTIME = ("--include", "celeryops.worker")
BOTH = ["one@lab", "two@lab"]


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    with RedisServer() as server:
        yield server


@pytest.fixture(scope="module")
def fleet(server: RedisServer) -> Iterator[dict[str, Worker]]:
    fleet = (
        Worker(server.url(), "one@lab", pool="threads", queues="mail,bulk", arguments=RUNTIME),
        Worker(server.url(), "two@lab", pool="threads", queues="mail,bulk", arguments=RUNTIME),
        Worker(server.url(), "other@lab", pool="threads", queues="other", arguments=RUNTIME),
    )
    with workers(*fleet):
        yield {worker.name: worker for worker in fleet}


@pytest.fixture
def play(ansible: Ansible, server: RedisServer, venv: Path) -> Any:
    def run(*tasks: tuple[str, dict[str, Any]], **options: Any) -> list[dict[str, Any]]:
        defaults = {"broker_url": server.url(), "virtualenv": str(venv)}
        return ansible.play(
            [{f"celeryops.runbook.{name}": arguments} for name, arguments in tasks], defaults=defaults, **options
        )

    return run


def pause(**arguments: Any) -> tuple[str, dict[str, Any]]:
    return "celery_queue_pause", {"queues": ["mail"], **arguments}


RESUME = pause(state="resumed")
SEE = ("celery_inspect", {"commands": ["active_queues", "celeryops_pauses"]})


def consumed(result: dict[str, Any]) -> dict[str, list[str]]:
    return {
        node: sorted(queue["name"] for queue in found["replies"]["active_queues"])
        for node, found in result["nodes"].items()
    }


def test_pause_and_resume(play: Any, server: RedisServer, fleet: dict[str, Worker]) -> None:
    would, nothing = play(pause(why="repair", by="anna"), SEE, check=True)
    assert would["changed"] and would["stopped"] == {"mail": BOTH} and "repair" in would["diff"]["after"]
    assert nothing["paused"] == {} and consumed(nothing)["one@lab"] == ["bulk", "mail"]

    first, again, other_reason, seen, info, health = play(
        pause(why="repair", by="anna", until="+1h"),
        pause(),
        pause(why="longer repair", by="bert"),
        SEE,
        ("redis_queue_info", {"queues": ["mail", "bulk"]}),
        ("celery_health", {"queues": ["mail", "bulk", "other"], "window": 0, "beat_expected": False}),
    )
    assert first["changed"] and first["stopped"] == {"mail": BOTH} and first["consumers"] == {"mail": []}
    assert not again["changed"] and again["paused"] == first["paused"]
    assert other_reason["changed"] and other_reason["stopped"] == {}
    record = seen["paused"]["mail"]
    assert (record["by"], record["why"], record["overdue"]) == ("anna", "longer repair", False)
    assert record["until"] == first["paused"]["mail"]["until"] and record["since"] == first["paused"]["mail"]["since"]
    assert consumed(seen) == {"one@lab": ["bulk"], "two@lab": ["bulk"], "other@lab": ["other"]}
    assert seen["nodes"]["one@lab"]["replies"]["celeryops_pauses"] == {"withheld": ["mail"]}
    assert info["queues"]["mail"]["paused"]["by"] == "anna" and info["queues"]["bulk"]["paused"] is None
    checks = {check["name"]: check for check in health["checks"]}
    assert checks["queue_paused"]["severity"] == checks["queue_consumers"]["severity"] == "ok"
    assert "queue mail is paused by anna since" in checks["queue_paused"]["message"]

    send_task(server.url(), "lab.add", 1, 2, queue="mail")
    (would,) = play(RESUME, check=True)
    assert would["changed"] and would["started"] == {"mail": BOTH} and would["waiting"] == {"mail": 1}
    unchanged, resumed, again = play(pause(), RESUME, RESUME)
    assert not unchanged["changed"], "check mode resumed nothing"
    assert resumed["changed"] and resumed["started"] == {"mail": BOTH}
    assert resumed["paused"] == {} and resumed["consumers"] == {"mail": BOTH}
    assert not again["changed"] and again["consumers"] == {"mail": BOTH}
    wait_until(lambda: server.cli("LLEN", "mail") == "0", 10, "the message")


def test_a_pause_past_its_time_is_a_warning(play: Any, server: RedisServer, fleet: dict[str, Worker]) -> None:
    server.cli(
        "HSET", "celeryops:pauses", "bulk", '{"by": "anna", "why": "x", "since": 1700000000, "until": 1700000060}'
    )
    seen, health, resumed = play(
        SEE,
        ("celery_health", {"queues": ["bulk"], "window": 0, "beat_expected": False}),
        ("celery_queue_pause", {"queues": ["bulk"], "state": "resumed"}),
    )
    assert seen["paused"]["bulk"]["overdue"]
    (found,) = [check for check in health["checks"] if check["name"] == "queue_paused"]
    assert (found["severity"], found["subject"], found["cure"]) == ("warning", "bulk", "queue_resume")
    assert resumed["changed"] and resumed["paused"] == {}


def test_control_neither_breaks_a_pause_nor_forgets_it(
    play: Any, server: RedisServer, fleet: dict[str, Worker]
) -> None:
    one = {"destination": ["one@lab"]}
    want = {**one, "consumers": [{"queue": "mail"}, {"queue": "bulk"}]}
    wait = {"consumes": ["mail", "bulk"], "queues_consumed": ["mail"]}
    _paused, quiet, quieter, back, again, consumes, resumed = play(
        pause(why="repair"),
        ("celery_control", {**one, "quiet": True}),
        ("celery_control", {**one, "quiet": True}),
        ("celery_control", want),
        ("celery_control", want),
        ("celery_inspect", {**one, "wait_for": wait, "wait_timeout": 5}),
        RESUME,
    )
    assert quiet["changed"] and quiet["after"] == {"one@lab": {"queues": []}}
    assert not quieter["changed"]
    assert back["changed"] and back["after"] == {"one@lab": {"queues": ["bulk"], "paused": ["mail"]}}
    assert not again["changed"] and again["after"] == back["after"]
    assert consumes["unmet"] == []
    assert resumed["started"] == {"mail": BOTH}


def test_a_worker_without_the_part_is_told_and_named(play: Any, server: RedisServer, fleet: dict[str, Worker]) -> None:
    bare = Worker(server.url(), "bare@lab", pool="threads", queues="mail")
    with workers(bare):
        paused, seen, resumed = play(pause(why="repair"), SEE, RESUME)
        assert paused["stopped"] == {"mail": ["bare@lab", *BOTH]} and paused["consumers"] == {"mail": []}
        assert any("bare@lab" in text and "after a restart" in text for text in paused["warnings"])
        assert consumed(seen)["bare@lab"] == []
        assert resumed["started"] == {"mail": BOTH}


def test_a_silent_worker_is_not_taken_for_one_that_follows(
    play: Any, server: RedisServer, fleet: dict[str, Worker]
) -> None:
    fleet["two@lab"].freeze()
    try:
        failed, kept = play(
            pause(why="repair", wait_timeout=2, timeout=0.5), ("redis_queue_info", {"queues": ["mail"]})
        )
    finally:
        fleet["two@lab"].thaw()
    assert failed["category"] == "no_reply" and "do not answer" in failed["msg"]
    assert kept["queues"]["mail"]["paused"], "the record stands, so whoever restarts obeys"
    again, resumed = play(pause(), RESUME)
    assert again["consumers"] == {"mail": []} and resumed["consumers"] == {"mail": BOTH}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"queues": []}, ["queues", "at least one"]),
        ({"queues": ["nosuch"], "why": "x"}, ["queues", "nosuch", "mail"]),
        ({"queues": ["mail"]}, ["why", "mail"]),
        ({"queues": ["mail"], "why": "x", "until": "tomorrow"}, ["until", "tomorrow", "+90m"]),
        ({"queues": ["mail"], "why": "x", "until": "2020-01-01T00:00:00Z"}, ["until", "over"]),
        ({"queues": ["mail"], "why": "x", "wait_timeout": 0}, ["wait_timeout"]),
        ({"queues": ["mail"], "why": "x", "broker_url": "amqp://localhost:1//"}, ["broker_url", "Redis"]),
    ],
)
def test_wrong_input(
    play: Any, server: RedisServer, fleet: dict[str, Worker], arguments: dict[str, Any], words: list[str]
) -> None:
    (failed,) = play(("celery_queue_pause", arguments))
    assert failed["failed"] and all(word in failed["msg"] for word in words), failed["msg"]
    assert server.cli("EXISTS", "celeryops:pauses") == "0"
