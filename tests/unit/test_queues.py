# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The engine's queue operations against a real redis-server."""

from __future__ import annotations

import gzip
import json
import os
import resource
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
from queue_support import SEP, STEPS, content, fill, own_keys, raw, sample

from ansible_collections.celeryops.runbook.plugins.module_utils.engine import queues as queues_module
from ansible_collections.celeryops.runbook.plugins.module_utils.engine import savefile
from ansible_collections.celeryops.runbook.plugins.module_utils.engine.errors import (
    LockHeld,
    PreconditionFailed,
    QueueUnknown,
    SaveFailed,
    UnknownLayout,
    WrongType,
)
from ansible_collections.celeryops.runbook.plugins.module_utils.engine.queues import RedisQueues, Selection
from support import RedisServer


@pytest.fixture(params=["", "pre:"])
def prefix(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def client(broker: RedisServer) -> Iterator[Any]:
    with redis.Redis(port=broker.port) as connection:
        yield connection


@pytest.fixture
def queues(client: Any, prefix: str) -> RedisQueues:
    return RedisQueues(client, prefix, batch_size=7)


def test_depth(queues: RedisQueues) -> None:
    fill(queues, "a", [b"1", b"2"], 0)
    fill(queues, "a", [b"3"], 9)
    rows = queues.depth(["a", "none", *(f"q{n}" for n in range(1000))])
    assert rows["a"] == {
        "depth": 3,
        "by_priority": {"0": 2, "3": 0, "6": 0, "9": 1},
        "exists": True,
        "interrupted": False,
    }
    assert rows["none"]["exists"] is False and len(rows) == 1002


def test_foreign_types_are_named(queues: RedisQueues) -> None:
    queues.client.hset(queues.key("hash", 3), "a", "b")
    queues.client.zadd(queues.key("zset", 0), {"a": 1})
    with pytest.raises(WrongType, match="hash"):
        queues.depth(["hash"])
    with pytest.raises(UnknownLayout, match="zset"):
        queues.depth(["zset"])
    for target in ("hash", "zset"):
        fill(queues, "src", [raw(1)])
        with pytest.raises((WrongType, UnknownLayout)):
            queues.move("src", target)
        with pytest.raises((WrongType, UnknownLayout)):
            queues.purge(target)
    assert content(queues, "src") == [raw(1), raw(1)]


def test_queues_are_found_and_unknown_ones_refused(queues: RedisQueues) -> None:
    prefix = queues.key_prefix
    fill(queues, "lists", [raw(1)], 6)
    fill(queues, "other", [b"no message"])
    fill(queues, "x.reply.celery.pidbox", [raw(2)])
    queues.client.sadd(f"{prefix}_kombu.binding.celery", f"rk{SEP}{SEP}bound")
    queues.client.sadd(f"{prefix}_kombu.binding.celery.pidbox", f"{SEP}{SEP}celery@host.celery.pidbox")
    assert queues.queues() == ["bound", "lists"]
    with pytest.raises(QueueUnknown, match="bound, lists"):
        queues.require("typo")
    assert queues.require("bound")["depth"] == 0
    queues.client.sadd(f"{prefix}_kombu.binding.own", f"own{SEP}{SEP}own")
    queues.client.sadd(f"{prefix}_kombu.binding.topics", f"a.#{SEP}^a\\..*{SEP}far")
    assert queues.declared(["bound", "own", "far", "typo"]) == {"bound", "own", "far"}


def test_task_names(queues: RedisQueues) -> None:
    sample(queues, 99)
    found = queues.task_names("src")
    assert (found.tasks, found.undecodable, found.scanned) == ({"a": 132, "b": 66}, 2, 200)
    assert queues.task_names("src", Selection(tasks=("b",))).tasks == {"b": 66}
    assert queues.task_names("src", Selection(tasks=("b",)), limit=5).tasks == {"b": 5}
    short = queues.task_names("src", most=50)
    assert (short.scanned, short.complete) == (50, False)


def test_live_reading_misses_and_doubles_nothing(client: Any) -> None:
    """What waits all the time is seen once while others push in front and pop at the end."""
    queues = RedisQueues(client, batch_size=20)
    fill(queues, "src", [raw(n) for n in range(1000)])
    seen: list[bytes] = []
    for turn, batch in enumerate(queues._from_back("src")):
        seen += batch
        fill(queues, "src", [raw(10_000 + turn * 100 + n) for n in range(turn % 45)])
        client.rpop("src", 3)
    assert len(seen) == len(set(seen))
    assert set(client.lrange("src", 0, -1)) & {raw(n) for n in range(1000)} <= set(seen)


def test_purge_saves_byte_for_byte_and_import_restores(queues: RedisQueues, tmp_path: Path) -> None:
    before = sample(queues)
    path = str(tmp_path / "save")
    outcome = queues.purge("src", path)
    assert (outcome.count, outcome.by_priority["0"], outcome.by_priority["6"]) == (202, 101, 101)
    assert queues.client.dbsize() == 0
    assert os.stat(path).st_mode & 0o777 == 0o600
    assert [name.name for name in tmp_path.iterdir()] == ["save"]
    saved = savefile.verify(path)
    assert saved.count == 202 and saved.header["queue"] == "src" and saved.header["key_prefix"] == queues.key_prefix
    new = [raw(n) for n in range(5000, 5010)]
    fill(queues, "src", new)
    back = queues.import_(path, "src")
    assert back.count == 202
    assert content(queues, "src", 0) == before[0] + new
    assert content(queues, "src", 6) == before[6]
    again = queues.import_(path, "src")
    assert again.count == 0 and again.already_imported
    assert content(queues, "src", 0) == before[0] + new
    assert own_keys(queues) == []
    marker = queues.client.keys("*celeryops:imported:*")[0]
    assert 29 * 86400 < queues.client.ttl(marker) <= 30 * 86400


def test_purge_without_save_and_of_nothing(queues: RedisQueues, tmp_path: Path) -> None:
    sample(queues)
    assert queues.purge("src").count == 202
    assert queues.client.dbsize() == 0
    path = tmp_path / "save"
    assert queues.purge("src", str(path)).count == 0
    assert not path.exists()


def test_again_with_the_same_file_and_nothing_left(queues: RedisQueues, tmp_path: Path) -> None:
    before = sample(queues)
    path = tmp_path / "save"
    assert queues.drop("src", Selection(tasks=("b",)), str(path)).count > 0
    saved = path.read_bytes()
    assert queues.drop("src", Selection(tasks=("b",)), str(path)).count == 0
    with pytest.raises(PreconditionFailed, match="exists"):
        queues.purge("src", str(path))
    assert 0 < len(content(queues, "src", 0)) < len(before[0]) + 1
    queues.purge("src")
    assert queues.purge("src", str(path)).count == 0
    assert path.read_bytes() == saved and own_keys(queues) == []


def test_a_slow_disk_does_not_lose_the_lock(
    queues: RedisQueues, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Syncing and reading back may take longer than a lock lives."""
    sample(queues)
    monkeypatch.setattr(queues_module, "LOCK_TTL", 1)
    finish = savefile.Writer.finish

    def slow(writer: savefile.Writer) -> savefile.Saved:
        time.sleep(1.1)
        return finish(writer)

    monkeypatch.setattr(savefile.Writer, "finish", slow)
    assert queues.purge("src", str(tmp_path / "save")).count == 202
    assert queues.client.dbsize() == 0


def test_messages_aside_without_a_record_are_not_overwritten(queues: RedisQueues) -> None:
    before = sample(queues)
    aside = f"{queues.key_prefix}celeryops:queue:src:picked:0"
    queues.client.lpush(aside, "left")
    with pytest.raises(PreconditionFailed, match="holds messages"):
        queues.purge("src")
    assert queues.client.lrange(aside, 0, -1) == [b"left"] and content(queues, "src", 0) == before[0]


def test_looking_leaves_the_lock_of_a_dead_run(queues: RedisQueues) -> None:
    """A look writes nothing; the next operation removes that lock."""
    sample(queues)
    dead = subprocess.Popen(["true"])
    dead.wait()
    lock = f"{queues.key_prefix}celeryops:queue:src:lock"
    value = json.dumps({"token": "t", **queues_module._process(dead.pid), "begun": "1"})
    queues.client.set(lock, value)
    queues.client.hset(lock.replace(":lock", ":record"), mapping={"id": "i", "operation": "moved", "phase": "aside",
                       "host": "h", "started": "s", "path": "", "to": ""})  # fmt: skip
    found = queues.interrupted("src")
    assert found is not None and not found["running"] and queues.client.get(lock) == value.encode()
    outcome = queues.purge("src")
    assert outcome.count == 202 and outcome.recovered is not None and own_keys(queues) == []


def test_purge_with_limit_takes_the_next_to_be_consumed(queues: RedisQueues, tmp_path: Path) -> None:
    before = sample(queues)
    assert queues.purge("src", str(tmp_path / "save"), limit=110).by_priority == {"0": 101, "3": 0, "6": 9, "9": 0}
    assert content(queues, "src", 6) == before[6][9:]


@pytest.mark.parametrize("level", [0, 1])
def test_file_format(queues: RedisQueues, tmp_path: Path, level: int) -> None:
    before = sample(queues)
    path = tmp_path / "save"
    queues.purge("src", str(path), compress_level=level)
    data = gzip.decompress(path.read_bytes()) if level else path.read_bytes()
    header, _unused, rest = data.partition(b"\n")
    assert json.loads(header)["messages"] == {"0": 101, "3": 0, "6": 101, "9": 0}
    first = before[0][0]
    assert rest.startswith(b"priority 0\n%d\n%b\n" % (len(first), first))
    assert json.loads(data.splitlines()[-1])["count"] == 202
    assert queues.import_(str(path), "src").count == 202


@pytest.mark.parametrize("damage", ["flip", "cut", "trailer", "foreign", "empty", "version"])
def test_damaged_files_are_refused(queues: RedisQueues, tmp_path: Path, damage: str) -> None:
    sample(queues)
    path = tmp_path / "save"
    queues.purge("src", str(path))
    data = path.read_bytes()
    middle = len(data) // 2
    path.write_bytes(
        {
            "flip": data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :],
            "cut": data[:middle],
            "trailer": data[: data.rstrip().rfind(b"\n") + 1],
            "foreign": b"hello\n",
            "empty": b"",
            "version": data.replace(b'"version": 1', b'"version": 2', 1),
        }[damage]
    )
    with pytest.raises(PreconditionFailed, match=r"^path: "):
        queues.import_(str(path), "src")
    assert queues.client.dbsize() == 0


def test_import_into_another_place_must_be_stated(queues: RedisQueues, tmp_path: Path) -> None:
    before = sample(queues)
    path = str(tmp_path / "save")
    queues.purge("src", path)
    with pytest.raises(PreconditionFailed, match="add queue to accept"):
        queues.import_(path, "dst")
    queues.db = 5
    with pytest.raises(PreconditionFailed, match="add db to accept"):
        queues.import_(path, "src")
    outcome = queues.import_(path, "dst", accept=["queue", "db"])
    assert (outcome.count, outcome.undecodable) == (200, 2)
    assert content(queues, "dst", 0) == [m.replace(b'"src"', b'"dst"') for m in before[0] if b"garbage" not in m]


def test_export_keeps_the_queue_and_is_a_copy(queues: RedisQueues, tmp_path: Path) -> None:
    before = sample(queues)
    path = str(tmp_path / "save")
    assert queues.export("src", path).count == 202
    assert content(queues, "src", 0) == before[0]
    with pytest.raises(PreconditionFailed, match="add copy to accept"):
        queues.import_(path, "src")
    queues.purge("src")
    queues.import_(path, "src", accept=["copy"])
    assert content(queues, "src", 0) == before[0] and content(queues, "src", 6) == before[6]


def test_move_rewrites_and_keeps_order_and_priority(queues: RedisQueues) -> None:
    before = sample(queues)
    there = [raw(9000, "dst")]
    fill(queues, "dst", there)
    outcome = queues.move("src", "dst")
    assert (outcome.count, outcome.undecodable, outcome.tasks) == (200, 2, {"a": 132, "b": 68})
    for step in (0, 6):
        good = [m.replace(b'"src"', b'"dst"') for m in before[step] if not m.startswith(b"garbage")]
        assert content(queues, "dst", step) == (there if step == 0 else []) + good
        assert content(queues, "src", step) == [m for m in before[step] if m.startswith(b"garbage")]
    assert own_keys(queues) == []


def test_move_of_selected_with_limit(queues: RedisQueues) -> None:
    before = sample(queues)
    outcome = queues.move("src", "dst", Selection(tasks=("b",)), limit=10)
    assert outcome.count == 10 and outcome.tasks == {"b": 10}
    wanted = [m for m in before[0] if b'"task": "b"' in m][:10]
    assert content(queues, "dst", 0) == [m.replace(b'"src"', b'"dst"') for m in wanted]
    assert content(queues, "src", 0) == [m for m in before[0] if m not in wanted]
    assert content(queues, "src", 6) == before[6]


@pytest.mark.parametrize(
    "selection",
    [
        Selection(tasks=("b",)),
        Selection(tasks=("[b]*",)),
        Selection(ids=frozenset(f"id-{n}" for n in (0, 3, 50, 6001))),
        Selection(older_than=60.0),
        Selection(tasks=("shop.*",), older_than=60.0),
    ],
)
def test_drop_takes_the_selected_only(queues: RedisQueues, tmp_path: Path, selection: Selection) -> None:
    sample(queues, 60)
    now = queues.now()
    fill(queues, "src", [raw(7000 + n, task="shop.x", published=now - (3600 if n % 2 else 5)) for n in range(50)], 3)
    kept: dict[int, list[bytes]] = {}
    gone: dict[int, list[bytes]] = {}
    for step in STEPS:
        for message in content(queues, "src", step):
            hit = not message.startswith(b"garbage") and selection.judge(message, now)[0]
            (gone if hit else kept).setdefault(step, []).append(message)
    expected = queues.task_names("src", selection)
    path = str(tmp_path / "save")
    outcome = queues.drop("src", selection, path)
    assert outcome.count == sum(map(len, gone.values())) > 0
    assert outcome.tasks == expected.tasks
    assert (outcome.undecodable, outcome.unknown_age) == (expected.undecodable, expected.unknown_age)
    for step in STEPS:
        assert content(queues, "src", step) == kept.get(step, [])
    assert [m for _step, batch in savefile.batches(path, lambda: 9) for m in batch] == [
        m for step in STEPS for m in gone.get(step, [])
    ]
    queues.import_(path, "src")
    assert sorted(m for step in STEPS for m in content(queues, "src", step)) == sorted(
        m for part in (kept, gone) for messages in part.values() for m in messages
    )


def test_drop_without_filter_is_refused(queues: RedisQueues) -> None:
    with pytest.raises(PreconditionFailed, match="filter"):
        queues.drop("src", Selection())


def test_second_run_is_refused_while_one_works(queues: RedisQueues) -> None:
    sample(queues)
    with queues._lock("src"), pytest.raises(LockHeld, match="another run works on src"):
        queues.purge("src")
    assert queues.purge("src").count == 202


def test_full_disk_puts_everything_back(queues: RedisQueues, tmp_path: Path) -> None:
    before = sample(queues, 3000)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
    try:
        with pytest.raises(SaveFailed, match=r"cannot write .* All 6002 messages are back in src"):
            queues.purge("src", str(tmp_path / "save"))
        with pytest.raises(SaveFailed, match="are back in src"):
            queues.drop("src", Selection(tasks=("a",)), str(tmp_path / "save"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []
    assert sorted(content(queues, "src", 0)) == sorted(before[0])
    assert sorted(content(queues, "src", 6)) == sorted(before[6])
    assert own_keys(queues) == []


def test_unacked_and_oldest_and_peek(queues: RedisQueues) -> None:
    now = queues.now()
    held = json.loads(raw(1))
    queues.client.hset(queues.unacked_key, "tag-1", json.dumps([held, "", "src"]))
    queues.client.zadd(queues.unacked_index_key, {"tag-1": now - 100})
    queues.client.hset(queues.unacked_key, "tag-2", b"garbage")
    queues.client.zadd(queues.unacked_index_key, {"tag-2": now - 5})
    found = queues.unacked()
    assert found["count"] == 2 and found["undecodable"] == 1 and 99 < found["oldest_age"] < 110
    assert found["messages"][0]["id"] == "id-1" and found["messages"][0]["queue"] == "src"
    assert queues.unacked_names()["src"] == {"shop.pay": 1}
    fill(queues, "src", [raw(5, published=now - 50), raw(6, published=now - 10)])
    fill(queues, "src", [raw(7, published=now - 70)], 9)
    oldest = queues.oldest(["src", "none"])
    assert oldest["src"] is not None and oldest["src"]["id"] == "id-7" and 69 < oldest["src"]["age"] < 80
    assert oldest["none"] is None
    assert [m["id"] for m in queues.peek("src")["messages"]] == ["id-5", "id-6", "id-7"]
    assert [m["id"] for m in queues.peek("src", side="back", count=2)["messages"]] == ["id-7", "id-6"]
    assert [m["id"] for m in queues.peek("src", identity="id-6")["messages"]] == ["id-6"]
    assert "args" not in queues.peek("src")["messages"][0]


def test_unacked_names_by_route_without_a_walk_over_all_keys(queues: RedisQueues) -> None:
    held = json.loads(raw(1))
    for number, (exchange, key) in enumerate([("topics", "a.b"), ("", "src"), ("gone", "x"), ("topics", "a.b")]):
        queues.client.hset(queues.unacked_key, f"tag-{number}", json.dumps([held, exchange, key]))
    queues.client.sadd(f"{queues.key_prefix}_kombu.binding.topics", f"a.b{SEP}^a\\.b${SEP}far")
    queues.client.set(f"{queues.key_prefix}_kombu.binding.gone", "of another program")
    queues.client.config_resetstat()
    assert queues.unacked_names() == {"far": {"shop.pay": 2}, "src": {"shop.pay": 1}, "x": {"shop.pay": 1}}
    used = set(queues.client.info("commandstats"))
    assert "cmdstat_hscan" in used and "cmdstat_scan" not in used


def test_reply_keys_are_listed_only(queues: RedisQueues) -> None:
    key = f"{queues.key_prefix}abc.reply.celery.pidbox"
    queues.client.lpush(key, b"x" * 1000)
    assert queues.reply_keys()["count"] == 0
    time.sleep(1.1)
    found = queues.reply_keys(idle=0)
    assert found["count"] == 1 and found["bytes"] > 1000 and found["keys"][0]["key"] == key
    assert queues.client.exists(key)


def test_paths_that_cannot_be_are_refused_before_anything(queues: RedisQueues, tmp_path: Path) -> None:
    before = sample(queues)
    (tmp_path / "there").write_text("x")
    for path, text in (
        (tmp_path / "no" / "x", "does not exist"),
        (tmp_path, "is a directory"),
        (tmp_path / "there", "exists"),
    ):
        with pytest.raises(PreconditionFailed, match=text):
            queues.purge("src", str(path))
    assert content(queues, "src", 0) == before[0]
    assert (tmp_path / "there").read_text() == "x"
    assert queues.purge("src", str(tmp_path / "there"), overwrite=True).count == 202
