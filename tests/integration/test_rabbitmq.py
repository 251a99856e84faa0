# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Modules on a real RabbitMQ with real workers, on a classic and on a quorum queue."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support import Ansible, RabbitServer, RedisServer, Worker, _in_celery, celery_venv, wait_until, workers

pytestmark = pytest.mark.ansible

PREFIX = "celeryops.runbook."
SAFE, QUICK = "lab-safe-1@lab", "lab-quick-1@lab"


def worker(server: RabbitServer, name: str, queues: str, notes: RedisServer, *arguments: str) -> Worker:
    return Worker(
        server.url(), name, app="labquorum", queues=queues, arguments=("--include", "celeryops.worker", *arguments),
        environment={"CELERY_RESULT_BACKEND": "", "LABAPP_NOTES_URL": notes.url(), "CELERYOPS_RELEASE": "v1"},
    )  # fmt: skip


def send(server: RabbitServer, name: str, count: int, queue: str, *args: Any) -> list[str]:
    """Published with confirms: what is counted has been taken."""
    code = (
        "import labquorum\n"
        "with labquorum.app.connection_for_write() as connection:\n"
        "    producer = labquorum.app.amqp.Producer(connection)\n"
        "    ids = [labquorum.app.send_task(a[0], args=a[3], queue=a[2], producer=producer).id for _ in range(a[1])]\n"
        "print(json.dumps(ids))"
    )
    return list(json.loads(_in_celery(server.url(), code, name, count, queue, list(args))))


def done(notes: RedisServer) -> list[str]:
    return notes.cli("LRANGE", "lab:done", "0", "-1").split()


@pytest.fixture(scope="module")
def notes() -> Iterator[RedisServer]:
    with RedisServer() as server:
        yield server


@pytest.fixture(scope="module")
def rabbit() -> Iterator[RabbitServer]:
    with RabbitServer(management=True) as server:
        yield server


@pytest.fixture(scope="module")
def live(rabbit: RabbitServer, notes: RedisServer) -> Iterator[tuple[Worker, ...]]:
    with workers(worker(rabbit, SAFE, "safe", notes), worker(rabbit, QUICK, "quick", notes)) as fleet:
        yield fleet


@pytest.fixture
def play(rabbit: RabbitServer, ansible: Ansible, tmp_path: Path) -> Any:
    """Run modules as an operator does: the secret is in the environment file."""
    secret = tmp_path / "secret.env"
    secret.touch(mode=0o600)
    secret.write_text(f"CELERY_BROKER_URL={rabbit.url()}\nCELERYOPS_MANAGEMENT_URL={rabbit.api()}\n")

    def run(*tasks: tuple[str, dict[str, Any]], file: Path = secret, **options: Any) -> list[dict[str, Any]]:
        defaults = {"environment_file": str(file), "virtualenv": str(celery_venv())}
        return ansible.play([{PREFIX + name: options} for name, options in tasks], defaults=defaults, **options)

    return run


def test_what_it_tells(play: Any, rabbit: RabbitServer, live: Any, tmp_path: Path) -> None:
    send(rabbit, "lab.add", 3, "nobody", 1, 2)
    bare = tmp_path / "bare.env"
    bare.touch(mode=0o600)
    bare.write_text(f"CELERY_BROKER_URL={rabbit.url()}\n")  # and at port 15672 there is no management API
    (told, judged), (plain, health) = (
        play(("rabbitmq_info", {}), ("celery_health", {"scope": "broker", "queues": ["safe", "quick"]})),
        play(("rabbitmq_info", {"queues": ["safe", "nobody", "nosuch"]}), ("celery_health", {}), file=bare),
    )
    assert (told["source"], told["unseen"], told["blocked"], told["alarms"]) == ("management", "", False, [])
    assert told["version"].startswith("3.") and told["short"] == []
    kept = {name: (row["type"], row["ready"], row["consumers"]) for name, row in told["queues"].items()}
    assert kept == {"safe": ("quorum", 0, 1), "quick": ("classic", 0, 1), "nobody": ("classic", 3, 0)}
    assert told["queues"]["safe"]["members"] == told["queues"]["safe"]["online"] == 1
    assert all(node["running"] for node in told["nodes"].values())
    # Three messages that nobody consumes: critical, by name.
    assert (judged["verdict"], judged["broker"]) == ("critical", "amqp")
    bad = {(check["name"], check["subject"]) for check in judged["checks"] if check["severity"] == "critical"}
    assert bad == {("queue_consumers", "nobody")}
    fine = {check["name"] for check in judged["checks"] if check["severity"] == "ok"}
    assert {"broker_alarms", "broker_nodes", "broker_memory", "broker_disk", "broker_clients", "broker_quorum"} <= fine
    assert (plain["source"], plain["nodes"], plain["missing"]) == ("amqp", None, ["nosuch"])
    assert "rabbitmq-plugins enable" in plain["unseen"]
    assert {name: (row["ready"], row["consumers"]) for name, row in plain["queues"].items()} == {
        "safe": (0, 1),
        "nobody": (3, 0),
    }
    unknown = {check["name"] for check in health["checks"] if check["severity"] == "unknown"}
    assert {"broker_nodes", "broker_memory"} <= unknown and health["fleet"].keys() == {SAFE, QUICK}
    assert "guest:guest" not in json.dumps([told, judged, plain, health])
    rabbit.ctl("delete_queue", "nobody")


def test_alarm_and_refusals(play: Any, rabbit: RabbitServer, live: Any) -> None:
    """Each fault is told by its name and its cure."""
    rabbit.ctl("set_vm_memory_high_watermark", "0.00001")
    try:
        alarmed, judged, gate, mute = play(
            ("rabbitmq_info", {}),
            ("celery_health", {"scope": "broker"}),
            ("celery_release_gate", {"queues": ["safe"]}),
            ("celery_inspect", {"commands": ["ping"]}),
        )
    finally:
        rabbit.ctl("set_vm_memory_high_watermark", "0.4")
    assert alarmed["blocked"] and [alarm["resource"] for alarm in alarmed["alarms"]] == ["memory"]
    (bad,) = (check for check in judged["checks"] if check["severity"] == "critical")
    assert (bad["name"], bad["cure"]) == ("broker_alarms", "broker_recover") and "memory alarm" in bad["message"]
    assert gate["failed"] and "alarm" in gate["msg"]
    assert mute["cause"] == "blocked" and "broker_recover" in mute["msg"]
    wrong = rabbit.url().replace("guest:guest", "guest:s3cr3t")
    url = rabbit.api().replace("://", "://guest:s3cr3t@")
    password, vhost, management, redis, down = play(
        ("rabbitmq_info", {"broker_url": wrong}),
        ("rabbitmq_info", {"broker_url": rabbit.url()[:-1] + "nosuch"}),
        ("rabbitmq_info", {"management_url": url}),
        ("rabbitmq_info", {"broker_url": "redis://127.0.0.1:1/0"}),
        ("rabbitmq_info", {"broker_url": "amqp://guest:s3cr3t@127.0.0.1:1//"}),
    )
    assert password["category"] == "authentication" and "refuses" in password["msg"]
    assert vhost["failed"] and "virtual host" in vhost["msg"]
    assert management["source"] == "amqp" and "monitoring" in management["unseen"]
    assert redis["failed"] and "is not RabbitMQ" in redis["msg"]
    assert down["category"] == "connection" and "cannot be reached" in down["msg"]
    assert "s3cr3t" not in json.dumps([password, vhost, management, down])
    rabbit.ctl("set_vhost_limits", '{"max-connections": 1}')
    try:
        (full,) = play(("rabbitmq_info", {}))
    finally:
        rabbit.ctl("clear_vhost_limits")
    assert full["cause"] == "connection_limit" and "set_vhost_limits" in full["msg"]


def lock(owner: str, **options: Any) -> tuple[str, dict[str, Any]]:
    return "celery_deploy_lock", {"name": "shop", "owner": owner, **options}


def test_deploy_lock(play: Any, rabbit: RabbitServer) -> None:
    taken, renewed, refused, kept, over, lost, given, nobody = play(
        lock("anna", release="v2", lease=50),
        lock("anna", step="batch 1"),
        lock("bob"),
        lock("bob", state="released"),
        lock("bob", takeover_token="none such"),
        lock("anna", state="released"),
        lock("anna"),
        lock("anna", state="released"),
    )
    assert taken["changed"] and taken["previous"] is None
    assert renewed["resumed"] and (renewed["lock"]["step"], renewed["lock"]["release"]) == ("batch 1", "v2")
    assert renewed["lock"]["token"] == taken["lock"]["token"]
    for result in (refused, kept, over):
        assert result["category"] == "lock_held" and "held by anna" in result["msg"] and "batch 1" in result["msg"]
    assert lost["changed"] and given["changed"] and given["previous"] is None and nobody["changed"]
    planned, short = play(lock("bob"), lock("bob", state="released"), check=True)
    assert planned["changed"] and not short["changed"], "check mode takes nothing"
    (brief,) = play(lock("anna", lease=1))
    assert brief["changed"]
    time.sleep(1.2)
    (after,) = play(lock("bob"))
    assert after["changed"] and after["previous"] is None, "a lease that is over blocks nobody"
    took = play(lock("carl", takeover_token=after["lock"]["token"]), lock("carl", state="released"))
    assert [result["changed"] for result in took] == [True, True]


def test_only_one_of_many_gets_the_lock(rabbit: RabbitServer) -> None:
    code = (
        "from celeryops.engine.connection import Broker, BrokerSpec\n"
        "from celeryops.engine.errors import LockHeld\n"
        "from celeryops.engine.records import DeployLocks\n"
        "with Broker(BrokerSpec.build(url=a[0])) as broker:\n"
        "    try:\n"
        "        print(DeployLocks.of(broker, 'race').hold(owner=a[1], lease=60).after.owner)\n"
        "    except LockHeld as exc:\n"
        "        print('held by', exc.data['holder']['owner'])\n"
    )
    said: dict[str, str] = {}

    def race(owner: str) -> None:
        said[owner] = _in_celery(rabbit.url(), code, rabbit.url(), owner)

    threads = [threading.Thread(target=race, args=(f"owner{number}",)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (winner,) = (owner for owner, text in said.items() if text == owner)
    assert {text for owner, text in said.items() if owner != winner} == {f"held by {winner}"}


def test_gate(play: Any, rabbit: RabbitServer, live: Any, tmp_path: Path) -> None:
    """What waits in RabbitMQ cannot be looked at: the gate says so where it matters."""
    tasks = ["lab.add", "lab.late", "lab.sleep", "celeryops.canary"]
    release = {"tasks": tasks, "schedule": {}, "queues": ["safe", "quick"]}
    (tmp_path / "release.json").write_text(json.dumps(release))
    (tmp_path / "orphan.json").write_text(
        json.dumps({**release, "schedule": {"e": {"task": "lab.gone", "queue": None}}})
    )
    common = {"queues": ["safe", "quick"], "expected_nodes": [SAFE, QUICK]}
    passed, orphan, lonely = play(
        ("celery_release_gate", {**common, "release_file": str(tmp_path / "release.json")}),
        ("celery_release_gate", {**common, "release_file": str(tmp_path / "orphan.json")}),
        ("celery_release_gate", {**common, "expected_nodes": ["gone@lab"]}),
    )
    assert not passed.get("failed") and passed["waiting"] == {"safe": 0, "quick": 0}
    assert orphan["failed"] and "lab.gone" in orphan["msg"]
    assert lonely["failed"] and "gone@lab" in lonely["msg"]


def test_quorum_queue_grows_and_drains(play: Any, rabbit: RabbitServer, notes: RedisServer) -> None:
    """Prefetch is per consumer on a quorum queue. A pool that grows gets more all the same; a drain loses nothing."""
    name = "lab-drain-1@lab"
    with worker(rabbit, name, "slow", notes) as one:

        def running() -> int:
            (told,) = play(("celery_inspect", {"commands": ["active"], "destination": [name]}))
            return len(told["nodes"][name]["replies"]["active"])

        count = 300  # they last longer than it takes to look
        send(rabbit, "lab.late", count, "slow", 2.0)
        wait_until(lambda: running() == 2, 20, "two at once")
        grown, again = play(*[("celery_control", {"destination": [name], "pool_size": 4})] * 2)
        assert not grown.get("failed"), grown["msg"]
        assert grown["after"][name]["pool_size"] == 4 and not again["changed"]
        # Acknowledged late, so no more than the prefetch are with the worker: four, where the old consumer had two.
        wait_until(lambda: running() == 4, 20, "four at once")
        quieted, drained = play(
            ("celery_control", {"destination": [name], "quiet": True}),
            (
                "celery_inspect",
                {"destination": [name], "wait_for": {"idle": True, "not_consumes": True}, "wait_timeout": 30},
            ),
        )
        assert quieted["changed"] and not drained.get("failed"), drained.get("msg")
        ended = one.log.read_text().count("] succeeded in")

        def seen() -> dict[str, Any]:
            return dict(play(("rabbitmq_info", {"queues": ["slow"]}))[0]["queues"]["slow"])

        # RabbitMQ counts what is with workers every five seconds only.
        row = wait_until(lambda: (now := seen())["unacked"] == 0 and now, 20, "nothing is held")
        assert ended + row["ready"] == count and row["ready"] > 0
    rabbit.ctl("purge_queue", "slow")


def test_broker_killed(play: Any, rabbit: RabbitServer, notes: RedisServer) -> None:
    """kill -9 of RabbitMQ under work: workers come back by themselves, every task that was taken runs."""
    names = ["lab-back-1@lab", "lab-back-2@lab"]
    notes.cli("DEL", "lab:done", "lab:begun")
    with workers(worker(rabbit, names[0], "safe", notes), worker(rabbit, names[1], "quick", notes)):
        sent = send(rabbit, "lab.noted", 300, "safe") + send(rabbit, "lab.noted", 300, "quick")
        rabbit.kill()
        began = time.monotonic()
        rabbit.run()
        answered = time.monotonic()
        sent += send(rabbit, "lab.noted", 50, "safe") + send(rabbit, "lab.noted", 50, "quick")
        wait_until(lambda: set(sent) <= set(done(notes)), 60, "every task")
        print(
            f"RabbitMQ answered after {answered - began:.1f} s, all had run {time.monotonic() - answered:.1f} s later"
        )
        (proved,) = play(("celery_canary", {"nodes": names, "release": "v1"}))
        assert not proved.get("failed"), proved.get("msg")
    assert set(sent) - set(done(notes)) == set()
