# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

from collections.abc import Iterator

import pytest
from fleet.story import Story
from fleet_support import installed


@pytest.fixture(scope="session")
def shop() -> Iterator[Story]:
    with installed("test") as story:
        yield story


@pytest.fixture
def released(shop: Story) -> Iterator[Story]:
    """Whatever the test did, afterwards nothing is paused and every queue is consumed."""
    yield shop
    if shop.redis("EXISTS", "celeryops:pauses") == "1":
        shop.play("queue_resume", celeryops_queues=shop.redis("HKEYS", "celeryops:pauses").split())
