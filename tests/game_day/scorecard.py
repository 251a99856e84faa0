# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What each fault cost: a row a fault, rendered as the table of docs/game-day.md."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from fleet.story import LEDGER_DB, TOP, Story
from fleet_support import HOSTS

from support import wait_until

MARKS = "<!-- faults -->", "<!-- end of faults -->"
# The same as the playbook game_day prints.
TEMPLATE = TOP / "roles" / "game_day" / "templates" / "scorecard.md.j2"
# Begun by a worker after the moment that counts, for every worker of the fleet.
WORKERS = [f"shop-{instance}@{host}" for instance in ("bulk-1", "fast-1") for host in HOSTS]


@dataclass
class Row:
    fault: str
    cure: str  # the playbook, or who does it
    noticed: float | None  # seconds from the fault until `health_check` had named it
    cured: float | None  # seconds from the cure until every worker had begun a task; of beat: until it was right
    ledger: dict[str, Any] | None  # None where no load ran
    remark: str = ""

    @property
    def sent(self) -> int | None:
        return self.ledger["sent"] if self.ledger else None

    @property
    def lost(self) -> int | None:
        return len(self.ledger["lost"]) if self.ledger else None

    @property
    def run_twice(self) -> int | None:
        return len(self.ledger["run_twice"]) if self.ledger else None


# Those of the playbook game_day are dictionaries.
ROWS: list[Row | dict[str, Any]] = []


def table() -> str:
    return jinja2.Environment(trim_blocks=True).from_string(TEMPLATE.read_text()).render(rows=ROWS)


def write(path: Path) -> None:
    """The table between its marks; the rest of the file stays."""
    text = path.read_text() if path.exists() else "\n".join(MARKS)
    begin, end = (re.escape(mark) for mark in MARKS)
    path.write_text(
        re.sub(f"({begin}\n).*?({end})", lambda found: found[1] + table() + found[2], text, flags=re.DOTALL)
    )


def noticed(story: Story, since: float, *words: str) -> float:
    """Seconds until `health_check` had named it, or has an assertion fail."""
    play = story.play("health_check", expect=None)
    verdict = play.stats["celeryops_health"]["verdict"]
    assert verdict != "healthy" and all(word in play.text for word in words), play.text[-2000:]
    return play.ended - since


def runs(story: Story, db: int = LEDGER_DB) -> list[dict[str, Any]]:
    return list(map(json.loads, story.redis("LRANGE", "shop:ledger:runs", "0", "-1", db=db).splitlines()))


def first_begun(story: Story, since: float, db: int = LEDGER_DB) -> dict[str, float]:
    """Seconds after `since` in which each worker began its first task."""
    found: dict[str, float] = {}
    for row in runs(story, db):
        if row["phase"] == "begin" and row["time"] >= since:
            found.setdefault(row["node"], round(row["time"] - since, 2))
    return found


def all_begin(story: Story, since: float, timeout: float = 20) -> float:
    """Seconds after `since` until every worker had begun a task."""
    wait_until(lambda: sorted(first_begun(story, since)) == WORKERS, timeout, "every worker begins a task", 0.5)
    return max(first_begun(story, since).values())


def all_answer(story: Story) -> None:
    ping = "answer = sorted(node for reply in app.control.ping(timeout=2) for node in reply if 'beat' not in node)"
    wait_until(lambda: story.celery(ping) == WORKERS, 40, "every worker answers", 0.5)


def mains(story: Story) -> dict[str, str]:
    """The main process of every worker."""
    show = "systemctl show -P MainPID celery-shop-worker@{}.service"
    names = [(host, instance) for host in HOSTS for instance in ("bulk-1", "fast-1")]
    return {f"{host} {instance}": story.ssh(host, show.format(instance)) for host, instance in names}


def forget(story: Story) -> None:
    story.redis("DEL", "shop:ledger:sent", "shop:ledger:runs", db=LEDGER_DB)
