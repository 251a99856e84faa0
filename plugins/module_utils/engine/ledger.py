# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What workers counted, as their inspect command celeryops_ledger tells it, and what happened between two looks.

A reply is {"pid", "since", "begun", "ended", "waits": {bucket: tasks}}: counted since the worker started. Bucket b
holds the tasks that waited at most `bound(b)` ms, from their publishing (or their ETA, if later) until a process
began them.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

COMMAND = "celeryops_ledger"
# A quarter of an octave each, from 1 ms to six hours: a bound is at most 19 % above what it stands for.
BUCKETS = 100


def bucket(milliseconds: float) -> int:
    if milliseconds <= 1:
        return 0
    return min(BUCKETS - 1, math.ceil(math.log2(milliseconds) * 4))


def bound(number: int) -> float:
    """Milliseconds, to three digits."""
    value = 2 ** (number / 4)
    return round(value, max(0, 2 - int(math.log10(value))))


def quantile(waits: Mapping[int, int], share: float) -> float | None:
    """The bound below which `share` of the tasks waited; None where no task did."""
    total = sum(waits.values())
    if not total:
        return None
    seen = 0
    for number in sorted(waits):
        seen += waits[number]
        if seen >= share * total:
            return bound(number)
    return bound(max(waits))


@dataclass
class Account:
    """`cut_off`: begun and not ended in workers that had been drained. `uncounted`: nodes whose figures are lost."""

    begun: int = 0
    ended: int = 0
    cut_off: int = 0
    wait_tasks: int = 0
    wait_p50_ms: float | None = None
    wait_p99_ms: float | None = None
    wait_worst_ms: float | None = None
    uncounted: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def account(
    before: Mapping[str, Mapping[str, Any]],
    drained: Iterable[Mapping[str, Mapping[str, Any]]],
    now: Mapping[str, Mapping[str, Any]],
) -> Account:
    """What all workers together did since `before`.

    Each argument maps nodes to replies; `drained` has the last replies of workers that held nothing any more and were
    then stopped. A worker that was there before and is in neither has taken its figures with it.
    """
    last: dict[tuple[str, int], Mapping[str, Any]] = {}
    stopped: set[tuple[str, int]] = set()
    for replies in drained:
        for node, reply in replies.items():
            if _counts(reply):
                last[node, reply["pid"]] = reply
                stopped.add((node, reply["pid"]))
    result = Account()
    for node, reply in now.items():
        if _counts(reply):
            last[node, reply["pid"]] = reply
        else:
            result.uncounted.append(node)
    first = {(node, reply["pid"]): reply for node, reply in before.items() if _counts(reply)}
    known = {node for node, _pid in last}
    result.uncounted += [node for node, reply in before.items() if not _counts(reply) and node not in known]
    result.uncounted += [node for node, pid in first if (node, pid) not in last]
    result.uncounted = sorted(set(result.uncounted))
    waits: Counter[int] = Counter()
    for key, reply in last.items():
        base = first.get(key, {})
        begun, ended = (int(reply[name]) - int(base.get(name, 0)) for name in ("begun", "ended"))
        result.begun += begun
        result.ended += ended
        if key in stopped:
            # What it had begun before the first look and ended since would else hide what it left unfinished.
            result.cut_off += int(reply["begun"]) - int(reply["ended"])
        waits.update({int(number): int(count) for number, count in reply["waits"].items()})
        waits.subtract({int(number): int(count) for number, count in base.get("waits", {}).items()})
    waits = +waits
    result.wait_tasks = sum(waits.values())
    result.wait_p50_ms, result.wait_p99_ms = quantile(waits, 0.5), quantile(waits, 0.99)
    result.wait_worst_ms = bound(max(waits)) if waits else None
    return result


def _counts(reply: Mapping[str, Any] | None) -> bool:
    return isinstance(reply, Mapping) and "pid" in reply and isinstance(reply.get("waits"), Mapping)
