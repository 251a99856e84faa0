# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Gathers what the health verdict needs from a broker and the fleet behind it. Reads only."""

from __future__ import annotations

import base64
import contextlib
import json
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from . import certificates, heartbeat, pauses, rabbitmq, schedule
from .connection import Broker
from .control import Control, Request, is_beat
from .deadletters import SUFFIX, DeadLetters
from .errors import ConnectionFailed
from .queues import RedisQueues

_INFO = (
    *("role", "loading", "redis_version", "uptime_in_seconds", "connected_clients", "maxclients"),
    *("used_memory", "maxmemory", "maxmemory_policy", "total_system_memory", "evicted_keys", "rejected_connections"),
    *("aof_enabled", "aof_last_write_status", "aof_last_bgrewrite_status", "rdb_last_bgsave_status"),
)


def broker_facts(broker: Broker, queues: Iterable[str] = ()) -> dict[str, Any]:
    """What INFO tells, and the snapshot rule where CONFIG may be read. RabbitMQ: all that it tells, its queues too;
    `queues` are those to ask for where it has no management API."""
    if broker.kind != "redis":
        seen = rabbitmq.look(broker, queues)
        return {"kind": broker.kind, **asdict(seen), "short": rabbitmq.short(seen)}
    from redis.exceptions import ResponseError

    with broker.guard():
        info = broker.redis.info()
        facts: dict[str, Any] = {"kind": "redis", **{name: info[name] for name in _INFO if name in info}}
        with contextlib.suppress(ConnectionFailed):
            shown = broker.certificate()
            if shown:
                facts["certificate"] = {"ends": certificates.day(shown.ends), "days": round(shown.days(), 1)}
        try:
            settings = broker.redis.config_get("save", "maxclients")
        except ResponseError:
            return facts  # an ACL or a managed Redis forbids CONFIG
    settings = {_text(key): _text(value) for key, value in settings.items()}
    facts["save"] = settings.get("save")
    if settings.get("maxclients", "").isdigit():
        facts["maxclients"] = int(settings["maxclients"])
    return facts


def _text(value: Any) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)


def fleet_facts(broker: Broker, expected: Sequence[str], timeout: float) -> dict[str, Any]:
    """Who answers, what each consumes and runs. No task arguments are kept."""
    with Control(broker, timeout=timeout) as control:
        asked = control.converse(
            [Request("active_queues"), Request("celeryops_release"), Request("active")],
            expected=list(expected) or None,
            census=True,
        )
    queues, releases, active = asked.answers
    answered: dict[str, dict[str, Any]] = {
        reply.node: {"queues": [], "release": None} for reply in asked.census.replies if not is_beat(reply.node)
    }
    for reply in queues.replies:
        if reply.node in answered and isinstance(reply.value, list):
            answered[reply.node]["queues"] = sorted(queue["name"] for queue in reply.value)
    for reply in releases.replies:
        if reply.node in answered and isinstance(reply.value, dict):
            answered[reply.node]["release"] = reply.value.get("release") or None
    now = time.time()
    running: dict[str, float] = {}
    for reply in active.replies:
        for task in reply.value if isinstance(reply.value, list) else ():
            if task.get("time_start"):
                seconds = max(0.0, now - float(task["time_start"]))
                running[task["name"]] = max(seconds, running.get(task["name"], 0.0))
    return {
        "answered": answered,
        "subscribed": asked.census.subscribed,
        "silent_count": asked.census.silent_count,
        "duplicates": [node for node in asked.census.duplicates if not is_beat(node)],
        "beats": sum(is_beat(reply.node) for reply in asked.census.replies),
        "running": running,
    }


class EventWindow:
    """Counts task events from its opening on. The workers send them only with -E (or worker_send_task_events)."""

    def __init__(self, broker: Broker, exchange: str = "celeryev") -> None:
        self.counts: Counter[str] = Counter()
        self.names: dict[str, str] = {}
        self.runtimes: dict[str, float] = {}
        self.heard = 0
        self.opened = time.monotonic()
        with broker.guard():
            self.pubsub = broker.redis.pubsub(ignore_subscribe_messages=True)
            # Published with a routing key (the usual case) or, with fanout_patterns off, without.
            self.pubsub.psubscribe(
                *(name for topic in broker.fanout_topics(exchange) for name in (topic, f"{topic}/*"))
            )

    def close(self) -> None:
        self.pubsub.close()

    def take(self, raw: bytes) -> None:
        try:
            message = json.loads(raw)
            body = message["body"]
            if message["properties"].get("body_encoding") == "base64":
                body = base64.b64decode(body)
            events = json.loads(body)
        except (ValueError, KeyError, TypeError, AttributeError):
            return
        for event in events if isinstance(events, list) else [events]:
            if not isinstance(event, Mapping):
                continue
            self.heard += 1
            kind, task = str(event.get("type", "")), str(event.get("uuid", ""))
            self.counts[kind] += 1
            if kind == "task-received" and event.get("name"):
                self.names[task] = str(event["name"])
            if kind == "task-succeeded" and task in self.names:
                name = self.names[task]
                self.runtimes[name] = max(float(event.get("runtime") or 0.0), self.runtimes.get(name, 0.0))

    def read(self, seconds: float) -> dict[str, Any] | None:
        """Everything until the window is `seconds` old; None if not a single task event came."""
        end = self.opened + seconds
        while True:
            message = self.pubsub.get_message(timeout=max(0.0, end - time.monotonic()))
            if message is not None and message.get("type") == "pmessage":
                self.take(message["data"])
            if time.monotonic() >= end:
                break
        if not any(kind.startswith("task-") for kind in self.counts):
            return None
        return {
            "seconds": round(time.monotonic() - self.opened, 1),
            "succeeded": self.counts["task-succeeded"],
            "failed": self.counts["task-failed"],
            "retried": self.counts["task-retried"],
            "started": self.counts["task-started"],
            "runtimes": self.runtimes,
        }


def queue_facts(broker: Broker, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """queue -> how many messages wait, and for how long the oldest does, if its producer stamps.

    Beside the queues named those that hold messages: nobody may have been told of them. Dead letters wait for nobody.
    """
    with broker.guard():
        queues = RedisQueues.of(broker)
        wanted = set(names)
        depths = queues.depth(sorted(wanted.union(name for name in queues.queues() if not name.endswith(SUFFIX))))
        depths = {queue: found for queue, found in depths.items() if found["depth"] or queue in wanted}
        oldest = queues.oldest([queue for queue, found in depths.items() if found["depth"]])
    return {
        queue: {"depth": found["depth"], "oldest_age": (oldest.get(queue) or {}).get("age")}
        for queue, found in depths.items()
    }


def rabbitmq_queues(facts: Mapping[str, Any], names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """The same of what RabbitMQ has told."""
    wanted = set(names)
    return {
        name: {"depth": row["ready"], "oldest_age": None, "consumers": row["consumers"] or 0}
        for name, row in facts["queues"].items()
        if not name.endswith(SUFFIX) and (row["ready"] or name in wanted)
    }


def unacked_facts(broker: Broker) -> dict[str, Any]:
    """How many messages are with workers and not acknowledged, and for how long the oldest has been."""
    with broker.guard():
        found = RedisQueues.of(broker).unacked(most=1)
    return {"count": found["count"], "oldest_age": found["oldest_age"]}


def dead_facts(broker: Broker) -> dict[str, int]:
    """Dead letters by their queue."""
    with broker.guard():
        dead = DeadLetters.of(broker)
        return {name: row["depth"] for name, row in dead.depth(dead.names()).items()}


def pause_facts(broker: Broker) -> dict[str, dict[str, Any]]:
    """queue -> the pause in words, and for how many seconds its time is over."""
    with broker.guard():
        found = pauses.load(broker)
        now = pauses.now_of(broker) if found else 0.0
    return {
        queue: {"text": str(pause), "over": max(0.0, now - pause.until) if pause.until is not None else 0.0}
        for queue, pause in found.items()
    }


def rest_facts(broker: Broker, application: str) -> dict[str, str]:
    """entry of beat's schedule -> why it is disabled, in words."""
    with broker.guard():
        return {name: str(rest) for name, rest in schedule.rests(broker, application).items()}


def beat_facts(broker: Broker, application: str) -> dict[str, Any] | None:
    """What the application's beat told last."""
    with broker.guard():
        return heartbeat.read(broker, application)
