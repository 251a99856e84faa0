#!/usr/bin/env python3
# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Send the shop's mixed work at a steady rate and write every id that must be run into the ledger.

Runs in a virtual environment with Celery and celeryops. Environment: CELERY_BROKER_URL, CELERY_RESULT_BACKEND (for the
chords), SHOP_LEDGER_URL. Ends after --seconds or at SIGTERM and prints what was sent as JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import pathlib
import random
import signal
import sys
import time
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent / "src"))

TICK = 0.02
LINES_OF_AN_ORDER = 4


class Load:
    def __init__(self, ledger_url: str, slow: float, seed: int | None) -> None:
        import redis
        from shop.book import SENT
        from shop.celery import app

        import celeryops.sentinel
        import celeryops.signing
        import celeryops.stamp  # noqa: F401

        self.app = app
        self.key = SENT
        self.ledger = redis.Redis.from_url(ledger_url, socket_timeout=30)
        # The last of them: it is full, or a replica.
        errors = redis.exceptions
        self.away = (errors.ConnectionError, errors.TimeoutError, errors.ResponseError)
        self.random = random.Random(seed)
        self.slow = slow
        self.order = 0
        self.sent = 0
        self.refused = 0
        self.records: list[str] = []
        kinds: list[tuple[Any, float]] = [
            (self.update_cart, 30),
            (self.reserve_stock, 20),
            (self.charge_card, 22),
            (self.send_receipt, 14),
            (self.send_reminder, 8),
            (self.expire_carts, 3),
            (self.place_order, 1),
            (self.sales_report, slow * 100),
        ]
        self.kinds = [kind for kind, _weight in kinds]
        self.weights = [weight for _kind, weight in kinds]

    def note(self, task_id: str, task: str, published: float | None, eta: float | None = None) -> None:
        record = {"id": task_id, "task": task, "published": published, "eta": eta}
        self.records.append(json.dumps(record, separators=(",", ":")))
        self.sent += 1

    def send(self, name: str, *args: Any, eta_in: float | None = None, **options: Any) -> None:
        now = time.time()
        result = self.app.send_task(name, args=args, countdown=eta_in, **options)
        self.note(result.id, name, now, now + eta_in if eta_in else None)

    def update_cart(self) -> None:
        self.send("shop.update_cart", self.order, priority=self.random.choice((0, 3, 6, 9)))

    def reserve_stock(self) -> None:
        self.send("shop.reserve_stock", self.order, priority=self.random.choice((0, 3)))

    def charge_card(self) -> None:
        self.send("shop.charge_card", self.order, priority=0)

    def send_receipt(self) -> None:
        self.send("shop.send_receipt", self.order)

    def send_reminder(self) -> None:
        self.send("shop.send_reminder", self.order, eta_in=self.random.uniform(2, 5))

    def expire_carts(self) -> None:
        self.send("shop.expire_carts", priority=9)

    def sales_report(self) -> None:
        self.send("shop.sales_report", self.random.uniform(1, 2))

    def place_order(self) -> None:
        from celery import chord

        now = time.time()
        lines = [self.app.signature("shop.price_line", args=(price, 2)) for price in range(LINES_OF_AN_ORDER)]
        body = chord(lines, app=self.app)(self.app.signature("shop.settle_order"))
        for line in body.parent.results:
            self.note(line.id, "shop.price_line", now)
        # The last line's worker publishes the body; its own header tells when.
        self.note(body.id, "shop.settle_order", None)

    def one(self) -> None:
        from celery.result import denied_join_result
        from kombu.exceptions import OperationalError

        self.order += 1
        try:
            with denied_join_result():  # nobody waits here: spares a subscription for every result
                self.random.choices(self.kinds, self.weights)[0]()
        # AttributeError: after a refused message kombu 5.7 may go on with the connection that it has just taken apart.
        except (OperationalError, ConnectionError, AttributeError, *self.away) as exc:
            self.refused += 1
            print(f"load: not sent: {type(exc).__name__}", file=sys.stderr)

    def flush(self) -> None:
        """What Redis does not take is kept for the next time."""
        if self.records:
            with contextlib.suppress(*self.away):
                self.ledger.rpush(self.key, *self.records)
                self.records.clear()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", type=float, default=100, help="tasks a second (%(default)s)")
    parser.add_argument("--seconds", type=float, help="default: until SIGTERM")
    parser.add_argument("--slow", type=float, default=0.005, help="share of slow tasks, 1 to 2 s each (%(default)s)")
    parser.add_argument("--seed", type=int, help="repeat the same draw")
    options = parser.parse_args()
    for name in ("CELERY_BROKER_URL", "CELERY_RESULT_BACKEND", "SHOP_LEDGER_URL"):
        if not os.environ.get(name):
            parser.error(f"the environment variable {name} is not set")
    if options.rate <= 0:
        parser.error("--rate must be above 0")
    stop: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda signum, frame: stop.append(signum))
    load = Load(os.environ["SHOP_LEDGER_URL"], options.slow, options.seed)
    begun = time.monotonic()
    while not stop and (options.seconds is None or time.monotonic() - begun < options.seconds):
        due = (time.monotonic() - begun) * options.rate
        while load.sent + load.refused < due and not stop:
            load.one()
        load.flush()
        time.sleep(TICK)
    while load.records:
        load.flush()
        time.sleep(TICK)
    seconds = time.monotonic() - begun
    print(
        json.dumps(
            {
                "sent": load.sent,
                "refused": load.refused,
                "seconds": round(seconds, 1),
                "rate": round(load.sent / seconds, 1),
                "cpu_seconds": round(time.process_time(), 1),
            }
        ),
        flush=True,
    )
    os._exit(0)  # results of Celery still held at the interpreter's end complain there


if __name__ == "__main__":
    main()
