# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

from typing import Any

import pytest

from ansible_collections.celeryops.runbook.plugins.module_utils.engine.ledger import (
    BUCKETS,
    Account,
    account,
    bound,
    bucket,
    quantile,
)


def reply(pid: int, begun: int, ended: int, **waits: int) -> dict[str, Any]:
    return {"pid": pid, "since": 1.0, "begun": begun, "ended": ended, "waits": {k[1:]: n for k, n in waits.items()}}


@pytest.mark.parametrize("milliseconds", [0, 0.4, 1, 1.1, 2, 3, 10, 99, 1000, 86_400, 3_600_000, 20_000_000])
def test_a_bound_is_never_below_and_at_most_a_fifth_above(milliseconds: float) -> None:
    assert milliseconds * 0.995 <= bound(bucket(milliseconds)) <= max(1, milliseconds) * 1.2


def test_what_is_beyond_the_last_bucket_stays_in_it() -> None:
    assert bucket(1e12) == BUCKETS - 1


def test_quantile() -> None:
    assert quantile({}, 0.5) is None
    assert quantile({3: 98, 40: 1, 50: 1}, 0.5) == bound(3)
    assert quantile({3: 98, 40: 1, 50: 1}, 0.99) == bound(40)
    assert quantile({3: 98, 40: 1, 50: 1}, 1) == bound(50)


def test_what_happened_between_two_looks() -> None:
    before = {"a": reply(1, 100, 99, b0=90, b20=10), "b": reply(2, 50, 50, b0=50)}
    drained = [{"a": reply(1, 130, 130, b0=115, b20=15)}]
    now = {"a": reply(3, 7, 6, b8=7), "b": reply(2, 60, 60, b0=59, b30=1)}
    found = account(before, drained, now)
    assert (found.begun, found.ended, found.cut_off, found.uncounted) == (47, 47, 0, [])
    assert found.wait_tasks == 47
    assert (found.wait_p50_ms, found.wait_worst_ms) == (bound(0), bound(30))


def test_what_a_drained_worker_left_unfinished_was_cut_off() -> None:
    found = account({"a": reply(1, 10, 9)}, [{"a": reply(1, 20, 18)}], {})
    assert (found.begun, found.ended, found.cut_off) == (10, 9, 2)


def test_whose_figures_are_lost_is_named() -> None:
    before = {"killed": reply(1, 10, 9), "old": None, "gone-old": None}
    now = {"killed": reply(2, 4, 4), "old": None}
    found = account(before, [], now)
    assert found.uncounted == ["gone-old", "killed", "old"]
    assert (found.begun, found.wait_worst_ms) == (4, None)


def test_a_worker_without_a_ledger_that_got_one_is_counted_from_its_start() -> None:
    assert account({"a": None}, [], {"a": reply(2, 4, 4)}) == Account(begun=4, ended=4)


def test_a_surge_instance_that_came_and_went() -> None:
    found = account({}, [{"surge": reply(9, 5, 5, b2=5)}], {})
    assert (found.ended, found.cut_off, found.wait_worst_ms, found.uncounted) == (5, 0, bound(2), [])
