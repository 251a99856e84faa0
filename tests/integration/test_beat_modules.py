# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The modules for beat and its schedule, run by Ansible: real processes, a real beat, real workers."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support import TESTS, Ansible, LaunchedBeat, RedisServer, Worker, wait_until, workers

pytestmark = pytest.mark.ansible

NAME = "labshop"
APP = "labshop.celery:app"
SCHEDULE = {
    "often": {"task": "lab.add", "schedule": 2.0, "args": [1, 2], "options": {"queue": "often"}},
    "rare": {"task": "lab.add", "schedule": 3600.0, "args": [3, 4], "options": {"queue": "taken", "priority": 3}},
    "lonely": {"task": "lab.add", "schedule": 3600.0, "args": [3, 4], "options": {"queue": "lonely"}},
}


def began(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])


class Strays:
    """Programs that look like beats of an application which no fleet has."""

    def __init__(self, place: Path) -> None:
        self.script = place / "celery"
        self.processes: list[subprocess.Popen[bytes]] = []

    def start(self, code: str = "import time; time.sleep(60)") -> subprocess.Popen[bytes]:
        self.script.write_text(code)
        process = subprocess.Popen(
            [sys.executable, str(self.script), "-A", APP, "beat"], stdout=subprocess.PIPE, start_new_session=True
        )
        self.processes.append(process)
        return process


@pytest.fixture
def strays(tmp_path: Path) -> Iterator[Strays]:
    found = Strays(tmp_path)
    try:
        yield found
    finally:
        for process in found.processes:
            process.kill()
            process.wait()


def stop(ansible: Ansible, *processes: tuple[int, int], **options: Any) -> dict[str, Any]:
    wanted = [{"pid": pid, "began": ticks} for pid, ticks in processes]
    arguments = {"name": NAME, "app": APP, "processes": wanted, "stop_timeout": 1}
    return ansible.module("celery_beat_stop", arguments, **options)


def test_a_stray_is_ended_and_no_other_process_of_its_number(ansible: Ansible, strays: Strays) -> None:
    stray = strays.start()
    wait_until(lambda: b"beat" in Path(f"/proc/{stray.pid}/cmdline").read_bytes(), 10)
    ticks = began(stray.pid)
    later = stop(ansible, (stray.pid, ticks + 1))
    assert not later["changed"] and stray.poll() is None
    would = stop(ansible, (stray.pid, ticks), check=True)
    assert would["changed"] and would["ended"] == [stray.pid] and stray.poll() is None
    done = stop(ansible, (stray.pid, ticks))
    assert (done["changed"], done["ended"], done["killed"]) == (True, [stray.pid], []) and stray.wait(5) == -15
    assert not stop(ansible, (stray.pid, ticks))["changed"]
    refused = stop(ansible, (os.getpid(), began(os.getpid())))
    assert refused["failed"] and "no beat" in refused["msg"]


def test_a_stray_that_does_not_listen_is_killed(ansible: Ansible, strays: Strays) -> None:
    deaf = "import signal, time; signal.signal(15, signal.SIG_IGN); print(1, flush=True); time.sleep(60)"
    stray = strays.start(deaf)
    assert stray.stdout and stray.stdout.readline()
    stray.send_signal(19)
    done = stop(ansible, (stray.pid, began(stray.pid)))
    assert done["killed"] == [stray.pid] and stray.wait(5) == -9


def test_a_stray_that_somebody_starts_again_is_told(ansible: Ansible, strays: Strays, tmp_path: Path) -> None:
    stray = strays.start()
    script = tmp_path / "watch.py"
    script.write_text(
        "import subprocess, sys, time\n"
        f"while True:\n    if not subprocess.run(['kill', '-0', '{stray.pid}'], stderr=-3).returncode:\n"
        "        time.sleep(0.05)\n        continue\n"
        f"    subprocess.run([sys.executable, {str(strays.script)!r}, '-A', {APP!r}, 'beat'])\n"
    )
    watch = subprocess.Popen([sys.executable, str(script)], start_new_session=True)
    try:
        # A zombie still has its number: who starts it anew must have taken note of its end.
        ticks = began(stray.pid)
        threading.Thread(target=stray.wait, daemon=True).start()
        told = stop(ansible, (stray.pid, ticks))
        assert told["failed"] and "something starts it again" in told["msg"] and told["ended"] == [stray.pid]
    finally:
        os.killpg(watch.pid, 9)
        watch.wait()


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    with RedisServer() as server:
        yield server


@pytest.fixture(scope="module")
def beat(server: RedisServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A beat that leads, a worker, and the environment file of both; its directory."""
    place = tmp_path_factory.mktemp("beat")
    values = {"CELERY_BROKER_URL": server.url(), "LABAPP_SCHEDULE": json.dumps(SCHEDULE)}
    file = place / "secret.env"
    file.touch(mode=0o600)
    file.write_text("".join(f"{key}={value}\n" for key, value in values.items()))
    worker = Worker(
        server.url(), "one@lab", pool="threads", queues="taken", arguments=("--include", "celeryops.worker")
    )
    with workers(worker, LaunchedBeat(server.url(), "host1", place / "schedule", SCHEDULE)):
        wait_until(lambda: server.cli("EXISTS", "celeryops:lock:beat:lab") == "1", 20, "beat leads")
        yield place


@pytest.fixture
def play(ansible: Ansible, beat: Path, venv: Path) -> Any:
    common = {"application": "lab", "app": "labapp:app", "app_dir": str(TESTS), "virtualenv": str(venv)}

    def run(*tasks: tuple[str, dict[str, Any]], **options: Any) -> list[dict[str, Any]]:
        return ansible.play(
            [{f"celeryops.runbook.{name}": {**common, **arguments}} for name, arguments in tasks],
            defaults={"environment_file": str(beat / "secret.env")},
            **options,
        )

    return run


def change(state: str, *entries: str, **more: Any) -> tuple[str, dict[str, Any]]:
    return "celery_schedule", {"state": state, "entries": list(entries), **more}


LOOK = ("celery_schedule_info", {})


def test_an_entry_is_disabled_and_enabled(play: Any, server: RedisServer) -> None:
    would, seen = play(change("disabled", "often", why="repair", by="anna"), LOOK, check=True)
    assert would["changed"] and "by anna" in would["diff"]["after"] and seen["disabled"] == {}
    first, again, other, seen = play(
        change("disabled", "often", why="repair", by="anna"),
        change("disabled", "often"),
        change("disabled", "often", why="longer", by="bert"),
        LOOK,
    )
    assert first["changed"] and not again["changed"] and other["changed"]
    assert seen["entries"]["often"]["disabled"].endswith("longer") and seen["entries"]["rare"]["disabled"] is None
    assert seen["leader"]["host"] == "host1" and "args" not in seen["entries"]["often"]
    # The one that was on its way may still come; from then on none.
    before = server.cli("LLEN", "often")
    time.sleep(4.5)
    assert server.cli("LLEN", "often") == before
    done, again, gone = play(change("enabled", "often"), change("enabled", "often"), change("enabled", "nosuch"))
    assert done["changed"] and not again["changed"] and gone["failed"] and "often" in gone["msg"]
    wait_until(lambda: server.cli("LLEN", "often") != before, 10, "it is sent again")


def test_the_schedule_is_shown_with_last_and_next_run(play: Any, server: RedisServer, beat: Path) -> None:
    (seen,) = play(("celery_schedule_info", {"arguments": True, "file": str(beat / "schedule")}))
    entry = seen["entries"]["often"]
    assert (entry["task"], entry["queue"], entry["schedule"], entry["args"]) == (
        "lab.add",
        "often",
        "2.00 seconds",
        [1, 2],
    )
    assert entry["runs"] > 0 and abs(entry["next"] - entry["last"] - 2) < 2.5
    rare = seen["entries"]["rare"]
    assert rare["runs"] == 0 and abs(rare["next"] - rare["last"] - 3600) < 2
    assert seen["file"]["open_in"] and seen["file"]["error"] is None


def test_an_entry_is_run_now_if_somebody_is_there_to_take_it(play: Any, server: RedisServer) -> None:
    done, lonely, strange, two = play(
        change("triggered", "rare"),
        change("triggered", "lonely"),
        change("triggered", "nosuch"),
        change("triggered", "rare", "often"),
    )
    assert (done["queue"], done["task"]) == ("taken", "lab.add") and done["taken"] in ("reserved", "running", "ended")
    assert lonely["failed"] and "lonely" in lonely["msg"] and server.cli("EXISTS", "lonely") == "0"
    assert strange["failed"] and "nosuch" in strange["msg"] and "exactly one" in two["msg"]
    (would,) = play(change("triggered", "rare"), check=True)
    assert would["changed"] and would["task_id"] is None


def test_a_schedule_that_cannot_be_read_is_moved_and_what_it_knows_is_kept(
    play: Any, server: RedisServer, beat: Path, tmp_path: Path, venv: Path
) -> None:
    held, _look = play(
        ("celery_schedule_file", {"file": str(beat / "schedule"), "save_dir": str(tmp_path / "save")}), LOOK
    )
    assert held["failed"] and "Stop beat first" in held["msg"] and not (tmp_path / "save").exists()
    # A schedule of a beat that knew nothing of records.
    old = tmp_path / "old"
    code = (
        "import labapp, time\nfrom celery.beat import PersistentScheduler\n"
        f"s = PersistentScheduler(labapp.app, schedule_filename={str(old)!r})\n"
        "e = s.schedule['rare']\ne.total_run_count = 41\ns.close()\n"
    )
    environment = {**os.environ, "LABAPP_SCHEDULE": json.dumps(SCHEDULE), "CELERY_BROKER_URL": server.url()}
    subprocess.run([str(venv / "bin/python"), "-c", code], cwd=TESTS, env=environment, check=True)
    copy = tmp_path / "kept"
    for file in tmp_path.glob("old*"):
        shutil.copy(file, copy.with_name(file.name.replace("old", "kept")))
    move = ("celery_schedule_file", {"file": str(old), "save_dir": str(tmp_path / "save")})
    (would,) = play(move, check=True)
    assert would["changed"] and "rare" in would["noted"] and old.parent.joinpath(would["moved"][0]).exists()
    done, seen, again = play(move, LOOK, move)
    assert "rare" in done["noted"] and done["error"] is None and not list(tmp_path.glob("old*"))
    assert seen["entries"]["rare"]["runs"] == 41 and not again["changed"]
    assert len(list(Path(done["saved_to"]).iterdir())) == len(done["moved"])
    for file in tmp_path.glob("kept*"):
        file.write_bytes(b"damaged")
    broken, left = play(
        ("celery_schedule_info", {"file": str(copy)}),
        ("celery_schedule_file", {"file": str(copy), "save_dir": str(beat / "secret.env")}),
    )
    assert broken["file"]["error"] and left["failed"] and "Nothing was moved" in left["msg"]
    assert list(tmp_path.glob("kept*"))
