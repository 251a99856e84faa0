# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What signing costs a task that does nothing: sent by one process, run by one worker, with keys and without.

Runs in the Celery environment.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

TOP = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(TOP / "tests")]

import redis
from common import say, tell

from celeryops.engine import signing
from support import TESTS, RedisServer, Worker, wait_until, workers

TASKS = 4000
ROUNDS = 5
SEND = """
import sys, time, celeryops.stamp, celeryops.signing
from labapp import app
with app.producer_pool.acquire(block=True) as producer:
    began = time.process_time()
    for n in range(int(sys.argv[2])):
        app.send_task("lab.add", (n, n), queue=sys.argv[1], producer=producer, ignore_result=True)
print(time.process_time() - began)
"""


def cpu(pid: int) -> float:
    """Seconds of processor time that a process and its children have used."""
    own = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return (int(own[11]) + int(own[12])) / os.sysconf("SC_CLK_TCK") + sum(cpu(int(child)) for child in children)


def one_round(server: RedisServer, client: Any, queue: str, keys: dict[str, str]) -> tuple[float, float]:
    """Seconds of processor time to send a task and to run it. The worker is started in front of the full queue."""
    environment = {"CELERY_BROKER_URL": server.url(), "CELERY_RESULT_BACKEND": "", **keys}
    done = subprocess.run(
        [sys.executable, "-c", SEND, queue, str(TASKS)],
        cwd=TESTS, env={**os.environ, **environment}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    worker = Worker(
        server.url(), f"{queue}@bench", queues=queue, concurrency=1, environment=environment,
        arguments=("--include", "celeryops.worker", "--prefetch-multiplier", "64"),
    )  # fmt: skip
    worker.command[worker.command.index("INFO")] = "WARNING"
    worker.ready = ""
    with workers(worker):
        # A tenth of them warms it up.
        wait_until(lambda: client.llen(queue) <= TASKS * 0.9, 60, "the first tasks", 0.002)
        left, began = client.llen(queue) + client.hlen("unacked"), cpu(worker.pid)
        wait_until(lambda: not client.llen(queue) and not client.hlen("unacked"), 120, "the end", 0.002)
        seconds = (cpu(worker.pid) - began) / left
        assert "refused" not in worker.log.read_text()
    return float(done.stdout) / TASKS, seconds


def of_itself(keys: signing.Keys) -> tuple[float, float]:
    """Microseconds to sign and to judge a message of 200 bytes."""
    headers: dict[str, Any] = {"task": "lab.add", "id": "0" * 36, "eta": None, "timelimit": [None, None], "group": None}
    content, body, number = ("application/json", "utf-8"), b"x" * 200, 20_000

    def each(call: Any) -> float:
        began = time.perf_counter()
        for _number in range(number):
            call()
        return (time.perf_counter() - began) / number * 1e6

    made = each(lambda: signing.sign(keys, headers, content, body))
    headers[signing.HEADER] = signing.sign(keys, headers, content, body)
    return made, each(lambda: signing.judge(keys, headers, content, body))


def bench() -> list[dict[str, Any]]:
    found: dict[str, list[tuple[float, float]]] = {"plain": [], "signed": []}
    with RedisServer() as server, tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "signing.json"
        keys = signing.check([{"id": "bench", "secret": "b" * 64}], True, "bench")
        path.touch(mode=0o600)
        path.write_text(keys.dump())
        client = redis.Redis(port=server.port)
        for number in range(ROUNDS):
            for kind in ("plain", "signed") if number % 2 else ("signed", "plain"):
                environment = {signing.VARIABLE: str(path)} if kind == "signed" else {}
                found[kind].append(one_round(server, client, f"{kind}{number}", environment))
                say(f"{kind}: {found[kind][-1][0] * 1e6:.0f} us to send, {found[kind][-1][1] * 1e6:.0f} us to run")
        made, judged = of_itself(keys)
    sent, ran = (
        {kind: statistics.median(row[part] for row in rows) * 1e6 for kind, rows in found.items()} for part in (0, 1)
    )
    say(f"signing {made:.1f} microseconds, judging {judged:.1f}")
    conditions = (
        f"microseconds of processor time a no-op task, without keys and with; medians of {ROUNDS} rounds of {TASKS} in "
        f"turn, one sender, then one prefork worker with one process; of itself signing takes {made:.1f} and judging "
        f"{judged:.1f}"
    )
    return [
        {
            "name": name, "baseline": round(row["plain"], 1), "ours": round(row["signed"], 1),
            "ratio": round(row["signed"] / row["plain"], 3), "unit": "us", "conditions": conditions,
        }
        for name, row in (("signing-overhead-send", sent), ("signing-overhead", ran))
    ]  # fmt: skip


def main() -> None:
    tell(bench())


if __name__ == "__main__":
    main()
