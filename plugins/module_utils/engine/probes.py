# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Probe tasks: what was sent, and what workers noted on their own hosts. The broker is not asked.

Every host has a directory of the run below the workers' state directory. A worker appends to INSTANCE.notes when a
probe begins and when it ends, the sender to `sent` when the broker has acknowledged one.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

TASKS = ("celeryops.probe", "celeryops.probe_late")  # every second probe is acknowledged late
RUN = re.compile(r"[a-z0-9]{4,32}")
SENT, REFUSED = "sent", "refused"
NOTES = ".notes"
# A note has some 30 bytes: 2 million probes.
MOST = 64 << 20


def directory(state: str, run: str) -> str:
    if not RUN.fullmatch(run):
        raise ValueError(f"run: {run!r} is no name of a run; use 4 to 32 small letters and digits")
    return f"{state}/probe-{run}"


def late(number: int) -> bool:
    return number % 2 == 1


def note(phase: str, number: int, when: float) -> bytes:
    return f"{phase} {number} {when:.3f}\n".encode()


def parse(text: str) -> list[tuple[str, int, float]]:
    """The notes of one instance, or what was sent. Half a line, of a process that was killed, is no note."""
    found = []
    for line in text.splitlines(keepends=True):
        fields = line.split()
        if line.endswith("\n") and len(fields) == 3 and fields[1].isdigit():
            found.append((fields[0], int(fields[1]), float(fields[2])))
    return found


def summary(notes: Mapping[str, Sequence[tuple[str, int, float]]], since: float = 0.0) -> dict[str, Any]:
    """What one host noted, by instance: short enough to travel."""
    begun: Counter[int] = Counter()
    done: set[int] = set()
    times: list[float] = []
    first: dict[str, float] = {}
    for instance, rows in notes.items():
        for phase, number, when in rows:
            if phase == "e":
                done.add(number)
                continue
            begun[number] += 1
            times.append(when)
            if when >= since:
                first[instance] = min(when, first.get(instance, when))
    return {
        "begun": {str(number): count for number, count in sorted(begun.items())},
        "done": sorted(done),
        "times": sorted(times),
        "first": first,
    }


def account(sent: Mapping[int, float], refused: int, summaries: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """What became of the probes. Lost: acknowledged by the broker, and done on no host."""
    begun: Counter[int] = Counter()
    done: set[int] = set()
    times: list[float] = []
    for one in summaries:
        begun.update({int(number): count for number, count in one["begun"].items()})
        done.update(one["done"])
        times += one["times"]
    lost = sorted(set(sent) - done)
    times.sort()
    gaps = [after - before for before, after in pairwise(times)]
    return {
        "sent": len(sent),
        "refused": refused,
        "done": len(done & set(sent)),
        "lost": lost,
        "lost_late": [number for number in lost if late(number)],
        "lost_begun": [number for number in lost if begun[number]],
        "run_twice": sorted(number for number, count in begun.items() if count > 1),
        "gap": round(max(gaps, default=0.0), 1),
    }
