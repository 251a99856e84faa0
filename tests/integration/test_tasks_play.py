# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Revoke, requeue, run inline and prune with a real Redis, real workers, and results in Redis and in SQLite."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support import TESTS, Ansible, RedisServer, Worker, _in_celery, celery_venv, send_task, task_state, wait_until

pytestmark = pytest.mark.ansible
PREFIX = "celeryops.runbook."
SECRET = "s3cr3t-word"


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    extended = {"LABAPP_EXTENDED": "1"}
    with (
        RedisServer(password=SECRET) as server,
        Worker(server.url(), "tasks-1@lab", queues="alpha,beta", concurrency=1, environment=extended),
    ):
        yield server


@pytest.fixture
def connection(server: RedisServer) -> dict[str, Any]:
    return {"broker_url": server.url(), "virtualenv": str(celery_venv())}


@pytest.fixture
def busy(server: RedisServer) -> Iterator[str]:
    """The only process of the worker runs a task until the test is over."""
    task_id = send_task(server.url(), "lab.sleep", 600, queue="alpha")
    wait_until(lambda: task_state(server.url(), task_id) != "SUCCESS" and queued(server, "alpha") == [], 10, "it runs")
    yield task_id
    code = "labapp.app.control.revoke(a[0], terminate=True, signal='SIGKILL')"
    _in_celery(server.url(), code, task_id)
    wait_until(lambda: not active(server), 15, "the worker is idle")


def queued(server: RedisServer, queue: str) -> list[str]:
    return re.findall(r'"id": "([^"]+)"', server.cli("LRANGE", queue, "0", "-1"))


def active(server: RedisServer) -> list[dict[str, Any]]:
    code = "print(json.dumps(labapp.app.control.inspect(timeout=1).active()))"
    return [task for tasks in (json.loads(_in_celery(server.url(), code)) or {}).values() for task in tasks]


def send_many(server: RedisServer, name: str, rows: list[list[Any]], queue: str, **options: Any) -> list[str]:
    code = "print(json.dumps([labapp.app.send_task(a[0], args=row, queue=a[2], **a[3]).id for row in a[1]]))"
    return list(json.loads(_in_celery(server.url(), code, name, rows, queue, options)))


# revoke


def test_revoke_by_name_and_argument(
    ansible: Ansible, server: RedisServer, connection: dict[str, Any], busy: str, tmp_path: Path
) -> None:
    sums = send_many(server, "lab.add", [[number % 2, number] for number in range(20)], "beta")
    later = send_many(server, "lab.add", [[1, 99]], "beta", countdown=3600)
    wanted = sums[1::2]
    options = {
        "names": ["lab.add"], "args": [1], "confirm": "lab.add", "directory": str(tmp_path / "saved"), **connection,
    }  # fmt: skip
    before = queued(server, "beta")
    dry, wrong, unset = (
        ansible.module("celery_revoke", options, check=True),
        ansible.module("celery_revoke", {**options, "confirm": "lab"}),
        ansible.module("celery_revoke", {**options, "confirm": None}),
    )
    assert dry["changed"] and dry["removed"] == {"beta": len(set(before) & {*wanted, *later})}, dry
    for refused in (wrong, unset):
        assert refused["failed"] and "confirm: to revoke by name it must equal 'lab.add'" in refused["msg"]
    assert queued(server, "beta") == before and not (tmp_path / "saved").exists()
    assert server.cli("EXISTS", "celeryops:revokes") == "0"

    done = ansible.module("celery_revoke", options)
    assert done["changed"] and set(done["ids"]) == {*wanted, *later}, done
    assert set(queued(server, "beta")) == {task for task in before if task not in done["ids"]}
    assert (tmp_path / "saved").stat().st_mode & 0o777 == 0o700
    # What was taken out can be put back.
    back = {"queue": "beta", "state": "imported", "path": done["saved"]["beta"], "create": True, **connection}
    assert ansible.module("redis_queue", back)["count"] == done["removed"]["beta"]
    assert set(queued(server, "beta")) == set(before)
    assert ansible.module("celery_revoke", options)["remembered"] == 0
    again = ansible.module("celery_revoke", options)
    assert not again["changed"] and not again["removed"], again
    none = ansible.module("celery_revoke", {**options, "names": ["lab.nope"], "confirm": "lab.nope"})
    assert not none["changed"] and none["ids"] == [] and not none.get("failed")
    assert SECRET not in ansible.output
    server.cli("DEL", "beta")


def test_revoke_by_id_wherever_it_is(
    ansible: Ansible, server: RedisServer, connection: dict[str, Any], busy: str, tmp_path: Path
) -> None:
    code = "print(labapp.app.send_task('lab.add', args=[5, 5], queue='alpha', countdown=3600).id)"
    eta = _in_celery(server.url(), code)
    queue = send_many(server, "lab.add", [[n, 0] for n in range(4)], "alpha")
    options = {"ids": [busy, eta, queue[-1], "not-heard-of"], "directory": str(tmp_path), **connection}
    info = {"task_ids": options["ids"], "locate": True, "result_backend": server.url(), **connection}
    placed = ansible.module("celery_task_info", info)
    places = {item["task_id"]: item["place"] for item in placed["tasks"]}
    assert places[busy] == "running" and places["not-heard-of"] == "nowhere"
    assert places[queue[-1]] == "queued" and places[eta] in ("scheduled", "queued"), places
    assert placed["nowhere"] == ["not-heard-of"]

    first = ansible.module("celery_revoke", options)
    assert first["changed"] and first["remembered"] == 4 and first["not_found"] == ["not-heard-of"]
    assert first["places"]["running"] == 1 and queue[-1] not in queued(server, "alpha")
    assert busy in {task["id"] for task in active(server)}, "running tasks go on unless they are terminated"
    stopped = ansible.module("celery_control", {"terminated": [busy], **connection})
    assert stopped["changed"] and not stopped.get("failed"), stopped
    wait_until(lambda: task_state(server.url(), queue[0]) == "SUCCESS", 20, "the worker goes on")
    assert task_state(server.url(), queue[-1]) == "REVOKED", "it never ran"
    assert not ansible.module("celery_revoke", options)["changed"]


def test_revoke_refuses_what_makes_no_sense(
    ansible: Ansible, server: RedisServer, connection: dict[str, Any], tmp_path: Path
) -> None:
    base = {"directory": str(tmp_path), **connection}
    cases: list[tuple[dict[str, Any], str]] = [
        ({"args": [1]}, "give ids or names"),
        ({"ids": [""]}, "must not hold an empty text"),
        ({"ids": ["a"], "expires": 0}, "expires: must be above 0"),
        ({"ids": ["a"], "max_tasks": 0}, "max_tasks: must be 1 to"),
        ({"ids": ["a"], "queues": ["nowhere"]}, "queues: there is no queue 'nowhere'"),
        ({"ids": ["a"], "broker_url": "amqp://localhost:1//"}, "needs a Redis broker"),
    ]
    results = ansible.play([{PREFIX + "celery_revoke": {**base, **options}} for options, _text in cases])
    for result, (_options, text) in zip(results, cases, strict=True):
        assert result.get("failed") and text in result["msg"], result
    assert server.cli("EXISTS", "celeryops:revokes") in ("0", "1")


# send: names that come close


def test_a_name_that_comes_close_is_told(ansible: Ansible, server: RedisServer, connection: dict[str, Any]) -> None:
    result = ansible.module("celery_task", {"name": "lab.ad", "queue": "alpha", "args": [1, 1], **connection})
    assert result["failed"] and "Close to it: lab.add" in result["msg"], result


# requeue


@pytest.fixture(params=["redis", "sqlite"])
def results(request: pytest.FixtureRequest, server: RedisServer, tmp_path: Path) -> Iterator[tuple[str, str]]:
    """(URL of the result backend, queue of a worker that uses it)"""
    if request.param == "redis":
        yield server.url(), "alpha"
        return
    url = f"db+sqlite:///{tmp_path}/results.sqlite"
    environment = {"CELERY_RESULT_BACKEND": url, "LABAPP_EXTENDED": "1"}
    with Worker(server.url(), "sql-1@lab", queues="sql", concurrency=1, environment=environment):
        yield url, "sql"


def in_backend(server: RedisServer, url: str, code: str, *arguments: Any) -> Any:
    # Celery takes the backend from the environment before it looks into its configuration.
    prologue = (
        f"import os\nos.environ['CELERY_RESULT_BACKEND'] = {url!r}\napp = labapp.app\napp.conf.result_extended = True\n"
    )
    return json.loads(_in_celery(server.url(), prologue + code, *arguments))


def meta(server: RedisServer, url: str, task_id: str) -> dict[str, Any]:
    code = (
        "m = app.backend.get_task_meta(a[0], cache=False)\n"
        "print(json.dumps({'status': m['status'], 'date_done': str(m.get('date_done'))}))"
    )
    return dict(in_backend(server, url, code, task_id))


def test_requeue_once_for_each_failure(
    ansible: Ansible, server: RedisServer, connection: dict[str, Any], results: tuple[str, str]
) -> None:
    url, queue = results
    failing = send_many(server, "lab.fail", [[f"text {n}"] for n in range(3)], queue)
    other = send_many(server, "lab.add", [[1, "x"]], queue)[0]
    wait_until(lambda: meta(server, url, other)["status"] == "FAILURE", 20, "all have failed")
    options = {"names": ["lab.fail"], "exceptions": ["Value*"], "result_backend": url, **connection}
    before = {task: meta(server, url, task)["date_done"] for task in failing}
    dry = ansible.module("celery_requeue", options, check=True)
    assert dry["changed"] and dry["count"] == 3 and {item["task_id"] for item in dry["tasks"]} == set(failing), dry
    assert server.cli("EXISTS", "celeryops:requeued") == "0" or queue == "sql"
    assert {task: meta(server, url, task)["date_done"] for task in failing} == before

    done = ansible.module("celery_requeue", {**options, "max_tasks": 2, "rate": 20})
    assert (done["count"], done["left"]) == (2, 1), done
    sent = [item["task_id"] for item in done["tasks"]]
    assert {item["queue"] for item in done["tasks"]} == {queue}

    def ran_again(task: str) -> bool:
        found = meta(server, url, task)
        return bool(found["status"] == "FAILURE" and found["date_done"] != before[task])

    for task in sent:
        wait_until(lambda task=task: ran_again(task), 20, "it ran and failed once more")  # type: ignore[misc]
    left = next(task for task in failing if task not in sent)
    assert not ran_again(left)
    # They have failed anew, so they count anew; the third is sent for the first time. Then nothing is left to send.
    assert ansible.module("celery_requeue", {**options, "ids": [left]})["count"] == 1
    wait_until(lambda: ran_again(left), 20, "the third")
    nothing = ansible.module("celery_requeue", {**options, "names": ["lab.nope"]})
    assert not nothing["changed"] and nothing["matched"] == 0
    assert meta(server, url, other)["status"] == "FAILURE"
    assert SECRET not in ansible.output
    if queue == "alpha":
        for key in [*failing, other]:
            server.cli("DEL", f"celery-task-meta-{key}")


def test_requeue_never_sends_one_failure_twice(
    ansible: Ansible, server: RedisServer, connection: dict[str, Any]
) -> None:
    failed = send_many(server, "lab.fail", [["once"]], "alpha")[0]
    wait_until(lambda: task_state(server.url(), failed) == "FAILURE", 10, "it fails")
    stored = server.cli("GET", f"celery-task-meta-{failed}")
    server.cli("LPUSH", "parked", "x")
    options = {
        "ids": [failed], "queue": "parked", "registered_only": False, "result_backend": server.url(), **connection,
    }  # fmt: skip
    first, second = ansible.play([{PREFIX + "celery_requeue": options}] * 2)
    assert first["count"] == 1 and first["changed"], first
    assert second["count"] == 0 and second["already_requeued"] == 1 and not second["changed"], second
    assert queued(server, "parked") == [failed]
    message = json.loads(server.cli("LINDEX", "parked", "0"))
    assert message["headers"]["task"] == "lab.fail" and message["headers"]["celeryops_published"]
    assert message["properties"]["delivery_info"]["routing_key"] == "parked"
    assert server.cli("GET", f"celery-task-meta-{failed}") == stored
    server.cli("DEL", "parked", f"celery-task-meta-{failed}")


def test_requeue_says_where_result_extended_is_off(
    ansible: Ansible, server: RedisServer, connection: dict[str, Any]
) -> None:
    bare = {"status": "FAILURE", "result": {"exc_type": "ValueError", "exc_message": ["x"], "exc_module": "builtins"},
            "traceback": None, "children": [], "date_done": "2026-11-20T06:00:00+00:00", "task_id": "bare"}  # fmt: skip
    server.cli("SET", "celery-task-meta-bare", json.dumps(bare))
    server.cli("SET", "celery-task-meta-odd", "no json")
    options = {"result_backend": server.url(), **connection}
    cases: list[tuple[dict[str, Any], str]] = [
        ({**options, "names": ["lab.*"]}, "result_extended: 1 failed task(s) fit"),
        ({**options, "ids": ["bare"]}, "result_extended: 1 failed task(s) fit"),
        (options, "no condition would send every"),
        ({**options, "ids": ["a"], "queue": "nowhere"}, "queue: no worker consumes nowhere"),
        ({**options, "ids": ["a"], "rate": -1}, "rate: must not be below 0"),
        ({**connection, "ids": ["a"], "result_backend": "disabled://"}, "the result backend is disabled"),
    ]
    results = ansible.play([{PREFIX + "celery_requeue": case} for case, _text in cases])
    for result, (_case, text) in zip(results, cases, strict=True):
        assert result.get("failed") and text in result["msg"], result
    # What a worker stores of a task it does not know, with result_extended on.
    error = {"exc_type": "NotRegistered", "exc_message": ["lab.gone"], "exc_module": "celery.exceptions"}
    server.cli("SET", "celery-task-meta-bare", json.dumps({**bare, "result": error, "name": None, "args": None}))
    other, same = (ansible.module("celery_requeue", {**options, "names": [name]}) for name in ("lab.other", "lab.go*"))
    assert (other["matched"], other["nameless"]) == (0, 0) and not other["changed"], other
    assert (same["matched"], same["nameless"], same["count"]) == (1, 1, 0) and not same["changed"], same
    assert "did not know the task" in same["warnings"][0]
    unknown = ansible.module("celery_requeue", {**options, "ids": ["never"]})
    assert unknown["not_found"] == ["never"] and not unknown["changed"], unknown
    server.cli("DEL", "celery-task-meta-bare", "celery-task-meta-odd")


# run inline


@pytest.fixture
def inline(server: RedisServer, tmp_path: Path, connection: dict[str, Any]) -> dict[str, Any]:
    file = tmp_path / "secret.env"
    file.write_text(f'CELERY_BROKER_URL="{server.url()}"\nCELERY_RESULT_BACKEND="{server.url()}"\n')
    return {
        "environment_file": str(file), "virtualenv": connection["virtualenv"], "app": "labapp:app",
        "app_dir": str(TESTS), "return_result": True,
    }  # fmt: skip


def test_run_inline(ansible: Ansible, server: RedisServer, inline: dict[str, Any], busy: str) -> None:
    dry = ansible.module("celery_run_inline", {**inline, "name": "lab.add", "args": [20, 22]}, check=True)
    assert dry["changed"] and dry["state"] is None, dry
    send_many(server, "lab.add", [[7, 7]], "beta")
    cases: list[tuple[dict[str, Any], str]] = [
        ({"name": "lab.ad"}, "Close to it: lab.add"),
        ({"name": "lab.add", "args": [7, 7]}, "run here too, it would run twice"),
        ({"name": "lab.sleep", "args": [600]}, "is running at tasks-1@lab"),
        ({"name": "lab.add", "args": [1, 2], "task_id": busy}, "is running at tasks-1@lab"),
        ({"name": "lab.fail", "args": ["why"]}, "ended as FAILURE: ValueError"),
        ({"name": "lab.sleep", "args": [30], "run_timeout": 1.5}, "run_timeout: lab.sleep has not ended"),
        ({"name": "lab.add", "user": "nobody-here"}, "user: there is no user nobody-here"),
        ({"name": "lab.add", "app": "nosuch:app"}, "nosuch:app cannot be imported"),
    ]
    good = [
        {"name": "lab.add", "args": [20, 22]},
        {"name": "lab.flaky", "args": [2]},
    ]
    results = ansible.play(
        [{PREFIX + "celery_run_inline": {**inline, **case}} for case in [*good, *(c for c, _t in cases)]]
    )
    added, retried, *refused = results
    assert added["state"] == "SUCCESS" and added["result"] == 42, added
    assert retried["state"] == "SUCCESS" and retried["result"] == 2, retried
    for result, (_case, text) in zip(refused, cases, strict=True):
        assert result.get("failed") and text in result["msg"], result
    assert refused[4]["result"] == "why"
    assert not [pid for pid in os.listdir("/proc") if pid.isdigit() and b"celeryops.inline" in cmdline(pid)]
    assert SECRET not in ansible.output


def cmdline(pid: str) -> bytes:
    try:
        return Path("/proc", pid, "cmdline").read_bytes()
    except OSError:
        return b""


# prune


def test_prune_redis(ansible: Ansible, server: RedisServer, connection: dict[str, Any]) -> None:
    url = server.url(5)
    code = (
        "import redis, datetime\n"
        "r = redis.Redis.from_url(a[0])\n"
        "now = datetime.datetime.now(datetime.timezone.utc)\n"
        "for n in range(3000):\n"
        "    done = (now - datetime.timedelta(days=n % 10, minutes=5)).isoformat()\n"
        "    r.set(f'celery-task-meta-{n}', json.dumps({'status': 'SUCCESS', 'result': 'x' * 50, 'date_done': done}),\n"
        "          ex=None if n % 100 == 0 else 86400)\n"
        "r.set('celery-task-meta-running', json.dumps({'status': 'STARTED', 'result': {}, 'date_done': None}))\n"
        "r.set('celery-task-meta-odd', 'not json')\n"
        "r.rpush('celery-taskset-meta-chord.j', 'part'); r.set('celery-taskset-meta-chord.t', 1)\n"
        "r.set('other', 'stays')\n"
    )
    _in_celery(server.url(), code, url)
    options = {"older_than": 7 * 86400, "result_backend": url, **connection}
    dry = ansible.module("celery_result", options, check=True)
    assert (dry["changed"], dry["count"], dry["kept"]) == (True, 900, 2102), dry
    assert int(server.cli("DBSIZE", db=5)) == 3005
    done = ansible.module("celery_result", options)
    assert (done["changed"], done["count"], done["kept"], done["undated"], done["undecodable"]) == (
        True,
        900,
        2102,
        1,
        1,
    )
    assert int(server.cli("DBSIZE", db=5)) == 2105 and server.cli("GET", "other", db=5) == "stays"
    # 0, 100, ... are 0 days old and never expire, and so are the odd one, the one that runs and the chord's two keys.
    assert done["no_expiry"]["count"] == 34 and done["chord_orphans"]["count"] == 0
    again = ansible.module("celery_result", options)
    assert not again["changed"] and again["count"] == 0
    time.sleep(2.2)
    orphans = ansible.module("celery_result", {**options, "older_than": 1}, check=True)["chord_orphans"]
    assert orphans["count"] == 2 and "celery-taskset-meta-chord.j" in orphans["examples"], orphans
    assert SECRET not in ansible.output
    server.cli("FLUSHDB", db=5)


def test_prune_sql(ansible: Ansible, server: RedisServer, connection: dict[str, Any], tmp_path: Path) -> None:
    url = f"db+sqlite:///{tmp_path}/old.sqlite"
    code = (
        "import datetime\n"
        "b = app.backend\n"
        "for n in range(30):\n"
        "    b.store_result(f't{n}', n, 'SUCCESS')\n"
        "s = b.ResultSession()\n"
        "for row in s.query(b.task_cls):\n"
        "    row.date_done = row.date_done - datetime.timedelta(days=int(row.task_id[1:]))\n"
        "s.commit()\n"
        "print(s.query(b.task_cls).count())"
    )
    assert in_backend(server, url, code) == 30
    options = {"older_than": 7.5 * 86400, "result_backend": url, **connection}
    dry, done, again = (
        ansible.module("celery_result", options, check=True),
        ansible.module("celery_result", options),
        ansible.module("celery_result", options),
    )
    assert (dry["changed"], dry["count"], dry["kept"]) == (True, 22, 8), dry
    assert (done["changed"], done["count"], done["kept"]) == (True, 22, 8), done
    assert (again["changed"], again["count"], again["kept"]) == (False, 0, 8), again


def test_prune_refuses(ansible: Ansible, connection: dict[str, Any]) -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"older_than": 0}, "older_than: must be above 0"),
        ({"older_than": 1, "result_backend": "disabled://"}, "result backend is disabled"),
        ({"older_than": 1, "result_backend": "rpc://"}, "works on Redis and on SQL databases only"),
        ({"older_than": 1, "result_backend": "redis://127.0.0.1:1/0"}, "result backend:"),
    ]
    results = ansible.play([{PREFIX + "celery_result": {**connection, **options}} for options, _text in cases])
    for result, (_options, text) in zip(results, cases, strict=True):
        assert result.get("failed") and text in result["msg"], result
