# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""celery_deploy_lock run by Ansible against a real Redis."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest

from support import Ansible, RedisServer, wait_until

pytestmark = pytest.mark.ansible
KEY = "celeryops:lock:deploy:shop"


@pytest.fixture
def lock(ansible: Ansible, broker: RedisServer, venv: Path) -> Any:
    def run(*tasks: dict[str, Any], **options: Any) -> list[dict[str, Any]]:
        defaults = {"broker_url": broker.url(), "virtualenv": str(venv)}
        return ansible.play(
            [{"celeryops.runbook.celery_deploy_lock": {"name": "shop", **task}} for task in tasks],
            defaults=defaults,
            **options,
        )

    return run


def test_one_owner_at_a_time(lock: Any, broker: RedisServer) -> None:
    anna, bob = {"owner": "anna@c1"}, {"owner": "bob@c2"}
    taken, renewed, stepped, refused, kept = lock(
        {**anna, "release": "v2", "controller": "c1", "pid": 42, "lease": 50},
        anna,
        {**anna, "step": "batch 1"},
        bob,
        {**bob, "state": "released"},
    )
    assert taken["changed"] and taken["previous"] is None and not taken["resumed"]
    assert not renewed["changed"] and renewed["resumed"]
    assert (
        renewed["lock"]["renewed"] > taken["lock"]["renewed"] and renewed["lock"]["started"] == taken["lock"]["started"]
    )
    assert stepped["changed"] and stepped["lock"]["step"] == "batch 1" and stepped["lock"]["release"] == "v2"
    for result in (refused, kept):
        assert result["failed"] and result["category"] == "lock_held"
        for part in ("anna@c1", "on c1", "process 42", "release v2", "step batch 1", taken["lock"]["token"]):
            assert part in result["msg"]
        assert result["holder"]["owner"] == "anna@c1"
    stale, over, lost, given, nobody = lock(
        {**bob, "takeover_token": "of another lock"},
        {**bob, "takeover_token": taken["lock"]["token"], "lease": 60},
        {**anna, "state": "released"},
        {**bob, "state": "released"},
        {**bob, "state": "released"},
    )
    assert stale["failed"]
    assert over["changed"] and over["previous"]["owner"] == "anna@c1" and over["lock"]["owner"] == "bob@c2"
    assert lost["failed"] and "bob@c2" in lost["msg"]
    assert given["changed"] and given["lock"] is None and not nobody["changed"]
    assert broker.keys() == []


def test_check_mode_is_truthful_and_touches_nothing(lock: Any, broker: RedisServer) -> None:
    anna = {"owner": "anna@c1"}
    (foreseen,) = lock(anna, check=True)
    assert foreseen["changed"] and foreseen["lock"]["owner"] == "anna@c1" and broker.keys() == []
    lock(anna)
    raw = broker.cli("GET", KEY)
    renewed, stepped, refused, released = lock(
        anna, {**anna, "step": "x"}, {"owner": "bob"}, {**anna, "state": "released"}, check=True
    )
    assert (renewed["changed"], stepped["changed"], released["changed"]) == (False, True, True)
    assert refused["failed"]
    assert broker.cli("GET", KEY) == raw


def test_the_lock_of_a_dead_run_ends_by_itself(lock: Any, broker: RedisServer) -> None:
    (held,) = lock({"owner": "anna@c1", "lease": 1})
    assert held["changed"]
    wait_until(lambda: not broker.keys(), 5, "the end of the lease")
    (taken,) = lock({"owner": "bob@c2", "lease": 77})
    assert taken["changed"] and taken["previous"] is None
    assert 70000 < int(broker.cli("PTTL", KEY)) <= 77000


def test_two_at_once_get_one_lock(broker: RedisServer, venv: Path, tmp_path: Path) -> None:
    results: list[dict[str, Any]] = []

    def run(owner: str) -> None:
        directory = tmp_path / owner
        directory.mkdir()
        arguments = {"name": "shop", "owner": owner, "broker_url": broker.url(), "virtualenv": str(venv)}
        results.append(Ansible(directory).module("celery_deploy_lock", arguments))

    threads = [threading.Thread(target=run, args=(owner,)) for owner in ("anna", "bob", "carl")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(result.get("failed", False) for result in results) == [False, True, True]
    winner = next(result["lock"]["owner"] for result in results if not result.get("failed"))
    assert json.loads(broker.cli("GET", KEY))["owner"] == winner


def test_bad_input_and_foreign_keys(lock: Any, broker: RedisServer) -> None:
    bad_name, bad_lease, no_owner, amqp = lock(
        {"name": "a/b", "owner": "x"},
        {"owner": "x", "lease": 0},
        {"owner": " "},
        {"owner": "x", "broker_url": "amqp://127.0.0.1:1//"},
    )
    assert "is no application name" in bad_name["msg"]
    assert "lease: must be at least 1 second" in bad_lease["msg"]
    assert "owner: must not be empty" in no_owner["msg"]
    assert "cannot be reached" in amqp["msg"]
    broker.cli("RPUSH", KEY, "x")
    (foreign,) = lock({"owner": "x"})
    assert foreign["category"] == "wrong_type" and KEY in foreign["msg"]
    broker.cli("DEL", KEY)
    broker.cli("SET", KEY, "something else")
    (unknown,) = lock({"owner": "x"})
    assert unknown["category"] == "unknown_layout" and broker.cli("GET", KEY) == "something else"
