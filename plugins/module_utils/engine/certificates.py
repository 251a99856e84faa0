# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Certificates of TLS to Redis: judged as a client will judge them, and whom a host trusts while they change.

They are judged by a handshake in memory, so what is refused here is what OpenSSL would refuse later. That needs neither
a tool nor a file of the key nor a Redis. Needs the standard library only.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import socket
import ssl
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .errors import ConnectionFailed, PreconditionFailed

STEPS = ("trust", "serve", "finish")
# What each is called in an inventory.
VARIABLES = {
    "server": {"certificate": "celeryops_redis_tls_certificate", "key": "celeryops_redis_tls_key"},
    "client": {"certificate": "celeryops_tls_client_certificate", "key": "celeryops_tls_client_key"},
}
CA = "celeryops_tls_ca"
_NO_CHECK_TIME = 0x200000  # X509_V_FLAG_NO_CHECK_TIME, for which Python has no name
_BLOCK = re.compile(r"-----BEGIN CERTIFICATE-----\s[A-Za-z0-9+/=\s]+-----END CERTIFICATE-----")


@dataclass(frozen=True)
class Facts:
    """What a certificate says of itself."""

    subject: str
    issuer: str
    names: list[str]
    begins: float  # unix seconds
    ends: float
    fingerprint: str  # SHA-256

    def days(self, now: float | None = None) -> float:
        return (self.ends - (time.time() if now is None else now)) / 86400

    @property
    def text(self) -> str:
        return f"{self.subject}, from {self.issuer}, until {day(self.ends)}, SHA-256 {self.fingerprint[:16]}"


@dataclass(frozen=True)
class Verdict:
    facts: Facts
    strict: str  # why an application on Python 3.13 or newer refuses it; empty: it does not


def day(moment: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(moment))


def blocks(pem: str) -> list[str]:
    """The certificates in a text, each once, without what stands between them."""
    found = (
        "\n".join(line.strip() for line in block.strip().splitlines() if line.strip()) for block in _BLOCK.findall(pem)
    )
    return list(dict.fromkeys(found))


def fingerprint(block: str) -> str:
    try:
        return hashlib.sha256(ssl.PEM_cert_to_DER_cert(block)).hexdigest()
    except ValueError:
        return ""


def label(block: str) -> str:
    """A certificate of a CA in words."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    told: list[Any] = []
    with contextlib.suppress(ssl.SSLError, ValueError):
        context.load_verify_locations(cadata=block)
        told = context.get_ca_certs()
    return f"{_name(told[0].get('subject')) if told else 'a certificate'} ({fingerprint(block)[:16]})"


def trusted(present: str, wanted: str, step: str) -> tuple[str, list[str]]:
    """The file of the CAs after a step, and what `finish` would still take out of it."""
    keep = blocks(wanted)
    more = [block for block in blocks(present) if fingerprint(block) not in {fingerprint(one) for one in keep}]
    if step == "finish":
        more = []
    return "".join(f"{block}\n" for block in [*keep, *more]), [label(block) for block in more]


def joined(certificate: str, key: str) -> str:
    """Certificate and key in one file: a pair is changed at once."""
    return "".join(f"{block}\n" for block in blocks(certificate)) + key.strip() + "\n"


def text_of(pair: str, ca: str, purpose: str = "server") -> str:
    """The certificate of such a file in words."""
    if not blocks(pair):
        return ""
    variables = VARIABLES[purpose]
    key = pair.rpartition("-----END CERTIFICATE-----")[2]
    with contextlib.suppress(PreconditionFailed), _pair(pair, key, variables) as load:
        return _facts_of(load, ca, variables["certificate"], purpose).text
    return label(blocks(pair)[0])


def leaf(text: str) -> str:
    """Fingerprint of the first certificate."""
    found = blocks(text)
    return fingerprint(found[0]) if found else ""


def judge(
    certificate: str, key: str, ca: str, *, names: Sequence[str] = (), purpose: str = "server", now: float | None = None
) -> Verdict:
    """What the certificate says, if whoever trusts `ca` will take it under each of `names`; else all that is wrong."""
    variables = VARIABLES[purpose]
    called = variables["certificate"]
    now = time.time() if now is None else now
    found = [
        f"{name}: holds no certificate in PEM; give its contents, or its file on the controller"
        for name, text in ((called, certificate), (CA, ca))
        if not blocks(text)
    ]
    if "PRIVATE KEY-----" not in key:
        found.append(
            f"{variables['key']}: holds no private key in PEM; give its contents, or its file on the controller"
        )
    if found:
        raise PreconditionFailed("; ".join(found) + ".")
    with _pair(certificate, key, variables) as load:
        facts = _facts_of(load, ca, called, purpose)
        if facts.ends <= now:
            found.append(f"{called}: ended on {day(facts.ends)}; get a new one")
        elif facts.begins > now:
            found.append(f"{called}: begins on {day(facts.begins)} only; wait, or correct the clock of this host")
        else:
            error = _refusal(load, ca, purpose, None)
            if error:
                found.append(f"{called}, {CA}: {error}; renew what has ended in the chain above the certificate")
        for name in names:
            if _refusal(load, ca, purpose, name, timeless=True):
                has = ", ".join(facts.names) or "none"
                found.append(
                    f"{called}: is not for {name}, which celeryops_broker_url names; its names (subjectAltName) are:"
                    f" {has}. Have it issued for {name} too"
                )
        if found:
            raise PreconditionFailed("; ".join(found) + ".")
        return Verdict(facts, _refusal(load, ca, purpose, None, strict=True))


def look(
    host: str, port: int, *, ca: str = "", ca_file: str | None = None, pair: str = "", key_file: str | None = None,
    timeout: float = 5.0,
) -> Facts:  # fmt: skip
    """What Redis shows to a client that verifies it, here and now. `pair`: file of the client's own certificate."""
    context = ssl.create_default_context(cafile=ca_file or None, cadata="".join(blocks(ca)) or None)
    where = f"{host}:{port}"
    try:
        if pair:
            context.load_cert_chain(pair, key_file)
        with (
            socket.create_connection((host, port), timeout) as plain,
            context.wrap_socket(plain, server_hostname=host) as secure,
        ):
            return _facts(secure.getpeercert() or {}, secure.getpeercert(True) or b"")
    except ssl.SSLCertVerificationError as exc:
        raise ConnectionFailed(f"{where}: the certificate is refused: {exc.verify_message}.", cause="refused") from exc
    except (ssl.SSLError, OSError) as exc:
        raise ConnectionFailed(f"{where}: no TLS connection: {exc}. Check that this port speaks TLS.") from exc


def shown(host: str, port: int, timeout: float = 5.0) -> str:
    """Fingerprint of what Redis shows to anybody; empty where nothing speaks TLS there."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    try:
        with socket.create_connection((host, port), timeout) as plain, context.wrap_socket(plain) as secure:
            return hashlib.sha256(secure.getpeercert(True) or b"").hexdigest()
    except (ssl.SSLError, OSError):
        return ""


def _name(pairs: Any) -> str:
    """The common name, or else the last part of a name."""
    found = {key: value for part in pairs or () for key, value in part}
    return str(found.get("commonName") or (list(found.values()) or [""])[-1])


def _facts(told: Mapping[str, Any], der: bytes) -> Facts:
    return Facts(
        subject=_name(told.get("subject")),
        issuer=_name(told.get("issuer")),
        names=[value for kind, value in told.get("subjectAltName", ()) if kind in ("DNS", "IP Address")],
        begins=float(ssl.cert_time_to_seconds(told["notBefore"])),
        ends=float(ssl.cert_time_to_seconds(told["notAfter"])),
        fingerprint=hashlib.sha256(der).hexdigest(),
    )


Load = Callable[[ssl.SSLContext], None]


@contextlib.contextmanager
def _pair(certificate: str, key: str, variables: Mapping[str, str]) -> Iterator[Load]:
    """Loads certificate and key into a context. The key is in memory only."""
    descriptor = os.memfd_create("certificate")
    try:
        os.write(descriptor, joined(certificate, key).encode())
        locked: list[bool] = []

        def ask() -> str:
            locked.append(True)
            return "-"  # else OpenSSL would ask at the terminal

        def load(context: ssl.SSLContext) -> None:
            try:
                context.load_cert_chain(f"/proc/self/fd/{descriptor}", password=ask)
            except (ssl.SSLError, OSError) as exc:
                if locked:
                    raise PreconditionFailed(
                        f"{variables['key']}: is encrypted; Redis and Celery need it open (openssl pkey -in ... -out"
                        " ...), keep it in the vault."
                    ) from exc
                if getattr(exc, "reason", "") == "KEY_VALUES_MISMATCH":
                    raise PreconditionFailed(
                        f"{variables['key']}: does not belong to {variables['certificate']}; give the two of one"
                        " request."
                    ) from exc
                raise PreconditionFailed(
                    f"{variables['certificate']}, {variables['key']}: cannot be read by OpenSSL:"
                    f" {getattr(exc, 'reason', None) or 'no pair of certificate and key'}."
                ) from exc

        yield load
    finally:
        os.close(descriptor)


def _shake(load: Load, ca: str, purpose: str, name: str | None, flags: int) -> ssl.SSLObject:
    """A handshake in memory, in which one side verifies the other; the one that has verified."""
    server, client = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    judges, judged = (client, server) if purpose == "server" else (server, client)
    client.check_hostname = purpose == "server" and name is not None
    client.hostname_checks_common_name = False  # other clients than Python's do not
    judges.verify_mode, judged.verify_mode = ssl.CERT_REQUIRED, ssl.CERT_NONE
    judges.load_verify_locations(cadata="\n".join(blocks(ca)))
    judges.verify_flags |= flags
    load(judged)
    if judged is client:
        load(server)  # which needs one too; nobody looks at it
    one, other = ssl.MemoryBIO(), ssl.MemoryBIO()
    asks = client.wrap_bio(one, other, server_hostname=name)
    answers = server.wrap_bio(other, one, server_side=True)
    for _round in range(10):
        left = 0
        for side in (asks, answers):
            try:
                side.do_handshake()
            except ssl.SSLWantReadError:
                left += 1
        if not left:
            break
    return asks if purpose == "server" else answers


def _facts_of(load: Load, ca: str, called: str, purpose: str) -> Facts:
    """Whatever the time is, so that the dates can be told."""
    try:
        side = _shake(load, ca, purpose, None, _NO_CHECK_TIME)
    except ssl.SSLCertVerificationError as exc:
        raise PreconditionFailed(
            f"{called}: {CA} did not sign it ({exc.verify_message}); give the CA that did, and behind the certificate"
            " those between the two."
        ) from exc
    except ssl.SSLError as exc:
        raise PreconditionFailed(f"{called}, {CA}: OpenSSL refuses them: {exc.reason or exc}.") from exc
    return _facts(side.getpeercert() or {}, side.getpeercert(True) or b"")


def _refusal(
    load: Load, ca: str, purpose: str, name: str | None, *, timeless: bool = False, strict: bool = False
) -> str:
    flags = (_NO_CHECK_TIME if timeless else 0) | (ssl.VERIFY_X509_STRICT if strict else 0)
    try:
        _shake(load, ca, purpose, name, flags)
    except ssl.SSLCertVerificationError as exc:
        return exc.verify_message or str(exc.reason)
    except (ssl.SSLError, ValueError) as exc:  # a name that is none
        return str(getattr(exc, "reason", None) or exc)
    return ""
