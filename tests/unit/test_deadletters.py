# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Dead letters as text: what is read in them, who is chosen, and what they become again."""

from __future__ import annotations

import base64
import dataclasses
import json
import time
from types import SimpleNamespace
from typing import Any

import pytest

from ansible_collections.celeryops.runbook.plugins.module_utils.engine.deadletters import (
    DeadSelection,
    Letter,
    Record,
    Revival,
    dead_queue,
    is_over,
    origin_queue,
    read_record,
)
from ansible_collections.celeryops.runbook.plugins.module_utils.engine.errors import BadMessage, PreconditionFailed

NOW = 1_800_000_000.0
RECORD = Record(NOW - 100, "exception", "ValueError", 'of no "use"', "}}, tr\\ace", "n@h", "work", "x", "k", 6, "v1")
HEADERS: dict[str, Any] = {
    "lang": "py", "task": "shop.pay", "id": "id-1", "shadow": None, "eta": None, "expires": None, "group": None,
    "retries": 3, "timelimit": [None, None], "argsrepr": "(1,)", "celeryops_published": NOW - 500,
}  # fmt: skip
BODY = json.dumps([[1], {"customer": 7}, {}]).encode()


def entry(record: Record = RECORD, headers: dict[str, Any] | None = None, **properties: Any) -> bytes:
    message = SimpleNamespace(
        body=BODY,
        content_type="application/json",
        content_encoding="utf-8",
        headers=HEADERS | (headers or {}),
        properties={"correlation_id": "id-1", "priority": 6, "delivery_tag": "t"} | properties,
    )
    return Letter.of(message, record, "id-1").compose()


def test_the_record_is_read_whatever_it_holds() -> None:
    assert read_record(entry()) == dataclasses.asdict(RECORD)
    assert read_record(json.dumps(json.loads(entry()), indent=1).encode()) == dataclasses.asdict(RECORD)
    with pytest.raises(BadMessage):
        read_record(b"garbage")
    document = json.loads(entry())
    del document["headers"]["celeryops_dead"]
    with pytest.raises(BadMessage, match="no dead letter"):
        read_record(json.dumps(document).encode())


@pytest.mark.parametrize(
    ("wanted", "hit"),
    [
        (DeadSelection(), True),
        (DeadSelection(tasks=("shop.*",)), True),
        (DeadSelection(tasks=("shop",)), False),
        (DeadSelection(ids=frozenset(["id-1"])), True),
        (DeadSelection(ids=frozenset(["id-2"])), False),
        (DeadSelection(exceptions=("Value*",)), True),
        (DeadSelection(exceptions=("KeyError",)), False),
        (DeadSelection(reasons=("exception", "rejected")), True),
        (DeadSelection(reasons=("rejected",)), False),
        (DeadSelection(older_than=100), True),
        (DeadSelection(older_than=101), False),
        (DeadSelection(newer_than=100), True),
        (DeadSelection(newer_than=99), False),
        (DeadSelection(known=frozenset(["shop.pay"])), True),
        (DeadSelection(known=frozenset()), False),
        (DeadSelection(kwargs={"customer": 7}), True),
        (DeadSelection(kwargs={"customer": 8}), False),
        (DeadSelection(tasks=("shop.pay",), exceptions=("KeyError",)), False),
    ],
)
def test_selection(wanted: DeadSelection, hit: bool) -> None:
    assert wanted.judge(entry(), NOW) == (hit, "shop.pay", False)
    assert bool(wanted) is (wanted != DeadSelection())
    with pytest.raises(BadMessage):
        wanted.judge(b"garbage", NOW)


@pytest.mark.parametrize(
    ("expires", "left"), [(None, None), ("2020-01-01T00:00:00+00:00", None), ("2100-01-01T00:00:00+00:00", True)]
)
@pytest.mark.parametrize("quick", [True, False])
def test_revival(expires: str | None, left: bool | None, quick: bool) -> None:
    raw = entry(headers={"expires": expires})
    # Otherwise spaced, so that only the thorough way can read it.
    raw = raw if quick else json.dumps(json.loads(raw), separators=(",", ":")).encode()
    task, step, message = Revival("work", (0, 3, 6, 9), NOW)(raw)
    assert (task, step) == ("shop.pay", 6)
    document, old = json.loads(message), json.loads(raw)
    assert document["properties"].pop("delivery_info") == {"exchange": "", "routing_key": "work"}
    assert old["properties"].pop("delivery_info") == {"exchange": "", "routing_key": "work.dead"}
    del old["headers"]["celeryops_dead"]
    changed = {"retries": 0, "celeryops_published": NOW, "expires": expires if left else None}
    assert document == old | {"headers": old["headers"] | changed}


def test_a_protocol_1_message_is_revived_in_its_body() -> None:
    document = json.loads(entry())
    for name in ("task", "id", "retries"):
        document["headers"].pop(name)
    fields = {"task": "shop.pay", "id": "id-1", "args": [], "retries": 2, "expires": "2020-01-01T00:00:00"}
    document["body"] = base64.b64encode(json.dumps(fields).encode()).decode()
    _task, _step, message = Revival("work", (0, 3, 6, 9), NOW)(json.dumps(document).encode())
    assert json.loads(base64.b64decode(json.loads(message)["body"])) == fields | {"retries": 0, "expires": None}


@pytest.mark.parametrize(("priority", "step"), [(None, 0), (0, 0), (2, 0), (3, 3), (9, 9), (12, 9)])
def test_the_list_is_that_of_the_priority(priority: int | None, step: int) -> None:
    properties = {} if priority is None else {"priority": priority}
    raw = entry(**properties) if properties else entry().replace(b'"priority": 6, "delivery_tag"', b'"delivery_tag"')
    assert Revival("work", (0, 3, 6, 9), NOW)(raw)[1] == step


@pytest.mark.parametrize("raw", [b"garbage", b"{}", b'{"body": "", "headers": {}, "properties": {}}'])
def test_what_is_no_dead_letter_is_not_revived(raw: bytes) -> None:
    with pytest.raises(BadMessage):
        Revival("work", (0,), NOW)(raw)


def test_names() -> None:
    assert origin_queue(dead_queue("a.b")) == "a.b"
    for name in ("work", ".dead", ""):
        with pytest.raises(PreconditionFailed):
            origin_queue(name)


def test_expiry() -> None:
    assert is_over("2020-01-01T00:00:00Z", NOW) and is_over("2020-01-01T00:00:00", NOW)
    assert not is_over("2100-01-01T00:00:00+00:00", NOW)
    assert not any(is_over(value, NOW) for value in (None, "soon", 5))
    assert not is_over(time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime(NOW + 1)), NOW)
