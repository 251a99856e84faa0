# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What has to be done about the beats of a fleet."""

from __future__ import annotations

from typing import Any

import pytest

from ansible_collections.celeryops.runbook.plugins.module_utils.engine import beats
from ansible_collections.celeryops.runbook.plugins.module_utils.engine.beats import Seen, plan
from ansible_collections.celeryops.runbook.plugins.module_utils.engine.schedule import Leader, Run, later, parse_rest

pytestmark = pytest.mark.ansible

UNIT = "celery-shop-beat.service"


def unit(pid: int = 7, active: str = "active", enabled: bool = True) -> dict[str, Any]:
    return {"name": UNIT, "kind": "beat", "active": active, "enabled": enabled, "pid": pid}


def process(pid: int = 7, **other: Any) -> dict[str, Any]:
    return {"pid": pid, "began": pid * 100, "unit": UNIT, "running": True, "worker": False, "service": "", **other}


def host(name: str, *units: dict[str, Any], beats: tuple[dict[str, Any], ...] = ()) -> dict[str, Any]:
    return {"reachable": True, "hostname": name, "units": list(units), "beats": list(beats)}


def beat_host(name: str = "w1", pid: int = 7) -> dict[str, Any]:
    return host(name, unit(pid), beats=(process(pid),))


def heartbeat(host: str = "w1", pid: int = 7, age: float = 3.0) -> dict[str, Any]:
    return {"host": host, "pid": pid, "age": age}


def well(**other: Any) -> Seen:
    facts: dict[str, Any] = {
        "hosts": {"w1": beat_host(), "w2": host("w2")},
        "wanted": ["w1"],
        "leader": Leader("w1", 7),
        "heartbeat": heartbeat(),
        **other,
    }
    return Seen(**facts)


def test_nothing_is_to_be_done_where_all_is_well() -> None:
    found = plan(well(answered=["celerybeat@w1"]))
    assert (found.problems, found.acts) == ([], [])
    assert beats.lacking(well()) == ""


def test_a_stray_is_ended_and_a_second_unit_removed() -> None:
    stray = process(9, unit=None, service="session-3.scope")
    found = plan(well(hosts={"w1": beat_host(), "w2": host("w2", unit(8), beats=(process(8), stray))}))
    assert found.problems == []
    assert (found.end, found.remove, found.start) == ({"w2": [{"pid": 9, "began": 900}]}, ["w2"], [])
    assert found.acts == ["end beat 9 on w2", "stop and disable the unit on w2"]
    assert "w2 (pid 9, by hand, in session-3.scope)" in found.found


def test_a_unit_that_only_is_enabled_is_removed_too() -> None:
    assert plan(well(hosts={"w1": beat_host(), "w2": host("w2", unit(0, "inactive"))})).remove == ["w2"]
    assert plan(well(hosts={"w1": beat_host(), "w2": host("w2", unit(0, "inactive", False))})).remove == []


@pytest.mark.parametrize(
    "right",
    [host("w1"), host("w1", unit(0, "failed")), host("w1", unit(0, "inactive")), host("w1", unit(7, "active", False))],
)
def test_the_right_one_is_started_and_enabled(right: dict[str, Any]) -> None:
    found = plan(well(hosts={"w1": right}, leader=None, heartbeat=None))
    assert (found.start, found.problems) == (["w1"], [])


def test_one_that_is_frozen_or_silent_is_restarted() -> None:
    frozen = host("w1", unit(), beats=(process(running=False),))
    assert plan(well(hosts={"w1": frozen})).restart == ["w1"]
    assert plan(well(heartbeat=heartbeat(age=301))).restart == ["w1"]
    assert plan(well(heartbeat=heartbeat(pid=6, age=301))).restart == [], "another process left it"


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (
            {"hosts": {"w1": beat_host(), "w2": {"reachable": False, "error": "no route"}}},
            ["w2", "celeryops_lost_hosts"],
        ),
        ({"lost": ["w2"]}, ["celeryops_lost_hosts", "w2", "is not lost"]),
        ({"lost": ["w9"]}, ["celeryops_lost_hosts", "w9"]),
        (
            {"hosts": {"w1": beat_host(), "w2": {"reachable": False}}, "lost": ["w2"], "leader": Leader("w2", 4)},
            ["w2", "is not down"],
        ),
        (
            {"hosts": {"w1": {"reachable": False}}, "lost": ["w1"], "leader": None, "heartbeat": None},
            ["celeryops_beat_group", "another host"],
        ),
        ({"wanted": ["w2"]}, ["two inventories", "celeryops_beat_from=w1"]),
        ({"leader": Leader("w3", 4)}, ["two inventories", "w3"]),
        ({"leader": None, "heartbeat": heartbeat("w3")}, ["two inventories", "w3"]),
        ({"answered": ["celerybeat@w1", "celerybeat@w1"]}, ["celerybeat@w1", "answers a ping"]),
        ({"answered": ["celerybeat@w3"]}, ["celerybeat@w3", "w3"]),
        ({"hosts": {"w1": host("w1", unit(), beats=(process(), process(8, worker=True, unit=None)))}}, ["-B", "pid 8"]),
    ],
)
def test_what_is_not_clear_is_refused(other: dict[str, Any], words: list[str]) -> None:
    (problem,) = plan(well(**other)).problems
    assert all(word in problem for word in words), problem


def test_beat_moves_when_that_is_said() -> None:
    found = plan(well(wanted=["w2"], moved_from="w1"))
    assert (found.problems, found.remove, found.start) == ([], ["w1"], ["w2"])


def test_a_lost_host_is_passed_over_once_it_does_not_tick() -> None:
    hosts = {"w1": {"reachable": False}, "w2": host("w2")}
    found = plan(well(hosts=hosts, lost=["w1"], wanted=["w2"], leader=None, heartbeat=heartbeat(age=90)))
    assert (found.problems, found.start) == ([], ["w2"])


def test_a_stray_that_leads_is_ended_like_any_other() -> None:
    hosts = {"w1": beat_host(), "w2": host("w2", beats=(process(9, unit=None),))}
    found = plan(well(hosts=hosts, leader=Leader("w2", 9)))
    assert (found.problems, found.end) == ([], {"w2": [{"pid": 9, "began": 900}]})


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"hosts": {"w1": host("w1")}}, "no beat runs on w1"),
        ({"heartbeat": None}, "has not ticked yet"),
        ({"heartbeat": heartbeat(pid=6)}, "pid 6"),
        ({"leader": Leader("w2", 9)}, "w2 (pid 9) leads still"),
        ({"leader": None, "wanted": ["w1", "w2"]}, "all of them send"),
    ],
)
def test_what_is_lacking_is_said(other: dict[str, Any], words: str) -> None:
    assert words in beats.lacking(well(**other))


def test_the_record_of_a_run_counts_unless_the_file_knows_more() -> None:
    assert later(None, Run(5, 1)) == Run(5, 1)
    assert later(Run(3, 1), Run(5, 1)) == Run(3, 1), "a fresh file knows only when it was made"
    assert later(Run(3, 1), Run(5, 2)) == Run(5, 2)


def test_an_unreadable_entry_rests() -> None:
    assert "none of this collection" in str(parse_rest("e", b"[]")) and "anna" in str(
        parse_rest("e", b'{"by": "anna", "why": "x", "since": 1.0}')
    )
