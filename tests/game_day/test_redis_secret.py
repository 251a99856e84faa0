# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Users of Redis on real hosts: introduced and rotated under load, counted by id, and taken back."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from fleet.story import Story
from fleet_support import HOSTS
from scorecard import ROWS, Row

pytestmark = pytest.mark.ansible


def users(generation: int) -> list[dict[str, Any]]:
    return [
        {"name": role, "role": role, "password": f"{role}-secret-{generation}"}
        for role in ("worker", "beat", "operator")
    ]


def play(story: Story, name: str, *arguments: str, generation: int, **options: Any) -> Any:
    done = story.play(name, *arguments, celeryops_redis_users=users(generation), **options)
    for user in (*users(1), *users(2)):
        secret = user["password"]
        assert secret not in done.text and hashlib.sha256(secret.encode()).hexdigest() not in done.text
    return done


def connected(story: Story) -> set[str]:
    rows = story.redis("CLIENT", "LIST").splitlines()
    return {word.partition("=")[2] for row in rows for word in row.split() if word.startswith("user=")}


def answers(story: Story, user: str, password: str) -> str:
    return story.ssh("redis1", f"REDISCLI_AUTH={password} redis-cli --no-auth-warning --user {user} PING 2>&1 || true")


def everywhere(story: Story, command: str) -> None:
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda host: story.ssh(host, command), HOSTS))


@pytest.fixture
def users_of_redis(shop: Story) -> Iterator[None]:
    """Afterwards there is one password for all again."""
    secret, file = "/etc/celeryops/shop/secret.env", "/etc/redis/celeryops.acl"
    everywhere(shop, f"cp -p {secret} /root/secret.env")
    shop.ssh("redis1", f"cp -p {file} /root/celeryops.acl")
    yield
    everywhere(
        shop, f"mv /root/secret.env {secret}; rm -f /etc/celeryops/shop/beat.env /etc/celeryops/shop/operator.env"
    )
    everywhere(shop, "systemctl restart 'celery-shop-*.service'")
    shop.ssh("redis1", f"mv /root/celeryops.acl {file}")
    shop.redis("ACL", "LOAD")
    assert shop.redis("ACL", "USERS") == "default"


@pytest.mark.usefixtures("users_of_redis")
def test_rotated_under_load(shop: Story) -> None:
    shop.redis("ACL", "LOG", "RESET")
    load = shop.start("load", "--rate", "20", "--slow", "0.02")
    try:
        # From one password for all to a user for each: the same playbook.
        first = play(shop, "redis_rotate_secret", generation=1)
        assert first.changed > 0 and {"worker", "beat"} <= connected(shop)
        assert "redis://worker:worker-secret-1@" in shop.ssh("worker1", "cat /etc/celeryops/shop/secret.env")
        assert shop.ssh("worker1", "stat -c %a:%U /etc/celeryops/shop/operator.env /etc/celeryops/shop/beat.env") == (
            "600:root\n600:root"
        )
        assert shop.ssh("worker2", "ls /etc/celeryops/shop").split().count("beat.env") == 0
        assert not any(
            user["password"] in shop.ssh("redis1", "cat /etc/redis/*.acl /etc/redis/*.conf") for user in users(1)
        )

        plan = play(shop, "redis_rotate_secret", "--check", "--diff", generation=2)
        assert plan.changed > 0 and "worker-secret-1" in shop.ssh("worker1", "cat /etc/celeryops/shop/secret.env")
    finally:
        sent = load.stop()
    assert sent["refused"] == 0, sent
    load = shop.start("load", "--rate", "100", "--slow", "0.02")
    try:
        done = play(shop, "redis_rotate_secret", "--diff", generation=2)
        report = done.stats["celeryops_redis_rotate_secret"]
        assert report["left"] == {} and all(len(report["restarted"][host]) == 2 for host in HOSTS)
        assert {user["passwords"] for user in report["users"].values()} == {1}
        again = play(shop, "redis_rotate_secret", generation=2)
        assert again.changed == 0 and not any(again.stats["celeryops_redis_rotate_secret"]["restarted"].values())
    finally:
        sent = load.stop()
    assert sent["refused"] == 0, sent
    ledger = shop.ledger("--wait", "60")
    assert (ledger["lost"], ledger["run_twice"]) == ([], [])
    remark = "100 tasks a second, none refused to the producer"
    ROWS.append(
        Row("passwords changed under running workers", "`redis_rotate_secret`", None, done.seconds, ledger, remark)
    )
    assert shop.redis("ACL", "LOG") == "", "nobody was refused anything"
    for user in users(1):
        assert "WRONGPASS" in answers(shop, user["name"], user["password"])
    for user in users(2):
        assert answers(shop, user["name"], user["password"]) == "PONG"
    shop.redis("ACL", "LOG", "RESET")
    # The modules are the operator, and need no more than it may.
    assert play(shop, "health_check", generation=2, expect=None).rc in (0, 2)
    assert shop.redis("ACL", "LOG") == ""


def test_wrong_input_is_named(shop: Story) -> None:
    wrong = shop.play(
        "redis_rotate_secret", expect=False, celeryops_settle="soon", celeryops_broker_url="amqp://rabbit//"
    )
    assert "celeryops_settle: soon is no number of seconds" in wrong.text
    assert "celeryops_broker_url: is no URL of Redis" in wrong.text and wrong.changed == 0
    wrong = shop.play("redis_rotate_secret", expect=False, celeryops_redis_users=[users(1)[0]])
    assert "celeryops_redis_users: has no user of the role operator" in wrong.text and wrong.changed == 0
    assert shop.redis("ACL", "USERS") == "default"


def test_only_a_marked_host_is_emptied(shop: Story) -> None:
    """Marked with -e it is not; the name and the mark of the inventory are both needed."""
    mark = shop.fleet / "host_vars" / "redis1.yml"
    before = shop.redis("DBSIZE")
    wrong = shop.play("redis_flush", expect=False, celeryops_confirm="redis2", celeryops_redis_development=True)
    assert "celeryops_redis_development: redis1 is not marked" in wrong.text and wrong.changed == 0
    assert "celeryops_confirm: must equal the name of the host" in wrong.text
    mark.parent.mkdir(exist_ok=True)
    mark.write_text("celeryops_redis_development: true\n")
    try:
        plan = shop.play("redis_flush", "--check", celeryops_confirm="redis1")
        assert plan.changed > 0 and shop.redis("DBSIZE") == before and int(before) > 0
        done = shop.play("redis_flush", celeryops_confirm="redis1")
    finally:
        mark.unlink()
    report = done.stats["celeryops_redis_flush"]
    assert report["removed"] >= int(before) and report["file"] in shop.ssh("redis1", f"ls {report['file']}")
    shop.ssh("redis1", f"rm {report['file']}*")
    everywhere(shop, "systemctl restart 'celery-shop-*.service'")
