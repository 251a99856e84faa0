# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What a pause is, what is written, and how remote control goes with it. And the bound of remembered revokes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from ansible_collections.celeryops.runbook.plugins.module_utils.engine import heartbeat, pauses, revokes
from ansible_collections.celeryops.runbook.plugins.module_utils.engine.connection import Broker, BrokerSpec
from ansible_collections.celeryops.runbook.plugins.module_utils.engine.errors import PreconditionFailed
from ansible_collections.celeryops.runbook.plugins.module_utils.engine.plan import (
    Consumer,
    Desired,
    NodeState,
    check_nodes,
    plan,
    predict,
)
from support import RedisServer

NOW = 1_000_000.0
HELD = {"mail": pauses.Pause("mail", "anna", "repair", NOW - 60, NOW + 60)}


def planned(paused: bool, *queues: str, **options: Any) -> dict[str, pauses.Pause | None]:
    given = {"by": "bert", "why": "", "until": None, "now": NOW, **options}
    return pauses.plan(HELD, queues, paused=paused, **given)


def test_what_is_written() -> None:
    assert planned(True, "mail") == {}
    assert planned(True, "mail", why="repair", until=NOW + 60) == {}
    longer = pauses.Pause("mail", "anna", "longer", NOW - 60, NOW + 600)
    assert planned(True, "mail", why="longer", until=NOW + 600) == {"mail": longer}
    assert planned(True, "bulk", why="x") == {"bulk": pauses.Pause("bulk", "bert", "x", NOW)}
    assert planned(False, "mail", "bulk") == {"mail": None}
    with pytest.raises(PreconditionFailed, match="why"):
        planned(True, "bulk")


def test_an_entry_that_cannot_be_read_pauses_and_can_be_replaced() -> None:
    for raw in (b"", b"no json", b"[]", b"{}", b'{"by": "a", "why": "b", "since": "x"}'):
        broken = pauses.parse("mail", raw)
        assert not broken.since and "no pause of this collection" in str(broken)
    anew = pauses.next_pause(broken, "mail", "bert", "x", None, NOW)
    assert anew == pauses.Pause("mail", "bert", "x", NOW)
    whole = json.dumps({"queue": "mail", "by": "anna", "why": "x", "since": 1, "until": None}).encode()
    assert pauses.parse("mail", whole) == pauses.Pause("mail", "anna", "x", 1.0)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("+90m", NOW + 5400), ("+1d", NOW + 86400), ("2026-11-21T18:00:00Z", 1795284000.0),
     ("2026-11-21T19:00:00+01:00", 1795284000.0), ("2026-11-21T18:00:00", 1795284000.0)],
)  # fmt: skip
def test_until(text: str, seconds: float) -> None:
    assert pauses.parse_until(text, NOW) == seconds


@pytest.mark.parametrize("text", ["soon", "+5", "5m", "1970-01-02T00:00:00Z"])
def test_until_what_is_no_time_to_come(text: str) -> None:
    with pytest.raises(PreconditionFailed, match="until"):
        pauses.parse_until(text, NOW)


def node(*queues: str, withheld: tuple[str, ...] | None = ()) -> NodeState:
    return NodeState(queues=queues, withheld=withheld)


def commands(states: dict[str, NodeState], desired: Desired) -> list[tuple[str, str, tuple[str, ...]]]:
    return [(one.command, one.arguments["queue"], one.destination) for one in plan(states, desired)]


def test_control_goes_with_a_pause() -> None:
    paused = frozenset({"mail"})
    states = {"obeys": node("bulk", withheld=("mail",)), "new": node("bulk"), "bare": node("bulk", withheld=None)}
    want = Desired(consumers=(Consumer("mail"), Consumer("bulk")), paused=paused)
    assert commands(states, want) == [("add_consumer", "mail", ("new",))]
    assert predict(states, plan(states, want), want)["new"] == node("bulk", withheld=("mail",))
    assert [text for text in check_nodes(states, want) if "bare runs without" in text]
    quiet = Desired(quiet=True, paused=paused)
    sent = commands(states, quiet)
    assert sent == [("cancel_consumer", "bulk", ("bare", "new", "obeys")), ("cancel_consumer", "mail", ("obeys",))]
    assert predict(states, plan(states, quiet), quiet)["obeys"] == node()


@pytest.fixture
def store(broker: RedisServer) -> Iterator[Broker]:
    with Broker(BrokerSpec.build(url=broker.url(), key_prefix="lab.")) as opened:
        yield opened


def test_revokes_are_bounded_and_none_is_dropped_in_silence(store: Broker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(revokes, "MOST", 3)
    assert revokes.remember(store, ["a", "b", "a"], 60) == 2
    assert revokes.remember(store, ["b", "c"], 60) == 1
    with pytest.raises(PreconditionFailed, match="3 revoked ids are remembered already"):
        revokes.remember(store, ["d"], 60)
    with pytest.raises(PreconditionFailed, match="3 at most"):
        revokes.remember(store, ["d", "e", "f", "g"], 60)
    with pytest.raises(PreconditionFailed, match="expires"):
        revokes.remember(store, ["d"], 0)
    assert sorted(revokes.load(store)) == ["a", "b", "c"] and revokes.remember(store, [], 60) == 0
    assert revokes.forget(store, ["a", "zz"]) == 1 and revokes.forget(store, []) == 0
    assert sorted(revokes.load(store)) == ["b", "c"]


def test_a_longer_time_is_not_shortened(store: Broker) -> None:
    revokes.remember(store, ["a"], 500)
    revokes.remember(store, ["a"], 5)
    assert 490 < float(store.redis.zscore("lab.celeryops:revokes", "a")) - pauses.now_of(store) <= 500
    assert 490 < store.redis.ttl("lab.celeryops:revokes") <= 502


def test_a_heartbeat_is_read_as_it_was_written(store: Broker) -> None:
    assert heartbeat.read(store, "shop") is None
    beat = {"host": "w1", "pid": 7, "release": "v1", "sent": "", "task": ""}
    heartbeat.write(store, "shop", beat, {"tick": 3.0})
    found = heartbeat.read(store, "shop")
    assert found and 2.99 <= found["age"] < 4.0 and (found["task"], found["sent_ago"]) == (None, None)
    heartbeat.write(store, "shop", {**beat, "task": "shop.x"}, {"tick": 0.0, "sent": 9.0})
    found = heartbeat.read(store, "shop")
    assert found and (found["host"], found["pid"], found["task"]) == ("w1", 7, "shop.x")
    assert 8.99 <= found["sent_ago"] < 10
    store.redis.hset("lab.celeryops:beat:shop", "tick", "no number")
    assert heartbeat.read(store, "shop") is None
