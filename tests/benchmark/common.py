# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What the benchmarks share. Each prints a JSON list of results on stdout and what it is doing on stderr."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from typing import Any


def say(text: str) -> None:
    print(f"  {text}", file=sys.stderr, flush=True)


def celery(port: int) -> Any:
    import celery as library

    return library.Celery("bench", broker=f"redis://127.0.0.1:{port}/0", set_as_current=False)


def tell(results: list[dict[str, Any]], load: float | None = None) -> None:
    """`load`: of the machine when it began, where it matters to the results."""
    if load is not None:
        for entry in results:
            entry["conditions"] += f"; {os.cpu_count()} cores, load {load:.1f} at the start"
    print(json.dumps(results, indent=2))


def on_hosts(measure: Callable[[Any], list[dict[str, Any]]]) -> int:
    """Measure on the hosts of a Story, which go whatever ends this."""
    from fleet.story import Story, StoryError

    from support import link_collection

    link_collection()
    signal.signal(signal.SIGTERM, lambda *_args: sys.exit(143))
    story = Story("bench")
    try:
        results = measure(story)
    except StoryError as error:
        say(f"{error}" + (f" (see {error.log})" if error.log else ""))
        return 1
    finally:
        story.close()
        story.down()
    tell(results)
    return 0
