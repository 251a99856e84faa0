# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Beat on real hosts: every fault is caused for real, cured by its playbook, and the sends are looked at."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from fleet.story import Story
from scorecard import ROWS, Row

from support import wait_until

pytestmark = pytest.mark.ansible

UNIT = "celery-shop-beat.service"
PATH = f"/etc/systemd/system/{UNIT}"
STRAY = (
    "cd /srv/shop/current/src; set -a; . /etc/celeryops/shop/secret.env; set +a; "
    "nohup ../venv/bin/python -m celery -A shop.celery:app beat -l INFO -s /tmp/stray --pidfile= "
    "</dev/null >/tmp/stray.log 2>&1 & echo $!"
)


def beats(story: Story, host: str) -> list[str]:
    """Every beat process of a host, frozen or not."""
    return story.ssh(host, "pgrep -f '[c]elery -A shop[^ ]* beat'", check=False).split()


def main_pid(story: Story, host: str = "worker1") -> str:
    return story.ssh(host, f"systemctl show -p MainPID --value {UNIT}")


def state(story: Story, host: str) -> tuple[str, str]:
    shown = story.ssh(host, f"systemctl show -p ActiveState -p UnitFileState --value {UNIT}").splitlines()
    return shown[0], shown[1] if len(shown) > 1 else ""


def leader(story: Story) -> dict[str, Any]:
    found = story.redis("GET", "celeryops:lock:beat:shop")
    return dict(json.loads(found)) if found else {}


def runs(story: Story, entry: str = "expire-carts") -> dict[str, Any]:
    found = story.redis("HGET", "celeryops:beat-runs:shop", entry)
    return dict(json.loads(found)) if found else {}


def wait_run(story: Story, entry: str = "expire-carts") -> None:
    before = runs(story, entry).get("count", 0)
    wait_until(lambda: runs(story, entry).get("count", 0) > before, 25, f"{entry} is sent", 0.2)


@pytest.fixture
def beat(shop: Story) -> Iterator[Story]:
    """Whatever the test did, afterwards beat runs on worker1 and nowhere else."""
    yield shop
    shop.ssh("worker2", f"systemctl disable --now {UNIT} 2>&1; rm -f {PATH}; systemctl daemon-reload", check=False)
    for pid in beats(shop, "worker2"):
        shop.ssh("worker2", f"kill -9 {pid}", check=False)
    shop.ssh("worker1", f"systemctl kill -s CONT {UNIT}; systemctl enable --now {UNIT} 2>&1", check=False)


def test_one_beat_is_left(beat: Story) -> None:
    shop = beat
    wait_until(lambda: leader(shop).get("host") == "worker1", 30, "beat leads on worker1")
    # A second unit and one by hand on another host.
    unit = shop.ssh("worker1", f"cat {PATH}").replace("CELERYOPS_BEAT_HOST=worker1", "CELERYOPS_BEAT_HOST=worker2")
    shop.ssh(
        "worker2", f"cat > {PATH} <<'END'\n{unit}\nEND\nsystemctl daemon-reload; systemctl enable --now {UNIT} 2>&1"
    )
    stray = shop.ssh("worker2", STRAY)
    wait_until(lambda: "Sending due task" in shop.ssh("worker2", "cat /tmp/stray.log"), 30, "the stray sends", 0.5)
    second = main_pid(shop, "worker2")
    assert sorted(beats(shop, "worker2")) == sorted([stray, second]) and leader(shop)["host"] == "worker1"
    log = shop.ssh("worker2", f"journalctl -u {UNIT} -o cat")
    assert "leads" in log and "Sending due task" not in log, "the second unit waits for its turn"

    would = shop.play("beat_ensure_single", "--check", "--diff")
    done = would.stats["celeryops_beat_ensure_single"]["done"]
    assert done == [f"end beat {stray} on worker2", "stop and disable the unit on worker2"]
    assert would.changed and sorted(beats(shop, "worker2")) == sorted([stray, second])

    # And the right one hangs.
    shop.ssh("worker1", f"systemctl kill --kill-whom=main -s STOP {UNIT}")
    play = shop.play("beat_ensure_single")
    result = play.stats["celeryops_beat_ensure_single"]
    assert result["done"] == [*done, "restart the unit on worker1"]
    assert beats(shop, "worker2") == [] and state(shop, "worker2") == ("inactive", "")
    assert beats(shop, "worker1") == [main_pid(shop)] and state(shop, "worker1") == ("active", "enabled")
    assert result["heartbeat"]["pid"] == int(main_pid(shop)) == leader(shop)["pid"]
    wait_run(shop)
    ROWS.append(Row("two beats too many, the right one frozen", "`beat_ensure_single`", None, play.seconds, None))
    again = shop.play("beat_ensure_single")
    assert again.changed == 0 and again.stats["celeryops_beat_ensure_single"]["done"] == []
    assert again.seconds < 15


def other_inventory(story: Story, tmp_path: Path, *hosts: str) -> tuple[str, str]:
    """A second inventory beside the first: it names other hosts for beat."""
    path = tmp_path / "other.yml"
    path.write_text(json.dumps({"all": {"children": {"other_beat": {"hosts": {host: {} for host in hosts}}}}}))
    return "-i", str(path)


def test_two_inventories_that_name_two_beats_are_refused(beat: Story, tmp_path: Path) -> None:
    shop = beat
    wait_until(lambda: leader(shop).get("host") == "worker1", 30, "beat leads on worker1")
    before = main_pid(shop)
    two = other_inventory(shop, tmp_path, "worker1", "worker2")
    play = shop.play("beat_ensure_single", *two, expect=False, celeryops_beat_group="other_beat")
    assert "celeryops_beat_group" in play.text and "celeryops_beat_standby" in play.text
    other = other_inventory(shop, tmp_path, "worker2")
    play = shop.play("beat_ensure_single", *other, expect=False, celeryops_beat_group="other_beat")
    assert "two inventories name two beats" in play.text and "celeryops_beat_from=worker1" in play.text
    assert main_pid(shop) == before and beats(shop, "worker2") == []


def sent(story: Story, host: str, entry: str = "expire-carts") -> list[float]:
    """When the beat of the host sent the entry, from its journal."""
    log = story.ssh(host, f"journalctl -u {UNIT} -o short-unix --no-pager")
    return [float(line.split()[0]) for line in log.splitlines() if f"Sending due task {entry} " in line]


def hand_over(story: Story) -> None:
    story.ssh("worker1", f"systemctl stop {UNIT}")
    wait_until(lambda: leader(story).get("host") == "worker2", 20, "worker2 leads", 0.2)
    story.ssh("worker1", f"systemctl start {UNIT}")
    assert leader(story)["host"] == "worker2"


def test_another_takes_over_when_beat_is_cut_off_and_when_its_host_dies(beat: Story, tmp_path: Path) -> None:
    shop = beat
    two = other_inventory(shop, tmp_path, "worker1", "worker2")
    standby = {"celeryops_beat_group": "other_beat", "celeryops_beat_standby": True, "celeryops_beat_lease": 6}
    began = float(shop.ssh("worker1", "date +%s"))
    play = shop.play("beat_ensure_single", *two, **standby)
    assert play.stats["celeryops_beat_ensure_single"]["done"] == ["start the unit on worker2"]
    assert leader(shop)["host"] == "worker1" and len(beats(shop, "worker2")) == 1

    # It ends, and the other follows at once; started again it waits.
    hand_over(shop)
    # Cut off from Redis it stops sending before the other begins.
    shop.cut("worker2", "redis1")
    cut = time.time()
    try:
        wait_until(lambda: leader(shop).get("host") == "worker1", 12, "worker1 leads", 0.2)
        taken = time.time() - cut
        wait_run(shop)
    finally:
        shop.join("worker2", "redis1")
    said = f"journalctl -u {UNIT} -o cat | grep -c 'cut off for longer than its lease\\|broker cannot be asked'"
    wait_until(lambda: int(shop.ssh("worker2", said, check=False) or 0) > 0, 20, "worker2 notes it", 0.5)
    hand_over(shop)
    first = sent(shop, "worker2")

    # Its host dies.
    shop.kill("worker2")
    dead = time.time()
    try:
        wait_until(lambda: leader(shop).get("host") == "worker1", 12, "worker1 takes over", 0.2)
        taken_over = time.time() - dead
        wait_run(shop)
        play = shop.play("beat_ensure_single", "--timeout", "3", expect=False)
        assert "worker2 could not be looked at" in play.text and "celeryops_lost_hosts" in play.text
        play = shop.play("beat_ensure_single", "--timeout", "3", celeryops_lost_hosts="worker2")
        assert play.changed == 0
    finally:
        shop.reboot("worker2")
    assert leader(shop)["host"] == "worker1", "the one that comes back waits"
    times = sorted(when for when in [*first, *sent(shop, "worker1")] if when > began)
    assert min(after - before for before, after in pairwise(times)) > 9, "every ten seconds, never twice"
    cure, once = "the standby, lease 6 s", "no run sent twice"
    ROWS.append(Row("beat cut off from Redis", cure, None, taken, None, once))
    ROWS.append(Row("the host of beat dies", cure, None, taken_over, None, once))


def test_a_damaged_schedule_is_moved_aside_and_nothing_runs_too_often(beat: Story) -> None:
    shop = beat
    place = "/var/lib/celery-shop-beat"
    wait_until(lambda: runs(shop, "refresh-catalogue"), 30, "the record of the runs")
    # Celery throws away what it cannot read, fails at what it cannot throw away, is started again, and so on for ever.
    shop.ssh("worker1", f"systemctl stop {UNIT}; rm {place}/schedule.db; mkdir {place}/schedule.db")
    shop.ssh("worker1", f"systemctl start --no-block {UNIT}")
    restarts = f"systemctl show -p NRestarts --value {UNIT}"
    wait_until(lambda: int(shop.ssh("worker1", restarts)) > 0, 30, "beat fails again and again", 0.5)
    before = runs(shop, "refresh-catalogue")
    files = shop.ssh("worker1", f"ls {place}").split()

    would = shop.play("beat_reset", "--check", "--diff")
    (hosts,) = would.stats["celeryops_beat_reset"]["hosts"].values()
    assert f"{place}/schedule.db" in hosts["moved"] and hosts["error"]
    assert shop.ssh("worker1", f"ls {place}").split() == files

    play = shop.play("beat_reset")
    result = play.stats["celeryops_beat_reset"]["hosts"]["worker1"]
    assert result["saved_to"].startswith("/var/backups/celeryops/shop/schedule-")
    assert shop.ssh("worker1", f"stat -c %a {result['saved_to']}; ls {result['saved_to']}").split() == ["700", *files]
    assert state(shop, "worker1") == ("active", "enabled") and leader(shop)["pid"] == int(main_pid(shop))
    shown = shop.play("beat_schedule").stats["celeryops_beat_schedule"]["entries"]["refresh-catalogue"]
    after = runs(shop, "refresh-catalogue")
    # It was not due meanwhile, or it ran once, sixty seconds after the former run.
    assert after["count"] in (before["count"], before["count"] + 1)
    assert after == before or after["last"] - before["last"] > 59
    assert abs(shown["next"] - after["last"] - 60) < 1.5
    wait_run(shop)
    ROWS.append(Row("beat's schedule file damaged", "`beat_reset`", None, play.seconds, None, "last runs kept"))
    assert shop.play("beat_reset").changed == 0, "it can be read"


def test_an_entry_rests_until_it_is_enabled_and_can_be_run_meanwhile(beat: Story) -> None:
    shop = beat
    wait_until(lambda: leader(shop).get("host") == "worker1", 30, "beat leads on worker1")
    pid = main_pid(shop)
    wanted = {"celeryops_entry": "expire-carts", "celeryops_why": "carts are migrated", "celeryops_by": "anna"}
    would = shop.play("beat_entry", "--check", "--diff", **wanted)
    assert would.changed and "carts are migrated" in would.text
    assert shop.redis("EXISTS", "celeryops:beat-rests:shop") == "0"
    assert shop.play("beat_entry", **wanted).changed == 1
    count = runs(shop)["count"]

    done = shop.play("beat_trigger", celeryops_entry="expire-carts").stats["celeryops_beat_trigger"]
    assert done["queue"] == "maintenance" and done["taken"] in ("reserved", "running", "ended")
    log = "journalctl -u 'celery-shop-worker@bulk-1' -o cat"
    taken = [host for host in ("worker1", "worker2") if f"[{done['task_id']}] received" in shop.ssh(host, log)]
    assert len(taken) == 1, "once, by one worker"

    shown = shop.play("beat_schedule").stats["celeryops_beat_schedule"]
    assert "disabled by anna" in shown["entries"]["expire-carts"]["disabled"]
    assert runs(shop)["count"] == count, "its time came and nothing was sent"
    assert shop.play("beat_entry", celeryops_entry="expire-carts", celeryops_entry_state="enabled").changed == 1
    wait_run(shop)
    assert main_pid(shop) == pid, "beat was not restarted"


@pytest.mark.parametrize(
    ("playbook", "variables", "words"),
    [
        ("beat_ensure_single", {"celeryops_beat_group": "nosuch"}, ["celeryops_beat_group", "nosuch"]),
        ("beat_ensure_single", {"celeryops_lost_hosts": "worker2"}, ["celeryops_lost_hosts", "worker2", "not lost"]),
        ("beat_reset", {"celeryops_confirm": "yes"}, ["celeryops_confirm", "shop"]),
        ("beat_entry", {"celeryops_why": "x"}, ["celeryops_entry", "beat_schedule"]),
        ("beat_entry", {"celeryops_entry": "nosuch", "celeryops_why": "x"}, ["nosuch", "expire-carts"]),
        ("beat_entry", {"celeryops_entry": "expire-carts"}, ["celeryops_why"]),
        ("beat_trigger", {}, ["celeryops_entry", "beat_schedule"]),
    ],
)
def test_wrong_input_is_named_and_nothing_touched(
    shop: Story, playbook: str, variables: dict[str, Any], words: list[str]
) -> None:
    before = main_pid(shop)
    play = shop.play(playbook, expect=False, **variables)
    assert all(word in play.text for word in words), play.text[-2000:]
    assert main_pid(shop) == before and shop.redis("EXISTS", "celeryops:beat-rests:shop") == "0"
