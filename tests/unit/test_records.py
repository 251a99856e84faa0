# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import json
from dataclasses import asdict, replace

import pytest

from ansible_collections.celeryops.runbook.plugins.module_utils.engine.errors import (
    LockHeld,
    PreconditionFailed,
    UnknownLayout,
)
from ansible_collections.celeryops.runbook.plugins.module_utils.engine.records import (
    DeployLock,
    LockView,
    deploy_lock_key,
    next_lock,
    parse_lock,
)

HELD = DeployLock("anna@c1", "tok", 1000.0, 1010.0, "c1", 42, "v2", "batch 1")
VIEW = LockView(b"raw", HELD, 120.0)


def wanted(owner: str, **changes: object) -> DeployLock:
    return replace(DeployLock(owner, "fresh", 2000.0, 2000.0), **changes)  # type: ignore[arg-type]


def test_a_free_lock_is_taken() -> None:
    assert next_lock(LockView(b"", None, 0), wanted("bob"), "", 2000) == wanted("bob")


def test_the_owner_renews_and_keeps_what_is_not_said_again() -> None:
    new = next_lock(VIEW, wanted("anna@c1", step="batch 2"), "", 2000)
    assert new == replace(HELD, renewed=2000.0, step="batch 2")


def test_another_is_refused_with_all_that_is_needed_to_decide() -> None:
    with pytest.raises(LockHeld) as caught:
        next_lock(VIEW, wanted("bob"), "", 2000)
    for part in (
        "anna@c1",
        "on c1",
        "process 42",
        "release v2",
        "batch 1",
        "1970-01-01 00:16:40",
        "takeover_token: tok",
    ):
        assert part in caught.value.msg
    assert caught.value.data["holder"] == asdict(HELD)
    with pytest.raises(LockHeld):
        next_lock(VIEW, wanted("bob"), "token of an older lock", 2000)


def test_the_token_takes_over() -> None:
    assert next_lock(VIEW, wanted("bob"), "tok", 2000) == wanted("bob")


def test_records_survive_unknown_fields_but_not_rubbish() -> None:
    assert parse_lock(json.dumps({**asdict(HELD), "later": 1}).encode(), "k") == HELD
    for raw in (b"x", b"[]", b"3", b"{}", b'{"owner": "a"}'):
        with pytest.raises(UnknownLayout, match="k: holds no deploy lock"):
            parse_lock(raw, "k")


def test_keys() -> None:
    assert deploy_lock_key("p:", "shop") == "p:celeryops:lock:deploy:shop"
    for name in ("", "Shop", "a/b", "-a"):
        with pytest.raises(PreconditionFailed, match="name"):
            deploy_lock_key("", name)
