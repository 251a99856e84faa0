# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Two beats of one application, with the Celery this environment holds: one sends, and obeys what is disabled."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from lead_support import OFTEN, Lab

from celeryops.engine import heartbeat, schedule
from support import RedisServer, wait_until, workers


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    with RedisServer() as server:
        yield Lab(server, tmp_path)


def test_one_of_two_sends_and_the_other_follows(lab: Lab) -> None:
    with workers(lab.beat("a"), lab.beat("b")) as (a, b):
        beats = {"a": a, "b": b}
        first = lab.wait_leader("a", "b")
        lab.wait_sent(3)
        with lab.broker() as broker:
            seen = heartbeat.read(broker, "lab")
        assert seen and seen["pid"] == beats[first].pid, "one that waits leaves no heartbeat"
        second = {"a": "b", "b": "a"}[first]
        assert f"{first} (pid {beats[first].pid}) leads" in beats[second].log.read_text()
        # It ends: the next one need not wait for the lease. (SIGTERM in a destructor ends beat with a traceback.)
        began = time.monotonic()
        assert "Traceback" not in beats[first].log.read_text()
        beats[first].stop()
        lab.wait_leader(second, timeout=4)
        assert time.monotonic() - began < 4
        lab.wait_sent(3)
        assert "Traceback" not in beats[second].log.read_text()
    assert lab.apart() > 0.8, "no run was sent twice"


def test_a_disabled_entry_rests_until_it_is_enabled(lab: Lab) -> None:
    other = {"other": {**OFTEN["often"], "schedule": 0.5, "options": {"queue": "other"}}}
    with workers(lab.beat("a", {**OFTEN, **other})) as (a,):
        lab.wait_leader("a")
        lab.wait_sent(1)
        with lab.broker() as broker:
            schedule.rest(broker, "lab", "often", "anna", "a test")
            count = schedule.runs(broker, "lab")["often"].count
        before, others = len(lab.sent()), len(lab.sent("other"))
        time.sleep(3.5)
        assert len(lab.sent()) <= before + 1
        assert len(lab.sent("other")) >= others + 5, "the others go on at their pace"
        with lab.broker() as broker:
            assert schedule.runs(broker, "lab")["often"].count <= count + 1
            schedule.wake(broker, "lab", "often")
        lab.wait_sent(2, timeout=5)
        a.signal(signal.SIGTERM)
        wait_until(lambda: not lab.leader(), 5, "the lead is given back")
    assert lab.apart() > 0.8, "what was passed over is not made up for"


def test_one_that_slept_over_its_lease_overwrites_nothing(lab: Lab) -> None:
    with lab.broker() as broker:
        lead = schedule.Lead(broker, "lab", 0.2)
        old = lead.take(schedule.Leader("a", 1, token="old"))
        assert lead.go_on(old, {"e": schedule.Run(1.0, 1), "f": schedule.Run(1.0, 1)}, [])
        assert lead.claim(old, "e", 2.0, 1) == schedule.SEND
        assert lead.take(schedule.Leader("b", 2, token="new")) == old, "the lease holds"
        time.sleep(0.3)
        new = lead.take(schedule.Leader("b", 2, token="new"))
        assert new != old and not lead.renew(old)
        assert lead.go_on(new, {"e": schedule.Run(2.0, 2)}, ["f"]) and lead.claim(new, "e", 3.0, 2) == schedule.SEND
        assert not lead.go_on(old, {"e": schedule.Run(2.0, 2)}, ["e"])
        assert lead.claim(old, "e", 4.0, 2) == schedule.FOLLOW
        assert schedule.runs(broker, "lab") == {"e": schedule.Run(3.0, 3)}


def test_redbeat_keeps_its_own_lock_and_its_heartbeat(lab: Lab) -> None:
    """celery-redbeat in place of the standby: the runtime leaves its loop alone, and still tells that it lives."""
    # The lock lasts for five of these, and who waits for it asks once in each.
    options = ("--scheduler", "redbeat.RedBeatScheduler", "--max-interval", "1")
    with workers(*(lab.beat(name, None, *options) for name in "ab")) as both:
        lab.wait_sent(3)
        holder, other = sorted(both, key=lambda beat: "Acquired lock" not in beat.log.read_text())
        assert "Acquired lock" not in other.log.read_text()
        with lab.broker() as broker:
            seen = heartbeat.read(broker, "lab")
        assert seen and seen["pid"] == holder.pid and not lab.leader()
        assert "RedBeatScheduler has a way of its own" in holder.log.read_text()
        holder.signal(signal.SIGKILL)
        wait_until(lambda: "Acquired lock" in other.log.read_text(), 20, "the other one takes the lock")
        lab.wait_sent(3)
    assert lab.apart() > 0.8, "no run was sent twice"
