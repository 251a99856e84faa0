# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What speaks against a release with other libraries: each rule where it applies, and where it does not."""

from __future__ import annotations

from typing import Any

import pytest

from ansible_collections.celeryops.runbook.plugins.module_utils.engine.upgrade import (
    CHANGES,
    Case,
    Release,
    Waiting,
    judge,
    older,
    within,
)

JSON, YAML, PICKLE = "application/json", "application/x-yaml", "application/x-python-serialize"
SEEN = {"visibility_timeout": 60, "accept_content": [JSON], "task_serializer": JSON, "result_serializer": JSON}


def release(
    celery: str = "5.6.3", kombu: str = "", python: str = "3.11.2", redis: str = "6.4.0", **more: Any
) -> Release:
    packages = {"celery": celery, "kombu": kombu or celery, "billiard": "4.3.2", "redis": redis}
    more.setdefault("known", frozenset({"task_serializer", "accept_content"}))
    values = {**SEEN, **more.pop("values", {})}
    return Release(python, packages, values=values, names=frozenset(more.pop("names", ())), **more)


NEW = {"celery": "5.7.0", "redis": "8.1.0"}


def ids(case: Case) -> list[str]:
    return [f"{one.severity} {one.id}" for one in judge(case)]


def test_versions_are_compared_as_numbers() -> None:
    assert older("5.6.3", "5.10") and not older("5.7", "5.7.0") and not older("5.7.0", "5.7") and older("5.6", "6.0rc1")
    assert within("6.4.0", "!=4.5.5,!=5.0.2,<6.5,>=4.5.2") and not within("6.5", "<6.5,>=4.5.2")
    assert within("26.3", "==26.3") and not within("5.2.2", "<=5.2.1") and not within("5.0.2", "!=5.0.2")
    assert within("4.9", "~=4.2") and not within("5.0", "~=4.2") and within("1", "")


def test_a_plain_upgrade_has_nothing_against_it() -> None:
    assert ids(Case(release(), release(**NEW))) == []
    assert ids(Case(release(), release())) == [], "the same again"


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        (Case(release(**NEW), release()), "refuse downgrade"),
        (Case(release(kombu="5.7.0"), release(kombu="5.6.2")), "refuse downgrade"),
        (Case(release("5.4.0"), release(**NEW)), "warn several-minors"),
        (Case(release("5.7.0"), release("5.8.0")), "warn unknown-version"),
        (Case(release(), release(**NEW, python="3.9.2")), "refuse python"),
        (Case(release(), release("5.7.0", redis="6.3", requires=[["kombu", 'redis<9.0.0,>=6.4.0; extra == "redis"']])),
         "refuse requirements"),
        (Case(release(), release(**NEW, requires=[["celery", "billiard (>=4.4,<5)"]])), "refuse requirements"),
        (Case(release(known=frozenset({"task_gone"})), release(**NEW, names={"task_gone"})), "refuse setting-removed"),
        (Case(release(), release(**NEW, names={"CELERY_ACKS_LATE"}, known=frozenset({"CELERY_ACKS_LATE"}))),
         "warn setting-names"),
        (Case(release(), release(**NEW, values={"control_queue_durable": True})), "refuse control-queue-exclusive"),
        (Case(release(), release(**NEW, values={"event_queue_durable": True})), "refuse event-queue-exclusive"),
        (Case(release(), release(**NEW, names={"task_acks_on_failure_or_timeout"})), "warn acks-on-failure-or-timeout"),
        (Case(release("5.5.3"), release(values={"transport_options": ["polling_interval"]})), "warn polling-interval"),
        (Case(release("5.4.0", "5.3.7"), release("5.5.3"), "sentinel"), "refuse sentinel-fanout-topic"),
        (Case(release("5.7.0"), release("6.0.0", values={"broker_connection_retry": False})),
         "warn connection-retry-on-startup"),
        (Case(release("5.7.0"), release("6.0.0")), "warn cancel-on-connection-loss"),
        (Case(release("5.7.0", known=frozenset({"BROKER_URL"})), release("6.0.0", names={"BROKER_URL"})),
         "refuse old-setting-names"),
        (Case(release(), release(**NEW, values={"task_serializer": YAML, "accept_content": [JSON, YAML]})),
         "refuse content-mixed"),
        (Case(release(), release(**NEW, values={"accept_content": [YAML], "task_serializer": YAML})),
         "refuse content-mixed"),
        (Case(release(), release(**NEW, values={"result_serializer": PICKLE, "result_accept_content": [PICKLE]})),
         "refuse content-mixed"),
        (Case(release(), release(**NEW, values={"visibility_timeout": 7200})), "warn visibility-timeout"),
    ],
)  # fmt: skip
def test_what_breaks_is_found(case: Case, expected: str) -> None:
    assert expected in ids(case)


@pytest.mark.parametrize(
    ("case", "silent"),
    [
        (Case(release("5.7.0"), release("5.7.1", values={"control_queue_durable": True})), "control-queue-exclusive"),
        (Case(release(), release(**NEW, values={"control_queue_durable": True, "control_queue_exclusive": False})),
         "control-queue-exclusive"),
        (Case(release("5.4.0", "5.3.7"), release("5.5.3")), "sentinel-fanout-topic"),
        (Case(release("5.4.0", "5.3.7"), release(**NEW, values={"sentinel_fanout_compat": True}), "sentinel"),
         "sentinel-fanout-topic"),
        (Case(release("5.4.0", "5.4.2"), release("5.5.3"), "sentinel"), "sentinel-fanout-topic"),
        (Case(release(known=frozenset()), release(**NEW, names={"my_own"})), "setting-removed"),
        (Case(release("5.6.0"), release("5.7.0")), "several-minors"),
        (Case(release(), release(**NEW, requires=[["celery", "pytest<1; extra == 'pytest'"]])), "requirements"),
        (Case(release("5.7.0"), release("6.0.0", names={"worker_cancel_long_running_tasks_on_connection_loss"})),
         "cancel-on-connection-loss"),
    ],
)  # fmt: skip
def test_what_does_not_apply_is_not_said(case: Case, silent: str) -> None:
    assert not any(found.endswith(f" {silent}") for found in ids(case))


def test_messages_that_would_be_thrown_away() -> None:
    waiting = Waiting()
    waiting.content.update({YAML: 3, JSON: 9})
    waiting.unreadable = 1
    (lost, strange) = judge(Case(release(), release(**NEW), waiting=waiting))
    assert (lost.id, lost.severity) == ("content-waiting", "refuse") and "3 of application/x-yaml" in lost.what
    assert (strange.id, strange.severity) == ("unreadable", "warn")


def test_a_running_release_that_tells_no_settings_is_said_to_be_unknown() -> None:
    running = Release("3.11", {"celery": "5.6.3", "kombu": "5.6.2"})
    assert ids(Case(running, release(**NEW))) == ["warn running-unknown"]


def test_every_change_names_versions_source_and_cure() -> None:
    assert len({change.id for change in CHANGES}) == len(CHANGES)
    for change in CHANGES:
        assert change.source and change.cure and change.since and change.severity in ("refuse", "warn"), change.id
    (found,) = judge(Case(release(), release(**NEW, values={"control_queue_durable": True})))
    assert found.versions == "celery 5.6.3 -> 5.7.0, since 5.7"
