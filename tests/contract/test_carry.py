# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What a worker holds when it loses Redis: each task runs once, and none waits for the visibility timeout."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from celeryops.engine import tasks
from celeryops.engine.connection import Broker, BrokerSpec
from support import RedisServer, Worker, wait_until

PREFIX = "team:"
HELD = f"{PREFIX}unacked"
# 2 run, 4 are reserved, 2 wait for their time.
RUN, AHEAD, LATER = 2, 4, 2


@dataclass
class Lab:
    server: RedisServer
    notes: RedisServer
    broker: Broker
    worker: Worker

    def noted(self, what: str) -> list[str]:
        return self.notes.cli("LRANGE", f"lab:{what}", "0", "-1").split()

    def send(self, seconds: float, countdown: float | None = None) -> str:
        return tasks.send(self.broker, tasks.Order("lab.noted", "celery", args=[seconds], countdown=countdown))


def restarted(server: RedisServer) -> None:
    """Those that run end while it is away."""
    server.stop()
    time.sleep(4)
    server.start()


def dropped(server: RedisServer) -> None:
    for kind in ("normal", "pubsub"):
        server.cli("CLIENT", "KILL", "TYPE", kind)


@contextlib.contextmanager
def fleet(directory: Path, pool: str = "prefork", **environment: str) -> Iterator[Lab]:
    """A worker for two tasks at a time, the Redis that it loses, and another one for what it notes."""
    with (
        RedisServer("--appendonly", "yes", "--appendfsync", "always", directory=directory) as server,
        RedisServer() as notes,
        Broker(BrokerSpec.build(url=server.url(), transport_options={"global_keyprefix": PREFIX})) as broker,
        Worker(
            server.url(), "h@lab", concurrency=RUN, pool=pool,
            arguments=("--include", "celeryops.worker", "--prefetch-multiplier", "3"),
            environment={
                "LABAPP_KEY_PREFIX": PREFIX, "LABAPP_NOTES_URL": notes.url(), "CELERY_RESULT_BACKEND": notes.url(1),
                **environment,
            },
        ) as worker,
    ):  # fmt: skip
        yield Lab(server, notes, broker, worker)


@pytest.mark.parametrize(
    ("pool", "off"),
    [("prefork", ""), ("prefork", "carry"), ("threads", ""), ("gevent", ""), ("eventlet", "")],
    ids=["with the part", "as Celery does it", "threads", "gevent", "eventlet"],
)
@pytest.mark.parametrize("lose", [restarted, dropped])
def test_what_is_held_is_run_once_and_soon(
    tmp_path: Path, lose: Callable[[RedisServer], None], pool: str, off: str
) -> None:
    with fleet(tmp_path, pool, CELERYOPS_DISABLE=off) as lab:
        running = [lab.send(3) for _task in range(RUN)]
        wait_until(lambda: sorted(lab.noted("begun")) == sorted(running), 20, "two run")
        later, ahead = [lab.send(0, 9) for _task in range(LATER)], [lab.send(0) for _task in range(AHEAD)]
        ids = [*running, *later, *ahead]
        # A greenlet pool takes one more than it has room for, and until there is room the worker takes no other.
        held = RUN + LATER + 1 if pool in ("gevent", "eventlet") else len(ids)
        wait_until(lambda: lab.server.cli("HLEN", HELD) == str(held), 10, "it holds them")
        pid = lab.worker.pid
        began = time.monotonic()
        lose(lab.server)
        wait_until(lambda: set(lab.noted("done")) >= set(running), 20, "those that ran end")
        if off:
            time.sleep(12)
            assert lab.server.cli("HLEN", HELD) != "0" or len(lab.noted("begun")) > len(ids), (
                "nothing was done for them"
            )
            return
        wait_until(lambda: set(lab.noted("done")) == set(ids), 20, "all are run")
        print(f"all run {time.monotonic() - began:.1f} s after the loss")
        time.sleep(1)
        assert sorted(lab.noted("begun")) == sorted(ids), lab.worker.log.read_text()
        received = re.findall(r"lab\.noted\[([^]]+)\] received", lab.worker.log.read_text())
        # The other pools have what the worker takes.
        assert [one for one in received if one in ahead] == ahead * (2 if pool == "prefork" else 1), "the order stays"
        wait_until(lambda: (lab.server.cli("HLEN", HELD), lab.server.cli("ZCARD", f"{HELD}_index")) == ("0", "0"), 3)
        # And it takes as many at a time as before.
        more = [lab.send(1) for _task in range(RUN)]
        wait_until(lambda: set(lab.noted("begun")) >= set(more), 10, "more run")
        assert not set(more) & set(lab.noted("done"))
        assert lab.worker.process and lab.worker.process.poll() is None and lab.worker.pid == pid


def test_what_a_process_has_is_kept_through_a_second_loss(tmp_path: Path) -> None:
    """It was given two tasks and is not heard to have begun them, as on a busy host, when Redis goes and goes again."""
    with fleet(tmp_path) as lab:
        children = Path(f"/proc/{lab.worker.pid}/task/{lab.worker.pid}/children").read_text().split()
        for child in children:
            os.kill(int(child), signal.SIGSTOP)
        try:
            ids = [lab.send(0) for _task in range(RUN)]
            wait_until(lambda: lab.server.cli("HLEN", HELD) == str(RUN), 10, "they are held")
            for connected in (2, 3):
                time.sleep(1)
                dropped(lab.server)
                wait_until(
                    lambda count=connected: lab.worker.log.read_text().count("Connected to") == count, 20, "it is back"
                )
        finally:
            for child in children:
                os.kill(int(child), signal.SIGCONT)
        wait_until(lambda: set(lab.noted("done")) == set(ids), 20, "they are run")
        wait_until(lambda: lab.server.cli("HLEN", HELD) == "0", 5, "and are acknowledged")
        assert sorted(lab.noted("begun")) == sorted(ids), lab.worker.log.read_text()


def test_a_primary_that_becomes_a_replica_ends_no_worker(tmp_path: Path) -> None:
    """As at a failover: whoever waits for a message is answered that the instance has changed."""
    with fleet(tmp_path) as lab:
        running = [lab.send(3)]
        wait_until(lambda: lab.noted("begun") == running and "cmd=brpop" in lab.server.cli("CLIENT", "LIST"), 20, "one")
        lab.server.cli("REPLICAOF", "127.0.0.1", "1")
        wait_until(lambda: "takes no writes" in lab.worker.log.read_text(), 10, "it notices")
        lab.server.cli("REPLICAOF", "NO", "ONE")
        ids = [*running, lab.send(0)]
        wait_until(lambda: sorted(lab.noted("done")) == sorted(ids), 20, "both are run")
        wait_until(lambda: lab.server.cli("HLEN", HELD) == "0", 5, "and are acknowledged")
        assert sorted(lab.noted("begun")) == sorted(ids), lab.worker.log.read_text()
        assert lab.worker.process and lab.worker.process.poll() is None


def test_what_was_cancelled_goes_back(tmp_path: Path) -> None:
    """Celery cancels it if the application wants that, and leaves its message to the visibility timeout."""
    with fleet(tmp_path, LABAPP_CANCEL="yes") as lab:
        running = [lab.send(5) for _task in range(RUN)]
        wait_until(lambda: sorted(lab.noted("begun")) == sorted(running), 20, "two run")
        restarted(lab.server)
        wait_until(lambda: sorted(lab.noted("done")) == sorted(running), 20, "they run again")
        assert len(lab.noted("begun")) == 2 * RUN
        wait_until(lambda: lab.server.cli("HLEN", HELD) == "0", 5, "and are acknowledged")
