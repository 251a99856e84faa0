# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Tasks celeryops.probe and celeryops.probe_late: a worker notes on its own host when it begins and ends one.

A game day counts with them, whatever becomes of the broker. Where no game day has made a directory for the run, nothing
is written. The sender: python -m celeryops.probe --directory DIR --run RUN --queues a,b --rate 20.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import time
from typing import Any

from celery import shared_task

from .engine import probes

TICK = 0.02


def _note(phase: str, run: str, number: int) -> None:
    state = os.environ.get("STATE_DIRECTORY", "").partition(":")[0]
    instance = os.environ.get("CELERYOPS_INSTANCE", "worker")
    with contextlib.suppress(OSError, TypeError, ValueError):
        place = f"{probes.directory(state, run)}/{instance}{probes.NOTES}"
        handle = os.open(place, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o640)
        try:
            # One write: the processes of a pool share the file, and who is killed leaves no half of a line.
            if os.fstat(handle).st_size < probes.MOST:
                os.write(handle, probes.note(phase, number, time.time()))
        finally:
            os.close(handle)


def _work(run: str, number: int, seconds: float) -> None:
    _note("b", run, number)
    time.sleep(seconds)
    _note("e", run, number)


@shared_task(name=probes.TASKS[0], acks_late=False, ignore_result=True, max_retries=0)
def probe(run: str, number: int, seconds: float = 0.0) -> None:
    _work(run, number, seconds)


@shared_task(name=probes.TASKS[1], acks_late=True, reject_on_worker_lost=True, ignore_result=True, max_retries=0)
def probe_late(run: str, number: int, seconds: float = 0.0) -> None:
    _work(run, number, seconds)


class _Sender:
    """A number is used once: of a send that failed nobody knows whether the broker has it."""

    def __init__(self, options: argparse.Namespace) -> None:
        from .engine.connection import Broker, BrokerSpec

        self.options = options
        self.broker = Broker(BrokerSpec.build(environment=os.environ, connect_timeout=1.0, socket_timeout=3.0))
        self.number = self.refused = 0
        self.connection: Any = None
        self.producer: Any = None
        self.sent = os.open(os.path.join(options.directory, probes.SENT), os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o640)

    def connect(self) -> Any:
        if self.producer is None:
            app = self.broker.celery_app
            if self.broker.kind != "redis":
                app.conf.broker_transport_options = {**app.conf.broker_transport_options, "confirm_publish": True}
            self.connection = app.connection_for_write()
            self.producer = app.amqp.Producer(self.connection)
        return self.producer

    def forget(self) -> None:
        with contextlib.suppress(Exception):
            self.connection.release()
        self.producer = None

    def one(self) -> bool:
        from .engine.tasks import Order, send

        number, self.number = self.number, self.number + 1
        order = Order(
            probes.TASKS[probes.late(number)],
            # Both kinds into every queue, be their number even or odd.
            self.options.queues[number // 2 % len(self.options.queues)],
            kwargs={"run": self.options.run, "number": number, "seconds": self.options.seconds},
            task_id=f"probe-{self.options.run}-{number}",
        )
        try:
            send(self.broker, order, producer=self.connect(), ignore_result=True)
        except Exception as exc:  # whatever the broker's library raises
            self.refused += 1
            print(f"probe {number} was not taken: {type(exc).__name__}", file=sys.stderr, flush=True)
            self.forget()
            return False
        os.write(self.sent, probes.note("s", number, time.time()))
        return True

    def run(self, stop: list[int]) -> None:
        due, last = 0.0, time.monotonic()
        while not stop:
            now = time.monotonic()
            # What could not be sent while the broker was away is not made up for in one heap.
            due = min(due + (now - last) * self.options.rate, max(1.0, self.options.rate))
            last = now
            while due >= 1 and not stop:
                due -= 1
                if not self.one():
                    due = 0.0
                    time.sleep(0.2)
                    break
            time.sleep(TICK)
        with open(os.path.join(self.options.directory, probes.REFUSED), "w", encoding="ascii") as out:
            out.write(f"{self.refused}\n")


def main() -> int:
    parser = argparse.ArgumentParser(description="Send probes at a steady rate until SIGTERM.")
    parser.add_argument("--directory", required=True)
    parser.add_argument("--run", required=True)
    parser.add_argument("--queues", required=True, type=lambda text: text.split(","))
    parser.add_argument("--rate", type=float, default=20.0)
    parser.add_argument("--seconds", type=float, default=0.02, help="how long a probe works")
    stop: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda signum, frame: stop.append(signum))
    _Sender(parser.parse_args()).run(stop)
    return 0


if __name__ == "__main__":
    sys.exit(main())
