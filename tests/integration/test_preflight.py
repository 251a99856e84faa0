# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What the roles make of their variables, run by Ansible; no host is needed for it."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from urllib.parse import quote

import pytest

from support import ROOT, Ansible, free_port, wait_until

pytestmark = pytest.mark.ansible

REFUSED = {
    "include": (["-I", "shop.extra"], "--include"),
    "include-joined": (["-Ishop.extra"], "--include"),
    "include-long": (["--include=shop.extra"], "--include"),
    "include-behind-a-flag": (["-EI", "shop.extra"], "--include"),
    "queues": (["-Qother"], "queues"),
    "name": (["-n", "other@host"], "node name"),
}
FINE = ["-E", "--without-gossip", "-lINFO", "-Ofair", "--disable-prefetch"]


def test_extra_args_of_a_pool(ansible: Ansible) -> None:
    """--include would win over the role's own, and the runtime would not be loaded."""
    pools = {**{name: args for name, (args, _words) in REFUSED.items()}, "fine": FINE}
    include = {"name": "celeryops.runbook.worker", "tasks_from": "preflight"}
    (_included, _validated, refused) = ansible.play(
        [
            {
                "ansible.builtin.include_role": include,
                "vars": {
                    "celeryops_app_name": "shop",
                    "celeryops_app": "shop.celery:app",
                    "celeryops_broker_url": "redis://127.0.0.1/0",
                    "celeryops_worker_pools": [
                        {"name": name, "queues": ["q"], "extra_args": args} for name, args in pools.items()
                    ],
                },
            }
        ],
        expected=3,
    )
    said = refused["msg"].split("; celeryops_worker_pools")
    assert refused["failed"] and len(said) == len(REFUSED)
    for text, (name, (_args, words)) in zip(said, REFUSED.items()):
        assert f"pool {name}" in text and words in text
    assert 'list the modules in "include" of the application' in refused["msg"]


def test_wrong_settings_of_redis(ansible: Ansible) -> None:
    """All of them in one message, which holds no password."""
    secret = "administrator-1"
    users = [
        {"name": "default", "role": "worker", "password": "worker-worker"},
        {"name": "shop", "role": "producer", "password": "p!", "rules": ["everything", ">guess-me-not"]},
        {"name": "shop", "role": "producer", "password": secret},
    ]
    variables = {
        "celeryops_broker_url": f"redis://:{secret}@127.0.0.1/0",
        "celery_redis_maxmemory": "much",
        "celery_redis_extra": {"Maxmemory-Policy": "allkeys-lru", "requirepass": "guess-me-not"},
        "celeryops_redis_users": users,
    }
    include = {"name": "celeryops.runbook.redis", "tasks_from": "preflight"}
    (_included, _validated, refused) = ansible.play(
        [{"ansible.builtin.include_role": include, "vars": variables}], expected=3
    )
    for words in (
        "celery_redis_maxmemory is much",
        "only noeviction will do",
        "celery_redis_extra sets requirepass",
        '"default" is no name for a user',
        "two users are called shop",
        "the password of shop is missing or shorter",
        'shop has the rule "everything"',
        "shop has the rule that is a password",
        "no user of the role operator",
        "a user has the password of the administrator",
    ):
        assert words in refused["msg"], words
    assert refused["failed"] and secret not in refused["msg"] and "guess-me-not" not in refused["msg"]


def test_a_group_of_redis_that_could_not_fail_over(ansible: Ansible) -> None:
    asked = {
        "celeryops_broker_url": "redis://:not%20this@127.0.0.1:6379/0",
        "celery_redis_hosts": ["localhost"],
        "celery_redis_sentinel_hosts": ["localhost", "localhost"],
        "celeryops_redis_primary": "elsewhere",
        "celeryops_redis_min_replicas": 1,
    }
    role = {"name": "celeryops.runbook.redis", "tasks_from": "preflight"}
    (_included, _validated, refused) = ansible.play([{"ansible.builtin.include_role": role, "vars": asked}], expected=3)
    for words in (
        "celeryops_sentinel_group: has 2 hosts; at least three", "one Redis only", "master_name must say",
        "celeryops_broker_url: there are Sentinels", "celeryops_redis_primary: elsewhere is not in",
        "Sentinel forgets quotes", "celeryops_redis_min_replicas: 1 is no number",
    ):  # fmt: skip
        assert words in refused["msg"], words
    assert "not this" not in ansible.output and "not%20this" not in ansible.output
    # With users Sentinel keeps the password of its own, and may do without the administrator's.
    users = [{"name": role, "role": role, "password": f"{role} password"} for role in ("worker", "sentinel")]
    own = {**asked, "celeryops_redis_users": users}
    refused = ansible.play([{"ansible.builtin.include_role": role, "vars": own}], expected=3)[-1]
    for words in (
        "no user of the role operator, whom playbooks connect as",
        "no user of the role replica, whom replicas connect to the primary as",
        "celeryops_redis_users (of the role sentinel), celery_redis_sentinel_password: Sentinel forgets quotes",
    ):
        assert words in refused["msg"], words
    assert "sentinel password" not in ansible.output


def test_a_quoted_password_of_the_url_opens_redis(ansible: Ansible, tmp_path: Path) -> None:
    """The URL says it as kombu reads it; Redis has its hash only."""
    password, port = 'a@b:c/d%2B e+f"g\\h', free_port()
    config = tmp_path / "celeryops.conf"
    url = f"redis://:{quote(password, safe='+')}@127.0.0.1:{port}/0"
    role = ROOT / "roles" / "redis"
    ansible.play(
        [
            {"ansible.builtin.include_vars": {"file": str(role / "defaults" / "main.yml")}},
            {"ansible.builtin.set_fact": {"celery_redis_acl_file": str(tmp_path / "celeryops.acl")}},
            {
                "celeryops.runbook.redis_users": {
                    "port": port, "path": "{{ celery_redis_acl_file }}", "password": "{{ celery_redis_password }}",
                    "group": "root",
                },
                "vars": {"celeryops_broker_url": url},
            },
            {
                "ansible.builtin.template": {
                    "src": str(role / "templates" / "celeryops.conf.j2"), "dest": str(config), "mode": "0600"
                },
                "vars": {"celeryops_broker_url": url, "celery_redis_bind": ["127.0.0.1"]},
            },
        ]
    )  # fmt: skip

    def answer(secret: str) -> str:
        command = ["redis-cli", "-p", str(port), "PING"]
        environment = {**os.environ, "REDISCLI_AUTH": secret}
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False).stdout.strip()

    assert not any(password in made.read_text() for made in (config, tmp_path / "celeryops.acl"))
    with subprocess.Popen(["redis-server", str(config), "--dir", str(tmp_path)], stdout=subprocess.DEVNULL) as server:
        try:
            wait_until(lambda: answer(password) == "PONG", 10, "the password to be right")
            assert "NOAUTH" in answer("wrong")
        finally:
            server.kill()
