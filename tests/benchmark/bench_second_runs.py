# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""How long a playbook takes that finds nothing to do, beside its first run; on three hosts whose fleet is healthy.

A second run that changes anything is an error. Needs root and podman: it brings up three hosts and removes them.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

TOP = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(TOP / "tests"))

from common import on_hosts, say
from fleet.story import Story, StoryError, wheelhouse

# In this order; what one leaves suits the next.
PLAYBOOKS: list[tuple[str, dict[str, Any]]] = [
    ("site", {"celeryops_release": "v1"}),
    ("health_check", {}),
    ("start", {}),
    ("rolling_deploy", {"celeryops_release": "v2"}),
    ("upgrade_celery", {"celeryops_release": "v2"}),
    ("scale", {"celeryops_pool": "fast", "celeryops_instances": 2}),
    ("tune", {"celeryops_pool": "fast", "celeryops_prefetch": 2}),
    ("queue_pause", {"celeryops_queues": ["email"], "celeryops_why": "bench"}),
    ("queue_resume", {"celeryops_queues": ["email"]}),
    ("queue_purge", {"celeryops_queue": "email", "celeryops_confirm": "email"}),
    ("queue_move", {"celeryops_queue": "email", "celeryops_to": "default"}),
    ("queue_rescue", {}),
    ("beat_ensure_single", {}),
    ("beat_reset", {}),
    ("beat_entry", {"celeryops_entry": "nightly-sales-report", "celeryops_why": "bench"}),
    ("beat_schedule", {}),
    ("lock_report", {}),
    ("lock_clear", {"celeryops_task": "shop.close_day", "celeryops_confirm": "shop.close_day"}),
    ("dead_letter_report", {}),
    ("dead_letter_requeue", {"celeryops_queue": "email"}),
    ("dead_letter_purge", {"celeryops_queue": "email", "celeryops_confirm": "email.dead"}),
    ("results_prune", {"celeryops_results_days": 30, "celeryops_confirm": "shop"}),
    ("broker_check", {}),
    ("redis_recover", {}),
    ("redis_clients", {}),
    ("redis_rotate_secret", {}),
    ("emergency_stop", {"celeryops_confirm": "shop"}),
    ("emergency_resume", {}),
    ("stop", {}),
]


def measure(story: Story) -> list[dict[str, Any]]:
    say("hosts")
    wheelhouse()
    for release in ("v1", "v2"):
        story.make_release(release)
    story.up()
    conditions = f"3 systemd hosts in podman on {os.cpu_count()} cores, no load, one run; baseline: the first run"
    results = []
    for name, variables in PLAYBOOKS:
        first, second = story.play(name, **variables), story.play(name, **variables)
        say(f"{name}: {first.seconds:.1f} s, then {second.seconds:.1f} s")
        if second.changed:
            raise StoryError(f"the second run of {name} changed something", second.log)
        results.append(
            {
                "name": f"second-run-{name}",
                "baseline": round(first.seconds, 1),
                "ours": round(second.seconds, 1),
                "ratio": round(first.seconds / second.seconds, 2),
                "unit": "s",
                "conditions": conditions,
            }
        )
    return results


if __name__ == "__main__":
    sys.exit(on_hosts(measure))
