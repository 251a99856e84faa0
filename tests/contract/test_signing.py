# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Signed tasks: real workers of the Celery this environment holds run what an authorised sender signed, and no more."""

from __future__ import annotations

import base64
import contextlib
import itertools
import json
import os
import re
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

from celeryops.engine import signing, tasks
from celeryops.engine.connection import Broker, BrokerSpec
from celeryops.engine.control import Control
from celeryops.engine.message import Envelope
from celeryops.engine.queues import RedisQueues
from support import TESTS, Beat, RedisServer, Worker, wait_until, workers

RUNTIME = ("--include", "celeryops.worker")
HEAD = "import json, celeryops.signing\nfrom labsigned import *"
OLD, NEW = ({"id": name, "secret": f"{name}-" + "s" * 40} for name in ("old", "new"))


class KeyFile:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.hold(OLD)

    def hold(self, *keys: dict[str, str], require: bool = True) -> None:
        fresh = self.path.with_suffix(".new")
        fresh.touch(mode=0o600)
        fresh.write_text(signing.check(keys, require, "test").dump())
        fresh.replace(self.path)

    @property
    def environment(self) -> dict[str, str]:
        return {signing.VARIABLE: str(self.path)}


@pytest.fixture
def keys(tmp_path: Path) -> KeyFile:
    return KeyFile(tmp_path / "signing.json")


class Lab:
    def __init__(self, server: RedisServer, keys: KeyFile, queue: str) -> None:
        self.server, self.keys, self.queue = server, keys, queue
        self.client = redis.Redis(port=server.port)

    def worker(self, name: str = "signed", **options: Any) -> Worker:
        return Worker(
            self.server.url(), f"{name}@sign", app="labsigned", arguments=RUNTIME,
            # They accept pickle.
            environment={**self.keys.environment, "C_FORCE_ROOT": "1"}, **{"queues": self.queue, **options},
        )  # fmt: skip

    def sender(self, code: str, *, signed: bool = True, **environment: str) -> Any:
        """The value of `answer` after this code, in a process of its own that signs or does not."""
        known = self.keys.environment if signed else {}
        done = subprocess.run(
            [sys.executable, "-c", f"{HEAD}\n{code}\nprint(json.dumps(answer))"],
            cwd=TESTS, capture_output=True, text=True, check=False,
            env={**os.environ, "CELERY_BROKER_URL": self.server.url(), "CELERY_RESULT_BACKEND": self.server.url(),
                 "LABSIGNED_QUEUE": self.queue, **known, **environment},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def send(self, *, signed: bool = True, count: int = 1) -> list[str]:
        return list(self.sender(f"answer = [mark.delay(n).id for n in range({count})]", signed=signed))

    def taken(self) -> dict[str, Any]:
        """The only message that waits, taken away."""
        raw = self.client.rpop(self.queue)
        assert raw is not None and not self.client.llen(self.queue)
        return dict(json.loads(raw))

    def put(self, message: dict[str, Any], queue: str) -> None:
        message["properties"]["delivery_tag"] = str(uuid.uuid4())
        self.client.lpush(queue, json.dumps(message))

    def done(self) -> list[str]:
        """Ids of the tasks that ran, each as often as it did."""
        return [item.decode() for item in self.client.lrange("lab:marks", 0, -1)]

    def says(self) -> dict[str, Any]:
        with Broker(BrokerSpec.build(url=self.server.url())) as broker, Control(broker, timeout=10) as control:
            return {r.node: r.error or r.value for r in control.broadcast(signing.COMMAND).replies}


@pytest.fixture
def lab(broker: RedisServer, keys: KeyFile) -> Iterator[Lab]:
    made = Lab(broker, keys, f"signed-{uuid.uuid4().hex[:6]}")
    with contextlib.closing(made.client):
        made.client.delete("lab:marks", "lab:rejected")
        os.environ["LABSIGNED_QUEUE"] = made.queue
        yield made
        del os.environ["LABSIGNED_QUEUE"]


def forged(lab: Lab) -> dict[str, dict[str, Any]]:
    """reason -> message that no authorised sender signed."""

    def signed() -> dict[str, Any]:
        lab.send()
        return lab.taken()

    found: dict[str, dict[str, Any]] = {}
    lab.send(signed=False)
    found["it is not signed"] = lab.taken()
    body = signed()
    _args, kwargs, embed = json.loads(base64.b64decode(body["body"]))
    body["body"] = base64.b64encode(json.dumps([[666], kwargs, embed]).encode()).decode()
    task = signed()
    task["headers"]["task"] = "lab.danger"
    again = signed()
    again["headers"]["id"] = again["properties"]["correlation_id"] = str(uuid.uuid4())
    early = signed()
    early["headers"]["eta"] = "2020-01-01T00:00:00+00:00"
    content = signed()
    content["content-type"] = "application/x-python-serialize"
    wrong = signed()
    version, key, _digest = wrong["headers"][signing.HEADER].split(":")
    wrong["headers"][signing.HEADER] = f"{version}:{key}:{'0' * 64}"
    for name, message in {"body": body, "task": task, "id": again, "eta": early, "type": content, "mac": wrong}.items():
        found[f"{name}: does not fit"] = message
    other = signed()
    other["headers"][signing.HEADER] = "1:nobody:" + "0" * 64
    found["it is signed with key nobody, which is not accepted here"] = other
    odd = signed()
    odd["headers"][signing.HEADER] = {"un": "expected"}
    found["its signature is of no known form"] = odd
    return found


def test_only_what_was_signed_is_run(lab: Lab) -> None:
    bad = forged(lab)
    pools = ("prefork", "solo", "threads", "gevent", "eventlet")
    with workers(*(lab.worker(pool, pool=pool, queues=f"{lab.queue}-{pool}") for pool in pools)) as fleet:
        for pool in pools:
            for message in bad.values():
                lab.put(message, f"{lab.queue}-{pool}")
        good = [lab.sender(f"answer = [mark.apply_async((n,), queue={f'{lab.queue}-{pool}'!r}).id for n in range(20)]")
                for pool in pools]  # fmt: skip
        wait_until(lambda: len(lab.done()) == 20 * len(pools), 20, "the signed tasks")
        told = lab.says()
        logs = [worker.log.read_text() for worker in fleet]
    assert sorted(lab.done()) == sorted(itertools.chain(*good)), "no forged task ran, no signed one was lost"
    assert {(item["refused"], item["require"], *item["accepts"]) for item in told.values()} == {(len(bad), True, "old")}
    for log, (reason, message) in itertools.product(logs, bad.items()):
        line = next(line for line in log.splitlines() if f"[{message['headers']['id']}] is refused" in line)
        assert reason.rpartition(": ")[2] in line
    assert not lab.client.hlen("unacked"), "what was refused is not held"
    # The signal by which Celery tells what it rejects carries message and reason: they become a dead letter.
    signals = [item.decode() for item in lab.client.lrange("lab:rejected", 0, -1)]
    assert len(signals) == len(bad) * len(pools) and all(" SignatureRefused: it" in text for text in signals)


def test_whatever_a_worker_sends_is_signed(lab: Lab, tmp_path: Path) -> None:
    """Retries, chords, chains, callbacks, groups, ETA and countdown, compression, protocol 1, pickle, beat."""
    code = """
from celery import chain, chord, group
calls = [
    again.delay(),
    chord([add.s(1, 1), add.s(2, 2)])(total.s()),
    chain(add.s(1, 2), add.s(3), again_with.s())(),
    add.apply_async((1, 1), countdown=1),
    add.apply_async((2, 2), link=total_of_one.s()),
    add.apply_async((3, 3), compression="zlib"),
    add.apply_async((4, 4), serializer="pickle"),
    add.apply_async((5, 5), expires=60, time_limit=30, soft_time_limit=20, priority=3, headers={"own": {"b": 1}}),
    app.send_task("lab.add", ("ü" * 3, "\\u2028"), shadow="other"),
    group(add.s(n, n) for n in range(5))(),
]
answer = [call.get(timeout=30) for call in calls]
app.conf.task_protocol = 1
answer.append(add.delay(6, 6).get(timeout=30))
"""
    with workers(lab.worker("one"), lab.worker("two", pool="threads")) as fleet:
        answer = lab.sender(code)
        assert answer == [2, 6, 7, 2, 4, 6, 8, 10, "üüü\u2028", [0, 2, 4, 6, 8], 12]
        beat = Beat(lab.server.url(), "beat", tmp_path / "schedule", app="labsigned")
        beat.environment.update(lab.keys.environment)
        beat.command = [
            sys.executable, "-c",
            "import celeryops.signing, sys; from celery.__main__ import main; sys.argv.pop(0); sys.exit(main())",
            "celery", "-A", "labsigned", "beat", "--schedule", str(tmp_path / "schedule"), "--loglevel", "INFO",
        ]  # fmt: skip
        with beat:
            wait_until(lambda: len(lab.done()) >= 2, 20, "two tasks of beat")
        # A module of this collection, and its canaries, with the keys of the environment file.
        spec = BrokerSpec.build(url=lab.server.url(), environment=lab.keys.environment)
        with Broker(spec) as broker:
            before = len(lab.done())
            tasks.send(broker, tasks.Order("lab.mark", lab.queue, args=[1]))
            wait_until(lambda: len(lab.done()) > before, 10, "the module's task")
            proof = tasks.prove(broker, {lab.queue: ["one@sign", "two@sign"]}, tasks.Canary(), 20)
            assert {item["node"] for item in proof.answers} == {"one@sign", "two@sign"}
        assert {told["refused"] for told in lab.says().values()} == {0}
        assert all("is refused" not in worker.log.read_text() for worker in fleet)


def test_keys_change_while_workers_run(lab: Lab) -> None:
    """Accept, sign, drop: nothing lost, nothing refused; and what the dropped key signed is refused."""
    sent: list[str] = []
    with workers(lab.worker("one"), lab.worker("two")) as fleet:
        wait_until(lambda: len(lab.says()) == 2, 10, "both answer")
        pids = {node: told["pid"] for node, told in lab.says().items()}
        for held in ((OLD,), (OLD, NEW), (NEW, OLD), (NEW,)):
            lab.keys.hold(*held)
            sent += lab.send(count=150)
            if held == (NEW, OLD):
                wait_until(lambda: len(lab.done()) == 450, 30, "what the old key signed")
        wait_until(lambda: len(lab.done()) == 600, 30, "all tasks")
        assert sorted(lab.done()) == sorted(sent)
        told = lab.says()
        assert {node: item["pid"] for node, item in told.items()} == pids, "no worker was restarted"
        assert {(item["refused"], *item["accepts"]) for item in told.values()} == {(0, "new")}
        # A broken file changes nothing and is told.
        lab.keys.path.write_text("{}")
        assert all("holds no signing keys" in item["problem"] for item in lab.says().values())
        lab.keys.hold(OLD)
        late = lab.send()
        lab.keys.hold(NEW, require=True)
        wait_until(lambda: late[0] in lab.done(), 10, "a task of the moment before")
        lab.client.delete("lab:marks")
        for worker in fleet:
            worker.freeze()
        lab.keys.hold(OLD)
        gone = lab.send()
        lab.keys.hold(NEW)
        time.sleep(1.1)  # for a second what was read last counts
        for worker in fleet:
            worker.thaw()
        line = f"[{gone[0]}] is refused"
        wait_until(lambda: any(line in worker.log.read_text() for worker in fleet), 20, "the refusal")
        assert lab.done() == []
        # What is unsigned runs until it is told to be refused.
        lab.keys.hold(NEW, require=False)
        (early,) = lab.send(signed=False)
        wait_until(lambda: lab.done() == [early], 10, "the unsigned task")
        assert sum(item["passed"] for item in lab.says().values()) == 1
        lab.keys.hold(NEW)
        lab.says()  # makes them look
        lab.send(signed=False)
        wait_until(lambda: sum(item["refused"] for item in lab.says().values()) == 2, 10, "its refusal")
        assert lab.done() == [early]


def test_census_knows_the_signer(lab: Lab) -> None:
    lab.send(count=2)
    lab.send(signed=False)
    lab.keys.hold(NEW)
    lab.sender("answer = [add.apply_async((1, 1), priority=6).id]")
    with Broker(BrokerSpec.build(url=lab.server.url())) as broker:
        live, dead = signing.census(RedisQueues.of(broker))
    counts = {key: found.get(lab.queue) for key, found in live.items()}
    assert counts == {"old": 2, "unsigned": 1, "new": 1} and dead == {}
    raw = lab.client.lindex(lab.queue, -1)
    assert Envelope.parse(raw).task == "lab.mark", "the rest of the collection reads signed messages as others"
    lab.client.delete(lab.queue, f"{lab.queue}\x06\x166")


def test_without_proper_keys_nothing_starts(lab: Lab, tmp_path: Path) -> None:
    short = json.dumps({"require": True, "keys": [{"id": "old", "secret": "s" * 31}]})
    cases = {
        "missing": ("", 0, "cannot be read: No such file"),
        "open": (lab.keys.path.read_text(), 0o644, "others may read it (mode 0644)"),
        "short": (short, 0o600, "the secret of key old is missing or shorter than 32 characters"),
        "text": ("secret", 0o600, "holds no signing keys"),
        "empty": (json.dumps({"require": True, "keys": []}), 0o600, "there is no key"),
    }
    started: dict[str, Worker] = {}
    try:
        for name, (text, mode, _reason) in cases.items():
            path = tmp_path / f"{name}.json"
            if mode:
                path.write_text(text)
                path.chmod(mode)
            started[name] = lab.worker(name)
            started[name].environment[signing.VARIABLE] = str(path)
            started[name].spawn()
        for name, worker in started.items():
            assert worker.process is not None and worker.process.wait(30) != 0, name
    finally:
        for worker in started.values():
            worker.kill()
    for name, (_text, _mode, reason) in cases.items():
        path, log = tmp_path / f"{name}.json", started[name].log.read_text()
        assert f"{signing.VARIABLE} {path}" in log and reason in log and "ssss" not in log, log
        environment = {signing.VARIABLE: str(path)}
        with (
            Broker(BrokerSpec.build(url=lab.server.url(), environment=environment)) as broker,
            pytest.raises(signing.SigningError, match=re.escape(reason)),
        ):
            tasks.send(broker, tasks.Order("lab.mark", lab.queue))
