# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Queues with messages in them, for the tests of the engine's queue operations."""

from __future__ import annotations

import json
from typing import Any

from ansible_collections.celeryops.runbook.plugins.module_utils.engine.queues import RedisQueues

STEPS = (0, 3, 6, 9)
SEP = "\x06\x16"


def raw(
    number: int, queue: str = "src", task: str = "shop.pay", size: int = 40, published: float | None = None
) -> bytes:
    headers: dict[str, Any] = {"lang": "py", "task": task, "id": f"id-{number}", "argsrepr": "()", "retries": 0}
    if published is not None:
        headers["celeryops_published"] = published
    return json.dumps(
        {
            "body": "W10=" * (size // 4),
            "content-encoding": "utf-8",
            "content-type": "application/json",
            "headers": headers,
            "properties": {
                "delivery_info": {"exchange": "", "routing_key": queue},
                "delivery_tag": f"tag-{number}",
                "body_encoding": "base64",
            },
        }
    ).encode()


def fill(queues: RedisQueues, queue: str, messages: list[bytes], step: int = 0) -> None:
    if messages:
        queues.client.lpush(queues.key(queue, step), *messages)


def content(queues: RedisQueues, queue: str, step: int = 0) -> list[bytes]:
    """In the order of consumption."""
    found: list[bytes] = queues.client.lrange(queues.key(queue, step), 0, -1)
    return found[::-1]


def own_keys(queues: RedisQueues) -> list[bytes]:
    return [key for key in queues.client.keys("*celeryops:*") if b"imported:" not in key]


def sample(queues: RedisQueues, count: int = 100, odd: bool = True) -> dict[int, list[bytes]]:
    """Messages in two priorities, task b every third, one garbage in the midst."""
    result = {}
    for step in (0, 6):
        messages = [raw(step * 1000 + n, task="a" if n % 3 else "b") for n in range(count)]
        if odd:
            messages.insert(count // 2, b"garbage \n{ %d" % step)
        fill(queues, "src", messages, step)
        result[step] = messages
    return result


def ids(messages: list[bytes]) -> list[str]:
    return sorted(m.decode() if m.startswith(b"garbage") else json.loads(m)["headers"]["id"] for m in messages)
