# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""upgrade_celery on real hosts: Celery 5.6 to 5.7 under load, what is refused, what is put back."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from fleet.story import OLDER, Story
from fleet_support import HOSTS, LOCK, Running, processes, releases

pytestmark = [pytest.mark.ansible, pytest.mark.timeout(900)]

# The hosts share two processors with the load: how long a task waits here says nothing of the release.
PATIENT = {"queue_latency": {"warning": 30, "critical": 60}, "queue_depth": {"warning": 500, "critical": 1000}}


def versions(story: Story) -> dict[str, str]:
    """node -> version of the Celery it runs, asked with Celery's own tools."""
    told = story.celery("answer = app.control.broadcast('celeryops_release', reply=True, timeout=2)")
    return {node: reply["celery"].rpartition(".")[0] for one in told for node, reply in one.items()}


def beat_release(story: Story) -> str:
    command = "tr '\\0' '\\n' </proc/$(systemctl show -p MainPID --value celery-shop-beat)/cmdline | head -1"
    return story.ssh("worker1", command).partition("/releases/")[2].partition("/")[0]


@pytest.fixture(scope="module")
def older(shop: Story) -> Iterator[str]:
    """The fleet on Celery 5.6; afterwards it is as it was."""
    # Not yet known to 5.6: seen from 5.7 it is a setting that is gone.
    shop.make_release("v56", requirements=OLDER, settings="app.conf.task_retry_on_worker_lost = True")
    before = processes(shop), releases(shop)
    refused = shop.play("upgrade_celery", expect=False, celeryops_release="v56")
    for words in (
        "downgrade: the new release has older libraries (celery 5.7",
        "go back with celeryops.runbook.rollback",
        "setting-removed: the setting task_retry_on_worker_lost is known to Celery 5.7",
    ):
        assert words in refused.text
    assert (processes(shop), releases(shop)) == before and shop.redis("EXISTS", LOCK) == "0"
    quick = {"celeryops_serial": 2, "celeryops_surge": "never"}
    shop.play("rolling_deploy", celeryops_release="v56", celeryops_deploy_build=False, **quick)
    assert set(versions(shop).values()) == {"5.6"}
    yield "v56"
    if releases(shop) != {host: {"v1"} for host in HOSTS}:
        shop.play("rolling_deploy", celeryops_release="v1", **quick)
    for host in HOSTS:
        shop.ssh(host, "rm -rf /srv/shop/releases/v56")


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        (
            {"celeryops_staging_group": "nobody", "celeryops_soak": "long"},
            "celeryops_staging_group: the inventory has no hosts in a group nobody; name the group of the hosts "
            "that lead, or leave it out for the first worker host; celeryops_soak: long is no number of seconds",
        ),
        ({"celeryops_staging_group": "redis"}, "redis1 has no release of shop: install it with site"),
        ({"celeryops_worker_group": "nobody"}, "celeryops_worker_group: the inventory has no hosts in a group nobody"),
    ],
)
def test_wrong_requests_are_refused(shop: Story, variables: dict[str, Any], said: str) -> None:
    before = processes(shop), releases(shop)
    play = shop.play("upgrade_celery", expect=False, celeryops_release="v1", **variables)
    assert said in " ".join(play.text.split()) and play.changed == 0
    assert (processes(shop), releases(shop)) == before and shop.redis("EXISTS", LOCK) == "0"


def test_upgrade_with_a_soak_under_load(shop: Story, older: str) -> None:
    shop.redis("FLUSHDB", db=2)
    load = shop.start("load", "--rate", "20")
    try:
        # Nobody has that many workers, so the soak fails.
        unfit = shop.play(
            "upgrade_celery", expect=False, celeryops_release="v1", celeryops_soak=1,
            celeryops_health_thresholds={"worker_count": {"warning": 99, "critical": 99}}, celeryops_surge="never",
        )  # fmt: skip
        assert "worker1 was put back on v56" in " ".join(unfit.text.split())
        assert releases(shop) == {host: {"v56"} for host in HOSTS} and shop.redis("EXISTS", LOCK) == "0"
        wanted = {"celeryops_release": "v1", "celeryops_soak": 8, "celeryops_health_thresholds": PATIENT}
        with Running(shop, "upgrade_celery", "upgrade", celeryops_surge="auto", **wanted) as upgrade:
            upgrade.reached(r"TASK \[.*Ask broker and workers, and judge\]", 400)
            mixed = versions(shop)
            assert {node.rpartition("@")[2]: version for node, version in mixed.items()} == {
                "worker1": "5.7", "worker2": "5.6"
            }  # fmt: skip
            assert beat_release(shop) == older, "beat goes last"
            assert upgrade.process.wait(600) == 0, upgrade.text[-3000:]
    finally:
        sent = load.stop()
    assert sent["rate"] >= 18, sent
    assert releases(shop) == {host: {"v1"} for host in HOSTS} and beat_release(shop) == "v1"
    assert set(versions(shop).values()) == {"5.7"} and shop.redis("EXISTS", LOCK) == "0"
    ledger = shop.ledger("--wait", "60")
    print(sent, {key: ledger[key] for key in ("sent", "done", "wait", "by_release")})
    assert (ledger["lost"], ledger["run_twice"]) == ([], []) and ledger["done"] == ledger["sent"]
    assert set(ledger["by_release"]) == {"v1", "v56"}

    running = processes(shop)
    again = shop.play("upgrade_celery", celeryops_release="v1", celeryops_soak=8)
    assert again.changed == 0 and processes(shop) == running and "had led: worker1" in again.text
    assert again.stats["celeryops_upgrade"]["findings"] == []
