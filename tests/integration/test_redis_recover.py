# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Each fault of a real Redis is caused, told from the others, and cured as far as no decision is needed."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ansible_collections.celeryops.runbook.plugins.module_utils.engine import backup, recover
from support import RedisServer


class Lab:
    def __init__(self, place: Path) -> None:
        arguments = ("--appendonly", "yes", "--appendfsync", "always", "--aof-load-truncated", "no")
        self.redis = RedisServer(*arguments, password="sesame", directory=place).start()
        self.server = backup.Server(self.redis.port, "sesame", 1.0)
        self.settings = self.server.settings()

    @property
    def pid(self) -> int:
        process = self.redis.process
        return process.pid if process and process.poll() is None else 0

    def cli(self, *command: str) -> str:
        return self.redis.cli("--no-auth-warning", *command)

    def look(self, **options: Any) -> recover.Finding:
        return recover.diagnose(options.get("server", self.server), self.settings, self.pid)

    @property
    def last(self) -> Path:
        return Path(self.settings["dir"], backup.aof_files(self.settings)[-1])

    def fill(self, count: int = 200) -> None:
        for number in range(count):
            self.cli("LPUSH", "orders", f"message {number}")


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    made = Lab(tmp_path)
    yield made
    if made.pid:
        made.redis.process.send_signal(signal.SIGCONT)  # type: ignore[union-attr]
    made.redis.stop()


def test_a_sound_one_and_one_that_is_down(lab: Lab) -> None:
    assert lab.look().state == "healthy"
    lab.redis.stop()
    found = lab.look()
    assert (found.state, found.cure) == ("down", "start")


def test_a_frozen_one(lab: Lab) -> None:
    assert lab.redis.process
    lab.redis.process.send_signal(signal.SIGSTOP)
    found = lab.look()
    assert (found.state, found.cure) == ("frozen", "continue")
    lab.redis.process.send_signal(signal.SIGCONT)
    assert lab.look().state == "healthy"


def test_a_busy_one_and_one_that_hangs(lab: Lab) -> None:
    lab.cli("CONFIG", "SET", "busy-reply-threshold", "100")
    endless = [
        "redis-cli", "-p", str(lab.redis.port), "EVAL", "while true do end", "0",
    ]  # fmt: skip
    environment = {**os.environ, "REDISCLI_AUTH": "sesame"}
    with subprocess.Popen(endless, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment) as script:
        deadline = 50
        while lab.look().state != "busy" and deadline:
            deadline -= 1
        assert lab.look().state == "busy" and "SCRIPT KILL" in lab.look().human
        lab.cli("SCRIPT", "KILL")
        script.wait(5)
    assert lab.look().state == "healthy"


def test_the_tail_cut_off_is_repaired_after_a_copy(lab: Lab) -> None:
    lab.fill()
    lab.redis.stop()
    whole = lab.last.read_bytes()
    lab.last.write_bytes(whole[:-7])
    found = lab.look()
    assert (found.state, found.cure) == ("aof_truncated", "repair")
    done = recover.repair(lab.settings, found)
    assert 0 < done["cut"] < 100
    assert Path(done["copy"], "appendonlydir", lab.last.name).read_bytes() == whole[:-7]
    lab.redis.start()
    assert lab.cli("LLEN", "orders") == "199"


def test_zeros_at_the_end_are_a_cut_tail_too(lab: Lab) -> None:
    lab.fill(20)
    lab.redis.stop()
    with lab.last.open("ab") as handle:
        handle.write(b"\0" * 4096)
    found = lab.look()
    assert found.state == "aof_truncated"
    recover.repair(lab.settings, found)
    lab.redis.start()
    assert lab.cli("LLEN", "orders") == "20"


def test_damage_in_the_midst_is_left_to_a_person(lab: Lab) -> None:
    lab.fill()
    lab.redis.stop()
    whole = bytearray(lab.last.read_bytes())
    middle = len(whole) // 2
    whole[middle : middle + 40] = b"#" * 40
    lab.last.write_bytes(whole)
    found = lab.look()
    assert (found.state, found.cure) == ("aof_damaged", "") and "celeryops_confirm" in found.human
    assert lab.last.read_bytes() == whole
    done = recover.repair(lab.settings, found)  # what a person may decide
    assert done["cut"] > 1000 and Path(done["copy"], "appendonlydir", lab.last.name).read_bytes() == whole
    lab.redis.start()
    assert 50 < int(lab.cli("LLEN", "orders")) < 150


def test_a_damaged_base_is_not_repaired(lab: Lab) -> None:
    lab.fill(50)
    lab.redis.stop()
    base = Path(lab.settings["dir"], backup.aof_files(lab.settings)[1])
    base.write_bytes(base.read_bytes()[:30])
    found = lab.look()
    assert (found.state, found.cure) == ("base_damaged", "") and "redis_restore" in found.human


def test_out_of_memory_wrong_password_and_a_replica(lab: Lab) -> None:
    lab.cli("CONFIG", "SET", "maxmemory", "100kb")
    found = lab.look()
    assert found.state == "out_of_memory" and "102400" in found.human
    lab.cli("CONFIG", "SET", "maxmemory", "0")
    assert lab.look(server=backup.Server(lab.redis.port, "wrong")).state == "wrong_password"
    lab.cli("REPLICAOF", "127.0.0.1", "1")
    found = lab.look()
    assert found.state == "replica" and "127.0.0.1:1" in found.human


def test_no_room_for_another_client(lab: Lab) -> None:
    lab.cli("CONFIG", "SET", "maxclients", "20")
    leaked = [socket.create_connection(("127.0.0.1", lab.redis.port)) for _number in range(25)]
    assert lab.look().state == "max_clients"
    for one in leaked:
        one.close()


def test_a_full_disk_is_told_from_a_crash(tmp_path: Path) -> None:
    place = tmp_path / "small"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", str(place)], check=True)
    try:
        lab = Lab(place)
        lab.fill(5)
        (place / "log").write_bytes(b"x" * (9 << 20))
        lab.redis.process.kill()  # type: ignore[union-attr]
        lab.redis.stop()
        found = lab.look()
        assert found.state == "disk_full" and str(place) in found.human
        (place / "log").unlink()
        assert lab.look().state == "down"
        lab.redis.start()
        assert lab.cli("LLEN", "orders") == "5"
        lab.redis.stop()
    finally:
        subprocess.run(["umount", str(place)], check=True)


def test_loading_and_a_failed_snapshot_are_read_from_what_it_says(lab: Lab) -> None:
    assert recover.judge({"loading": "1", "loading_loaded_perc": "12.5"}, lab.settings).cure == "wait"
    Path(lab.settings["dir"], "dump.rdb").mkdir()
    lab.cli("SET", "a", "1")
    lab.cli("BGSAVE")
    states = set()
    for _look in range(100):
        states.add(lab.look().state)
        if "snapshot_failed" in states:
            break
    assert "snapshot_failed" in states
