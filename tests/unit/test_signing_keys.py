# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Keys, signatures, and the steps from one set of keys to another."""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from ansible_collections.celeryops.runbook.plugins.module_utils.engine import signing
from ansible_collections.celeryops.runbook.plugins.module_utils.engine.signing import (
    Keys,
    SigningError,
    judge,
    plan,
    sign,
)

CONTENT = ("application/json", "utf-8")
HEADERS: Mapping[str, Any] = {
    "task": "shop.pay", "id": "7", "eta": None, "timelimit": [None, None], "group": None, "retries": 0, "expires": None
}  # fmt: skip
BODY = b'[[1], {}, {"callbacks": null}]'


def keys(*names: str, require: bool = True) -> Keys:
    return Keys({name: f"{name}{'x' * 40}" for name in names}, require)


def signed(by: Keys, **changes: Any) -> dict[str, Any]:
    return {**HEADERS, signing.HEADER: sign(by, HEADERS, CONTENT, BODY), **changes}


def test_a_signature_holds_for_what_it_was_made_for() -> None:
    one = keys("one")
    assert judge(one, signed(one), CONTENT, BODY) == ""
    # What JSON or AMQP make of it on its way, and what may change.
    assert judge(one, signed(one, timelimit=(None, None), retries=3, expires="2030-01-01"), CONTENT, BODY) == ""
    assert judge(keys("two", "one"), signed(one), CONTENT, BODY) == ""
    for change in ({"task": "shop.refund"}, {"id": "8"}, {"eta": "2020-01-01"}, {"timelimit": [1, 1]}, {"group": "g"}):
        assert "does not fit" in judge(one, signed(one, **change), CONTENT, BODY), change
    assert "does not fit" in judge(one, signed(one), CONTENT, BODY.replace(b"1", b"2"))
    assert "does not fit" in judge(one, signed(one), ("application/x-python-serialize", "binary"), BODY)
    assert judge(one, HEADERS, CONTENT, BODY) == "it is not signed"
    assert "key one, which is not accepted" in judge(keys("two"), signed(one), CONTENT, BODY)
    other = Keys({"one": "y" * 40})
    assert "does not fit" in judge(other, signed(one), CONTENT, BODY), "the same id, another secret"


@pytest.mark.parametrize("value", ["", "1", "1:one", "2:one:00", "1::00", "1:o ne:00", 7, None, ["1:one:0"], "1:one:ü"])
def test_odd_signatures_are_refused(value: Any) -> None:
    assert judge(keys("one"), {**HEADERS, signing.HEADER: value}, CONTENT, BODY)


def test_facts_cannot_be_shifted_between_fields() -> None:
    """No two different messages have the same digest input."""
    seen = {
        signing.digest(keys("k"), "k", {**HEADERS, "task": task, "id": name}, CONTENT, body)
        for task, name, body in itertools.product(("a", 'a", "b', "a\n"), ("b", '", "b', "\n"), (b"", b"\n", b"b"))
    }
    assert len(seen) == 27


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ([], "there is no key"),
        ("secret", "there is no key"),
        ([{"secret": "x" * 40}], "key 1 has no proper id"),
        ([{"id": "a b", "secret": "x" * 40}], "key 1 has no proper id"),
        ([{"id": "unsigned", "secret": "x" * 40}], "key 1 has no proper id"),
        ([{"id": "one", "secret": "x" * 31}], "secret of key one is missing or shorter than 32"),
        ([{"id": "one"}], "secret of key one is missing"),
        ([{"id": "one", "secret": "x" * 40}, {"id": "one", "secret": "y" * 40}], "two keys have the id one"),
    ],
)
def test_bad_keys_are_named_and_never_shown(given: Any, words: str) -> None:
    with pytest.raises(SigningError) as caught:
        signing.check(given, True, "celeryops_signing_keys")
    assert words in caught.value.msg and caught.value.msg.startswith("celeryops_signing_keys: ")
    assert "xxx" not in caught.value.msg


def test_no_secret_in_a_representation_or_a_diff() -> None:
    one = keys("one", "two")
    assert "xxx" not in repr(one) + one.describe()
    assert one.describe() == "signs: one\naccepts: one\naccepts: two\nunsigned: refused\n"


def test_steps_of_a_rotation() -> None:
    old, new = keys("old"), keys("new")
    accepting = plan(old, new, "prepare", True)
    assert accepting == keys("old", "new") and accepting.signer == "old"
    signing_new = plan(accepting, new, "sign", True)
    assert signing_new == keys("new", "old") and signing_new.ids == ["new", "old"]
    assert plan(signing_new, new, "finish", True) == new
    for step in signing.STEPS:
        assert plan(new, new, step, True) == new, "a second run changes nothing"
    # At every moment each host accepts what any other one signs, whatever step each is at.
    for here, there in itertools.product((old, accepting), repeat=2):
        assert here.signer in there.ids
    for here, there in itertools.product((accepting, signing_new), repeat=2):
        assert here.signer in there.ids


def test_only_the_last_step_refuses_more_on_a_host_in_use() -> None:
    wanted, lax = keys("one"), keys("one", require=False)
    assert plan(None, wanted, "prepare", in_use=True) == lax, "its workers and senders do not sign yet"
    assert plan(None, wanted, "prepare", in_use=False) == wanted, "a new host is not the hole in the fence"
    assert plan(lax, wanted, "sign", in_use=True) == lax
    assert plan(lax, wanted, "finish", in_use=True) == wanted
    assert plan(wanted, lax, "prepare", in_use=True) == lax
    assert plan(lax, None, "prepare", in_use=True) is None and plan(None, None, "prepare", in_use=True) is None
    with pytest.raises(SigningError, match="celeryops_signing_require to false"):
        plan(wanted, None, "prepare", in_use=True)
    with pytest.raises(SigningError, match="key one has another secret"):
        plan(wanted, Keys({"one": "z" * 40}), "prepare", in_use=True)


def test_the_ring_follows_its_file(tmp_path: Path) -> None:
    path = tmp_path / "signing.json"

    def hold(text: str, mode: int = 0o400) -> None:
        fresh = tmp_path / "fresh"
        fresh.touch(mode=0o600)
        fresh.write_text(text)
        fresh.chmod(mode)
        os.replace(fresh, path)

    hold(keys("one").dump())
    ring = signing.Ring(str(path))
    assert ring.judge(signed(keys("one")), CONTENT, BODY) == ""
    hold(keys("two", "one").dump())
    # Not looked at again within a second, but at once where a signature does not fit.
    assert ring.keys().ids == ["one"] and ring.judge(signed(keys("two")), CONTENT, BODY) == ""
    assert ring.keys().ids == ["two", "one"]
    for broken in ("", "{}", '{"require": true, "keys": []}'):
        hold(broken)
        assert ring.keys(now=True).ids == ["two", "one"] and ring.problem
    hold(keys("three").dump(), 0o644)
    assert ring.keys(now=True).ids == ["two", "one"] and "mode 0644" in ring.problem
    path.unlink()
    assert ring.keys(now=True).ids == ["two", "one"] and "cannot be read" in ring.problem
    hold(keys("three", require=False).dump())
    assert ring.keys(now=True) == keys("three", require=False) and ring.problem == ""


def test_who_is_not_ready_and_what_would_be_refused() -> None:
    told = {"accepts": ["old", "new"], "signs": "old", "require": True, "problem": ""}
    nodes = {"a": told, "b": None, "c": {**told, "accepts": ["old"]}, "d": {**told, "problem": "no file"}}
    assert [text.split()[0] for text in signing.not_ready(nodes, ["new"])] == ["b", "c", "d"]
    assert signing.not_ready({"a": told}, ["new", "old"]) == []
    waiting = {"old": {"q": 2}, "unsigned": {"q": 1}, "gone": {"q": 1}}
    # What is refused today already holds nothing up.
    assert signing.leaving(waiting, {"a": told}, ["new"], True) == {"old": {"q": 2}}
    lax = {**told, "require": False}
    assert signing.leaving(waiting, {"a": told, "b": lax}, ["new"], True) == {"old": {"q": 2}, "unsigned": {"q": 1}}
    assert signing.leaving(waiting, {"a": lax}, ["new", "old"], False) == {}


def test_the_signer_is_read_from_the_outside_of_a_message() -> None:
    mark = '"celeryops_signature": "1:k1:' + "0" * 64 + '"'
    assert signing.signer_of(('{"headers": {' + mark + "}}").encode()) == "k1"
    quoted = mark.replace('"', '\\"')
    assert signing.signer_of(('{"headers": {"argsrepr": "' + quoted + '"}}').encode()) == "unsigned"
