# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Small parts of the runtime package and of the example shop."""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from celeryops import _environment, _sdnotify
from support import ROOT, RedisServer

SHOP = ROOT / "examples" / "shop"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"shop_{name}", SHOP / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("abstract", [False, True])
def test_notify_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, abstract: bool) -> None:
    name = f"@celeryops-{os.getpid()}" if abstract else str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind("\0" + name[1:] if abstract else name)
        listener.settimeout(2)
        monkeypatch.setenv("NOTIFY_SOCKET", name)
        assert _sdnotify.send("READY=1", "STATUS=fine")
        assert listener.recv(100) == b"READY=1\nSTATUS=fine"


def test_notify_without_listener(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    assert not _sdnotify.send("READY=1") and not _sdnotify.configured()
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "nobody"))
    assert not _sdnotify.send("READY=1") and _sdnotify.configured()


@pytest.mark.parametrize(
    ("usec", "pid", "seconds"),
    [("3000000", None, 3.0), ("3000000", "self", 3.0), ("3000000", "1", None), ("0", None, None), ("x", None, None)],
)
def test_watchdog_limit(monkeypatch: pytest.MonkeyPatch, usec: str, pid: str | None, seconds: float | None) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", "/nowhere")
    monkeypatch.setenv("WATCHDOG_USEC", usec)
    monkeypatch.delenv("WATCHDOG_PID", raising=False)
    if pid:
        monkeypatch.setenv("WATCHDOG_PID", str(os.getpid()) if pid == "self" else pid)
    assert _sdnotify.watchdog_seconds() == seconds


def test_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CELERYOPS_DISABLE", " notify, ,canary")
    monkeypatch.setenv("CELERYOPS_RELEASE", "")
    assert _environment.disabled() == {"notify", "canary"} and _environment.release() is None


# The shop


@pytest.fixture
def book() -> Iterator[RedisServer]:
    with RedisServer() as server:
        yield server


def write(server: RedisServer, key: str, *records: dict[str, Any]) -> None:
    for record in records:
        server.cli("RPUSH", f"shop:ledger:{key}", json.dumps(record))


def run(task_id: str, phase: str, when: float, **more: Any) -> dict[str, Any]:
    base = {"id": task_id, "task": "t", "phase": phase, "time": when, "published": None, "eta": None, "retries": 0}
    return {**base, "queue": "q", "node": "n", "release": "v1", **more}


def test_the_ledger_counts_by_id(book: RedisServer) -> None:
    now = time.time()
    sent = [("done", 100), ("late", 100), ("twice", 50), ("begun", 10), ("gone", 100), ("retried", 90), ("eta", 100)]
    write(book, "sent", *({"id": name, "task": "t", "published": now - age, "eta": None} for name, age in sent))
    write(book, "sent", {"id": "body", "task": "t", "published": None, "eta": None})
    write(book, "runs", run("done", "begin", now - 99.5, published=now - 100), run("done", "end", now - 99))
    write(book, "runs", run("late", "begin", now - 80, queue="p"), run("late", "end", now - 79, queue="p"))
    write(book, "runs", *(run("twice", phase, now - ago) for phase in ("begin", "end") for ago in (50, 40)))
    write(book, "runs", run("begun", "begin", now - 10))
    write(book, "runs", run("retried", "begin", now - 90), run("retried", "begin", now - 85, retries=1))
    write(book, "runs", run("retried", "end", now - 85, retries=1))
    eta = time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime(now - 60))
    write(book, "runs", run("eta", "begin", now - 58, eta=eta, published=now - 100), run("eta", "end", now - 58))
    write(book, "runs", run("beat", "begin", now - 5, published=now - 5, release=None))
    ledger = load("ledger").Ledger(book.url())
    ledger.read()
    report = ledger.report()
    assert (report["sent"], report["done"]) == (8, 5)
    assert report["lost"] == ["gone"]
    (twice,) = report["run_twice"]
    assert twice.startswith("twice t: n v1 ") and twice.count(" v1 ") == 2
    assert report["still_waiting"] == 2 and report["not_from_load"] == 1
    assert report["by_release"] == {"v1": 6, "unknown": 1}
    assert report["wait_by_queue"]["p"]["max"] == pytest.approx(20, abs=0.01)
    assert report["wait"]["count"] == 7
    window = ledger.report(since=now - 61.5, until=now - 55)
    assert window["wait"]["count"] == 1 and 1 <= window["wait"]["max"] <= 3.1 and window["sent"] == 8
    # Read again: only what is new.
    write(book, "runs", run("gone", "begin", now), run("gone", "end", now), run("begun", "end", now))
    assert not ledger.wait(0.3)
    assert ledger.missing() == ["body"]
    assert ledger.report(grace=float("-inf"))["lost"] == ["body"]


def test_the_ledger_says_bad_news_by_its_exit_code(book: RedisServer) -> None:
    command = [sys.executable, str(SHOP / "ledger.py"), "--url", book.url(), "--wait", "0.1"]
    write(book, "sent", {"id": "a", "task": "t", "published": time.time(), "eta": None})
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and json.loads(done.stdout)["lost"] == ["a"]
    write(book, "runs", run("a", "begin", time.time()), run("a", "end", time.time()))
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0


def names(release: Path) -> tuple[int, set[str], str]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("CELERY", "SHOP"))}
    done = subprocess.run(
        [sys.executable, "-m", "celeryops.describe", "-A", "shop:app"],
        cwd=release, capture_output=True, text=True, check=False, env=environment,
    )  # fmt: skip
    found = json.loads(done.stdout)["tasks"] if done.returncode == 0 else []
    return done.returncode, {name for name in found if name.startswith("shop.")}, done.stderr


def test_releases_differ_as_told(tmp_path: Path) -> None:
    make = load("make_release")
    made = {}
    for release, bad in [("v1", None), ("v2", None), *((f"bad-{kind}", kind) for kind in make.BAD)]:
        make.make(release, tmp_path / release, bad)
        made[release] = names(tmp_path / release)
    v1, v2 = made["v1"][1], made["v2"][1]
    assert v2 - v1 == {"shop.add_points"} and v1 < v2
    assert made["bad-import"][0] == 1 and "shop_price_list" in made["bad-import"][2]
    assert v2 - made["bad-unknown-task"][1] == {"shop.send_receipt"}
    assert made["bad-crash"][1] == made["bad-canary"][1] == v2
    assert 'VERSION = "v2"' in (tmp_path / "v2" / "shop" / "version.py").read_text()


def test_a_release_is_refused(tmp_path: Path) -> None:
    def refusal(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, str(SHOP / "make_release.py"), *arguments], capture_output=True, text=True, check=False
        )
        assert done.returncode == 2
        return done.stderr

    assert "exists; remove it" in refusal("v1", str(tmp_path))
    assert "letters, digits" in refusal("a/b", str(tmp_path / "x"))
    assert not (tmp_path / "x").exists()
