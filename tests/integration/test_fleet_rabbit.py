# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The shop on RabbitMQ: a second application on worker2 of the shared fleet, its broker beside Redis on redis1."""

from __future__ import annotations

import copy
import json
import secrets
import time
from collections.abc import Iterator
from typing import Any

import pytest
from fleet.story import Play, Story

from support import wait_until

pytestmark = pytest.mark.ansible

LEDGER, RESULTS = 3, 4
CONFIRMS = {"confirm_publish": True}  # what the producer counts has been taken


class Rabbit(Story):
    """The same fleet seen from the application shopmq."""

    def __init__(self, shop: Story) -> None:
        self.__dict__.update(copy.copy(shop.__dict__))
        self.secret = secrets.token_hex(8)
        self.extra = shop.fleet / "rabbit.yml"

    def broker(self, host: str) -> str:
        return f"amqp://shop:{self.secret}@{host}:5672//"

    def install(self) -> None:
        self.ssh(
            "redis1",
            "apt-get -qq install -y --no-install-recommends rabbitmq-server >/dev/null 2>&1"
            " && rabbitmq-plugins -q enable rabbitmq_management >/dev/null",
        )
        self.ssh(
            "redis1",
            f"printf '%s\\n' {self.secret} | rabbitmqctl -q add_user shop >/dev/null"
            " && rabbitmqctl -q set_user_tags shop monitoring && rabbitmqctl -q set_permissions shop '.*' '.*' '.*'",
        )
        own = {
            "celeryops_app_name": "shopmq",
            "celeryops_worker_group": "mq_workers",
            "celeryops_beat_group": "mq_beat",
            "celeryops_redis_group": "mq_redis",
            "celeryops_broker_url": self.broker(self.address),
            "celeryops_result_backend": self.url(self.address, RESULTS),
            "celeryops_transport_options": CONFIRMS,
            "celeryops_environment": {"SHOP_LEDGER_URL": self.url(self.address, LEDGER)},
        }
        hosts = {"mq_workers": {"worker2": {}}, "mq_beat": {"worker2": {}}, "rabbitmq": {"redis1": {}}}
        self.extra.touch(mode=0o600)
        self.extra.write_text(
            json.dumps({name: {"hosts": members} for name, members in hosts.items()} | {"all": {"vars": {}}})
        )
        self.variables = self.extra.with_name("rabbit-vars.json")
        self.variables.touch(mode=0o600)
        self.variables.write_text(json.dumps(own))

    def play(self, playbook: str, *arguments: str, expect: bool | None = True, **variables: Any) -> Play:
        mine = ("-i", str(self.extra), "-e", f"@{self.variables}")
        return super().play(playbook, *mine, *arguments, expect=expect, **variables)

    def client_environment(self) -> dict[str, str]:
        return {
            "CELERY_BROKER_URL": self.broker(self.address),
            "CELERY_RESULT_BACKEND": self.url(self.address, RESULTS),
            "CELERYOPS_TRANSPORT_OPTIONS": json.dumps(CONFIRMS),
            "SHOP_LEDGER_URL": self.url(self.address, LEDGER),
        }

    def remove(self) -> None:
        for db in (LEDGER, RESULTS):
            self.redis("FLUSHDB", db=db)
        self.ssh(
            "worker2",
            "systemctl disable -q --now 'celery-shopmq.target' 'celery-shopmq-*' 2>/dev/null;"
            " for i in $(systemctl list-units --all --plain --no-legend 'celery-shopmq-*' | cut -d' ' -f1); do"
            ' systemctl disable -q --now "$i"; done;'
            " rm -rf /etc/systemd/system/celery-shopmq* /etc/systemd/system/*.wants/celery-shopmq* /srv/shopmq"
            " /etc/celeryops/shopmq; systemctl daemon-reload; systemctl reset-failed",
            check=False,
        )
        self.ssh(
            "redis1",
            "rm -rf /run/systemd/system/rabbitmq-server.service.d; systemctl daemon-reload;"
            " systemctl disable -q --now rabbitmq-server epmd.socket epmd.service; systemctl mask -q rabbitmq-server",
            check=False,
        )


@pytest.fixture(scope="module")
def mq(shop: Story) -> Iterator[Rabbit]:
    story = Rabbit(shop)
    try:
        story.install()
        story.play("site", celeryops_release="v1")
        yield story
    finally:
        story.remove()


def test_site_is_done_and_the_broker_is_well(mq: Rabbit) -> None:
    checked = mq.play("broker_check")
    found = checked.stats["celeryops_broker_check"]
    assert (found["broker"], found["alarms"]) == ("amqp", []) and found["verdict"] != "critical"
    assert {"critical", "default", "email", "reports", "maintenance"} <= found["queues"].keys()
    assert all(found["queues"][queue]["consumers"] >= 1 for queue in ("critical", "reports"))
    assert mq.secret not in checked.text
    well = mq.play("broker_recover")
    assert well.changed == 0 and "Workers restarted: 0" in well.text


def test_rolling_deploy_under_load(mq: Rabbit) -> None:
    load = mq.start("load", "--rate", "20", "--slow", "0.02")
    try:
        done = mq.play("rolling_deploy", celeryops_release="v2").stats["celeryops_deploy"]
        assert done["succeeded"] and done["release"] == "v2"
    finally:
        load.stop()
    ledger = mq.ledger("--wait", "60")
    assert (ledger["lost"], ledger["run_twice"]) == ([], [])


def test_killed_under_load_and_recovered(mq: Rabbit) -> None:
    # Systemd shall not be faster than the operator.
    mq.ssh("redis1", "mkdir -p /run/systemd/system/rabbitmq-server.service.d && printf '[Service]\\nRestart=no\\n' >"
           " /run/systemd/system/rabbitmq-server.service.d/test.conf && systemctl daemon-reload")  # fmt: skip
    load = mq.start("load", "--rate", "20", "--slow", "0.02")
    try:
        time.sleep(3)
        mq.ssh("redis1", "systemctl kill -s KILL rabbitmq-server")
        wait_until(
            lambda: mq.ssh("redis1", "systemctl is-active rabbitmq-server", check=False) == "failed", 20, "its end"
        )
        down = mq.play("broker_check", expect=False)
        assert "does not answer" in down.text
        plan = mq.play("broker_recover", "--check", "--diff")
        assert "Would do: start" in plan.text
        assert mq.ssh("redis1", "systemctl is-active rabbitmq-server", check=False) == "failed", (
            "check mode touches nothing"
        )
        cured = mq.play("broker_recover").stats["celeryops_broker_recover"]
        assert (cured["hosts"]["redis1"]["state"], cured["hosts"]["redis1"]["done"]) == ("down", ["start"])
        print(f"detected and cured in {cured['hosts']['redis1']['seconds']} s; restarted {cured['restarted']}")
        time.sleep(3)
    finally:
        load.stop()
    ledger = mq.ledger("--wait", "60")
    assert ledger["lost"] == []
    print("run twice:", ledger["run_twice"])


def test_application_stopped_frozen_and_alarm(mq: Rabbit) -> None:
    mq.ssh("redis1", "rabbitmqctl -q stop_app")
    cured = mq.play("broker_recover").stats["celeryops_broker_recover"]["hosts"]["redis1"]
    assert (cured["state"], cured["done"]) == ("app_stopped", ["start_app"])
    mq.ssh("redis1", "systemctl kill -s STOP rabbitmq-server")
    cured = mq.play("broker_recover").stats["celeryops_broker_recover"]["hosts"]["redis1"]
    assert (cured["state"], cured["done"]) == ("frozen", ["continue"])
    mq.ssh("redis1", "rabbitmqctl -q set_disk_free_limit 100TB")
    try:
        refused = mq.play("broker_recover", expect=False)
        assert "disk alarm" in refused.text and "Free space" in refused.text
    finally:
        mq.ssh("redis1", "rabbitmqctl -q set_disk_free_limit 50MB")


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"celeryops_broker_url": "redis://x/0"}, ["celeryops_broker_url", "redis_recover"]),
        ({"celeryops_confirm": "worker9"}, ["celeryops_confirm", "redis1"]),
        ({"celeryops_broker_timeout": "long"}, ["celeryops_broker_timeout", "long"]),
    ],
)
def test_wrong_input(mq: Rabbit, variables: dict[str, Any], words: list[str]) -> None:
    play = mq.play("broker_recover", expect=False, **variables)
    assert all(word in play.text for word in words), play.text[-2000:]
