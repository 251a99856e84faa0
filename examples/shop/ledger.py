#!/usr/bin/env python3
# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Count the shop's tasks by id: sent, done, lost, run twice, and how long they waited in their queue.

Reads the ledger at --url or SHOP_LEDGER_URL and prints JSON. Waits are begin - max(publish, eta); with --since and
--until (unix seconds) only those of tasks that fell due in between. The counts always cover the whole ledger. A task
not done 60 s (--grace) after it fell due counts as lost; with --wait every task not done after that many seconds does.
Exit code 1 if anything is lost or was run twice.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import os
import sys
import time
from collections.abc import Iterator
from typing import Any

SENT = "shop:ledger:sent"
RUNS = "shop:ledger:runs"
CHUNK = 10_000


def _seconds(when: Any) -> float | None:
    if when is None or isinstance(when, (int, float)):
        return when
    return datetime.datetime.fromisoformat(when.replace("Z", "+00:00")).timestamp()


def _percentile(ordered: list[float], share: float) -> float | None:
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))] if ordered else None


def _waits(values: list[float]) -> dict[str, Any]:
    values.sort()
    figures = {"p50": _percentile(values, 0.5), "p99": _percentile(values, 0.99), "max": values[-1] if values else None}
    return {"count": len(values)} | {name: None if v is None else round(v, 4) for name, v in figures.items()}


def _where(run: dict[str, Any]) -> str:
    when = datetime.datetime.fromtimestamp(run["time"], datetime.timezone.utc).isoformat(timespec="milliseconds")
    return f"{run['node']} {run['release']} {when}"


def _longest_gap(times: list[float]) -> float | None:
    times.sort()
    return round(max(b - a for a, b in itertools.pairwise(times)), 3) if len(times) > 1 else None


class Ledger:
    def __init__(self, url: str) -> None:
        import redis

        self.redis = redis.Redis.from_url(url, socket_timeout=30)
        self.offset = {SENT: 0, RUNS: 0}
        self.sent: dict[str, dict[str, Any]] = {}
        self.begun: dict[str, list[dict[str, Any]]] = {}
        self.done: set[str] = set()

    def _new(self, key: str) -> Iterator[dict[str, Any]]:
        while chunk := self.redis.lrange(key, self.offset[key], self.offset[key] + CHUNK - 1):
            self.offset[key] += len(chunk)
            yield from map(json.loads, chunk)

    def read(self) -> None:
        """Take in what was written since the last call."""
        for record in self._new(SENT):
            self.sent[record["id"]] = record
        for record in self._new(RUNS):
            if record["phase"] == "begin":
                runs = self.begun.setdefault(record["id"], [])
                if record not in runs:  # written again because the answer to the first time was lost
                    runs.append(record)
            else:
                self.done.add(record["id"])

    def missing(self) -> list[str]:
        return [task_id for task_id in self.sent if task_id not in self.done]

    def wait(self, seconds: float) -> bool:
        """True once every task sent is done."""
        end = time.monotonic() + seconds
        while True:
            self.read()
            if not self.missing():
                return True
            if time.monotonic() >= end:
                return False
            time.sleep(0.25)

    def _due(self, task_id: str) -> float | None:
        sent = self.sent.get(task_id, {})
        first = self.begun.get(task_id, [{}])[0]
        published = first.get("published") or sent.get("published")
        return None if published is None else max(published, _seconds(first.get("eta")) or sent.get("eta") or 0)

    def report(self, *, since: float | None = None, until: float | None = None, grace: float = 60) -> dict[str, Any]:
        now = time.time()
        missing = self.missing()
        # Of a chord's body that was never published no time is known: it is late when the ledger's last task is.
        last = max((record["published"] or 0 for record in self.sent.values()), default=0)
        lost = [task_id for task_id in missing if (self._due(task_id) or last) + grace < now]
        waits: dict[str, list[float]] = {}
        begins: dict[str, list[float]] = {}
        releases: dict[str, int] = {}
        twice = []
        for task_id, runs in self.begun.items():
            if len({run["retries"] for run in runs}) < len(runs):
                twice.append(f"{task_id} {runs[0]['task']}: {', '.join(map(_where, runs))}")
            due = self._due(task_id)
            first = runs[0]
            release = first["release"] or "unknown"
            releases[release] = releases.get(release, 0) + 1
            if due is None or (since is not None and due < since) or (until is not None and due > until):
                continue
            waits.setdefault(first["queue"], []).append(max(0.0, first["time"] - due))
            begins.setdefault(first["queue"], []).append(first["time"])
        return {
            "sent": len(self.sent),
            "done": len(self.sent) - len(missing),
            "lost": lost,
            "run_twice": twice,
            "still_waiting": len(missing) - len(lost),
            "not_from_load": sum(1 for task_id in self.begun if task_id not in self.sent),
            "wait": _waits([value for values in waits.values() for value in values]),
            "wait_by_queue": {queue: _waits(values) for queue, values in sorted(waits.items())},
            "longest_gap": _longest_gap([moment for moments in begins.values() for moment in moments]),
            "longest_gap_by_queue": {queue: _longest_gap(moments) for queue, moments in sorted(begins.items())},
            "by_release": releases,
        }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default=os.environ.get("SHOP_LEDGER_URL"), help="default: SHOP_LEDGER_URL")
    parser.add_argument("--since", type=float)
    parser.add_argument("--until", type=float)
    parser.add_argument("--wait", type=float, metavar="SECONDS", help="first wait until everything sent is done")
    parser.add_argument("--grace", type=float, default=60, metavar="SECONDS")
    options = parser.parse_args()
    if not options.url:
        parser.error("no ledger: give --url or set SHOP_LEDGER_URL")
    ledger = Ledger(options.url)
    if options.wait is None:
        ledger.read()
    else:
        ledger.wait(options.wait)
    grace = options.grace if options.wait is None else float("-inf")
    report = ledger.report(since=options.since, until=options.until, grace=grace)
    print(json.dumps(report, indent=2))
    return 1 if report["lost"] or report["run_twice"] else 0


if __name__ == "__main__":
    sys.exit(main())
