# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Rules of the roles, and the steps from one set of users to another."""

from __future__ import annotations

from typing import Any

import pytest

from ansible_collections.celeryops.runbook.plugins.module_utils.engine import acl
from ansible_collections.celeryops.runbook.plugins.module_utils.engine.acl import Layout, User, known, parse, plan
from ansible_collections.celeryops.runbook.plugins.module_utils.engine.errors import PreconditionFailed


def user(name: str, *passwords: str, rules: tuple[str, ...] = ("~*", "+get")) -> User:
    return User(name, rules, tuple(acl.digest(word) for word in passwords))


def accepts(users: list[User]) -> dict[str, int]:
    return {one.name: len(one.hashes) for one in users}


def test_prepare_takes_nothing_away_and_finish_leaves_what_is_wanted() -> None:
    found = {one.name: one for one in (user("default", "a"), user("worker", "old"), user("guest", "g"))}
    wanted = [user("default", "a"), user("worker", "new"), user("beat", "b")]
    first = plan(found, wanted, "prepare")
    assert accepts(first.users) == {"default": 1, "worker": 2, "beat": 1, "guest": 1}
    assert first.left == {"worker": "password", "guest": "user"} and first.gone == []
    now = {one.name: one for one in first.users}
    assert plan(now, wanted, "prepare").users == first.users, "the second run changes nothing"
    last = plan(now, wanted, "finish")
    assert last.users == wanted and last.gone == ["guest"] and last.left == {}


def test_the_way_back_is_open_until_the_end() -> None:
    old, new = [user("default", "a"), user("worker", "old")], [user("default", "a"), user("worker", "new")]
    both = {one.name: one for one in plan({one.name: one for one in old}, new, "prepare").users}
    back = plan(both, old, "prepare").users
    assert {*back[1].hashes} == {*both["worker"].hashes} and back[1].hashes[0] == old[1].hashes[0]
    # Whoever connected since has perhaps the password that is to go now.
    assert acl.turned(both, back) and not acl.turned(both, plan(both, new, "prepare").users)
    assert plan(both, old, "finish").users == old


def test_a_file_is_read_as_it_was_written() -> None:
    rules = acl.rules("producer", Layout("p:", ("a", "b")), keys=["own:*"])
    users = [acl.administrator("secret"), user("worker", "x", "y"), user("shop", "z", rules=rules)]
    assert list(parse(acl.text(users)).values()) == users
    assert "secret" not in acl.text(users) and acl.administrator("").words[:2] == ["on", "nopass"]


def test_a_user_without_password_stays_shut() -> None:
    """Made by hand, off or without a password: it is not opened by being kept."""
    found = parse("user guest off sanitize-payload ~x +get\nuser other on ~x +get\n")
    kept = plan(found, [acl.administrator("a")], "prepare").users
    assert [one.flags for one in kept] == [("on",), ("off",), ("on",)]
    assert not any("nopass" in one.words for one in kept)


def test_the_order_in_which_redis_tells_rules_is_no_difference() -> None:
    written = parse("user worker on #" + "a" * 64 + " ~* +get +set\n")
    turned = parse("user worker on #" + "a" * 64 + " ~* +set +get\n")
    other = parse("user worker on #" + "a" * 64 + " ~* +set\n")
    assert known(written, turned) == written and known(written, other) == other


@pytest.mark.parametrize("role", [role for role in acl.ROLES if role not in ("operator", "worker", "beat")])
def test_only_who_has_to_reaches_every_key(role: str) -> None:
    rules = acl.rules(role, Layout(queues=("a",)))
    assert "~*" not in rules and "&*" not in rules and "+@all" not in rules and "-@all" in rules


def test_only_under_sentinel_the_operator_may_change_the_primary() -> None:
    """And set what Redis runs with, which makes it the administrator, only where one of several is to be chosen."""
    alone, pair, three = (acl.rules("operator", Layout(replicas=number)) for number in (0, 1, 2))
    assert not {"+replicaof", "+client|pause", "+config|rewrite", "+config|set"} & {*alone}
    assert {"+replicaof", "+client|pause", "+client|unpause", "+config|rewrite"} == {*pair} - {*alone}
    assert {*three} - {*pair} == {"+config|set"}


def test_replicas_and_sentinels_reach_no_key_and_no_database() -> None:
    for role, reach in (("replica", []), ("sentinel", ["&__sentinel__:hello"])):
        rules = acl.rules(role, Layout("p:", ("a",), replicas=2))
        assert [rule for rule in rules if not rule.startswith("+")] == [*reach, "-@all"]
        assert not any(rule.startswith("+select") for rule in rules)


def test_names_of_queues_and_prefixes_are_no_patterns() -> None:
    rules = acl.rules("producer", Layout("a[b]*", ("q?",)))
    assert "%W~a\\[b\\]\\*q\\?" in rules


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"name": ""}, "is no name"),
        ({"name": "default"}, "is no name"),
        ({"role": "boss"}, "the role of worker is 'boss'"),
        ({"password": ""}, "the password of worker is missing"),
        ({"password": "line\nline\nline"}, "not printable"),
        ({"rules": ["+get ~x"]}, "has the rule"),
        ({"rules": [">horse"]}, "has the rule that is a password"),
        ({"queues": ["a b"]}, "must not be empty or hold blanks"),
    ],
)
def test_wrong_users_are_named_without_their_password(change: dict[str, Any], words: str) -> None:
    sound = {"name": "worker", "role": "worker", "password": "correct horse"}
    acl.check([sound])
    with pytest.raises(PreconditionFailed, match=words) as caught:
        acl.check([{**sound, **change}, {**sound, "name": "beat"}])
    assert "celeryops_redis_users" in caught.value.msg and "horse" not in caught.value.msg


def test_a_person_reads_rules_as_they_were_written() -> None:
    written, live = (parse(f"user worker on #{'a' * 64} {words}\n") for words in ("~* +get +mget", "~* +@read -ttl"))
    told = acl.describe(acl.readable(written, live))
    assert told == "worker: 1 password\nworker: ~* +get +mget\n"
    assert acl.describe(acl.readable({}, live)) == "worker: 1 password\nworker: ~* +@read -ttl\n"
