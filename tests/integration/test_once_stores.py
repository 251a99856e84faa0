# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Idempotent tasks when time, numbers or the stores are against them."""

from __future__ import annotations

import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from once_support import drained, ids, lab, records, worker

from celeryops import once
from celeryops.engine.connection import Broker, BrokerSpec
from celeryops.engine.once import DONE, RUNNING, Record, RedisStore
from support import RedisServer, wait_until, workers

__all__ = ["lab"]


def test_run_longer_than_its_lease(lab: Any) -> None:
    """Renewed, never doubled: neither by others nor by its own message, which waits and is then left out."""
    fleet = (
        worker(lab.server, "long1", "long", CELERYOPS_ONCE_LEASE="1"),
        worker(lab.server, "long2", "long", pool="threads", CELERYOPS_ONCE_LEASE="1"),
    )
    with workers(*fleet):
        sent = lab.short.apply_async(args=["l", 4.0], queue="long")
        wait_until(lambda: ids(lab.server, "l", "begin"), 15, "its begin")
        own = lab.short.apply_async(args=["l", 4.0], queue="long", task_id=sent.id)
        deadline = time.monotonic() + 3.5
        while time.monotonic() < deadline:
            lab.short.apply_async(args=["l", 4.0], queue="long")
            time.sleep(0.5)
        assert own.get(timeout=20) == "l"
        wait_until(lambda: drained(lab.server, "long"), 20, "the queue")
        assert len(ids(lab.server, "l", "begin")) == len(ids(lab.server, "l")) == 1
        # The marker ends with its time to live; then it can be done again.
        wait_until(lambda: not records(lab.server, "once.short"), 10, "the end of the marker")
        assert lab.short.apply_async(args=["l", 4.0], queue="long").get(timeout=20) == "l"
        assert len(ids(lab.server, "l")) == 2


def test_thousand_repetitions_at_once(lab: Any) -> None:
    fleet = [worker(lab.server, f"many{number}", "many", concurrency=4) for number in range(2)]

    def send() -> None:
        for _number in range(250):
            lab.work.apply_async(args=["t", 0.3], queue="many", ignore_result=True)

    with workers(*fleet):
        threads = [threading.Thread(target=send) for _number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        wait_until(lambda: drained(lab.server, "many"), 60, "the queue")
        assert len(ids(lab.server, "t", "begin")) == len(ids(lab.server, "t")) == 1
    assert int(lab.server.cli("HGET", "celeryops:once-skipped", "once.work")) == 999


def test_switched_off(lab: Any) -> None:
    with worker(lab.server, "off", "off", CELERYOPS_DISABLE="once"):
        for _number in range(2):
            lab.work.apply_async(args=["off"], queue="off").get(timeout=20)
        assert len(ids(lab.server, "off")) == 2


def test_redis_away(lab: Any, tmp_path: Path) -> None:
    """The locks have a Redis of their own here, so that tasks still arrive: the database stands in."""
    database = f"sqlite:///{tmp_path}/locks.db"
    with RedisServer() as locks:
        stores = {"CELERYOPS_ONCE_REDIS": locks.url(), "CELERYOPS_ONCE_DATABASE": database}
        stores["CELERYOPS_ONCE_LEASE"] = "3"
        fleet = [worker(lab.server, f"sql{number}", "sql", **stores) for number in range(2)]
        with workers(*fleet):
            assert lab.work.apply_async(args=["before"], queue="sql").get(timeout=20) == "before done"
            # It goes while a task runs: its lock moves to the database, and so does its marker.
            moved = lab.work.apply_async(args=["moved", 4.0], queue="sql")
            wait_until(lambda: ids(lab.server, "moved", "begin"), 15, "its begin")
            locks.stop()
            time.sleep(2.0)
            for what, seconds in (("moved", 4.0), ("during", 0.5)):
                sent = [lab.work.apply_async(args=[what, seconds], queue="sql") for _number in range(10)]
                assert {one.get(timeout=30) for one in sent} <= {None, f"{what} done"}
            assert moved.get(timeout=20) == "moved done"
            for what in ("moved", "during"):
                assert len(ids(lab.server, what, "begin")) == len(ids(lab.server, what)) == 1, what
            # Back, and empty: what was done in between still counts.
            locks.start()
            time.sleep(5.5)
            for what, seconds in (("moved", 4.0), ("during", 0.5)):
                assert lab.work.apply_async(args=[what, seconds], queue="sql").get(timeout=20) == f"{what} done"
                assert len(ids(lab.server, what)) == 1
            assert lab.work.apply_async(args=["after"], queue="sql").get(timeout=20) == "after done"
            wait_until(locks.keys, 10, "a record in Redis")


def test_marker_whose_answer_never_came(lab: Any, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    """A short task does not wait for the answer to its marker; if Redis dies with it, the marker is written again."""
    with RedisServer() as locks:
        monkeypatch.setenv("CELERYOPS_ONCE_REDIS", locks.url())
        keep = once.Keeper(lab.app)

        def taken(what: str) -> once.Work:
            record = Record(RUNNING, f"token-{what}", f"id-{what}", "node", keep.process, time.time())
            work = once.Work(f"celeryops:once:short:global:{what}", record)
            assert keep.take(work) is None
            return work

        def state(work: once.Work) -> str:
            return locks.cli("HGET", work.key, "state")

        keep.end(taken("first"), DONE, 60.0)  # brings the script
        work = taken("asleep")
        assert locks.process
        locks.process.send_signal(signal.SIGSTOP)
        began = time.monotonic()
        keep.end(work, DONE, 60.0)
        assert time.monotonic() - began < once.TIMEOUT / 2, "it waited for a Redis that sleeps"
        locks.stop()
        time.sleep(once.CONFIRM + 1.0)  # tried once, in vain
        locks.start()
        assert not state(work), "it came back empty"
        wait_until(lambda: state(work) == DONE, once.REST + 5, "the marker")
        assert int(locks.cli("TTL", work.key)) > 55

        # Somebody else has begun it: it is theirs, and that is said when the answer is read.
        keep.end(taken("first again"), DONE, 60.0)
        work = taken("outrun")
        locks.cli("HSET", work.key, "token", "theirs")
        keep.end(work, DONE, 60.0)
        taken("next")
        assert state(work) == RUNNING and f"{work.key} ran longer than its lock" in caplog.text


def test_threads_that_begin_at_once(lab: Any) -> None:
    for turn in range(20):
        store = RedisStore(Broker(BrokerSpec.build(url=lab.server.url())))
        barrier = threading.Barrier(8)

        def take(number: int, turn: int = turn, store: RedisStore = store, barrier: Any = barrier) -> bool:
            barrier.wait()
            record = Record(RUNNING, f"{number}", "id", lease=1.0)
            return store.take(f"celeryops:once:threads:global:{turn}-{number}", record) is None

        with ThreadPoolExecutor(8) as pool:
            assert list(pool.map(take, range(8))) == [True] * 8


def test_both_stores_away(lab: Any) -> None:
    away = {
        "CELERYOPS_ONCE_REDIS": "redis://127.0.0.1:1/0",
        "CELERYOPS_ONCE_DATABASE": "sqlite:////nowhere/at/all/locks.db",
    }
    with worker(lab.server, "lost", "lost", **away) as lost:
        for _number in range(2):
            assert lab.work.apply_async(args=["lost"], queue="lost").get(timeout=20) == "lost done"
        assert len(ids(lab.server, "lost")) == 2  # policy run
        refused = lab.careful.apply_async(args=["refused"], queue="lost")
        wait_until(lambda: "comes again" in lost.log.read_text(), 10, "the refusal")
        time.sleep(1.0)
        assert ids(lab.server, "refused") == []
    # Not lost: with a store it is done.
    with worker(lab.server, "found", "lost"):
        refused.get(timeout=30)
    assert ids(lab.server, "refused") == [refused.id]


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"CELERYOPS_ONCE_LOST": "maybe"}, "CELERYOPS_ONCE_LOST is 'maybe'; choose run or refuse"),
        ({"CELERYOPS_ONCE_REDIS": "amqp://nowhere"}, "CELERYOPS_ONCE_REDIS: must be a Redis URL"),
        ({"CELERYOPS_ONCE_DATABASE": "nosuch://x:secret@y/z"}, "CELERYOPS_ONCE_DATABASE: SQLAlchemy cannot use it"),
    ],
)
def test_wrong_settings(lab: Any, environment: dict[str, str], words: str) -> None:
    """One clear error, and the work is not done without its lock."""
    with worker(lab.server, "wrong", "wrong", pool="solo", **environment) as wrong:
        sent = lab.work.apply_async(args=["wrong"], queue="wrong")
        with pytest.raises(Exception, match=words.partition(";")[0]):
            sent.get(timeout=20)
        wait_until(lambda: words in wrong.log.read_text(), 10, "the error in the log")
        assert "secret" not in wrong.log.read_text()
    assert ids(lab.server, "wrong") == []
