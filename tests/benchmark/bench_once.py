# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What an idempotent class costs a task that does nothing, and how long its lock takes.

Runs in the Celery environment.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import statistics
import sys
import threading
import time
from pathlib import Path
from typing import Any

TOP = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(TOP / "tests"))

import redis
from common import say, tell

from support import RedisServer, Worker, workers

KINDS = {"plain": "once.noop", "once": "once.noop_once"}
ROUNDS = 30
TASKS = 1000
CHECKS = 10_000
THREADS = 4
# Enough to keep the main process of a worker at work, which is what limits its throughput. With fewer the two round
# trips of the lock are waited for, and cost a task that does nothing more.
SLOTS = int(os.environ.get("SLOTS") or 4)


def burst(app: Any, client: Any, kind: str, first: int) -> float:
    """Tasks a second of one worker, from a queue that appears all at once. No two tasks are the same work."""
    stage = f"stage-{kind}"
    with app.producer_pool.acquire(block=True) as producer:
        for number in range(first, first + TASKS):
            app.send_task(KINDS[kind], args=[number], queue=stage, ignore_result=True, producer=producer)
    assert client.llen(stage) == TASKS
    began = time.perf_counter()
    client.rename(stage, kind)
    while client.llen(kind) or client.hlen("unacked"):
        time.sleep(0.002)
    return TASKS / (time.perf_counter() - began)


def overhead(app: Any, server: RedisServer) -> dict[str, Any]:
    """Two workers, of which one is at work: they take turns, so that what else the machine does strikes both."""
    environment = {"LABAPP_NOTES_URL": server.url(1)}
    fleet = [
        Worker(server.url(), f"{kind}@bench", queues=kind, app="labonce", concurrency=SLOTS, environment=environment,
               arguments=("--include", "celeryops.worker") if kind == "once" else ())
        for kind in KINDS
    ]  # fmt: skip
    rates: dict[str, list[float]] = {kind: [] for kind in KINDS}
    with contextlib.closing(redis.Redis.from_url(server.url())) as client, workers(*fleet):
        for number in range(ROUNDS + 1):
            for kind in sorted(KINDS, reverse=bool(number % 2)):
                rate = burst(app, client, kind, number * TASKS)
                if number:  # the first warms up
                    rates[kind].append(rate)
            say(", ".join(f"{kind} {found[-1]:.0f}/s" for kind, found in rates.items() if found) or "warm")
        assert client.exists("celeryops:once-skipped") == 0
        assert sum(1 for _key in client.scan_iter("celeryops:once:once.noop_once:*", 1000)) == (ROUNDS + 1) * TASKS
    plain, ours = (statistics.median(rates[kind]) for kind in KINDS)
    costs = [1 - o / p for p, o in zip(rates["plain"], rates["once"], strict=True)]
    return {
        "name": "once-overhead", "baseline": round(plain), "ours": round(ours), "ratio": round(ours / plain, 3),
        "unit": "tasks/s", "overhead_percent": round(100 * statistics.median(costs), 1),
        "conditions": f"a task that does nothing, plain Celery against IdempotentTask and the whole runtime, prefork "
        f"{SLOTS}, {ROUNDS} rounds of {TASKS} tasks in turn, medians; overhead {100 * statistics.median(costs):.1f} % "
        f"(target below 7), by round {' '.join(f'{100 * cost:.0f}' for cost in costs)}",
    }  # fmt: skip


def check(app: Any) -> dict[str, Any]:
    """Taking a lock, as a task does it, in four threads at once."""
    from celeryops import once
    from celeryops.engine.once import RUNNING, Record

    keeper = once.Keeper(app)
    assert keeper.redis is not None
    times: list[float] = []

    def take(thread: int) -> None:
        mine = []
        for number in range(CHECKS // THREADS):
            record = Record(RUNNING, f"{thread}-{number}", "task", "node", keeper.process, time.time())
            began = time.perf_counter()
            # Half of them are new, half are repetitions.
            keeper.redis.take(f"celeryops:once:check:global:{thread}-{number // 2}", record)
            mine.append(1000 * (time.perf_counter() - began))
        times.extend(mine)

    threads = [threading.Thread(target=take, args=(number,)) for number in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(times) == CHECKS
    p50, p99 = (statistics.quantiles(times, n=100)[at] for at in (49, 98))
    return {
        "name": "once-check", "baseline": 2.0, "ours": round(p99, 3), "ratio": round(2.0 / p99, 1), "unit": "ms",
        "conditions": f"p99 of {len(times)} locks taken by {THREADS} threads, half of them repetitions "
        f"(median {p50:.3f} ms); the baseline is the target",
    }  # fmt: skip


def main() -> int:
    with RedisServer() as server:
        os.environ.update(
            CELERY_BROKER_URL=server.url(), CELERY_RESULT_BACKEND=server.url(), LABAPP_NOTES_URL=server.url(1)
        )
        app = importlib.import_module("labonce").app
        results = [check(app), overhead(app, server)]
    for entry in results:
        say(f"{entry['name']}: {entry['baseline']} against {entry['ours']} {entry['unit']}; {entry['conditions']}")
    tell(results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
