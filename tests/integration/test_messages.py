# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Nothing is lost: purge and restore beside working workers, a full disk, a killed purge, and workers killed at random.

MESSAGES=100000 in the environment makes the rescue test as large as the one that docs/queues.md reports.
"""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support import TESTS, Ansible, RedisServer, Worker, celery_venv, send_task, wait_until, workers

pytestmark = pytest.mark.ansible

RUNTIME = ("--include", "celeryops.worker")
STEP = "\x06\x16"
# Celery makes one message of each task and priority; the others differ from it in their ids only.
FILL = """
import json, sys, uuid, redis
from labapp import app
url, queue, count, names, prefix = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4].split(","), sys.argv[5]
client = redis.Redis.from_url(url)
models = []
for number in range(12):
    name, priority = names[number % len(names)], (0, 0, 3, 6)[number % 4]
    args = (0.0,) if name == "lab.sleep" else (1, 1) if name == "lab.add" else ()
    app.send_task(name, args, queue="models", priority=priority, task_id="MODEL-ID")
    key = "models" + (f"\\x06\\x16{priority}" if priority else "")
    raw = client.rpop(key).decode().replace('"routing_key": "models"', json.dumps({"routing_key": queue})[1:-1])
    models.append((priority, raw, json.loads(raw)["properties"]["delivery_tag"]))
pipe = client.pipeline(transaction=False)
for number in range(count):
    priority, raw, tag = models[number % 12]
    raw = raw.replace("MODEL-ID", f"{prefix}{number:06d}").replace(tag, str(uuid.uuid4()))
    pipe.lpush(queue + (f"\\x06\\x16{priority}" if priority else ""), raw)
    if number % 1000 == 999:
        pipe.execute()
pipe.execute()
client.srem("_kombu.binding.models", "models\\x06\\x16\\x06\\x16models")
"""
PURGE = """
import sys, redis
from celeryops.engine.queues import RedisQueues
RedisQueues(redis.Redis.from_url(sys.argv[1])).purge(sys.argv[2], sys.argv[3], compress_level=1)
"""


def python(code: str, *arguments: str) -> list[str]:
    return [str(celery_venv() / "bin" / "python"), "-c", code, *arguments]


def environment(server: RedisServer) -> dict[str, str]:
    return {**os.environ, "CELERY_BROKER_URL": server.url(), "CELERY_RESULT_BACKEND": server.url(1)}


def fill(server: RedisServer, queue: str, count: int, *names: str, prefix: str = "task-") -> set[str]:
    subprocess.run(
        python(FILL, server.url(), queue, str(count), ",".join(names), prefix),
        cwd=TESTS, check=True, env=environment(server),
    )  # fmt: skip
    return {f"{prefix}{number:06d}" for number in range(count)}


def worker(server: RedisServer, name: str, **options: Any) -> Worker:
    options.setdefault("arguments", (*RUNTIME, "--prefetch-multiplier", "5"))
    own = {"CELERY_RESULT_BACKEND": server.url(1), "LABAPP_NOTES_URL": server.url(2)}
    return Worker(server.url(), name, environment={**own, **options.pop("environment", {})}, **options)


def notes(server: RedisServer, phase: str) -> list[str]:
    return server.cli("LRANGE", f"lab:{phase}", "0", "-1", db=2).split()


def depth(server: RedisServer, queue: str) -> int:
    return sum(int(server.cli("LLEN", f"{queue}{suffix}")) for suffix in ("", f"{STEP}3", f"{STEP}6", f"{STEP}9"))


def unacked(server: RedisServer) -> int:
    return int(server.cli("HLEN", "unacked"))


def act(**options: Any) -> dict[str, Any]:
    return {"celeryops.runbook.redis_queue": options}


def info(**options: Any) -> dict[str, Any]:
    return {"celeryops.runbook.redis_queue_info": options}


@pytest.fixture
def defaults(broker: RedisServer, tmp_path: Path) -> Iterator[dict[str, Any]]:
    secret = tmp_path / "secret.env"
    secret.write_text(f"CELERY_BROKER_URL={broker.url()}\nCELERY_RESULT_BACKEND={broker.url(1)}\n")
    yield {"environment_file": str(secret), "virtualenv": str(celery_venv())}
    for db in ("1", "2"):
        broker.cli("FLUSHDB", db=int(db))


def saved_ids(path: Path) -> list[str]:
    raw = subprocess.run(["gzip", "-dc", str(path)], capture_output=True, check=True).stdout
    return [json.loads(line)["headers"]["id"] for line in raw.splitlines() if line.startswith(b'{"body"')]


def test_purge_and_restore_add_up_beside_workers(
    ansible: Ansible, broker: RedisServer, defaults: dict[str, Any], tmp_path: Path
) -> None:
    count = 100_000
    sent = fill(broker, "orders", count, "lab.noted", "lab.sleep", "lab.add")
    path = tmp_path / "orders.queue.gz"
    purge = act(queue="orders", state="purged", confirm="orders", path=str(path), compress_level=1)

    # A disk that is full before the file is complete: everything is where it was.
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4_000_000, limits[1]))
    try:
        (full,) = ansible.play([purge | {"vars": {}}], defaults=defaults)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert full["failed"] and full["category"] == "save_failed" and "are back in orders" in full["msg"]
    assert depth(broker, "orders") == count and not list(tmp_path.glob("orders.queue*"))

    # A purge that is killed in mid-save: the next one puts the messages back and begins anew.
    with subprocess.Popen(python(PURGE, broker.url(), "orders", str(path))) as killed:
        wait_until(lambda: any(file.stat().st_size > 500_000 for file in tmp_path.glob("*.partial")), 30, "the file")
        killed.kill()
    assert not path.exists() and depth(broker, "orders") < count

    fleet = [worker(broker, f"purge-{number}@lab", queues="orders", concurrency=1) for number in range(4)]
    with workers(*fleet):
        planned = ansible.play([purge], defaults=defaults, check=True)[0]
        assert planned["recovered"]["action"] == "pending"
        purged = ansible.play([purge], defaults=defaults)[0]
        assert purged["recovered"]["action"] == "put_back" and purged["count"] > 0.9 * count
        wait_until(lambda: depth(broker, "orders") == 0 and unacked(broker) == 0, 60, "what was not purged")
        saved = set(saved_ids(path))
        assert len(saved) == purged["count"]
        done = finished(broker)
        assert len(done) == len(set(done)) and not saved & set(done)
        assert saved | set(done) == sent, "done and purged are all that was sent"

        # Back in parts, each message once, whatever is asked for twice.
        some = sorted(saved)[:1500]
        back = act(queue="orders", state="imported", path=str(path), filter={"ids": some})
        first, again = ansible.play([back, back], defaults=defaults)
        assert (first["count"], again["count"], again["changed"]) == (1500, 0, False)
        wait_until(lambda: depth(broker, "orders") == 0 and unacked(broker) == 0, 60, "what was restored")
    done = finished(broker)
    assert len(done) == len(set(done)) == count - len(saved) + 1500
    whole = act(queue="orders", state="imported", path=str(path))
    forecast = ansible.play([whole], defaults=defaults, check=True)[0]
    rest, twice = ansible.play([whole, whole], defaults=defaults)
    assert forecast["count"] == rest["count"] == len(saved) - 1500 == depth(broker, "orders")
    assert not twice["changed"] and twice["already_imported"]


def finished(server: RedisServer) -> list[str]:
    """Tasks that have a result; noted ones note every end, so that a second one shows."""
    prefix = "celery-task-meta-"
    results = {key.removeprefix(prefix) for key in server.keys(1) if key.startswith(prefix)}
    ends = notes(server, "done")
    return [*(results - set(ends)), *ends]


def test_workers_killed_at_random_and_rescued(
    ansible: Ansible, broker: RedisServer, defaults: dict[str, Any], tmp_path: Path
) -> None:
    count = int(os.environ.get("MESSAGES", "20000"))
    sent = fill(broker, "late", count, "lab.noted")
    ledger = tmp_path / "sent"
    ledger.write_text("\n".join(sorted(sent)))
    draw = random.Random(20261121)
    rescued: list[str] = []
    fleet = [worker(broker, f"late-{number}@lab", queues="late", concurrency=1) for number in range(3)]
    with workers(*fleet):
        for _kill in range(10):
            time.sleep(draw.uniform(0.1, 0.6))
            assert depth(broker, "late") > 0, "killed while there is work"
            victim = draw.choice([one for one in fleet if " ready." in one.log.read_text()])
            victim.kill()
            while True:
                (result,) = ansible.play([act(state="rescued")], defaults=defaults)
                rescued += result["ids"]
                if not result["unknown"]:
                    break
            victim.spawn()
        for one in fleet:
            one.wait_ready()
        killed = time.monotonic()
        left = depth(broker, "late")
        wait_until(
            lambda: depth(broker, "late") == 0 and unacked(broker) == 0, 10 + count / 100, "the queue is drained"
        )
        drained = time.monotonic() - killed
        (account,) = ansible.play([info(queues=[], sent=str(ledger))], defaults=defaults)
    done, begun = Counter(notes(broker, "done")), Counter(notes(broker, "begun"))
    lost = sent - set(done)
    twice = sum(number > 1 for number in begun.values())
    print(f"{count} tasks, 10 kills: {len(rescued)} rescued, {twice} begun twice, {len(lost)} lost {sorted(lost)}")
    print(f"the {left} that were left were done {drained:.1f} s after the last worker had started")
    assert rescued and len(lost) <= 10
    assert set(account["lost"]) == lost, "each lost task is named by its id"
    assert {identity for identity, number in begun.items() if number > 1} <= set(rescued)
    assert not lost & set(begun), "what had begun was in unacked, and so rescued"
    assert unacked(broker) == 0


def test_only_what_the_dead_held_goes_back_in_its_place(
    ansible: Ansible, broker: RedisServer, defaults: dict[str, Any]
) -> None:
    """A live worker holds a running task, one with an ETA, and some that its rate limit holds back unseen."""
    url = broker.url()
    alive = worker(broker, "alive@lab", queues="alive", concurrency=1)
    dead = worker(broker, "dead@lab", queues="dead", concurrency=1)
    with workers(alive, dead):
        kept = [
            send_task(url, "lab.late", 300, queue="alive"),
            *(send_task(url, "lab.limited", queue="alive") for _number in range(2)),
        ]
        # One keeps the dead one busy, the others are fetched behind it: five in its hands.
        long = send_task(url, "lab.late", 300, queue="dead")
        wait_until(lambda: depth(broker, "dead") == 0, 20, "the long one runs")
        ids = fill(broker, "dead", 12, "lab.noted", prefix="dead-")
        wait_until(lambda: depth(broker, "dead") == 8, 20, "four more are held")
        dead.freeze()
        later = "import labapp; labapp.late.apply_async((0,), queue='alive', task_id='eta', countdown=3600)"
        subprocess.run(python(later), cwd=TESTS, check=True, env=environment(broker))
        wait_until(lambda: depth(broker, "alive") == 0, 20, "the live one holds all of its own")
        rescue = act(state="rescued")
        (silent,) = ansible.play([rescue], defaults=defaults)
        assert silent["nodes"]["silent"] == 1 and silent["nodes"]["suspects"] == ["dead@lab"]
        assert (silent["count"], silent["changed"]) == (0, False)
        wrong, typo, planned = ansible.play(
            [act(state="rescued", dead=["alive@lab"]), act(state="rescued", dead=["typo@lab"]), rescue],
            defaults=defaults,
            check=True,
        )  # fmt: skip
        assert "alive@lab answers" in wrong["msg"] and "no node typo@lab" in typo["msg"]
        assert planned["unknown"] == silent["unknown"] == 5
        planned = ansible.play([act(state="rescued", dead=["dead@lab"])], defaults=defaults, check=True)[0]
        assert (planned["count"], planned["unknown"]) == (5, 0)
        dead.kill()
        result, again = ansible.play([rescue, rescue], defaults=defaults)
        assert (result["count"], result["queues"]) == (5, {"dead": 5}) and long in result["ids"]
        assert set(result["ids"]) < ids | {long} and result["tasks"] == {"lab.noted": 4, "lab.late": 1}
        assert (again["count"], again["changed"]) == (0, False)
        assert result["held"] == again["held"] == unacked(broker) == len(kept) + 1
        order = [json.loads(line) for line in broker.cli("LRANGE", "dead", "0", "-1").splitlines()]
        assert order[-1]["headers"]["id"] == long, "fetched first, consumed first"
        for suffix, priority in (("", 0), (f"{STEP}3", 3), (f"{STEP}6", 6)):
            lines = [json.loads(line) for line in broker.cli("LRANGE", f"dead{suffix}", "0", "-1").splitlines() if line]
            assert lines and all(line["properties"]["priority"] == priority for line in lines if line is not order[-1])
            noted = [line["headers"]["id"] for line in lines if line["headers"]["id"] != long]
            assert noted == sorted(noted, reverse=True), "as it was"
            assert all(line["headers"]["redelivered"] for line in lines if line["headers"]["id"] in result["ids"])
        drop = act(queue="dead", state="dropped", confirm="dead", save=False, filter={"ids": [long]})
        assert ansible.play([drop], defaults=defaults)[0]["count"] == 1
        with worker(broker, "heir@lab", queues="dead", concurrency=1):
            wait_until(lambda: set(notes(broker, "done")) == ids, 30, "the heir has done what the dead one held")
        alive.kill()
        assert Counter(notes(broker, "done")) == Counter(ids)


def test_a_worker_that_stops_is_not_taken_for_dead(
    ansible: Ansible, broker: RedisServer, defaults: dict[str, Any]
) -> None:
    with worker(broker, "leaving@lab", queues="late", concurrency=1) as leaving:
        task = send_task(broker.url(), "lab.late", 6, queue="late")
        wait_until(lambda: unacked(broker) == 1, 10, "the task runs")
        time.sleep(0.5)
        leaving.signal(signal.SIGTERM)
        time.sleep(1.5)
        (result,) = ansible.play([act(state="rescued")], defaults=defaults)
        assert unacked(broker) == 1, "it still runs"
        assert (result["count"], result["unknown"], result["nodes"]["stopping"]) == (0, 1, ["leaving@lab"])
        assert leaving.process is not None
        leaving.process.wait(20)
    assert unacked(broker) == 0 and depth(broker, "late") == 0
    assert f"celery-task-meta-{task}" in broker.keys(1)
    assert not broker.cli("ZRANGE", "celeryops:stopping", "0", "-1")


def test_workers_without_the_runtime(ansible: Ansible, broker: RedisServer, defaults: dict[str, Any]) -> None:
    """They show ids. What a rate limit may hold back unseen is left alone."""
    url = broker.url()
    plain = worker(broker, "plain@lab", queues="alive", concurrency=1, arguments=("--prefetch-multiplier", "5"))
    dead = worker(broker, "dead@lab", queues="dead", concurrency=1)
    with workers(plain, dead):
        for name, args, queue in (
            ("lab.late", [120], "alive"),
            ("lab.limited", [], "alive"),
            ("lab.limited", [], "alive"),
            ("lab.late", [30], "dead"),
            ("lab.late", [31], "dead"),
        ):
            send_task(url, name, *args, queue=queue)
        wait_until(lambda: depth(broker, "alive") + depth(broker, "dead") == 0, 20, "all are held")
        time.sleep(1)
        dead.kill()
        held = unacked(broker)
        some, rest = ansible.play(
            [act(state="rescued", queue="dead", filter={"tasks": ["lab.l*"], "args": [31]}), act(state="rescued")],
            defaults=defaults,
        )
        assert (some["count"], rest["count"]) == (1, 1) and rest["queues"] == {"dead": 1}
        assert rest["held"] + rest["unknown"] == held - 2 == unacked(broker) and rest["unknown"] <= 2


def test_move_by_arguments_and_age(ansible: Ansible, broker: RedisServer, defaults: dict[str, Any]) -> None:
    url = broker.url()
    for number in range(6):
        send_task(url, "lab.sleep", 0, queue="orders", secret="red" if number % 2 else "blue")
        send_task(url, "lab.add", number, 1, queue="orders")
    move = act(queue="orders", state="moved", to="aside", create=True, filter={"kwargs": {"secret": "red"}})
    planned = ansible.play([move], defaults=defaults, check=True)[0]
    moved, nothing, old, added = ansible.play(
        [
            move,
            act(queue="orders", state="moved", to="aside", filter={"kwargs": {"secret": "green"}}),
            act(queue="orders", state="moved", to="aside", filter={"tasks": ["lab.add"], "older_than": 0}),
            act(queue="orders", state="moved", to="aside", filter={"args": [4]}),
        ],
        defaults=defaults,
    )
    assert planned["count"] == moved["count"] == 3 and planned["ages"] == {"lab.sleep": {"unknown": 3}}
    assert (nothing["count"], nothing["changed"], old["count"], old["unknown_age"], added["count"]) == (
        0,
        False,
        0,
        6,
        1,
    )
    assert depth(broker, "aside") == 4


BAD: list[tuple[dict[str, Any], str]] = [
    ({"state": "rescued", "queue": ""}, "queue: is empty"),
    ({"state": "rescued", "queue": "typo"}, "there is no queue 'typo'"),
    ({"state": "rescued", "path": "/nowhere/x"}, "path: "),
    ({"state": "rescued", "timeout": 0}, "timeout: "),
    ({"state": "rescued", "filter": {"args": []}}, "filter.args: "),
    ({"state": "exported", "queue": "orders", "path": "/nowhere/x", "dead": ["a@b"]}, "dead: "),
    ({"state": "purged", "confirm": "orders", "path": "/nowhere/x"}, "queue: is empty"),
]


def test_bad_input(ansible: Ansible, broker: RedisServer, defaults: dict[str, Any], tmp_path: Path) -> None:
    fill(broker, "orders", 50, "lab.add")
    path, cut, edited = (tmp_path / name for name in ("good", "cut", "edited"))
    ansible.play([act(queue="orders", state="purged", confirm="orders", path=str(path))], defaults=defaults)
    raw = path.read_bytes()
    cut.write_bytes(raw[: len(raw) // 2])
    edited.write_bytes(raw.replace(b"task-000007", b"task-000008", 1))
    other = {"environment_file": defaults["environment_file"] + ".other"}
    Path(other["environment_file"]).write_text(f"CELERY_BROKER_URL={broker.url(5)}\n")
    state = {"queue": "orders", "state": "imported"}
    tasks = [act(**options) for options, _text in BAD]
    tasks += [act(**state, path=str(cut)), act(**state, path=str(edited))]
    tasks += [
        act(**state, path=str(path), create=True, **other),
        act(**state, path=str(path), key_prefix="app2:", create=True),
    ]
    tasks += [info(queues=[], sent=str(tmp_path / "nowhere"))]
    texts = [text for _options, text in BAD]
    texts += ["not complete", "checksum", "saved from db 0, not 5", "saved from key_prefix ''", "no file"]
    before = (broker.keys(), broker.keys(5))
    for check in (False, True):
        for result, text in zip(ansible.play(tasks, defaults=defaults, check=check), texts, strict=True):
            assert result.get("failed") and text in result["msg"], (text, result.get("msg"), result)
    assert (broker.keys(), broker.keys(5)) == before
