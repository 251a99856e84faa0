# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from ansible_collections.celeryops.runbook.plugins.module_utils.engine import replication
from ansible_collections.celeryops.runbook.plugins.module_utils.engine.errors import PreconditionFailed
from ansible_collections.celeryops.runbook.plugins.module_utils.engine.sentinel import (
    Node,
    View,
    Watcher,
    described,
    pairs,
    plan,
)

A, B, C = "192.0.2.1:6379", "192.0.2.2:6379", "192.0.2.3:6379"


def replica(address: str, offset: int = 900, **values: Any) -> Node:
    return Node(address, **{"role": "replica", "link": "up", "source": A, "offset": offset, **values})


def view(*replicas: Node, primary: Node | None = None, quorum: str = "", **values: Any) -> View:
    first = primary or Node(A, role="primary", offset=1000)
    nodes = {node.address: node for node in (first, *replicas)}
    watchers = tuple(Watcher(f"192.0.2.{number}:26379", primary=A, epoch=4) for number in (1, 2, 3))
    return View("shop", values.get("sentinels", watchers), A, nodes, quorum)


DEAD = Node(A, problem="does not answer (timeout)")


def test_without_a_wish_a_primary_that_answers_stays() -> None:
    found = view(replica(B))
    assert plan(found).action == plan(found, wanted=A).action == "none"
    assert plan(found, force=True).action == "none"


def test_a_planned_one_takes_who_is_wanted_or_who_is_least_behind() -> None:
    found = view(replica(B, 900), replica(C, 950))
    assert plan(found, wanted="any").target == C
    chosen = plan(found, wanted=B)
    assert (chosen.action, chosen.target) == ("switch", B) and "100 bytes behind" in chosen.text


@pytest.mark.parametrize(
    ("nodes", "wanted", "words"),
    [
        ([], "any", "know of no replica"),
        ([replica(B, problem="its link to the primary is down")], B, f"{B}: its link to the primary is down"),
        ([replica(B, problem="is loading its data")], "any", f"{B}: is loading its data"),
        ([replica(B)], C, f"{C}: the Sentinels do not know it"),
    ],
)
def test_without_a_healthy_replica_nothing_is_planned(nodes: list[Node], wanted: str, words: str) -> None:
    with pytest.raises(PreconditionFailed, match="no healthy replica") as refused:
        plan(view(*nodes), wanted=wanted)
    assert words in refused.value.msg and "Nothing was touched" in refused.value.msg


def test_sentinels_that_cannot_agree_need_force() -> None:
    for primary, action in ((None, "switch"), (DEAD, "force")):
        found = view(replica(B), primary=primary, quorum="NOQUORUM 1 usable Sentinels")
        with pytest.raises(PreconditionFailed, match="cannot agree on a failover: NOQUORUM 1 usable"):
            plan(found, wanted="any")
        assert plan(found, wanted="any", force=True).action == action


def test_a_dead_primary_is_left_to_the_sentinels_or_replaced_by_force() -> None:
    found = view(replica(B, link="down"), primary=DEAD)
    assert plan(found).action == "wait"
    forced = plan(found, force=True)
    assert (forced.action, forced.target) == ("force", B)
    with pytest.raises(PreconditionFailed, match="redis_recover with celeryops_redis_host"):
        plan(view(primary=DEAD))


def test_a_view() -> None:
    split = (Watcher("192.0.2.1:26379", primary=A), Watcher("192.0.2.2:26379", primary=B))
    assert not view(sentinels=split).agreed
    away = (Watcher("192.0.2.1:26379", primary=A), Watcher("192.0.2.2:26379", problem="refused"))
    assert view(sentinels=away).agreed
    told = described(view(replica(B)))
    assert told["fit"] == [B] and told["nodes"][B]["lag"] == 100 and told["alive"]


def test_maps_of_both_protocols() -> None:
    assert pairs([b"ip", b"192.0.2.1", b"port", b"6379"]) == pairs({b"ip": b"192.0.2.1", b"port": 6379})


# The file of Sentinel

GROUP = replication.Group([A, B], A, [], "shop", "administrator", "watch")
WANTED = replication.Sentinel(26379, ["*", "-::*"], 2, 5000, 60000, "/var/lib/redis", "", "pa-ss")


def test_the_first_file_watches_who_leads_and_is_not_written_again() -> None:
    text = WANTED.begin(GROUP, B)
    assert "sentinel monitor shop 192.0.2.2 6379 2\n" in text and 'auth-pass shop "pa-ss"' in text
    assert replication.watches(text, "shop") and not replication.watches(text, "sho")
    assert not replication.watches("sentinel monitor mymaster 127.0.0.1 6379 2\n", "shop")
    assert replication.misfits(text, WANTED.fixed(GROUP)) == []
    assert "auth-user" not in text and "administrator" not in text
    own = replace(WANTED, user="watcher").begin(GROUP, B)
    assert "sentinel auth-user shop watcher\n" in own and own.index("auth-user") > own.index("monitor")


# As Sentinel 7.0 rewrites it: without quotes, without what is usual, with users of its own.
REWRITTEN = """port 26379

protected-mode yes
requirepass "watch"
dir "/var/lib/redis"
sentinel monitor shop 192.0.2.2 6379 2
sentinel auth-pass shop pa-ss

# Generated by CONFIG REWRITE
user default on #dd1582 ~* &* +@all
sentinel myid 1e9b4e9fe36dc24ad924c63f7bba151001d00f07
sentinel known-replica shop 192.0.2.1 6379
"""


def test_a_file_that_sentinel_has_rewritten_fits_and_keeps_what_it_learnt() -> None:
    assert replication.misfits(REWRITTEN, WANTED.fixed(GROUP)) == []
    assert replication.line_of(REWRITTEN, "sentinel auth-pass shop") == "pa-ss"
    other = replication.Group([A, B], A, [], "shop", "pa-ss", "another")
    assert replication.misfits(REWRITTEN, WANTED.fixed(other)) == ["requirepass"]
    changed = replication.refit(REWRITTEN, WANTED.fixed(other))
    assert 'requirepass "another"' in changed and "watch" not in changed and "\nuser " not in changed
    assert "sentinel monitor shop 192.0.2.2 6379 2" in changed and "known-replica shop 192.0.2.1" in changed
    assert replication.misfits(changed, WANTED.fixed(other)) == []
    open_one = replication.Group([A, B], A, [], "shop", "pa-ss")
    assert replication.misfits(REWRITTEN, WANTED.fixed(open_one)) == ["protected-mode", "requirepass"]
