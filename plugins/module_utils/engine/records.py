# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Records in the broker that modules share. The canary's answers are defined in tasks."""

from __future__ import annotations

import contextlib
import json
import re
import time
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from typing import Any

from .connection import Broker
from .errors import LockHeld, PreconditionFailed, UnknownLayout

# Compare and set: nobody else's change between our look and our write is ever lost.
_SWAP = """
local now = redis.call('GET', KEYS[1])
if (now or '') ~= ARGV[1] then return 0 end
if ARGV[2] == '' then redis.call('DEL', KEYS[1]) else redis.call('SET', KEYS[1], ARGV[2], 'PX', ARGV[3]) end
return 1
"""


@dataclass(frozen=True)
class DeployLock:
    """Who deploys. `token` names this one holding of the lock; times are unix seconds of the Redis server."""

    owner: str
    token: str
    started: float
    renewed: float
    controller: str = ""
    pid: int = 0
    release: str = ""
    step: str = ""


@dataclass(frozen=True)
class LockView:
    """The lock as it is: the raw value for compare and set, the record, and the seconds left."""

    raw: bytes
    record: DeployLock | None
    expires_in: float


@dataclass(frozen=True)
class LockChange:
    changed: bool
    before: DeployLock | None
    after: DeployLock | None
    expires_in: float
    resumed: bool = False


def deploy_lock_key(key_prefix: str, name: str) -> str:
    if not re.fullmatch(r"[a-z][a-z0-9-]*", name):
        raise PreconditionFailed(f"name: {name!r} is no application name. Use lower case letters, digits and dashes.")
    return f"{key_prefix}celeryops:lock:deploy:{name}"


def parse_lock(raw: bytes, key: str) -> DeployLock:
    try:
        value = json.loads(raw)
        known = {name: value[name] for name in DeployLock.__dataclass_fields__ if name in value}
        return DeployLock(**known)
    except (ValueError, TypeError, KeyError) as exc:
        raise UnknownLayout(
            f"{key}: holds no deploy lock of this collection. Look who writes it; it was left as it is."
        ) from exc


def time_text(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC")


def next_lock(view: LockView, wanted: DeployLock, takeover_token: str, now: float) -> DeployLock:
    """The record that must stand there when `wanted` holds the lock; LockHeld when it is another's."""
    held = view.record
    if held is None or (held.owner != wanted.owner and held.token == takeover_token):
        return wanted
    if held.owner != wanted.owner:
        raise held_error(view, now, "takeover_token")
    return replace(
        wanted,
        token=held.token,
        started=held.started,
        release=wanted.release or held.release,
        step=wanted.step or held.step,
        controller=wanted.controller or held.controller,
        pid=wanted.pid or held.pid,
    )


def held_error(view: LockView, now: float, option: str) -> LockHeld:
    held = view.record
    if held is None:
        raise ValueError("nobody holds the lock")
    details = ", ".join(
        text
        for text in (
            f"on {held.controller}" if held.controller else "",
            f"process {held.pid}" if held.pid else "",
            f"release {held.release}" if held.release else "",
            f"step {held.step}" if held.step else "",
        )
        if text
    )
    return LockHeld(
        f"the deploy lock is held by {held.owner}{f' ({details})' if details else ''} since {time_text(held.started)}, "
        f"renewed {time_text(held.renewed)}; it expires {time_text(now + view.expires_in)} unless renewed. Wait, or, "
        f"when that run is surely dead, run again with {option}: {held.token}",
        holder=asdict(held),
        expires_in=round(view.expires_in, 1),
    )


class DeployLocks:
    """The deploy lock of one application on one Redis broker."""

    def __init__(self, broker: Broker, name: str) -> None:
        self.broker = broker
        self.key = deploy_lock_key(broker.key_prefix, name)

    @classmethod
    def of(cls, broker: Broker, name: str) -> DeployLocks:
        return cls(broker, name) if broker.kind == "redis" else AmqpDeployLocks(broker, name)

    def now(self) -> float:
        seconds, micros = self.broker.redis.time()
        return float(seconds) + float(micros) / 1e6

    def view(self) -> LockView:
        pipe = self.broker.redis.pipeline(transaction=True)
        pipe.get(self.key)
        pipe.pttl(self.key)
        raw, left = pipe.execute()
        if raw is None:
            return LockView(b"", None, 0.0)
        return LockView(raw, parse_lock(raw, self.key), max(0, left) / 1000)

    def _swap(self, view: LockView, new: bytes, lease: float) -> bool:
        return bool(self.broker.redis.eval(_SWAP, 1, self.key, view.raw, new, int(lease * 1000)))

    def hold(
        self,
        *,
        owner: str,
        lease: float,
        takeover_token: str = "",
        controller: str = "",
        pid: int = 0,
        release: str = "",
        step: str = "",
        dry: bool = False,
    ) -> LockChange:
        """Take the lock, or renew it where the owner has it."""
        while True:
            view, now = self.view(), self.now()
            wanted = DeployLock(owner, str(uuid.uuid4()), now, now, controller, pid, release, step)
            new = next_lock(view, wanted, takeover_token, now)
            same = view.record is not None and replace(new, renewed=0) == replace(view.record, renewed=0)
            resumed = view.record is not None and view.record.owner == owner
            if dry or self._swap(view, json.dumps(asdict(new)).encode(), lease):
                return LockChange(not same, view.record, new, lease, resumed)

    def release(self, *, owner: str, takeover_token: str = "", dry: bool = False) -> LockChange:
        """Give the lock back; another's only with its token."""
        while True:
            view = self.view()
            held = view.record
            if held is None:
                return LockChange(False, None, None, 0.0)
            if held.owner != owner and held.token != takeover_token:
                raise held_error(view, self.now(), "takeover_token")
            if dry or self._swap(view, b"", 0):
                return LockChange(True, held, None, 0.0)


class AmqpDeployLocks(DeployLocks):
    """The same on RabbitMQ: the one message of a queue, which expires with the lease.

    Who looks or writes holds an exclusive queue meanwhile. It ends with the connection, so nobody can leave it behind.
    """

    WAIT = 15.0

    def now(self) -> float:
        return time.time()

    @contextlib.contextmanager
    def _alone(self) -> Iterator[Any]:
        """A channel with transactions, while nobody else has one here."""
        from amqp.exceptions import ResourceLocked

        deadline = time.monotonic() + self.WAIT
        classic = {"x-queue-type": "classic"}  # whatever the virtual host's default is
        with self.broker.guard(), self.broker.celery_app.connection_for_write() as connection:
            # A channel has transactions or confirms, not both.
            connection.transport_options = {**(connection.transport_options or {}), "confirm_publish": False}
            while True:
                channel = connection.channel()
                try:
                    channel.queue_declare(f"{self.key}:mutex", exclusive=True, auto_delete=True, arguments=classic)
                    break
                except ResourceLocked:  # and the broker has closed the channel
                    if time.monotonic() > deadline:
                        raise LockHeld(
                            f"{self.key}: another process has been at the deploy lock for {self.WAIT:g} s. Run again."
                        ) from None
                    time.sleep(0.1)
            channel.queue_declare(self.key, durable=True, auto_delete=False, arguments=classic)
            channel.tx_select()
            yield channel

    def _read(self, channel: Any) -> tuple[LockView, Any]:
        found = channel.basic_get(self.key, no_ack=False)
        if found is None:
            return LockView(b"", None, 0.0), None
        message = channel.message_to_python(found)
        raw = message.body if isinstance(message.body, bytes) else str(message.body).encode()
        left = float((message.headers or {}).get("ends", 0)) - self.now()
        return LockView(raw, parse_lock(raw, self.key), max(0.0, left)), message

    def view(self) -> LockView:
        with self._alone() as channel:
            return self._read(channel)[0]  # it goes back with the connection

    def _swap(self, view: LockView, new: bytes, lease: float) -> bool:
        with self._alone() as channel:
            now, message = self._read(channel)
            if now.raw != view.raw:
                return False
            if message is not None:
                channel.basic_ack(message.delivery_tag)
            if new:
                text = channel.prepare_message(
                    new.decode(),
                    content_type="application/json",
                    content_encoding="utf-8",
                    headers={"ends": str(self.now() + lease)},
                    properties={"delivery_mode": 2, "expiration": str(int(lease * 1000))},
                )
                channel.basic_publish(text, exchange="", routing_key=self.key)
            channel.tx_commit()
            return True
