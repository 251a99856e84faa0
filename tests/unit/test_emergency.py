# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The record of an emergency stop: what is in it, where it lies, what became of a task."""

from __future__ import annotations

import os
import stat
from dataclasses import replace
from pathlib import Path

import pytest

from ansible_collections.celeryops.runbook.plugins.module_utils.engine import emergency
from ansible_collections.celeryops.runbook.plugins.module_utils.engine.errors import PreconditionFailed, UnknownLayout
from ansible_collections.celeryops.runbook.plugins.module_utils.engine.fleet import ANSWERED, Fleet, Node

NOW = 1_795_000_000.0
EARLY = emergency.Task("e", "shop.cart", [1], {}, "default", "shop-fast-1@one", "running", False, NOW - 5)
LATE = replace(EARLY, id="l", late=True)
FETCHED = replace(EARLY, id="r", place="reserved", started=None)


def record(**changes: object) -> emergency.Record:
    made = emergency.new("shop", "anna", "fire", emergency.FINISH, NOW)
    return replace(made, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("task", "waiting", "results", "outcome"),
    [
        (EARLY, (), {}, "cut"),
        (EARLY, (), {"e": NOW - 1}, "ended"),
        (EARLY, (), {"e": NOW - 60}, "cut"),  # the result of an earlier run
        (EARLY, ("e",), {}, "waits"),
        (LATE, (), {}, "ended"),
        (LATE, ("l",), {}, "waits"),
        (FETCHED, ("r",), {}, "waits"),
        (FETCHED, (), {}, "cut"),
        (replace(EARLY, outcome="saved"), (), {}, "saved"),
    ],
)
def test_what_became_of_a_task(
    task: emergency.Task, waiting: tuple[str, ...], results: dict[str, float], outcome: str
) -> None:
    assert emergency.judge(task, waiting, results).outcome == outcome


def test_what_workers_hold_and_whom_it_cuts() -> None:
    def told(**item: object) -> dict[str, object]:
        return {"name": "shop.cart", "args": [1], "kwargs": {}, "delivery_info": {"routing_key": "default"}, **item}

    fleet = Fleet(
        nodes={
            "shop-fast-1@one": Node(
                ANSWERED, "worker", True,
                {"active": [told(id="e", acknowledged=True, time_start=NOW - 5), told(id="l", acknowledged=False)],
                 "reserved": [told(id="r"), told(id="e")]},
            ),
            "shop-fast-1@two": Node(ANSWERED, "worker", True, {"active": [], "reserved": []}),
            "other-fast-1@one": Node(ANSWERED, "worker", True, {"active": [told(id="x")], "reserved": []}),
        }
    )  # fmt: skip
    units = {"one": {"fast-1": "shop-fast-1@one"}, "two": {"fast-1": "shop-fast-1@two"}}
    found = emergency.held(fleet, ["shop-fast-1@one", "shop-fast-1@two"])
    assert {(task.id, task.place, task.late) for task in found} == {
        ("e", "running", False),
        ("l", "running", True),
        ("r", "reserved", False),
    }
    assert emergency.busy(record(tasks=found), units) == {"one": ["fast-1"]}
    assert emergency.busy(record(tasks=tuple(replace(task, outcome="waits") for task in found)), units) == {}


def test_the_file_is_whole_private_and_found_until_it_is_ended(tmp_path: Path) -> None:
    directory = str(tmp_path / "shop")
    one = record(tasks=(EARLY, LATE), units={"one": ["fast-1"]})
    path = emergency.write(directory, one)
    assert emergency.read(path) == one
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600 and stat.S_IMODE(os.stat(directory).st_mode) == 0o700
    assert emergency.open_file(directory, "shop") == one and emergency.open_file(directory, "sho") is None
    emergency.write(directory, replace(one, ended=NOW + 1))
    assert emergency.open_file(directory, "shop") is None
    assert os.listdir(directory) == [os.path.basename(path)]


def test_what_is_no_record_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "emergency-shop-2026.json"
    for text in ("", "[]", "{}", '{"format": "celeryops.emergency", "version": 2, "tasks": []}'):
        path.write_text(text)
        with pytest.raises(UnknownLayout, match="no record"):
            emergency.read(str(path))
    with pytest.raises(PreconditionFailed, match="no file"):
        emergency.read(str(tmp_path / "none.json"))


def test_reports_show_no_arguments() -> None:
    assert "args" not in EARLY.shown and "kwargs" not in EARLY.shown


def test_its_pauses_are_known_by_their_words() -> None:
    one, two = record(), record()
    assert one.reason != two.reason and "fire" in one.reason and "emergency_resume" in one.reason
