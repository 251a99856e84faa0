# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Which workers do not do their work although they run: who is to be restarted after the broker was away.

A worker that comes back by itself has done so within seconds of the broker answering. Behind a backlog a canary waits
its turn; then work that goes on is proof enough.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from . import pauses, tasks
from .connection import Broker
from .control import Control
from .errors import CeleryOpsError, ConnectionFailed
from .fleet import ANSWERED, Conditions, Fleet, Node, consumed_queues, observe, wait_for

LEDGER = "celeryops_ledger"


def mute(fleet: Fleet, wanted: Mapping[str, Sequence[str]], paused: Collection[str]) -> dict[str, str]:
    """Node -> why, of those that do not answer or do not consume what they are to. `wanted`: node -> queues."""
    found = {}
    for name, queues in wanted.items():
        node = fleet.nodes.get(name)
        if node is None or node.state != ANSWERED:
            found[name] = "does not answer"
            continue
        lacking = sorted({*queues} - {*consumed_queues(node.replies)} - {*paused})
        if lacking:
            found[name] = f"does not consume {', '.join(lacking)}"
    return found


def resting(before: Node, now: Node | None) -> str:
    """Why a worker that ran no canary is not merely busy, empty where it is at work."""
    if now is None or now.state != ANSWERED:
        return "ran no canary, and does not answer any more"
    if now.replies.get("active") or now.replies.get(LEDGER) != before.replies.get(LEDGER):
        return ""
    return "ran no canary, and has no other work"


def unproved(broker: Broker, control: Control, nodes: Sequence[str], timeout: float) -> list[str]:
    """Of these nodes those that ran no canary. Who cannot, as without the runtime package, is not among them."""
    try:
        tasks.prove(broker, tasks.pairs(control, None, nodes, None), tasks.Canary(), timeout)
    except ConnectionFailed:
        raise
    except CeleryOpsError as exc:
        missing: list[Mapping[str, Any]] = exc.data.get("missing", [])
        return list(dict.fromkeys(str(pair["node"]) for pair in missing))
    return []


def find(
    broker: Broker, control: Control, wanted: Mapping[str, Sequence[str]], patience: float, *, canaries: bool = True
) -> dict[str, str]:
    """Node -> why it is silent. `patience`: seconds to answer, and seconds to run a canary."""
    names = list(wanted)
    wait_for(control, Conditions(nodes=tuple(names)), destination=names, wait_timeout=patience)
    paused = pauses.view(broker) if broker.kind == "redis" else {}
    heard = observe(control, [("active_queues", {}), (LEDGER, {})], destination=names)
    found = mute(heard, wanted, paused)
    able = [name for name, node in heard.nodes.items() if name in wanted and consumed_queues(node.replies)]
    late = unproved(broker, control, able, patience) if able and canaries else []
    if late:
        now = observe(control, [("active", {}), (LEDGER, {})], destination=late)
        for name in late:
            why = resting(heard.nodes[name], now.nodes.get(name))
            if why:
                found.setdefault(name, why)
    return found
