# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import base64
import json
import pickle
from typing import Any

import pytest

from ansible_collections.celeryops.runbook.plugins.module_utils.engine.errors import BadMessage
from ansible_collections.celeryops.runbook.plugins.module_utils.engine.message import Envelope, Rerouter, identify


def message(queue: str = "src", task: str = "shop.pay", **changes: Any) -> dict[str, Any]:
    """A protocol 2 message with the fields in the order in which kombu writes them."""
    body = json.dumps([[1, "two"], {"x": None}, {"callbacks": None}])
    headers = {
        "lang": "py", "task": task, "id": "id-1", "shadow": None, "eta": None, "expires": None, "group": None,
        "retries": 2, "timelimit": [None, None], "root_id": "id-1", "parent_id": None, "argsrepr": "(1, 'two')",
        "kwargsrepr": "{}", "origin": "gen1@host", "ignore_result": False, "celeryops_published": 1700000000.25,
    }  # fmt: skip
    return {
        "body": base64.b64encode(body.encode()).decode(),
        "content-encoding": "utf-8",
        "content-type": "application/json",
        "headers": headers,
        "properties": {
            "correlation_id": "id-1", "delivery_mode": 2, "delivery_info": {"exchange": "", "routing_key": queue},
            "priority": 3, "body_encoding": "base64", "delivery_tag": "tag-1",
        },
        **changes,
    }  # fmt: skip


def encode(document: Any) -> bytes:
    return json.dumps(document).encode()


def test_protocol_2() -> None:
    envelope = Envelope.parse(encode(message()))
    assert (envelope.id, envelope.task, envelope.protocol, envelope.retries) == ("id-1", "shop.pay", 2, 2)
    assert (envelope.priority, envelope.routing_key, envelope.published) == (3, "src", 1700000000.25)
    assert envelope.arguments() == ([1, "two"], {"x": None})


def test_protocol_1() -> None:
    body = {"task": "old.task", "id": "old-1", "args": [1], "kwargs": {"a": 2}, "retries": 1, "eta": "2026-01-01"}
    raw = encode(message(headers={}, body=base64.b64encode(encode(body)).decode()))
    envelope = Envelope.parse(raw)
    assert (envelope.id, envelope.task, envelope.protocol, envelope.eta) == ("old-1", "old.task", 1, "2026-01-01")
    assert envelope.arguments() == ([1], {"a": 2})
    assert identify(raw) == ("old.task", "old-1")


def test_pickle_is_never_loaded(tmp_path: Any) -> None:
    class Trap:
        def __reduce__(self) -> Any:
            return open, (str(tmp_path / "trap"), "w")

    body = base64.b64encode(pickle.dumps(Trap())).decode()
    document = message(body=body)
    document["content-type"] = "application/x-python-serialize"
    envelope = Envelope.parse(encode(document))
    assert (envelope.task, envelope.id) == ("shop.pay", "id-1")
    assert envelope.arguments() is None
    with pytest.raises(BadMessage):
        Envelope.parse(encode({**document, "headers": {}}))
    assert not (tmp_path / "trap").exists()


@pytest.mark.parametrize(
    "raw",
    [
        b"", b"garbage", b"\xff\xfe", b"[]", b"null", b"{}", b'{"body": 1}', b"[" * 100_000,
        encode(message(headers={"task": 5, "id": "x"})), encode(message(headers={"task": "x"})),
        encode(message(headers={}, body="!")), encode(message(headers={})),
        b'{"body": "", "content-encoding": "", "content-type": "", "headers": {"lang": "", "task": "\xff", "id": "1"',
    ],
)  # fmt: skip
def test_bad_messages(raw: bytes) -> None:
    with pytest.raises(BadMessage):
        Envelope.parse(raw)
    with pytest.raises(BadMessage):
        identify(raw)


@pytest.mark.parametrize("task", ["shop.pay", 'quote"d', "back\\slash", "ümlaut", "headers"])
def test_identify_is_exact(task: str) -> None:
    """A body or an argument that looks like headers must not be taken for them."""
    fake = '", "content-encoding": "utf-8", "content-type": "x", "headers": {"lang": "py", "task": "evil", "id": "9"'
    document = message(task=task, body=fake)
    document["headers"]["argsrepr"] = fake
    assert identify(encode(document)) == (task, "id-1")


def test_reroute_changes_nothing_else() -> None:
    old = message()
    new = json.loads(Rerouter("src", "dst")(encode(old))[1])
    assert new["properties"]["delivery_info"] == {"exchange": "", "routing_key": "dst"}
    new["properties"]["delivery_info"] = old["properties"]["delivery_info"]
    assert new == old
    assert len(Rerouter("src", "dst")(encode(old))[1]) == len(encode(old))


def test_reroute_of_what_is_not_usual() -> None:
    named = message()
    named["properties"]["delivery_info"] = {"exchange": "tasks", "routing_key": "tasks.pay"}
    redelivered = message()
    redelivered["properties"]["delivery_info"]["redelivered"] = True
    twice = message()
    twice["headers"]["delivery_info"] = {"exchange": "", "routing_key": "src"}
    huge = message()
    huge["headers"]["number"] = 2**70
    for document in (named, redelivered, twice, huge, message("other")):
        new = json.loads(Rerouter("src", "dst")(encode(document))[1])
        assert new["properties"]["delivery_info"]["routing_key"] == "dst"
        assert new["properties"]["delivery_info"]["exchange"] == ""
        assert new["headers"] == document["headers"]
        assert new["properties"]["delivery_info"].get("redelivered") == document["properties"]["delivery_info"].get(
            "redelivered"
        )


def test_reroute_refuses_what_it_does_not_know() -> None:
    document = message()
    del document["properties"]["delivery_info"]
    for raw in (encode(document), b"garbage", encode(message(headers={"v3": True}))):
        with pytest.raises(BadMessage):
            Rerouter("src", "dst")(raw)
