# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Queue operations on a million real messages against the usual ways.

Runs in the Celery environment. Our operations run in a fresh process each, whose peak memory is taken; another client
measures its worst PING meanwhile.
"""

from __future__ import annotations

import base64
import json
import multiprocessing
import multiprocessing.synchronize
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

TOP = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(TOP / "tests"), str(TOP / "tests" / "output" / "collections")]

import redis
from common import celery, say, tell

from support import RedisServer, celery_venv, link_collection

link_collection()

from ansible_collections.celeryops.runbook.plugins.module_utils.engine.queues import RedisQueues, Selection

MILLION = 1_000_000
QUEUES = 1_000
SAMPLE = 200_000


def result(name: str, baseline: float, ours: float, unit: str, conditions: str, **more: Any) -> dict[str, Any]:
    ratio = ours / baseline if unit.endswith("/s") else baseline / ours
    entry = {"name": name, "baseline": round(baseline, 2), "ours": round(ours, 2), "ratio": round(ratio, 1),
             "unit": unit, "conditions": conditions, **more}  # fmt: skip
    say(f"{name}: {entry['baseline']} against {entry['ours']} {unit}; {conditions}")
    return entry


def templates(client: Any, port: int) -> list[bytes]:
    """Messages of 1 KB as Celery itself writes them: nine of one task, one of another."""
    app = celery(port)
    found = []
    for number in range(10):
        name = "shop.send_mail" if number == 9 else "shop.make_report"
        app.send_task(name, args=["report", 7], kwargs={"customer": 4711}, queue="template",
                      headers={"celeryops_published": time.time()})  # fmt: skip
        raw = client.rpop("template")
        assert isinstance(raw, bytes)
        found.append(raw)
    app.close()
    return found


def fill(client: Any, port: int, queue: str, count: int) -> None:
    parts = []
    for raw in templates(client, port):
        document = json.loads(raw)
        raw = raw.replace(b'"routing_key": "template"', b'"routing_key": "%b"' % queue.encode())
        identity, tag = document["headers"]["id"].encode(), document["properties"]["delivery_tag"].encode()
        parts.append(raw.replace(tag, b"%(tag)036d").split(identity))
    pieces = [[piece.split(b"%(tag)036d") for piece in part] for part in parts]
    joined: list[tuple[list[bytes], bytes, bytes]] = []
    for piece in pieces:
        *before, last = piece
        joined.append(([part[0] for part in before], last[0], last[1]))
    for start in range(0, count, 1000):
        batch = []
        for number in range(start, min(start + 1000, count)):
            heads, last, end = joined[number % 10]
            identity = b"%036d" % number
            batch.append(identity.join([*heads, last]) + identity + end)
        client.lpush(queue, *batch)
    assert client.llen(queue) == count


def watch(port: int, stop: multiprocessing.synchronize.Event, worst: Any) -> None:
    client = redis.Redis(port=port)
    while not stop.is_set():
        started = time.perf_counter()
        client.ping()
        worst.value = max(worst.value, (time.perf_counter() - started) * 1000)
        time.sleep(0.001)


def watched(port: int, call: Callable[[], Any]) -> tuple[Any, float]:
    stop, worst = multiprocessing.Event(), multiprocessing.Value("d", 0.0)
    process = multiprocessing.Process(target=watch, args=(port, stop, worst))
    process.start()
    time.sleep(0.3)
    try:
        answer = call()
    finally:
        stop.set()
        process.join()
    return answer, worst.value


def ours(port: int, operation: str, *arguments: str) -> tuple[dict[str, Any], float]:
    command = [sys.executable, __file__, "--child", operation, str(port), *arguments]

    def call() -> dict[str, Any]:
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        return dict(json.loads(done.stdout))

    return watched(port, call)


def child(operation: str, port: int, *arguments: str) -> None:
    queues = RedisQueues(redis.Redis(port=port))
    started = time.perf_counter()
    if operation == "purge":
        outcome = queues.purge(*arguments)
    elif operation == "purge-gzip":
        outcome = queues.purge(*arguments[:2], compress_level=int(arguments[2]))
    elif operation == "drop":
        outcome = queues.drop(arguments[0], Selection(tasks=("shop.send_mail",)), arguments[1])
    else:
        outcome = queues.move(*arguments)
    seconds = time.perf_counter() - started
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"count": outcome.count, "seconds": seconds, "memory": memory, "bytes": outcome.bytes}))


def bench_depth(client: Any, port: int) -> dict[str, Any]:
    names = [f"queue-{number}" for number in range(QUEUES)]
    pipe = client.pipeline(transaction=False)
    for number, name in enumerate(names):
        pipe.lpush(name if number % 3 else f"{name}\x06\x166", b"x")
    pipe.execute()
    queues = RedisQueues(client)
    times = []
    rows: dict[str, Any] = {}
    for _turn in range(7):
        started = time.perf_counter()
        rows = queues.depth(names)
        times.append((time.perf_counter() - started) * 1000)
    assert sum(row["depth"] for row in rows.values()) == QUEUES
    keys = [f"{name}{suffix}" for name in names[:25] for suffix in ("", "\x06\x163", "\x06\x166", "\x06\x169")]
    started = time.perf_counter()
    for key in keys:
        subprocess.run(["redis-cli", "-p", str(port), "llen", key], check=True, stdout=subprocess.DEVNULL)
    baseline = (time.perf_counter() - started) * 1000 * QUEUES * 4 / len(keys)
    client.flushall()
    return result(
        "queue-depth",
        baseline,
        statistics.median(times),
        "ms",
        f"{QUEUES} queues x 4 priority steps, engine time, median of 7 (worst {max(times):.1f}); baseline redis-cli "
        f"llen on {len(keys)} keys, scaled",
    )


def bench_million(client: Any, port: int, directory: str) -> list[dict[str, Any]]:
    results = []
    environment = {**os.environ, "CELERY_BROKER_URL": f"redis://127.0.0.1:{port}/0"}

    say(f"{SAMPLE:,} messages for the usual ways")
    fill(client, port, "base", SAMPLE)
    size = client.strlen("x") or len(client.lindex("base", 0))
    app = celery(port)
    sent = 3000
    with app.producer_pool.acquire() as producer:
        started = time.perf_counter()
        for _number in range(sent):
            message = json.loads(client.rpop("base"))
            args, kwargs, _embed = json.loads(base64.b64decode(message["body"]))
            app.send_task(message["headers"]["task"], args, kwargs, queue="moved", producer=producer)
        send_rate = sent / (time.perf_counter() - started)
    app.close()
    judged = 20_000
    started = time.perf_counter()
    for _number in range(judged):
        raw = client.rpop("base")
        if json.loads(raw)["headers"]["task"] != "shop.send_mail":
            client.lpush("kept", raw)
    filter_rate = judged / (time.perf_counter() - started)
    count = client.llen("base")
    started = time.perf_counter()
    with open(os.path.join(directory, "base"), "wb") as out:
        subprocess.run(["redis-cli", "-p", str(port), "--raw", "lrange", "base", "0", "-1"], check=True, stdout=out)
    subprocess.run(
        [str(celery_venv() / "bin" / "celery"), "-A", "labapp", "purge", "-f", "-Q", "base"],
        check=True, cwd=TOP / "tests", env=environment, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    purge_rate = count / (time.perf_counter() - started)
    os.unlink(os.path.join(directory, "base"))
    client.flushall()

    say(f"{MILLION:,} messages of {size} B")
    fill(client, port, "src", MILLION)

    _none, quiet = watched(port, lambda: time.sleep(3))

    def ratio(name: str, base: float, what: str, done: dict[str, Any], stall: float, looked: int, how: str) -> None:
        results.append(
            result(
                name,
                base,
                looked / done["seconds"],
                "messages/s",
                f"{looked:,} messages of {size} B, {what}; worst PING of another client {stall:.1f} ms "
                f"({quiet:.1f} with nothing going on), peak memory "
                f"{done['memory']:.0f} MB; baseline {how}",
                stall_ms=round(stall, 1),
                quiet_ms=round(quiet, 1),
                memory_mb=round(done["memory"], 1),
            )
        )

    done, stall = ours(port, "move", "src", "dst")
    assert done["count"] == MILLION == client.llen("dst"), done
    last = json.loads(client.lindex("dst", -1))
    assert last["properties"]["delivery_info"]["routing_key"] == "dst"
    ratio("queue-move", send_rate, "routing rewritten", done, stall, MILLION, f"pop, decode and send_task of {sent}")

    done, stall = ours(port, "drop", "dst", os.path.join(directory, "drop"))
    assert done["count"] == MILLION // 10 and client.llen("dst") == MILLION * 9 // 10, done
    ratio("queue-filter", filter_rate, "one in ten picked by task name and saved", done, stall, MILLION,
          f"pop, json.loads and push back of {judged:,}")  # fmt: skip

    left = client.llen("dst")
    done, stall = ours(port, "purge", "dst", os.path.join(directory, "purge"))
    assert done["count"] == left and client.llen("dst") == 0, done
    ratio("queue-purge", purge_rate, "saved, synced and verified first", done, stall, left,
          f"redis-cli lrange to a file and celery purge of {count:,}")  # fmt: skip

    for level in (1, 6):
        os.unlink(os.path.join(directory, "purge"))
        fill(client, port, "src", SAMPLE)
        done, stall = ours(port, "purge-gzip", "src", os.path.join(directory, "purge"), str(level))
        what = f"saved with compress_level {level}: {done['bytes'] / 1e6:.0f} MB of {SAMPLE * size / 1e6:.0f}, alike"
        ratio(f"queue-purge-gzip-{level}", purge_rate, what, done, stall, SAMPLE, "as queue-purge")
    return results


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2], int(sys.argv[3]), *sys.argv[4:])
        return
    load = os.getloadavg()[0]
    with (
        RedisServer() as server,
        tempfile.TemporaryDirectory() as directory,
        redis.Redis(port=server.port) as client,
    ):
        results = [bench_depth(client, server.port), *bench_million(client, server.port, directory)]
    tell(results, load)


if __name__ == "__main__":
    main()
