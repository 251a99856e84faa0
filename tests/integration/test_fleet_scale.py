# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""scale on real hosts: what runs, what lasts, what is refused."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest
from fleet.story import BIN, Story
from fleet_support import HOSTS

from support import wait_until

pytestmark = pytest.mark.ansible


def units(story: Story, host: str) -> dict[str, str]:
    """instance -> main process of everything that runs."""
    show = "systemctl show -p Id,MainPID,ActiveState --value 'celery-shop-worker@*'"
    blocks = [block.splitlines() for block in story.ssh(host, show).split("\n\n")]
    # systemctl prints the properties in an order of its own: pid, name, state.
    found = {}
    for block in blocks:
        name = next((line for line in block if line.startswith("celery-")), "")
        if "active" in block:
            found[name.partition("@")[2].removesuffix(".service")] = next(line for line in block if line.isdigit())
    return found


def fleet(story: Story) -> dict[str, dict[str, Any]]:
    """What the live workers say: node -> queues and slots. Asked with Celery's own tools."""
    queues, stats = story.celery(
        "ask = app.control.inspect(timeout=2)\nanswer = [ask.active_queues() or {}, ask.stats() or {}]"
    )
    return {
        node: {
            "queues": sorted(queue["name"] for queue in queues.get(node) or []),
            "slots": len(told["pool"].get("processes", [])) or told["pool"].get("max-concurrency"),
        }
        for node, told in stats.items()
    }


def inventory_pools(story: Story) -> dict[str, dict[str, Any]]:
    shown = subprocess.run(
        [str(BIN / "ansible-inventory"), "-i", str(story.inventory), "--host", "worker1"],
        capture_output=True, text=True, check=True, env=story.ansible_environment(),
    ).stdout  # fmt: skip
    return {pool["name"]: pool for pool in json.loads(shown)["celeryops_worker_pools"]}


def scaled(story: Story, host: str) -> str:
    return story.ssh(host, "cat /etc/celeryops/shop/scale.json", check=False)


@pytest.fixture
def pool(shop: Story) -> Iterator[dict[str, Any]]:
    """The first pool of the inventory; afterwards the fleet is as the inventory has it."""
    first, *_others = inventory_pools(shop).values()
    yield first
    if any(scaled(shop, host) for host in HOSTS):
        shop.play("site", celeryops_release="v1", celeryops_scale_reset=True)
    assert not any(scaled(shop, host) for host in HOSTS)


def test_up_live_and_lasting_then_down(shop: Story, pool: dict[str, Any]) -> None:
    name, slots, number = pool["name"], pool["concurrency"] + 2, pool.get("instances", 1) + 1
    before = {host: units(shop, host) for host in HOSTS}
    size = {"celeryops_pool": name, "celeryops_instances": number, "celeryops_concurrency": slots}

    plan = shop.play("scale", "--check", "--diff", **size)
    assert plan.changed > 0 and "would have" in plan.text
    assert {host: units(shop, host) for host in HOSTS} == before, "check mode touches nothing"

    play = shop.play("scale", **size)
    result = play.stats["celeryops_scale"]["hosts"]["worker1"]
    assert (result["added"], result["way"]) == ([f"{name}-{number}"], "pool_size")
    after = {host: units(shop, host) for host in HOSTS}
    for host in HOSTS:
        assert set(after[host]) == {*before[host], f"{name}-{number}"}
        assert {k: v for k, v in after[host].items() if k in before[host]} == before[host], "nobody was restarted"
    live = fleet(shop)
    for host in HOSTS:
        for one in range(1, number + 1):
            assert live[f"shop-{name}-{one}@{host}"]["slots"] == slots

    assert shop.play("scale", **size).changed == 0
    told = shop.play("site", celeryops_release="v1")
    assert told.changed == 0, "the scaling stays"
    assert re.search(rf"worker1 was scaled and stays so: pool {name}: instances {number} \(inventory: 1\)", told.text)
    assert {host: units(shop, host) for host in HOSTS} == after, "and nobody was restarted"

    # A restart keeps it.
    unit = f"celery-shop-worker@{name}-1.service"
    shop.ssh("worker1", f"systemctl restart {unit}")
    assert fleet(shop)[f"shop-{name}-1@worker1"]["slots"] == slots

    shop.play("scale", celeryops_pool=name, celeryops_instances=number - 1, celeryops_concurrency=pool["concurrency"])
    assert set(units(shop, "worker2")) == set(before["worker2"])
    assert fleet(shop)[f"shop-{name}-1@worker2"]["slots"] == pool["concurrency"]
    assert not shop.ssh("worker1", f"ls /etc/celeryops/shop/worker-{name}-{number}.env", check=False)
    assert not scaled(shop, "worker1")


def test_a_drifted_size_is_brought_back(shop: Story, pool: dict[str, Any]) -> None:
    size = {"celeryops_pool": pool["name"], "celeryops_concurrency": pool["concurrency"]}
    node = f"shop-{pool['name']}-1@worker1"
    shop.celery(f"answer = app.control.pool_grow(2, destination=[{node!r}])")
    # Celery starts the processes of a grown pool within five seconds; until then nothing tells that it grew.
    wait_until(lambda: fleet(shop)[node]["slots"] == pool["concurrency"] + 2, what="the growth")
    assert shop.play("scale", **size).changed > 0
    assert fleet(shop)[node]["slots"] == pool["concurrency"]
    assert shop.play("scale", **size).changed == 0


def test_an_emergency_pool_comes_drains_and_goes(shop: Story, pool: dict[str, Any]) -> None:
    queue = pool["queues"][0]
    shop.play(
        "scale", celeryops_pool="emergency", celeryops_queues=queue, celeryops_concurrency=2, celeryops_hosts="worker2"
    )
    live = fleet(shop)
    assert live["shop-emergency-1@worker2"] == {"queues": [queue], "slots": 2}
    assert "shop-emergency-1@worker1" not in live
    told = shop.play("site", celeryops_release="v1")
    assert told.changed == 0 and "pool emergency" in told.text
    # It goes while tasks are running: none of them is lost.
    load = shop.start("load", "--rate", "20", "--slow", "0.02")
    try:
        gone = shop.play("scale", celeryops_pool="emergency", celeryops_instances=0)
        assert gone.stats["celeryops_scale"]["hosts"]["worker2"]["removed"] == ["emergency-1"]
    finally:
        load.stop()
    ledger = shop.ledger("--wait", "60")
    assert (ledger["lost"], ledger["run_twice"]) == ([], [])
    assert "shop-emergency-1@worker2" not in fleet(shop)
    assert "emergency-1" not in units(shop, "worker2")
    assert shop.play("scale", celeryops_pool="emergency", celeryops_instances=0).changed == 0


def test_the_last_consumer_is_not_taken_away(shop: Story, pool: dict[str, Any]) -> None:
    shop.play("scale", celeryops_pool="lonely", celeryops_queues="lonely", celeryops_concurrency=1)
    before = {host: units(shop, host) for host in HOSTS}
    refused = shop.play("scale", celeryops_pool="lonely", celeryops_instances=0, expect=False)
    assert "nobody consumes" in refused.text and "celeryops_confirm=lonely" in refused.text
    assert {host: units(shop, host) for host in HOSTS} == before
    # One host of two is fine, and so is the other one once it is confirmed.
    shop.play("scale", celeryops_pool="lonely", celeryops_instances=0, celeryops_hosts=["worker1"])
    assert "lonely-1" in units(shop, "worker2")
    shop.play("scale", celeryops_pool="lonely", celeryops_instances=0, celeryops_confirm="lonely")
    assert "lonely-1" not in units(shop, "worker2")


def test_threads_are_restarted_and_autoscale_moves_live(shop: Story, pool: dict[str, Any]) -> None:
    name = "auto"
    first = {
        "celeryops_pool": name,
        "celeryops_queues": [name],
        "celeryops_hosts": ["worker1"],
        "celeryops_confirm": name,
    }
    shop.play("scale", **first, celeryops_autoscale={"min": 1, "max": 2})
    pid = units(shop, "worker1")["auto-1"]
    wider = shop.play("scale", **first, celeryops_autoscale={"min": 1, "max": 3})
    assert wider.stats["celeryops_scale"]["hosts"]["worker1"]["way"] == "autoscale"
    assert units(shop, "worker1")["auto-1"] == pid
    fixed = shop.play("scale", **first, celeryops_concurrency=2)
    assert fixed.stats["celeryops_scale"]["hosts"]["worker1"]["way"] == "restart"
    assert units(shop, "worker1")["auto-1"] != pid
    assert fleet(shop)["shop-auto-1@worker1"]["slots"] == 2
    shop.play("scale", celeryops_pool=name, celeryops_instances=0, celeryops_confirm=name)


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"celeryops_instances": 2}, ["celeryops_pool"]),
        ({"celeryops_pool": "nosuch", "celeryops_instances": 2}, ["celeryops_pool", "nosuch", "celeryops_queues"]),
        ({"celeryops_pool": "POOL"}, ["celeryops_instances"]),
        ({"celeryops_pool": "POOL", "celeryops_instances": "many"}, ["celeryops_instances", "many"]),
        (
            {"celeryops_pool": "POOL", "celeryops_instances": 1, "celeryops_hosts": "worker9"},
            ["celeryops_hosts", "worker9"],
        ),
        ({"celeryops_pool": "POOL", "celeryops_instances": 1, "celeryops_hosts": []}, ["celeryops_hosts", "nobody"]),
        ({"celeryops_pool": "POOL", "celeryops_queues": "other", "celeryops_instances": 1}, ["celeryops_queues"]),
        ({"celeryops_pool": "POOL", "celeryops_autoscale": {"max": 2}}, ["celeryops_autoscale"]),
    ],
)
def test_wrong_input_is_named_and_nothing_touched(shop: Story, variables: dict[str, Any], words: list[str]) -> None:
    name = next(iter(inventory_pools(shop)))
    given = {key: name if value == "POOL" else value for key, value in variables.items()}
    before = {host: units(shop, host) for host in HOSTS}
    play = shop.play("scale", expect=False, **given)
    assert all(word in play.text for word in words), play.text[-2000:]
    assert {host: units(shop, host) for host in HOSTS} == before
