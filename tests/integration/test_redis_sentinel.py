# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Real Redis servers and Sentinels under a real worker: the primary is killed, or hands over; tasks are counted."""

from __future__ import annotations

import contextlib
import json
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis as redis_py

from ansible_collections.celeryops.runbook.plugins.module_utils.engine import (
    acl,
    heartbeat,
    pauses,
    replication,
    schedule,
    sentinel,
    tasks,
)
from ansible_collections.celeryops.runbook.plugins.module_utils.engine.backup import Server
from ansible_collections.celeryops.runbook.plugins.module_utils.engine.connection import Broker, BrokerSpec
from ansible_collections.celeryops.runbook.plugins.module_utils.engine.control import Control
from ansible_collections.celeryops.runbook.plugins.module_utils.engine.errors import CeleryOpsError, PreconditionFailed
from ansible_collections.celeryops.runbook.plugins.module_utils.engine.queues import RedisQueues
from ansible_collections.celeryops.runbook.plugins.module_utils.engine.records import DeployLocks
from support import LaunchedBeat, RedisServer, SentinelSet, Worker, wait_until, workers

OPTIONS = {"master_name": "lab"}
# docs/redis-sentinel.md: with what Celery has by itself a worker sits on a dead connection for 51 s, or for good.
PATIENT = {"health_check_interval": 4, "socket_timeout": 4, "socket_connect_timeout": 2}
RUNTIME = ("--include", "celeryops.worker")


@pytest.fixture
def servers(tmp_path: Path) -> Iterator[SentinelSet]:
    with SentinelSet(tmp_path / "set") as found:
        yield found


@pytest.fixture
def notes() -> Iterator[RedisServer]:
    """What ran is noted where no failover is."""
    with RedisServer() as found:
        yield found


def open_broker(servers: SentinelSet) -> Broker:
    return Broker(BrokerSpec.build(url=servers.url(), transport_options=OPTIONS, socket_timeout=3, connect_timeout=2))


def worker(servers: SentinelSet, notes: RedisServer) -> Worker:
    environment = {
        "CELERYOPS_TRANSPORT_OPTIONS": json.dumps({**OPTIONS, **PATIENT}), "LABAPP_NOTES_URL": notes.url(),
        "CELERY_RESULT_BACKEND": notes.url(1),
    }  # fmt: skip
    return Worker(servers.url(), "s@lab", environment=environment, arguments=RUNTIME)


class Load(threading.Thread):
    """Sends tasks at a steady rate. `sent`: acknowledged by the primary, id -> when; `safe`: by a replica as well."""

    def __init__(self, servers: SentinelSet, rate: float, wait: bool = False) -> None:
        super().__init__(daemon=True)
        self.servers, self.rate, self.wait = servers, rate, wait
        self.sent: dict[str, float] = {}
        self.safe: set[str] = set()
        self.refused = 0
        self.over = threading.Event()
        self.start()

    def run(self) -> None:
        broker = None
        while not self.over.wait(1 / self.rate):
            try:
                broker = broker or open_broker(self.servers)
                number = tasks.send(broker, tasks.Order("lab.noted", "celery"))
                self.sent[number] = time.time()
                # The same connection, or its own writes would not be what is waited for.
                if self.wait and broker.redis.wait(1, 500) >= 1:
                    self.safe.add(number)
            except (CeleryOpsError, redis_py.exceptions.RedisError, OSError):
                self.refused += 1
                if broker is not None:
                    broker.close()
                broker = None
        if broker is not None:
            broker.close()

    def stop(self) -> None:
        self.over.set()
        self.join(30)


class Plain(threading.Thread):
    """Writes as fast as one connection can and waits for no replica: what asynchronous replication may lose."""

    def __init__(self, servers: SentinelSet) -> None:
        super().__init__(daemon=True)
        self.client = redis_py.Redis(port=servers.primary(), password=servers.password)
        self.acknowledged = 0
        self.start()

    def run(self) -> None:
        with contextlib.suppress(redis_py.exceptions.RedisError, OSError):
            while True:
                self.acknowledged = int(self.client.incr("plain"))


def done(notes: RedisServer) -> list[str]:
    return notes.cli("LRANGE", "lab:done", "0", "-1").splitlines()


@pytest.mark.parametrize("fault", ["killed", "frozen"])
def test_the_primary_dies_under_load(servers: SentinelSet, notes: RedisServer, fault: str) -> None:
    """The worker follows by itself. What a replica had acknowledged runs; what only the primary had may be lost.

    A frozen one is like a host that is gone: connections stay open and nothing comes.
    """
    with worker(servers, notes) as running:
        pid = running.pid
        load = Load(servers, 50, wait=True)
        wait_until(lambda: len(done(notes)) > 50, 20, "the worker works")
        old = servers.primary()
        plain = Plain(servers)
        time.sleep(0.5)
        killed = time.monotonic()
        if fault == "killed":
            servers.kill(old)
        else:
            servers.processes[old].send_signal(signal.SIGSTOP)
        wait_until(lambda: servers.primary() != old, 30, "a new primary")
        promoted = time.monotonic() - killed
        begun = int(notes.cli("LLEN", "lab:begun"))
        wait_until(lambda: int(notes.cli("LLEN", "lab:begun")) > begun + 5, 30, "the worker consumes again")
        gap = time.monotonic() - killed
        time.sleep(2)
        load.stop()
        wait_until(lambda: load.safe <= set(done(notes)), 20, "all that a replica had is done")
        assert running.process and running.process.poll() is None and running.pid == pid
    plain.join(10)
    kept = int(servers.cli(servers.primary(), "GET", "plain") or 0)
    lost = set(load.sent) - set(done(notes))
    twice = len(done(notes)) - len(set(done(notes)))
    print(
        f"{fault}: promoted after {promoted:.1f} s, consumed after {gap:.1f} s; sent {len(load.sent)}, refused"
        f" {load.refused}, lost {len(lost)}, twice {twice}; of {plain.acknowledged} plain writes lost"
        f" {plain.acknowledged - kept}"
    )
    assert gap < 15
    assert not lost & load.safe
    assert twice <= 5


def test_a_planned_failover_loses_nothing(servers: SentinelSet, notes: RedisServer) -> None:
    with worker(servers, notes) as running, open_broker(servers) as broker:
        pid = running.pid
        load = Load(servers, 50)
        wait_until(lambda: len(done(notes)) > 50, 20, "the worker works")
        waiting = redis_py.Connection(port=servers.primary(), password=servers.password)
        waiting.send_command("BRPOP", "nothing", 0)
        with sentinel.Watch(broker) as watch:
            view = watch.settle(10)
            todo = sentinel.plan(view, wanted="any")
            assert (todo.action, todo.target) == ("switch", view.replicas[0].address)
            result = watch.fail_over(view, todo, 20)
            moved = time.monotonic()
            begun = int(notes.cli("LLEN", "lab:begun"))
            wait_until(lambda: int(notes.cli("LLEN", "lab:begun")) > begun + 5, 30, "the worker consumes again")
            gap = time.monotonic() - moved
            # Not UNBLOCKED, at which a worker without the runtime part `reconnect` ends.
            with pytest.raises(redis_py.exceptions.ConnectionError):
                waiting.read_response()
            after = watch.guarded(todo.target, 30)
            assert after.primary == todo.target and [node.address for node in after.replicas] == [view.primary]
            assert sentinel.plan(after).action == "none" == sentinel.plan(after, wanted=todo.target).action
        time.sleep(1)
        load.stop()
        wait_until(lambda: set(load.sent) <= set(done(notes)), 20, "all is done")
        assert running.process and running.process.poll() is None and running.pid == pid
    twice = len(done(notes)) - len(set(done(notes)))
    print(f"{result}, the worker {gap:.1f} s later; sent {len(load.sent)}, refused {load.refused}, twice {twice}")
    assert twice == 0


def test_of_two_replicas_the_one_that_is_wanted(tmp_path: Path) -> None:
    with (
        SentinelSet(tmp_path / "set", replicas=2) as servers,
        open_broker(servers) as broker,
        sentinel.Watch(broker) as watch,
    ):
        # Whichever they would take by themselves, two in a row are not both it.
        for _turn in range(2):
            view = watch.settle(10)
            wanted = view.replicas[-1].address
            watch.fail_over(view, sentinel.plan(view, wanted=wanted), 30)
            after = watch.guarded(wanted, 30)
            assert after.primary == wanted and len(after.replicas) == 2, after
            ports = servers.redis_ports
            told = [servers.cli(port, "CONFIG", "GET", "replica-priority").split()[-1] for port in ports]
            assert told == ["100"] * 3


ENTRIES = {"often": {"task": "lab.noted_early", "schedule": 1.0}}


def test_all_that_asks_the_broker_works_before_and_after(
    servers: SentinelSet, notes: RedisServer, tmp_path: Path
) -> None:
    own = {"CELERYOPS_BEAT_LEASE": "5", "LABAPP_MASTER_NAME": "lab", "CELERY_RESULT_BACKEND": notes.url(1)}
    beat = LaunchedBeat(servers.url(), "b", tmp_path / "schedule", ENTRIES, **own)

    def proven() -> None:
        with open_broker(servers) as broker:
            with Control(broker, timeout=5) as control:
                told = control.many([("ping", {}), ("celeryops_ledger", {}), ("active_queues", {})])
                assert all(replies.nodes == ["s@lab"] for replies in told.values())
                wanted = tasks.pairs(control, None, ["s@lab"], None)
            proof = tasks.prove(broker, wanted, tasks.Canary(), 10)
            assert len(proof.answers) == 1
            assert RedisQueues.of(broker).depth(["parked"])["parked"]["depth"] == 1
            leader, heart = schedule.leader(broker, "lab"), heartbeat.read(broker, "lab")
            assert leader and leader.host == "b" and heart and heart["age"] < 40
            assert list(pauses.load(broker)) == ["parked"]
            assert DeployLocks(broker, "lab").view().record is not None

    with workers(worker(servers, notes), beat), open_broker(servers) as broker:
        pause = pauses.next_pause(None, "parked", "me", "test", None, pauses.now_of(broker))
        pauses.save(broker, {"parked": pause})
        tasks.send(broker, tasks.Order("lab.noted", "parked"))
        DeployLocks(broker, "lab").hold(owner="me", lease=300)
        wait_until(lambda: heartbeat.read(broker, "lab") and schedule.leader(broker, "lab"), 20, "beat leads")
        proven()
        with sentinel.Watch(broker) as watch:
            view = watch.settle(10)
            watch.fail_over(view, sentinel.plan(view, wanted="any"), 20)
        count = int(notes.cli("LLEN", "lab:done"))
        wait_until(lambda: int(notes.cli("LLEN", "lab:done")) > count + 2, 20, "beat goes on")
        proven()
    # One run a second, also across the failover, and none twice.
    assert len(done(notes)) == len(set(done(notes)))


def test_who_leads_is_asked_before_anybody_becomes_a_replica(servers: SentinelSet) -> None:
    first, second = (f"127.0.0.1:{port}" for port in servers.redis_ports)
    sentinels = [f"127.0.0.1:{port}" for port in servers.sentinel_ports]
    group = replication.Group([first, second], first, sentinels, "lab", servers.password)
    unwatched = replication.Group([first, second], first, [], "lab", servers.password)

    def attach(port: int, of: replication.Group = group, discard: bool = False, dry: bool = False) -> dict[str, object]:
        server = Server(port, servers.password)
        return replication.attach(server, of, f"127.0.0.1:{port}", discard=discard, timeout=20, dry=dry)

    with open_broker(servers) as broker, sentinel.Watch(broker) as watch:
        view = watch.settle(10)
        watch.fail_over(view, sentinel.plan(view, wanted=second), 20)
    # The inventory still begins with the other one.
    for of in (group, unwatched):
        assert [attach(port, of)["role"] for port in servers.redis_ports] == ["replica", "primary"]
        assert not any(attach(port, of)["changed"] for port in servers.redis_ports)
    # One that comes new is attached to who leads now; what it holds is not thrown away.
    with RedisServer("--masterauth", servers.password, password=servers.password) as third:
        peers = [first, second, f"127.0.0.1:{third.port}"]
        wider = replication.Group(peers, first, sentinels, "lab", servers.password)
        third.cli("--no-auth-warning", "SET", "precious", "1")
        with pytest.raises(PreconditionFailed, match="holds 1 keys, which are lost"):
            attach(third.port, wider)
        planned = attach(third.port, wider, discard=True, dry=True)
        assert (planned["changed"], planned["primary"], planned["discarded"]) == (True, second, 1)
        assert third.cli("--no-auth-warning", "GET", "precious") == "1"
        with pytest.raises(PreconditionFailed, match="which is not one of"):
            attach(servers.redis_ports[0], replication.Group([first], first, [], "lab", servers.password))


def test_what_another_redis_would_undo_is_refused(servers: SentinelSet) -> None:
    first, second = (Server(port, servers.password) for port in servers.redis_ports)
    me, other = (f"127.0.0.1:{server.port}" for server in (first, second))
    sentinels = [f"127.0.0.1:{port}" for port in servers.sentinel_ports]
    group = replication.Group([], "", sentinels, "lab")
    known = replication.standing(first)
    assert (known.source, known.replicas, known.watchers) == ("", [other], 3)
    assert replication.standing(second).source == me

    # The Sentinels of the group may watch until they are stopped, others never.
    replication.may_restore(first, group, me, stopped=False)
    fewer = replication.Group([], "", sentinels[:2], "lab")
    for of, stopped in ((group, True), (fewer, False), (replication.Group([], "", [], ""), False)):
        with pytest.raises(PreconditionFailed, match="3 Sentinels watch this Redis"):
            replication.may_restore(first, of, me, stopped=stopped)
    with pytest.raises(PreconditionFailed, match=f"name {me} as the primary.*celeryops_redis_host"):
        replication.may_restore(second, group, other, stopped=False)
    with pytest.raises(PreconditionFailed, match=f"replica of {me}.*celeryops_redis_host"):
        replication.may_flush(second)
    with pytest.raises(PreconditionFailed, match=f"{other} replicate this Redis"):
        replication.may_flush(first)

    for port in servers.sentinel_ports:
        servers.kill(port)
    wait_until(lambda: replication.standing(first).watchers == 0, 5, "nobody watches")
    replication.may_restore(first, group, me, stopped=True)
    with pytest.raises(PreconditionFailed, match=f"replica of {me}"):
        replication.may_restore(second, group, other, stopped=True)
    # One that is down, and that no Sentinel has replaced, may be restored.
    servers.kill(second.port)
    replication.may_restore(second, group, other, stopped=True)
    wait_until(lambda: not replication.standing(first).replicas, 5, "nobody follows")
    replication.may_flush(first)


def test_a_running_sentinel_is_set_without_a_secret_in_a_command_line(servers: SentinelSet) -> None:
    port = servers.sentinel_ports[0]
    file = servers.directory / str(port) / "redis.conf"
    group = replication.Group([], "", [], "lab", servers.password)
    wanted = replication.Sentinel(port, ["*"], 1, 7000, 20000, str(file.parent), "watcher", "a-new-one")
    server = Server(port)
    found = replication.differing(server, file.read_text(), wanted, group)
    assert found == {
        "quorum": "1", "down-after-milliseconds": "7000", "auth-user": "watcher", "auth-pass": "a-new-one"
    }  # fmt: skip
    tell(server, found)
    assert replication.differing(server, file.read_text(), wanted, group) == {}
    # And back to the administrator.
    alone = replication.Sentinel(port, ["*"], 1, 7000, 20000, str(file.parent), "", servers.password)
    tell(server, replication.differing(server, file.read_text(), alone, group))
    assert replication.differing(server, file.read_text(), alone, group) == {}


def tell(server: Server, found: dict[str, str]) -> None:
    words = [word for name, value in found.items() for word in (name, replication.quoted(value))]
    assert server.ask("SENTINEL", "SET", "lab", *words, hidden=True) == "OK"


def test_a_user_for_each_whose_password_changes_between_failovers(tmp_path: Path) -> None:
    """Nobody is refused anything, before, while and after; what Redis and Sentinel keep outlasts the old primary."""
    roles = ("operator", "replica", "sentinel")

    def secret(role: str, turn: int) -> str:
        return f"{role}-secret-{turn}"

    def turn_to(servers: SentinelSet, turn: int) -> None:
        """As the playbook redis_rotate_secret does it."""
        layout = acl.Layout(replicas=2)
        for step in ("prepare", "finish"):
            for port in servers.redis_ports:
                for role in roles:
                    turns = (turn, turn - 1) if step == "prepare" else (turn,)
                    hashes = tuple(acl.digest(secret(role, one)) for one in turns)
                    user = acl.User(role, acl.rules(role, layout), hashes)
                    assert servers.cli(port, "ACL", "SETUSER", role, "reset", *user.words) == "OK"
            if step == "finish":
                break
            for port in servers.redis_ports:
                server = Server(port, servers.password)
                differ = replication.hand(server, "replica", secret("replica", turn), dry=True)
                assert "masterauth" in differ
                assert replication.hand(server, "replica", secret("replica", turn), dry=False) == differ
                assert replication.hand(server, "replica", secret("replica", turn), dry=False) == []
            for port in servers.sentinel_ports:
                file = servers.directory / str(port) / "redis.conf"
                group = replication.Group([], "", [], "lab")
                wanted = replication.Sentinel(
                    port, ["*"], 2, 5000, 20000, "/", "sentinel", secret("sentinel", turn)
                )  # fmt: skip
                tell(Server(port), replication.differing(Server(port), file.read_text(), wanted, group))

    def connected(servers: SentinelSet) -> dict[str, set[str]]:
        """The kind of each user's connections to the primary."""
        rows = [row.split() for row in servers.cli(servers.primary(), "CLIENT", "LIST").splitlines()]
        told = [dict(word.partition("=")[::2] for word in row) for row in rows]
        return {
            kind: {one["user"] for one in told if mark(one)}
            for kind, mark in {
                "link": lambda one: "S" in one["flags"],
                "watch": lambda one: one["name"].startswith("sentinel-"),
            }.items()
        }

    def operator(servers: SentinelSet, turn: int) -> Broker:
        url = servers.url().replace(f":{servers.password}@", f"operator:{secret('operator', turn)}@")
        return Broker(BrokerSpec.build(url=url, transport_options=OPTIONS, socket_timeout=3, connect_timeout=2))

    def move(servers: SentinelSet, turn: int) -> None:
        with operator(servers, turn) as broker, sentinel.Watch(broker) as watch:
            # They have dropped their connections, and make new ones within a second.
            wait_until(lambda: len(watch.settle(20).replicas) == 2, 20, "the Sentinels see all")
            view = watch.look()
            wanted = view.replicas[-1].address
            watch.fail_over(view, sentinel.plan(view, wanted=wanted), 30)
            after = watch.guarded(wanted, 30)
            assert after.primary == wanted and len(after.replicas) == 2, after

    with SentinelSet(tmp_path / "set", replicas=2, down_after=2000) as servers:
        turn_to(servers, 1)
        move(servers, 1)
        assert connected(servers) == {"link": {"replica"}, "watch": {"sentinel"}}
        turn_to(servers, 2)
        assert [servers.cli(port, "ACL", "LOG") for port in servers.redis_ports] == [""] * 3
        dead = servers.primary()
        servers.kill(dead)
        wait_until(lambda: servers.primary() != dead, 40, "the Sentinels replace it")
        left = [port for port in servers.redis_ports if port != dead]
        wait_until(
            lambda: any("master_link_status:up" in servers.cli(port, "INFO", "replication") for port in left),
            40,
            "the other replica follows",
        )
        assert [servers.cli(port, "ACL", "LOG") for port in left] == ["", ""]
        # Started again it knows what to connect with.
        servers.start_redis(dead)
        wait_until(lambda: "master_link_status:up" in servers.cli(dead, "INFO", "replication"), 40, "it follows")
