# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
from __future__ import annotations

import time
from typing import Any

from celery import shared_task

from celeryops.tasks import IdempotentTask

from .book import recorded
from .version import SELFTEST_ANSWER


@shared_task(name="shop.charge_card", bind=True, acks_late=True)
@recorded
def charge_card(self: Any, order: int, seconds: float = 0.01) -> None:
    time.sleep(seconds)


@shared_task(name="shop.reserve_stock", bind=True)
@recorded
def reserve_stock(self: Any, order: int, seconds: float = 0.005) -> None:
    time.sleep(seconds)


@shared_task(name="shop.update_cart", bind=True)
@recorded
def update_cart(self: Any, order: int, seconds: float = 0.002) -> None:
    time.sleep(seconds)


@shared_task(name="shop.price_line", bind=True, ignore_result=False)
@recorded
def price_line(self: Any, price: int, pieces: int) -> int:
    """Header of the chord: prices one line of an order."""
    return price * pieces


@shared_task(name="shop.settle_order", bind=True)
@recorded
def settle_order(self: Any, lines: list[int]) -> int:
    """Body of the chord: adds the lines up."""
    return sum(lines)


@shared_task(name="shop.send_reminder", bind=True)
@recorded
def send_reminder(self: Any, order: int) -> None:
    """Sent with an ETA."""


@shared_task(name="shop.sales_report", bind=True, acks_late=True)
@recorded
def sales_report(self: Any, seconds: float = 1.5, megabytes: int = 0) -> None:
    """The slow one, and where many sales are reported the large one."""
    sales = bytearray(megabytes * 2**20)
    time.sleep(seconds)
    del sales


@shared_task(name="shop.expire_carts", bind=True)
@recorded
def expire_carts(self: Any) -> None:
    time.sleep(0.01)


@shared_task(name="shop.refresh_catalogue", bind=True)
@recorded
def refresh_catalogue(self: Any) -> None:
    time.sleep(0.05)


@shared_task(name="shop.close_day", bind=True, base=IdempotentTask, once_by=["day"], once_category="reports")
@recorded
def close_day(self: Any, day: str, seconds: float = 0.5) -> None:
    """Done once a day, however often and by whomever it is sent."""
    time.sleep(seconds)


@shared_task(name="shop.selftest", bind=True, ignore_result=False)
def selftest(self: Any) -> str:
    """What the canary runs on every worker after a deploy."""
    if SELFTEST_ANSWER is None:
        raise RuntimeError("the price list is empty")
    return SELFTEST_ANSWER
