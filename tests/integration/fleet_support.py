# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""One fleet of real systemd hosts for all tests of playbooks: the shop, installed by `site` with release v1.

The fixture is `shop`. Each test leaves the fleet as it found it: v1, all workers and beat running.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator

import pytest
from fleet.story import TOP, Story, wheelhouse

HOSTS = ("worker1", "worker2")


@pytest.fixture(scope="session")
def shop() -> Iterator[Story]:
    subprocess.run([str(TOP / "scripts" / "venv"), "5.7"], check=True, stdout=subprocess.DEVNULL)
    wheelhouse()
    story = Story("test")
    try:
        for release in ("v1", "v2"):
            story.make_release(release)
        story.up()
        story.play("site", celeryops_release="v1")
        yield story
    finally:
        story.close()
        story.down()


def consumers(story: Story, queue: str) -> list[str]:
    """The nodes that consume a queue, asked with Celery's own tools."""
    asked = story.celery("answer = app.control.inspect(timeout=1).active_queues() or {}")
    return sorted(node for node, queues in asked.items() if queue in [one["name"] for one in queues])


@pytest.fixture
def released(shop: Story) -> Iterator[Story]:
    """Whatever the test did, afterwards nothing is paused and every queue is consumed."""
    yield shop
    if shop.redis("EXISTS", "celeryops:pauses") == "1":
        shop.play("queue_resume", celeryops_queues=shop.redis("HKEYS", "celeryops:pauses").split())
