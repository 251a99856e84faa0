# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Backups of a real Redis with an append-only file: made under writes, judged, put back; and what would run again.

MESSAGES=1000000 in the environment makes the last test as large as the one that docs/redis-backup.md reports.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import signal
import socket
import subprocess
import tarfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from queue_support import content, fill, raw

from ansible_collections.celeryops.runbook.plugins.module_utils.engine import backup, replay, restore
from ansible_collections.celeryops.runbook.plugins.module_utils.engine.connection import Broker, BrokerSpec
from ansible_collections.celeryops.runbook.plugins.module_utils.engine.control import Control
from ansible_collections.celeryops.runbook.plugins.module_utils.engine.errors import (
    AuthenticationFailed,
    CeleryOpsError,
    ConnectionFailed,
    PreconditionFailed,
)
from ansible_collections.celeryops.runbook.plugins.module_utils.engine.queues import RedisQueues
from support import RedisServer


class Lab:
    """One Redis with an append-only file, and a directory for its backups."""

    def __init__(self, place: Path) -> None:
        self.redis = RedisServer("--appendonly", "yes", password="sesame", directory=place / "data")
        self.server = backup.Server(self.redis.port, "sesame")
        self.kept = place / "kept"
        self.kept.mkdir()
        self.redis.start()

    @property
    def client(self) -> Any:
        import redis

        return redis.Redis(port=self.redis.port, password="sesame")

    def make(self, **options: Any) -> backup.Backup:
        return backup.make(self.server, str(self.kept), **options)

    def put(self, path: str, **options: Any) -> dict[str, Any]:
        settings = self.server.settings()
        plan = self.judge(path, **options)
        return restore.put(plan, settings, self.server, self.redis.stop, lambda: void(self.redis.start()), timeout=20)

    def judge(self, path: str, **options: Any) -> restore.Plan:
        given = {"port": self.redis.port, "host": socket.gethostname(), **options}
        return restore.judge(path, self.server.settings(), **given)


def void(_value: object) -> None:
    return None


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    made = Lab(tmp_path)
    yield made
    made.redis.stop()


def whole(lab: Lab) -> str:
    """A checksum of every list in database 0."""
    digest = hashlib.sha256()
    for key in sorted(lab.client.keys("*")):
        digest.update(key + b"\0" + b"\0".join(lab.client.lrange(key, 0, -1)))
    return digest.hexdigest()


def test_a_backup_made_under_writes_is_whole_and_comes_back(lab: Lab) -> None:
    queues = RedisQueues(lab.client)
    for step in (0, 6):
        fill(queues, "orders", [raw(step * 10_000 + number) for number in range(2000)], step)
    before, stop = whole(lab), threading.Event()

    def write() -> None:
        client = lab.client
        while not stop.is_set():
            client.hincrby("counter", "n", 1)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        made = lab.make()
    finally:
        stop.set()
        writer.join()
    assert made.note["source"] == "aof" and made.note["rdb"]["keys"] == 3
    assert made.sha256 == hashlib.sha256(Path(made.path).read_bytes()).hexdigest()
    check = subprocess.run(["sha256sum", "-c", f"{made.path}.sha256"], cwd=lab.kept, capture_output=True, check=False)
    assert check.returncode == 0
    assert os.stat(made.path).st_mode & 0o777 == 0o600 and not list(lab.kept.glob("*.partial"))

    lab.client.flushall()
    lab.client.lpush("later", "x")
    done = lab.put(made.path)
    assert done["loaded"] == 3 and lab.client.delete("counter") == 1
    assert whole(lab) == before
    assert not lab.client.exists("later")
    # The append-only file goes on from it: nothing is lost by the next crash.
    lab.client.lpush("orders", "newest")
    lab.redis.stop()
    lab.redis.start()
    assert lab.client.llen("orders") == 2001
    aside = Path(done["aside"])
    assert {"appendonlydir", "dump.rdb"} == {path.name for path in aside.iterdir()}
    assert not list(Path(lab.redis.directory).glob("restore-*"))


def test_the_append_only_file_of_a_backup_comes_back_too(lab: Lab) -> None:
    lab.client.rpush("orders", *range(500))
    before, made = whole(lab), lab.make()
    lab.client.flushall()
    assert lab.put(made.path, source="aof")["loaded"] == 1
    assert whole(lab) == before


def test_only_so_many_are_kept_and_a_failed_one_removes_none(lab: Lab) -> None:
    lab.client.rpush("orders", "a")
    for stamp in ("20250101T000000Z", "20250102T000000Z", "20250103T000000Z"):
        (lab.kept / f"redis-{stamp}.tar.gz").write_text("old")
        (lab.kept / f"redis-{stamp}.tar.gz.sha256").write_text("old")
    (lab.kept / "other-20240101T000000Z.tar.gz").write_text("not ours")
    dry = lab.make(keep=2, dry=True)
    assert len(dry.removed) == 2 and len(list(lab.kept.iterdir())) == 7
    with pytest.raises(PreconditionFailed, match="is no directory"):
        backup.make(lab.server, str(lab.kept / "redis-20250101T000000Z.tar.gz" / "below"), keep=1)
    assert len(list(lab.kept.iterdir())) == 7
    made = lab.make(keep=2)
    assert sorted(path.name for path in lab.kept.glob("*.tar.gz")) == sorted(
        ["redis-20250103T000000Z.tar.gz", os.path.basename(made.path), "other-20240101T000000Z.tar.gz"]
    )


def test_a_place_that_cannot_take_it_is_refused_before_redis_is_asked(lab: Lab, tmp_path: Path) -> None:
    lab.client.rpush("orders", b"x" * (1 << 20))
    place = tmp_path / "small"
    place.mkdir()
    saved = lab.server.info("persistence")["rdb_saves"]
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(place)], check=True)
    try:
        with pytest.raises(PreconditionFailed, match="has 0 MiB free and 2 MiB may be needed"):
            backup.make(lab.server, str(place / "below"), keep=1)
        subprocess.run(["mount", "-o", "remount,ro", str(place)], check=True)
        with pytest.raises(PreconditionFailed, match=f"{place} is not writable"):
            backup.make(lab.server, str(place / "below"), keep=1)
        assert list(place.iterdir()) == []
    finally:
        subprocess.run(["umount", str(place)], check=True)
    assert lab.server.info("persistence")["rdb_saves"] == saved and list(lab.kept.iterdir()) == []


def test_a_snapshot_that_fails_is_an_error(lab: Lab) -> None:
    lab.client.rpush("orders", "a")
    folder = Path(lab.redis.directory)
    (folder / "dump.rdb").mkdir()  # Redis writes its snapshot and cannot give it this name
    with pytest.raises(CeleryOpsError, match="could not write its snapshot"):
        lab.make()
    assert list(lab.kept.iterdir()) == []


def test_what_does_not_do_is_refused_before_anything_is_touched(lab: Lab, tmp_path: Path) -> None:
    lab.client.rpush("orders", *range(300))
    made = lab.make()
    run_id = lab.server.info("server")["run_id"]
    data = Path(made.path).read_bytes()
    cut, foreign, text = tmp_path / "cut.tar.gz", tmp_path / "foreign.rdb", tmp_path / "text"
    cut.write_bytes(data[:-200])
    foreign.write_bytes(b"PK\x03\x04 this is no snapshot")
    text.write_bytes(b"")
    with tarfile.open(made.path) as tar:
        member = tar.extractfile(backup.DUMP)
        assert member is not None
        dump = member.read()
        note = json.loads(tar.extractfile(backup.NOTE).read())  # type: ignore[union-attr]
    short, newer = tmp_path / "short.rdb", tmp_path / "newer.rdb"
    short.write_bytes(dump[:-30])
    newer.write_bytes(b"REDIS0099" + dump[9:])
    changed = tmp_path / "changed.tar.gz"
    with tarfile.open(changed, "w:gz") as tar:
        for name, body in ((backup.DUMP, dump[:-1] + b"x"), (backup.NOTE, json.dumps(note).encode())):
            entry = tarfile.TarInfo(name)
            entry.size = len(body)
            tar.addfile(entry, io.BytesIO(body))
    own = {"accept": ["origin"]}
    for path, options, words in [
        (cut, {}, "damaged or cut off|cut off"),
        (changed, {}, "do not fit their checksums"),
        (foreign, own, "no snapshot of Redis"),
        (text, own, "no snapshot of Redis"),
        (short, own, "damaged or cut off"),
        (newer, own, "written by a newer Redis"),
        (tmp_path / "none", {}, "cannot read"),
        (Path(made.path), {"host": "elsewhere"}, "add origin to accept"),
    ]:
        with pytest.raises(PreconditionFailed, match=words):
            lab.judge(str(path), **options)
    good = tmp_path / "good.rdb"
    good.write_bytes(dump)
    with pytest.raises(PreconditionFailed, match="bare RDB"):
        lab.judge(str(good))
    assert lab.judge(str(good), **own).note["rdb"]["keys"] == 1
    assert lab.server.info("server")["run_id"] == run_id and len(list(Path(lab.redis.directory).glob("*restore*"))) == 0


def test_data_that_does_not_load_gives_way_to_the_old(lab: Lab) -> None:
    lab.client.rpush("orders", "kept")
    made = lab.make()
    lab.client.rpush("orders", "newer")
    plan, settings = lab.judge(made.path), lab.server.settings()
    starts = []

    def start() -> None:
        if not starts:  # what a full disk does between the unpacking and the start
            starts.append(1)
            base = Path(settings["dir"], "appendonlydir", "appendonly.aof.1.base.rdb")
            with open(base, "r+b") as handle:
                handle.truncate(30)
            with pytest.raises(TimeoutError):
                lab.redis.start()
            return
        lab.redis.start()

    with pytest.raises(CeleryOpsError, match=r"did not load.*runs with the data it had before"):
        restore.put(plan, settings, lab.server, lab.redis.stop, start, timeout=1)
    assert lab.client.lrange("orders", 0, -1) == [b"kept", b"newer"]


def test_settings_are_read_from_the_files_when_redis_is_down(tmp_path: Path) -> None:
    (tmp_path / "more.conf").write_text('appendonly yes\n# dir /nowhere\ndir "/srv/my redis"\nrequirepass "a b"\n')
    main = tmp_path / "redis.conf"
    main.write_text(f"dir /var/lib/redis\nappendonly no\nsave 3600 1 300 100\ninclude {tmp_path}/more.conf\n")
    found = backup.read_settings(str(main))
    assert (found["dir"], found["appendonly"], found["appenddirname"]) == ("/srv/my redis", "yes", "appendonlydir")
    with pytest.raises(PreconditionFailed, match="cannot read"):
        backup.read_settings(str(tmp_path / "none"))


def test_each_way_of_not_answering_has_its_own_error(lab: Lab) -> None:
    with pytest.raises(AuthenticationFailed, match="celeryops_broker_url"):
        backup.Server(lab.redis.port, "wrong").info("server")
    with pytest.raises(AuthenticationFailed):
        backup.Server(lab.redis.port).info("server")
    assert lab.redis.process
    lab.redis.process.send_signal(signal.SIGSTOP)
    try:
        with pytest.raises(backup.Wedged, match="did not answer"):
            backup.Server(lab.redis.port, "sesame", 0.5).info("server")
    finally:
        lab.redis.process.send_signal(signal.SIGCONT)
    lab.redis.stop()
    with pytest.raises(ConnectionFailed, match="Redis is down"):
        lab.server.info("server")


def expiring(number: int, queue: str, expires: str) -> bytes:
    document = json.loads(raw(number, queue))
    document["headers"]["expires"] = expires
    return json.dumps(document).encode()


def hold(client: Any, number: int) -> None:
    """As a worker does with a message that it has taken."""
    client.hset("unacked", f"tag-{number}", json.dumps([json.loads(raw(number, "orders")), "", "orders"]))
    client.zadd("unacked_index", {f"tag-{number}": time.time()})


@pytest.mark.parametrize("park", [True, False])
def test_what_would_run_again_is_parked_named_and_nothing_is_lost(lab: Lab, tmp_path: Path, park: bool) -> None:
    spec = BrokerSpec.build(url=lab.redis.url())
    moment, files = replay.stamp(), str(tmp_path / "kept")
    with Broker(spec) as broker:
        queues = RedisQueues.of(broker)
        fill(queues, "orders", [raw(number, "orders") for number in range(10)])
        fill(
            queues,
            "orders",
            [expiring(50, "orders", "2020-01-01T00:00:00"), expiring(51, "orders", "2099-01-01T00:00:00Z")],
        )
        hold(broker.redis, 20)
        dead = json.loads(raw(60, "orders"))
        dead["headers"]["celeryops_dead"] = {"time": 1.0}
        fill(queues, "orders.dead", [json.dumps(dead).encode()])
        broker.redis.set("unacked_mutex", "someone")
        broker.redis.set("celeryops:lock:deploy:shop", "dead")
        made = lab.make()
        # After the backup: three are done, two come.
        for _number in range(3):
            broker.redis.rpop("orders")
        fill(queues, "orders", [raw(30, "orders"), raw(31, "orders")])
        # Of those that were taken one failed, another is in the hands of a worker that was killed.
        failed = json.loads(raw(0, "orders"))
        failed["headers"]["celeryops_dead"] = {"time": 2.0}
        fill(queues, "orders.dead", [json.dumps(failed).encode()])
        hold(broker.redis, 32)
        with Control(broker, timeout=0.5) as control:
            told = replay.note(queues, control, str(tmp_path / "note.gz"), files, moment)
        assert told["waiting"] == {"orders": 13, "orders.dead": 2} and told["held"] == 0
    lab.put(made.path)
    with Broker(spec) as broker, Control(broker, timeout=0.5) as control:
        queues = RedisQueues.of(broker)
        since = queues.now()
        fill(queues, "orders", [raw(40, "orders", published=since + 1)])  # a producer goes on
        options = {"before": replay.read_note(str(tmp_path / "note.gz")), "since": since, "directory": files}
        done = replay.settle(queues, control, moment=moment, park=park, **options)
        assert done.expired == ["id-50"]
        assert sorted(done.repeated or []) == ["id-0", "id-1", "id-2"]
        assert sorted(done.later) == ["id-0", "id-30", "id-31", "id-32"] and done.given_back == 1
        assert done.locks == ["celeryops:lock:deploy:shop", "unacked_mutex"]
        restored = {f"id-{number}" for number in (*range(10), 20, 51)}
        live = {json.loads(one)["headers"]["id"] for one in content(queues, "orders")}
        aside = {json.loads(one)["headers"]["id"] for one in content(queues, "restored.orders")}
        if park:
            assert (live, aside) == ({"id-30", "id-31", "id-32", "id-40"}, restored)
        else:
            assert (live, aside) == ({"id-30", "id-31", "id-32", "id-40"} | restored, set())
        letters = [json.loads(one)["headers"]["id"] for one in content(queues, "orders.dead")]
        assert sorted(letters) == ["id-0", "id-60"]
        assert not broker.redis.exists("unacked", "unacked_index")
        again = replay.settle(queues, control, moment=moment + "b", park=park, **options)
        assert (again.later, again.expired, again.given_back) == ([], [], 0)


def test_a_restore_that_was_cut_short_forgets_nothing(lab: Lab, tmp_path: Path) -> None:
    """Killed after the data was replaced and run again: what came after the backup is still put back, once."""
    spec = BrokerSpec.build(url=lab.redis.url())
    path, files = str(tmp_path / "note.gz"), str(lab.kept)
    with Broker(spec) as broker, Control(broker, timeout=0.5) as control:
        queues = RedisQueues.of(broker)
        fill(queues, "orders", [raw(number, "orders") for number in range(3)])
        made = lab.make()
        fill(queues, "orders", [raw(3, "orders")])
        replay.note(queues, control, path, files, "1")
        # Before anything was replaced it may be noted again: what was taken meanwhile is not put back.
        broker.redis.rpop("orders")
        replay.note(queues, control, path, files, "2")
        (noted,) = replay.read_note(path)["saved"]["orders"].values()
        assert sorted(noted) == ["id-1", "id-2", "id-3"]
    lab.put(made.path)
    with Broker(spec) as broker, Control(broker, timeout=0.5) as control:
        queues = RedisQueues.of(broker)
        fill(queues, "orders", [raw(4, "orders")])
        replay.note(queues, control, path, files, "3")
    time.sleep(1)  # directories have the second in their name
    lab.put(made.path)
    with Broker(spec) as broker, Control(broker, timeout=0.5) as control:
        queues = RedisQueues.of(broker)
        before = replay.read_note(path)
        done = replay.settle(queues, control, before=before, since=queues.now(), directory=files, moment="4")
        assert sorted(json.loads(one)["headers"]["id"] for one in content(queues, "orders")) == ["id-3", "id-4"]
        assert sorted(done.later) == ["id-3", "id-4"] and done.parked == {"orders": 3}


IDENTITY = re.compile(rb'"id": ?"([^"]*)"')


def digests(queues: RedisQueues, prefix: str = "") -> dict[tuple[str, int], tuple[int, str, str]]:
    """Of each list the number of messages, and checksums of them and of their ids, in their order."""
    found = {}
    for queue in ("orders", "mails"):
        for step in (0, 6):
            key, content, names = queues.key(prefix + queue, step), hashlib.sha256(), hashlib.sha256()
            count = queues.client.llen(key)
            for start in range(0, count, 5000):
                for message in queues.client.lrange(key, start, start + 4999):
                    content.update(message)
                    names.update(b"".join(IDENTITY.findall(message)))
            found[queue, step] = (count, names.hexdigest(), content.hexdigest())
    return found


def test_a_large_backup_comes_back_message_by_message(lab: Lab, tmp_path: Path) -> None:
    count = int(os.environ.get("MESSAGES", "20000"))
    spec, path, files = BrokerSpec.build(url=lab.redis.url()), str(tmp_path / "note.gz"), str(lab.kept)
    seconds = {}

    def timed(name: str, begun: float) -> None:
        seconds[name] = round(time.monotonic() - begun, 1)

    with Broker(spec) as broker, Control(broker, timeout=0.5) as control:
        queues = RedisQueues.of(broker)
        for part, start in enumerate(range(0, count, 5000)):
            numbers = range(start, min(start + 5000, count))
            queue = ("orders", "mails")[part % 2]
            fill(queues, queue, [raw(number, queue) for number in numbers], (0, 6)[part // 2 % 2])
        before = digests(queues)
        assert sum(found[0] for found in before.values()) == count
        begun = time.monotonic()
        made = lab.make()
        timed("backup", begun)
        taken = {json.loads(one)["headers"]["id"] for one in broker.redis.rpop("orders", 2000)}
        begun = time.monotonic()
        replay.note(queues, control, path, files, "1")
        timed("note", begun)
    begun = time.monotonic()
    lab.put(made.path)
    timed("restore", begun)
    with Broker(spec) as broker, Control(broker, timeout=0.5) as control:
        queues = RedisQueues.of(broker)
        assert digests(queues) == before
        begun = time.monotonic()
        known = replay.read_note(path)
        done = replay.settle(queues, control, before=known, since=queues.now(), directory=files, moment="2")
        timed("settle", begun)
        parked = digests(queues, replay.PARKED)  # under another routing key
        assert {key: found[:2] for key, found in parked.items()} == {key: found[:2] for key, found in before.items()}
        assert sum(found[0] for found in digests(queues).values()) == 0
    assert sum(done.parked.values()) == count and len(taken) == 2000
    assert set(done.repeated or []) == taken and len(done.repeated or []) == 2000
    print(f"{count} messages, {made.bytes >> 20} MiB, seconds: {seconds}")
