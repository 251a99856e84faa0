# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import json
from typing import Any

import pytest

from ansible_collections.celeryops.runbook.plugins.module_utils.engine import health
from ansible_collections.celeryops.runbook.plugins.module_utils.engine.connection import Broker, BrokerSpec
from ansible_collections.celeryops.runbook.plugins.module_utils.engine.errors import PreconditionFailed
from ansible_collections.celeryops.runbook.plugins.module_utils.engine.rabbitmq import Management, Seen, internal, short
from ansible_collections.celeryops.runbook.plugins.module_utils.engine.rabbitnode import Unit, diagnose

UP = Unit("rabbitmq-server.service", "loaded", "active", "running", "success")
# What RabbitMQ 3.10 tells of itself, without what nobody reads here.
STATUS: dict[str, Any] = {
    "alarms": [],
    "disk_free": 72 * 10**9,
    "disk_free_limit": 50 * 10**6,
    "data_directory": "/var/lib/rabbitmq/mnesia/rabbit@r1",
    "file_descriptors": {"sockets_limit": 1000, "sockets_used": 1},
    "is_under_maintenance": False,
    "listeners": [{"protocol": "http"}, {"protocol": "amqp"}],
    "memory": {"total": {"rss": 144 * 10**6}},
    "rabbitmq_version": "3.10.8",
    "vm_memory_high_watermark_limit": 10**10,
}
NOT_RUNNING = "Error: this command requires the 'rabbit' app to be running on the target node. Start it with ..."
NO_DISTRIBUTION = "TCP connection succeeded but Erlang distribution failed"
ALARM = {"node": "rabbit@r1", "type": "resource_limit"}


def unit(active: str, sub: str = "", result: str = "", load: str = "loaded", frozen: tuple[int, ...] = ()) -> Unit:
    return Unit("rabbitmq-server.service", load, active, sub, result, frozen)


@pytest.mark.parametrize(
    ("found", "code", "output", "state", "cure", "words"),
    [
        (unit("failed", "failed", "signal"), None, "", "down", "start", "signal"),
        (unit("inactive", "dead", "success"), None, "", "down", "start", "does not run"),
        (unit("activating", "auto-restart", "signal"), None, "", "down", "start", "signal"),
        (unit("activating", "start"), None, "", "starting", "wait", "starting"),
        (unit("deactivating", "stop-sigterm"), None, "", "stopping", "start", "stopping"),
        (unit("active", frozen=(7, 8)), None, "", "frozen", "continue", "7, 8"),
        (unit("inactive", load="masked"), None, "", "masked", "", "unmask"),
        (UP, None, "", "wedged", "restart", "does not answer"),
        (UP, 69, "Error: unable to perform an operation on node", "wedged", "restart", "unable to perform"),
        (UP, 69, f"Error: unable to\n  * {NO_DISTRIBUTION}", "wedged", "restart", "have the same .erlang.cookie"),
        (UP, 64, NOT_RUNNING, "app_stopped", "start_app", "application rabbit is stopped"),
        (UP, 0, {}, "healthy", "", "3.10.8"),
        (UP, 0, {"alarms": [{**ALARM, "resource": "memory"}]}, "memory_alarm", "", "0.13 GiB of the 9.31 GiB"),
        (UP, 0, {"alarms": [{**ALARM, "resource": "disk"}]}, "disk_alarm", "", "/var/lib/rabbitmq"),
        (UP, 0, {"alarms": ["file_descriptor_limit"]}, "file_descriptors", "", "LimitNOFILE"),
        (
            UP, 0, {"file_descriptors": {"sockets_limit": 100, "sockets_used": 99}}, "max_connections", "",
            "99 of 100",
        ),
        (UP, 0, {"listeners": [{"protocol": "http"}]}, "no_listener", "", "resume_listeners"),
        (UP, 0, {"listeners": [], "is_under_maintenance": True}, "maintenance", "", "revive"),
    ],
)  # fmt: skip
def test_each_fault_is_told_apart(
    found: Unit, code: int | None, output: Any, state: str, cure: str, words: str
) -> None:
    text = output if isinstance(output, str) else "a warning\n" + json.dumps({**STATUS, **output})
    finding = diagnose(found, code, text)
    assert (finding.state, finding.cure) == (state, cure)
    assert words.lower() in f"{finding.text} {finding.human}".lower()
    # What is not cured is well, or a person is told what to do.
    assert bool(finding.human) == (not cure and state != "healthy")


def test_what_is_no_rabbitmq_is_refused() -> None:
    with pytest.raises(PreconditionFailed, match=r"^unit: this host has no"):
        diagnose(unit("inactive", load="not-found"), None, "")
    with pytest.raises(PreconditionFailed, match="no JSON"):
        diagnose(UP, 0, "Status of node rabbit@r1 ...")


@pytest.mark.parametrize(
    ("broker", "url", "address", "user", "password"),
    [
        ("amqp://shop:p%40ss@h:5673/v", "", "http://h:15672", "shop", "p@ss"),
        ("amqps://shop:s3cr3t@h/v", "", "https://h:15671", "shop", "s3cr3t"),
        ("amqp://h//", "", "http://h:15672", "guest", "guest"),
        ("amqp://shop:x@h//", "http://m:y%2F@other:1/base/", "http://other:1/base", "m", "y/"),
        ("amqp://shop:s3cr3t@h//", "https://other", "https://other:15671", "shop", "s3cr3t"),
    ],
)
def test_where_the_management_api_is(broker: str, url: str, address: str, user: str, password: str) -> None:
    spec = BrokerSpec.build(url=broker, environment={"CELERYOPS_MANAGEMENT_URL": url})
    found = Management.of(Broker(spec), spec.management_url)
    assert (found.address, found.user, found.password) == (address, user, password)
    assert password not in repr(found) + repr(spec) or password == "guest"
    if url:
        assert "y/" in spec.secrets or "@" not in url


@pytest.mark.parametrize("url", ["other:15672", "ftp://h", "http://", "http://h:port"])
def test_a_wrong_management_url(url: str) -> None:
    with pytest.raises(PreconditionFailed, match=r"^management_url: it is http://"):
        Management.of(Broker(BrokerSpec.build(url="amqp://h//")), url)


def test_queues_of_celery_itself_are_left_out() -> None:
    theirs = ["celery@h.celery.pidbox", "1f.reply.celery.pidbox", "celeryev.1f", "celery_delayed_27", "amq.gen-x"]
    assert all(map(internal, [*theirs, "celeryops:lock:deploy:shop", "celeryops:canary:1f"]))
    assert not any(map(internal, ["celery", "orders", "orders.dead", "celery_delayed", "pidbox"]))


def row(ready: int = 0, consumers: int = 1, members: int | None = None, online: int | None = None) -> dict[str, Any]:
    return {"ready": ready, "consumers": consumers, "members": members, "online": online}


def test_verdict() -> None:
    node = {
        "running": True, "partitions": [], "mem_used": 10, "mem_limit": 100, "disk_free": 1000, "disk_free_limit": 50,
        "sockets_used": 1, "sockets_total": 100,
    }  # fmt: skip
    seen = Seen(queues={"a": row(members=3, online=2), "b": row(members=3, online=3), "c": row()})
    assert short(seen) == ["a: 2 of 3 members"]
    well = {"kind": "amqp", "alarms": [], "blocked": False, "short": [], "nodes": {"r1": node}}

    def severities(**changes: Any) -> dict[str, str]:
        facts = health.Facts(broker={**well, **changes}, queues={}, fleet={"answered": {}}, dead={})
        found = health.judge(facts, health.Thresholds(), "broker").checks
        return {check.name: check.severity for check in found if check.severity != "ok"}

    quiet = {"unacked_age": "unknown"}
    assert severities() == quiet
    told = {check.name for check in health.judge(health.Facts(broker=well), health.Thresholds(), "broker").checks}
    assert told >= health.RABBITMQ
    assert severities(alarms=[{"node": "r1", "resource": "disk"}]) == {**quiet, "broker_alarms": "critical"}
    assert severities(blocked=True) == {**quiet, "broker_alarms": "critical"}
    assert severities(short=short(seen)) == {**quiet, "broker_quorum": "warning"}
    assert severities(nodes={"r1": {**node, "running": False}}) == {**quiet, "broker_nodes": "critical"}
    assert severities(nodes={"r1": {**node, "partitions": ["r2"]}}) == {**quiet, "broker_nodes": "critical"}
    assert severities(nodes={"r1": {**node, "mem_used": 96}}) == {**quiet, "broker_memory": "critical"}
    assert severities(nodes={"r1": {**node, "disk_free": 80}}) == {**quiet, "broker_disk": "warning"}
    unseen = severities(nodes=None, unseen="the management API is missing")
    assert unseen == dict.fromkeys(
        ["broker_nodes", "broker_memory", "broker_disk", "broker_clients", "unacked_age"], "unknown"
    )


def test_queue_without_consumer_is_critical_with_the_brokers_own_count() -> None:
    queues = {
        "a": {"depth": 3, "oldest_age": None, "consumers": 0},
        "b": {"depth": 3, "oldest_age": None, "consumers": 2},
    }
    facts = health.Facts(broker={"kind": "amqp", "nodes": None}, queues=queues, fleet={"answered": {}})
    bad = [check for check in health.judge(facts, health.Thresholds(), "broker").checks if check.severity == "critical"]
    assert [(check.name, check.subject) for check in bad] == [("queue_consumers", "a")]
