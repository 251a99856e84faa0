# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Queue operations that are killed at every step, and under load, against a real redis-server."""

from __future__ import annotations

import os
import signal
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import redis
from queue_support import STEPS, content, fill, ids, own_keys, raw, sample

from ansible_collections.celeryops.runbook.plugins.module_utils.engine import savefile
from ansible_collections.celeryops.runbook.plugins.module_utils.engine.errors import PreconditionFailed
from ansible_collections.celeryops.runbook.plugins.module_utils.engine.queues import RedisQueues, Selection
from support import RedisServer

OPERATIONS: dict[str, Callable[[RedisQueues, str], Any]] = {
    "purge": lambda queues, path: queues.purge("src", path),
    "drop": lambda queues, path: queues.drop("src", Selection(tasks=("b",)), path),
    "move": lambda queues, path: queues.move("src", "dst"),
    "move-some": lambda queues, path: queues.move("src", "dst", Selection(tasks=("b",))),
    "import": lambda queues, path: queues.import_(path, "src"),
}


def killed_before(step: int, operation: str, port: int, path: Path) -> bool:
    """Run the operation in a process of its own that ends by SIGKILL before this step. False if it came to its end."""
    left = step

    def tick(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal left
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)

        return call

    # A fork, not a new Python: some hundred of them are needed.
    child = os.fork()
    if child == 0:
        try:
            queues = RedisQueues(redis.Redis(port=port), batch_size=40)
            queues._run = tick(queues._run)  # type: ignore[method-assign]
            savefile.Writer.place = tick(savefile.Writer.place)  # type: ignore[method-assign]
            savefile.Writer.add = tick(savefile.Writer.add)  # type: ignore[method-assign]
            OPERATIONS[operation](queues, str(path))
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, -signal.SIGKILL), "its traceback is on stderr"
    return code != 0


@pytest.mark.parametrize("operation", list(OPERATIONS))
def test_killed_anywhere_nothing_is_lost_or_doubled(broker: RedisServer, tmp_path: Path, operation: str) -> None:
    """SIGKILL before every single step of an operation in turn; the same task run again completes it."""
    client = redis.Redis(port=broker.port)
    queues = RedisQueues(client, batch_size=40)
    kills = 0
    for point in range(200):
        client.flushall()
        path = tmp_path / f"save-{point}"
        before = sample(queues, 60)
        everything = ids(before[0] + before[6])
        if operation == "import":
            queues.purge("src", str(path))
        new = [raw(8000 + n) for n in range(3)]
        killed = killed_before(point, operation, broker.port, path)
        kills += killed
        if killed:
            interrupted = queues.interrupted("src")
            assert interrupted is None or interrupted["running"] is False
            fill(queues, "src", new)
            try:
                OPERATIONS[operation](queues, str(path))
            except PreconditionFailed as exc:
                # Killed after the very last step: all was done, so the file is complete and stays.
                assert "exists" in exc.msg and interrupted is None and savefile.verify(str(path)).count > 0
        waiting = [m for queue in ("src", "dst") for step in (0, 6) for m in content(queues, queue, step)]
        file = (
            [m for _step, batch in savefile.batches(str(path), lambda: 9) for m in batch]
            if path.exists() and operation != "import"
            else []
        )
        assert ids(waiting + file) == sorted(everything + (ids(new) if killed else [])), f"killed before step {point}"
        assert own_keys(queues) == [], f"killed before step {point}"
        assert len(list(tmp_path.glob("*.partial"))) == 0
        if not killed:
            break
    assert not killed and kills >= 6


def test_concurrent_consumers_lose_and_double_nothing(broker: RedisServer, tmp_path: Path) -> None:
    """Producers push and consumers pop as kombu does while messages are dropped, moved, purged and imported."""
    queues = RedisQueues(redis.Redis(port=broker.port), batch_size=50)
    stop = threading.Event()
    consumed: list[list[bytes]] = [[], [], []]
    produced: list[bytes] = []
    errors: list[BaseException] = []

    def consume(mine: list[bytes]) -> None:
        with redis.Redis(port=broker.port) as connection:
            while not stop.is_set():
                found = connection.brpop([queues.key("src", step) for step in STEPS], timeout=1)
                if found:
                    mine.append(found[1])

    def produce() -> None:
        with redis.Redis(port=broker.port) as connection:
            number = 100_000
            while not stop.is_set():
                messages = [raw(number + n, task="ab"[n % 2]) for n in range(20)]
                number += 20
                connection.lpush(queues.key("src", STEPS[number // 20 % 4]), *messages)
                produced.extend(messages)
                time.sleep(0.002)

    fill(queues, "src", [raw(n, task="ab"[n % 2]) for n in range(20_000)])
    produced += [raw(n, task="ab"[n % 2]) for n in range(20_000)]
    threads = [threading.Thread(target=consume, args=(mine,)) for mine in consumed]
    threads.append(threading.Thread(target=produce))
    for thread in threads:
        thread.start()
    saved: list[bytes] = []
    try:
        for turn in range(4):
            queues.drop("src", Selection(tasks=("a",)), str(tmp_path / f"drop-{turn}"))
            queues.move("src", "dst", Selection(tasks=("b",)), limit=500)
            fill(queues, "src", refill := [raw(1_000_000 + turn * 5000 + n, task="ab"[n % 2]) for n in range(5000)])
            produced += refill
            purged = queues.purge("src", str(tmp_path / f"purge-{turn}"))
            if turn % 2 and purged.count:
                queues.import_(str(tmp_path / f"purge-{turn}"), "src")
                os.unlink(tmp_path / f"purge-{turn}")
    except BaseException as exc:
        errors.append(exc)
    stop.set()
    for thread in threads:
        thread.join()
    assert errors == []
    for path in tmp_path.iterdir():
        saved += [m for _step, batch in savefile.batches(str(path), lambda: 500) for m in batch]
    waiting = [m for queue in ("src", "dst") for step in STEPS for m in content(queues, queue, step)]
    assert sum(map(len, consumed)) > 100 and saved and any(b'"dst"' in m for m in waiting)
    assert ids([m for mine in consumed for m in mine] + saved + waiting) == ids(produced)
