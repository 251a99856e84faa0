# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The modules redis_queue_info and redis_queue, run by Ansible on real messages and beside a real worker."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from support import TESTS, Ansible, RedisServer, Worker, celery_venv, wait_until

pytestmark = pytest.mark.ansible

SEND = """
import sys
from labapp import app
first, count, queue = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
with app.producer_pool.acquire() as producer:
    for number in range(first, first + count):
        task = app.tasks["lab.add" if number % 2 else "lab.sleep"]
        task.apply_async((number, 1) if number % 2 else (0.0,), queue=queue, task_id=f"task-{number:05d}",
                         priority=(0, 6)[number % 4 == 0], producer=producer,
                         headers={"celeryops_published": 1700000000.0 + number})
"""


def send(server: RedisServer, first: int, count: int, queue: str, db: int = 0) -> None:
    subprocess.run(
        [str(celery_venv() / "bin" / "python"), "-c", SEND, str(first), str(count), queue],
        cwd=TESTS,
        check=True,
        env={**os.environ, "CELERY_BROKER_URL": server.url(db), "CELERY_RESULT_BACKEND": server.url(db)},
    )


@pytest.fixture
def defaults(broker: RedisServer) -> dict[str, Any]:
    return {"broker_url": broker.url(), "virtualenv": str(celery_venv())}


def info(**options: Any) -> dict[str, Any]:
    return {"celeryops.runbook.redis_queue_info": options}


def act(**options: Any) -> dict[str, Any]:
    return {"celeryops.runbook.redis_queue": options}


def waiting(server: RedisServer, queue: str) -> list[str]:
    """Ids in the order of consumption."""
    found = []
    for key in (queue, f"{queue}\x06\x163", f"{queue}\x06\x166", f"{queue}\x06\x169"):
        lines = [line for line in server.cli("LRANGE", key, "0", "-1").splitlines() if line]
        found += [json.loads(line)["headers"]["id"] for line in reversed(lines)]
    return found


def test_info(ansible: Ansible, broker: RedisServer, defaults: dict[str, Any]) -> None:
    send(broker, 0, 20, "orders")
    broker.cli("LPUSH", "orders", "garbage")
    every, named, missing, peeked, nobody = ansible.play(
        [
            info(task_names=True, oldest=True, unacked=True, reply_keys=True),
            info(queues=["orders", "typo"]),
            info(queues=["orders", "typo"], fail_on_missing=True),
            info(queues=["orders"], peek={"queue": "orders", "count": 2, "task": "lab.s*", "include_arguments": True}),
            info(queues=[], peek={"queue": "typo"}),
        ],
        defaults=defaults,
    )
    orders = every["queues"]["orders"]
    assert orders["depth"] == every["total"] == 21 and orders["by_priority"] == {"0": 16, "3": 0, "6": 5, "9": 0}
    assert orders["tasks"] == {"lab.add": 10, "lab.sleep": 10} and orders["undecodable"] == every["undecodable"] == 1
    assert orders["oldest"]["id"] == "task-00000" and orders["oldest"]["age"] > 1e6
    assert every["unacked"] == {"count": 0, "oldest_age": None, "messages": [], "undecodable": 0}
    assert every["reply_keys"]["count"] == 0 and every["elapsed"] > 0
    assert named["queues"]["typo"] == {
        "depth": 0, "by_priority": {"0": 0, "3": 0, "6": 0, "9": 0}, "exists": False, "paused": None,
        "interrupted": False,
    }  # fmt: skip
    assert missing["failed"] and missing["category"] == "queue_unknown"
    assert "typo" in missing["msg"] and "orders" in missing["msg"]
    assert [(m["id"], m["args"]) for m in peeked["peek"]] == [("task-00002", [0.0]), ("task-00006", [0.0])]
    assert nobody["failed"] and "peek.queue" in nobody["msg"]
    assert not any(result["changed"] for result in (every, named, peeked))


def test_purge_check_run_again_and_back(
    ansible: Ansible, broker: RedisServer, defaults: dict[str, Any], tmp_path: Path
) -> None:
    send(broker, 0, 30, "orders")
    order = waiting(broker, "orders")
    path = str(tmp_path / "orders.queue")
    purge = act(queue="orders", state="purged", confirm="orders", path=path)
    (planned,) = ansible.play([purge], defaults=defaults, check=True)
    assert planned["changed"] and planned["count"] == 30 and planned["tasks"] == {"lab.add": 15, "lab.sleep": 15}
    assert planned["before"] == {"queue": 30} and planned["after"] == {"queue": 0}
    assert waiting(broker, "orders") == order and not os.path.exists(path)
    purged, again, copied, gone, back, twice = ansible.play(
        [
            purge,
            purge,
            act(queue="orders", state="exported", path=str(tmp_path / "empty")),
            info(queues=["orders"]),
            act(queue="orders", state="imported", path=path),
            act(queue="orders", state="imported", path=path),
        ],
        defaults=defaults,
    )
    for key in ("changed", "count", "before", "after"):
        assert purged[key] == planned[key]
    assert purged["saved"]["path"] == path and os.stat(path).st_mode & 0o777 == 0o600
    assert not again["changed"] and again["count"] == 0 and gone["total"] == 0
    assert copied["changed"] and copied["count"] == 0 and (tmp_path / "empty").exists()
    assert back["changed"] and back["count"] == 30 and back["after"] == {"queue": 30}
    assert not twice["changed"] and twice["already_imported"].endswith("into orders")
    assert waiting(broker, "orders") == order
    password_free = Path(path).read_text().splitlines()[0]
    assert json.loads(password_free)["broker"] == f"redis://127.0.0.1:{broker.port}"


def test_drop_move_export(ansible: Ansible, broker: RedisServer, defaults: dict[str, Any], tmp_path: Path) -> None:
    send(broker, 0, 20, "orders")
    send(broker, 100, 2, "slow")
    drop = act(queue="orders", state="dropped", confirm="orders", path=str(tmp_path / "drop"),
               filter={"tasks": ["lab.sleep"], "ids": [f"task-{n:05d}" for n in range(10)]})  # fmt: skip
    move = act(queue="orders", state="moved", to="slow", filter={"tasks": ["lab.a*"]}, max_messages=4)
    export = act(queue="orders", state="exported", path=str(tmp_path / "copy"))
    planned = ansible.play([drop, move, export], defaults=defaults, check=True)
    dropped, moved, exported, nothing = ansible.play(
        [drop, move, export, act(queue="orders", state="moved", to="slow", filter={"ids": ["nobody"]})],
        defaults=defaults,
    )
    assert planned[0]["count"] == dropped["count"] == 5 and planned[0]["tasks"] == dropped["tasks"] == {"lab.sleep": 5}
    assert planned[1]["count"] == moved["count"] == 4 and moved["tasks"] == {"lab.add": 4}
    assert moved["after"] == {"queue": 11, "to": 6}
    assert exported["count"] == 11 and not nothing["changed"] and nothing["count"] == 0
    assert [item for item in waiting(broker, "slow") if item < "task-00100"] == [f"task-{n:05d}" for n in (1, 3, 5, 7)]
    rest = [n for n in range(20) if not (n % 2 == 0 and n < 10) and n not in (1, 3, 5, 7)]
    assert sorted(waiting(broker, "orders")) == [f"task-{n:05d}" for n in rest]
    for line in broker.cli("LRANGE", "slow", "0", "-1").splitlines():
        assert json.loads(line)["properties"]["delivery_info"] == {"exchange": "", "routing_key": "slow"}


BAD: list[tuple[dict[str, Any], str, str]] = [
    ({"state": "purged", "path": "/nowhere/x"}, "precondition", "confirm: "),
    ({"state": "purged", "confirm": "order", "path": "/nowhere/x"}, "precondition", "'orders'"),
    ({"state": "purged", "confirm": "orders"}, "precondition", "save: false"),
    ({"state": "purged", "confirm": "orders", "path": "/nowhere/x"}, "precondition", "/nowhere does not exist"),
    ({"state": "purged", "confirm": "orders", "save": False, "filter": {"ids": ["a"]}}, "precondition", "dropped"),
    ({"state": "dropped", "confirm": "orders", "save": False}, "precondition", "filter: "),
    ({"state": "moved", "to": "slow", "create": True, "filter": {"ids": []}}, "precondition", "filter.ids: "),
    (
        {"state": "moved", "to": "slow", "create": True, "filter": {"tasks": ["lab.add"], "ids": []}},
        "precondition",
        "filter.ids: ",
    ),
    ({"state": "moved", "to": "slow", "create": True, "filter": {}}, "precondition", "filter: "),
    ({"state": "moved"}, "precondition", "to: "),
    ({"state": "moved", "to": "orders"}, "precondition", "another queue"),
    ({"state": "moved", "to": "typo"}, "queue_unknown", "create: true"),
    ({"state": "moved", "to": "hash"}, "wrong_type", "hash"),
    ({"state": "moved", "to": "zset"}, "unknown_layout", "zset"),
    ({"queue": "typo", "state": "purged", "confirm": "typo", "save": False}, "queue_unknown", "orders"),
    ({"queue": "hash", "state": "purged", "confirm": "hash", "save": False}, "wrong_type", "'hash'"),
    ({"state": "imported", "path": "/nowhere/x"}, "precondition", "no file"),
    ({"state": "purged", "confirm": "orders", "save": False, "batch_size": 0}, "precondition", "batch_size"),
    ({"state": "exported", "path": "/tmp"}, "precondition", "is a directory"),
    ({"state": "moved", "to": "x", "broker_url": "amqp://h/"}, "precondition", "not Redis"),
    ({"state": "moved", "to": "x", "broker_url": "redis://127.0.0.1:1/0"}, "connection", "cannot be reached"),
]


def test_bad_input_changes_nothing(ansible: Ansible, broker: RedisServer, defaults: dict[str, Any]) -> None:
    send(broker, 0, 4, "orders")
    broker.cli("HSET", "hash", "a", "b")
    broker.cli("ZADD", "zset", "1", "a")
    before = (broker.keys(), waiting(broker, "orders"))
    tasks = [act(**{"queue": "orders", **options}) for options, _category, _text in BAD]
    for check in (False, True):
        for result, (options, category, text) in zip(ansible.play(tasks, defaults=defaults, check=check), BAD):
            assert result.get("failed") and result["category"] == category, (options, result)
            assert text in result["msg"], (options, result["msg"])
    assert (broker.keys(), waiting(broker, "orders")) == before


def test_beside_a_real_worker(ansible: Ansible, broker: RedisServer, defaults: dict[str, Any], tmp_path: Path) -> None:
    """Every task sent is done, saved or waiting, and only once, while the worker goes on consuming."""
    count = 3000
    send(broker, 0, count, "orders")
    with Worker(broker.url(), "queues-1@lab", queues="orders", concurrency=1, environment={}):
        dropped, moved, purged = ansible.play(
            [
                act(queue="orders", state="dropped", confirm="orders", path=str(tmp_path / "drop"), max_messages=300,
                    filter={"tasks": ["lab.sleep"]}),
                act(queue="orders", state="moved", to="slow", create=True, max_messages=300),
                act(queue="orders", state="purged", confirm="orders", path=str(tmp_path / "purge"), max_messages=300),
            ],
            defaults=defaults,
        )  # fmt: skip
        assert [dropped["count"], moved["count"], purged["count"]] == [300, 300, 300]
        wait_until(lambda: not waiting(broker, "orders") and broker.cli("HLEN", "unacked") == "0", 60, "the rest")
    keys = broker.keys()
    done = [key.removeprefix("celery-task-meta-") for key in keys if key.startswith("celery-task-meta-")]
    saved = [
        json.loads(line)["headers"]["id"]
        for name in ("drop", "purge")
        for line in (tmp_path / name).read_text().splitlines()
        if line.startswith('{"body"')
    ]
    moved_ids = waiting(broker, "slow")
    assert len(moved_ids) == 300 and len(saved) == 600
    assert sorted([*done, *saved, *moved_ids]) == [f"task-{n:05d}" for n in range(count)]


def test_moved_message_goes_back_to_its_new_queue(
    ansible: Ansible, broker: RedisServer, defaults: dict[str, Any]
) -> None:
    """A worker that gives a moved message back gives it back to where it was moved."""
    script = "from labapp import add; add.apply_async((1, 1), queue='orders', task_id='later', countdown=3600)"
    subprocess.run(
        [str(celery_venv() / "bin" / "python"), "-c", script],
        cwd=TESTS,
        check=True,
        env={**os.environ, "CELERY_BROKER_URL": broker.url()},
    )
    (moved,) = ansible.play([act(queue="orders", state="moved", to="slow", create=True)], defaults=defaults)
    assert moved["count"] == 1
    with Worker(broker.url(), "queues-2@lab", queues="slow", concurrency=1):
        wait_until(lambda: broker.cli("HLEN", "unacked") == "1", 20, "the task is held")
        (held,) = ansible.play([info(queues=["slow"], unacked=True, task_names=True)], defaults=defaults)
        assert held["unacked"]["count"] == 1 and held["unacked"]["messages"][0]["id"] == "later"
        assert held["queues"]["slow"]["unacked_tasks"] == {"lab.add": 1}
    assert waiting(broker, "slow") == ["later"] and waiting(broker, "orders") == []


def test_the_password_is_nowhere(ansible: Ansible, tmp_path: Path) -> None:
    secret = "s3cret-of-queues"
    with RedisServer(password=secret) as server:
        send(server, 0, 4, "orders")
        results = ansible.play(
            [
                info(task_names=True, unacked=True, peek={"queue": "orders"}),
                act(queue="orders", state="purged", confirm="orders", path=str(tmp_path / "orders.queue")),
                act(queue="typo", state="exported", path=str(tmp_path / "typo.queue")),
                info(queues=["orders"], broker_url=server.url().replace(secret, f"{secret}-wrong")),
            ],
            defaults={"broker_url": server.url(), "virtualenv": str(celery_venv())},
            verbosity=3,
        )
    assert results[0]["total"] == results[1]["count"] == 4 and results[2]["failed"]
    assert results[3]["category"] == "authentication"
    assert secret not in ansible.output and secret not in json.dumps(results)
    assert secret not in (tmp_path / "orders.queue").read_text()
