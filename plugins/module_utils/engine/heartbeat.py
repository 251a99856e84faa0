# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What beat leaves in the broker with every tick, so that a beat that runs and does nothing is found."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .connection import RedisStore
from .pauses import now_of

# A beat that was taken away for good is forgotten.
KEPT = 30 * 86_400


def heartbeat_key(key_prefix: str, application: str) -> str:
    return f"{key_prefix}celeryops:beat:{application}"


def write(store: RedisStore, application: str, beat: Mapping[str, Any], ages: Mapping[str, float]) -> None:
    """`ages`: field -> seconds since it happened. The record has times of the Redis server: hosts' clocks differ."""
    now = now_of(store)
    key = heartbeat_key(store.key_prefix, application)
    fields = {**beat, **{name: repr(round(now - age, 3)) for name, age in ages.items()}}
    store.redis.pipeline(transaction=True).hset(key, mapping=fields).expire(key, KEPT).execute()


def read(store: RedisStore, application: str) -> dict[str, Any] | None:
    """Who ticked last, how many seconds ago, and what it sent last; None where no beat ever did."""
    raw = store.redis.hgetall(heartbeat_key(store.key_prefix, application))
    found = {key.decode(errors="replace"): value.decode(errors="replace") for key, value in raw.items()}
    try:
        tick = float(found["tick"])
        sent = float(found["sent"]) if found.get("sent") else None
    except (KeyError, ValueError):
        return None
    now = now_of(store)
    return {
        "age": max(0.0, now - tick),
        "tick": tick,
        "sent": sent,
        "sent_ago": max(0.0, now - sent) if sent is not None else None,
        "task": found.get("task") or None,
        "host": found.get("host", "unknown"),
        "pid": int(found["pid"]) if found.get("pid", "").isdigit() else None,
        "release": found.get("release") or None,
    }
