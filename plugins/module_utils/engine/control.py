# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import base64
import binascii
import contextlib
import json
import socket
import time
import uuid
from bisect import bisect
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from .connection import Broker
from .errors import CeleryOpsError, ConnectionFailed

BEAT_PREFIX = "celerybeat@"
BATCH = 1000


def is_beat(node: str) -> bool:
    """Celery's beat (5.7 and later) is on the same channel as the workers, and answers nothing but ping."""
    return node.startswith(BEAT_PREFIX)


class Reply(NamedTuple):
    node: str
    value: Any = None
    error: str | None = None


@dataclass(frozen=True)
class Request:
    """One remote control command. No destination means every node."""

    command: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    destination: tuple[str, ...] | None = None

    def concerns(self, nodes: Iterable[str]) -> list[str]:
        return [node for node in nodes if self.command == "ping" or not is_beat(node)]


@dataclass
class Replies:
    """Raw answers to one request, in order of arrival. `subscribed` is None where the broker cannot count."""

    replies: list[Reply] = field(default_factory=list)
    subscribed: int | None = None
    elapsed: float = 0.0
    silent_count: int = 0
    refused: list[str] = field(default_factory=list)

    @property
    def nodes(self) -> list[str]:
        return list(dict.fromkeys(reply.node for reply in self.replies))

    @property
    def duplicates(self) -> list[str]:
        counted = Counter(reply.node for reply in self.replies)
        return sorted(node for node, number in counted.items() if number > 1)

    @property
    def count(self) -> int:
        return len(self.replies) + len(self.refused)

    def get(self, node: str) -> Reply | None:
        return next((reply for reply in self.replies if reply.node == node), None)


@dataclass
class Round:
    """All that one exchange with the fleet brought: an answer list per request and a census (ping to everybody)."""

    answers: list[Replies]
    census: Replies
    complete: bool  # every subscribed node has answered the census
    elapsed: float


def control_message(
    request: Request, *, exchange: str, ticket: str | None, reply_to: str | None, expires: float
) -> bytes:
    """The request as kombu's own pidbox would publish it: a worker reconnects on anything less."""
    body: dict[str, Any] = {
        "method": request.command,
        "arguments": dict(request.arguments),
        "destination": list(request.destination) if request.destination is not None else None,
        "pattern": None,
        "matcher": None,
    }
    if ticket and reply_to:
        body["ticket"] = ticket
        body["reply_to"] = {"exchange": f"reply.{exchange}", "routing_key": reply_to}
    message = {
        "body": base64.b64encode(json.dumps(body).encode()).decode(),
        "content-encoding": "utf-8",
        "content-type": "application/json",
        "headers": {"clock": 1, "expires": expires},
        "properties": {
            "delivery_mode": 2,
            "delivery_info": {"exchange": exchange, "routing_key": ""},
            "priority": 0,
            "body_encoding": "base64",
            "delivery_tag": str(uuid.uuid4()),
        },
    }
    return json.dumps(message).encode()


def _replies_of(body: Any) -> list[Reply]:
    """`{node: reply}` as Reply objects; a worker's error is part of the answer, never an exception."""
    found = []
    for node, value in body.items() if isinstance(body, dict) else ():
        if isinstance(value, dict) and set(value) == {"error"}:
            found.append(Reply(node, None, _explain(str(value["error"]))))
        else:
            found.append(Reply(node, value))
    return found


def _explain(error: str) -> str:
    if error.startswith("KeyError('celeryops"):
        return "unknown command: the worker was started without --include celeryops.worker"
    if error.startswith("KeyError("):
        return f"unknown command or argument: {error}"
    return error


class _Collector:
    """Sorts replies to their requests and knows when nothing more can come."""

    def __init__(self, requests: Sequence[Request], expected: Sequence[str] | None, census_needed: bool) -> None:
        self.requests = requests
        self.expected = expected
        self.census_needed = census_needed
        self.tickets = [str(uuid.uuid4()) for _request in requests]
        self.index = {ticket: number for number, ticket in enumerate(self.tickets)}
        self.answers = [Replies() for _request in requests]
        self.counts: list[int] | None = None

    def take(self, ticket: Any, content_type: Any, body: Any) -> None:
        number = self.index.get(ticket)
        if number is None:
            return
        answers = self.answers[number]
        if content_type != "application/json":
            answers.refused.append(str(content_type))
            return
        answers.replies += _replies_of(body)

    def take_raw(self, raw: bytes) -> None:
        """One reply as it lies in Redis. Ten thousand of them come at once, so this is kept lean."""
        try:
            message = json.loads(raw.decode())
            headers = message["headers"]
            ticket = headers["ticket"]
            if ticket not in self.index:
                return
            content_type = message["content-type"]
            if "compression" in headers:
                content_type = f"{content_type} ({headers['compression']})"
            body = None
            if content_type == "application/json":
                text = message["body"]
                if message["properties"].get("body_encoding") == "base64":
                    text = binascii.a2b_base64(text).decode()
                body = json.loads(text)
        except (ValueError, KeyError, TypeError, AttributeError):
            return
        self.take(ticket, content_type, body)

    @property
    def census(self) -> Replies:
        return self.answers[0]

    @property
    def complete(self) -> bool:
        if self.counts is not None:
            return self.census.count >= self.counts[0]
        return bool(self.expected) and set(self.expected or ()) <= set(self.census.nodes)

    @property
    def done(self) -> bool:
        complete = self.complete
        if self.census_needed and not complete:
            return False
        known = set(self.census.nodes) if complete else None
        beats: int | None = None
        for number, request in enumerate(self.requests[1:], start=1):
            answers = self.answers[number]
            if request.destination is None:
                if self.counts is None:
                    wanted = set(request.concerns(self.expected or ()))
                    if not self.expected or not wanted <= set(answers.nodes):
                        return False
                    continue
                if answers.count >= self.counts[number]:
                    continue
                if beats is None:
                    beats = sum(is_beat(reply.node) for reply in self.census.replies)
                if answers.count < self.counts[number] - (beats if request.command != "ping" else 0):
                    return False
            else:
                missing = set(request.concerns(request.destination)) - set(answers.nodes)
                # Who is not on the channel at all will not answer: no need to wait for it.
                if missing and (known is None or self.counts is None or missing & known):
                    return False
        return len(self.requests) > 1 or complete


class Control:
    """Remote control of the fleet behind one broker."""

    def __init__(self, broker: Broker, *, timeout: float = 2.0) -> None:
        self.broker = broker
        self.timeout = timeout
        self.exchange = f"{broker.spec.control_exchange}.pidbox"
        self._oid = str(uuid.uuid4())
        self._client: Any = None
        self._pops = ["blmpop", "brpop", "lrange"]
        self._used = False

    def __enter__(self) -> Control:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Forget the reply list, into which a very late node may have written once more."""
        if self._client is not None:
            if self._used:
                with contextlib.suppress(CeleryOpsError), self.broker.guard():
                    self.broker.redis.delete(self._reply_key())
            self._client.close()
            self._client = None

    # what callers use

    def broadcast(
        self,
        command: str,
        arguments: Mapping[str, Any] | None = None,
        *,
        destination: Sequence[str] | None = None,
        timeout: float | None = None,
        expected: Sequence[str] | None = None,
    ) -> Replies:
        return self.many([(command, arguments or {})], destination=destination, timeout=timeout, expected=expected)[
            command
        ]

    def many(
        self,
        commands: Sequence[tuple[str, Mapping[str, Any]]],
        *,
        destination: Sequence[str] | None = None,
        timeout: float | None = None,
        expected: Sequence[str] | None = None,
    ) -> dict[str, Replies]:
        """Several commands published together under one deadline."""
        names = [command for command, _arguments in commands]
        if len(set(names)) != len(names):
            raise ValueError("many() takes each command once; use converse() for repetitions")
        targets = tuple(destination) if destination is not None else None
        requests = [Request(command, arguments, targets) for command, arguments in commands]
        done = self.converse(requests, timeout=timeout, expected=expected)
        return dict(zip(names, done.answers, strict=True))

    def converse(
        self,
        requests: Sequence[Request],
        *,
        timeout: float | None = None,
        expected: Sequence[str] | None = None,
        census: bool = False,
    ) -> Round:
        """Publish all requests and a ping to everybody at once, and collect until nothing more can come.

        The ping tells who is there at all: it names beat nodes, double names, and who need not be waited for.
        With `census` the call waits for all of them even when the requests themselves are answered.
        """
        limit = self.timeout if timeout is None else timeout
        if self.broker.kind == "redis":
            _unused = self.broker.redis  # connecting has a timeout of its own
        started = time.monotonic()
        # A ping to everybody is the census itself.
        census_too = [request.command == "ping" and request.destination is None for request in requests]
        others = [request for request, same in zip(requests, census_too, strict=True) if not same]
        everyone = [Request("ping"), *others]
        collector = _Collector(everyone, expected, census or not others or any(census_too))
        with self.broker.guard():
            if self.broker.kind == "redis":
                self._over_redis(collector, started + limit, limit)
            else:
                self._over_kombu(collector, started + limit, limit)
        elapsed = time.monotonic() - started
        beats = len([node for node in collector.census.nodes if is_beat(node)])
        for number, (request, answers) in enumerate(zip(everyone, collector.answers, strict=True)):
            answers.elapsed = elapsed
            count = collector.counts[number] if collector.counts is not None else None
            answers.subscribed = count
            if request.destination is not None:
                answers.silent_count = len(set(request.concerns(request.destination)) - set(answers.nodes))
            elif count is not None:
                answers.silent_count = max(0, count - (0 if request.command == "ping" else beats) - answers.count)
        rest = iter(collector.answers[1:])
        ordered = [collector.census if same else next(rest) for same in census_too]
        return Round(ordered, collector.census, collector.complete, elapsed)

    def cast(self, requests: Sequence[Request]) -> None:
        """Publish without asking for a reply (shutdown never gives one)."""
        with self.broker.guard():
            if self.broker.kind == "redis":
                pipe = self.broker.redis.pipeline(transaction=False)
                for request in requests:
                    self._publish(pipe, request, None, self.timeout)
                pipe.execute()
            else:
                app = self.broker.celery_app
                with app.connection_for_write() as connection:
                    mailbox = app.control.mailbox(connection)
                    for request in requests:
                        mailbox.cast(
                            list(request.destination) if request.destination is not None else None,
                            request.command,
                            dict(request.arguments),
                        )

    # Redis

    def _reply_key(self) -> str:
        steps = self.broker.priority_steps
        step = steps[bisect(steps, 0) - 1]
        queue = f"{self._oid}.reply.{self.exchange}"
        return self.broker.key_prefix + (f"{queue}{self.broker.sep}{step}" if step else queue)

    def _publish(self, pipe: Any, request: Request, ticket: str | None, timeout: float) -> int:
        """Queue the PUBLISH commands; how many there are."""
        message = control_message(
            request, exchange=self.exchange, ticket=ticket, reply_to=self._oid, expires=time.time() + timeout
        )
        topics = self.broker.fanout_topics(self.exchange)
        for topic in topics:
            pipe.publish(topic, message)
        return len(topics)

    def _over_redis(self, collector: _Collector, deadline: float, limit: float) -> None:
        redis = self.broker.redis
        binding = f"{self.broker.key_prefix}_kombu.binding.reply.{self.exchange}"
        member = self.broker.sep.join([self._oid, "", f"{self._oid}.reply.{self.exchange}"])
        key = self._reply_key()
        if self._client is None:
            self._client = redis.client()
        self._used = True
        try:
            # The binding first: a worker drops its reply when it finds no table entry.
            pipe = redis.pipeline(transaction=False)
            pipe.sadd(binding, member)
            for request, ticket in zip(collector.requests, collector.tickets, strict=True):
                topics = self._publish(pipe, request, ticket, limit)
            counts = pipe.execute()[1:]
            # With Sentinel's compatibility mode new nodes hear both topics, old ones the second only.
            collector.counts = [max(counts[at : at + topics]) for at in range(0, len(counts), topics)]
            while not collector.done:
                remaining = deadline - time.monotonic()
                if remaining <= 0:
                    break
                for raw in self._pop(key, remaining):
                    collector.take_raw(raw)
        except BaseException:
            with contextlib.suppress(Exception):
                self._forget(redis, binding, member, key)
            raise
        self._forget(redis, binding, member, key)

    @staticmethod
    def _forget(redis: Any, binding: str, member: str, key: str) -> None:
        pipe = redis.pipeline(transaction=False)
        pipe.srem(binding, member)
        pipe.delete(key)
        pipe.execute()

    def _pop(self, key: str, remaining: float) -> list[bytes]:
        """Wait for replies, then take a batch of them, in the best way this Redis knows."""
        from redis.exceptions import ResponseError

        while True:
            way = self._pops[0]
            try:
                if way == "blmpop":
                    found = self._blocking(
                        remaining, "BLMPOP", str(remaining + 1), "1", key, "RIGHT", "COUNT", str(BATCH)
                    )
                    return list(found[1]) if found else []
                # Whole seconds: these servers know no fractions. Our own clock ends the wait.
                first = self._blocking(remaining, "BRPOP", key, str(int(remaining) + 1))
                if not first:
                    return []
                if way == "brpop":
                    more = self.broker.redis.execute_command("RPOP", key, BATCH) or []
                    return [first[1], *(more if isinstance(more, list) else [more])]
                pipe = self.broker.redis.pipeline(transaction=True)
                pipe.lrange(key, -BATCH, -1)
                pipe.ltrim(key, 0, -BATCH - 1)
                return [first[1], *pipe.execute()[0]]
            except ResponseError as exc:
                low = str(exc).lower()
                if len(self._pops) > 1 and ("unknown command" in low or "noperm" in low or "wrong number" in low):
                    self._pops.pop(0)
                    continue
                raise

    def _blocking(self, remaining: float, *command: str) -> Any:
        """A blocking command that ends on our clock: Redis itself looks at such timeouts only ten times a second."""
        connection = self._client.connection
        connection.connect()
        connection.send_command(*command)
        if not connection.can_read(timeout=remaining):
            connection.disconnect()
            return None
        return connection.read_response()

    # other transports

    def _over_kombu(self, collector: _Collector, deadline: float, limit: float) -> None:
        from kombu import Consumer, Producer

        app = self.broker.celery_app
        with app.connection_for_write() as connection:
            connection.ensure_connection(max_retries=0, timeout=self.broker.spec.connect_timeout)
            mailbox = app.control.mailbox(connection)
            channel = connection.default_channel
            queue = mailbox.reply_queue(channel)
            queue.declare()

            # A publisher that RabbitMQ has blocked is not even heard when it says goodbye.
            blocked: list[str] = []
            connection.connection.on_blocked = blocked.append

            def on_message(message: Any) -> None:
                content_type = message.content_type
                body = message.decode() if content_type == "application/json" else None
                collector.take(message.headers.get("ticket"), content_type, body)

            try:
                with Consumer(channel, [queue], accept=["json"], no_ack=True, on_message=on_message):
                    producer = Producer(channel, auto_declare=False)
                    for request, ticket in zip(collector.requests, collector.tickets, strict=True):
                        mailbox._publish(
                            request.command,
                            dict(request.arguments),
                            destination=list(request.destination) if request.destination is not None else None,
                            reply_ticket=ticket,
                            channel=channel,
                            timeout=limit,
                            serializer="json",
                            producer=producer,
                        )
                    while not collector.done:
                        if blocked:
                            connection.connection.collect()
                            raise ConnectionFailed(
                                f"{self.broker.spec.address}: a memory or disk alarm of RabbitMQ is on, whoever "
                                f"publishes has to wait, remote control too. broker_recover says what cures it.",
                                cause="blocked",
                            )
                        remaining = deadline - time.monotonic()
                        if remaining <= 0:
                            break
                        with contextlib.suppress(socket.timeout):
                            connection.drain_events(timeout=remaining)
            finally:
                with contextlib.suppress(Exception):
                    queue.delete()
