# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Playbooks of the broker itself on real hosts: the trouble is caused first, then the playbook runs, then tasks are
counted."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path

import pytest
from fleet.story import SHOP, Story
from fleet_support import IDLE, KEPT, LOCK, backups, drop_restored, send, verb, waiting
from scorecard import ROWS, WORKERS, Row, all_answer, all_begin, first_begun, forget, mains, noticed, runs

from support import wait_until

pytestmark = pytest.mark.ansible

DATA = "/var/lib/redis"


def run_ids(story: Story) -> tuple[str, str]:
    """Of Redis and of the first worker unit: neither was restarted while they stay the same."""
    unit = story.ssh("worker1", "systemctl show -P MainPID celery-shop-worker@fast-1.service")
    return story.ssh("redis1", "systemctl show -P MainPID redis-server.service"), unit


def test_backup_and_restore(shop: Story, tmp_path: Path) -> None:
    ids = send(shop, IDLE, "shop.update_cart", 20)
    load = shop.start("load", "--rate", "20", "--slow", "0")
    try:
        plan = shop.play("redis_backup", "--check", "--diff")
        assert plan.changed > 0 and "would write" in plan.text and backups(shop) == []
        play = shop.play("redis_backup", celeryops_backup_fetch=str(tmp_path))
    finally:
        load.stop()
    made = play.stats["celeryops_redis_backup"]
    copy = tmp_path / "redis1" / Path(made["file"]).name
    assert copy.parent.stat().st_mode & 0o777 == 0o700
    assert hashlib.sha256(copy.read_bytes()).hexdigest() == made["sha256"] and made["source"] == "aof"
    assert shop.ssh("redis1", f"cd {KEPT} && sha256sum -c *.sha256 && stat -c %a {made['file']}").endswith("600")
    assert shop.password not in play.text

    # What does not do is refused, and nothing was touched.
    before = run_ids(shop)
    shop.ssh("redis1", f"head -c 3000 {made['file']} >{KEPT}/cut.tar.gz; echo PK >{KEPT}/foreign.rdb")
    restore = {"celeryops_file": made["file"], "celeryops_confirm": "redis1"}
    for change, words in [
        ({"celeryops_file": f"{KEPT}/cut.tar.gz"}, "cut off"),
        ({"celeryops_file": f"{KEPT}/foreign.rdb"}, "no snapshot of Redis"),
        ({"celeryops_confirm": "shop"}, "celeryops_confirm: must equal"),
    ]:
        assert words in shop.play("redis_restore", expect=False, **{**restore, **change}).text
    held = {"owner": "another deploy", "token": "t-1", "started": time.time(), "renewed": time.time()}
    shop.redis("SET", LOCK, json.dumps(held), "EX", "300")
    try:
        for playbook, variables in (("redis_restore", restore), ("redis_recover", {})):
            refused = shop.play(playbook, expect=False, **variables)
            words = " ".join(refused.text.split())
            assert "the deploy lock is held by another deploy" in words and refused.changed == 0
            assert "celeryops_deploy_takeover=t-1" in words
    finally:
        shop.redis("DEL", LOCK)
    assert "Nothing was touched" in shop.play("redis_restore", "--check", "--diff", **restore).text
    assert run_ids(shop) == before and waiting(shop, IDLE) == ids[::2] + ids[1::2]

    # Five are taken and three come before the broker's data is lost, all but what waits.
    shop.redis("LTRIM", IDLE, "0", "4")
    later = send(shop, IDLE, "shop.update_cart", 3)
    try:
        done = shop.play("redis_restore", **restore).stats["celeryops_redis_restore"]
        assert sorted(waiting(shop, f"restored.{IDLE}")) == sorted(ids)
        assert done["parked"][IDLE] == 20
        assert sorted(waiting(shop, IDLE)) == sorted(later) == sorted(done["later"]["ids"])
        assert sorted(set(done["repeated"]["ids"]) & set(ids)) == sorted(ids[:10:2])
        assert "dump.rdb" in shop.ssh("redis1", f"ls {done['aside']}")
        assert (
            shop.ssh("worker1", "systemctl is-active celery-shop-worker@fast-1 celery-shop-beat").split()
            == ["active"] * 2
        )
        assert shop.redis("CONFIG", "GET", "appendonly").endswith("yes")
        # Released, they run, and all that is consumed is consumed again.
        shop.play("queue_move", celeryops_queue=f"restored.{IDLE}", celeryops_to="default")
        shop.play("queue_move", celeryops_queue=IDLE, celeryops_to="default")
        deadline, done_ids = time.monotonic() + 30, set()
        while not {*ids, *later} <= done_ids and time.monotonic() < deadline:
            rows = map(json.loads, shop.redis("LRANGE", "shop:ledger:runs", "0", "-1", db=2).splitlines())
            done_ids = {row["id"] for row in rows if row["phase"] != "begin"}
        assert {*ids, *later} <= done_ids
        assert shop.ledger()["run_twice"] == []
    finally:
        # The ledger is in the same Redis and as old as the backup; what the load had on its way is parked.
        drop_restored(shop)
        forget(shop)


def test_the_host_backs_itself_up(shop: Story, tmp_path: Path) -> None:
    timer, no_timer = (verb(name, tmp_path) for name in ("timer", "no_timer"))
    daily = {"celery_redis_backup_calendar": "daily", "celery_redis_keep_backups": 1}
    try:
        assert shop.play(timer, **daily).changed > 0
        assert shop.play(timer, **daily).changed == 0
        assert "celeryops-redis-backup" in shop.ssh("redis1", "systemctl list-timers --no-legend celeryops-*")
        for _run in range(2):
            shop.ssh("redis1", "systemctl start celeryops-redis-backup.service; sleep 1")
        (kept,) = backups(shop)
        assert shop.ssh("redis1", f"tar -tzf {kept} | tail -n 1") == "backup.json"
        shown = shop.ssh(
            "redis1", "systemctl cat celeryops-redis-backup.service; stat -c %a /etc/redis/celeryops-backup.env"
        )
        assert shop.password not in shown and shown.endswith("600")
    finally:
        shop.play(no_timer)
        shop.ssh("redis1", f"rm -rf {KEPT}/*")
    assert not shop.ssh("redis1", "ls /etc/systemd/system/celeryops-redis-backup.*", check=False)


class Answers(threading.Thread):
    """Asks Redis until it answers again: `since` is when."""

    def __init__(self, story: Story) -> None:
        super().__init__()
        self.story, self.since, self.over = story, 0.0, False
        self.start()

    def run(self) -> None:
        while not self.since and not self.over:
            asked = subprocess.run(
                ["timeout", "0.5", "redis-cli", "-h", self.story.address, "PING"], capture_output=True, check=False
            )
            # Without a password it is refused by a Redis that works.
            if b"NOAUTH" in asked.stdout:
                self.since = time.time()
            time.sleep(0.05)


@pytest.mark.parametrize("fault", ["killed", "frozen", "tail cut"])
def test_a_broken_redis_comes_back_and_every_task_is_done(shop: Story, fault: str) -> None:
    load = shop.start("load", "--rate", "20", "--slow", "0.02")
    time.sleep(1)
    unit = "celery-shop-worker@bulk-1.service"
    before = mains(shop)
    if fault == "killed":
        shop.ssh("redis1", "systemctl kill -s KILL redis-server")
    elif fault == "frozen":
        # Its messages are in nobody's hands, and it does not come back by itself.
        shop.ssh("worker2", f"systemctl kill -s KILL {unit}; systemctl stop {unit}")
        shop.ssh("redis1", "kill -STOP $(systemctl show -P MainPID redis-server)")
    else:
        shop.ssh("redis1", "systemctl stop redis-server")
        shop.ssh("redis1", f"printf '*3\\r\\n$5\\r\\nLPU' >>$(ls {DATA}/appendonlydir/*.incr.aof)")
    injected = time.time()
    answers = Answers(shop)
    try:
        # Who is killed is started by systemd before anybody looks.
        seen = None if fault == "killed" else noticed(shop, injected)
        if fault == "tail cut":
            plan = shop.play("redis_recover", "--check", "--diff")
            assert plan.changed > 0 and not answers.since and "Would do: repair" in plan.text
        # Celery 5.7 may end at a lost connection; systemd starts it again, which takes some seconds.
        play = shop.play("redis_recover", celery_worker_revive_patience=5 if fault == "frozen" else 10)
        done = play.stats["celeryops_redis_recover"]
        assert bool(done["copy"]) == (fault == "tail cut")
        assert done["restarted"] == {"worker1": [], "worker2": ["bulk-1"] if fault == "frozen" else []}
        states = {"killed": ("healthy", "loading"), "frozen": ("frozen",), "tail cut": ("aof_truncated",)}
        assert done["state"] in states[fault]
        if fault == "tail cut":
            again = shop.play("redis_recover")
            assert again.changed == 0 and again.stats["celeryops_redis_recover"]["state"] == "healthy"
            print("second run:", round(again.seconds, 1), "s")
        cured = all_begin(shop, answers.since)
    finally:
        answers.over = True
        load.stop()
        shop.ssh("redis1", f"rm -rf {DATA}/before-repair-*")
    try:
        ledger = shop.ledger("--wait", "60")
        begun = first_begun(shop, answers.since)
    finally:
        forget(shop)
    print(f"{fault}: {play.seconds:.1f} s, first tasks {begun}, rescued {done['rescued']}, twice {ledger['run_twice']}")
    assert ledger["lost"] == []
    assert sorted(begun) == WORKERS
    # The one that was killed and stopped has to wait until somebody notices.
    assert max(seconds for node, seconds in begun.items() if fault != "frozen" or node != WORKERS[1]) < 10
    # Twice is only what the worker that was killed had begun.
    gone = {"worker2 bulk-1"} if fault == "frozen" else set()
    for told in ledger["run_twice"]:
        when = datetime.fromisoformat(told.split(": ", 1)[1].split(", ")[0].split()[-1]).timestamp()
        assert gone and when <= answers.since, told
    # Celery 5.7 alone would end at a broker that goes while it holds messages.
    assert {name for name, pid in mains(shop).items() if before[name] != pid} == gone
    assert shop.ssh("worker1", "systemctl is-active celery-shop-beat") == "active"
    told = {
        "killed": "`kill -9` of Redis",
        "frozen": "SIGSTOP of Redis, and `kill -9` of a worker",
        "tail cut": "`systemctl stop` of Redis, and its append-only file cut off",
    }
    remark = "what the killed worker had begun" if ledger["run_twice"] else ""
    ROWS.append(Row(told[fault], "`redis_recover`", seen, cured, ledger, remark))


@pytest.fixture
def small_disk(shop: Story) -> Iterator[None]:
    """Redis keeps its data on a file system of its own, of 64 MB."""
    kept = "/var/lib/redis.kept"
    shop.ssh("redis1", f"systemctl stop redis-server && cp -a {DATA} {kept}")
    shop.mount("redis1", DATA)
    shop.ssh("redis1", f"cp -a {kept}/. {DATA}/ && systemctl start redis-server")
    all_answer(shop)
    yield
    shop.ssh("redis1", f"systemctl stop redis-server; rm -rf {DATA}/ballast {kept} && cp -a {DATA} {kept}")
    shop.unmount("redis1", DATA)
    shop.ssh("redis1", f"rm -rf {DATA}/* && cp -a {kept}/. {DATA}/ && rm -rf {kept} && systemctl start redis-server")
    all_answer(shop)


def fill(story: Story) -> None:
    story.ssh("redis1", f"dd if=/dev/zero of={DATA}/ballast bs=64K status=none; true")


def empty(story: Story) -> None:
    story.ssh("redis1", f"rm {DATA}/ballast")


def limit(story: Story) -> None:
    story.redis("CONFIG", "SET", "maxmemory", "1mb")


def lift(story: Story) -> None:
    story.redis("CONFIG", "SET", "maxmemory", "0")


@pytest.mark.usefixtures("small_disk")
@pytest.mark.parametrize(
    ("fault", "cause", "end", "says"),
    [
        ("its disk is full", fill, empty, ["The file system of /var/lib/redis is full"]),
        ("its memory is full", limit, lift, ["maxmemory", "celery_redis_maxmemory"]),
    ],
    ids=["disk", "memory"],
)
def test_a_redis_that_takes_no_writes_costs_no_task(
    shop: Story, fault: str, cause: Callable[[Story], None], end: Callable[[Story], None], says: list[str]
) -> None:
    load = shop.start("load", "--rate", "20", "--slow", "0.02")
    try:
        time.sleep(3)
        before = mains(shop)
        injected = time.time()
        cause(shop)
        seen = noticed(shop, injected)
        refused = shop.play("redis_recover", expect=False)
        assert all(words in " ".join(refused.text.split()) for words in says), refused.text[-2000:]
        end(shop)
        cured = all_begin(shop, time.time(), 30)
        assert shop.play("redis_recover").stats["celeryops_redis_recover"]["state"] == "healthy"
    finally:
        load.stop()
    ledger = shop.ledger("--wait", "60")
    print(f"{fault}: {cured} s, twice {ledger['run_twice']}, lost {ledger['lost']}")
    forget(shop)
    assert (ledger["lost"], ledger["run_twice"]) == ([], []) and mains(shop) == before
    ROWS.append(Row(f"Redis: {fault}", "a person, as `redis_recover` says", seen, cured, ledger))


def test_the_host_of_redis_reboots(shop: Story) -> None:
    load = shop.start("load", "--rate", "20", "--slow", "0.02")
    try:
        time.sleep(2)
        before = mains(shop)
        shop.reboot("redis1")
        answers = Answers(shop)
        done = shop.play("redis_recover").stats["celeryops_redis_recover"]
        assert done["restarted"] == {"worker1": [], "worker2": []}
        cured = all_begin(shop, answers.since)
    finally:
        load.stop(60)
    ledger = shop.ledger("--wait", "60")
    forget(shop)
    print(f"reboot: {cured} s, twice {ledger['run_twice']}")
    assert (ledger["lost"], ledger["run_twice"]) == ([], []) and cured < 10 and mains(shop) == before
    ROWS.append(Row("the host of Redis reboots", "`redis_recover`", None, cured, ledger))


LATER = """
import datetime, json
from shop.celery import app
from shop.book import SENT
import os, redis
book = redis.Redis.from_url(os.environ["SHOP_LEDGER_URL"])
for number in range(20):
    due = datetime.datetime.now(datetime.timezone.utc) + datetime.timedelta(seconds=60)
    sent = app.send_task("shop.send_reminder", args=[number], queue="email", eta=due)
    known = {"id": sent.id, "task": "shop.send_reminder", "published": None, "eta": due.isoformat()}
    book.rpush(SENT, json.dumps(known))
"""


def test_what_waits_for_its_time_outlasts_a_restart_of_redis_by_site(shop: Story) -> None:
    forget(shop)
    subprocess.run(
        [str(shop.venv / "bin" / "python"), "-c", LATER], cwd=SHOP / "src", env=shop.client_environment(), check=True
    )
    wait_until(lambda: int(shop.redis("HLEN", "unacked")) >= 20, 20, "the workers hold them")
    before = shop.ssh("redis1", "systemctl show -P MainPID redis-server")
    try:
        play = shop.play("site", celeryops_release="v1", celery_redis_maxclients=9999)
        assert play.changed > 0 and shop.ssh("redis1", "systemctl show -P MainPID redis-server") != before
        ledger = shop.ledger("--wait", "120")
        assert (ledger["sent"], ledger["lost"], ledger["run_twice"]) == (20, [], [])
        assert shop.redis("HLEN", "unacked") == "0", "they did not wait for the visibility timeout"
    finally:
        shop.play("site", celeryops_release="v1")
        forget(shop)


def test_damage_in_the_midst_is_left_to_a_person(shop: Story) -> None:
    forget(shop)
    ids = send(shop, IDLE, "shop.update_cart", 200)
    backup = shop.play("redis_backup").stats["celeryops_redis_backup"]["file"]
    shop.ssh("redis1", f"systemctl stop redis-server; cp -a {DATA} /var/lib/redis.kept")
    restored = False
    try:
        file = shop.ssh("redis1", f"ls {DATA}/appendonlydir/*.incr.aof")
        # A third of the file: fewer bytes may all lie within one value, which nobody could tell from data.
        third = int(shop.ssh("redis1", f"stat -c %s {file}")) // 3
        damage = (
            f"head -c {third} /dev/zero | dd of={file} bs=64K oflag=seek_bytes seek={third} conv=notrunc status=none"
        )
        shop.ssh("redis1", damage)
        injected = time.time()
        before = shop.ssh("redis1", f"sha256sum {file}")
        seen = noticed(shop, injected)
        refused = shop.play("redis_recover", expect=False)
        assert "damaged in its midst" in refused.text and "celeryops_confirm, the name" in refused.text
        assert shop.ssh("redis1", f"sha256sum {file}") == before
        assert (
            "celeryops_confirm: must equal" in shop.play("redis_recover", expect=False, celeryops_confirm="shop").text
        )
        # The person has a backup.
        began = time.time()
        done = shop.play("redis_restore", celeryops_file=backup, celeryops_confirm="redis1")
        restored = True
        assert done.stats["celeryops_redis_restore"]["parked"][IDLE] == len(ids)
        shop.play("queue_move", celeryops_queue=f"restored.{IDLE}", celeryops_to="default")
        load = shop.start("load", "--rate", "20", "--slow", "0.02")
        try:
            cured = all_begin(shop, began, 60)
        finally:
            load.stop()
        ledger = shop.ledger("--wait", "60")
        finished = {row["id"] for row in runs(shop) if row["phase"] != "begin"}
        assert set(ids) <= finished and (ledger["lost"], ledger["run_twice"]) == ([], [])
        ROWS.append(Row("the append-only file of Redis damaged in its midst", "`redis_restore`", seen, cured, ledger))
    finally:
        if not restored:
            shop.ssh("redis1", f"systemctl stop redis-server; rm -rf {DATA}/*; cp -a /var/lib/redis.kept/. {DATA}/")
            shop.ssh("redis1", "systemctl start redis-server")
        shop.ssh("redis1", "rm -rf /var/lib/redis.kept")
        all_answer(shop)
        drop_restored(shop)
        forget(shop)


LEAKED = 9500  # the workers and the playbook need some of the 10,000 that Redis takes


def test_leaked_connections_are_closed_and_the_workers_keep_theirs(shop: Story) -> None:
    before = run_ids(shop)
    leak = (
        "import resource, socket, time\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (10000, 10000))\n"
        f"found = [socket.create_connection(({shop.address!r}, 6379)) for _ in range({LEAKED})]\n"
        "print('ready', flush=True)\ntime.sleep(60)\n"
    )
    load = shop.start("load", "--rate", "20", "--slow", "0.02")
    with subprocess.Popen([sys.executable, "-c", leak], stdout=subprocess.PIPE, text=True) as leaking:
        try:
            assert leaking.stdout and leaking.stdout.readline() == "ready\n"
            time.sleep(11)
            seen = shop.play("redis_clients")
            assert seen.changed == 0
            assert seen.stats["celeryops_redis_clients"]["roles"]["unused"]["count"] >= LEAKED
            plan = shop.play("redis_clients", "--check", celeryops_idle=10, celeryops_client_roles=["unused"])
            assert plan.changed == 1 and plan.stats["celeryops_redis_clients"]["now"] > LEAKED
            closing = shop.play("redis_clients", celeryops_idle=10)
            done = closing.stats["celeryops_redis_clients"]
            assert done["closed"]["count"] >= LEAKED and done["now"] < 200
            assert "celeryops_idle" in shop.play("redis_clients", expect=False, celeryops_idle=3).text
        finally:
            leaking.kill()
            load.stop()
    ledger = shop.ledger("--wait", "60")
    assert (ledger["lost"], ledger["run_twice"]) == ([], [])
    assert run_ids(shop) == before
    ROWS.append(Row(f"{LEAKED} leaked connections", "`redis_clients`", seen.seconds, closing.seconds, ledger))


def test_the_groups_of_the_inventory_may_have_other_names(shop: Story, tmp_path: Path) -> None:
    other = tmp_path / "other.yml"
    names = {"celeryops_worker_group": "crew", "celeryops_beat_group": "clock"}
    groups = {name: {"hosts": {"worker2": {}}} for name in names.values()}
    other.write_text(json.dumps({"all": {"vars": names, "children": groups}}))
    play = shop.play("redis_recover", "-i", str(other))
    assert play.changed == 0 and play.stats["celeryops_redis_recover"]["restarted"] == {"worker2": []}
    assert "worker1" not in play.text.partition("PLAY RECAP")[2]
