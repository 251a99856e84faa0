# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The certificate of a real Redis, changed by Ansible while a client is connected; and what the roles refuse."""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pki import Authority, Pair

from ansible_collections.celeryops.runbook.plugins.module_utils.engine import certificates
from ansible_collections.celeryops.runbook.plugins.module_utils.engine.backup import Server
from ansible_collections.celeryops.runbook.plugins.module_utils.engine.errors import ConnectionFailed
from support import Ansible, RedisServer, free_port

pytestmark = pytest.mark.ansible

SECRET = "administrator-1"


class Lab:
    def __init__(self, ansible: Ansible, place: Path) -> None:
        self.ansible, self.place, self.port = ansible, place, free_port()
        self.old, self.new = Authority(place / "pki", "old-ca"), Authority(place / "pki", "new-ca")
        self.first, self.second = (ca.sign(f"by-{ca.name}", "IP:127.0.0.1") for ca in (self.old, self.new))
        self.pair, self.trusted, self.socket = place / "redis.pem", place / "ca.pem", place / "redis.sock"
        self.redis: RedisServer | None = None

    def start(self) -> RedisServer:
        tls = {
            "tls-port": self.port, "tls-auth-clients": "no", "tls-ca-cert-file": self.trusted,
            "tls-cert-file": self.pair, "tls-key-file": self.pair, "unixsocket": self.socket,
        }  # fmt: skip
        words = [str(word) for key, value in tls.items() for word in (f"--{key}", value)]
        self.redis = RedisServer(*words, password=SECRET).start()
        return self.redis

    def bring(self, ca: Authority, pair: Pair, step: str, check: bool = False, **options: Any) -> dict[str, Any]:
        asked = {
            "certificate": pair.pem, "key": pair.secret, "ca": ca.pem, "names": ["127.0.0.1"], "path": str(self.pair),
            "ca_path": str(self.trusted), "group": "root", "step": step, "tell": True, "port": self.port,
            "socket": str(self.socket), "password": SECRET, **options,
        }  # fmt: skip
        result = self.ansible.module("redis_certificate", asked, check=check, verbosity=3)
        for secret in (SECRET, *(line for line in pair.secret.splitlines() if "-----" not in line)):
            assert secret not in f"{result} {self.ansible.output}"
        return result

    def shows(self, pair: Pair) -> bool:
        return certificates.shown("127.0.0.1", self.port) == certificates.leaf(pair.pem)


@pytest.fixture
def lab(ansible: Ansible, tmp_path: Path) -> Iterator[Lab]:
    made = Lab(ansible, tmp_path)
    yield made
    if made.redis:
        made.redis.stop()


def test_a_certificate_and_its_ca_change_in_steps(lab: Lab) -> None:
    planned = lab.bring(lab.old, lab.first, "trust", check=True)
    assert planned["changed"] and not planned["told"] and not lab.pair.exists()
    made = lab.bring(lab.old, lab.first, "trust")
    assert made["changed"] and made["serves"] and not made["told"] and made["left"] == []
    assert stat.S_IMODE(lab.pair.stat().st_mode) == 0o640 and stat.S_IMODE(lab.trusted.stat().st_mode) == 0o644
    redis = lab.start()
    again = lab.bring(lab.old, lab.first, "trust")
    assert not again["changed"] and again["told"]

    with socket.create_connection(("127.0.0.1", redis.port)) as client:

        def goes_on() -> None:
            client.sendall(b"PING\r\n")
            assert client.recv(100) == b"+PONG\r\n"

        client.sendall(f"AUTH {SECRET}\r\n".encode())
        assert client.recv(100) == b"+OK\r\n"
        both = lab.bring(lab.new, lab.second, "trust")
        assert (
            both["changed"] and not both["serves"] and both["left"][0].startswith("old-ca (") and lab.shows(lab.first)
        )
        assert not lab.bring(lab.new, lab.second, "trust")["changed"]
        planned = lab.bring(lab.new, lab.second, "serve", check=True)
        assert (
            planned["changed"] and "by-new-ca, from new-ca, until" in planned["diff"]["after"] and lab.shows(lab.first)
        )
        served = lab.bring(lab.new, lab.second, "serve")
        assert served["changed"] and served["told"] and served["serves"] and lab.shows(lab.second)
        ended = lab.bring(lab.new, lab.second, "finish")
        assert (
            ended["changed"]
            and ended["left"] == []
            and certificates.blocks(lab.trusted.read_text()) == [*certificates.blocks(lab.new.pem)]
        )
        assert not lab.bring(lab.new, lab.second, "finish")["changed"]
        goes_on()
    # Written by a run that was cut off before Redis was told.
    lab.pair.write_text(certificates.joined(lab.first.pem, lab.first.secret))
    lab.trusted.write_text(lab.old.pem + lab.new.pem)
    assert redis.cli("CONFIG", "SET", "tls-cert-file", str(lab.pair), "tls-key-file", str(lab.pair)) == "OK"
    lab.pair.write_text(certificates.joined(lab.second.pem, lab.second.secret))
    assert lab.shows(lab.first)
    assert lab.bring(lab.new, lab.second, "finish")["changed"] and lab.shows(lab.second)


def test_a_host_that_shows_nothing_any_more_keeps_no_key(lab: Lab) -> None:
    lab.bring(lab.old, lab.first, "trust")
    none = {"certificate": "", "key": "", "tell": False}
    assert not lab.bring(lab.old, lab.first, "serve", **none)["changed"] and lab.pair.exists()
    gone = lab.bring(lab.old, lab.first, "finish", **none)
    assert gone["changed"] and gone["serves"] and gone["certificate"] == "" and not lab.pair.exists()
    assert not lab.bring(lab.old, lab.first, "finish", **none)["changed"]


def test_what_would_not_do_changes_nothing(lab: Lab) -> None:
    lab.bring(lab.old, lab.first, "trust")
    lab.start()
    before = lab.pair.read_text(), lab.trusted.read_text()
    ended = lab.new.sign("ended", "IP:127.0.0.1", days=0)
    for ca, pair, words in (
        (lab.new, ended, "celeryops_redis_tls_certificate: ended on"),
        (lab.old, lab.second, "celeryops_tls_ca did not sign it"),
        (lab.new, Pair(lab.second.certificate, lab.first.key), "celeryops_redis_tls_key: does not belong"),
        (lab.new, lab.new.sign("elsewhere", "DNS:elsewhere"), "is not for 127.0.0.1"),
    ):
        result = lab.bring(ca, pair, "finish")
        assert result["failed"] and words in result["msg"] and result["category"] == "precondition"
        assert (lab.pair.read_text(), lab.trusted.read_text()) == before and lab.shows(lab.first)
    if os.geteuid() == 0:
        assert lab.bring(lab.new, lab.second, "serve", group="nobody-there")["failed"]


def test_a_client_looks_at_what_redis_shows(lab: Lab) -> None:
    lab.bring(lab.old, lab.first, "trust")
    lab.start()
    module, server = "redis_certificate_info", f"127.0.0.1:{lab.port}"
    seen = lab.ansible.module(module, {"server": server, "ca": lab.old.pem})
    assert seen["certificate"]["subject"] == "by-old-ca" and seen["shown"] == certificates.leaf(lab.first.pem)
    assert 19 < seen["days"] < 21 and not seen["changed"]
    wrong = lab.ansible.module(module, {"server": server, "ca": lab.new.pem})
    assert wrong["failed"] and f"{server}: the certificate is refused" in wrong["msg"]
    named = lab.ansible.module(module, {"server": f"localhost:{lab.port}", "ca": lab.old.pem})
    assert named["failed"] and "mismatch" in named["msg"]


def test_the_host_asks_on_its_socket(lab: Lab) -> None:
    """Also when the certificate of the port has ended."""
    lab.bring(lab.old, lab.first, "trust")
    redis = lab.start()
    server = Server(lab.port, SECRET, socket=str(lab.socket))
    assert server.ask("PING") == "PONG" and server.ask("CONFIG", "GET", "tls-port").split()[1] == str(lab.port)
    asked = {"port": lab.port, "socket": str(lab.socket), "password": SECRET, "confirm": "all keys"}
    assert not lab.ansible.module("redis_flush", asked, check=True).get("failed")
    redis.stop()
    assert lab.socket.exists(), "killed, it leaves that behind"
    with pytest.raises(ConnectionFailed, match="Redis is down"):
        server.ask("PING")


def test_wrong_settings_are_refused(ansible: Ansible, tmp_path: Path) -> None:
    """All of them in one message; then what the certificate itself says, before anything is touched."""
    ca = Authority(tmp_path / "pki", "old-ca")
    good, elsewhere = ca.sign("good", "DNS:redis1"), ca.sign("elsewhere", "DNS:elsewhere")
    role = {"name": "celeryops.runbook.redis", "tasks_from": "preflight"}
    url = f"rediss://:{SECRET}@redis1:6379/0"

    def refused(expected: int = 3, **variables: Any) -> str:
        given = {
            "celeryops_broker_url": url, "celery_redis_hosts": ["localhost"], "celeryops_tls_ca": str(ca.file),
            "celeryops_redis_tls_certificate": good.pem, "celeryops_redis_tls_key": str(good.key), **variables,
        }  # fmt: skip
        *_rest, last = ansible.play([{"ansible.builtin.include_role": role, "vars": given}], expected=expected)
        assert SECRET not in ansible.output and "PRIVATE KEY" not in ansible.output
        return str(last["msg"]) if last.get("failed") else ""

    assert refused(4) == ""
    words = refused(
        celeryops_redis_tls_certificate=str(tmp_path / "none.crt"), celeryops_redis_tls_key=SECRET, celeryops_tls_ca="",
        celeryops_redis_tls_auth_clients=True, celeryops_redis_tls_plain_port=6379,
        celery_redis_extra={"tls-port": 1},
    )  # fmt: skip
    for part in (
        "celeryops_redis_tls_certificate: is empty, no PEM, or a file that cannot be read",
        "celeryops_redis_tls_key: is empty", "celeryops_tls_ca: is empty",
        "celeryops_tls_client_certificate or celeryops_tls_client_key is empty",
        "celeryops_redis_tls_plain_port: 6379 is no port, or that of celeryops_broker_url",
        "celery_redis_extra sets tls-port",
    ):  # fmt: skip
        assert part in words, part
    results = refused(celeryops_result_backend=f"redis://:{SECRET}@redis1:6379/1")
    assert "celeryops_result_backend: is redis:// on the Redis of celeryops_broker_url" in results
    assert "celeryops_broker_url is not rediss://" in refused(celeryops_broker_url=url.replace("rediss", "redis"))
    sentinels = refused(celery_redis_sentinel_hosts=["a", "b", "c"], celery_redis_hosts=["localhost", "b"])
    assert "celeryops_sentinel_group: TLS between replicas and Sentinels is not supported" in sentinels
    named = refused(
        4, celeryops_redis_tls_certificate=str(elsewhere.certificate), celeryops_redis_tls_key=elsewhere.secret
    )
    assert "is not for redis1, which celeryops_broker_url names" in named


def test_the_application_gets_urls_that_verify(ansible: Ansible, tmp_path: Path) -> None:
    ca = Authority(tmp_path / "pki", "old-ca")
    client = ca.sign("client")
    role = {"name": "celeryops.runbook._unit", "tasks_from": "secret"}
    variables = {
        "celeryops_app_name": "shop", "celeryops_app": "shop", "celeryops_config_dir": str(tmp_path),
        "celeryops_group": "root", "celeryops_tls_ca": str(ca.file),
        "celeryops_broker_url": f"rediss://:{SECRET}@redis1:6379/0;rediss://redis2/0?ssl_cert_reqs=none",
        "celeryops_result_backend": "rediss://other/1?health_check_interval=9",
        "celeryops_tls_client_certificate": client.pem, "celeryops_tls_client_key": client.secret,
    }  # fmt: skip
    ansible.play([{"ansible.builtin.include_role": role, "vars": variables}], expected=5)
    assert "PRIVATE KEY" not in ansible.output and SECRET not in ansible.output
    written = (tmp_path / "secret.env").read_text()
    own = f"ssl_certfile={tmp_path}/client.pem&ssl_keyfile={tmp_path}/client.pem"
    query = f"ssl_cert_reqs=required&ssl_check_hostname=true&ssl_ca_certs={tmp_path}/ca.pem&{own}"
    assert (
        f'CELERY_BROKER_URL="rediss://:{SECRET}@redis1:6379/0?{query};rediss://redis2/0?ssl_cert_reqs=none"' in written
    )
    assert f'CELERY_RESULT_BACKEND="rediss://other/1?health_check_interval=9&{query}"' in written
    assert (tmp_path / "client.pem").read_text() == certificates.joined(client.pem, client.secret)
    assert stat.S_IMODE((tmp_path / "client.pem").stat().st_mode) == 0o640
    preflight = {"name": "celeryops.runbook._unit", "tasks_from": "preflight"}
    half = {**variables, "celeryops_tls_client_key": ""}
    *_rest, last = ansible.play([{"ansible.builtin.include_role": preflight, "vars": half}], expected=3)
    assert "celeryops_tls_client_key, celeryops_tls_ca: one of them is empty" in last["msg"]
    plain = {
        **variables,
        "celeryops_tls_ca": "",
        "celeryops_tls_client_certificate": "",
        "celeryops_tls_client_key": "",
    }
    ansible.play([{"ansible.builtin.include_role": role, "vars": plain}], expected=3)
    written = (tmp_path / "secret.env").read_text()
    assert "redis1:6379/0?ssl_cert_reqs=required&ssl_check_hostname=true;rediss://redis2" in written
