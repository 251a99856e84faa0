# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Who is silent, and who is merely busy."""

from __future__ import annotations

from typing import Any

import pytest

from ansible_collections.celeryops.runbook.plugins.module_utils.engine import silence, tasks
from ansible_collections.celeryops.runbook.plugins.module_utils.engine.errors import CeleryOpsError, ConnectionFailed
from ansible_collections.celeryops.runbook.plugins.module_utils.engine.fleet import (
    ANSWERED,
    SILENT,
    UNKNOWN,
    Fleet,
    Node,
)

LEDGER = silence.LEDGER


def node(*queues: str, state: str = ANSWERED, **replies: Any) -> Node:
    return Node(state, "worker", True, {"active_queues": [{"name": queue} for queue in queues], **replies})


def test_who_does_not_answer_or_consume_is_mute() -> None:
    fleet = Fleet(
        {
            "well": node("a", "b"),
            "deaf": node("a"),
            "gone": Node(SILENT, "worker", False),
            "unheard": Node(UNKNOWN, "worker", None),
        }
    )
    wanted = {name: ["a", "b"] for name in ("well", "deaf", "gone", "unheard", "never")}
    assert silence.mute(fleet, wanted, ()) == {
        "deaf": "does not consume b", **dict.fromkeys(("gone", "unheard", "never"), "does not answer")
    }  # fmt: skip
    assert "deaf" not in silence.mute(fleet, wanted, {"b": {}}), "it is paused"


@pytest.mark.parametrize(
    ("now", "why"),
    [
        (node(active=[], **{LEDGER: {"done": 7}}), "has no other work"),
        (node(active=[{"id": "1"}], **{LEDGER: {"done": 7}}), ""),
        (node(active=[], **{LEDGER: {"done": 8}}), ""),
        (Node(SILENT, "worker", None), "does not answer any more"),
        (None, "does not answer any more"),
    ],
)
def test_behind_a_backlog_work_is_proof_enough(now: Node | None, why: str) -> None:
    found = silence.resting(node(**{LEDGER: {"done": 7}}), now)
    assert why in found and bool(found) == bool(why)


def test_without_the_runtime_package_both_ledgers_are_missing() -> None:
    assert silence.resting(node(), node(active=[])) and not silence.resting(node(), node(active=[{"id": "1"}]))


def test_who_cannot_run_a_canary_is_not_held_against(monkeypatch: pytest.MonkeyPatch) -> None:
    def raised(error: CeleryOpsError) -> Any:
        def pairs(*_arguments: Any) -> Any:
            raise error

        monkeypatch.setattr(tasks, "pairs", pairs)
        return silence.unproved(None, None, ["a"], 1)  # type: ignore[arg-type]

    missing = [{"node": "a", "queue": "x"}, {"node": "a", "queue": "y"}, {"node": "b", "queue": "x"}]
    assert raised(tasks.CanaryFailed("late", missing=missing)) == ["a", "b"]
    assert raised(tasks.TaskUnknown("no canary")) == []
    with pytest.raises(ConnectionFailed):
        raised(ConnectionFailed("gone"))
