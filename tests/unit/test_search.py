# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

from datetime import datetime, timedelta, timezone
from typing import Any

import pytest

from celeryops.engine.errors import PreconditionFailed
from celeryops.engine.results import Failed, exception_name, parse_time
from celeryops.engine.search import Wanted
from celeryops.engine.tasks import alike

NOW = datetime(2026, 11, 21, 9, tzinfo=timezone.utc)


@pytest.mark.parametrize(
    ("wanted", "fits"),
    [
        (Wanted(names=("a",)), True),
        (Wanted(names=("a",), args=[1]), True),
        (Wanted(names=("a",), args=[1, "x"]), True),
        (Wanted(names=("a",), args=[1, "x", 3]), False),
        (Wanted(names=("a",), args=["1"]), False),
        (Wanted(names=("a",), kwargs={"k": [1, 2]}), True),
        (Wanted(names=("a",), kwargs={"k": [1]}), False),
        (Wanted(names=("a",), kwargs={"other": None}), False),
        (Wanted(names=("a",), args=[1], exact=True), False),
        (Wanted(names=("a",), args=[1, "x"], kwargs={"k": [1, 2], "more": 1}, exact=True), True),
        (Wanted(names=("a",), exact=True), False),
    ],
)
def test_arguments(wanted: Wanted, fits: bool) -> None:
    assert wanted.arguments((1, "x"), {"k": (1, 2), "more": 1}) is fits


def test_arguments_that_are_none() -> None:
    assert not Wanted(names=("a",), args=[1]).arguments("(1,)", {})
    assert not Wanted(names=("a",), kwargs={"k": 1}).arguments([], "{'k': 1}")


def test_identity() -> None:
    both = Wanted(frozenset(["1"]), ("shop.*",))
    assert both.identity("shop.a", "1")
    assert not both.identity("shop.a", "2") and not both.identity("mail.a", "1")
    assert Wanted(names=("a[1]",)).identity("a[1]", "x"), "a name is a name before it is a pattern"


@pytest.mark.parametrize("wanted", [Wanted(), Wanted(args=[1]), Wanted(frozenset([" "])), Wanted(names=("",))])
def test_too_little_is_refused(wanted: Wanted) -> None:
    with pytest.raises(PreconditionFailed, match="ids"):
        wanted.check()


META = {
    "status": "FAILURE", "name": "shop.a", "result": {"exc_type": "KeyError", "exc_message": ["x"]},
    "date_done": (NOW - timedelta(hours=1)).isoformat(),
}  # fmt: skip


@pytest.mark.parametrize(
    ("wanted", "changes", "fits"),
    [
        (Failed(names=("shop.*",)), {}, True),
        (Failed(names=("mail.*",)), {}, False),
        (Failed(names=("mail.*",)), {"name": None}, True),
        (Failed(exceptions=("KeyError", "X")), {}, True),
        (Failed(exceptions=("Value*",)), {}, False),
        (Failed(exceptions=("Value*",)), {"result": ValueError()}, True),
        (Failed(exceptions=("Value*",)), {"result": None}, False),
        (Failed(ids=frozenset(["1"])), {}, True),
        (Failed(ids=frozenset(["2"])), {}, False),
        (Failed(older_than=3000), {}, True),
        (Failed(older_than=4000), {}, False),
        (Failed(newer_than=4000), {}, True),
        (Failed(newer_than=3000), {}, False),
        (Failed(newer_than=4000), {"date_done": None}, False),
        (Failed(names=("shop.*",)), {"status": "SUCCESS"}, False),
    ],
)
def test_failures(wanted: Failed, changes: dict[str, Any], fits: bool) -> None:
    wanted.check()
    assert wanted.fits("1", {**META, **changes}, NOW) is fits


def test_no_condition_and_a_wrong_one() -> None:
    for wanted, text in ((Failed(), "no condition"), (Failed(older_than=-1), "older_than: must not be below 0")):
        with pytest.raises(PreconditionFailed, match=text):
            wanted.check()


def test_times_of_end() -> None:
    assert parse_time("2026-11-21T09:00:00Z") == parse_time("2026-11-21T09:00:00") == parse_time(NOW) == NOW
    assert parse_time(NOW.replace(tzinfo=None)) == NOW
    assert parse_time("soon") is None and parse_time(None) is None


def test_names_of_exceptions() -> None:
    assert exception_name(OSError()) == "OSError" and exception_name({"exc_type": "A"}) == "A"
    assert exception_name({}) is None and exception_name("text") is None


def test_names_that_come_close() -> None:
    known = ["shop.sales_report", "shop.send_reminder", "celery.backend_cleanup"]
    assert alike("shop.sale_report", known) == "Close to it: shop.sales_report, shop.send_reminder. "
    assert alike("xyz", known) == ""
