# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What becomes of dead letters: caps, brokers that go away or refuse, RabbitMQ, the way back."""

from __future__ import annotations

import base64
import json
import os
import random
import signal
import time
from collections.abc import Callable
from datetime import datetime
from types import SimpleNamespace
from typing import Any

import amqp
import celery
import kombu
import redis
from dead_support import CAUSES, HARMLESS, counts, entries, send, worker

from celeryops.engine.deadletters import DeadLetters, DeadSelection, Letter, Record, deliver
from celeryops.engine.deadletters_amqp import AmqpDeadLetters
from support import RabbitServer, RedisServer, Worker, wait_until, workers


def test_they_come_back_as_they_were(broker: RedisServer) -> None:
    with worker(broker):
        failed, late = send(
            broker,
            ("dead.fail", {"kwargs": {"retries": True}, "priority": 6}),
            ("dead.nobody_knows", {"args": [1, "ü"], "expires": 1}),
        )
        wait_until(lambda: len(entries(broker)) == 2, 20, "dead letters")
        wait_until(lambda: not broker.cli("LLEN", "work\x06\x166").strip("0"), 5)
    before = entries(broker)
    client = redis.Redis(port=broker.port)
    letters = DeadLetters(client)
    wait_until(lambda: client.time()[0] > before[late]["headers"]["celeryops_dead"]["time"] + 1.5, 5)
    done = letters.requeue("work.dead", DeadSelection())
    assert (done.count, done.undecodable, done.by_priority) == (2, 0, {"0": 1, "3": 0, "6": 1, "9": 0})
    back = {}
    for key in ("work", "work\x06\x166"):
        (raw,) = client.lrange(key, 0, -1)
        document = json.loads(raw)
        back[document["headers"]["id"]] = document
    assert set(back) == {failed, late}
    for identity, document in back.items():
        old = before[identity]
        assert document["body"] == old["body"]
        assert "celeryops_dead" not in document["headers"] and document["headers"]["retries"] == 0
        assert document["headers"]["expires"] is None
        assert document["properties"]["delivery_info"] == {"exchange": "", "routing_key": "work"}
        same = set(old["headers"]) - {"celeryops_dead", "retries", "expires", "celeryops_published"}
        assert {name: document["headers"][name] for name in same} == {name: old["headers"][name] for name in same}


def test_age(broker: RedisServer) -> None:
    with worker(broker, CELERYOPS_DEAD_LETTER_MAX_AGE="1"):
        (old,) = send(broker, ("dead.nobody_knows", {}))
        found = wait_until(lambda: entries(broker), 20, "the first")
        client = redis.Redis(port=broker.port)
        wait_until(lambda: client.time()[0] > found[old]["headers"]["celeryops_dead"]["time"] + 2, 5)
        (new,) = send(broker, ("dead.nobody_knows", {}))
        wait_until(lambda: set(entries(broker)) == {new}, 20, "the second alone")


def begun(server: RedisServer, live: Worker, identity: str) -> bool:
    """A pool has it, and its message is acknowledged."""
    return f"[{identity}] received" in live.log.read_text() and server.cli("HLEN", "unacked") == "0"


def test_redis_away_during_the_failure() -> None:
    """The workers go on, and the letters are sent when the broker is back."""
    with RedisServer() as server:
        threads, prefork = worker(server, "threads"), worker(server, "prefork", queues="other")
        with workers(threads, prefork):
            (one,) = send(server, ("dead.fail_later", {"args": [1.5]}))
            (two,) = send(server, ("dead.fail_later", {"args": [1.5], "queue": "other"}))
            wait_until(lambda: begun(server, threads, one) and begun(server, prefork, two), 10, "the tasks' begin")
            server.stop()
            wait_until(lambda: f"{one} waits for the broker" in threads.log.read_text(), 20, "the failure")
            # The main process of a prefork worker hears of it when it is back in its loop.
            wait_until(lambda: "Trying again in" in prefork.log.read_text(), 20, "the loss of the broker")
            time.sleep(1)
            server.start()
            wait_until(lambda: entries(server) and entries(server, "other"), 40, "the dead letters")
            send(server, ("lab.add", {"args": [1, 2]}), ("lab.add", {"args": [1, 2], "queue": "other"}))
            for live in (threads, prefork):
                wait_until(lambda log=live.log: "lab.add" in log.read_text().rpartition("succeeded in")[0], 20)  # type: ignore[misc]
            assert (set(entries(server)), set(entries(server, "other"))) == ({one}, {two})


def test_redis_away_for_good() -> None:
    with RedisServer() as server, worker(server, "threads") as live:
        (identity,) = send(server, ("dead.fail_later", {"args": [1.5]}))
        wait_until(lambda: begun(server, live, identity), 10, "the task's begin")
        server.stop()
        wait_until(lambda: f"{identity} waits for the broker" in live.log.read_text(), 20, "the failure")
        live.stop(30)
        assert f"dead letter of task {identity} is lost: the broker is away" in live.log.read_text()


def test_what_the_broker_refuses_holds_up_nothing(broker: RedisServer) -> None:
    """A foreign key where the list belongs: that letter is given up and named, the others are sent."""
    broker.cli("SET", "odd.dead", "no list")
    with worker(broker, queues="work,odd") as live:
        (refused,) = send(broker, ("dead.nobody_knows", {"queue": "odd"}))
        kept = send(broker, *[("dead.nobody_knows", {})] * 3)
        wait_until(lambda: set(kept) <= set(entries(broker)), 30, "the others")
        wait_until(lambda: f"dead letter of task {refused} is lost" in live.log.read_text(), 30, "the refused one")
        assert counts(broker) | {"pid": 0} == {"pid": 0, "caught": 4, "sent": 3, "waiting": 0, "lost": 1}


def test_what_cannot_be_read_is_kept_as_it_came(broker: RedisServer) -> None:
    """Celery acknowledges a body that it must not decode, and forgets it."""
    body = base64.b64encode(b"\x80\x04N.").decode()
    message = {
        "body": body, "content-type": "application/x-python-serialize", "content-encoding": "binary", "headers": {},
        "properties": {"delivery_info": {"exchange": "", "routing_key": "work"}, "delivery_tag": "t",
                       "body_encoding": "base64"},
    }  # fmt: skip
    client = redis.Redis(port=broker.port)
    with worker(broker):
        client.lpush("work", json.dumps(message))
        wait_until(lambda: client.llen("work.dead") == 1, 20, "the dead letter")
    document = json.loads(client.lindex("work.dead", 0))
    assert (document["body"], document["content-type"]) == (body, "application/x-python-serialize")
    assert document["headers"]["celeryops_dead"]["reason"] == "rejected"
    letters = DeadLetters(client)
    assert letters.look("work.dead", DeadSelection())["undecodable"] == 1
    done = letters.requeue("work.dead", DeadSelection())
    assert (done.count, done.undecodable, client.llen("work.dead"), client.llen("work")) == (0, 1, 1, 0)


def test_a_storm_of_failures_and_the_cap(broker: RedisServer) -> None:
    with worker(broker, CELERYOPS_DEAD_LETTER_MAX="500"):
        ids = send(broker, *[("dead.nobody_knows", {})] * 2000)
        wait_until(lambda: counts(broker).get("sent") == 2000, 60, "all of them", interval=0.5)
        assert counts(broker)["lost"] == 0
    assert set(entries(broker)) == set(ids[-500:]), "the newest are kept"
    assert broker.cli("HGET", "celeryops:dead:counters", "captured:work.dead") == "2000"
    assert DeadLetters(redis.Redis(port=broker.port)).dropped() == {"work.dead": 1500}


def test_five_causes_on_rabbitmq() -> None:
    with RabbitServer() as server, worker(server) as live:
        kept = send(server, *CAUSES.values())
        gone = send(server, *HARMLESS)
        wait_until(lambda: live.log.read_text().count("succeeded in") >= 2, 40, "the tasks that end well")
        with kombu.Connection(server.url()) as connection, connection.channel() as channel:
            found: dict[str, Any] = {}

            def look() -> bool:
                while (message := channel.basic_get("work.dead", no_ack=True)) is not None:
                    found[message.headers["id"]] = message
                return len(found) >= 5

            wait_until(lambda: "dead.nobody_knows" in live.log.read_text(), 20)
            wait_until(lambda: live.log.read_text().count("Task handler raised error") >= 2, 40)
            time.sleep(1)
            wait_until(look, 30, "five dead letters")
    assert set(found) == set(kept) and not set(gone) & set(found)
    records = [found[identity].headers["celeryops_dead"] for identity in kept]
    assert [record["reason"] for record in records] == list(CAUSES)
    assert found[kept[0]].properties["priority"] == 6 and found[kept[0]].properties["delivery_mode"] == 2


def parked(client: Any, url: str, count: int) -> None:
    """Dead letters of a task that would succeed, as a worker leaves them; id-N for each."""
    app = celery.Celery("sender", broker=url, set_as_current=False)
    app.send_task("dead.once", queue="work", priority=6)
    app.close()
    document = json.loads(client.rpop("work\x06\x166"))
    message = SimpleNamespace(
        body=base64.b64decode(document["body"]), content_type="application/json", content_encoding="utf-8",
        headers=document["headers"], properties=document["properties"],
    )  # fmt: skip
    record = Record(time.time(), "exception", "OSError", "away", "Traceback", "n@h", "work", "", "work", 6, None)
    entry, identity = Letter.of(message, record, "").compose(), document["headers"]["id"].encode()
    for start in range(0, count, 1000):
        numbers = range(start, min(start + 1000, count))
        client.lpush("work.dead", *(entry.replace(identity, b"id-%d" % number) for number in numbers))


def in_a_fork(work: Callable[[], Any], kill_after: float | None = None) -> bool:
    """Whether it was killed before its end."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, -signal.SIGKILL)
    return code != 0


def test_ten_thousand_requeued_with_five_kills_run_once(broker: RedisServer) -> None:
    client = redis.Redis(port=broker.port)
    parked(client, broker.url(), 10_000)
    chance = random.Random()

    def slowly() -> None:
        DeadLetters(redis.Redis(port=broker.port)).requeue("work.dead", DeadSelection(), rate=3000)

    with worker(broker, "threads"):
        for _kill in range(5):
            assert in_a_fork(slowly, chance.uniform(0.1, 0.6)), "it was killed while it worked"
        left = client.llen("work.dead")
        letters = DeadLetters(client)
        pending = letters.interrupted("work.dead")
        assert left + (pending or {"messages": 0})["messages"] > 0, "the kills came before the end"
        done = letters.requeue("work.dead", DeadSelection())
        assert done.count > 0 and letters.interrupted("work.dead") is None
        wait_until(lambda: client.hlen("runs") == 10_000, 60, "ten thousand runs")
        wait_until(lambda: client.hlen("unacked") == 0, 20, "the last one's end")
    assert set(client.hvals("runs")) == {b"1"}, "none ran twice"
    assert client.keys("celeryops:queue:*") == [] and client.exists("work", "work.dead") == 0


def test_killed_before_each_step(broker: RedisServer) -> None:
    """With a filter, so that every kind of step is there."""
    client = redis.Redis(port=broker.port)
    chosen = DeadSelection(ids=frozenset(f"id-{number}" for number in range(0, 60, 2)))
    for point in range(100):
        client.flushall()
        parked(client, broker.url(), 60)
        client.lpush("work.dead", "garbage")

        def requeue(left: int = point) -> None:
            letters = DeadLetters(redis.Redis(port=broker.port), batch_size=10)
            real = letters._run

            def tick(*args: Any, **kwargs: Any) -> Any:
                nonlocal left
                left -= 1
                if left < 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*args, **kwargs)

            letters._run = tick  # type: ignore[method-assign]
            letters.requeue("work.dead", chosen)

        killed = in_a_fork(requeue)
        if killed:
            DeadLetters(client).requeue("work.dead", chosen)
        live = sorted(json.loads(raw)["headers"]["id"] for raw in client.lrange("work\x06\x166", 0, -1))
        stay = [raw for raw in client.lrange("work.dead", 0, -1) if raw != b"garbage"]
        assert live == sorted(chosen.ids), f"killed before step {point}"
        assert sorted(json.loads(raw)["headers"]["id"] for raw in stay) == sorted(f"id-{n}" for n in range(1, 60, 2))
        assert client.llen("work.dead") == 31 and client.keys("celeryops:queue:*") == []
        if not killed:
            break
    assert not killed and point > 6


def test_requeue_on_rabbitmq_with_five_kills() -> None:
    """Each batch is a transaction, so that a kill neither loses nor doubles."""
    with RabbitServer() as server:
        url, count = server.url(), 2000
        record = Record(time.time(), "exception", "OSError", "away", "Traceback", "n@h", "work", "", "work", 6, None)
        with (
            kombu.Connection(url, transport_options={"confirm_publish": True}) as connection,
            kombu.Connection(url) as other,
        ):
            channel = connection.channel()
            channel.queue_declare("work", durable=True, auto_delete=False)
            for number in range(count):
                headers = {"task": "dead.once" if number % 2 else "dead.other", "id": f"id-{number}", "retries": 2,
                           "expires": "2020-01-01T00:00:00", "x-death": [{"time": datetime(2020, 1, 1)}]}  # fmt: skip
                message = SimpleNamespace(body=b"[[], {}, {}]", headers=headers, properties={"priority": 6},
                                          content_type="application/json", content_encoding="utf-8")  # fmt: skip
                assert deliver(connection, [Letter.of(message, record, "")], 10_000, 3600) == [None]
            channel.basic_publish(amqp.Message("garbage"), routing_key="work.dead")

            def slowly() -> None:
                with kombu.Connection(url) as own:
                    AmqpDeadLetters(own).requeue("work.dead", DeadSelection(), rate=400)

            for _kill in range(5):
                assert in_a_fork(slowly, random.uniform(0.2, 0.5)), "it was killed while it worked"
            letters = AmqpDeadLetters(other)
            wait_until(lambda: (letters.depth("work.dead") or 0) + (letters.depth("work") or 0) == count + 1, 10)
            assert (letters.depth("work.dead") or 0) > 1, "the kills came before the end"
            some = letters.requeue("work.dead", DeadSelection(tasks=("dead.once",), exceptions=("OSError",)))
            wait_until(lambda: letters.depth("work.dead") == count + 1 - (letters.depth("work") or 0), 10)
            left = letters.look("work.dead", DeadSelection(), show=1)
            assert some.undecodable == left["undecodable"] == 1 and set(left["tasks"]) == {"dead.other"}
            assert left["entries"][0]["exception"] == "OSError"
            rest = letters.requeue("work.dead", DeadSelection())
            assert rest.count == left["matched"] and letters.look("work.dead", DeadSelection())["matched"] == 0
            found = []
            while (message := channel.basic_get("work", no_ack=True)) is not None:
                found.append(message.headers["id"])
                assert (message.headers["retries"], message.headers["expires"]) == (0, None)
                assert "celeryops_dead" not in message.headers and message.properties["priority"] == 6
                assert message.headers["x-death"][0]["time"] == datetime(2020, 1, 1)
        assert sorted(found) == sorted(f"id-{number}" for number in range(count))
