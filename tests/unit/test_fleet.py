# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

from typing import Any

import pytest

from ansible_collections.celeryops.runbook.plugins.module_utils.engine.control import Control, Replies, Reply, Round
from ansible_collections.celeryops.runbook.plugins.module_utils.engine.errors import (
    ConnectionFailed,
    NoReply,
    WaitTimeout,
)
from ansible_collections.celeryops.runbook.plugins.module_utils.engine.fleet import (
    Conditions,
    Fleet,
    Node,
    demand,
    judge,
    observe,
    renew_consumers,
    wait_for,
)


class Script(Control):
    """Answers from a list: one {node: {command: value}} a round; the second item is what the broker counted."""

    def __init__(self, *rounds: Any) -> None:
        self.rounds = list(rounds)
        self.timeout = 2.0
        self.asked: list[Any] = []

    def converse(self, requests: Any, *, timeout: Any = None, expected: Any = None, census: bool = False) -> Round:
        self.asked.append((requests, timeout, census))
        current = self.rounds.pop(0) if len(self.rounds) > 1 else self.rounds[0]
        if isinstance(current, Exception):
            raise current
        nodes, subscribed = current
        answers = []
        for request in requests:
            replies = [
                Reply(name, said[request.command])
                for name, said in nodes.items()
                if request.command in said and (request.destination is None or name in request.destination)
            ]
            answers.append(Replies(replies, subscribed))
        count = sum(len(said.get("_twice", [1])) for said in nodes.values())
        heard = [Reply(name) for name, said in nodes.items() for _unused in said.get("_twice", [1])]
        complete = subscribed is not None and count >= subscribed
        return Round(answers, Replies(heard, subscribed), complete, 0.1)


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def queues(*names: str) -> list[dict[str, str]]:
    return [{"name": name} for name in names]


def wait(control: Control, conditions: Conditions, **options: Any) -> Any:
    clock = Clock()
    return wait_for(control, conditions, clock=clock, sleep=clock.sleep, **options)


def test_states_of_nodes() -> None:
    control = Script(({"a@x": {"active": []}, "celerybeat@x": {}}, 2))
    fleet = observe(control, [("active", {})], expected=["a@x", "b@x"])
    assert fleet.nodes["a@x"] == Node("answered", "worker", True, {"active": []})
    assert fleet.nodes["b@x"] == Node("silent", "worker", False)
    assert fleet.nodes["celerybeat@x"].type == "beat"
    assert not fleet.nodes["celerybeat@x"].errors
    assert (fleet.subscribed, fleet.silent_count, fleet.workers) == (2, 0, ["a@x"])


def test_a_silent_subscriber_is_told_from_an_absent_one() -> None:
    fleet = observe(Script(({"a@x": {"ping": {}}}, 2)), [("ping", {})], expected=["b@x"])
    assert fleet.silent_count == 1
    assert fleet.nodes["b@x"] == Node("silent", "worker", None)


def test_a_broker_that_cannot_count_says_unknown() -> None:
    fleet = observe(Script(({"a@x": {"ping": {}}}, None)), [("ping", {})], expected=["b@x"])
    assert fleet.nodes["b@x"] == Node("unknown", "worker", None)
    assert fleet.as_dict()["unknown"] == ["b@x"]


def test_nobody_subscribed() -> None:
    shown = observe(Script(({}, 0)), [("ping", {})]).as_dict()
    assert (shown["subscribed"], shown["nodes"], shown["silent_count"]) == (0, {}, 0)


def test_a_node_that_answers_ping_only_has_an_error_for_the_rest() -> None:
    fleet = observe(Script(({"a@x": {}}, 1)), [("active", {})], timeout=0.5)
    assert fleet.nodes["a@x"].state == "answered"
    assert fleet.nodes["a@x"].errors == {"active": "no answer to this command within 0.5 s"}


def test_duplicates_come_from_the_census_too() -> None:
    fleet = observe(Script(({"a@x": {"_twice": [1, 2], "active": []}}, 2)), [("active", {})], destination=["a@x"])
    assert fleet.duplicates == ["a@x"]


def view(**nodes: dict[str, Any]) -> Fleet:
    return Fleet({f"{name}@x": Node("answered", "worker", True, said) for name, said in nodes.items()}, len(nodes))


@pytest.mark.parametrize(
    "conditions, reasons",
    [
        (Conditions(all_answer=True), []),
        (Conditions(min_nodes=3), ["min_nodes: 2 of 3 workers answer"]),
        (Conditions(nodes=("c@x",)), ["nodes: c@x: does not answer"]),
        (Conditions(gone=("a@x",)), ["gone: a@x: still answers"]),
        (Conditions(gone=("c@x",)), []),
        (Conditions(release="v2"), ["release: a@x: runs v1, not v2"]),
        (Conditions(consumes=("default",)), ["consumes: b@x: does not consume default"]),
        (Conditions(not_consumes=True), ["not_consumes: a@x: still consumes default, bulk"]),
        (Conditions(not_consumes=("bulk",)), ["not_consumes: a@x: still consumes bulk"]),
        (Conditions(idle=True), ["idle: b@x: holds 2 active task(s)"]),
        (Conditions(queues_consumed=("default", "mail")), ["queues_consumed: no node consumes mail"]),
        (Conditions(release="v2", min_nodes=3), ["min_nodes: 2 of 3 workers answer", "release: a@x: runs v1, not v2"]),
    ],
)
def test_conditions(conditions: Conditions, reasons: list[str]) -> None:
    fleet = view(
        a={
            "celeryops_release": {"release": "v1"},
            "active_queues": queues("default", "bulk"),
            "active": [],
            "reserved": [],
        },
        b={
            "celeryops_release": {"release": "v2"},
            "active_queues": [],
            "active": [{}, {}],
            "reserved": [],
        },
    )
    assert [str(item) for item in judge(fleet, conditions)] == reasons


def test_all_answer_counts_silent_nodes_nobody_named() -> None:
    fleet = view(a={})
    fleet.subscribed, fleet.silent_count = 3, 2
    assert [str(item) for item in judge(fleet, Conditions(all_answer=True))] == [
        "all_answer: 2 more subscribed node(s) do not answer"
    ]
    assert judge(fleet, Conditions(all_answer=True), destination=["a@x"]) == []
    assert [str(i) for i in judge(Fleet(), Conditions(all_answer=True))] == [
        "all_answer: no node is connected to the broker"
    ]


def test_gone_is_not_believed_while_a_subscriber_is_silent() -> None:
    fleet = view(a={})
    fleet.subscribed, fleet.silent_count = 2, 1
    assert "may be one of them" in str(judge(fleet, Conditions(gone=("b@x",)))[0])
    assert judge(fleet, Conditions(gone=("b@x",), silent_before=1)) == []


def test_node_conditions_need_a_worker() -> None:
    assert str(judge(Fleet(), Conditions(idle=True))[0]) == "idle: no worker answers"
    unmet = judge(view(a={}), Conditions(consumes=("q",)), destination=["b@x"])
    assert [str(item) for item in unmet] == ["answers: b@x: does not answer"]


def test_a_beat_is_asked_nothing_a_worker_is_asked() -> None:
    fleet = view(a={"active_queues": queues("q")})
    fleet.nodes["celerybeat@x"] = Node("answered", "beat", True)
    assert judge(fleet, Conditions(consumes=("q",), min_nodes=1)) == []


def test_wait_ends_when_the_conditions_hold() -> None:
    control = Script(({}, 0), ({"a@x": {"active_queues": []}}, 1), ({"a@x": {"active_queues": queues("q")}}, 1))
    waited = wait(control, Conditions(consumes=("q",)), wait_timeout=10, interval=0.5)
    assert (waited.unmet, waited.checks, waited.waited) == ([], 3, 1.0)


def test_wait_is_bounded_and_says_who_fails_what() -> None:
    control = Script(({"a@x": {"active_queues": []}}, 1))
    waited = wait(control, Conditions(consumes=("q",)), wait_timeout=2, interval=0.5)
    assert (waited.checks, waited.waited) == (5, 2.0)
    with pytest.raises(WaitTimeout) as caught:
        demand(waited, 2)
    assert "consumes: a@x: does not consume q" in caught.value.msg
    assert caught.value.data["checks"] == 5
    assert caught.value.data["answered"] == ["a@x"]


def test_idle_must_hold_for_a_second() -> None:
    idle: dict[str, Any] = {"active": [], "reserved": []}
    busy = {"active": [], "reserved": [{}]}
    at_once = wait(Script(({"a@x": idle}, 1)), Conditions(idle=True), wait_timeout=10)
    assert at_once.unmet == [] and at_once.waited >= 1.0 and at_once.checks >= 2
    again = wait(
        Script(({"a@x": idle}, 1), ({"a@x": busy}, 1), ({"a@x": idle}, 1)), Conditions(idle=True), wait_timeout=10
    )
    assert again.unmet == [] and again.waited >= 2.0


def test_idle_counts_only_from_when_nothing_is_consumed() -> None:
    consuming = {"active": [], "reserved": [], "active_queues": queues("q")}
    quiet = {**consuming, "active_queues": []}
    conditions = Conditions(idle=True, not_consumes=True)
    rounds = [({"a@x": consuming}, 1)] * 3 + [({"a@x": quiet}, 1)]
    waited = wait(Script(*rounds), conditions, wait_timeout=10, interval=0.5)
    assert waited.unmet == [] and waited.waited >= 2.5


def test_a_broker_lost_while_waiting_may_come_back() -> None:
    control = Script(({}, 0), ConnectionFailed("down"), ({"a@x": {}}, 1))
    assert wait(control, Conditions(min_nodes=1), wait_timeout=5).unmet == []
    with pytest.raises(ConnectionFailed):
        wait(Script(ConnectionFailed("down"), ({"a@x": {}}, 1)), Conditions(min_nodes=1))
    with pytest.raises(ConnectionFailed):
        wait(Script(({}, 0), ConnectionFailed("down")), Conditions(min_nodes=1), wait_timeout=2)


def test_a_round_never_outlives_the_wait() -> None:
    control = Script(({}, 0))
    wait(control, Conditions(min_nodes=1), wait_timeout=1.0, timeout=30)
    assert all(timeout <= 1.0 for _unused, timeout, _unused in control.asked)


def test_everybody_is_waited_for_only_when_it_matters() -> None:
    control = Script(({"a@x": {"active_queues": queues("q")}}, 5))
    wait(control, Conditions(consumes=("q",)), destination=["a@x"], wait_timeout=1)
    assert control.asked[0][2] is False
    wait(control, Conditions(queues_consumed=("q",)), destination=["a@x"], wait_timeout=1)
    assert control.asked[-1][2] is True
    assert [request.destination for request in control.asked[-1][0]] == [None]


def renew(control: Script) -> list[tuple[str, dict[str, Any], Any]]:
    """The commands that were sent."""
    clock = Clock()
    renew_consumers(control, ["a@x"], 2, clock=clock, sleep=clock.sleep)
    sent = [request for requests, *_unused in control.asked for request in requests]
    return [(one.command, one.arguments, one.destination) for one in sent if one.command != "active_queues"]


def test_who_answers_late_has_its_consumers_renewed() -> None:
    mute, has, not_ = ({}, 1), ({"a@x": {"active_queues": queues("q")}}, 1), ({"a@x": {"active_queues": []}}, 1)
    # It says what it consumes at the third time; is told to end, which takes a moment; then to begin, which does too.
    late = Script(mute, mute, has, mute, has, not_, mute, mute, mute, has)
    told = ["cancel_consumer", "add_consumer", "add_consumer"]
    assert renew(late) == [(command, {"queue": "q"}, ("a@x",)) for command in told]
    with pytest.raises(NoReply, match="a@x did not say within 2 s what they consume"):
        renew(Script(({}, 1)))
    gone = Script(has, not_)
    with pytest.raises(WaitTimeout, match="not all consumers are back: a@x consumed q"):
        renew(gone)
