# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

from pathlib import Path

import pytest

from ansible_collections.celeryops.runbook.plugins.module_utils.engine.connection import (
    Broker,
    BrokerSpec,
    parse_environment,
    read_environment_file,
    scrub,
    scrub_data,
    secret_values,
    split_url,
)
from ansible_collections.celeryops.runbook.plugins.module_utils.engine.errors import PreconditionFailed

ENVIRONMENT = r"""
# comment with \
a continuation that must not count: X=1
; another comment
PLAIN=value with spaces<SPACES>
QUOTED="a \"b\" \$HOME \n # no comment"<SPACES>
SINGLE='it\n stays $as it is'
JOINED=one\
 two
MIXED="left"' right'
EMPTY=
 INDENTED = x
not a variable
1BAD=x
URL=redis://:p%40ss@host:6379/2 # part of the value
MULTI="line 1
line 2"
BACKSLASH=a\ b\\c
""".replace("<SPACES>", "  ")


def test_environment_file_is_read_as_systemd_reads_it() -> None:
    assert parse_environment(ENVIRONMENT) == {
        "PLAIN": "value with spaces",
        "QUOTED": 'a "b" $HOME \\n # no comment',
        "SINGLE": r"it\n stays $as it is",
        "JOINED": "one two",
        "MIXED": "left right",
        "EMPTY": "",
        "INDENTED": "x",
        "URL": "redis://:p%40ss@host:6379/2 # part of the value",
        "MULTI": "line 1\nline 2",
        "BACKSLASH": "a b\\c",
    }


@pytest.mark.parametrize(
    "text, secret",
    [
        ("Error at redis://:s3cr3t@host:6379/0.", "s3cr3t"),
        ("amqp://user:s3cr3t@host//", "s3cr3t"),
        ("sentinel://:s3cr3t@h1:1;sentinel://:s3cr3t@h2:2/0", "s3cr3t"),
        ("rediss://u:s3/cr3t@host", "s3/cr3t"),
        ("redis://u:s3@cr3t@host", "cr3t"),
        ("redis+socket:///run/r.sock?password=s3cr3t&virtual_host=1", "s3cr3t"),
        ("['redis://:s3cr3t@a', 'redis://:s3cr3t@b']", "s3cr3t"),
        ("redis://s3cr3t@host", "s3cr3t"),
        ("https://x/?api_key=s3cr3t", "s3cr3t"),
    ],
)
def test_scrub_removes_credentials_of_every_form(text: str, secret: str) -> None:
    assert secret not in scrub(text)
    assert "***" in scrub(text)


def test_scrub_keeps_the_rest() -> None:
    text = "node a@b at redis://host:6379/0, mail to x@y"
    assert scrub(text) == text
    assert scrub("sentinel://:p@h1:1;sentinel://:p@h2:2/0") == "sentinel://***@h1:1;sentinel://***@h2:2/0"
    assert scrub("it was hunter2", "hunter2") == "it was ***"
    assert scrub_data({"a": ["redis://:p@h/0", 1, None]}) == {"a": ["redis://***@h/0", 1, None]}


def test_secrets_are_found_by_name_at_any_depth() -> None:
    options = {"sentinel_kwargs": {"password": "deep"}, "master_name": "mine", "list": [{"api_key": "k"}], "port": 1}
    assert sorted(secret_values(options)) == ["deep", "k"]


@pytest.mark.parametrize(
    "url, expected",
    [
        ("redis://", ("redis", "127.0.0.1", 6379, None, None, "")),
        ("redis://:p%40ss@host:7000/3", ("redis", "host", 7000, None, "p@ss", "3")),
        ("rediss://u:p@[::1]:7000/", ("rediss", "::1", 7000, "u", "p", "")),
        ("sentinel://h1", ("sentinel", "h1", 26379, None, None, "")),
        ("amqp://u:p@h//", ("amqp", "h", 5672, "u", "p", "")),
        ("redis+socket:///run/r.sock?virtual_host=4", ("redis+socket", "127.0.0.1", 6379, None, None, "4")),
    ],
)
def test_urls_are_taken_apart_as_kombu_does(url: str, expected: tuple[object, ...]) -> None:
    endpoint = split_url(url)[0]
    found = (endpoint.scheme, endpoint.host, endpoint.port, endpoint.username, endpoint.password, endpoint.database)
    assert found == expected


@pytest.mark.parametrize(
    "url, part",
    [
        ("hunter2", "what was given is not supported"),
        ("kafka://h", "scheme kafka is not supported"),
        ("redis://:hun/ter2@host:1/0", "quote special characters"),
        ("redis://h/nine", "must be a number, not 'nine'"),
        ("redis+socket://", "give the socket's path"),
        ("redis://a;amqp://b", "must share a scheme"),
        ("sentinel://h/0", "master_name"),
    ],
)
def test_a_bad_url_is_one_clear_error_without_the_secret(url: str, part: str) -> None:
    with pytest.raises(PreconditionFailed) as caught:
        BrokerSpec.build(url=url)
    assert part in caught.value.msg
    assert "hun" not in caught.value.msg


def test_the_url_wins_over_the_environment_file(tmp_path: Path) -> None:
    path = tmp_path / "secret.env"
    path.write_text(
        "CELERY_BROKER_URL=redis://:inside@h/1\nCELERY_RESULT_BACKEND=redis://h/2\nCELERYOPS_KEY_PREFIX=shop:\n"
        'CELERYOPS_TRANSPORT_OPTIONS=\'{"priority_steps": [0, 5], "sep": ":"}\'\n'
    )
    spec = BrokerSpec.build(environment_file=str(path))
    broker = Broker(spec)
    assert (spec.url, spec.result_backend, broker.key_prefix) == ("redis://:inside@h/1", "redis://h/2", "shop:")
    assert (broker.db, broker.priority_steps, broker.sep, broker.kind) == (1, (0, 5), ":", "redis")
    assert spec.secrets == ["redis://:inside@h/1", "inside"]
    assert "inside" not in repr(spec)
    given = BrokerSpec.build(url="redis://x/0", environment_file=str(path), key_prefix="", transport_options={})
    assert (given.url, given.key_prefix, given.transport_options) == ("redis://x/0", "", {})


def test_modules_connect_as_the_operator(tmp_path: Path) -> None:
    """Where Redis has a user for them; the application's own environment stays as it is."""
    path, own = tmp_path / "secret.env", tmp_path / "operator.env"
    path.write_text(
        "CELERY_BROKER_URL=redis://worker:inside@h/1\nCELERY_RESULT_BACKEND=db+sqlite://\nCELERYOPS_KEY_PREFIX=shop:\n"
        f"CELERYOPS_OPERATOR_FILE={own}\n"
    )
    with pytest.raises(PreconditionFailed, match="cannot read"):
        BrokerSpec.build(environment_file=str(path))
    own.write_text("CELERY_BROKER_URL=redis://operator:hidden@h/1\n")
    spec = BrokerSpec.build(environment_file=str(path))
    assert (spec.url, spec.key_prefix, spec.result_backend) == ("redis://operator:hidden@h/1", "shop:", "db+sqlite://")
    assert read_environment_file(str(path))["CELERY_BROKER_URL"] == "redis://worker:inside@h/1"
    assert BrokerSpec.build(url="redis://x/0", environment_file=str(path)).url == "redis://x/0"


@pytest.mark.parametrize(
    "text, part",
    [
        (None, "cannot read"),
        ("OTHER=1\n", "has no CELERY_BROKER_URL"),
        ("CELERY_BROKER_URL=redis://h\nCELERYOPS_TRANSPORT_OPTIONS=[]\n", "must be a JSON object"),
    ],
)
def test_a_bad_environment_file_is_named(tmp_path: Path, text: str | None, part: str) -> None:
    path = tmp_path / "secret.env"
    if text is not None:
        path.write_text(text)
    with pytest.raises(PreconditionFailed, match=part) as caught:
        BrokerSpec.build(environment_file=str(path))
    assert str(path) in caught.value.msg


def test_nothing_given_says_what_to_give() -> None:
    with pytest.raises(PreconditionFailed, match="broker_url, environment_file or app"):
        BrokerSpec.build()


@pytest.mark.parametrize("steps", [[], "0,3", [0, "3"], [0, True]])
def test_priority_steps_must_be_numbers(steps: object) -> None:
    with pytest.raises(PreconditionFailed, match="priority_steps"):
        BrokerSpec.build(url="redis://h", transport_options={"priority_steps": steps})


def test_global_keyprefix_may_come_with_the_transport_options() -> None:
    spec = BrokerSpec.build(url="redis://h", transport_options={"global_keyprefix": "p:"})
    assert (spec.key_prefix, dict(spec.transport_options)) == ("p:", {})


@pytest.mark.parametrize(
    "url, prefix, options, topics",
    [
        ("redis://h/3", "", {}, ["/3.celery.pidbox"]),
        ("redis://h/3", "p:", {}, ["p:/3.celery.pidbox"]),
        ("redis://h/3", "", {"fanout_prefix": False}, ["celery.pidbox"]),
        ("redis://h/3", "", {"fanout_prefix": "my-{db}-"}, ["my-3-celery.pidbox"]),
        (
            "sentinel://h/3",
            "",
            {"master_name": "m", "sentinel_fanout_compat": True},
            ["/3.celery.pidbox", "/{db}.celery.pidbox"],
        ),
    ],
)
def test_channels_of_a_broadcast(url: str, prefix: str, options: dict[str, object], topics: list[str]) -> None:
    broker = Broker(BrokerSpec.build(url=url, key_prefix=prefix, transport_options=options))
    assert broker.fanout_topics("celery.pidbox") == topics
