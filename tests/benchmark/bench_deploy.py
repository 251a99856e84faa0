# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""How long tasks wait in their queue during a deploy: rolling_deploy, the runbooks' stop-all, and no deploy; one run.

Needs root and podman: it brings up three systemd hosts and removes them.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

TOP = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(TOP / "tests"))

from common import on_hosts, say
from fleet.story import Story, StoryError, wheelhouse

RATE = 100
STEADY_SECONDS = 15


def measure(story: Story) -> list[dict[str, Any]]:
    say("hosts and release v1")
    wheelhouse()
    for release in ("v1", "v2"):
        story.make_release(release)
    story.up()
    story.play("site", celeryops_release="v1")
    load = story.start("load", "--rate", str(RATE))
    time.sleep(3)
    say("steady state")
    steady_from = time.time()
    time.sleep(STEADY_SECONDS)
    steady_until = time.time()
    say("rolling_deploy v1 -> v2")
    rolling = story.play("rolling_deploy", celeryops_release="v2")
    # Its backlog, if it left one, must not count against the other.
    sent = load.stop()
    story.ledger("--wait", "120")
    load = story.start("load", "--rate", str(RATE))
    time.sleep(5)
    say("stop-all deploy v2 -> v1")
    stop_all = story.play(str(TOP / "tests" / "benchmark" / "stop_all.yml"), celeryops_release="v1")
    load.stop()
    ledger = story.ledger("--wait", "180")
    waits = {
        "steady": story.window(steady_from, steady_until)["wait"],
        "rolling": story.window(rolling.began, rolling.ended)["wait"],
        "stop-all": story.window(float(stop_all.stats["stop_all_began"]), stop_all.ended)["wait"],
    }
    if ledger["lost"] or ledger["run_twice"]:
        raise StoryError(f"lost {len(ledger['lost'])}, run twice {len(ledger['run_twice'])}")
    milliseconds = {name: round(1000 * wait["p99"], 1) for name, wait in waits.items()}
    worst = {name: round(1000 * wait["max"], 1) for name, wait in waits.items()}
    conditions = (
        f"3 systemd hosts in podman on {os.cpu_count()} cores, {sent['rate']:.0f} mixed tasks/s, one run; "
        f"{ledger['sent']} sent, lost 0, run twice 0; worst waits {worst} ms; rolling_deploy took "
        f"{rolling.seconds:.0f} s; waits are of the whole run of rolling_deploy, and of stop-all from the first stop on"
    )
    ours = milliseconds["rolling"]
    return [
        {
            "name": name,
            "baseline": milliseconds[baseline],
            "ours": ours,
            "ratio": round(milliseconds[baseline] / max(ours, 0.1), 2),
            "unit": "ms, p99 queue wait",
            "conditions": f"baseline: {baseline}; {conditions}",
        }
        for name, baseline in (("deploy-wait", "stop-all"), ("deploy-wait-vs-steady", "steady"))
    ]


if __name__ == "__main__":
    sys.exit(on_hosts(measure))
