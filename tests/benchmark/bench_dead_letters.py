# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Requeue of dead letters against a loop of send_task, and what the runtime package costs a task that ends well.

Runs in the Celery environment.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import socket
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

TOP = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(TOP / "tests"), str(TOP / "tests" / "output" / "collections")]

import redis
from common import celery, say, tell

from celeryops._environment import PARTS
from support import RedisServer, Worker, link_collection, wait_until

link_collection()

from ansible_collections.celeryops.runbook.plugins.module_utils.engine.deadletters import (
    DeadLetters,
    DeadSelection,
    Letter,
    Record,
)

LETTERS = 200_000
BY_HAND = 3_000
TASKS = 6_000
ROUNDS = 9
FEW = ("notify", "watchdog", "stamp", "deadletter")
TRACEBACK = "Traceback (most recent call last):\n" + '  File "/srv/shop/src/shop/tasks.py", line 31, in send\n' * 9


def template(client: Any, app: Any, queue: str, task: str, **options: Any) -> bytes:
    """A message as Celery itself writes it."""
    app.send_task(task, queue=queue, **options)
    raw = client.rpop(queue)
    assert isinstance(raw, bytes)
    return raw


def fill(client: Any, queue: str, raw: bytes, identity: bytes, count: int) -> None:
    for start in range(0, count, 1000):
        client.lpush(queue, *(raw.replace(identity, b"%036d" % number) for number in range(start, start + 1000)))
    assert client.llen(queue) == count


def bench_requeue(client: Any, port: int) -> dict[str, Any]:
    app = celery(port)
    raw = template(client, app, "mail", "shop.send_mail", args=["report", 7], kwargs={"customer": 4711},
                   headers={"celeryops_published": time.time()})  # fmt: skip
    document = json.loads(raw)
    message = SimpleNamespace(
        body=base64.b64decode(document["body"]), content_type="application/json", content_encoding="utf-8",
        headers=document["headers"], properties=document["properties"],
    )  # fmt: skip
    record = Record(time.time(), "exception", "TimeoutError", "silent", TRACEBACK, "n@h", "mail", "", "mail", 0, "v7")
    letter, identity = Letter.of(message, record, "").compose(), document["headers"]["id"].encode()

    fill(client, "mail.dead", letter, identity, BY_HAND)
    with app.producer_pool.acquire() as producer:
        started = time.perf_counter()
        for _number in range(BY_HAND):
            found = json.loads(client.rpop("mail.dead"))
            args, kwargs, _embed = json.loads(base64.b64decode(found["body"]))
            app.send_task(found["headers"]["task"], args, kwargs, queue="mail", producer=producer)
        by_hand = BY_HAND / (time.perf_counter() - started)
    app.close()

    rates = []
    for _turn in range(3):
        client.flushall()
        fill(client, "mail.dead", letter, identity, LETTERS)
        done = DeadLetters(client).requeue("mail.dead", DeadSelection())
        assert done.count == LETTERS == client.llen("mail"), done
        rates.append(LETTERS / done.elapsed)
    client.flushall()
    ours = statistics.median(rates)
    say(f"dead-letter-requeue: {by_hand:.0f} against {ours:.0f} a second")
    return {
        "name": "dead-letter-requeue", "baseline": round(by_hand, 1), "ours": round(ours, 1),
        "ratio": round(ours / by_hand, 1), "unit": "messages/s",
        "conditions": f"{LETTERS:,} entries of {len(letter)} B, all of a queue, median of 3 ({min(rates):,.0f} to "
                      f"{max(rates):,.0f}); baseline pop, decode and send_task of {BY_HAND:,}",
    }  # fmt: skip


def run(server: RedisServer, client: Any, raw: bytes, identity: bytes, environment: dict[str, str] | None) -> float:
    """Tasks a second of one worker on a queue that is full when it starts, the first and last tenth left out. Without
    an environment it is plain Celery."""
    client.flushall()
    fill(client, "celery", raw, identity, TASKS)
    arguments = () if environment is None else ("--include", "celeryops.worker")
    low, high = TASKS // 10, TASKS * 9 // 10
    with Worker(server.url(), "bench@lab", app="labnoop", concurrency=1, arguments=arguments,
                environment={"CELERY_RESULT_BACKEND": "", **(environment or {})}):  # fmt: skip
        wait_until(lambda: client.llen("celery") <= high, 60, interval=0.005)
        first, left = time.perf_counter(), client.llen("celery")
        wait_until(lambda: client.llen("celery") <= low, 120, interval=0.005)
        last, rest = time.perf_counter(), client.llen("celery")
    return float((left - rest) / (last - first))


def bench_overhead(server: RedisServer, client: Any) -> list[dict[str, Any]]:
    app = celery(server.port)
    raw = template(client, app, "celery", "lab.noop", headers={"celeryops_published": time.time()})
    app.close()
    identity = json.loads(raw)["headers"]["id"].encode()
    with tempfile.TemporaryDirectory() as directory, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as inbox:
        notify = os.path.join(directory, "notify")
        inbox.bind(notify)
        # As systemd does: nobody must wait for room in the socket.
        threading.Thread(target=drain, args=(inbox,), daemon=True).start()
        full = {"NOTIFY_SOCKET": notify, "WATCHDOG_USEC": "30000000"}
        few = {**full, "CELERYOPS_DISABLE": ",".join(sorted(set(PARTS) - set(FEW)))}
        cases: list[tuple[str, dict[str, str] | None]] = [("plain", None), ("few", few), ("full", full)]
        rates: dict[str, list[float]] = {name: [] for name, _environment in cases}
        run(server, client, raw, identity, None)
        for turn in range(ROUNDS):
            # The order changes, so that a drift of the machine meets all alike.
            for name, environment in (*cases[turn % 3 :], *cases[: turn % 3]):
                rates[name].append(run(server, client, raw, identity, environment))
    return [
        overhead("runtime-overhead", rates["plain"], rates["few"], f"the parts {', '.join(FEW)}"),
        overhead("runtime-overhead-full", rates["plain"], rates["full"], "all parts"),
    ]


def drain(inbox: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while inbox.recv(4096):
            pass


def overhead(name: str, plain: list[float], ours: list[float], what: str) -> dict[str, Any]:
    percent = 100 * (1 - statistics.median(ours) / statistics.median(plain))
    pairs = sorted(100 * (1 - mine / other) for mine, other in zip(ours, plain, strict=True))
    say(f"{name}: {statistics.median(plain):.0f} against {statistics.median(ours):.0f} tasks/s, {percent:.1f} %")
    return {
        "name": name, "baseline": round(statistics.median(plain), 1), "ours": round(statistics.median(ours), 1),
        "ratio": round(statistics.median(ours) / statistics.median(plain), 3), "unit": "tasks/s",
        "conditions": f"no-op tasks, prefork with one process, {what} on against plain Celery, medians of {len(plain)} "
                      f"runs in turn of {TASKS:,} stamped tasks: {percent:.1f} % slower; single pairs "
                      f"{pairs[0]:.1f} to {pairs[-1]:.1f} %",
        "overhead_percent": round(percent, 2),
    }  # fmt: skip


def main() -> None:
    load = os.getloadavg()[0]
    with RedisServer() as server, redis.Redis(port=server.port) as client:
        results = [bench_requeue(client, server.port), *bench_overhead(server, client)]
    tell(results, load)


if __name__ == "__main__":
    main()
