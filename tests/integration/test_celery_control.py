# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""celery_control run by Ansible against real workers: observe, plan, apply, prove."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support import Ansible, RedisServer, Worker, send_task, task_state, wait_until, workers

pytestmark = pytest.mark.ansible


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    with RedisServer() as server:
        yield server


@pytest.fixture(scope="module")
def fleet(server: RedisServer) -> Iterator[dict[str, Worker]]:
    fleet = (
        Worker(server.url(), "pre@lab", queues="pre,extra"),
        Worker(server.url(), "threads@lab", pool="threads", queues="threads"),
        Worker(server.url(), "solo@lab", pool="solo", queues="solo"),
        Worker(server.url(), "auto@lab", queues="auto", arguments=("--autoscale", "4,1")),
    )
    with workers(*fleet):
        yield {worker.name: worker for worker in fleet}


@pytest.fixture
def control(ansible: Ansible, server: RedisServer, venv: Path) -> Any:
    def run(*tasks: dict[str, Any], **options: Any) -> list[dict[str, Any]]:
        defaults = {"broker_url": server.url(), "virtualenv": str(venv)}
        return ansible.play(
            [{"celeryops.runbook.celery_control": task} for task in tasks], defaults=defaults, **options
        )

    return run


PRE = ["pre@lab"]
STEPS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"destination": PRE, "consumers": [{"queue": "more"}, {"queue": "extra", "state": "absent"}]},
     {"queues": ["more", "pre"]}),
    ({"destination": PRE, "quiet": True}, {"queues": []}),
    ({"destination": PRE, "consumers": [{"queue": "pre"}], "quiet": False}, {"queues": ["pre"]}),
    ({"destination": PRE, "pool_size": 3, "expect_pool_size": 2}, {"pool_size": 3}),
    ({"destination": PRE, "pool_size": 2}, {"pool_size": 2}),
    ({"destination": PRE, "rate_limits": {"lab.add": "10/m", "lab.limited": 0}},
     {"rate_limits": {"lab.add": "10/m", "lab.limited": "0"}}),
    ({"destination": PRE, "time_limits": {"lab.add": {"soft": 5, "hard": 9}, "lab.limited": {"hard": 70}}},
     {"time_limits": {"lab.add": {"soft": 5, "hard": 9}, "lab.limited": {"soft": 50, "hard": 70}}}),
    ({"destination": PRE, "revoked": ["one", "two"]}, {"revoked": ["one", "two"]}),
]  # fmt: skip


def test_the_state_is_reached_and_a_second_run_changes_nothing(control: Any, fleet: dict[str, Worker]) -> None:
    tasks = [task for task, _unused in STEPS]
    expected = [after for _unused, after in STEPS]
    runs = control(*(item for task in tasks for item in (task, task)))
    for first, second, after in zip(runs[::2], runs[1::2], expected, strict=True):
        assert first["changed"] and first["actions"], first
        assert first["after"] == {"pre@lab": after}
        assert first["diff"]["before"] != first["diff"]["after"]
        assert not second["changed"] and second["actions"] == [], second
        assert second["before"] == second["after"] == {"pre@lab": after}


def test_check_mode_says_what_the_run_does_and_changes_nothing(control: Any, fleet: dict[str, Worker]) -> None:
    tasks = [
        {"destination": PRE, "consumers": [{"queue": "other"}]},
        {"destination": PRE, "pool_size": 5},
        {"destination": ["auto@lab"], "autoscale": {"max": 3, "min": 2}},
        {"rate_limits": {"lab.sleep": "7/s"}},
        {"revoked": ["three"]},
        {"destination": PRE, "shutdown": True},
        {"events": True},
    ]
    foreseen = control(*tasks, check=True)
    again = control(*tasks, check=True)
    for first, second in zip(foreseen, again, strict=True):
        assert first["changed"] and first["actions"] == second["actions"] and first["before"] == second["before"]
    assert foreseen[0]["after"]["pre@lab"]["queues"] == ["other", "pre"]
    done = control(*tasks[:5], tasks[2], tasks[6], tasks[6])
    for first, real in zip(foreseen, done[:5], strict=False):
        assert real["changed"] and real["actions"] == first["actions"] and real["after"] == first["after"]
    assert not done[5]["changed"]
    assert (done[6]["changed"], done[7]["changed"]) == (True, False)


def test_what_cannot_be_done_is_refused_before_anything_is_sent(control: Any, fleet: dict[str, Worker]) -> None:
    cases: list[tuple[dict[str, Any], str, str]] = [
        ({"destination": ["threads@lab"], "pool_size": 4}, "precondition", "threads@lab runs a threads pool"),
        ({"destination": ["solo@lab"], "pool_size": 4}, "precondition", "solo@lab runs a solo pool"),
        ({"destination": ["auto@lab"], "pool_size": 4}, "precondition", "auto@lab runs an autoscaler"),
        ({"pool_size": 4}, "precondition", "pool_size: auto@lab"),
        ({"destination": PRE, "pool_size": 4, "expect_pool_size": 99}, "precondition", "not 99"),
        ({"destination": PRE, "autoscale": {"max": 3, "min": 1}}, "precondition", "without --autoscale"),
        ({"destination": ["nobody@lab"], "quiet": True}, "node_unknown", "no node nobody@lab is connected"),
        ({"destination": [*PRE, "nobody@lab"], "quiet": True}, "node_unknown", "pre@lab"),
        ({"destination": ["celerybeat@lab"], "quiet": True}, "precondition", "is a beat"),
        ({"destination": [], "quiet": True}, "precondition", "matches nobody"),
        ({"rate_limits": {"lab.none": "1/s"}}, "precondition", "knows no task lab.none. It has: lab.add"),
        ({"rate_limits": {"lab.add": "fast"}}, "precondition", "'fast' is no rate"),
        ({"time_limits": {"lab.add": 5}}, "precondition", "time_limits.lab.add"),
        ({"shutdown": True}, "precondition", "needs destination"),
        ({"quiet": False}, "precondition", "quiet: false needs consumers"),
        ({}, "precondition", "nothing is asked for"),
    ]
    found = control(*(arguments for arguments, _unused, _unused in cases))
    for (arguments, category, part), result in zip(cases, found, strict=True):
        assert result.get("failed"), arguments
        assert (result["category"], part in result["msg"]) == (category, True), result["msg"]
    (state,) = control({"destination": PRE, "consumers": [{"queue": "pre"}]})
    assert not state["changed"]


def test_a_frozen_worker_is_named_in_bounded_time(control: Any, server: RedisServer) -> None:
    with workers(Worker(server.url(4), "ice@lab"), Worker(server.url(4), "fine@lab")) as (frozen, _unused):
        frozen.freeze()
        try:
            common = {"broker_url": server.url(4), "timeout": 0.7}
            named, others = control({**common, "destination": ["ice@lab"], "quiet": True}, {**common, "quiet": True})
        finally:
            frozen.thaw()
    assert named["failed"] and named["category"] == "no_reply" and "no answer from ice@lab" in named["msg"]
    assert others["changed"] and list(others["after"]) == ["fine@lab"]
    assert any("1 connected node(s) do not answer" in text for text in others["warnings"])


def test_a_running_task_is_ended_and_proven_dead(control: Any, server: RedisServer, fleet: dict[str, Worker]) -> None:
    control({"destination": PRE, "consumers": [{"queue": "pre"}]})
    task_id = send_task(server.url(), "lab.sleep", 60, queue="pre")
    wait_until(lambda: task_id in fleet["pre@lab"].log.read_text(), what="the task")
    first, second = control({"terminated": [task_id]}, {"terminated": [task_id]})
    assert first["changed"] and first["before"]["pre@lab"] == {"held": {task_id: "active"}}
    assert first["after"]["pre@lab"] == {"held": {}}
    assert not second["changed"] and second["not_held"] == [task_id]
    assert task_state(server.url(), task_id) == "REVOKED"
    busy = send_task(server.url(), "lab.sleep", 10, queue="threads")
    wait_until(lambda: busy in fleet["threads@lab"].log.read_text(), what="the task")
    (refused,) = control({"terminated": [busy], "destination": ["threads@lab"]})
    assert refused["failed"] and "cannot terminate a task" in refused["msg"]


def test_a_busy_pool_shrinks_once_processes_are_free(control: Any, server: RedisServer) -> None:
    worker = Worker(server.url(7), "busy@lab", concurrency=3, arguments=("--include", "celeryops.worker"))
    with workers(worker):
        ids = [send_task(server.url(7), "lab.sleep", seconds) for seconds in (12.0, 11.0, 10.0)]
        wait_until(lambda: all(one in worker.log.read_text() for one in ids), what="the tasks")
        common = {"broker_url": server.url(7), "pool_size": 1}
        late, done = control({**common, "wait_timeout": 1}, {**common, "wait_timeout": 60})
        assert late["failed"] and late["category"] == "wait_timeout", late
        assert "pool processes of busy@lab were busy" in late["msg"]
        assert done["changed"] and done["after"]["busy@lab"]["pool_size"] == 1
        assert [task_state(server.url(7), one) for one in ids[1:]] == ["SUCCESS"] * 2, "they were not ended for it"
        wait_until(lambda: task_state(server.url(7), ids[0]) == "SUCCESS", what="the last task", interval=1)


def test_the_remap_trap_is_noticed(control: Any, server: RedisServer) -> None:
    """Under REMAP_SIGTERM a pool process ignores SIGTERM: the worker says ok and the task runs to its end."""
    worker = Worker(server.url(5), "remap@lab", environment={"REMAP_SIGTERM": "SIGQUIT"})
    with workers(worker):
        task_id = send_task(server.url(5), "lab.sleep", 30)
        wait_until(lambda: task_id in worker.log.read_text(), what="the task")
        common = {"broker_url": server.url(5), "terminated": [task_id]}
        (trapped,) = control({**common, "signal": "SIGTERM"})
        other = send_task(server.url(5), "lab.sleep", 30)
        wait_until(lambda: other in worker.log.read_text(), what="the task")
        (killed,) = control({"broker_url": server.url(5), "terminated": [other]})
        worker.kill()
    assert trapped["failed"] and "Use signal: SIGKILL" in trapped["msg"] and task_id in trapped["msg"]
    assert killed["changed"] and "failed" not in killed


def test_shutdown_is_waited_for(control: Any, server: RedisServer) -> None:
    with workers(Worker(server.url(6), "one@lab"), Worker(server.url(6), "two@lab")) as (one, two):
        common = {"broker_url": server.url(6), "destination": ["one@lab"], "shutdown": True}
        done, again, lenient = control(common, common, {**common, "ignore_missing": True})
        assert done["changed"] and done["after"] == {} and done["before"] == {"one@lab": {"running": True}}
        wait_until(lambda: one.process and one.process.poll() is not None, what="the end of the worker")
        assert two.process and two.process.poll() is None
    assert again["failed"] and again["category"] == "node_unknown" and "There are: two@lab" in again["msg"]
    assert not lenient["changed"] and lenient["missing"] == ["one@lab"]
