# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""python -m celeryops.inline -A pkg.module:app: run one task in this process.

What to run comes as JSON on stdin, {name, args, kwargs, task_id, dry}; how it ended goes as JSON to stdout,
{state, task_id, result, error}. Where the application has no such task: {known: [names]}. With `dry` nothing is run.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from .describe import serve


def run(app: Any, order: Mapping[str, Any]) -> dict[str, Any]:
    task = app.tasks.get(order["name"])
    if task is None:
        return {"known": sorted(app.tasks)}
    if order["dry"]:
        return {"state": None}
    ended = task.apply(order["args"], order["kwargs"], **({"task_id": order["task_id"]} if order["task_id"] else {}))
    failed = isinstance(ended.result, BaseException)
    return {
        "state": ended.state,
        "task_id": ended.id,
        "result": str(ended.result) if failed else ended.result,
        "error": type(ended.result).__name__ if failed else None,
    }


def main() -> int:
    # What the task sends is signed.
    return serve("Run one task of a Celery application in this process.", run, "celeryops.signing")


if __name__ == "__main__":
    sys.exit(main())
