# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ansible_collections.celeryops.runbook.plugins.module_utils import _host


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["/v/bin/python", "/v/bin/celery", "-A", "shop", "beat"], True),
        (["/v/bin/python", "-m", "celery", "-A", "shop", "beat", "-l", "INFO"], True),
        (["/v/bin/celery", "-A", "shop", "worker", "-B"], True),
        (["[celery beat] -A shop"], True),
        (["/v/bin/python", "-m", "celery", "-A", "beat", "worker", "-Q", "beat"], False),
        (["/v/bin/celery", "-A", "shop", "worker"], False),
        (["vim", "celery", "beat.py"], False),
        (["grep", "celery.*beat"], False),
        ([], False),
    ],
)
def test_is_beat(arguments: list[str], expected: bool) -> None:
    assert _host.is_beat(arguments) is expected


@pytest.mark.parametrize(
    ("arguments", "places", "expected"),
    [
        (["celery", "-A", "shop.celery:app", "beat"], ["/elsewhere"], True),
        (["celery", "-A", "shop.celery", "beat"], [], True),
        (["celery", "-A", "shop", "beat"], [], True),
        (["celery", "--app=other", "beat"], ["/srv/other/releases/v1/src"], False),
        (["celery", "--app=other", "beat"], ["/srv/shop/releases/v1/src"], True),
        (["[celery beat]"], ["/srv/shop/releases/v1/src"], True),
        (["[celery beat]"], ["/srv/shop2/releases/v1/src"], False),
    ],
)
def test_belongs(arguments: list[str], places: list[str], expected: bool) -> None:
    assert _host.belongs(arguments, places, "shop.celery:app", "/srv/shop") is expected


def test_queues_of() -> None:
    assert _host.queues_of("-c 2 -Q a,b --prefetch-multiplier=1") == ["a", "b"]
    assert _host.queues_of("--queues=a --queues-x") == ["a"]
    assert _host.queues_of("-c 2") == []
    assert _host.queues_of("it's broken") == []


def test_look_joins_files_units_and_processes(tmp_path: Path) -> None:
    config = tmp_path / "etc"
    config.mkdir()
    (config / "worker-default-1.env").write_text(
        'CELERYOPS_NODE="shop-default-1@%H"\nCELERYOPS_WORKER_OPTIONS="-Q critical,default -c 2"\n'
    )
    (config / "secret.env").write_text("CELERY_BROKER_URL=redis://:pw@h/0\n")
    root = tmp_path / "srv"
    (root / "releases" / "v1").mkdir(parents=True)
    (root / "releases" / "v1" / "release.json").write_text('{"visibility_timeout": 120}')
    (root / "current").symlink_to("releases/v1")
    asked: list[list[str]] = []

    def systemctl(arguments: list[str]) -> str:
        asked.append(arguments)
        if arguments[0] == "list-units":
            return "celery-shop-worker@old-1.service loaded failed failed text\n"
        return (
            "Id=celery-shop-worker@default-1.service\nLoadState=loaded\nActiveState=active\nSubState=running\n"
            f"NRestarts=2\nMainPID={os.getpid()}\nUnitFileState=enabled\nResult=success\n\n"
            "Id=celery-shop-worker@old-1.service\nLoadState=loaded\nActiveState=failed\nMainPID=0\n"
            "UnitFileState=disabled\nNRestarts=0\n\n"
            "Id=celery-shop-beat.service\nLoadState=not-found\nActiveState=inactive\nMainPID=0\nUnitFileState=\n"
        )

    child = subprocess.Popen([sys.executable, "-c", "import time; x = 'x' * 30_000_000; time.sleep(60)"])
    try:
        deadline = time.monotonic() + 20
        while _host.Processes().tree_rss(child.pid) < 30_000_000:
            assert time.monotonic() < deadline, "the child never grew"
            time.sleep(0.05)
        # An application of no other fleet: containers on this machine show their processes here too.
        found = _host.look("shop", "labshop.celery:app", str(root), str(config), systemctl)
        alone = _host.Processes().rss[os.getpid()]
    finally:
        child.kill()
        child.wait()
    worker, old = found["units"]
    assert set(asked[1][2:]) == {
        "celery-shop-worker@default-1.service",
        "celery-shop-worker@old-1.service",
        "celery-shop-beat.service",
    }
    assert worker["node"].startswith("shop-default-1@") and "%" not in worker["node"]
    assert (worker["queues"], worker["active"], worker["restarts"]) == (["critical", "default"], "active", 2)
    assert worker["enabled"] and worker["processes"] >= 2
    assert worker["rss"] > alone + 20_000_000, "the children count"
    assert (old["active"], old["enabled"], old["rss"]) == ("failed", False, 0)
    assert (found["release"], found["visibility_timeout"], found["beats"]) == ("v1", 120, [])


def test_a_stray_beat_is_seen_and_a_stopped_one_does_not_run(tmp_path: Path) -> None:
    script = tmp_path / "celery"
    script.write_text("import time\ntime.sleep(60)\n")
    stray = subprocess.Popen([sys.executable, str(script), "-A", "shop.celery:app", "beat"])
    try:
        processes = _host.Processes()
        (found,) = [b for b in _host.beats(processes, {}, "shop.celery:app", "/srv/shop") if b["pid"] == stray.pid]
        assert (found["unit"], found["running"]) == (None, True)
        assert _host.beats(_host.Processes(), {}, "other:app", "/srv/other") == []
        stray.send_signal(19)
        deadline = time.monotonic() + 10
        while _host.Processes().runs(stray.pid):
            assert time.monotonic() < deadline, "SIGSTOP did not bite"
            time.sleep(0.02)
    finally:
        stray.kill()
        stray.wait()
