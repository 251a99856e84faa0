# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Records of idempotent tasks: names, the SQL store, and whose owner lives."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from ansible_collections.celeryops.runbook.plugins.module_utils.engine import once
from ansible_collections.celeryops.runbook.plugins.module_utils.engine.errors import (
    ConnectionFailed,
    LockHeld,
    PreconditionFailed,
)
from ansible_collections.celeryops.runbook.plugins.module_utils.engine.fleet import Fleet, Node

MINE = once.Record(once.RUNNING, "mine", "id-1", "w1@h1", "", 1000.0)
OTHER = replace(MINE, token="other", task_id="id-2")
KEY = once.key_of("shop.close_day", "global", "", "abc")


@pytest.mark.parametrize(
    ("task", "scope", "member", "where"),
    [
        ("shop.close_day", "global", "", "global"),
        ("shop.mail", "user", "7", "user=7"),
        ("a:b c*", "tenant", "acme:x=*/?", "tenant=acme:x=*/?"),
    ],
)
def test_keys_can_be_read_back(task: str, scope: str, member: str, where: str) -> None:
    key = once.key_of(task, scope, member, "abc")
    assert once.key_parts(key) == (task, where)
    assert "*" not in key and key.count(":") == 4


@pytest.fixture
def store(tmp_path: Path) -> once.SqlStore:
    return once.SqlStore(f"sqlite:///{tmp_path}/locks.db")


def test_sql_one_owner(store: once.SqlStore) -> None:
    assert store.take(KEY, MINE) is None
    assert store.take(KEY, MINE) is None  # an answer was lost
    found = store.take(KEY, OTHER)
    assert found is not None and found.record == MINE and 29 < found.expires_in <= 30
    assert not store.write(KEY, OTHER, 10) and store.in_use()
    # A retry keeps its place for its own task, and for no other.
    assert store.write(KEY, replace(MINE, state=once.WAITING), 10)
    assert store.take(KEY, OTHER) is not None
    assert store.take(KEY, replace(MINE, token="next")) is None
    # From a dead owner, named by its token.
    assert store.take(KEY, OTHER, "wrong") is not None
    assert store.take(KEY, OTHER, "next") is None
    assert store.write(KEY, replace(OTHER, state=once.DONE, value='"x"'), 10)
    done = store.take(KEY, MINE)
    assert done is not None and (done.record.state, done.record.value) == (once.DONE, '"x"')
    assert not store.remove(KEY, "mine") and store.remove(KEY, "other")
    assert store.look(KEY) is None and not store.in_use()


def test_sql_what_has_run_out_is_free(store: once.SqlStore) -> None:
    short = replace(MINE, lease=0.1)
    assert store.take(KEY, short) is None
    time.sleep(0.15)
    assert list(store.read()) == [] and store.take(KEY, OTHER) is None
    # Its first owner comes too late.
    assert not store.write(KEY, replace(short, state=once.DONE), 60)
    # What ran out with nobody following is written all the same.
    assert store.write(KEY, replace(OTHER, state=once.WAITING), 0.05)
    time.sleep(0.1)
    assert store.write(KEY, replace(OTHER, state=once.DONE), 60)


def test_sql_many_at_once(store: once.SqlStore) -> None:
    """And each finds that the table is missing."""
    taken: list[str] = []
    failed: list[Exception] = []

    def take(number: int) -> None:
        try:
            if store.take(KEY, replace(MINE, token=str(number))) is None:
                taken.append(str(number))
        except Exception as exc:
            failed.append(exc)

    threads = [threading.Thread(target=take, args=(number,)) for number in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(taken) == 1 and not failed


def test_sql_errors_hold_no_secret(tmp_path: Path) -> None:
    with pytest.raises(ConnectionFailed, match="Check CELERYOPS_ONCE_DATABASE"):
        once.SqlStore(f"sqlite:///{tmp_path}/no/such.db").look(KEY)
    with pytest.raises(PreconditionFailed, match="SQLAlchemy cannot use it") as caught:
        once.SqlStore("nosuch://user:hidden@host/db")
    assert "hidden" not in caught.value.msg


def test_processes() -> None:
    here = once.process_name()
    assert here.split(":")[2] == str(os.getpid()) and not once.process_is_dead(here)
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        name = once.process_name(child.pid)
        assert not once.process_is_dead(name)
        child.kill()
        child.wait()
    assert once.process_is_dead(name)
    # The number of a dead process given to another; another host, or none that can be told.
    assert once.process_is_dead(here.rpartition(":")[0] + ":1")
    assert not once.process_is_dead("elsewhere:1:2:3") and not once.process_is_dead("")


def fleet(complete: bool = True, **active: list[str] | None) -> Fleet:
    nodes = {
        name: Node("answered", "worker", True, {} if ids is None else {"active": [{"id": one} for one in ids]})
        for name, ids in active.items()
    }
    return Fleet(nodes, subscribed=len(nodes), complete=complete, present=list(nodes))


@pytest.mark.parametrize(
    ("seen", "left", "dead", "owner"),
    [
        (fleet(w1=["id-1"]), 29, (), once.ALIVE),
        (fleet(w1=[], w2=["id-1"]), 1, (), once.ALIVE),
        (fleet(w1=["id-9"]), 29, (), once.GONE),
        (fleet(w2=[]), 29, (), once.UNKNOWN),  # it renewed a moment ago
        (fleet(w2=[]), 14, (), once.GONE),
        (fleet(False, w2=[]), 1, (), once.UNKNOWN),
        (fleet(w1=None, w2=[]), 1, (), once.UNKNOWN),  # it is there and did not say what it runs
        (fleet(w2=[]), 29, ("w1",), once.GONE),
    ],
)
def test_who_owns(seen: Fleet, left: float, dead: tuple[str, ...], owner: str) -> None:
    marker = once.Found("celeryops:once:t:global:x", replace(MINE, state=once.DONE), 100)
    locks = once.Locks([once.Found(KEY, replace(MINE, node="w1"), left), marker])
    once.judge(locks, seen, dead)
    assert {key: state for key, (state, _why) in locks.owners.items()} == {KEY: owner}
    if owner == once.GONE:
        once.demand_dead_owners(locks)
    else:
        with pytest.raises(LockHeld, match=r"1 of these locks may have a living owner.*id-1") as caught:
            once.demand_dead_owners(locks)
        assert [lock["key"] for lock in caught.value.data["locks"]] == [KEY]


def test_one_that_answers_is_not_dead() -> None:
    with pytest.raises(PreconditionFailed, match="dead: w1 answers"):
        once.judge(once.Locks(), fleet(w1=[]), ["w1"])
