# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Send tasks, wait for them, and prove with canaries that workers take tasks from their queues."""

from __future__ import annotations

import json
from typing import Any

CANARY_TASK = "celeryops.canary"
CANARY_TTL = 300


def canary_key(key_prefix: str, token: str) -> str:
    return f"{key_prefix}celeryops:canary:{token}"


def answer_canary(connection: Any, token: str, answer: dict[str, Any]) -> None:
    """Worker side: leave the answer on the broker behind a kombu connection, for CANARY_TTL seconds."""
    text = json.dumps(answer, default=repr)
    channel = connection.default_channel
    if connection.transport.driver_type == "redis":
        import redis

        # kombu's own client prefixes some commands and not others.
        client = redis.Redis(connection_pool=channel.client.connection_pool)
        key = canary_key(getattr(channel, "global_keyprefix", ""), token)
        client.pipeline(transaction=True).lpush(key, text).expire(key, CANARY_TTL).execute()
    else:
        connection.Producer(serializer="json").publish(
            {"answer": text}, exchange="", routing_key=canary_key("", token), declare=[_canary_queue(token)])


def _canary_queue(token: str) -> Any:
    from kombu import Queue

    name = canary_key("", token)
    return Queue(name, exchange="", routing_key=name, durable=False, auto_delete=False, expires=CANARY_TTL)
