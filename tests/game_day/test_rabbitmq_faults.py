# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The shop on RabbitMQ: a second application on worker2, its broker beside Redis on redis1."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from beside import Beside
from fleet.story import Story
from fleet_support import marked_fleet
from scorecard import ROWS, Row, first_begun

from support import wait_until

pytestmark = pytest.mark.ansible

CONFIRMS = {"confirm_publish": True}  # what the producer counts has been taken
SERVER = "rabbitmq-server.service"
OVERRIDES = f"/run/systemd/system/{SERVER}.d"


class Rabbit(Beside):
    """The shop on RabbitMQ."""

    app, ledger_db, results_db = "shopmq", 3, 4

    def __init__(self, shop: Story) -> None:
        super().__init__(shop)
        self.secret = secrets.token_hex(8)
        self.broker = f"amqp://shop:{self.secret}@{self.address}:5672//"

    def install(self) -> None:
        user = [f"default_user = shop\ndefault_pass = {self.secret}", "default_user_tags.monitoring = true"]
        files = {
            "/etc/rabbitmq/enabled_plugins": "[rabbitmq_management].",
            "/etc/rabbitmq/rabbitmq.conf": "\n".join(user),
            # Systemd shall not be faster than the operator.
            f"{OVERRIDES}/test.conf": "[Service]\nRestart=no",
        }
        write = "".join(f"printf '%s\\n' '{text}' >{path}; " for path, text in files.items())
        self.ssh(
            "redis1",
            f"set -e; mkdir -p /etc/rabbitmq {OVERRIDES}; {write}"
            "apt-get -qq install -y --no-install-recommends rabbitmq-server >/dev/null 2>&1",
        )
        groups = {"mq_workers": ["worker2"], "mq_beat": ["worker2"], "rabbitmq": ["redis1"]}
        values = {
            "celeryops_worker_group": "mq_workers",
            "celeryops_beat_group": "mq_beat",
            "celeryops_redis_group": "none",
            "celeryops_broker_url": self.broker,
            "celeryops_transport_options": CONFIRMS,
        }
        self.write(groups, values)

    def client_environment(self) -> dict[str, str]:
        return self.producer(self.broker, CONFIRMS)

    def is_active(self) -> str:
        return self.ssh("redis1", f"systemctl is-active {SERVER}", check=False)

    def remove(self) -> None:
        super().remove()
        self.ssh(
            "redis1",
            f"rm -rf {OVERRIDES}; systemctl daemon-reload; systemctl disable -q --now {SERVER} epmd.socket epmd;"
            " systemctl reset-failed",
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


def test_a_broker_that_is_well_and_what_is_refused(mq: Rabbit) -> None:
    checked = mq.play("broker_check")
    found = checked.stats["celeryops_broker_check"]
    assert (found["broker"], found["alarms"]) == ("amqp", []) and found["verdict"] != "critical"
    assert {"critical", "default", "email", "reports", "maintenance"} <= found["queues"].keys()
    assert all(found["queues"][queue]["consumers"] >= 1 for queue in ("critical", "reports"))
    assert found["unseen"] == "" and mq.secret not in checked.text
    well = mq.play("broker_recover")
    assert well.changed == 0 and "Workers restarted: 0" in well.text
    print(f"second run: {well.seconds:.1f} s")
    wrong = {
        "celeryops_broker_url": "redis://x/0",
        "celeryops_confirm": "worker9",
        "celeryops_broker_timeout": "long",
    }
    refused = mq.play("broker_recover", expect=False, **wrong).text
    for words in [*wrong, "celeryops.runbook.redis_recover", "redis1", "long is no number"]:
        assert words in refused, words


def test_rolling_deploy_under_load(mq: Rabbit) -> None:
    load = mq.start("load", "--rate", "20", "--slow", "0.02")
    try:
        done = mq.play("rolling_deploy", celeryops_release="v2").stats["celeryops_deploy"]
    finally:
        sent = load.stop()
    assert done["succeeded"] and done["release"] == "v2" and sent["refused"] == 0
    ledger = mq.ledger("--wait", "60")
    assert (ledger["lost"], ledger["run_twice"]) == ([], [])
    assert ledger["by_release"].keys() == {"v1", "v2"}


def test_a_killed_rabbitmq_comes_back_and_every_task_is_done(mq: Rabbit) -> None:
    before = mq.mains()
    load = mq.start("load", "--rate", "20", "--slow", "0.02")
    try:
        time.sleep(2)
        mq.ssh("redis1", f"systemctl kill -s KILL {SERVER}")
        killed = time.time()
        wait_until(lambda: mq.is_active() == "failed", 20, "its end")
        down = mq.play("broker_check", expect=False)
        detected = time.time() - killed
        assert "does not answer" in down.text
        plan = mq.play("broker_recover", "--check", "--diff")
        assert "Would do: start" in plan.text
        assert mq.is_active() == "failed", "check mode touches nothing"
        play = mq.play("broker_recover")
        done = play.stats["celeryops_broker_recover"]
        found = done["hosts"]["redis1"]
        assert (found["state"], found["done"], done["restarted"]) == ("down", ["start"], {"worker2": []})
        answers = float(mq.ssh("redis1", f'date -d "$(systemctl show -P ActiveEnterTimestamp {SERVER})" +%s'))
        wait_until(
            lambda: sorted(first_begun(mq, answers, mq.ledger_db)) == mq.workers, 20, "every worker begins a task", 0.5
        )
    finally:
        load.stop()
    ledger = mq.ledger("--wait", "60")
    begun = first_begun(mq, answers, mq.ledger_db)
    print(
        f"known after {detected:.1f} s, cured in {play.seconds:.1f} s, RabbitMQ itself in {found['seconds']} s, "
        f"first tasks {begun}, twice {len(ledger['run_twice'])}"
    )
    assert ledger["lost"] == []
    assert max(begun.values()) < 10
    ROWS.append(Row("`kill -9` of RabbitMQ", "`broker_recover`", detected, max(begun.values()), ledger))
    # Twice is only what a worker had begun when it lost its broker.
    for told in ledger["run_twice"]:
        when = datetime.fromisoformat(told.split(": ", 1)[1].split(", ")[0].split()[-1]).timestamp()
        assert when <= answers, told
    assert mq.mains() == before
    assert mq.ssh("worker2", "systemctl is-active celery-shopmq-beat") == "active"


def test_a_game_day_kills_rabbitmq(mq: Rabbit) -> None:
    wanted = {"celeryops_confirm": "shopmq", "celeryops_faults": "rabbitmq_killed"}
    with marked_fleet(mq):
        told = mq.play("game_day", celeryops_game_day_arguments=mq.mine, **wanted).stats["celeryops_game_day"]
    (row,) = told["faults"]
    print(row)
    assert told["problems"] == [] and row["hosts"] == ["redis1"]
    assert row["sent"] > 20 and row["lost"] == 0
    assert mq.is_active() == "active"


def test_stopped_frozen_and_an_alarm(mq: Rabbit, tmp_path: Path) -> None:
    def fault(command: str, name: str) -> list[dict[str, Any]]:
        role = {"name": "celeryops.runbook.broker", "tasks_from": "recover"}
        return [
            {"name": f"Cause {name}", "ansible.builtin.command": command},
            {"name": f"Cure {name}", "ansible.builtin.include_role": role},
            {"name": f"Note {name}", "ansible.builtin.set_stats": {"data": {name: "{{ celery_broker_recovered }}"}}},
        ]

    tasks = [
        *fault("rabbitmqctl -q stop_app", "stopped"),
        *fault(f"systemctl kill -s STOP {SERVER}", "frozen"),
        *fault("rabbitmqctl -q set_disk_free_limit 100000GB", "full"),
    ]
    file = tmp_path / "faults.yml"
    file.write_text(json.dumps([{"hosts": "rabbitmq", "gather_facts": False, "tasks": tasks}]))
    try:
        play = mq.play(str(file), expect=False)
        said = {name: (found["state"], found["done"]) for name, found in play.stats.items()}
        assert said == {"stopped": ("app_stopped", ["start_app"]), "frozen": ("frozen", ["continue"])}
        assert "redis1: disk alarm" in play.text and "Free space" in play.text
        # Somebody else's RabbitMQ, on no host of the inventory.
        asked = mq.play("broker_recover", expect=False, celeryops_rabbitmq_group="none")
        assert "has to wait: disk space alarm on rabbit@redis1" in asked.text
    finally:
        mq.ssh("redis1", "rabbitmqctl -q set_disk_free_limit 50MB")
