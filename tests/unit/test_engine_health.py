# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from ansible_collections.celeryops.runbook.plugins.module_utils.engine import health

NODE = "shop-default-1@w1"
HEARTBEAT = {"age": 2.0, "host": "w1", "pid": 7, "task": "shop.report", "sent_ago": 30.0}


def well() -> health.Facts:
    unit = {
        "name": "celery-shop-worker@default-1.service",
        "kind": "worker",
        "node": NODE,
        "active": "active",
        "enabled": True,
        "restarts": 0,
        "rss": 200 * health.MIB,
    }
    other = {**unit, "name": "celery-shop-worker@default-2.service", "node": "shop-default-2@w1"}
    reply = {"queues": ["default"], "release": "v1"}
    return health.Facts(
        heartbeat=HEARTBEAT,
        dead={"default.dead": 0},
        broker={
            "kind": "redis",
            "role": "master",
            "used_memory": 10,
            "maxmemory": 100,
            "maxmemory_policy": "noeviction",
            "aof_enabled": 1,
            "aof_last_write_status": "ok",
            "connected_clients": 5,
            "maxclients": 100,
        },
        hosts={"w1": {"reachable": True, "units": [unit, other], "beats": [{"pid": 7, "unit": "b.service"}]}},
        fleet={"answered": {NODE: reply, "shop-default-2@w1": reply}, "silent_count": 0, "duplicates": []},
        queues={"default": {"depth": 0, "oldest_age": None}},
        unacked={"count": 0, "oldest_age": None},
        disabled={},
        events={"seconds": 3, "succeeded": 100, "failed": 0, "retried": 0, "started": 100},
    )


def verdict(facts: health.Facts, **thresholds: Any) -> health.Verdict:
    return health.judge(facts, health.Thresholds(**thresholds))


def the(found: health.Verdict, name: str) -> list[health.Check]:
    return [check for check in found.checks if check.name == name]


def test_a_fleet_in_order_is_healthy_and_every_check_is_there() -> None:
    found = verdict(well())
    assert found.verdict == "healthy"
    assert [c for c in found.checks if c.severity != "ok"] == []
    assert set(health.DEFAULTS) - health.RABBITMQ <= {c.name for c in found.checks}
    assert set(health.CURES) - health.RABBITMQ == {c.name for c in found.checks}


def test_a_pause_is_told_and_excuses_its_queue_until_its_time_is_over() -> None:
    busy = {"default": {"depth": 5000, "oldest_age": 900.0}}
    for over, severity in ((0.0, "ok"), (60.0, "warning")):
        pause = {"default": {"text": "queue default is paused by anna", "over": over}}
        facts = dataclasses.replace(well(), queues=busy, paused=pause)
        facts.fleet = {**(facts.fleet or {}), "answered": {NODE: {"queues": [], "release": "v1"}}}
        found = verdict(facts)
        assert all(the(found, name)[0].severity == "ok" for name in ("queue_depth", "queue_latency", "queue_consumers"))
        (check,) = the(found, "queue_paused")
        assert (check.severity, check.subject) == (severity, "default")
        assert check.message == "queue default is paused by anna; 5000 messages wait"


@pytest.mark.parametrize(
    ("count", "severity"), [(0, "ok"), (9, "ok"), (10, "warning"), (100, "warning"), (101, "critical")]
)
def test_dead_letters_are_judged_by_queue(count: int, severity: str) -> None:
    dead = {"default.dead": 0, "email.dead": count}
    (check,) = the(verdict(dataclasses.replace(well(), dead=dead)), "dead_letters")
    assert check.severity == severity and check.cure == ("dead_letter_report" if severity != "ok" else "")
    assert severity == "ok" or check.subject == "email.dead"


def test_disabled_entries_are_told_and_beats_that_stand_by_are_no_duplicates() -> None:
    facts = dataclasses.replace(well(), disabled={"nightly": "entry nightly is disabled by anna"})
    (check,) = the(verdict(facts), "beat_entries")
    assert (check.severity, check.subject, check.message) == ("ok", "nightly", "entry nightly is disabled by anna")
    (beat,) = well().hosts["w1"]["beats"]
    two = {"w1": {**well().hosts["w1"], "beats": [beat, {**beat, "pid": 8}]}}
    facts = dataclasses.replace(well(), hosts=two, standby=1)
    assert the(verdict(facts), "beat_duplicate")[0].severity == the(verdict(facts), "beat_standby")[0].severity == "ok"
    assert the(verdict(dataclasses.replace(facts, standby=0)), "beat_duplicate")[0].severity == "critical"
    alone = the(verdict(dataclasses.replace(well(), standby=1)), "beat_standby")[0]
    assert (alone.severity, alone.cure) == ("warning", "start") and "0 of 1" in alone.message


@pytest.mark.parametrize(("age", "severity"), [(3.0, "ok"), (300.0, "ok"), (301.0, "critical")])
def test_a_beat_that_does_not_tick_is_critical(age: float, severity: str) -> None:
    (check,) = the(verdict(dataclasses.replace(well(), heartbeat={**HEARTBEAT, "age": age})), "beat_silent")
    assert (check.severity, check.cure) == (severity, "beat_ensure_single" if severity == "critical" else "")
    assert "w1 (pid 7)" in check.message and "shop.report" in check.message


def test_without_a_heartbeat_the_ping_of_a_beat_counts_and_nothing_at_all_is_unknown() -> None:
    facts = dataclasses.replace(well(), heartbeat=None)
    assert the(verdict(facts), "beat_silent")[0].severity == "unknown"
    answering = dataclasses.replace(facts, fleet={**(facts.fleet or {}), "beats": 1})
    assert the(verdict(answering), "beat_silent")[0].severity == "ok"
    unwanted = dataclasses.replace(facts, beat_expected=False)
    assert the(verdict(unwanted), "beat_silent")[0].severity == "ok"


def queue_facts(depth: int, age: float | None = None) -> health.Facts:
    return dataclasses.replace(well(), queues={"default": {"depth": depth, "oldest_age": age}})


@pytest.mark.parametrize(
    ("depth", "severity"), [(0, "ok"), (49, "ok"), (50, "warning"), (100, "warning"), (101, "critical")]
)
def test_queue_depth_follows_the_table_of_the_runbook(depth: int, severity: str) -> None:
    found = verdict(queue_facts(depth, 0.1))
    (check,) = the(found, "queue_depth")
    assert check.severity == severity
    assert found.verdict == ("healthy" if severity == "ok" else severity)
    if severity != "ok":
        assert (check.subject, check.value, check.cure) == ("default", depth, "scale")
        assert "default" in check.message


def test_a_queue_has_its_own_thresholds() -> None:
    queues = {"default": {"depth": {"warning": 500, "critical": 1000}, "latency": {"warning": 60, "critical": 300}}}
    assert verdict(queue_facts(400, 30.0), queues=queues).verdict == "healthy"
    assert verdict(queue_facts(1001, 30.0), queues=queues).verdict == "critical"
    assert verdict(queue_facts(400, 301.0), queues=queues).verdict == "critical"


@pytest.mark.parametrize(("age", "severity"), [(0.4, "ok"), (0.6, "warning"), (3.0, "critical")])
def test_latency(age: float, severity: str) -> None:
    (check,) = the(verdict(queue_facts(1, age)), "queue_latency")
    assert (check.severity, check.value) == (severity, age)


def test_unstamped_messages_make_the_latency_unknown_and_never_a_figure() -> None:
    found = verdict(queue_facts(3, None))
    (check,) = the(found, "queue_latency")
    assert (check.severity, check.value) == ("unknown", None)
    assert found.verdict == "healthy"


@pytest.mark.parametrize(("count", "severity"), [(2, "ok"), (1, "warning"), (0, "critical")])
def test_worker_count(count: int, severity: str) -> None:
    facts = well()
    answered = dict(list(facts.fleet["answered"].items())[:count])  # type: ignore[index]
    found = verdict(dataclasses.replace(facts, fleet={"answered": answered}))
    (check,) = the(found, "worker_count")
    assert check.severity == severity
    if count < 2:
        (missing,) = the(found, "workers_missing")
        assert missing.severity == "warning"
        assert "shop-default-2@w1 (host w1)" in missing.message
    if not count:
        (consumers,) = the(found, "queue_consumers")
        assert (consumers.severity, consumers.subject) == ("critical", "default")


def test_a_stopped_broker_is_critical_and_what_depends_on_it_unknown() -> None:
    facts = dataclasses.replace(
        well(), broker=None, broker_error="connection refused", fleet=None, queues=None, unacked=None, events=None
    )
    found = verdict(facts)
    assert found.verdict == "critical"
    assert found.causes[0] == "the broker does not answer: connection refused"
    unknown = {c.name for c in found.checks if c.severity == "unknown"}
    assert {"worker_count", "queue_depth", "queue_latency", "queue_consumers", "unacked_age", "task_success"} <= unknown
    assert set(health.DEFAULTS) - health.RABBITMQ <= {c.name for c in found.checks}


def test_until_when_the_certificate_lasts_is_told() -> None:
    facts = well()
    facts.broker = {**(facts.broker or {}), "certificate": {"ends": "2026-12-01 00:00 UTC", "days": 14.1}}
    (check,) = the(verdict(facts), "broker_certificate")
    assert check.severity == "ok" and "ends on 2026-12-01 00:00 UTC, in 14.1 days" in check.message


@pytest.mark.parametrize(
    ("change", "name", "severity"),
    [
        ({"role": "slave"}, "broker_role", "critical"),
        ({"maxmemory_policy": "allkeys-lru"}, "broker_eviction_policy", "critical"),
        ({"maxmemory_policy": None}, "broker_eviction_policy", "unknown"),
        ({"evicted_keys": 1}, "broker_evicted", "critical"),
        ({"used_memory": 81}, "broker_memory", "warning"),
        ({"used_memory": 96}, "broker_memory", "critical"),
        ({"maxmemory": 0, "total_system_memory": 11}, "broker_memory", "warning"),
        ({"maxmemory": 0}, "broker_memory", "unknown"),
        ({"rejected_connections": 2}, "broker_rejected", "warning"),
        ({"connected_clients": 85}, "broker_clients", "warning"),
        ({"aof_last_write_status": "err"}, "broker_persistence", "critical"),
        ({"rdb_last_bgsave_status": "err"}, "broker_persistence", "critical"),
        ({"aof_enabled": 0, "save": "3600 1"}, "broker_persistence", "warning"),
        ({"aof_enabled": 0, "save": ""}, "broker_persistence", "warning"),
        ({"loading": 1}, "broker_reachable", "critical"),
        ({"certificate": {"ends": "2026-12-01 00:00 UTC", "days": 13.9}}, "broker_certificate", "warning"),
        ({"certificate": {"ends": "2026-12-01 00:00 UTC", "days": 1.9}}, "broker_certificate", "critical"),
    ],
)
def test_the_broker(change: dict[str, Any], name: str, severity: str) -> None:
    facts = well()
    found = verdict(dataclasses.replace(facts, broker={**facts.broker, **change}))  # type: ignore[dict-item]
    (check,) = the(found, name)
    assert check.severity == severity
    assert found.verdict == ("healthy" if severity == "unknown" else severity)


def hosts(**change: Any) -> dict[str, Any]:
    host = dict(well().hosts["w1"])
    host.update(change)
    return {"w1": host}


def test_beat_must_run_exactly_once() -> None:
    facts = well()
    none = verdict(dataclasses.replace(facts, hosts=hosts(beats=[])))
    assert (none.verdict, the(none, "beat_missing")[0].cure) == ("critical", "start")
    stopped = verdict(dataclasses.replace(facts, hosts=hosts(beats=[{"pid": 7, "unit": "b", "running": False}])))
    assert the(stopped, "beat_missing")[0].severity == "critical"
    twice = verdict(dataclasses.replace(facts, hosts=hosts(beats=[{"pid": 7, "unit": "b"}, {"pid": 8, "unit": None}])))
    (check,) = the(twice, "beat_duplicate")
    assert check.severity == "critical"
    assert "pid 8, no unit" in check.message
    unwanted = dataclasses.replace(facts, hosts=hosts(beats=[]), beat_expected=False)
    assert verdict(unwanted).verdict == "healthy"


def test_no_beat_is_unknown_while_a_host_cannot_be_looked_at() -> None:
    both = {**hosts(beats=[]), "w2": {"reachable": False}}
    found = verdict(dataclasses.replace(well(), hosts=both))
    assert the(found, "beat_missing")[0].severity == "unknown"
    assert the(found, "hosts_unreachable")[0].severity == "warning"
    assert the(found, "workers_unexpected")[0].severity == "unknown"


def test_units_memory_and_restarts_name_unit_and_host() -> None:
    units = [dict(unit) for unit in well().hosts["w1"]["units"]]
    units[0].update(active="failed", rss=2500 * health.MIB, restarts=4)
    units[1].update(active="inactive", rss=4000 * health.MIB)
    found = verdict(dataclasses.replace(well(), hosts=hosts(units=units)))
    assert the(found, "units_failed")[0].severity == "critical"
    assert "celery-shop-worker@default-1.service on w1" in the(found, "units_failed")[0].message
    assert "celery-shop-worker@default-2.service on w1" in the(found, "units_inactive")[0].message
    assert [(c.subject, c.severity) for c in the(found, "worker_memory")] == [
        ("shop-default-2@w1", "critical"),
        (NODE, "warning"),
    ]
    assert the(found, "unit_restarts")[0].value == 4


def test_release_skew_silence_duplicates_strangers() -> None:
    facts = well()
    answered = {
        NODE: {"queues": ["default"], "release": "v1"},
        "shop-default-2@w1": {"queues": ["default"], "release": "v2"},
        "stray@x": {"queues": ["default"]},
    }
    fleet = {"answered": answered, "silent_count": 1, "duplicates": [NODE]}
    found = verdict(dataclasses.replace(facts, fleet=fleet))
    assert found.verdict == "warning"
    assert "v1 on shop-default-1@w1; v2 on shop-default-2@w1" in the(found, "release_skew")[0].message
    for name in ("workers_silent", "workers_duplicate", "workers_unexpected"):
        assert the(found, name)[0].severity == "warning", name
    assert "stray@x" in the(found, "workers_unexpected")[0].message


def test_who_answers_and_consumes_nothing_is_named_unless_queues_are_paused() -> None:
    facts = well()
    answered = {**(facts.fleet or {})["answered"], NODE: {"queues": [], "release": "v1"}}
    facts = dataclasses.replace(facts, fleet={**(facts.fleet or {}), "answered": answered})
    (check,) = the(verdict(facts), "workers_without_queue")
    assert (check.severity, check.value, check.subject) == ("warning", 1, NODE)
    paused = dataclasses.replace(facts, paused={"default": {"text": "paused", "over": 0.0}})
    assert the(verdict(paused), "workers_without_queue")[0].severity == "ok"


@pytest.mark.parametrize(
    ("events", "success", "retry"),
    [
        ({"succeeded": 960, "failed": 40, "started": 1000, "retried": 49}, "ok", "ok"),
        ({"succeeded": 95, "failed": 5, "started": 100, "retried": 5}, "warning", "warning"),
        ({"succeeded": 89, "failed": 11, "started": 100, "retried": 11}, "critical", "critical"),
        ({"succeeded": 19, "failed": 0, "started": 19, "retried": 0}, "unknown", "unknown"),
        (None, "unknown", "unknown"),
    ],
)
def test_rates(events: dict[str, int] | None, success: str, retry: str) -> None:
    found = verdict(dataclasses.replace(well(), events=events and {"seconds": 3, **events}))
    assert (the(found, "task_success")[0].severity, the(found, "task_retry")[0].severity) == (success, retry)


def test_task_duration_by_pattern() -> None:
    facts = well()
    fleet = {**facts.fleet, "running": {"shop.ai.story": 61.0, "shop.mail": 61.0}}  # type: ignore[dict-item]
    tasks = {"shop.ai.*": {"warning": 30, "critical": 60}}
    found = verdict(dataclasses.replace(facts, fleet=fleet), tasks=tasks)
    assert [(c.subject, c.severity) for c in the(found, "task_duration")] == [("shop.ai.story", "critical")]


def test_unacked_age_is_measured_by_the_visibility_timeout() -> None:
    facts = dataclasses.replace(well(), unacked={"count": 1, "oldest_age": 85.0}, visibility_timeout=100.0)
    assert the(verdict(facts), "unacked_age")[0].severity == "warning"
    assert the(verdict(dataclasses.replace(facts, visibility_timeout=3600.0)), "unacked_age")[0].severity == "ok"


@pytest.mark.parametrize(
    ("thresholds", "names"),
    [
        ({"checks": {"queue_dept": {"warning": 1}}}, "queue_dept"),
        ({"checks": {"queue_depth": 5}}, "thresholds.queue_depth"),
        ({"checks": {"queue_depth": {"warn": 5}}}, "thresholds.queue_depth"),
        ({"checks": {"queue_depth": {"warning": "many"}}}, "thresholds.queue_depth.warning"),
        ({"checks": {"queue_depth": {"warning": 200, "critical": 100}}}, "thresholds.queue_depth"),
        ({"checks": {"task_success": {"warning": 80, "critical": 90}}}, "thresholds.task_success"),
        ({"queues": {"bulk": {"dept": {"warning": 1}}}}, "queue_thresholds.bulk"),
        ({"queues": {"bulk": {}}}, "queue_thresholds.bulk"),
        ({"tasks": {"a.*": {"warning": True}}}, "task_thresholds.a.*.warning"),
    ],
)
def test_a_bad_threshold_is_named(thresholds: dict[str, Any], names: str) -> None:
    with pytest.raises(health.BadThreshold) as caught:
        health.Thresholds(**thresholds)
    assert names in str(caught.value)


def test_a_step_can_be_switched_off() -> None:
    found = verdict(queue_facts(5000, 0.1), checks={"queue_depth": {"warning": None, "critical": None}})
    assert found.verdict == "healthy"


def test_the_documented_table_is_the_table() -> None:
    page = Path(__file__).parents[2] / "docs" / "playbooks" / "health_check.md"
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in page.read_text().splitlines()]
    told = {row[0].strip("`"): row[1:4] for row in rows if len(row) == 5 and row[0].startswith("`")}

    def figure(value: float | None) -> str:
        return "-" if value is None else f"{value:g}"

    for name, cure in health.CURES.items():
        limit = health.DEFAULTS.get(name)
        figures = [figure(limit.warning), figure(limit.critical)] if limit else ["", ""]
        assert told.pop(name) == [*figures, cure or "-"], name
    assert told == {}
