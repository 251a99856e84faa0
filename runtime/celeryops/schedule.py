# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""python -m celeryops.schedule -A pkg.module:app: look at the schedule of beat, or send one entry now.

What is wanted comes as JSON on stdin, the answer goes as JSON to stdout:

{do: list, runs: {entry: {last, count}}} -> {entries: {entry: {task, schedule, queue, args, kwargs, options, last, next,
runs}}, scheduler}; {do: send, entry} -> {task_id, task, queue}; {do: read, path} -> {runs} as far as the file of a
schedule can be read, else {error}. An entry that is not there: {known: [entries]}.
"""

from __future__ import annotations

import shelve
import sys
import time
from collections.abc import Mapping
from datetime import datetime, timezone
from typing import Any

from .describe import queue_of, serve


def schedule(app: Any) -> dict[str, Any]:
    """The entries as beat makes them of the configuration."""
    from celery.beat import Scheduler

    scheduler = Scheduler(app, lazy=True)
    scheduler.merge_inplace(app.conf.beat_schedule or {})
    scheduler.install_default_entries(scheduler.schedule)
    return dict(scheduler.schedule)


def show(app: Any, runs: Mapping[str, Any]) -> dict[str, Any]:
    now = time.time()
    found: dict[str, Any] = {}
    for name, entry in sorted(schedule(app).items()):
        run = runs.get(name)
        if run:
            zone = entry.default_now().tzinfo
            entry.last_run_at = datetime.fromtimestamp(run["last"], timezone.utc).astimezone(zone)
        due, seconds = entry.is_due()
        found[name] = {
            "task": entry.task,
            "schedule": str(getattr(entry.schedule, "human_seconds", "") or entry.schedule).strip("<>"),
            "queue": queue_of(app, entry.task, entry.args, entry.kwargs, entry.options),
            "args": list(entry.args or ()),
            "kwargs": dict(entry.kwargs or {}),
            "options": dict(entry.options or {}),
            "last": run["last"] if run else None,
            "next": round(now + (0 if due else max(0.0, float(seconds))), 3),
            "runs": run["count"] if run else 0,
        }
    return {"entries": found, "scheduler": str(app.conf.beat_scheduler)}


def send(app: Any, name: str) -> dict[str, Any]:
    from celery.beat import Scheduler

    entries = schedule(app)
    if name not in entries:
        return {"known": sorted(entries)}
    entry = entries[name]
    queue = queue_of(app, entry.task, entry.args, entry.kwargs, entry.options)
    sent = Scheduler(app, lazy=True).apply_async(entry, advance=False)
    return {"task_id": sent.id, "task": entry.task, "queue": queue}


def read(path: str) -> dict[str, Any]:
    """When each entry of beat's file ran last. It is a copy: opening one may change it."""
    try:
        with shelve.open(path, flag="r") as store:
            # A beat that has just made it has not yet written it all.
            entries = dict(store.get("entries") or {})
        return {
            "runs": {
                str(name): {"last": entry.last_run_at.timestamp(), "count": int(entry.total_run_count)}
                for name, entry in entries.items()
            }
        }
    except Exception as exc:  # whatever a damaged file may raise
        return {"error": f"{type(exc).__name__}: {exc}"}


def work(app: Any, order: dict[str, Any]) -> dict[str, Any]:
    if order["do"] == "send":
        return send(app, order["entry"])
    if order["do"] == "read":
        return read(order["path"])
    return show(app, order.get("runs") or {})


def main() -> int:
    return serve("Look at the schedule of a Celery application, or send an entry now.", work)


if __name__ == "__main__":
    sys.exit(main())
