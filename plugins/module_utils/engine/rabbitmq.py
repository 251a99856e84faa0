# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""RabbitMQ as its clients see it: through the management API where it can be had, else AMQP alone. Reads only."""

from __future__ import annotations

import base64
import contextlib
import json
import re
import socket
import ssl
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote, unquote, urlsplit

from .connection import Broker
from .control import Control, is_beat
from .errors import AuthenticationFailed, ConnectionFailed, PreconditionFailed
from .tasks import queue_names

VARIABLE = "CELERYOPS_MANAGEMENT_URL"
PORTS = {"http": 15672, "https": 15671}
# Queues of kombu and Celery themselves: remote control, events, and the levels of delayed delivery.
_INTERNAL = re.compile(r".*\.pidbox|celeryev\..*|celery_delayed_\d+|celeryops:.*|amq\.gen-.*")
_DELAYED = re.compile(r"celery_delayed_\d+")
_NODE = (
    *("running", "uptime", "mem_used", "mem_limit", "disk_free", "disk_free_limit"),
    *("sockets_used", "sockets_total", "fd_used", "fd_total"),
)
_QUEUES = "?disable_stats=true&enable_queue_totals=true"  # the totals of the moment; statistics are 5 s old


class Refused(AuthenticationFailed):
    """The management API is there and does not let this user see it."""


@dataclass(frozen=True)
class Management:
    """The management API of one RabbitMQ."""

    address: str  # without credentials
    user: str
    password: str = field(repr=False)
    timeout: float = 10.0
    cafile: str | None = None
    verify: bool = True

    @classmethod
    def of(cls, broker: Broker, url: str = "") -> Management:
        """At `url`, else at the host of the broker; as the broker's user where the URL names none."""
        endpoint, tls = broker.endpoint, broker.spec.tls or {}
        if not url:
            scheme = "https" if endpoint.scheme == "amqps" else "http"
            url = f"{scheme}://{endpoint.host}:{PORTS[scheme]}"
        try:
            parts = urlsplit(url)
            port = parts.port or PORTS[parts.scheme]
        except (ValueError, KeyError):
            parts, port = urlsplit(""), 0
        if not parts.hostname:
            raise PreconditionFailed(
                f"management_url: it is http://user:password@host:15672, or https://, in {VARIABLE} of the environment "
                f"file; quote special characters of user and password as %XX."
            )
        return cls(
            f"{parts.scheme}://{parts.hostname}:{port}{parts.path.rstrip('/')}",
            unquote(parts.username or "") or endpoint.username or "guest",
            unquote(parts.password or "") or endpoint.password or "guest",
            broker.spec.socket_timeout,
            tls.get("ca_certs"),
            tls.get("verify") is not False,
        )

    def get(self, path: str) -> Any:
        """The answer as data. A failed health check is an answer too."""
        secret = base64.b64encode(f"{self.user}:{self.password}".encode()).decode()
        asked = urllib.request.Request(f"{self.address}/api{path}", headers={"Authorization": f"Basic {secret}"})
        context = None
        if self.address.startswith("https:"):
            context = ssl.create_default_context(cafile=self.cafile)
            if not self.verify:
                context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        try:
            # No proxy of the environment: the API is asked as directly as the broker is.
            handlers = [urllib.request.ProxyHandler({})]
            opener = urllib.request.build_opener(*handlers, urllib.request.HTTPSHandler(context=context))
            with opener.open(asked, timeout=self.timeout) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as exc:
            if exc.code == 503:
                with contextlib.suppress(ValueError):
                    return json.loads(exc.read())
            if exc.code in (401, 403):
                raise Refused(
                    f"{self.address}: the management API refuses user {self.user}: give it the tag monitoring "
                    f"(rabbitmqctl set_user_tags), or name another one in {VARIABLE}."
                ) from exc
            raise ConnectionFailed(f"{self.address}: the management API answers {exc.code} {exc.reason}.") from exc
        except (OSError, ValueError) as exc:
            reason = getattr(exc, "reason", exc)
            raise ConnectionFailed(
                f"{self.address}: the management API cannot be asked: {reason}. Enable it (rabbitmq-plugins enable "
                f"rabbitmq_management), or say where it is in {VARIABLE}."
            ) from exc


@dataclass
class Seen:
    """What RabbitMQ tells. `unseen` says why the management API tells nothing; then much is unknown."""

    source: str = "amqp"  # or management
    unseen: str = ""
    version: str = ""
    cluster: str = ""
    blocked: bool = False  # whoever publishes has to wait
    alarms: list[dict[str, str]] = field(default_factory=list)
    nodes: dict[str, dict[str, Any]] | None = None
    connections: dict[str, Any] | None = None
    queues: dict[str, dict[str, Any]] = field(default_factory=dict)
    delayed: int | None = None  # messages whose time has not come, with native delayed delivery


def connect(broker: Broker) -> Any:
    """A connection that is open, or the reason why there is none, with its cure."""
    connection = broker.celery_app.connection_for_write()
    with broker.guard():
        connection.ensure_connection(max_retries=0, timeout=broker.spec.connect_timeout)
    return connection


def publishers_wait(broker: Broker, seconds: float = 0.2) -> bool:
    """RabbitMQ tells a connection that it is blocked when it publishes: a message without a queue, which is dropped.

    A connection of its own, which is cut: RabbitMQ does not even hear the goodbye of one that is blocked.
    """
    told: list[str] = []
    connection = connect(broker)
    connection.connection.on_blocked = told.append
    channel = connection.channel()
    message = channel.prepare_message("", content_type="text/plain", content_encoding="utf-8")
    channel.basic_publish(message, exchange="", routing_key="celeryops.nobody")
    with contextlib.suppress(socket.timeout):
        connection.drain_events(timeout=seconds)
    connection.connection.collect()
    return bool(told)


def declared(connection: Any, queues: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Messages ready and consumers of those of the queues that exist, by passive declares."""
    found: dict[str, dict[str, Any]] = {}
    channel = connection.channel()
    for queue in dict.fromkeys(queues):
        try:
            told = channel.queue_declare(queue, passive=True)
        except connection.channel_errors:
            channel = connection.channel()  # the broker has closed the one before
            continue
        found[queue] = {"ready": int(told.message_count), "consumers": int(told.consumer_count)}
    with contextlib.suppress(*connection.channel_errors):
        channel.close()
    return found


def consumed(broker: Broker, timeout: float) -> list[str]:
    """The queues that the workers which answer consume."""
    with Control(broker, timeout=timeout) as control:
        replies = control.broadcast("active_queues").replies
    told = [queue_names(reply.value) for reply in replies if reply.error is None and not is_beat(reply.node)]
    return sorted({queue for names in told for queue in names})


def internal(queue: str) -> bool:
    return _INTERNAL.fullmatch(queue) is not None


def look(broker: Broker, queues: Iterable[str] = (), *, timeout: float = 2.0) -> Seen:
    """All of it. Without the management API only of the queues named, or of those that workers consume."""
    if broker.kind != "amqp":
        raise PreconditionFailed(
            f"broker_url: {broker.endpoint.scheme}:// is not RabbitMQ. For Redis there are celery_health and "
            f"redis_queue_info."
        )
    with connect(broker) as connection:
        seen = Seen(blocked=publishers_wait(broker))
        properties = getattr(connection.connection, "server_properties", None) or {}
        seen.version, seen.cluster = str(properties.get("version", "")), str(properties.get("cluster_name", ""))
        management = Management.of(broker, broker.spec.management_url)
        try:
            _over_management(seen, management, broker.endpoint.database or "/")
            for name, row in declared(connection, seen.queues).items():
                seen.queues[name] |= row  # the figures of this moment
        except ConnectionFailed as exc:
            seen.unseen = exc.msg
            names = list(queues) or ([] if seen.blocked else consumed(broker, timeout))
            found = declared(connection, names)
            seen.queues = {
                name: {"type": None, "state": None, "ready": row["ready"], "unacked": None,
                       "consumers": row["consumers"], "members": None, "online": None}
                for name, row in found.items()
            }  # fmt: skip
    return seen


def _over_management(seen: Seen, management: Management, vhost: str) -> None:
    place = quote(vhost, safe="")
    health = management.get("/health/checks/alarms")
    seen.source = "management"
    seen.alarms = [
        {"node": str(alarm.get("node", "")), "resource": str(alarm.get("resource", ""))}
        for alarm in health.get("alarms") or ()
    ]
    seen.delayed = 0
    for row in management.get(f"/queues/{place}{_QUEUES}"):
        name, ready = row["name"], int(row.get("messages_ready") or 0)
        if _DELAYED.fullmatch(name):
            seen.delayed += ready
        if internal(name) or row.get("exclusive"):
            continue
        seen.queues[name] = {
            "type": row.get("type"),
            "state": row.get("state"),
            "ready": ready,
            "unacked": int(row.get("messages_unacknowledged") or 0),
            "consumers": None,
            "members": len(row["members"]) if row.get("members") else None,
            "online": len(row["online"]) if row.get("members") else None,
        }
    rows = management.get("/connections?columns=user,state")
    seen.connections = {
        "total": len(rows),
        "users": dict(Counter(str(row.get("user")) for row in rows)),
        "states": dict(Counter(str(row.get("state")) for row in rows)),
    }
    with contextlib.suppress(Refused):  # for those with the tag monitoring only
        seen.nodes = {
            row["name"]: {**{name: row.get(name) for name in _NODE}, "partitions": list(row.get("partitions") or ())}
            for row in management.get("/nodes")
        }


def short(seen: Seen) -> list[str]:
    """Quorum queues that have lost members, each in words; without a majority nothing goes in or out."""
    return [
        f"{name}: {row['online']} of {row['members']} members"
        for name, row in seen.queues.items()
        if row["members"] and row["online"] < row["members"]
    ]
