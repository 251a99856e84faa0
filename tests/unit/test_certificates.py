# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What a client would refuse is refused with the variable and the cure, and whom a host trusts from step to step."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest
from pki import Authority, Pair

from ansible_collections.celeryops.runbook.plugins.module_utils.engine import certificates
from ansible_collections.celeryops.runbook.plugins.module_utils.engine.certificates import judge, trusted
from ansible_collections.celeryops.runbook.plugins.module_utils.engine.errors import (
    ConnectionFailed,
    PreconditionFailed,
)


class Lab(NamedTuple):
    old: Authority
    new: Authority
    good: Pair


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    place = tmp_path_factory.mktemp("pki")
    old = Authority(place, "old-ca")
    return Lab(old, Authority(place, "new-ca"), old.sign("redis1", "DNS:redis1", "IP:10.0.0.5"))


def refused(lab: Lab, **given: object) -> str:
    asked = {"certificate": lab.good.pem, "key": lab.good.secret, "ca": lab.old.pem, **given}
    with pytest.raises(PreconditionFailed) as caught:
        judge(**asked)  # type: ignore[arg-type]
    assert "PRIVATE" not in caught.value.msg
    return caught.value.msg


def test_a_good_one_tells_what_it_says(lab: Lab) -> None:
    verdict = judge(lab.good.pem, lab.good.secret, lab.new.pem + lab.old.pem, names=["redis1", "10.0.0.5"])
    facts = verdict.facts
    assert (facts.subject, facts.issuer, facts.names) == ("redis1", "old-ca", ["redis1", "10.0.0.5"])
    assert 19 < facts.days() < 21 and verdict.strict == "" and facts.fingerprint == certificates.leaf(lab.good.pem)
    assert facts.text.startswith("redis1, from old-ca, until 20")
    # The certificate of a client needs no name.
    assert judge(lab.good.pem, lab.good.secret, lab.old.pem, purpose="client").facts == facts


def test_each_fault_names_variable_and_cure(lab: Lab, tmp_path: Path) -> None:
    ended = lab.old.sign("ended", "DNS:redis1", days=0)
    other = lab.old.sign("other", "DNS:redis1")
    locked = subprocess.run(
        ["openssl", "pkey", "-in", lab.good.key, "-aes256", "-passout", "pass:abcd"],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    for given, words in (
        ({"certificate": ended.pem, "key": ended.secret}, "celeryops_redis_tls_certificate: ended on 20"),
        ({"now": 1.0}, "celeryops_redis_tls_certificate: begins on 20"),
        ({"key": other.secret}, "celeryops_redis_tls_key: does not belong to celeryops_redis_tls_certificate"),
        ({"key": locked}, "celeryops_redis_tls_key: is encrypted"),
        ({"key": lab.good.secret[:100]}, "celeryops_redis_tls_certificate, celeryops_redis_tls_key: cannot be read"),
        ({"key": "none"}, "celeryops_redis_tls_key: holds no private key"),
        ({"certificate": "none"}, "celeryops_redis_tls_certificate: holds no certificate"),
        ({"ca": "none"}, "celeryops_tls_ca: holds no certificate"),
        ({"ca": lab.new.pem}, "celeryops_redis_tls_certificate: celeryops_tls_ca did not sign it"),
        ({"names": ["redis1", "redis2"]}, "is not for redis2, which celeryops_broker_url names"),
        ({"names": ["10.0.0.6"]}, "its names (subjectAltName) are: redis1, 10.0.0.5"),
        ({"ca": lab.new.pem, "purpose": "client"}, "celeryops_tls_client_certificate: celeryops_tls_ca did not"),
    ):
        assert words in refused(lab, **given), words  # type: ignore[arg-type]
    both = refused(lab, certificate=ended.pem, key=ended.secret, names=["redis2"])
    assert "ended on" in both and "is not for redis2" in both
    unnamed = lab.old.sign("unnamed")
    assert "are: none" in refused(lab, certificate=unnamed.pem, key=unnamed.secret, names=["unnamed"])


def test_a_host_trusts_both_until_the_end(lab: Lab) -> None:
    both, left = trusted(lab.old.pem, lab.new.pem, "trust")
    assert [certificates.label(block)[:6] for block in certificates.blocks(both)] == ["new-ca", "old-ca"]
    assert len(left) == 1 and left[0].startswith("old-ca (")
    assert trusted(both, lab.new.pem, "serve") == (both, left), "the second run changes nothing"
    only, left = trusted(both, lab.new.pem, "finish")
    assert certificates.blocks(only) == certificates.blocks(lab.new.pem) and left == []
    # What stands between the blocks, and line ends of another system, are no other CA.
    assert trusted(only, f"# of 2026\n{lab.new.pem}".replace("\n", "\r\n"), "trust") == (only, [])
    assert trusted("", "", "finish") == ("", [])


def test_nothing_is_shown_where_nothing_speaks_tls() -> None:
    assert certificates.shown("127.0.0.1", 1, 0.5) == ""
    with pytest.raises(ConnectionFailed, match="no TLS connection"):
        certificates.look("127.0.0.1", 1, timeout=0.5)
