# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
from __future__ import annotations

from typing import Any

from celery import shared_task

from .book import recorded


@shared_task(name="shop.send_receipt", bind=True, acks_late=True)
@recorded
def send_receipt(self: Any, order: int) -> None:
    """A task of its own module, so that a bad release can lack it."""
