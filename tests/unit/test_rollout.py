# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

from typing import Any

import pytest

from ansible_collections.celeryops.runbook.plugins.module_utils.engine.rollout import Found, Heard, Roll, Wanted, plan

A1, A2, B1 = "shop-a-1@w1", "shop-a-2@w1", "shop-b-1@w1"
WANTED = [Wanted("a-1", "a", A1, ("x", "y")), Wanted("a-2", "a", A2, ("x", "y")), Wanted("b-1", "b", B1, ("z",))]


def here(release: str = "v2", **changed: Found) -> dict[str, Found]:
    """A host as look.yml shows it: three instances that run, two surge instances that do not."""
    running = {one.instance: Found("active", release, "S") for one in WANTED}
    idle = {"a-surge": Found("inactive"), "b-surge": Found("inactive")}
    return {**running, **idle, **{name.replace("_", "-"): found for name, found in changed.items()}}


def fleet(release: str = "v2", **changed: Heard) -> dict[str, Heard]:
    """The three answer; nobody else is there."""
    told = {one.instance: Heard(True, release, one.queues) for one in WANTED}
    told.update({name.replace("_", "-"): heard for name, heard in changed.items()})
    return {one.node: told[one.instance] for one in WANTED}


def roll(found: dict[str, Found], heard: dict[str, Heard], current: str = "v2", **options: Any) -> Roll:
    return plan(WANTED, found, heard, **{"release": "v2", "current": current, "batch": [A1, A2, B1], **options})


def test_nothing_to_do() -> None:
    done = roll(here(), fleet())
    assert done == Roll("v2", "v2") and not done.acts
    assert str(done) == "nothing to do, all instances run v2"
    assert done.as_dict() == {"from": "v2", "acts": False, "todo": [], "silent": [], "surge": [], "left": []}


@pytest.mark.parametrize(
    ("found", "heard", "todo", "silent"),
    [
        ({}, {"a_1": Heard(True, "v1", ("x", "y"))}, ["a-1"], []),  # the wrong release
        ({}, {"a_1": Heard(True, "v2", ("x",))}, ["a-1"], []),  # lacks a queue
        ({}, {"a_1": Heard(True, "v2", ())}, ["a-1"], []),  # drained and not stopped
        ({}, {"a_1": Heard(True, "v2", ("y", "more", "x"))}, [], []),  # consumes more
        ({}, {"a_1": Heard(True, "", ("x", "y"))}, [], []),  # tells no release: the process does
        ({"a_1": Found("active", "v1", "S")}, {"a_1": Heard(True, "", ("x", "y"))}, ["a-1"], []),
        ({"a_1": Found("active", "v1", "S")}, {"a_1": Heard(True, "v2", ("x", "y"))}, [], []),  # what it says wins
        ({"a_1": Found("inactive")}, {"a_1": Heard(False)}, ["a-1"], []),  # stopped by an interrupted deploy
        ({"a_1": Found("failed")}, {"a_1": Heard(False)}, ["a-1"], []),
        ({"a_1": Found("inactive")}, {"a_1": Heard(True, "v2", ("x", "y"))}, ["a-1"], []),  # somebody else answers
        ({}, {"a_1": Heard(False)}, ["a-1"], [A1]),
        ({"a_1": Found("active", "v2", "T")}, {"a_1": Heard(False)}, ["a-1"], [A1 + " (its process is stopped)"]),
        ({"a_1": Found("active", "v2", "t")}, {"a_1": Heard(False)}, ["a-1"], [A1 + " (its process is stopped)"]),
        ({"a_1": Found("active", "v2", "")}, {"a_1": Heard(False)}, ["a-1"], [A1]),
        ({}, {"a_1": Heard(False), "b_1": Heard(False)}, ["a-1", "b-1"], [A1, B1]),
    ],
)
def test_what_is_replaced_and_who_is_silent(
    found: dict[str, Found], heard: dict[str, Heard], todo: list[str], silent: list[str]
) -> None:
    done = roll(here(**found), fleet(**heard))
    assert (list(done.todo), list(done.silent), done.acts) == (todo, silent, bool(todo))


def test_a_node_the_fleet_does_not_know_is_silent() -> None:
    assert roll(here(), {name: heard for name, heard in fleet().items() if name != A1}).silent == (A1,)


OTHER = Heard(True, "v1", ("x", "y", "other"))


@pytest.mark.parametrize(
    ("surge", "others", "batch", "expected"),
    [
        ("auto", {}, [], ("a", "b")),
        ("auto", {"shop-a-1@w2": OTHER}, [], ("b",)),
        ("auto", {"shop-a-1@w2": Heard(True, "v1", ("x",))}, [], ("a", "b")),  # y would have nobody
        ("auto", {"shop-a-1@w2": OTHER}, ["shop-a-1@w2"], ("a", "b")),  # of the same batch
        ("auto", {"shop-a-1@w2": OTHER}, ["shop-c-1@w2"], ("a", "b")),  # on a host of the batch
        ("auto", {"shop-a-1@w2": OTHER, "beat@w3": Heard(True, "", ("z",))}, [], ()),
        ("auto", {"shop-a-1@w2": Heard(True, "v1", ("x",)), "shop-a-1@w3": Heard(True, "v1", ("y", "z"))}, [], ()),
        ("always", {"shop-a-1@w2": OTHER}, [], ("a", "b")),
        ("never", {}, [], ()),
    ],
)
def test_surge(surge: str, others: dict[str, Heard], batch: list[str], expected: tuple[str, ...]) -> None:
    heard = {**fleet("v1"), **others}
    assert roll(here("v1"), heard, "v1", surge=surge, batch=[A1, A2, B1, *batch]).surge == expected


def test_no_surge_for_a_pool_that_is_not_replaced() -> None:
    done = roll(here(), fleet(b_1=Heard(True, "v1", ("z",))), surge="always")
    assert (done.todo, done.surge) == (("b-1",), ("b",))


@pytest.mark.parametrize(
    ("found", "release", "left"),
    [
        ({"a_surge": Found("active", "v2", "S")}, "v1", []),  # needed again, and right
        ({"a_surge": Found("active", "v1", "S")}, "v1", ["a"]),  # another release
        ({"a_surge": Found("failed")}, "v1", ["a"]),
        ({"a_surge": Found("active", "v2", "S")}, "v2", ["a"]),  # all is replaced, it alone remains
        ({"a_surge": Found("inactive", "v1")}, "v2", []),
    ],
)
def test_what_an_interrupted_deploy_left(found: dict[str, Found], release: str, left: list[str]) -> None:
    done = roll(here(release, **found), fleet(release))
    assert (list(done.left), done.acts) == (left, bool(left) or release == "v1")


def test_current_alone_is_something_to_do() -> None:
    done = roll(here(), fleet(), "v1")
    assert done.acts and not done.todo
    assert str(done) == ("would quiet, drain and stop nothing, switch current from v1 to v2, start and prove them")


def test_a_queue_that_is_paused_counts_as_consumed() -> None:
    rests = {"active_queues": [{"name": "x"}], "celeryops_pauses": {"withheld": ["y"]}, "celeryops_release": "no dict"}
    heard = Heard.read({"state": "answered", "replies": rests})
    assert heard == Heard(True, "", ("x", "y"))
    assert roll(here(), fleet(a_1=heard)).todo == ()
    assert Heard.read({"state": "answered", "replies": {"celeryops_pauses": "no dict"}}).queues == ()


def test_the_plan_in_words() -> None:
    text = str(roll(here("v1"), fleet("v1"), "v1"))
    assert text == (
        "would start a-surge, b-surge on v2, quiet, drain and stop a-1, a-2, b-1, switch current from v1 to v2, "
        "start and prove them"
    )


def test_answers_are_read_as_celery_inspect_gives_them() -> None:
    replies = {"active_queues": [{"name": "x"}, {"name": "y"}], "celeryops_release": {"release": "v2", "pid": 1}}
    assert Heard.read({"state": "answered", "replies": replies}) == Heard(True, "v2", ("x", "y"))
    assert Heard.read({"state": "answered", "replies": {"celeryops_release": None}}) == Heard(True)
    assert Heard.read({"state": "silent", "replies": {}}) == Heard(False)
    assert Found.read({"state": "active", "pid": 4, "release": None, "process": "S"}) == Found("active", "", "S")
