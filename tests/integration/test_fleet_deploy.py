# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""rolling_deploy and rollback on real hosts under load; every task is counted by its id."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from fleet.story import Background, Story
from fleet_support import HOSTS, LOCK, Running, processes, releases

from support import wait_until

pytestmark = [pytest.mark.ansible, pytest.mark.timeout(900)]

QUEUES = ("critical", "default", "email", "reports", "maintenance")
# Tasks a second: what is promised of a deploy and of the way back, and enough for the rest.
RATE, FEWER = 110, 20
# New before old: two hosts on two processors shared with the load have no capacity to spare.
SURGE = {"celeryops_surge": "always"}


def consumers(story: Story) -> dict[str, list[str]]:
    """node -> queues, asked with Celery's own tools."""
    found = story.celery("answer = app.control.inspect(timeout=2).active_queues() or {}")
    return {node: sorted(queue["name"] for queue in queues) for node, queues in found.items()}


@pytest.fixture(scope="module")
def whole(shop: Story) -> dict[str, list[str]]:
    """The fleet as it has to be after each test: node -> queues."""
    return consumers(shop)


class Load:
    """Mixed tasks all the time, counted by their ids over all rates."""

    def __init__(self, story: Story) -> None:
        self.story = story
        self.sent: list[dict[str, Any]] = []
        self.rate = 0
        self.program: Background | None = None

    def at(self, rate: int) -> None:
        if rate != self.rate:
            self.stop()
            self.rate, self.program = rate, self.story.start("load", "--rate", str(rate))

    def stop(self) -> None:
        if self.program:
            self.sent.append({"wanted": self.rate, **self.program.stop()})
            self.program = None

    def running(self) -> bool:
        return self.program is not None and self.program.running()


@pytest.fixture(scope="module")
def load(shop: Story) -> Iterator[Load]:
    """Mixed tasks all the time, and a look twice a second whether every queue has a consumer."""
    for bad in ("import", "crash", "unknown-task", "canary"):
        shop.make_release(f"v3-{bad}", bad)
    shop.redis("FLUSHDB", db=2)
    load = Load(shop)
    load.at(FEWER)
    watch = shop.start("watch", "--queues", *QUEUES, nice=True)
    yield load
    load.stop()
    ledger = shop.ledger("--wait", "60")
    watched = watch.stop()
    print(load.sent, {key: ledger[key] for key in ("sent", "done", "wait", "by_release")}, watched)
    assert all(sent["rate"] >= sent["wanted"] * 0.91 for sent in load.sent), load.sent
    assert ledger["lost"] == [] and ledger["run_twice"] == []
    assert ledger["done"] == ledger["sent"]
    assert watched["samples"] > 0 and watched["without_consumer"] == {}


@pytest.fixture
def check(shop: Story, whole: dict[str, list[str]], load: Load) -> Callable[[str], None]:
    """Assert that the fleet is complete on one release, with nothing left of the deploy."""

    def check(release: str) -> None:
        assert load.running()
        assert releases(shop) == {host: {release} for host in HOSTS}
        assert consumers(shop) == whole
        assert set(processes(shop)) == {
            "celery-shop-beat@worker1",
            *(f"celery-shop-worker@{i}-1@{h}" for i in ("fast", "bulk") for h in HOSTS)
        }  # fmt: skip
        for host in HOSTS:
            assert (
                shop.ssh(host, "ls -d /run/celeryops-shop.* /etc/celeryops/shop/*surge* 2>/dev/null", check=False) == ""
            )
        assert shop.redis("EXISTS", LOCK) == "0"
        # What is late is counted at the end; here only what is certain.
        ledger = shop.ledger("--grace", "600")
        assert ledger["run_twice"] == [] and ledger["lost"] == []

    return check


@pytest.mark.parametrize(
    ("playbook", "arguments", "variables", "said"),
    [
        ("rolling_deploy", [], {"celeryops_release": "v/2"}, 'celeryops_release: "v/2" is no release id'),
        (
            "rolling_deploy",
            [],
            {"celeryops_worker_group": "nobody"},
            "celeryops_worker_group: the inventory has no hosts",
        ),
        ("rolling_deploy", [], {"celeryops_serial": 0}, "celeryops_serial: 0 is no number of hosts"),
        ("rolling_deploy", [], {"celeryops_canary": {"tsk": "a"}}, "celeryops_canary: give {}"),
        ("rolling_deploy", ["--limit", "worker1"], {}, "run it without --limit"),
        ("rollback", [], {"celeryops_release": "v99"}, "celeryops_release: v99 is not on worker1, worker2"),
        ("rollback", [], {}, "v1 is the first release of these hosts, there is none to go back to"),
        ("rollback", [], {"celeryops_worker_group": "nobody"}, "celeryops_worker_group: the inventory has no hosts"),
    ],
)
def test_wrong_requests_are_refused(
    shop: Story, playbook: str, arguments: list[str], variables: dict[str, Any], said: str
) -> None:
    before = processes(shop), releases(shop)
    given = {"celeryops_release": "v2", **variables} if playbook == "rolling_deploy" else variables
    play = shop.play(playbook, *arguments, expect=False, **given)
    assert said in " ".join(play.text.split())
    assert play.changed == 0 and shop.redis("EXISTS", LOCK) == "0"
    assert (processes(shop), releases(shop)) == before


def test_check_mode_says_what_would_happen(shop: Story, load: Load) -> None:
    before = processes(shop), releases(shop)
    play = shop.play("rolling_deploy", "--check", "--diff", celeryops_release="v2", **SURGE)
    text = " ".join(play.text.split())
    assert (
        "would start fast-surge, bulk-surge on v2, quiet, drain and stop fast-1, bulk-1, switch current from v1 to v2"
        in text
    )
    assert play.changed > 0
    assert (processes(shop), releases(shop)) == before
    assert shop.redis("EXISTS", LOCK) == "0"
    for host in HOSTS:
        assert shop.ssh(host, "ls /srv/shop/releases; ls -d /run/celeryops-shop.* 2>/dev/null", check=False) == "v1"


def test_deploy_and_back(shop: Story, load: Load, check: Callable[[str], None]) -> None:
    load.at(RATE)
    began = time.time()
    with Running(shop, "rolling_deploy", "good", celeryops_release="v2", **SURGE) as deploy:
        deploy.reached(r"PLAY \[\(3/6\)")
        second = shop.play("rolling_deploy", expect=False, celeryops_release="v2")
        assert re.search(
            r"the deploy lock is held by .*release v2.*celeryops_deploy_takeover=[0-9a-f-]{36}", second.text
        )
        assert second.changed == 0
        assert deploy.process.wait(600) == 0, deploy.text[-3000:]
    load.at(FEWER)
    check("v2")
    window = shop.window(began, time.time())
    print("wait during the deploy:", window["wait"])

    running = processes(shop)
    again = shop.play("rolling_deploy", celeryops_release="v2")
    assert again.changed == 0 and processes(shop) == running
    assert again.stats["celeryops_deploy"]["unchanged"] == list(HOSTS)
    assert again.stats["celeryops_deploy"]["tasks"] == {}
    assert again.text.count("PLAY [(5/6)") == 1  # proved all at once

    load.at(RATE)
    back = shop.play("rollback", **SURGE)
    load.at(FEWER)
    assert back.stats["celeryops_deploy"]["succeeded"] is True
    assert set(back.stats["celeryops_deploy"]["hosts"]) == set(HOSTS)
    told = back.stats["celeryops_deploy"]["tasks"]
    window = shop.window(back.began, back.ended)
    print("wait during the rollback:", window["wait"], "as the workers tell it:", told)
    assert (told["cut_off"], told["uncounted"]) == (0, [])
    assert told["begun"] > RATE * back.seconds / 2
    check("v1")


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ("import", r"worker[12], step .*shop_price_list"),
        (
            "unknown-task",
            r"worker1, step 'Judge release, broker and fleet'.*shop.send_receipt, waiting in queue email.dead \(1\)",
        ),
        ("crash", r"worker1, step 'Start the instances'.*the price list is missing.*Put back: this host runs .* on v1"),
        ("canary", r"worker1, step 'Prove with a canary.*the price list is empty.*Put back: this host runs .* on v1"),
    ],
)
def test_bad_release_is_refused(shop: Story, check: Callable[[str], None], bad: str, said: str) -> None:
    if bad == "unknown-task":
        shop.celery("answer = app.send_task('shop.send_receipt', (1,), queue='email.dead').id")
    before = processes(shop)
    try:
        # The canary is the one that gets far: there without surge instances, for the other host consumes everything.
        surge = {"celeryops_surge": "auto"} if bad == "canary" else SURGE
        play = shop.play("rolling_deploy", expect=False, celeryops_release=f"v3-{bad}", **surge)
    finally:
        shop.redis("DEL", "email.dead")
    failures = play.stats["celeryops_deploy"]["failures"]
    assert re.search(said, " ".join(failures)), failures
    check("v1")
    untouched = {name: pid for name, pid in before.items() if name.endswith("worker2")}
    assert untouched.items() <= processes(shop).items()


def test_killed_in_mid_batch_then_run_again(shop: Story, check: Callable[[str], None]) -> None:
    with Running(shop, "rolling_deploy", "killed", celeryops_release="v2", **SURGE) as deploy:
        deploy.reached(r"TASK \[.*Drain the old instances\]")
        wait_until(lambda: "celery-shop-worker@fast-1@worker1" not in processes(shop), 90, "the old instance stopped")
        deploy.kill()
    assert shop.redis("EXISTS", LOCK) == "1"
    assert "celery-shop-beat@worker1" not in processes(shop)
    play = shop.play("rolling_deploy", celeryops_release="v2", **SURGE)
    assert play.stats["celeryops_deploy"]["succeeded"] is True
    check("v2")


def test_frozen_worker_is_named(shop: Story, check: Callable[[str], None]) -> None:
    """From v2 back to v1; the worker of the second host freezes while the first is rolled."""
    frozen = processes(shop)["celery-shop-worker@fast-1@worker2"]
    with Running(shop, "rolling_deploy", "frozen", celeryops_release="v1", **SURGE) as deploy:
        deploy.reached(r"TASK \[.*Start the new instances\]")
        shop.ssh("worker2", f"kill -STOP {frozen}")
        try:
            began = time.monotonic()
            assert deploy.process.wait(240) != 0
            print(f"stopped after {time.monotonic() - began:.0f} s")
        finally:
            shop.ssh("worker2", f"kill -CONT {frozen}")
        assert re.search(r"no answer from shop-fast-1@worker2", deploy.text), deploy.text[-3000:]
    # The first host is done, the second untouched, beat goes on with the release all workers know.
    assert releases(shop) == {"worker1": {"v1", "v2"}, "worker2": {"v2"}}
    assert processes(shop)["celery-shop-worker@fast-1@worker2"] == frozen
    beat = shop.ssh("worker1", "tr '\\0' ' ' </proc/$(systemctl show -p MainPID --value celery-shop-beat)/cmdline")
    assert "/releases/v2/" in beat
    play = shop.play("rolling_deploy", celeryops_release="v1", **SURGE)
    assert "worker1" in play.stats["celeryops_deploy"]["unchanged"]
    check("v1")
