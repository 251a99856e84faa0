# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What rotating a certificate relies on: Celery reads CA and own certificate at each connect, and verifies the name."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import celery
import pytest
from pki import Authority, Pair

from ansible_collections.celeryops.runbook.plugins.module_utils.engine import certificates
from ansible_collections.celeryops.runbook.plugins.module_utils.engine.connection import Broker, BrokerSpec
from support import RedisServer, Worker, free_port, wait_until, workers


class Lab:
    """A Redis that wants to see a certificate, and files as the roles write them."""

    def __init__(self, place: Path) -> None:
        self.place, self.port = place, free_port()
        self.old, self.new = Authority(place, "old-ca"), Authority(place, "new-ca")
        self.first, self.second = (ca.sign(f"by-{ca.name}", "IP:127.0.0.1") for ca in (self.old, self.new))
        self.pair, self.trusted = place / "redis.pem", place / "redis-ca.pem"
        self.own, self.ca = place / "client.pem", place / "ca.pem"
        self.serve(self.first, self.old)
        self.trust(self.old)
        self.put(self.own, self.old.sign("client"))
        tls = {
            "tls-port": self.port, "tls-auth-clients": "yes", "tls-ca-cert-file": self.trusted,
            "tls-cert-file": self.pair, "tls-key-file": self.pair,
        }  # fmt: skip
        self.redis = RedisServer(*(str(word) for key, value in tls.items() for word in (f"--{key}", value)))

    def put(self, path: Path, pair: Pair) -> None:
        path.with_suffix(".new").write_text(certificates.joined(pair.pem, pair.secret))
        path.with_suffix(".new").replace(path)

    def serve(self, pair: Pair, *trusted: Authority) -> None:
        self.put(self.pair, pair)
        self.trusted.write_text("".join(ca.pem for ca in trusted))

    def trust(self, *cas: Authority) -> None:
        self.ca.with_suffix(".new").write_text("".join(ca.pem for ca in cas))
        self.ca.with_suffix(".new").replace(self.ca)

    def tell(self) -> None:
        names = ("tls-cert-file", self.pair), ("tls-key-file", self.pair), ("tls-ca-cert-file", self.trusted)
        assert self.redis.cli("CONFIG", "SET", *(str(word) for pair in names for word in pair)) == "OK"

    def drop(self) -> None:
        """Everybody has to connect again."""
        for kind in ("normal", "pubsub"):
            self.redis.cli("CLIENT", "KILL", "TYPE", kind, "SKIPME", "yes")

    def url(self, host: str = "127.0.0.1") -> str:
        told = f"ssl_cert_reqs=required&ssl_check_hostname=true&ssl_ca_certs={self.ca}"
        return f"rediss://{host}:{self.port}/0?{told}&ssl_certfile={self.own}&ssl_keyfile={self.own}"


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    made = Lab(tmp_path)
    with made.redis:
        yield made


def test_certificate_and_ca_change_under_a_worker_that_is_not_restarted(lab: Lab) -> None:
    worker = Worker(lab.url(), "tls@lab")

    def done() -> None:
        lab.drop()
        with celery.Celery("client", broker=lab.url(), backend=lab.url(), set_as_current=False) as client:
            result = client.send_task("lab.add", (1, 2))
            assert result.get(timeout=30) == 3
            # Before Celery 5.6 one that is collected later asks the Redis that is gone by then, for two minutes.
            del result
            gc.collect()

    with workers(worker):
        done()
        # Clients and Redis trust both, Redis and clients show the new ones, then nobody trusts the old one.
        lab.serve(lab.first, lab.old, lab.new)
        lab.tell()
        lab.trust(lab.new, lab.old)
        lab.put(lab.own, lab.new.sign("client-2"))
        done()
        lab.serve(lab.second, lab.old, lab.new)
        lab.tell()
        assert certificates.shown("127.0.0.1", lab.port) == certificates.leaf(lab.second.pem)
        done()
        lab.trust(lab.new)
        lab.serve(lab.second, lab.new)
        lab.tell()
        done()
        # It does verify: one that the former CA signed is refused now.
        lab.serve(lab.first, lab.new)
        lab.tell()
        lab.drop()
        wait_until(lambda: "certificate verify failed" in worker.log.read_text(), 30, "the worker to refuse it")
        lab.serve(lab.second, lab.new)
        lab.tell()
        done()


@pytest.mark.parametrize("part", ["broker", "backend"])
def test_the_name_is_verified(lab: Lab, part: str) -> None:
    app = celery.Celery("client", broker=lab.url("localhost"), backend=lab.url("localhost"))
    with app, pytest.raises(Exception, match=r"(?i)hostname mismatch|doesn't match"):
        if part == "broker":
            app.connection_for_write().ensure_connection(max_retries=1, interval_start=0.1)
        else:
            app.backend.client.ping()


def test_modules_see_until_when(lab: Lab) -> None:
    with Broker(BrokerSpec.build(url=lab.url())) as broker:
        assert broker.redis.ping()
        seen = broker.certificate()
        assert seen and 19 < seen.days() < 21 and seen.names == ["127.0.0.1"]
    with Broker(BrokerSpec.build(url=lab.redis.url())) as broker:
        assert broker.redis.ping() and broker.certificate() is None
