# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Whatever dies or freezes, one beat sends at a time, none sends a run twice, and the times of the last runs stay."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from lead_support import LEASE, MEMORY, OFTEN, RARE, Lab

from celeryops.engine import schedule
from support import RedisServer, Worker, workers


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    with RedisServer("--appendonly", "yes", "--appendfsync", "always", directory=tmp_path / "redis") as server:
        yield Lab(server, tmp_path)


def test_one_that_is_killed_is_followed_at_once_on_its_host(lab: Lab) -> None:
    with workers(lab.beat("a"), lab.beat("b")) as (a, b):
        beats = {"a": a, "b": b}
        first = lab.wait_leader("a", "b")
        lab.wait_sent(1)
        beats[first].kill()
        lab.wait_leader({"a": "b", "b": "a"}[first], timeout=4)
        lab.wait_sent(2)
    assert lab.apart() > 0.8


def test_one_that_freezes_is_followed_and_sends_nothing_when_it_thaws(lab: Lab) -> None:
    with workers(lab.beat("a")) as (a,):
        lab.wait_leader("a")
        with workers(lab.beat("b")) as (_b,):
            lab.wait_sent(2)
            a.freeze()
            lab.wait_leader("b", timeout=LEASE + 3)
            lab.wait_sent(2)
            a.thaw()
            lab.wait_sent(3)
            assert lab.leader() == "b"
            assert "cut off for longer than its lease" in a.log.read_text()
    assert lab.apart() > 0.8, "what fell due while it was frozen was sent by the other alone"


def test_without_redis_nobody_sends_and_afterwards_one(lab: Lab) -> None:
    """Neither while it takes no writes, as when its disk is full, nor while it is away."""
    with workers(lab.beat("a"), lab.beat("b")) as (a, b):
        lab.wait_leader("a", "b")
        lab.wait_sent(2)
        lab.server.cli("CONFIG", "SET", "min-replicas-to-write", "1")
        time.sleep(LEASE)
        before = len(lab.sent())
        time.sleep(2)
        assert len(lab.sent()) == before
        lab.server.cli("CONFIG", "SET", "min-replicas-to-write", "0")
        lab.wait_sent(2)
        lab.server.stop()
        time.sleep(LEASE + 1)
        lab.server.start()
        lab.wait_leader("a", "b")
        lab.wait_sent(3)
        assert "the broker cannot be asked who leads" in a.log.read_text() + b.log.read_text()
        assert "sends without them" not in a.log.read_text() + b.log.read_text()
        assert a.process and b.process and a.process.poll() is None and b.process.poll() is None
    assert lab.apart() > 0.8


@pytest.mark.parametrize("scheduler", [(), ("--scheduler", MEMORY)], ids=["file", "memory"])
def test_last_runs_outlive_the_file(lab: Lab, scheduler: tuple[str, ...]) -> None:
    """Neither run at once nor put off by a whole interval."""
    with workers(lab.beat("a", {**RARE, **OFTEN}, *scheduler)):
        lab.wait_leader("a")
        with lab.broker() as broker:
            begun = schedule.runs(broker, "lab")["rare"].last
            # As if it had run 55 seconds ago: it is due in five.
            schedule.keep_runs(broker, "lab", {"rare": schedule.Run(begun - 55, 7)})
    for file in lab.place.glob("a*"):
        file.unlink()
    with workers(lab.beat("a", {**RARE, **OFTEN}, *scheduler)):
        lab.wait_leader("a")
        assert lab.sent("rare") == []
        lab.wait_sent(1, "rare", timeout=10)
        (when,) = lab.sent("rare")
        assert when - begun > 4.5
        with lab.broker() as broker:
            assert schedule.runs(broker, "lab")["rare"].count == 8


def test_switched_off_and_without_the_right_to_do_so_it_is_beat_as_ever(lab: Lab) -> None:
    lab.server.cli("ACL", "SETUSER", "default", "-eval")
    other = {"other": {**OFTEN["often"], "options": {"queue": "other"}}}
    with workers(lab.beat("a"), lab.beat("b", other, CELERYOPS_DISABLE="lead")) as (a, b):
        lab.wait_sent(2)
        lab.wait_sent(2, "other")
        assert "sends without them" in a.log.read_text()
        assert "celeryops: beat" not in b.log.read_text() and not lab.leader()


def test_a_beat_inside_a_worker_leads_like_any_other(lab: Lab) -> None:
    own = {"CELERYOPS_APP_NAME": "lab", "LABAPP_SCHEDULE": json.dumps(OFTEN), "CELERYOPS_BEAT_HOST": "w"}
    arguments = ("--include", "celeryops.worker", "-B", "-s", str(lab.place / "w"))
    with workers(Worker(lab.server.url(), "w@lab", queues="none", arguments=arguments, environment=own)):
        lab.wait_leader("w")
        lab.wait_sent(2)
