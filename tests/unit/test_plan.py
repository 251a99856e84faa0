# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

from typing import Any

import pytest

from ansible_collections.celeryops.runbook.plugins.module_utils.engine.errors import PreconditionFailed
from ansible_collections.celeryops.runbook.plugins.module_utils.engine.plan import (
    Consumer,
    Desired,
    NodeState,
    Task,
    TimeLimit,
    check_nodes,
    describe,
    parse_registered,
    plan,
    predict,
    rate_per_second,
    still_alive,
)

A = NodeState(
    pool="prefork",
    processes=(11, 12),
    pool_size=2,
    queues=("default", "bulk"),
    limits={"shop.pay": {"rate_limit": "60/m", "time_limit": "60", "soft_time_limit": "50"}, "shop.mail": {}},
    revoked=frozenset({"old"}),
    tasks={"run": Task("active", 12), "wait": Task("reserved"), "done": Task("ready", 11)},
)
B = NodeState(pool="prefork", processes=(21,), pool_size=1, queues=("default",), limits=A.limits)
STATES = {"a@x": A, "b@x": B}


def sent(desired: Desired, states: dict[str, NodeState] | None = None) -> list[tuple[str, dict[str, Any], list[str]]]:
    actions = plan(STATES if states is None else states, desired)
    return [(action.command, dict(action.arguments), list(action.destination)) for action in actions]


def test_a_worker_tells_its_state() -> None:
    replies = {
        "stats": {
            "pool": {
                "implementation": "celery.concurrency.prefork:TaskPool",
                "max-concurrency": 2,
                "processes": [1, 2, 3],
            },
            "autoscaler": {"max": 5, "min": 1, "current": 3},
        },
        "active_queues": [{"name": "default"}, {"name": "bulk"}],
        "registered": ["shop.pay [rate_limit=60/m time_limit=60]", "shop.mail"],
        "revoked": ["x"],
        "query_task": {"t": ["active", {"worker_pid": 2}], "u": ["ready", None]},
    }
    state = NodeState.read(replies)
    assert (state.pool, state.pool_size, state.processes, state.autoscale) == ("prefork", 3, (1, 2, 3), (5, 1))
    assert state.queues == ("default", "bulk")
    assert state.limits == {"shop.pay": {"rate_limit": "60/m", "time_limit": "60"}, "shop.mail": {}}
    assert state.tasks == {"t": Task("active", 2), "u": Task("ready", None)}
    threads = {"stats": {"pool": {"implementation": "celery.concurrency.thread:TaskPool", "max-concurrency": 4}}}
    assert (NodeState.read(threads).pool, NodeState.read(threads).pool_size) == ("threads", 4)
    assert NodeState.read({}).queues is None


@pytest.mark.parametrize(
    "desired, expected",
    [
        (
            Desired(quiet=True),
            [
                ("cancel_consumer", {"queue": "bulk"}, ["a@x"]),
                ("cancel_consumer", {"queue": "default"}, ["a@x", "b@x"]),
            ],
        ),
        (
            Desired(consumers=(Consumer("bulk"), Consumer("default", present=False))),
            [("cancel_consumer", {"queue": "default"}, ["a@x", "b@x"]), ("add_consumer", {"queue": "bulk"}, ["b@x"])],
        ),
        (
            Desired(consumers=(Consumer("new", exchange="ex", exchange_type="topic", routing_key="a.#"),)),
            [
                (
                    "add_consumer",
                    {"queue": "new", "exchange": "ex", "exchange_type": "topic", "routing_key": "a.#"},
                    ["a@x", "b@x"],
                )
            ],
        ),
        (Desired(pool_size=4), [("pool_grow", {"n": 2}, ["a@x"]), ("pool_grow", {"n": 3}, ["b@x"])]),
        (Desired(pool_size=1), [("pool_shrink", {"n": 1}, ["a@x"])]),
        (Desired(rate_limits={"shop.pay": "1/s"}), []),
        (
            Desired(rate_limits={"shop.pay": "2/s", "shop.mail": "0"}),
            [("rate_limit", {"task_name": "shop.pay", "rate_limit": "2/s"}, ["a@x", "b@x"])],
        ),
        (Desired(time_limits={"shop.pay": TimeLimit(soft=50)}), []),
        (
            Desired(time_limits={"shop.pay": TimeLimit(soft=40)}),
            [("time_limit", {"task_name": "shop.pay", "soft": 40, "hard": 60.0}, ["a@x", "b@x"])],
        ),
        (
            Desired(revoked=("old", "new")),
            [("revoke", {"task_id": ["new"]}, ["a@x"]), ("revoke", {"task_id": ["old", "new"]}, ["b@x"])],
        ),
        (
            Desired(terminated=("run", "wait", "done", "nowhere")),
            [("terminate", {"signal": "SIGKILL", "task_id": ["run", "wait"]}, ["a@x"])],
        ),
        (Desired(events=True), [("enable_events", {}, ["a@x", "b@x"])]),
        (Desired(shutdown=True), [("shutdown", {}, ["a@x", "b@x"])]),
    ],
)
def test_only_what_differs_is_sent(desired: Desired, expected: list[Any]) -> None:
    assert sent(desired) == expected


@pytest.mark.parametrize(
    "desired",
    [
        Desired(quiet=True),
        Desired(consumers=(Consumer("new"), Consumer("default", present=False))),
        Desired(pool_size=7),
        Desired(rate_limits={"shop.mail": "10/h"}),
        Desired(time_limits={"shop.mail": TimeLimit(5, 9), "shop.pay": TimeLimit(hard=99)}),
        Desired(revoked=("x",)),
        Desired(terminated=("run", "wait")),
        Desired(shutdown=True),
    ],
)
def test_what_is_predicted_leaves_nothing_to_do(desired: Desired) -> None:
    actions = plan(STATES, desired)
    after = predict(STATES, actions, desired)
    assert plan(after, desired) == []
    assert describe(after, desired) != describe(STATES, desired)


def test_autoscale_is_compared() -> None:
    states = {"a@x": NodeState(pool="prefork", autoscale=(4, 1)), "b@x": NodeState(pool="prefork", autoscale=(3, 1))}
    assert sent(Desired(autoscale=(4, 1)), states) == [("autoscale", {"max": 4, "min": 1}, ["b@x"])]
    after = predict(states, plan(states, Desired(autoscale=(4, 1))), Desired(autoscale=(4, 1)))
    assert describe(after, Desired(autoscale=(4, 1)))["b@x"] == {"autoscale": {"max": 4, "min": 1}}


@pytest.mark.parametrize(
    "desired, part",
    [
        (Desired(), "nothing is asked for"),
        (Desired(quiet=False), "quiet: false needs consumers"),
        (Desired(quiet=True, consumers=(Consumer("q"),)), "quiet: true consumes nothing"),
        (Desired(consumers=(Consumer("q"), Consumer("q", False))), "both present and absent"),
        (Desired(consumers=(Consumer(""),)), "a queue needs a name"),
        (Desired(pool_size=0), "pool_size: must be at least 1"),
        (Desired(expect_pool_size=2), "give pool_size too"),
        (Desired(autoscale=(1, 2)), "0 <= min <= max"),
        (Desired(autoscale=(2, 1), pool_size=2), "exclude each other"),
        (Desired(rate_limits={"t": "fast"}), "rate_limits.t: 'fast' is no rate"),
        (Desired(time_limits={"t": TimeLimit()}), "time_limits.t: give soft, hard or both"),
        (Desired(time_limits={"t": TimeLimit(hard=0)}), "time_limits.t.hard"),
        (Desired(time_limits={"t": TimeLimit(9, 5)}), "is above hard"),
        (Desired(revoked=("x",), terminated=("x",)), "both name x"),
        (Desired(shutdown=True, pool_size=2), "shutdown: leaves nothing to set"),
    ],
)
def test_nonsense_is_refused_before_anybody_is_asked(desired: Desired, part: str) -> None:
    with pytest.raises(PreconditionFailed, match=part):
        desired.check()


@pytest.mark.parametrize(
    "state, desired, part",
    [
        (NodeState(pool="threads", pool_size=2), Desired(pool_size=4), "a@x runs a threads pool"),
        (NodeState(pool="solo", pool_size=1), Desired(pool_size=4), "a@x runs a solo pool"),
        (NodeState(pool="prefork", autoscale=(3, 1)), Desired(pool_size=4), "a@x runs an autoscaler"),
        (NodeState(pool="prefork", pool_size=3), Desired(pool_size=4, expect_pool_size=2), "has 3 pool slots, not 2"),
        (NodeState(pool="prefork"), Desired(autoscale=(4, 1)), "without --autoscale"),
        (NodeState(pool="solo", tasks={"t": Task("active", 1)}), Desired(terminated=("t",)), "cannot terminate"),
        (A, Desired(rate_limits={"shop.none": "1/s"}), "no task shop.none. It has: shop.mail, shop.pay"),
        (A, Desired(time_limits={"shop.none": TimeLimit(1, 2)}), "time_limits: a@x knows no task shop.none"),
    ],
)
def test_what_a_worker_cannot_do_is_refused(state: NodeState, desired: Desired, part: str) -> None:
    with pytest.raises(PreconditionFailed, match=part):
        check_nodes({"a@x": state}, desired)


def test_an_expected_size_that_is_reached_already_is_fine() -> None:
    desired = Desired(pool_size=2, expect_pool_size=1)
    assert check_nodes({"a@x": A}, desired) == []
    assert plan({"a@x": A}, desired) == []


def test_time_limits_warn_where_no_pool_enforces_them() -> None:
    state = NodeState(pool="threads", limits={"t": {}})
    assert "does not enforce" in check_nodes({"a@x": state}, Desired(time_limits={"t": TimeLimit(1, 2)}))[0]


def test_a_terminated_task_must_lose_its_process() -> None:
    after = {"a@x": NodeState(processes=(11, 12))}
    assert still_alive(STATES, after, ["run", "wait", "done"]) == ["run (process 12 of a@x)"]
    assert still_alive(STATES, {"a@x": NodeState(processes=(11, 13))}, ["run"]) == []


@pytest.mark.parametrize(
    "rate, expected",
    [("10/s", 10), ("60/m", 1), ("36/h", 0.01), ("5", 5), ("0", 0), (None, 0), ("1/d", None), ("x", None)],
)
def test_rates(rate: str | None, expected: float | None) -> None:
    assert rate_per_second(rate) == expected


def test_registered_lines() -> None:
    assert parse_registered("shop.pay [rate_limit=10/m time_limit=5]") == (
        "shop.pay",
        {"rate_limit": "10/m", "time_limit": "5"},
    )
    assert parse_registered("shop.pay") == ("shop.pay", {})
