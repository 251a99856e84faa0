# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Probes: what workers note, and what becomes of it when it is counted."""

from __future__ import annotations

import pytest

from ansible_collections.celeryops.runbook.plugins.module_utils.engine import probes


def noted(*rows: tuple[str, int, float]) -> list[tuple[str, int, float]]:
    return probes.parse("".join(probes.note(*row).decode() for row in rows))


def test_a_note_survives_and_half_a_line_is_none() -> None:
    rows = [("b", 4, 1795324512.125), ("e", 4, 1795324512.25)]
    text = "".join(probes.note(*row).decode() for row in rows)
    assert probes.parse(text) == rows
    assert probes.parse(text + "b 5 17953") == rows
    assert probes.parse("b x 1.0\n\nb 5\n") == []


@pytest.mark.parametrize("run", ["", "abc", "../../etc", "a/b/c/d", "ABCD", "a" * 33])
def test_a_run_is_no_path(run: str) -> None:
    with pytest.raises(ValueError, match="run: "):
        probes.directory("/var/lib/celery-shop", run)


def test_lost_is_what_was_acknowledged_and_done_nowhere() -> None:
    one = probes.summary({"fast-1": noted(("b", 0, 10.0), ("e", 0, 10.1), ("b", 1, 11.0))})
    two = probes.summary(
        {"fast-1": noted(("b", 1, 15.0), ("e", 1, 15.1), ("b", 2, 15.2), ("b", 9, 15.3), ("e", 9, 16.0))}
    )
    found = probes.account(dict.fromkeys(range(5), 9.0), 2, [one, two])
    assert (found["sent"], found["done"], found["refused"]) == (5, 2, 2)
    # Begun and cut off, and never begun. What was refused and done all the same counts for nothing.
    assert (found["lost"], found["lost_late"], found["lost_begun"]) == ([2, 3, 4], [3], [2])
    assert found["run_twice"] == [1] and found["gap"] == 4.0


def test_the_same_probe_begun_twice_on_one_host() -> None:
    one = probes.summary({"a": noted(("b", 7, 1.0)), "b": noted(("b", 7, 2.0), ("e", 7, 2.1))})
    assert one["begun"] == {"7": 2} and probes.account({7: 0.5}, 0, [one])["run_twice"] == [7]


def test_first_begun_after_a_moment_by_instance() -> None:
    rows = {"a": noted(("b", 0, 1.0), ("b", 1, 6.0), ("b", 2, 5.0)), "b": noted(("b", 3, 2.0))}
    assert probes.summary(rows, 4.0)["first"] == {"a": 5.0}


def test_nothing_was_sent() -> None:
    assert probes.account({}, 0, [probes.summary({})])["gap"] == 0.0
