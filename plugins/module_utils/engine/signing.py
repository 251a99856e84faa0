# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Signed tasks: an HMAC-SHA256 in the header celeryops_signature, over what decides what is run.

Celery's own message security signs the body only, so a message can be given another task or id and stays valid; it
needs one certificate for each sender, and changes the type of every body, results and remote control included.
"""

from __future__ import annotations

import hmac
import json
import os
import re
import stat
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .errors import CeleryOpsError
from .queues import RedisQueues

HEADER = "celeryops_signature"
VARIABLE = "CELERYOPS_SIGNING_FILE"
COMMAND = "celeryops_signing"
SECRET_LEAST = 32
UNSIGNED = "unsigned"
STEPS = ("prepare", "sign", "finish")
_VERSION = "1"
_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
# Retries, expiry and routing change on the lawful way of a message: a requeue resets them.
_SIGNED = ("task", "id", "eta", "timelimit", "group")
_LOOK_SECONDS = 1.0
# An id may be given as an object, such as a UUID; it arrives as text.
_encode = json.JSONEncoder(default=str).encode
# No string in a JSON document can hold these quotes unescaped, so a match is a member of an object.
_SIGNER = re.compile(rb'"celeryops_signature": "1:([A-Za-z0-9._-]{1,64}):[0-9a-f]{64}"')


class SigningError(CeleryOpsError):
    category = "signing"


@dataclass(frozen=True)
class Keys:
    """The first key signs, all are accepted. `require`: what none of them signed is refused."""

    secrets: Mapping[str, str] = field(repr=False)
    require: bool = True
    _begun: dict[str, hmac.HMAC] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def ids(self) -> list[str]:
        return list(self.secrets)

    @property
    def signer(self) -> str:
        return next(iter(self.secrets))

    def mac(self, key: str) -> hmac.HMAC:
        """An HMAC that has taken in the key already, which is half of the work for a small message."""
        begun = self._begun.get(key)
        if begun is None:
            begun = self._begun[key] = hmac.new(self.secrets[key].encode(), digestmod="sha256")
        return begun.copy()

    def describe(self) -> str:
        """For a diff: no secret in it."""
        accepts = "".join(f"accepts: {name}\n" for name in self.ids)
        return f"signs: {self.signer}\n{accepts}unsigned: {'refused' if self.require else 'accepted'}\n"

    def dump(self) -> str:
        keys = [{"id": name, "secret": secret} for name, secret in self.secrets.items()]
        return json.dumps({"require": self.require, "keys": keys}, indent=2) + "\n"


def check(keys: Any, require: bool, where: str) -> Keys:
    """The keys out of a list of {id, secret}; one clear error that never holds a secret."""
    if not isinstance(keys, Sequence) or isinstance(keys, (str, bytes)) or not keys:
        raise SigningError(f"{where}: there is no key. Give a list of keys, each with id and secret.")
    secrets: dict[str, str] = {}
    for number, key in enumerate(keys, 1):
        name, secret = (key.get("id"), key.get("secret")) if isinstance(key, Mapping) else (None, None)
        if not isinstance(name, str) or not _ID.fullmatch(name) or name == UNSIGNED:
            raise SigningError(
                f"{where}: key {number} has no proper id. Give it one of letters, digits, dots, dashes and underscores"
                f", such as 2026-11."
            )
        if not isinstance(secret, str) or len(secret.encode()) < SECRET_LEAST:
            raise SigningError(
                f"{where}: the secret of key {name} is missing or shorter than {SECRET_LEAST} characters. Make one "
                f"with openssl rand -hex 32."
            )
        if name in secrets:
            raise SigningError(f"{where}: two keys have the id {name}. Give each its own.")
        secrets[name] = secret
    return Keys(secrets, require)


def load(path: str) -> Keys:
    """The keys of a file which only its owner may read."""
    where = f"{VARIABLE} {path}"
    try:
        with open(path, encoding="utf-8") as handle:
            mode = stat.S_IMODE(os.fstat(handle.fileno()).st_mode)
            document = json.load(handle)
        keys, require = document["keys"], document["require"]
    except OSError as exc:
        raise SigningError(
            f"{where}: cannot be read: {exc.strerror}. Write it with celery_signing_keys or site, for this user."
        ) from exc
    except (ValueError, KeyError, TypeError) as exc:
        raise SigningError(f"{where}: holds no signing keys. Write it with celery_signing_keys or site.") from exc
    if mode & 0o077:
        raise SigningError(f"{where}: others may read it (mode {mode:04o}). Take the keys for known, set it to 0400.")
    return check(keys, bool(require), where)


class Ring:
    """The keys of a file, read again when it has changed. What it holds stays in force while the file is broken."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.problem = ""
        self._stamp = self._look()
        self._looked = time.monotonic()
        self._keys = load(path)

    def keys(self, now: bool = False) -> Keys:
        moment = time.monotonic()
        if now or moment - self._looked >= _LOOK_SECONDS:
            self._looked = moment
            stamp = self._look()
            if stamp != self._stamp:
                try:
                    self._keys, self.problem = load(self.path), ""
                except SigningError as exc:
                    self.problem = exc.msg
                self._stamp = stamp
        return self._keys

    def _look(self) -> tuple[int, ...]:
        try:
            found = os.stat(self.path)
        except OSError:
            return ()
        return found.st_mtime_ns, found.st_ino, found.st_size, found.st_mode

    def judge(self, headers: Mapping[str, Any], content: tuple[str, str], body: bytes) -> str:
        """Why a message is not to be trusted; empty if it is."""
        return judge(self.keys(), headers, content, body) and judge(self.keys(now=True), headers, content, body)


def digest(keys: Keys, key: str, headers: Mapping[str, Any], content: tuple[str, str], body: bytes) -> str:
    mac = keys.mac(key)
    mac.update(_encode([_VERSION, key, *(headers.get(name) for name in _SIGNED), *content]).encode() + b"\n" + body)
    return mac.hexdigest()


def sign(keys: Keys, headers: Mapping[str, Any], content: tuple[str, str], body: bytes) -> str:
    key = keys.signer
    return f"{_VERSION}:{key}:{digest(keys, key, headers, content, body)}"


def judge(keys: Keys, headers: Mapping[str, Any], content: tuple[str, str], body: bytes) -> str:
    """Why a message is not to be trusted; empty if it is."""
    found = headers.get(HEADER)
    if found is None:
        return "it is not signed"
    version, key, given = [*str(found).split(":", 2), "", ""][:3]
    if version != _VERSION or not _ID.fullmatch(key):
        return "its signature is of no known form"
    if key not in keys.secrets:
        return f"it is signed with key {key}, which is not accepted here"
    if not hmac.compare_digest(given.encode(), digest(keys, key, headers, content, body).encode()):
        return f"its signature with key {key} does not fit: it was altered, or signed with another secret"
    return ""


def raw(body: Any) -> bytes:
    return body.encode() if isinstance(body, str) else bytes(body or b"")


def is_task(headers: Mapping[str, Any] | None, body: Any) -> bool:
    """Whether this is a task of protocol 2 or 1, no result, event or remote control."""
    if headers and "task" in headers and "id" in headers:
        return True
    return isinstance(body, Mapping) and {"task", "id", "args"} <= body.keys()


_ring: Ring | None = None


def sign_publishing(ring: Ring) -> None:
    """From now on every task that this process publishes is signed: kombu serializes all of them in one place."""
    global _ring
    first, _ring = _ring is None, ring
    if not first:
        return
    from kombu import messaging
    from kombu.compression import compress

    plain = messaging.Producer._prepare

    def prepare(
        self: Any,
        body: Any,
        serializer: Any = None,
        content_type: Any = None,
        content_encoding: Any = None,
        compression: Any = None,
        headers: Any = None,
    ) -> Any:
        # What comes serialized was not made here, such as a dead letter that is sent on: it keeps what it has.
        if content_type or headers is None or _ring is None or not is_task(headers, body):
            return plain(self, body, serializer, content_type, content_encoding, compression, headers)
        text, kind, encoding = plain(self, body, serializer, None, None, None, headers)
        # kombu undoes the compression before anyone looks at the body.
        headers[HEADER] = sign(_ring.keys(), headers, (kind, encoding), raw(text))
        if compression:
            text, headers["compression"] = compress(text, compression)
        return text, kind, encoding

    messaging.Producer._prepare = prepare


def sign_with(path: str) -> None:
    """The same with the keys of this file, for a process that has not been told yet."""
    if _ring is None or _ring.path != path:
        sign_publishing(Ring(path))


# Keys on hosts


def plan(found: Keys | None, wanted: Keys | None, step: str, in_use: bool) -> Keys | None:
    """What a host is to hold after this step on the way from what it holds to what is wanted; None for no keys.

    prepare: accepts all keys of both, signs as before; never stricter than before, but a host that nobody uses yet.
    sign: signs with the wanted one. finish: only what is wanted.
    """
    if wanted is None:
        if found is not None and found.require:
            raise SigningError(
                "celeryops_signing_keys: is empty, and workers here still refuse unsigned tasks. Set "
                "celeryops_signing_require to false with the keys in place, run site on all hosts, then take them out."
            )
        return None
    if found is None:
        return Keys(wanted.secrets, wanted.require and (step == "finish" or not in_use))
    for name, secret in wanted.secrets.items():
        if found.secrets.get(name, secret) != secret:
            raise SigningError(
                f"celeryops_signing_keys: key {name} has another secret on this host. A new secret needs a new id; "
                f"then run rotate_signing_key."
            )
    if step == "finish":
        return wanted
    first, second = (found, wanted) if step == "prepare" else (wanted, found)
    both = {**first.secrets, **{k: v for k, v in second.secrets.items() if k not in first.secrets}}
    return Keys(both, found.require and wanted.require)


def not_ready(nodes: Mapping[str, Any], keys: Iterable[str]) -> list[str]:
    """Which workers would refuse tasks signed with one of these keys, or do not sign at all. In words."""
    found = []
    for node, told in sorted(nodes.items()):
        if not isinstance(told, Mapping) or not told.get("accepts"):
            found.append(f"{node} does not sign: run site, which gives it the keys and restarts it")
        elif told.get("problem"):
            found.append(f"{node} cannot read its keys: {told['problem']}")
        elif lacking := [key for key in keys if key not in told["accepts"]]:
            found.append(f"{node} does not accept key {', '.join(lacking)}")
    return found


def leaving(
    messages: Mapping[str, dict[str, int]], nodes: Mapping[str, Any], keys: Iterable[str], unsigned: bool
) -> dict[str, dict[str, int]]:
    """Messages that a worker takes today, and would refuse if only these keys were accepted."""
    told = [item for item in nodes.values() if isinstance(item, Mapping)]
    taken = {key for item in told for key in item["accepts"]}
    if len(told) < len(nodes) or not all(item["require"] for item in told):
        taken.add(UNSIGNED)
    stays = {*keys, *([] if unsigned else [UNSIGNED])}
    return {key: counts for key, counts in messages.items() if key in taken - stays}


def census(queues: RedisQueues) -> tuple[dict[str, dict[str, int]], dict[str, dict[str, int]]]:
    """Messages by key and queue: those that wait or are held by workers ('' for the queue), and the dead letters."""
    live: dict[str, Counter[str]] = {}
    dead: dict[str, Counter[str]] = {}
    for queue in queues.queues():
        counts = dead if queue.endswith(".dead") else live
        for message in queues.messages(queue):
            counts.setdefault(signer_of(message), Counter())[queue] += 1
    queues.check_unacked()
    for _tag, message in queues.client.hscan_iter(queues.unacked_key, count=200):
        live.setdefault(signer_of(message), Counter())[""] += 1
    return {key: dict(found) for key, found in live.items()}, {key: dict(found) for key, found in dead.items()}


def signer_of(message: bytes) -> str:
    found = _SIGNER.search(message)
    return found[1].decode() if found else UNSIGNED
