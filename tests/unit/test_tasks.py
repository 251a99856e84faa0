# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

from datetime import datetime, timezone
from types import SimpleNamespace
from typing import Any

import pytest

from celeryops.engine.control import Replies, Reply
from celeryops.engine.errors import CeleryOpsError, NodeUnknown, PreconditionFailed, QueueUnknown
from celeryops.engine.tasks import (
    Canary,
    Order,
    TaskUnknown,
    canary_key,
    pairs,
    parse_eta,
    queue_names,
    registered_names,
)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"name": " "}, "name: must not be empty"),
        ({"queue": ""}, "queue: must not be empty"),
        ({"task_id": ""}, "task_id: must not be empty"),
        ({"priority": 10}, "priority: must be 0 to 9, not 10. On Redis 0 is the most urgent"),
        ({"priority": -1}, "priority: must be 0 to 9"),
        ({"countdown": 1.0, "eta": datetime.now(timezone.utc)}, "countdown and eta exclude each other"),
        ({"countdown": -1.0}, "countdown: must not be below 0"),
        ({"expires": -0.1}, "expires: must not be below 0"),
    ],
)
def test_an_order_that_makes_no_sense(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(PreconditionFailed, match=text.replace(".", r"\.")):
        Order(**{"name": "a", "queue": "q", **changes}).check()


def test_an_order_that_does() -> None:
    for priority in (None, 0, 9):
        Order("a", "q", priority=priority, countdown=0.0, expires=0.0, task_id="x").check()


def test_eta() -> None:
    assert parse_eta("2026-11-21T08:00:00+02:00") == datetime(2026, 11, 21, 6, tzinfo=timezone.utc)
    assert parse_eta("2026-11-21T06:00:00Z") == datetime(2026, 11, 21, 6, tzinfo=timezone.utc)
    for text in ("soon", "2026-11-21T06:00:00", ""):
        with pytest.raises(PreconditionFailed, match="eta:"):
            parse_eta(text)


def test_names_in_replies() -> None:
    replies = Replies([Reply("a", ["x.y [rate_limit=10/m]", "z"]), Reply("b", None, "boom"), Reply("c", None)])
    assert registered_names(replies) == {"x.y", "z"}
    assert queue_names([{"name": "q", "exchange": {}}, "odd"]) == ["q"] and queue_names(None) == []


def test_judging_an_answer() -> None:
    good = {"node": "a", "release": "v2", "value": "ok"}
    assert Canary().wrong(good) is None
    assert Canary(run="t", expect="ok", release="v2").wrong(good) is None
    assert Canary(expect=0).wrong({**good, "value": "0"}) == "answers '0', not 0"
    assert Canary(expect=False).wrong({**good, "value": True}) == "answers True, not False"
    assert Canary(release="v3").wrong(good) == "runs release v2, not v3"
    assert Canary(release="v3").wrong({**good, "release": None}) == "runs release unknown, not v3"
    assert Canary(expect="ok").wrong({**good, "error": "E: no"}) == "E: no"
    assert canary_key("p.", "t") == "p.celeryops:canary:t"


FLEET = {"a": ["q1", "q2"], "b": ["q2"], "bare": ["q3"]}


class Fleet:
    """Answers of three workers; one has no runtime package."""

    def many(self, commands: Any, *, destination: Any = None) -> dict[str, Replies]:
        nodes = [node for node in FLEET if destination is None or node in destination]
        queues = [Reply(node, [{"name": name} for name in FLEET[node]]) for node in nodes]
        registered = [Reply(node, ["t"] if node == "bare" else ["t", "celeryops.canary"]) for node in nodes]
        return {"active_queues": Replies(queues), "registered": Replies(registered)}


def wanted(queues: Any, nodes: list[str], run: str | None = None) -> dict[str, list[str]]:
    return pairs(Fleet(), queues, nodes, run)  # type: ignore[arg-type]


def test_pairs() -> None:
    assert wanted(None, ["a", "b"]) == {"q1": ["a"], "q2": ["a", "b"]}
    assert wanted(["q2"], ["a", "b"], "t") == {"q2": ["a", "b"]}
    assert wanted(["q1", "q2"], []) == {"q1": [], "q2": []}
    assert wanted({"q2": ["b"], "q1": []}, []) == {"q2": ["b"], "q1": []}


@pytest.mark.parametrize(
    ("queues", "nodes", "run", "error", "text"),
    [
        (None, [], None, PreconditionFailed, "queues: name the queues"),
        ({"q1": ["a"]}, ["a"], None, PreconditionFailed, "nodes: not together with queues as a dict"),
        (["q1"], ["nobody"], None, NodeUnknown, "nobody does not answer"),
        (["q1"], ["b"], None, QueueUnknown, "b does not consume q1, only q2"),
        (["q9"], [], None, QueueUnknown, "no worker that answers consumes q9"),
        (["q3"], [], None, TaskUnknown, "bare has no task celeryops.canary"),
        (["q1"], ["a"], "gone", TaskUnknown, "a has no task gone; correct run"),
    ],
)
def test_pairs_that_cannot_come_true(
    queues: Any, nodes: list[str], run: str | None, error: type[CeleryOpsError], text: str
) -> None:
    with pytest.raises(error, match=text):
        wanted(queues, nodes, run)


def test_a_worker_that_consumes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FLEET, "paused", [])
    with pytest.raises(QueueUnknown, match="paused consumes no queue"):
        wanted(None, ["paused"])


def test_route_asks_the_application() -> None:
    from celeryops.engine.tasks import route

    class Router:
        def route(self, options: Any, name: str, args: Any, kwargs: Any) -> dict[str, Any]:
            return {"queue": SimpleNamespace(name="own")} if name == "routed" else {}

    app = SimpleNamespace(amqp=SimpleNamespace(router=Router()), conf=SimpleNamespace(task_default_queue="main"))
    assert route(app, "routed", [], {}) == "own" and route(app, "other", [], {}) == "main"
