#!/usr/bin/env python3
# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Ask the fleet twice a second who consumes which queue, until SIGTERM; then print which queue was ever without (JSON).

Runs in a virtual environment with Celery and celeryops; the broker is CELERY_BROKER_URL. A sample in which a queue has
no consumer although every subscribed worker answered counts as "without"; one in which somebody was silent as "unsure".
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from typing import Any

QUEUES = ["critical", "default", "email", "reports", "maintenance"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--queues", nargs="+", default=QUEUES)
    parser.add_argument("--interval", type=float, default=0.5)
    parser.add_argument("--timeout", type=float, default=1.0, help="longest wait for the answers of one sample")
    options = parser.parse_args()
    if not os.environ.get("CELERY_BROKER_URL"):
        parser.error("the environment variable CELERY_BROKER_URL is not set")

    from celeryops.engine.connection import Broker, BrokerSpec
    from celeryops.engine.control import Control
    from celeryops.engine.errors import CeleryOpsError

    stop: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda signum, frame: stop.append(signum))
    transport_options = json.loads(os.environ.get("CELERYOPS_TRANSPORT_OPTIONS") or "{}")
    spec = BrokerSpec.build(
        url=os.environ["CELERY_BROKER_URL"],
        transport_options=transport_options,
        key_prefix=os.environ.get("CELERYOPS_KEY_PREFIX") or None,
    )
    samples = failed = 0
    without: dict[str, list[float]] = {queue: [] for queue in options.queues}
    unsure: dict[str, list[float]] = {queue: [] for queue in options.queues}
    fewest: dict[str, int] = {}
    with Broker(spec) as broker:
        control = Control(broker, timeout=options.timeout)
        while not stop:
            begun = time.monotonic()
            now = round(time.time(), 2)
            try:
                replies = control.broadcast("active_queues")
            except CeleryOpsError as exc:
                failed += 1
                print(f"watch: {exc.msg}", file=sys.stderr)
            else:
                samples += 1
                consumers: dict[str, int] = dict.fromkeys(options.queues, 0)
                for reply in replies.replies:
                    for queue in _names(reply):
                        if queue in consumers:
                            consumers[queue] += 1
                for queue, count in consumers.items():
                    fewest[queue] = min(count, fewest.get(queue, count))
                    if count == 0:
                        (unsure if replies.silent_count else without)[queue].append(now)
            time.sleep(max(0.0, options.interval - (time.monotonic() - begun)))
    print(
        json.dumps(
            {
                "samples": samples,
                "failed": failed,
                "fewest_consumers": fewest,
                "without_consumer": {queue: times for queue, times in without.items() if times},
                "unsure": {queue: times for queue, times in unsure.items() if times},
            },
            indent=2,
        )
    )
    return 0


def _names(reply: Any) -> set[str]:
    return set() if reply.error else {queue["name"] for queue in reply.value or []}


if __name__ == "__main__":
    sys.exit(main())
