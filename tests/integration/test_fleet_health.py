# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""health_check on real hosts: first the fault, then the verdict that names it and its exit status."""

from __future__ import annotations

import html.parser
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from fleet.story import Play, Story

from support import wait_until

pytestmark = pytest.mark.ansible

UNIT = "celery-shop-worker@{}.service"


def check(story: Story, expect: bool | None = None, *arguments: str, **variables: Any) -> tuple[Play, dict[str, Any]]:
    play = story.play("health_check", *arguments, expect=expect, **{"celeryops_health_window": 0, **variables})
    assert "celeryops_health" in play.stats, play.text[-3000:]
    assert play.changed == 0
    return play, play.stats["celeryops_health"]


def findings(found: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {c["name"]: c for c in found["checks"] if c["severity"] in ("warning", "critical")}


def instances(story: Story, host: str) -> list[str]:
    listed = story.ssh(host, "ls /etc/celeryops/shop/ | sed -n 's/^worker-\\(.*\\)\\.env$/\\1/p'")
    return listed.split()


@contextmanager
def all_well_again(story: Story) -> Iterator[None]:
    """Whatever the test did, the next one finds the fleet in order."""
    try:
        yield
    finally:
        for host in ("worker1", "worker2"):
            story.ssh(host, "systemctl reset-failed; systemctl start celery-shop.target", check=False)
        story.play("start")


def test_a_fleet_in_order_is_healthy(shop: Story, tmp_path: Path) -> None:
    page, data = tmp_path / "page.html", tmp_path / "health.json"
    play, found = check(shop, True, celeryops_health_html=str(page), celeryops_health_json=str(data))
    assert (found["verdict"], findings(found)) == ("healthy", {}), play.text[-3000:]
    told = json.loads(data.read_text())
    assert told["application"] == "shop"
    nodes = [f"shop-{one}@{host}" for host in ("worker1", "worker2") for one in instances(shop, host)]
    assert sorted(told["fleet"]) == sorted(nodes)
    assert {node["release"] for node in told["fleet"].values()} == {"v1"}
    assert all(check["severity"] in ("ok", "unknown") for check in told["checks"])
    text = page.read_text()
    assert "healthy" in text and "shop-" in text and "://" not in text, "self-contained, no secret"
    assert shop.password not in text + data.read_text() + play.text


def test_check_mode_is_the_same_and_writes_no_file(shop: Story, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    _unused, found = check(shop, True, "--check", "--diff", celeryops_health_html=str(page))
    assert found["verdict"] == "healthy"
    assert not page.exists()


def test_a_stopped_unit_and_a_frozen_worker_are_named(shop: Story) -> None:
    gone, frozen = instances(shop, "worker2")[0], instances(shop, "worker1")[0]
    with all_well_again(shop):
        shop.ssh("worker2", f"systemctl stop {UNIT.format(gone)}")
        shop.ssh("worker1", f"systemctl kill --kill-whom=main -s STOP {UNIT.format(frozen)}")
        try:
            _unused, found = check(shop)
        finally:
            shop.ssh("worker1", f"systemctl kill --kill-whom=main -s CONT {UNIT.format(frozen)}", check=False)
    bad = findings(found)
    assert f"shop-{gone}@worker2" in bad["workers_missing"]["message"]
    assert f"shop-{frozen}@worker1" in bad["workers_silent"]["message"]
    assert f"{UNIT.format(gone)} on worker2" in bad["units_inactive"]["message"]
    assert (bad["workers_missing"]["cure"], bad["workers_silent"]["cure"]) == ("start", "restart")


def test_all_workers_of_a_queue_gone_is_critical_and_fails(shop: Story) -> None:
    with all_well_again(shop):
        for host in ("worker1", "worker2"):
            shop.ssh(host, "systemctl stop 'celery-shop-worker@*'")
        play, found = check(shop, False)
    bad = findings(found)
    assert found["verdict"] == "critical"
    assert {"worker_count", "queue_consumers"} <= set(bad)
    assert "0 workers answer" in play.text


def test_a_full_queue(shop: Story, tmp_path: Path) -> None:
    queue = "<b>&'backlog"
    page = tmp_path / "page.html"
    envelope = json.dumps(
        {
            "body": "W1tdLCB7fSwge31d", "content-encoding": "utf-8", "content-type": "application/json",
            "headers": {"task": "shop.none", "id": "x", "lang": "py"},
            "properties": {
                "body_encoding": "base64", "delivery_tag": "x", "priority": 0,
                "delivery_info": {"exchange": "", "routing_key": queue},
            },
        }
    )  # fmt: skip
    shop.redis("LPUSH", queue, *[envelope] * 120)
    try:
        _unused, found = check(shop, False, celeryops_health_html=str(page))
        limits = {queue: {"depth": {"warning": 500, "critical": 1000}, "consumers": {"critical": 0}}}
        _unused, relaxed = check(shop, True, celeryops_health_queue_thresholds=limits)
        _unused, strict = check(shop, False, celeryops_health_strict=True, celeryops_health_queue_thresholds={
            queue: {"depth": {"warning": 120, "critical": 1000}, "consumers": {"critical": 0}}
        })  # fmt: skip
    finally:
        shop.redis("DEL", queue)
    assert findings(found)["queue_depth"]["value"] == 120
    assert findings(found)["queue_depth"]["subject"] == queue
    assert findings(relaxed) == {}
    assert strict["verdict"] == "warning"

    class Text(html.parser.HTMLParser):
        def __init__(self) -> None:
            super().__init__()
            self.seen: list[str] = []
            self.tags: set[str] = set()

        def handle_starttag(self, tag: str, attrs: Any) -> None:
            self.tags.add(tag)

        def handle_data(self, data: str) -> None:
            self.seen.append(data)

    reader = Text()
    reader.feed(page.read_text())
    assert any(queue in seen for seen in reader.seen), "escaped once, and only once"
    assert "b" not in reader.tags


def test_no_beat_then_two(shop: Story) -> None:
    with all_well_again(shop):
        shop.ssh("worker1", "systemctl stop celery-shop-beat.service")
        _unused, none = check(shop, False)
    assert findings(none)["beat_missing"]["cure"] == "start"
    # A second one by hand, on another host, as the runbook tells one to do.
    start = (
        "cd /srv/shop/current/src; set -a; . /etc/celeryops/shop/secret.env; set +a; "
        "nohup ../venv/bin/python -m celery -A shop.celery:app beat -l INFO -s /tmp/stray --pidfile= "
        ">/tmp/stray.log 2>&1 </dev/null & echo $!"
    )
    pid = shop.ssh("worker2", start).splitlines()[-1]
    try:
        wait_until(lambda: "beat: Starting" in shop.ssh("worker2", "cat /tmp/stray.log"), 30, "the second beat")
        _unused, two = check(shop, False)
    finally:
        shop.ssh("worker2", f"kill {pid}; rm -f /tmp/stray*")
    message = findings(two)["beat_duplicate"]["message"]
    assert "worker1" in message and "worker2" in message and "no unit" in message


def test_redis_down_is_one_named_cause(shop: Story) -> None:
    with all_well_again(shop):
        shop.ssh("redis1", "systemctl stop redis-server")
        try:
            play, found = check(shop, False)
        finally:
            shop.ssh("redis1", "systemctl start redis-server")
    assert found["verdict"] == "critical"
    assert found["causes"][0].startswith("the broker does not answer"), found["causes"]
    assert shop.password not in play.text
    unknown = {c["name"] for c in found["checks"] if c["severity"] == "unknown"}
    assert {"queue_depth", "worker_count", "unacked_age"} <= unknown


def test_a_failed_unit(shop: Story) -> None:
    one = instances(shop, "worker2")[0]
    with all_well_again(shop):
        shop.ssh("worker2", f"systemctl stop {UNIT.format(one)}")
        override = f"/run/systemd/system/{UNIT.format(one)}.d"
        lines = "[Service]\\nExecStart=\\nExecStart=/bin/false\\nRestart=no\\n"
        shop.ssh("worker2", f"mkdir -p {override} && printf '{lines}' > {override}/x.conf && systemctl daemon-reload")
        shop.ssh("worker2", f"systemctl start {UNIT.format(one)}", check=False)
        try:
            _unused, failed = check(shop, False)
        finally:
            shop.ssh("worker2", f"rm -r {override}; systemctl daemon-reload; systemctl reset-failed")
    assert f"{UNIT.format(one)} on worker2" in findings(failed)["units_failed"]["message"]


def test_a_host_out_of_reach(shop: Story, monkeypatch: pytest.MonkeyPatch) -> None:
    # worker2 has an address where nobody listens.
    elsewhere = shop.fleet / "elsewhere.yml"
    lines = shop.inventory.read_text()
    elsewhere.write_text(re.sub(r"(worker2: {ansible_host: )[^}]*", r"\g<1>127.0.0.254", lines))
    assert elsewhere.read_text() != lines
    monkeypatch.setattr(shop, "inventory", elsewhere)
    _unused, found = check(shop)
    elsewhere.unlink()
    assert "worker2" in findings(found)["hosts_unreachable"]["message"]


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"celeryops_health_thresholds": {"queue_dept": {"warning": 1}}}, ["queue_dept", "queue_depth"]),
        ({"celeryops_worker_group": "nobody"}, ["celeryops_worker_group", "nobody"]),
        ({"celeryops_app_name": ""}, ["celeryops_app_name"]),
    ],
)
def test_wrong_input_is_named(shop: Story, variables: dict[str, Any], words: list[str]) -> None:
    play = shop.play("health_check", expect=False, **variables)
    assert all(word in play.text for word in words), play.text[-2000:]


def test_limit_is_refused(shop: Story) -> None:
    play = shop.play("health_check", "--limit", "worker1", expect=False)
    assert "without --limit" in play.text


def test_host_info_tells_what_systemd_and_the_kernel_know(shop: Story, tmp_path: Path) -> None:
    playbook = tmp_path / "look.yml"
    tasks = [
        {"celeryops.runbook.celery_host_info": {"name": "shop", "app": "shop.celery:app"}, "register": "seen"},
        {"ansible.builtin.set_stats": {"data": {"seen": "{{ seen }}"}}},
    ]
    playbook.write_text(json.dumps([{"hosts": "worker1", "gather_facts": False, "tasks": tasks}]))
    play = shop.play(str(playbook), "--check")
    seen = play.stats["seen"]
    workers = {unit["instance"]: unit for unit in seen["units"] if unit["kind"] == "worker"}
    assert sorted(workers) == sorted(instances(shop, "worker1")) and play.changed == 0
    for instance, unit in workers.items():
        pid = int(shop.ssh("worker1", f"systemctl show -p MainPID --value {UNIT.format(instance)}"))
        assert (unit["pid"], unit["active"], unit["sub"], unit["enabled"]) == (pid, "active", "running", True)
        assert unit["node"] == f"shop-{instance}@worker1" and unit["queues"]
        main = int(shop.ssh("worker1", f"awk '/^VmRSS/ {{print $2}}' /proc/{pid}/status")) * 1024
        assert unit["processes"] > 1 and unit["rss"] > main, "the children count"
    (beat,) = seen["beats"]
    assert beat["running"] and beat["unit"] == "celery-shop-beat.service"
    assert seen["release"] == shop.ssh("worker1", "basename $(readlink /srv/shop/current)").strip()
