# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
from __future__ import annotations

from typing import Any

from celery import shared_task

from .book import recorded


@shared_task(name="shop.add_points", bind=True)
@recorded
def add_points(self: Any, order: int) -> None:
    """New with v2."""
