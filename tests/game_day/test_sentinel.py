# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The shop on a Redis under Sentinel: a second application on worker2, its Redis on worker1 and worker2."""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Iterator
from typing import Any

import pytest
from beside import Beside
from fleet.story import Play, Story
from fleet_support import marked_fleet
from scorecard import ROWS, Row, first_begun

from support import wait_until

pytestmark = pytest.mark.ansible

ALL = ("redis1", "worker1", "worker2")
NODES = ALL[1:]


class Guarded(Beside):
    """The shop on a Redis under Sentinel."""

    app, ledger_db, results_db = "shopha", 5, 6

    def __init__(self, shop: Story) -> None:
        super().__init__(shop)
        self.secret, self.watchword, self.sender = (secrets.token_hex(8) for _one in range(3))
        self.users = self.passwords()
        config = (self.fleet / "ssh_config").read_text()
        self.addresses = dict(re.findall(r"^Host (\w+)\s+HostName (\S+)", config, re.MULTILINE))
        self.options = {"master_name": "shopha", "sentinel_kwargs": {"password": self.watchword}}

    def passwords(self) -> dict[str, str]:
        roles = ("worker", "beat", "operator", "replica", "sentinel")
        return {**{role: secrets.token_hex(8) for role in roles}, "producer": self.sender}

    def broker(self, user: str = "", password: str = "") -> str:
        login = f"{user}:{password or self.secret}"
        return ";".join(f"sentinel://{login}@{self.addresses[host]}:26379/0" for host in ALL)

    def rotate(self) -> Play:
        """Every password but that of the shop, which sends meanwhile."""
        before, self.secret, self.users = self.secret, secrets.token_hex(8), self.passwords()
        self.prepare()
        return self.play("redis_rotate_secret", celeryops_redis_password_before=before)

    def prepare(self) -> None:
        groups = {"ha_workers": NODES[1:], "ha_beat": NODES[1:], "ha_redis": NODES, "ha_sentinels": ALL}
        values = {
            "celeryops_worker_group": "ha_workers",
            "celeryops_beat_group": "ha_beat",
            "celeryops_redis_group": "ha_redis",
            "celeryops_sentinel_group": "ha_sentinels",
            "celeryops_broker_url": self.broker(),
            "celeryops_redis_users": [
                {"name": role, "role": role, "password": password} for role, password in self.users.items()
            ],
            "celeryops_transport_options": self.options,
        }
        self.write(groups, values)

    def play(self, playbook: str, *arguments: str, expect: bool | None = True, **variables: Any) -> Play:
        play = super().play(playbook, *arguments, expect=expect, **variables)
        assert not any(word in play.text for word in (self.secret, self.watchword, *self.users.values()))
        return play

    def client_environment(self) -> dict[str, str]:
        return self.producer(self.broker("producer", self.sender), self.options)

    def ask(self, host: str, *command: str) -> str:
        """A Sentinel."""
        return self.ssh(host, f"REDISCLI_AUTH={self.watchword} redis-cli -p 26379 {' '.join(command)}")

    def primary(self, host: str = "redis1") -> str:
        told = self.ask(host, "SENTINEL", "GET-MASTER-ADDR-BY-NAME", "shopha").split()
        return next(name for name, address in self.addresses.items() if address == told[0])

    def server(self, host: str, command: str) -> str:
        return self.ssh(host, f"REDISCLI_AUTH={self.secret} redis-cli {command}", check=False)

    def refused(self, host: str) -> list[tuple[str, str]]:
        """Reason and user of each refusal that this Redis has noted."""
        rows = self.server(host, "ACL LOG").splitlines()
        told = [[rows[index + 1] for index, row in enumerate(rows) if row == name] for name in ("reason", "username")]
        return list(zip(*told, strict=True))

    def role(self, host: str) -> str:
        return self.server(host, "INFO replication")

    def follows(self, host: str) -> bool:
        return "role:slave" in self.role(host) and "master_link_status:up" in self.role(host)

    def remove(self) -> None:
        super().remove()
        for host in ALL:
            gone = "redis-sentinel" + (" redis-server" if host in NODES else "")
            files = "/etc/redis/sentinel.conf"
            if host in NODES:
                files = "/etc/redis /var/lib/redis/* /etc/systemd/system/redis-server.service.d"
            self.ssh(
                host,
                f"apt-get -qq purge -y {gone} >/dev/null 2>&1; rm -rf {files} /var/backups/celeryops/shopha;"
                " systemctl daemon-reload; systemctl reset-failed",
                check=False,
            )


@pytest.fixture(scope="module")
def ha(shop: Story) -> Iterator[Guarded]:
    story = Guarded(shop)
    try:
        story.prepare()
        story.play("site", celeryops_release="v1")
        yield story
    finally:
        story.remove()


def test_a_group_that_is_well_and_what_is_refused(ha: Guarded) -> None:
    assert (ha.primary(), ha.follows("worker2")) == ("worker1", True)
    # Debian's own Sentinel watches this one, and would spoil the next failover.
    assert all("mymaster" not in ha.ask(host, "SENTINEL", "MASTERS") for host in ALL)
    assert not any(ha.ssh(host, "journalctl -u redis-sentinel | grep mymaster", check=False) for host in ALL)
    well = ha.play("redis_failover")
    assert well.changed == 0 and "Nothing to do" in well.text and "restarted: 0" in well.text
    print(f"failover without a wish {well.seconds:.1f} s")
    wrong = {
        "celeryops_redis_primary_wanted": "redis1",
        "celeryops_force": "maybe",
        "celeryops_failover_timeout": "long",
    }
    refused = ha.play("redis_failover", expect=False, **wrong).text
    for words in [*wrong, "worker1, worker2", "maybe is neither", "long is no number"]:
        assert words in refused, words


def test_a_planned_failover_under_load(ha: Guarded) -> None:
    load = ha.start("load", "--rate", "20", "--slow", "0.02")
    try:
        time.sleep(1)
        rotated = ha.rotate()
        report = rotated.stats["celeryops_redis_rotate_secret"]
        print(f"passwords rotated {rotated.seconds:.1f} s")
        assert report["left"] == {} and len(report["restarted"]["worker2"]) == 2
        before = ha.mains()
        wish = {"celeryops_redis_primary_wanted": "worker2"}
        plan = ha.play("redis_failover", "--check", "--diff", **wish)
        assert plan.changed > 0 and "Would be the primary" in plan.text and ha.primary() == "worker1"
        began = time.time()
        play = ha.play("redis_failover", **wish)
        done = play.stats["celeryops_redis_failover"]
        assert (done["action"], done["primary"]) == ("switch", f"{ha.addresses['worker2']}:6379")
        assert [ha.primary(host) for host in ALL] == ["worker2"] * 3 and ha.follows("worker1")
        time.sleep(2)
    finally:
        sent = load.stop()
    ledger = ha.ledger("--wait", "60")
    window = ha.window(began, time.time())
    print(
        f"planned: {play.seconds:.1f} s, {done}; sent {sent}, wait {window['wait']}, longest gap"
        f" {window['longest_gap']}, twice {ledger['run_twice']}"
    )
    assert (ledger["lost"], ledger["run_twice"]) == ([], [])
    assert done["restarted"] == {"worker2": []} and ha.mains() == before
    assert done["gap"] < 10
    ROWS.append(
        Row(
            "another primary is wanted, under Sentinel",
            "`redis_failover`",
            None,
            play.seconds,
            ledger,
            f"no writes for {done['gap']:.1f} s; queue wait p99 {window['wait']['p99']:.2f} s",
        )
    )
    # Each as itself, with the new password. Refused was the administrator's, which was tried before it was accepted.
    assert {who for host in NODES for who in ha.refused(host)} <= {("auth", "default")}
    rows = [row for host in NODES for row in ha.server(host, "CLIENT LIST").splitlines() if "cmd=client" not in row]
    users = {word.removeprefix("user=") for row in rows for word in row.split() if word.startswith("user=")}
    assert {"worker", "beat", "replica", "sentinel"} <= users and "default" not in users, users
    files = "/etc/redis/*.conf /etc/celeryops/shopha/*"
    assert not any(ha.secret in ha.ssh(host, f"cat {files}", check=False) for host in ALL)
    # Neither the playbook nor site undoes it.
    assert ha.play("redis_failover", **wish).changed == 0
    again = ha.play("site", celeryops_release="v1")
    print(f"second run of site {again.seconds:.1f} s")
    assert again.changed == 0
    assert ha.primary() == "worker2" and ha.follows("worker1")


def test_a_backup_comes_back_on_the_primary_and_on_no_other(ha: Guarded) -> None:
    ha.server("worker2", "SET marker before")
    file = ha.play("redis_backup", celeryops_redis_host="worker2").stats["celeryops_redis_backup"]["file"]
    ha.server("worker2", "SET marker after")
    variables = {"celeryops_file": file, "celeryops_redis_host": "worker1", "celeryops_confirm": "worker1"}
    refused = ha.play("redis_restore", expect=False, **variables)
    assert f"name {ha.addresses['worker2']}:6379 as the primary" in refused.text and refused.changed == 0
    play = ha.play("redis_restore", **{**variables, "celeryops_redis_host": "worker2", "celeryops_confirm": "worker2"})
    print(f"restored {play.seconds:.1f} s")
    assert [ha.primary(host) for host in ALL] == ["worker2"] * 3
    wait_until(lambda: ha.follows("worker1"), 20, "the replica copies it", 0.5)
    assert [ha.server(host, "GET marker") for host in NODES] == ["before"] * 2


def test_a_dead_primary_is_replaced_and_no_replica_is_left(ha: Guarded) -> None:
    before = ha.mains()
    load = ha.start("load", "--rate", "20", "--slow", "0.02")
    try:
        time.sleep(1)
        died = time.time()
        ha.ssh("worker2", "systemctl kill -s KILL redis-server; systemctl stop redis-server")
        play = ha.play("redis_failover")
        done = play.stats["celeryops_redis_failover"]
        wait_until(
            lambda: sorted(first_begun(ha, died + 5, ha.ledger_db)) == ha.workers, 30, "every worker begins a task", 0.5
        )
    finally:
        sent = load.stop()
    ledger = ha.ledger("--wait", "60")
    begun = first_begun(ha, died + 5, ha.ledger_db)
    window = ha.window(died, time.time())
    print(
        f"dead: {play.seconds:.1f} s, {done}; sent {sent}, first tasks after death + 5 s {begun}, wait"
        f" {window['wait']}, longest gap {window['longest_gap']}, lost {ledger['lost']}, twice {ledger['run_twice']}"
    )
    assert done["action"] in ("wait", "none")  # whoever was faster
    assert ha.primary() == "worker1" and done["restarted"] == {"worker2": []} and ha.mains() == before
    # Only what the replica had not yet received.
    assert len(ledger["lost"]) <= 2
    assert window["longest_gap"] < 15
    remark = f"no task began for {window['longest_gap']:.1f} s; queue wait p99 {window['wait']['p99']:.2f} s"
    remark += "; lost is what no replica had received" if ledger["lost"] else ""
    cured = max(begun.values()) + 5
    ROWS.append(Row("the primary dies, under Sentinel", "the Sentinels, `redis_failover`", None, cured, ledger, remark))
    refused = ha.play("redis_failover", expect=False, celeryops_redis_primary_wanted="any").text
    assert "no healthy replica" in refused and "Nothing was touched" in refused
    assert ha.ssh("worker2", "systemctl is-active celery-shopha-beat") == "active"

    # Back, it follows. Then the primary goes while the Sentinels cannot agree.
    ha.ssh("worker2", "systemctl start redis-server")
    wait_until(lambda: ha.follows("worker2"), 40, "the old primary follows", 1)
    ha.ssh("redis1", "systemctl stop redis-sentinel")
    ha.ssh("worker1", "systemctl stop redis-sentinel redis-server")
    assert "cannot agree" in ha.play("redis_failover", expect=False, celeryops_failover_timeout=20).text
    forced = ha.play("redis_failover", celeryops_force=True).stats["celeryops_redis_failover"]
    print(f"forced: {forced}")
    assert forced["action"] == "force" and ha.primary("worker2") == "worker2"
    ha.ssh("redis1", "systemctl start redis-sentinel")
    ha.ssh("worker1", "systemctl start redis-sentinel redis-server")
    wait_until(lambda: ha.follows("worker1") and ha.primary() == "worker2", 40, "all follow", 1)


def test_a_game_day_kills_the_primary(ha: Guarded) -> None:
    primary = ha.primary()
    (replica,) = set(NODES) - {primary}
    wanted = {"celeryops_confirm": "shopha", "celeryops_faults": "redis_primary_killed"}
    with marked_fleet(ha):
        told = ha.play("game_day", celeryops_game_day_arguments=ha.mine, **wanted).stats["celeryops_game_day"]
    (row,) = told["faults"]
    print(row)
    assert told["problems"] == [] and sorted(row["hosts"]) == sorted(NODES)
    # Only what the replica had not yet received.
    assert row["sent"] > 20 and row["lost"] <= 2
    assert ha.primary() == replica
    wait_until(lambda: ha.follows(primary), 40, "the old primary follows", 1)
