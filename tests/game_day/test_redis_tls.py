# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""TLS from the start, on a fleet of its own, clients with certificates too: all and the CA changed under load."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fleet.story import LEDGER_DB, Play, Story, StoryError
from fleet_support import HOSTS, IDLE, backups, drop_restored, installed, lists, send, verb, waiting
from pki import Authority, Pair
from scorecard import ROWS, Row, all_answer, all_begin, forget, mains

from ansible_collections.celeryops.runbook.plugins.module_utils.engine import certificates

pytestmark = pytest.mark.ansible

VERIFIED = "ssl_cert_reqs=required&ssl_check_hostname=true"


class Secure(Story):
    """The same shop over rediss://. The controller is no host of the fleet, and has its own files."""

    def up(self) -> None:
        super().up()
        place = self.output / "pki"
        self.old, self.new = Authority(place, "old-ca"), Authority(place, "new-ca")
        self.trusted, self.own = place / "trusted.crt", place / "own.pem"
        self.cli = ("--tls", "--cacert", str(self.trusted), "--cert", str(self.own), "--key", str(self.own))
        self.trust(self.old)
        self.show(self.old)
        self.first = self.sign(self.old, "first")
        pair = "ssl_certfile=/etc/celeryops/shop/client.pem&ssl_keyfile=/etc/celeryops/shop/client.pem"
        told = f"{VERIFIED}&ssl_ca_certs=/etc/celeryops/shop/ca.pem&{pair}"
        tls = {
            "shop_redis": f"rediss://:{self.password}@{self.address}:6379",
            "celeryops_environment": {"SHOP_LEDGER_URL": f"{{{{ shop_redis }}}}/{LEDGER_DB}?{told}"},
            "celeryops_redis_tls_auth_clients": True,
            **self.wants(self.old, self.first),
        }
        (self.fleet / "group_vars" / "all" / "30-tls.yml").write_text(json.dumps(tls))

    def sign(self, ca: Authority, name: str, days: int = 20) -> Pair:
        return ca.sign(name, "DNS:redis1", f"IP:{self.address}", days=days)

    def wants(self, ca: Authority, pair: Pair) -> dict[str, str]:
        """Contents and files of the controller do alike."""
        client = ca.sign(f"client-of-{ca.name}")
        return {
            "celeryops_tls_client_certificate": str(client.certificate),
            "celeryops_tls_client_key": client.secret,
            "celeryops_tls_ca": str(ca.file),
            "celeryops_redis_tls_certificate": pair.pem,
            "celeryops_redis_tls_key": str(pair.key),
        }

    def trust(self, *cas: Authority) -> None:
        self.trusted.write_text("".join(ca.pem for ca in cas))

    def show(self, ca: Authority) -> None:
        pair = ca.sign("controller")
        self.own.with_suffix(".new").write_text(certificates.joined(pair.pem, pair.secret))
        self.own.with_suffix(".new").replace(self.own)

    def url(self, host: str, db: int) -> str:
        own = f"ssl_certfile={self.own}&ssl_keyfile={self.own}"
        return f"rediss://:{self.password}@{host}:6379/{db}?{VERIFIED}&ssl_ca_certs={self.trusted}&{own}"

    def play(self, playbook: str, *arguments: str, expect: bool | None = True, **variables: Any) -> Play:
        done = super().play(playbook, *arguments, expect=expect, **variables)
        assert "PRIVATE KEY" not in done.text and self.first.secret.splitlines()[2] not in done.text
        return done

    def drop(self) -> None:
        """Everybody has to connect again."""
        for kind in ("pubsub", "normal"):
            self.redis("CLIENT", "KILL", "TYPE", kind)


@pytest.fixture(scope="module")
def fleet() -> Iterator[Secure]:
    with installed("tls", Secure) as story:
        yield story


def test_the_fleet_speaks_tls_and_nothing_else(fleet: Secure) -> None:
    assert fleet.redis("PING") == "PONG"
    words = fleet.cli
    # Without TLS, and with TLS and no certificate to show.
    for fleet.cli in ((), words[:3]):
        with pytest.raises(StoryError):
            fleet.redis("PING")
    fleet.cli = words
    assert fleet.redis("CONFIG", "GET", "port").split() == ["port", "0"]
    files = "/etc/redis/celeryops-tls.pem /etc/redis/celeryops-ca.pem /run/redis/celeryops.sock"
    assert fleet.ssh("redis1", f"stat -c %a:%U:%G {files}").split() == [
        "640:root:redis", "644:root:root", "700:redis:redis"
    ]  # fmt: skip
    assert fleet.ssh("worker1", "stat -c %a:%U:%G /etc/celeryops/shop/client.pem") == "640:root:shop"
    assert VERIFIED in fleet.ssh("worker1", "cat /etc/celeryops/shop/secret.env")
    assert fleet.play("site", celeryops_release="v1").changed == 0
    assert fleet.play("health_check").stats["celeryops_health"]["verdict"] == "healthy"


def test_a_bad_night_over_tls(fleet: Secure, tmp_path: Path) -> None:
    """What acts on the host of Redis itself, through its socket, and then waits for who comes back over TLS."""
    load = fleet.start("load", "--rate", "20", "--slow", "0.02")
    try:
        time.sleep(2)
        running = mains(fleet)
        fleet.ssh("redis1", "systemctl stop redis-server")
        told = fleet.play("redis_recover").stats["celeryops_redis_recover"]
        assert told["state"] == "down" and told["restarted"] == {host: [] for host in HOSTS}
        all_begin(fleet, time.time(), 30)
        assert mains(fleet) == running
        restarted = fleet.play("emergency_restart", celeryops_emergency_redis=True, celeryops_health_window=0)
        told = restarted.stats["celeryops_emergency_restart"]
        assert told["verdict"] in ("healthy", "warning") and told["killed"] == []
        all_begin(fleet, time.time(), 30)
    finally:
        load.stop(60)
    ledger = fleet.ledger("--wait", "60")
    assert (ledger["lost"], ledger["run_twice"]) == ([], [])

    ids = send(fleet, IDLE, "shop.update_cart", 20)
    try:
        assert fleet.play(verb("timer", tmp_path), celery_redis_backup_calendar="daily").changed > 0
        fleet.ssh("redis1", "systemctl start celeryops-redis-backup.service")
        (by_itself,) = backups(fleet)
        made = fleet.play("redis_backup").stats["celeryops_redis_backup"]["file"]
        assert sorted(backups(fleet)) == sorted([by_itself, made])
        for file in (by_itself, made):
            fleet.redis("DEL", *lists(IDLE), *lists(f"restored.{IDLE}"))
            restored = fleet.play("redis_restore", celeryops_file=file, celeryops_confirm="redis1")
            assert restored.stats["celeryops_redis_restore"]["parked"][IDLE] == len(ids)
            assert sorted(waiting(fleet, f"restored.{IDLE}")) == sorted(ids)
        all_answer(fleet)
    finally:
        fleet.play(verb("no_timer", tmp_path))
        drop_restored(fleet)
        fleet.redis("DEL", *lists(IDLE))
        forget(fleet)


def test_what_would_not_do_is_refused(fleet: Secure) -> None:
    ended = fleet.sign(fleet.new, "ended", days=0)
    for wrong, words in (
        (fleet.wants(fleet.new, ended), "celeryops_redis_tls_certificate: ended on"),
        (fleet.wants(fleet.new, fleet.first), "celeryops_redis_tls_certificate: celeryops_tls_ca did not sign it"),
        (fleet.wants(fleet.new, fleet.new.sign("elsewhere", "DNS:redis1")), f"is not for {fleet.address}, which"),
        (
            {**fleet.wants(fleet.new, ended), "celeryops_redis_tls_key": str(fleet.first.key)},
            "celeryops_redis_tls_key: does not belong to celeryops_redis_tls_certificate",
        ),
    ):
        refused = fleet.play("redis_rotate_secret", expect=False, **wrong)
        assert words in refused.text and refused.changed == 0, refused.text[-2000:]
    refused = fleet.play("site", expect=False, celeryops_release="v1", celeryops_tls_ca="/nowhere/ca.crt")
    assert "celeryops_tls_ca: is" in refused.text and "cannot be read" in refused.text and refused.changed == 0


def test_certificate_and_ca_change_under_load(fleet: Secure) -> None:
    second = fleet.sign(fleet.new, "second", days=10)
    wanted = fleet.wants(fleet.new, second)
    # site does not change a certificate under workers that might not trust it. Redis trusts both CAs from here on.
    before = fleet.play("site", celeryops_release="v1", **wanted)
    assert "redis_rotate_secret brings it to what the variables have" in before.text
    # Who is no host of the fleet trusts both, and shows the new one, first.
    fleet.trust(fleet.old, fleet.new)
    fleet.show(fleet.new)
    running = mains(fleet)
    plan = fleet.play("redis_rotate_secret", "--check", "--diff", **wanted)
    assert plan.changed > 0 and "second, from new-ca" in plan.text
    load = fleet.start("load", "--rate", "100", "--slow", "0.02")
    try:
        done = fleet.play("redis_rotate_secret", "--diff", **wanted)
    finally:
        sent = load.stop()
    report = done.stats["celeryops_redis_rotate_secret"]
    assert report["certificate"].startswith("second, from new-ca") and not any(report["restarted"].values())
    assert sent["refused"] == 0 and mains(fleet) == running, "nothing was restarted"
    ledger = fleet.ledger("--wait", "60")
    assert (ledger["lost"], ledger["run_twice"]) == ([], [])
    remark = "100 tasks a second, none refused to the producer, no worker restarted"
    ROWS.append(
        Row(
            "certificate and CA changed under running workers",
            "`redis_rotate_secret`",
            None,
            done.seconds,
            ledger,
            remark,
        )
    )
    for host, file in (
        ("redis1", "/etc/redis/celeryops-ca.pem"),
        *((host, "/etc/celeryops/shop/ca.pem") for host in HOSTS),
    ):
        assert fleet.ssh(host, f"cat {file}").split() == fleet.new.pem.split()
    again = fleet.play("redis_rotate_secret", **wanted)
    assert again.changed == 0
    # All of them connect again, and trust the new CA only.
    fleet.trust(fleet.new)
    since = time.time()
    fleet.drop()
    load = fleet.start("load", "--rate", "20")
    try:
        all_begin(fleet, since, 40)
    finally:
        load.stop()
    assert mains(fleet) == running
    warned = fleet.play("health_check", expect=None, **wanted)
    assert "the certificate of Redis ends on 20" in warned.text
    assert warned.stats["celeryops_health"]["verdict"] == "warning"


def test_certificate_and_passwords_change_together(fleet: Secure) -> None:
    users = [
        {"name": role, "role": role, "password": f"{role}-secret-over-tls"} for role in ("worker", "beat", "operator")
    ]
    wanted = {**fleet.wants(fleet.new, fleet.sign(fleet.new, "third")), "celeryops_redis_users": users}
    load = fleet.start("load", "--rate", "20", "--slow", "0.02")
    try:
        done = fleet.play("redis_rotate_secret", **wanted)
    finally:
        sent = load.stop()
    report = done.stats["celeryops_redis_rotate_secret"]
    assert report["left"] == {} and report["certificate"].startswith("third, from new-ca")
    assert sent["refused"] == 0 and all(len(report["restarted"][host]) == 2 for host in HOSTS)
    ledger = fleet.ledger("--wait", "60")
    assert (ledger["lost"], ledger["run_twice"]) == ([], [])
    secret = fleet.ssh("worker1", "cat /etc/celeryops/shop/secret.env")
    assert "rediss://worker:worker-secret-over-tls@" in secret and "ssl_ca_certs=/etc/celeryops/shop/ca.pem" in secret
    assert fleet.play("health_check", **wanted).stats["celeryops_health"]["verdict"] == "healthy"
    assert not any(user["password"] in play.text for play in fleet.plays for user in users)
