# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""celery_health against a real Redis and real workers: first the fault, then the verdict that names it."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support import TESTS, Ansible, RedisServer, Worker, celery_venv, free_port, wait_until, workers

pytestmark = pytest.mark.ansible


def unit(node: str, **change: Any) -> dict[str, Any]:
    seen = {"name": f"{node}.service", "kind": "worker", "node": node, "queues": ["bulk"], "enabled": True}
    return {**seen, "active": "active", "restarts": 0, "rss": 100 << 20, **change}


def hosts(*nodes: str) -> dict[str, Any]:
    beat = {"pid": 1, "unit": "beat.service", "running": True}
    return {"h1": {"reachable": True, "units": [unit(node) for node in nodes], "beats": [beat]}}


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    with RedisServer() as one:
        yield one


@pytest.fixture(scope="module")
def fleet(server: RedisServer, venv: Path) -> Iterator[tuple[Worker, ...]]:
    names = ("health-1@h1", "health-2@h1")
    made = [Worker(server.url(), n, queues="bulk", arguments=("-E", "--include", "celeryops.worker")) for n in names]
    with workers(*made) as running:
        yield running


def send(server: RedisServer, task: str, count: int, queue: str, *arguments: Any) -> None:
    code = (
        "import celeryops.stamp\nfrom labapp import app\n"
        f"for _ in range({count}): app.send_task({task!r}, args={arguments!r}, queue={queue!r})"
    )
    environment = {"CELERY_BROKER_URL": server.url(), "PATH": "/usr/bin:/bin"}
    subprocess.run([str(celery_venv() / "bin" / "python"), "-c", code], cwd=TESTS, env=environment, check=True)


def judge(ansible: Ansible, server: RedisServer, **arguments: Any) -> dict[str, Any]:
    given = {"broker_url": server.url(), "virtualenv": str(celery_venv()), "window": 0, **arguments}
    return ansible.module("celery_health", given)


def the(result: dict[str, Any], name: str) -> list[dict[str, Any]]:
    return [check for check in result["checks"] if check["name"] == name]


def bad(result: dict[str, Any]) -> set[str]:
    return {check["name"] for check in result["checks"] if check["severity"] in ("warning", "critical")}


# The scratch Redis saves nothing, which is a finding of its own.
SCRATCH = {"broker_persistence"}


def test_a_fleet_in_order(ansible: Ansible, server: RedisServer, fleet: tuple[Worker, ...]) -> None:
    result = judge(ansible, server, hosts=hosts("health-1@h1", "health-2@h1"))
    assert bad(result) == SCRATCH
    assert (result["verdict"], result["changed"]) == ("warning", False)
    assert the(result, "worker_count")[0]["value"] == 2
    assert result["fleet"]["health-1@h1"]["queues"] == ["bulk"]
    assert the(result, "task_success")[0]["severity"] == "unknown"


def test_rates_and_durations_come_from_the_event_stream(
    ansible: Ansible, server: RedisServer, fleet: tuple[Worker, ...]
) -> None:
    sender = subprocess.Popen(
        [str(celery_venv() / "bin" / "python"), "-c",
         "import time, itertools\nfrom labapp import app\nend = time.time() + 25\n"
         "for n in itertools.count():\n"
         "    name, args = ('lab.add', (1, 2)) if n % 5 else ('lab.fail', ('x',))\n"
         "    app.send_task(name, args=args, queue='bulk')\n"
         "    time.sleep(0.02)\n    if time.time() > end: break"],
        cwd=TESTS, env={"CELERY_BROKER_URL": server.url(), "PATH": "/usr/bin:/bin"},
    )  # fmt: skip
    try:
        wait_until(lambda: server.cli("KEYS", "_kombu.binding.*"), what="the first message")
        result = judge(ansible, server, hosts=hosts("health-1@h1", "health-2@h1"), window=3)
    finally:
        sender.kill()
        sender.wait()
    (success,) = the(result, "task_success")
    assert 70 <= success["value"] <= 88, success
    assert (success["severity"], success["cure"]) == ("critical", "rollback")
    assert the(result, "task_retry")[0]["value"] == 0
    assert the(result, "task_duration")[0]["value"] is not None


def test_a_killed_worker_is_named(ansible: Ansible, server: RedisServer, fleet: tuple[Worker, ...]) -> None:
    extra = Worker(server.url(), "health-3@h1", queues="lonely", concurrency=1)
    with workers(extra):
        extra.kill()
        watched = hosts("health-1@h1", "health-2@h1")
        watched["h1"]["units"].append(unit("health-3@h1", queues=["lonely"], active="failed"))
        result = judge(ansible, server, hosts=watched)
    assert result["verdict"] == "critical"
    assert {"workers_missing", "queue_consumers", "units_failed"} <= bad(result)
    assert "health-3@h1" in the(result, "workers_missing")[0]["message"]
    assert [c["subject"] for c in the(result, "queue_consumers")] == ["lonely"]


def test_a_stopped_worker_is_told_from_an_idle_one(
    ansible: Ansible, server: RedisServer, fleet: tuple[Worker, ...]
) -> None:
    fleet[0].freeze()
    try:
        started = time.monotonic()
        result = judge(ansible, server, hosts=hosts("health-1@h1", "health-2@h1"), timeout=1.5)
        assert time.monotonic() - started < 30
    finally:
        fleet[0].thaw()
    assert the(result, "workers_silent")[0]["value"] == 1
    assert "health-1@h1" in the(result, "workers_silent")[0]["message"]
    assert "health-2@h1" not in the(result, "workers_missing")[0]["message"]


def test_a_full_queue_counts_every_priority_and_is_as_old_as_its_oldest(
    ansible: Ansible, server: RedisServer, fleet: tuple[Worker, ...]
) -> None:
    send(server, "lab.add", 60, "heap", 1, 2)
    server.cli("LPUSH", "heap\x06\x166", *["{}"] * 60)
    try:
        time.sleep(0.6)
        result = judge(ansible, server, hosts=hosts("health-1@h1", "health-2@h1"), queues=["heap"])
        (depth,) = the(result, "queue_depth")
        assert (depth["severity"], depth["subject"], depth["value"], depth["cure"]) == (
            "critical",
            "heap",
            120,
            "scale",
        )
        latency = {check["subject"]: check for check in the(result, "queue_latency")}["heap"]
        assert latency["value"] >= 0.6
        assert latency["severity"] in ("warning", "critical")
        assert "heap" in [c["subject"] for c in the(result, "queue_consumers")]
        limits = {"heap": {"depth": {"warning": 500, "critical": 1000}}}
        relaxed = judge(ansible, server, hosts=hosts("health-1@h1"), queues=["heap"], queue_thresholds=limits)
        assert [c["severity"] for c in the(relaxed, "queue_depth")] == ["ok"]
    finally:
        server.cli("DEL", "heap", "heap\x06\x166")


def test_a_policy_that_drops_tasks_is_critical(
    ansible: Ansible, server: RedisServer, fleet: tuple[Worker, ...]
) -> None:
    server.cli("CONFIG", "SET", "maxmemory-policy", "allkeys-lru")
    try:
        result = judge(ansible, server, hosts=hosts("health-1@h1", "health-2@h1"))
    finally:
        server.cli("CONFIG", "SET", "maxmemory-policy", "noeviction")
    assert the(result, "broker_eviction_policy")[0]["severity"] == "critical"


def test_a_stopped_redis_is_a_finding_without_its_password(ansible: Ansible) -> None:
    url = f"redis://:verysecretword@127.0.0.1:{free_port()}/0"
    result = ansible.module(
        "celery_health", {"broker_url": url, "virtualenv": str(celery_venv()), "hosts": hosts("health-1@h1")}
    )
    assert result["verdict"] == "critical"
    assert result["causes"][0].startswith("the broker does not answer")
    assert the(result, "queue_depth")[0]["severity"] == "unknown"
    assert "verysecretword" not in str(result) + ansible.output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"thresholds": {"queue_dept": {"warning": 1}}}, ["thresholds", "queue_dept", "queue_depth"]),
        ({"queue_thresholds": {"bulk": {"depth": {"warning": "x"}}}}, ["queue_thresholds.bulk.depth.warning"]),
        ({"timeout": 0}, ["timeout"]),
        ({"hosts": {"h1": "down"}}, ["hosts.h1"]),
    ],
)
def test_wrong_input_is_an_error_that_names_it(ansible: Ansible, arguments: dict[str, Any], words: list[str]) -> None:
    # No broker is there: the input is judged first.
    given = {"broker_url": f"redis://127.0.0.1:{free_port()}/0", "virtualenv": str(celery_venv()), **arguments}
    result = ansible.module("celery_health", given)
    assert "verdict" not in result, result
    assert all(word in result["msg"] for word in words), result["msg"]
