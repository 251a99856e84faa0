# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import base64
import json
from typing import Any

from ansible_collections.celeryops.runbook.plugins.module_utils.engine.control import (
    Replies,
    Reply,
    Request,
    _Collector,
    control_message,
)

BEAT = "celerybeat@h"


def answer(collector: _Collector, number: int, node: str, value: Any = None, **changes: Any) -> None:
    body = base64.b64encode(json.dumps({node: value}).encode()).decode()
    message = {
        "body": body,
        "content-type": "application/json",
        "headers": {"ticket": collector.tickets[number], "clock": 5},
        "properties": {"body_encoding": "base64"},
        **changes,
    }
    collector.take_raw(json.dumps(message).encode())


def collector(*requests: Request, counts: list[int] | None, expected: list[str] | None = None) -> _Collector:
    made = _Collector([Request("ping"), *requests], expected, census_needed=not requests)
    made.counts = counts
    return made


def test_the_message_is_all_that_kombu_reads() -> None:
    request = Request("active", {"safe": True}, ("a@x",))
    raw = control_message(request, exchange="celery.pidbox", ticket="t", reply_to="oid", expires=1.5)
    message = json.loads(raw)
    assert json.loads(base64.b64decode(message["body"])) == {
        "method": "active",
        "arguments": {"safe": True},
        "destination": ["a@x"],
        "pattern": None,
        "matcher": None,
        "ticket": "t",
        "reply_to": {"exchange": "reply.celery.pidbox", "routing_key": "oid"},
    }
    assert message["headers"] == {"clock": 1, "expires": 1.5}
    assert message["properties"]["delivery_info"] == {"exchange": "celery.pidbox", "routing_key": ""}
    assert message["properties"]["body_encoding"] == "base64"
    assert message["properties"]["delivery_tag"]
    assert message["content-type"] == "application/json"


def test_without_ticket_nobody_is_asked_to_reply() -> None:
    raw = control_message(Request("shutdown"), exchange="celery.pidbox", ticket=None, reply_to="oid", expires=0)
    assert "reply_to" not in json.loads(base64.b64decode(json.loads(raw)["body"]))


def test_done_when_all_that_are_subscribed_have_answered() -> None:
    made = collector(counts=[2])
    assert not made.done
    answer(made, 0, "a@x", {"ok": "pong"})
    assert not made.done
    answer(made, 0, "a@x", {"ok": "pong"})
    assert made.done
    assert made.census.duplicates == ["a@x"]


def test_a_beat_is_not_waited_for_except_for_ping() -> None:
    made = collector(Request("active"), counts=[3, 3])
    answer(made, 1, "a@x", [])
    answer(made, 1, "b@x", [])
    assert not made.done
    answer(made, 0, BEAT, {"ok": "pong"})
    assert made.done


def test_a_destination_ends_the_wait_for_it_alone() -> None:
    made = collector(Request("active", {}, ("a@x", BEAT)), counts=[9, 9])
    assert not made.done
    answer(made, 1, "a@x", [])
    assert made.done


def test_who_is_not_on_the_channel_is_not_waited_for() -> None:
    made = collector(Request("active", {}, ("gone@x",)), counts=[1, 1])
    assert not made.done
    answer(made, 0, "a@x", {"ok": "pong"})
    assert made.done


def test_a_subscribed_destination_is_waited_for() -> None:
    made = collector(Request("active", {}, ("a@x",)), counts=[1, 1])
    answer(made, 0, "a@x", {"ok": "pong"})
    assert not made.done


def test_without_counts_only_expected_names_end_the_wait() -> None:
    made = collector(Request("active"), counts=None, expected=["a@x"])
    answer(made, 0, "a@x", {"ok": "pong"})
    assert not made.done
    answer(made, 1, "a@x", [])
    assert made.done
    never = collector(Request("active"), counts=None)
    answer(never, 1, "a@x", [])
    assert not never.done


def test_foreign_tickets_and_rubbish_are_left_out() -> None:
    made = collector(counts=[1])
    answer(made, 0, "a@x", {"ok": "pong"}, headers={"ticket": "of an earlier call"})
    made.take_raw(b"no json")
    made.take_raw(b"[]")
    made.take_raw(b'{"headers": null}')
    assert made.census.count == 0


def test_what_is_not_json_is_refused_but_counted() -> None:
    made = collector(counts=[1])
    answer(made, 0, "a@x", **{"content-type": "application/x-python-serialize"})
    assert made.census.refused == ["application/x-python-serialize"]
    assert made.done


def test_a_worker_error_is_an_answer() -> None:
    made = collector(Request("rate_limit"), Request("celeryops_release"), counts=[1, 1, 1])
    answer(made, 1, "a@x", {"error": "unknown task"})
    answer(made, 2, "a@x", {"error": "KeyError('celeryops_release')"})
    assert made.answers[1].replies == [Reply("a@x", None, "unknown task")]
    assert "--include celeryops.worker" in str(made.answers[2].replies[0].error)
    assert made.done


def test_replies_know_names_and_doubles() -> None:
    replies = Replies([Reply("b"), Reply("a"), Reply("b")])
    assert (replies.nodes, replies.duplicates, replies.count) == (["b", "a"], ["b"], 3)
    assert replies.get("a") == Reply("a")
    assert replies.get("c") is None
