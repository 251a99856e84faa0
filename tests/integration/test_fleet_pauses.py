# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""queue_pause, queue_resume and tune on real hosts: what holds over restart, boot, new workers, a Redis restart."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest
from fleet.story import Story
from fleet_support import HOSTS, consumers

from support import wait_until

pytestmark = pytest.mark.ansible

QUEUE = "email"
FAST = [f"shop-fast-1@{host}" for host in HOSTS]


def answering(story: Story, count: int) -> None:
    wait_until(lambda: story.celery("answer = len(app.control.ping(timeout=1))") == count, 60, f"{count} workers", 0.5)


def send(story: Story) -> None:
    story.celery(f"answer = app.send_task('shop.expire_carts', queue={QUEUE!r}).id")


def waiting(story: Story) -> int:
    return int(story.redis("LLEN", QUEUE))


def pids(story: Story, host: str) -> list[str]:
    return story.ssh(host, "systemctl show -p MainPID --value 'celery-shop-worker@*'").split()


def environment(story: Story, host: str = "worker1", instance: str = "fast-1") -> str:
    return story.ssh(host, f"cat /etc/celeryops/shop/worker-{instance}.env")


@pytest.fixture
def untuned(shop: Story) -> Iterator[Story]:
    yield shop
    if any(shop.ssh(host, "ls /etc/celeryops/shop/scale.json", check=False) for host in HOSTS):
        shop.play("site", celeryops_release="v1", celeryops_scale_reset=True)


def test_a_pause_holds_until_it_is_resumed(released: Story) -> None:
    shop = released
    wanted = {"celeryops_queues": QUEUE, "celeryops_why": "mail server down", "celeryops_by": "anna"}
    would = shop.play("queue_pause", "--check", "--diff", **wanted)
    assert would.changed and would.stats["celeryops_queue_pause"]["stopped"] == {QUEUE: FAST}
    assert "mail server down" in would.text and consumers(shop, QUEUE) == FAST

    done = shop.play("queue_pause", **wanted)
    assert done.changed and done.stats["celeryops_queue_pause"]["stopped"] == {QUEUE: FAST}
    assert shop.play("queue_pause", **wanted).changed == 0
    assert consumers(shop, QUEUE) == []
    send(shop)

    # Redis restarts, one worker restarts, one host boots.
    shop.ssh("redis1", "systemctl restart redis-server")
    shop.ssh("worker1", "systemctl restart celery-shop-worker@fast-1.service")
    shop.reboot("worker2")
    answering(shop, 4)
    # A new worker comes.
    shop.play("scale", celeryops_pool="fast", celeryops_instances=2, celeryops_hosts="worker1")
    assert consumers(shop, QUEUE) == [] and consumers(shop, "critical") == sorted([*FAST, "shop-fast-2@worker1"])
    assert waiting(shop) == 1, "not a single message was taken"

    health = shop.play("health_check", celeryops_health_window=0)
    assert health.stats["celeryops_health"]["verdict"] == "healthy", health.text[-3000:]
    assert "queue email is paused by anna since" in health.text

    # A worker goes while its queue is paused: the pool's other instance waits for it, nothing is to be confirmed.
    shop.play("scale", celeryops_pool="fast", celeryops_instances=1, celeryops_hosts="worker1")

    would = shop.play("queue_resume", "--check", "--diff", celeryops_queues=QUEUE)
    assert would.stats["celeryops_queue_resume"]["started"] == {QUEUE: FAST} and consumers(shop, QUEUE) == []
    done = shop.play("queue_resume", celeryops_queues=QUEUE)
    assert done.changed and done.stats["celeryops_queue_resume"]["started"] == {QUEUE: FAST}
    assert shop.play("queue_resume", celeryops_queues=QUEUE).changed == 0
    assert consumers(shop, QUEUE) == FAST, "and nobody of another pool"
    wait_until(lambda: waiting(shop) == 0, 10, "the message")


def test_tuned_live_and_by_a_restart(untuned: Story) -> None:
    shop = untuned
    limits = {
        "celeryops_pool": "fast",
        "celeryops_concurrency": 2,
        "celeryops_rate_limits": {"shop.send_reminder": "10/m"},
        "celeryops_time_limits": {"shop.send_reminder": {"soft": 5, "hard": 9}},
    }
    before = {host: pids(shop, host) for host in HOSTS}
    would = shop.play("tune", "--check", "--diff", **limits)
    assert would.changed and "CELERYOPS_TASK_LIMITS" not in environment(shop)
    live = shop.play("tune", **limits)
    result = live.stats["celeryops_scale"]["hosts"]["worker1"]
    assert (result["way"], result["limited"]) == ("pool_size", True)
    assert {host: pids(shop, host) for host in HOSTS} == before, "nobody was restarted"
    assert shop.play("tune", **limits).changed == 0

    def told() -> list[str]:
        found = shop.celery(
            "answer = app.control.inspect(timeout=1).registered('rate_limit', 'soft_time_limit', 'time_limit') or {}"
        )
        return [line for node, lines in found.items() if "-fast-" in node for line in lines if "send_reminder" in line]

    limited = "shop.send_reminder [rate_limit=10/m soft_time_limit=5.0 time_limit=9.0]"
    assert told() == [limited] * 2

    # What needs a restart: one at a time, and the limits hold over it.
    done = shop.play("tune", celeryops_pool="fast", celeryops_prefetch=3, celeryops_loglevel="WARNING")
    assert done.stats["celeryops_scale"]["hosts"]["worker2"]["way"] == "restart"
    assert "--prefetch-multiplier 3" in environment(shop) and "--loglevel WARNING" in environment(shop, "worker2")
    after = {host: pids(shop, host) for host in HOSTS}
    assert all(len(set(after[host]) - set(before[host])) == 1 for host in HOSTS), "only that pool was restarted"
    assert told() == [limited] * 2
    assert shop.play("tune", celeryops_pool="fast", celeryops_prefetch=3).changed == 0

    shop.play("tune", celeryops_pool="bulk", celeryops_profile="memory_bound", celeryops_hosts="worker2")
    assert "--max-memory-per-child" in environment(shop, "worker2", "bulk-1")
    assert "--max-memory-per-child" not in environment(shop, "worker1", "bulk-1")


def test_a_beat_that_hangs_is_found(shop: Story) -> None:
    key = "celeryops:beat:shop"
    wait_until(lambda: shop.redis("HGET", key, "task") == "shop.expire_carts", 30, "the heartbeat")
    pid = shop.ssh("worker1", "systemctl show -p MainPID --value celery-shop-beat")
    assert (shop.redis("HGET", key, "host"), shop.redis("HGET", key, "pid")) == ("worker1", pid)
    thresholds = {"beat_silent": {"critical": 1}}
    shop.ssh("worker1", "systemctl kill --kill-whom=main -s STOP celery-shop-beat")
    try:
        time.sleep(2)
        play = shop.play(
            "health_check", expect=False, celeryops_health_window=0, celeryops_health_thresholds=thresholds
        )
    finally:
        shop.ssh("worker1", "systemctl kill --kill-whom=main -s CONT celery-shop-beat")
    found = {check["name"]: check for check in play.stats["celeryops_health"]["checks"]}
    assert found["beat_silent"]["severity"] == "critical" and "worker1" in found["beat_silent"]["message"]


@pytest.mark.parametrize(
    ("playbook", "variables", "words"),
    [
        ("queue_pause", {"celeryops_why": "x"}, ["celeryops_queues"]),
        ("queue_pause", {"celeryops_queues": QUEUE}, ["why", QUEUE]),
        ("queue_pause", {"celeryops_queues": "nosuch", "celeryops_why": "x"}, ["queues", "nosuch", QUEUE]),
        ("queue_pause", {"celeryops_queues": QUEUE, "celeryops_why": "x", "celeryops_until": "x"}, ["until", "+90m"]),
        ("queue_resume", {"celeryops_queues": QUEUE, "celeryops_pause_timeout": "x"}, ["celeryops_pause_timeout"]),
        ("tune", {"celeryops_pool": "fast"}, ["celeryops_profile", "celeryops_prefetch"]),
        ("tune", {"celeryops_pool": "fast", "celeryops_profile": "fast"}, ["celeryops_profile", "cpu_bound"]),
        ("tune", {"celeryops_pool": "fast", "celeryops_prefetch": "many"}, ["celeryops_prefetch", "many"]),
        ("tune", {"celeryops_pool": "fast", "celeryops_rate_limits": {"shop.gone": "1/s"}}, ["shop.gone"]),
    ],
)
def test_wrong_input_is_named_and_nothing_touched(
    shop: Story, playbook: str, variables: dict[str, Any], words: list[str]
) -> None:
    play = shop.play(playbook, expect=False, **variables)
    assert all(word in play.text for word in words), play.text[-2000:]
    assert shop.redis("EXISTS", "celeryops:pauses") == "0"
    assert not shop.ssh("worker1", "ls /etc/celeryops/shop/scale.json", check=False)
    assert consumers(shop, QUEUE) == FAST
