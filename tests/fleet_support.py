# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Real systemd hosts with the shop on them, for the tests of playbooks.

tests/integration and tests/game_day have a fleet each, their fixture `shop`. Each test leaves the fleet as it found it:
v1, all workers and beat running.
"""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator

from fleet.story import TOP, Story, wheelhouse

HOSTS = ("worker1", "worker2")


@contextlib.contextmanager
def installed(name: str) -> Iterator[Story]:
    """The fleet NAME with release v1 of the shop; it is removed at the end."""
    subprocess.run([str(TOP / "scripts" / "venv"), "5.7"], check=True, stdout=subprocess.DEVNULL)
    wheelhouse()
    story = Story(name)
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
