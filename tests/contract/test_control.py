# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The engine's remote control against the Celery of this environment: real Redis, real workers."""

from __future__ import annotations

import base64
import json
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import celery
import pytest
from pki import Authority

from ansible_collections.celeryops.runbook.plugins.module_utils.engine.connection import Broker, BrokerSpec
from ansible_collections.celeryops.runbook.plugins.module_utils.engine.control import (
    Control,
    Request,
    control_message,
    is_beat,
)
from ansible_collections.celeryops.runbook.plugins.module_utils.engine.errors import (
    AuthenticationFailed,
    ConnectionFailed,
    PreconditionFailed,
)
from ansible_collections.celeryops.runbook.plugins.module_utils.engine.fleet import Conditions, observe, wait_for
from support import TESTS, Beat, RedisServer, Worker, free_port, wait_until, workers

VERSION = tuple(map(int, celery.__version__.split(".")[:2]))
# Kombu's own bookkeeping, not ours.
KOMBU = "_kombu.binding"


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    with RedisServer() as server:
        yield server


@pytest.fixture(scope="module")
def fleet(server: RedisServer) -> Iterator[tuple[Worker, ...]]:
    with workers(Worker(server.url(), "a@lab"), Worker(server.url(), "b@lab", pool="threads", queues="bulk")) as fleet:
        yield fleet


@pytest.fixture
def control(server: RedisServer, fleet: tuple[Worker, ...]) -> Iterator[Control]:
    with Broker(BrokerSpec.build(url=server.url())) as broker, Control(broker) as control:
        yield control


def test_our_message_has_the_shape_of_kombus(server: RedisServer) -> None:
    import redis

    client = redis.Redis(port=server.port)
    listener = client.pubsub()
    listener.psubscribe("*.celery.pidbox")
    listener.get_message(timeout=2)
    app = celery.Celery(broker=server.url(), set_as_current=False)
    app.control.broadcast("ping", reply=True, timeout=0.1)
    found = wait_until(lambda: listener.get_message(timeout=1), what="kombu's message")
    theirs = json.loads(found["data"])
    ours = json.loads(
        control_message(Request("ping"), exchange="celery.pidbox", ticket="t", reply_to="oid", expires=time.time())
    )
    assert found["channel"] == b"/0.celery.pidbox"
    for part in (theirs, ours):
        part["body"] = json.loads(base64.b64decode(part["body"]))
    assert shape(ours) == shape(theirs)
    listener.close()
    client.close()


def shape(value: Any) -> Any:
    return {key: shape(item) for key, item in value.items()} if isinstance(value, dict) else None


def test_all_answer_at_once(control: Control) -> None:
    control.broadcast("ping")  # connections open
    started = time.monotonic()
    replies = control.broadcast("ping")
    assert time.monotonic() - started < 0.5
    assert sorted(replies.nodes) == ["a@lab", "b@lab"]
    assert (replies.subscribed, replies.silent_count, replies.duplicates, replies.refused) == (2, 0, [], [])
    assert [reply.value for reply in replies.replies] == [{"ok": "pong"}] * 2


def test_every_command_in_one_round(control: Control) -> None:
    names = [
        "stats",
        "active",
        "reserved",
        "scheduled",
        "active_queues",
        "registered",
        "conf",
        "revoked",
        "clock",
        "report",
    ]
    answers = control.many([(name, {}) for name in names])
    for name in names:
        assert sorted(answers[name].nodes) == ["a@lab", "b@lab"], name
        assert not [reply.error for reply in answers[name].replies if reply.error], name
    queues = {reply.node: [queue["name"] for queue in reply.value] for reply in answers["active_queues"].replies}
    assert queues == {"a@lab": ["celery"], "b@lab": ["bulk"]}
    assert answers["stats"].replies[0].value["pool"]["implementation"]


@pytest.mark.parametrize("ways", [["blmpop"], ["brpop"], ["lrange"], ["no such command", "lrange"]])
def test_every_way_to_take_replies(control: Control, ways: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    control._pops = ways
    if ways[0] == "no such command":
        control._pops = ["blmpop", "lrange"]
        real = control._blocking

        def refuse(remaining: float, *command: str) -> Any:
            return real(remaining, *(("NOSUCHCOMMAND",) if command[0] == "BLMPOP" else command))

        monkeypatch.setattr(control, "_blocking", refuse)
    answers = control.many([("ping", {}), ("stats", {})])
    assert sorted(answers["stats"].nodes) == ["a@lab", "b@lab"]
    assert control._pops[0] == ways[-1]


def test_nothing_is_left_behind(server: RedisServer, control: Control, monkeypatch: pytest.MonkeyPatch) -> None:
    def ours() -> list[str]:
        found = server.keys()
        keys = [key for key in found if not key.startswith(KOMBU)]
        return keys + server.cli("SMEMBERS", "_kombu.binding.reply.celery.pidbox").split()

    before = ours()
    control.many([("ping", {}), ("stats", {})])
    control.broadcast("ping", destination=["nobody@lab"], timeout=0.3)
    assert ours() == before

    def broken(*_unused: Any) -> None:
        raise RuntimeError("on purpose")

    monkeypatch.setattr(control, "_pop", broken)
    with pytest.raises(RuntimeError):
        control.broadcast("stats")
    time.sleep(0.3)
    control.close()
    assert ours() == before


def test_a_destination_that_is_not_there_costs_no_timeout(control: Control) -> None:
    started = time.monotonic()
    replies = control.broadcast("active", destination=["nobody@lab"], timeout=10)
    assert time.monotonic() - started < 2
    assert (replies.nodes, replies.silent_count) == ([], 1)


def test_worker_errors_are_answers(control: Control) -> None:
    limited = control.broadcast("rate_limit", {"task_name": "no.such", "rate_limit": "1/s"})
    assert {reply.error for reply in limited.replies} == {"unknown task"}
    unknown = control.broadcast("no_such_command")
    assert all("unknown command" in str(reply.error) for reply in unknown.replies)
    grown = control.broadcast("pool_grow", {"n": 1}, destination=["b@lab"])
    assert grown.replies[0].error


def test_key_prefix_and_database(server: RedisServer) -> None:
    worker = Worker(server.url(3), "p@lab", environment={"LABAPP_KEY_PREFIX": "shop:"})
    with workers(worker), Broker(BrokerSpec.build(url=server.url(3), key_prefix="shop:")) as broker:
        with Control(broker, timeout=10) as control:
            assert control.broadcast("ping").nodes == ["p@lab"]
            assert control.many([("stats", {}), ("active", {})])["stats"].nodes == ["p@lab"]
        found = server.keys(3)
        assert not [key for key in found if "reply" in key and not key.startswith(f"shop:{KOMBU}")]
        with Broker(BrokerSpec.build(url=server.url(3))) as other, Control(other) as control:
            assert control.broadcast("ping").subscribed == 0


def test_frozen_killed_and_idle_are_told_apart(server: RedisServer) -> None:
    names = ["f@lab", "k@lab", "i@lab"]
    frozen, killed, idle = (Worker(server.url(4), name) for name in names)
    with (
        workers(frozen, killed, idle),
        Broker(BrokerSpec.build(url=server.url(4))) as broker,
        Control(broker) as control,
    ):
        assert observe(control, [("active", {})], expected=names).workers == sorted(names)
        killed.kill()
        wait_until(lambda: control.broadcast("ping").subscribed == 2, what="the kill to be seen")
        started = time.monotonic()
        fleet = observe(control, [("active", {})], expected=names, timeout=5)
        assert time.monotonic() - started < 2
        assert (fleet.subscribed, fleet.silent_count) == (2, 0)
        assert (fleet.nodes["k@lab"].state, fleet.nodes["k@lab"].connected) == ("silent", False)
        frozen.freeze()
        started = time.monotonic()
        fleet = observe(control, [("active", {})], expected=["f@lab", "i@lab"], timeout=0.7)
        took = time.monotonic() - started
        frozen.thaw()
        assert 0.7 <= took < 0.75 + 0.1, took
        assert (fleet.subscribed, fleet.silent_count) == (2, 1)
        assert (fleet.nodes["f@lab"].state, fleet.nodes["f@lab"].connected) == ("silent", None)
        assert fleet.nodes["i@lab"].replies == {"active": []}


def test_double_names_are_reported(server: RedisServer) -> None:
    with (
        workers(Worker(server.url(5), "twin@lab"), Worker(server.url(5), "twin@lab", queues="other")),
        Broker(BrokerSpec.build(url=server.url(5))) as broker,
        Control(broker, timeout=10) as control,
    ):
        replies = control.broadcast("active_queues")
        assert (replies.subscribed, replies.duplicates, len(replies.replies)) == (2, ["twin@lab"], 2)
        assert observe(control, [("ping", {})]).duplicates == ["twin@lab"]


def test_a_busy_solo_worker_is_silent_not_gone(server: RedisServer) -> None:
    app = celery.Celery(broker=server.url(6), set_as_current=False)
    with (
        workers(Worker(server.url(6), "solo@lab", pool="solo")) as (worker,),
        Broker(BrokerSpec.build(url=server.url(6))) as broker,
        Control(broker) as control,
    ):
        app.send_task("lab.sleep", [2.5])
        wait_until(lambda: "received" in worker.log.read_text(), what="the task")
        fleet = observe(control, [("ping", {})], expected=["solo@lab"], timeout=0.5)
        assert (fleet.silent_count, fleet.nodes["solo@lab"].state) == (1, "silent")
        unmet = wait_for(control, Conditions(gone=("solo@lab",)), timeout=0.3, wait_timeout=0.5).unmet
        assert "may be one of them" in unmet[0].reason
        assert not wait_for(control, Conditions(all_answer=True), expected=["solo@lab"], wait_timeout=20).unmet


if VERSION >= (5, 7):  # earlier ones know no ping to beat

    def test_beat_is_told_apart(server: RedisServer, tmp_path: Path) -> None:
        with (
            workers(Worker(server.url(7), "w@lab"), Beat(server.url(7), "beat", tmp_path / "schedule")),
            Broker(BrokerSpec.build(url=server.url(7))) as broker,
            Control(broker) as control,
        ):
            wait_until(lambda: len(control.broadcast("ping").nodes) == 2, what="beat's answer")
            started = time.monotonic()
            fleet = observe(control, [("active", {}), ("stats", {})], timeout=10)
            assert time.monotonic() - started < 2
            beats = [name for name in fleet.nodes if is_beat(name)]
            assert len(beats) == 1 and fleet.nodes[beats[0]].type == "beat" and not fleet.nodes[beats[0]].errors
            assert (fleet.workers, fleet.subscribed, fleet.silent_count) == (["w@lab"], 2, 0)


def test_trickling_replies_do_not_stretch_the_deadline(server: RedisServer) -> None:
    """A fake node answers the census every 50 ms for ever: one deadline, whatever comes."""
    import redis

    client = redis.Redis(port=server.port, db=8)
    listener = client.pubsub()
    listeners = [client.pubsub() for _unused in range(20)]
    for item in [listener, *listeners]:
        item.psubscribe("/8.celery.pidbox")
        item.get_message(timeout=2)
    stop = threading.Event()

    def trickle() -> None:
        message = wait_until(lambda: listener.get_message(timeout=1), what="the request")
        request = json.loads(base64.b64decode(json.loads(message["data"])["body"]))
        number = 0
        while not stop.wait(0.05):
            number += 1
            body = base64.b64encode(json.dumps({f"n{number}@lab": {"ok": "pong"}}).encode()).decode()
            reply = {
                "body": body,
                "content-type": "application/json",
                "headers": {"ticket": request["ticket"]},
                "properties": {"body_encoding": "base64"},
            }
            client.lpush(f"{request['reply_to']['routing_key']}.reply.celery.pidbox", json.dumps(reply))

    thread = threading.Thread(target=trickle)
    thread.start()
    try:
        with Broker(BrokerSpec.build(url=server.url(8))) as broker, Control(broker) as control:
            assert broker.redis.ping()
            started = time.monotonic()
            replies = control.broadcast("ping", timeout=0.6)
            took = time.monotonic() - started
    finally:
        stop.set()
        thread.join()
        for item in [listener, *listeners]:
            item.close()
        client.close()
    assert 0.6 <= took < 0.75, took
    assert replies.subscribed == 21
    assert 5 <= len(replies.replies) <= 13


@pytest.mark.parametrize("ways", [["blmpop"], ["brpop"], ["lrange"]])
def test_the_clock_is_ours_in_every_way(server: RedisServer, ways: list[str]) -> None:
    import redis

    client = redis.Redis(port=server.port, db=9)
    listener = client.pubsub()
    listener.psubscribe("/9.celery.pidbox")
    listener.get_message(timeout=2)
    with Broker(BrokerSpec.build(url=server.url(9))) as broker, Control(broker) as control:
        control._pops = ways
        for _unused in range(2):
            started = time.monotonic()
            replies = control.broadcast("ping", timeout=0.4)
            assert 0.4 <= time.monotonic() - started < 0.5
            assert (replies.subscribed, replies.silent_count) == (1, 1)
    listener.close()
    client.close()


def test_errors_of_the_broker_are_clear() -> None:
    with RedisServer(password="hunter2!") as server:
        good = server.url()
        cases = [
            (good.replace("hunter2!", "wrong"), AuthenticationFailed, "refuses"),
            (good.replace(":hunter2!@", ""), AuthenticationFailed, "gives no password"),
            (server.url(99), ConnectionFailed, "database 99 does not exist"),
        ]
        for url, kind, part in cases:
            with Broker(BrokerSpec.build(url=url)) as broker, pytest.raises(kind, match=part) as caught:
                Control(broker).broadcast("ping")
            assert "hunter2" not in str(caught.value) and "wrong" not in str(caught.value)
        with Broker(BrokerSpec.build(url=good)) as broker, Control(broker) as control:
            assert control.broadcast("ping").subscribed == 0
            server.stop()
            with pytest.raises(ConnectionFailed, match="cannot be reached"):
                control.broadcast("ping")
        with Broker(BrokerSpec.build(url=good)) as broker, pytest.raises(ConnectionFailed, match="cannot be reached"):
            Control(broker).broadcast("ping")


def test_a_loading_or_unwritable_redis_says_so(server: RedisServer) -> None:
    server.cli("CONFIG", "SET", "min-replicas-to-write", "1")
    try:
        with Broker(BrokerSpec.build(url=server.url(10))) as broker, pytest.raises(ConnectionFailed, match="replicas"):
            Control(broker).broadcast("ping")
    finally:
        server.cli("CONFIG", "SET", "min-replicas-to-write", "0")


def test_the_next_url_is_used_when_one_is_down(server: RedisServer) -> None:
    url = f"redis://127.0.0.1:{free_port()}/1;{server.url(11)}"
    with (
        workers(Worker(url, "second@lab", environment={"CELERY_RESULT_BACKEND": ""})),
        Broker(BrokerSpec.build(url=url)) as broker,
    ):
        assert Control(broker).broadcast("ping", timeout=15).nodes == ["second@lab"]
        assert broker.db == 11


def test_the_unix_socket(tmp_path: Path) -> None:
    path = tmp_path / "redis.sock"
    with RedisServer("--unixsocket", str(path)) as server:
        server.cli("SET", "here", "1", db=2)
        with Broker(BrokerSpec.build(url=f"redis+socket://{path}?virtual_host=2")) as broker:
            assert broker.redis.get("here") == b"1"
            assert Control(broker).broadcast("ping").subscribed == 0


def test_tls(tmp_path: Path) -> None:
    authority = Authority(tmp_path, "lab-ca")
    redis, ca = authority.sign("redis", "IP:127.0.0.1"), str(authority.file)
    port = free_port()
    tls = ["--tls-port", str(port), "--tls-auth-clients", "no", "--tls-ca-cert-file", ca]
    tls += ["--tls-cert-file", str(redis.certificate), "--tls-key-file", str(redis.key)]
    url = f"rediss://127.0.0.1:{port}/1"
    with RedisServer(*tls) as plain:
        for spec in (
            BrokerSpec.build(url=url, tls={"ca_certs": ca, "verify": True}),
            BrokerSpec.build(url=f"{url}?ssl_cert_reqs=CERT_REQUIRED&ssl_ca_certs={ca}"),
            BrokerSpec.build(url=url, tls={"verify": False}),
            BrokerSpec.build(url=f"{url}?ssl_cert_reqs=none"),
        ):
            with Broker(spec) as broker, Control(broker) as control:
                assert control.broadcast("ping").subscribed == 0
        with (
            Broker(BrokerSpec.build(url=url)) as broker,
            pytest.raises(ConnectionFailed, match="TLS connection failed"),
        ):
            Control(broker).broadcast("ping")
        wrong = url.replace("127.0.0.1", "localhost")
        with (
            Broker(BrokerSpec.build(url=wrong, tls={"ca_certs": ca, "verify": True})) as broker,
            pytest.raises(ConnectionFailed, match="TLS connection failed"),
        ):
            Control(broker).broadcast("ping")
        secure = {"ssl_ca_certs": ca, "ssl_cert_reqs": "required"}
        worker = Worker(f"{url}?{'&'.join(f'{key}={value}' for key, value in secure.items())}", "tls@lab")
        with workers(worker), Broker(BrokerSpec.build(url=url, tls={"ca_certs": ca})) as broker:
            assert Control(broker, timeout=10).broadcast("ping").nodes == ["tls@lab"]
        assert plain.cli("PING") == "PONG"


def test_sentinel(tmp_path: Path) -> None:
    port = free_port()
    with RedisServer() as master:
        configuration = tmp_path / "sentinel.conf"
        configuration.write_text(
            f"port {port}\nbind 127.0.0.1\ndir {tmp_path}\nsentinel monitor mine 127.0.0.1 {master.port} 1\n"
        )
        sentinel = subprocess.Popen(
            ["redis-server", str(configuration), "--sentinel"], stdout=subprocess.DEVNULL, start_new_session=True
        )
        try:
            # The database of the first URL counts, as for kombu. The first Sentinel is down: kombu loses 4 s there.
            url = f"sentinel://127.0.0.1:{free_port()}/2;sentinel://127.0.0.1:{port}"
            options = {"master_name": "mine"}
            environment = {"LABAPP_MASTER_NAME": "mine", "CELERY_RESULT_BACKEND": ""}
            worker = Worker(f"sentinel://127.0.0.1:{port}/2", "s@lab", environment=environment)
            with workers(worker), Broker(BrokerSpec.build(url=url, transport_options=options)) as broker:
                with Control(broker, timeout=10) as control:
                    assert control.broadcast("ping").nodes == ["s@lab"]
                assert broker.redis.client_info()["db"] == 2
            with (
                Broker(BrokerSpec.build(url=url, transport_options={"master_name": "other"})) as broker,
                pytest.raises(ConnectionFailed, match="no Sentinel knows a reachable master 'other'"),
            ):
                Control(broker).broadcast("ping")
        finally:
            sentinel.kill()
            sentinel.wait()


def test_the_application_names_its_broker(server: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CELERY_BROKER_URL", server.url(2))
    spec = BrokerSpec.build(app="labapp:app", app_dir=str(TESTS))
    assert spec.url == server.url(2)
    with pytest.raises(PreconditionFailed, match=r"app: labapp:nothing cannot be imported|app: labapp:nothing"):
        BrokerSpec.build(app="labapp:nothing", app_dir=str(TESTS))
    with pytest.raises(PreconditionFailed, match="app: no_such_app:app cannot be imported"):
        BrokerSpec.build(app="no_such_app:app", app_dir=str(TESTS))
    with pytest.raises(PreconditionFailed, match="app_dir: /nowhere is not a directory"):
        BrokerSpec.build(app="labapp:app", app_dir="/nowhere")


def test_brokers_that_cannot_count_use_kombus_mailbox() -> None:
    """The memory transport speaks through kombu alone, as amqp does."""
    with Broker(BrokerSpec.build(url="memory://")) as broker:
        app = broker.celery_app
        stop = threading.Event()

        def node() -> None:
            with app.connection_for_read() as connection:
                mailbox = app.control.mailbox(connection)
                served = mailbox.Node("m@lab", channel=connection.default_channel)
                served.handlers["ping"] = lambda state, **_unused: {"ok": "pong"}
                served.handlers["active"] = lambda state, **_unused: []
                with served.listen():
                    while not stop.is_set():
                        try:
                            connection.drain_events(timeout=0.05)
                        except TimeoutError:
                            continue

        thread = threading.Thread(target=node)
        thread.start()
        try:
            with Control(broker) as control:
                wait_until(lambda: control.broadcast("ping", timeout=0.3).nodes == ["m@lab"], what="the node")
                started = time.monotonic()
                fleet = observe(control, [("active", {})], expected=["m@lab"], timeout=5)
                assert time.monotonic() - started < 2
                assert fleet.nodes["m@lab"].replies == {"active": []}
                assert fleet.subscribed is None
                started = time.monotonic()
                fleet = observe(control, [("active", {})], expected=["m@lab", "n@lab"], timeout=0.5)
                assert 0.5 <= time.monotonic() - started < 0.8
                assert fleet.nodes["n@lab"].state == "unknown"
        finally:
            stop.set()
            thread.join()
