# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Messages as kombu keeps them in Redis, read without executing anything."""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .errors import BadMessage

PUBLISHED_HEADER = "celeryops_published"

# The beginning of a protocol 2 message as kombu writes it. It is anchored at the first byte and no string in it may
# hold a quote or a backslash, so a match is a proof and not a guess; everything else is decoded.
_HEAD = re.compile(
    rb'\{"body": "[^"\\]*", "content-encoding": "[^"\\]*", "content-type": "[^"\\]*", '
    rb'"headers": \{"lang": "[^"\\]*", "task": "([^"\\]+)", "id": "([^"\\]+)"'
)
# An unescaped quote cannot occur inside a JSON string, so this only matches a member of an object.
_ROUTE = re.compile(rb'"delivery_info": \{"exchange": "[^"\\]*", "routing_key": "[^"\\]*"\}')
_PUBLISHED = re.compile(rb'"celeryops_published": ([0-9]+(?:\.[0-9]+)?)[,}]')


@dataclass(frozen=True)
class Envelope:
    """What the outside of one task message says. `document` is the decoded message itself."""

    id: str
    task: str
    protocol: int
    eta: str | None
    expires: Any
    retries: int
    priority: int | None
    exchange: str
    routing_key: str
    content_type: str
    delivery_tag: str
    redelivered: bool
    published: float | None
    root_id: str | None
    parent_id: str | None
    group: str | None
    origin: str | None
    argsrepr: str | None
    kwargsrepr: str | None
    document: dict[str, Any]

    @classmethod
    def parse(cls, raw: bytes | str) -> Envelope:
        """Read a message; BadMessage when it is not a Celery task message of protocol 1 or 2."""
        return cls.of(_load(raw))

    @classmethod
    def of(cls, document: Any) -> Envelope:
        """The same for a message that is decoded already."""
        headers, properties = _check(document)
        info = properties.get("delivery_info")
        info = info if isinstance(info, dict) else {}
        if "task" in headers:
            protocol, fields = 2, headers
        else:
            protocol, fields = 1, _body(document)
        task, identity = fields.get("task"), fields.get("id")
        if not isinstance(task, str) or not task or not isinstance(identity, str) or not identity:
            raise BadMessage("unknown envelope: neither its headers nor its body name a task and an id")
        stamp = headers.get(PUBLISHED_HEADER)
        priority = properties.get("priority")
        return cls(
            id=identity,
            task=task,
            protocol=protocol,
            eta=fields.get("eta"),
            expires=fields.get("expires"),
            retries=_integer(fields.get("retries")) or 0,
            priority=_integer(priority),
            exchange=_text(info.get("exchange")),
            routing_key=_text(info.get("routing_key")),
            content_type=_text(document.get("content-type")),
            delivery_tag=_text(properties.get("delivery_tag")),
            redelivered=headers.get("redelivered") is True or info.get("redelivered") is True,
            published=float(stamp) if isinstance(stamp, (int, float)) and not isinstance(stamp, bool) else None,
            root_id=fields.get("root_id"),
            parent_id=fields.get("parent_id"),
            group=fields.get("group") or fields.get("taskset"),
            origin=fields.get("origin"),
            argsrepr=fields.get("argsrepr"),
            kwargsrepr=fields.get("kwargsrepr"),
            document=document,
        )

    def arguments(self) -> tuple[Any, Any] | None:
        """Positional and keyword arguments, or None for a body that is not plain JSON (pickle, yaml, compressed)."""
        try:
            body = _decode_body(self.document)
        except BadMessage:
            return None
        if self.protocol == 1 and isinstance(body, dict):
            return body.get("args", []), body.get("kwargs", {})
        if self.protocol == 2 and isinstance(body, list) and len(body) >= 2:
            return body[0], body[1]
        return None

    def has_arguments(self, args: Sequence[Any] | None, kwargs: Mapping[str, Any] | None) -> bool:
        """Whether its first positional arguments are these, and these keyword arguments are among its own, as JSON has
        them. BadMessage when its arguments cannot be read."""
        found = self.arguments()
        if found is None or not isinstance(found[0], list) or not isinstance(found[1], dict):
            raise BadMessage("its arguments cannot be read")
        first, some = json.loads(json.dumps([list(args or ()), dict(kwargs or {})]))
        return bool(
            found[0][: len(first)] == first
            and all(name in found[1] and found[1][name] == value for name, value in some.items())
        )


def published(raw: bytes) -> float | None:
    """When a message was published, if it says so, by the quickest way that is exact."""
    found = _PUBLISHED.findall(raw)
    if len(found) == 1:
        return float(found[0])
    return Envelope.parse(raw).published if found else None


def identify(raw: bytes) -> tuple[str, str]:
    """Task name and id of a message, by the quickest way that is exact; BadMessage like Envelope.parse."""
    head = _HEAD.match(raw)
    if head is not None:
        try:
            return head[1].decode(), head[2].decode()
        except UnicodeDecodeError as exc:
            raise BadMessage(f"not UTF-8 text: {exc}") from exc
    envelope = Envelope.parse(raw)
    return envelope.task, envelope.id


class Rerouter:
    """Rewrites the routing of messages to one queue through the default exchange, and nothing else in them.

    Workers put a message they could not finish back where `delivery_info` says, so a moved message must name its new
    queue.
    """

    def __init__(self, source: str, target: str) -> None:
        self._target = target
        self._old = _route(source)
        self._new = _route(target)

    def __call__(self, raw: bytes) -> tuple[str, bytes]:
        """(task name, rewritten message)"""
        head = _HEAD.match(raw)
        if head is not None:
            parts = raw.split(self._old, 2)
            if len(parts) == 2:
                return head[1].decode("utf-8", "replace"), parts[0] + self._new + parts[1]
            if len(parts) == 1:
                found = _ROUTE.findall(raw)
                if len(found) == 1:
                    return head[1].decode("utf-8", "replace"), raw.replace(found[0], self._new)
        envelope = Envelope.parse(raw)
        info = envelope.document["properties"].get("delivery_info")
        if not isinstance(info, dict):
            raise BadMessage("unknown envelope: its properties have no delivery_info to rewrite")
        info["exchange"] = ""
        info["routing_key"] = self._target
        return envelope.task, json.dumps(envelope.document).encode()


def _route(queue: str) -> bytes:
    return f'"delivery_info": {{"exchange": "", "routing_key": {json.dumps(queue)}}}'.encode()


def _load(raw: bytes | str) -> Any:
    try:
        return json.loads(raw)
    except (ValueError, RecursionError) as exc:
        raise BadMessage(f"not JSON: {type(exc).__name__}") from exc


def _check(document: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    if not isinstance(document, dict):
        raise BadMessage(f"not a message: a JSON {type(document).__name__} instead of an object")
    headers, properties = document.get("headers"), document.get("properties")
    if "body" not in document or not isinstance(headers, dict) or not isinstance(properties, dict):
        raise BadMessage("not a kombu message: body, headers or properties are missing")
    return headers, properties


def _body(document: dict[str, Any]) -> dict[str, Any]:
    body = _decode_body(document)
    if not isinstance(body, dict):
        raise BadMessage("unknown envelope: no task in its headers, and its body is no protocol 1 message")
    return body


def _decode_body(document: dict[str, Any]) -> Any:
    if document.get("content-type") != "application/json":
        raise BadMessage(f"body of type {document.get('content-type')!r} is not read")
    if document["headers"].get("compression"):
        raise BadMessage("a compressed body is not read")
    body = document["body"]
    encoding = document["properties"].get("body_encoding")
    if encoding == "base64":
        try:
            body = base64.b64decode(body, validate=True)
        except (binascii.Error, TypeError, ValueError) as exc:
            raise BadMessage(f"body is not base64: {exc}") from exc
    elif encoding is not None:
        raise BadMessage(f"unknown body encoding {encoding!r}")
    if not isinstance(body, (str, bytes)):
        raise BadMessage("body is no text")
    return _load(body)


def _integer(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""
