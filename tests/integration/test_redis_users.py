# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Users of a real Redis, step by step, set up by Ansible; and what each role is refused."""

from __future__ import annotations

import difflib
import hashlib
import os
import socket
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

from ansible_collections.celeryops.runbook.plugins.module_utils.engine import acl
from ansible_collections.celeryops.runbook.plugins.module_utils.engine.connection import (
    read_environment_file,
    read_operator_file,
)
from support import ROOT, Ansible, RedisServer

pytestmark = pytest.mark.ansible

ADMIN, OLD, NEW = "administrator-1", "old password: 1", "new password: 2"
USERS = [
    {"name": "worker", "role": "worker", "password": OLD},
    {"name": "beat", "role": "beat", "password": "beat-beat-beat"},
    {"name": "shop", "role": "producer", "password": "shop-shop-shop", "queues": ["default"]},
    {"name": "figures", "role": "exporter", "password": "figures-figures"},
    {"name": "operator", "role": "operator", "password": "operator-operator"},
]
SECRETS = [ADMIN, NEW, *(user["password"] for user in USERS)]


class Lab:
    """A Redis with an aclfile, and the module that sets its users up."""

    def __init__(self, ansible: Ansible, place: Path) -> None:
        self.ansible = ansible
        self.file = place / "celeryops.acl"
        self.file.write_text("user default on nopass ~* &* +@all\n")
        options = ("--aclfile", str(self.file), "--enable-debug-command", "yes")
        self.redis = RedisServer(*options, directory=place / "data")

    def arguments(self, users: list[dict[str, Any]], password: str, **options: Any) -> dict[str, Any]:
        return {
            "port": self.redis.port, "password": password, "users": users, "queues": ["default", "email"],
            "databases": [0, 1], "path": str(self.file), "group": "root", **options,
        }  # fmt: skip

    def bring(self, users: list[dict[str, Any]] | None = None, password: str = ADMIN, **options: Any) -> dict[str, Any]:
        check = options.pop("check", False)
        asked = self.arguments(USERS if users is None else users, password, **options)
        result = self.ansible.module("redis_users", asked, check=check)
        said = f"{result} {self.ansible.output}"
        for secret in (*SECRETS, password):
            assert secret not in said and hashlib.sha256(secret.encode()).hexdigest() not in said
        if not result.get("failed") and not check:
            self.redis.password = password
        return result

    def ask(self, user: str, password: str, *command: str, db: int = 0) -> str:
        done = subprocess.run(
            ["redis-cli", "-p", str(self.redis.port), "--user", user, "-n", str(db), "--no-auth-warning", *command],
            env={**os.environ, "REDISCLI_AUTH": password}, capture_output=True, text=True, check=False,
        )  # fmt: skip
        return (done.stdout + done.stderr).strip()

    def connect(self, user: str, password: str) -> socket.socket:
        opened = socket.create_connection(("127.0.0.1", self.redis.port), 5)
        opened.sendall(f'AUTH {user} "{password}"\r\n'.encode())
        assert opened.recv(100) == b"+OK\r\n"
        return opened


def with_worker(password: str) -> list[dict[str, Any]]:
    return [{**USERS[0], "password": password}, *USERS[1:]]


def differ(told: dict[str, Any]) -> list[str]:
    lines = difflib.ndiff(*(told["diff"][when].splitlines() for when in ("before", "after")))
    return [line[0] + line[2:] for line in lines if line[0] in "-+"]


@pytest.fixture
def lab(ansible: Ansible, tmp_path: Path) -> Iterator[Lab]:
    made = Lab(ansible, tmp_path)
    with made.redis:
        yield made


def test_a_password_is_rotated_in_steps(lab: Lab) -> None:
    plan = lab.bring(check=True)
    assert plan["changed"] and "worker" in plan["diff"]["after"] and lab.redis.cli("ACL", "USERS") == "default"
    first = lab.bring()
    assert first["changed"] and first["applied"] and first["finished"]
    assert {name: user["passwords"] for name, user in first["users"].items()} == {
        "default": 1, "worker": 1, "beat": 1, "shop": 1, "figures": 1, "operator": 1
    }  # fmt: skip
    assert stat.S_IMODE(lab.file.stat().st_mode) == 0o640
    assert not any(secret in lab.file.read_text() for secret in SECRETS)
    assert not lab.bring()["changed"] and not lab.bring(check=True)["changed"]
    assert "NOAUTH" in subprocess.run(
        ["redis-cli", "-p", str(lab.redis.port), "PING"], capture_output=True, text=True, check=False
    ).stdout  # fmt: skip

    # A worker is connected; its password is to change.
    with lab.connect("worker", OLD) as held:
        plan, both = lab.bring(with_worker(NEW), check=True), lab.bring(with_worker(NEW))
        for told in (plan, both):
            assert differ(told) == ["-worker: 1 password", "+worker: 2 passwords"]
        assert both["left"] == {"worker": "password"} and both["users"]["worker"]["passwords"] == 2
        assert [lab.ask("worker", word, "PING") for word in (OLD, NEW)] == ["PONG", "PONG"]
        assert not lab.bring(with_worker(NEW))["changed"], "nothing is taken away by this step"
        # Who was there before holds the next step up. The way back is open until then.
        late = lab.bring(with_worker(NEW), step="finish", settle=1)
        assert late["failed"] and "worker (from 127.0.0.1)" in late["msg"] and late["left"] == {"worker": "password"}
        assert lab.bring(with_worker(OLD))["changed"] and not lab.bring(with_worker(OLD))["changed"]
        held.sendall(b"PING\r\n")
        assert held.recv(100) == b"+PONG\r\n", "no connection was closed"
    assert lab.bring(with_worker(NEW))["left"] == {"worker": "password"}
    since = lab.file.stat().st_mtime
    assert lab.bring(with_worker(NEW), databases=[0, 1, 2])["changed"]
    assert lab.file.stat().st_mtime == since, "its time is that of the newest password"
    plan = lab.bring(with_worker(NEW), step="finish", check=True)
    assert plan["changed"] and lab.ask("worker", OLD, "PING") == "PONG"
    assert lab.bring(with_worker(NEW), step="finish", settle=5)["finished"]
    assert lab.ask("worker", NEW, "PING") == "PONG" and "WRONGPASS" in lab.ask("worker", OLD, "PING")
    assert not lab.bring(with_worker(NEW), step="finish")["changed"]
    # Confirmed, it does not wait; a user who goes loses his connections.
    with lab.connect("shop", "shop-shop-shop") as held:
        fewer = [user for user in with_worker(NEW) if user["name"] != "shop"]
        assert "shop (from 127.0.0.1)" in lab.bring(fewer, step="finish")["msg"]
        gone = lab.bring(fewer, step="finish", confirm=["shop"])
        assert gone["finished"] and "shop" not in lab.redis.cli("ACL", "USERS")
        assert held.recv(100) == b""
    # What Redis has is what it finds at a restart.
    lab.redis.stop()
    lab.redis.start()
    assert lab.ask("worker", NEW, "PING") == "PONG" and lab.ask("operator", "operator-operator", "DBSIZE") == "0"


def test_the_administrator_is_rotated_with_the_password_before(lab: Lab) -> None:
    lab.bring()
    refused = lab.bring(password=NEW)
    assert refused["failed"] and "celeryops_redis_password_before" in refused["msg"]
    assert lab.ask("default", ADMIN, "PING") == "PONG" and "WRONGPASS" in lab.ask("default", NEW, "PING")
    assert lab.bring(password=NEW, password_before=ADMIN)["left"] == {"default": "password"}
    assert [lab.ask("default", word, "PING") for word in (ADMIN, NEW)] == ["PONG", "PONG"]
    assert lab.bring(password=NEW, step="finish", settle=5)["finished"]
    assert "WRONGPASS" in lab.ask("default", ADMIN, "PING")


def test_what_was_done_by_hand_is_kept_until_the_end_and_healed(lab: Lab) -> None:
    lab.bring()
    lab.redis.cli("ACL", "SETUSER", "guest", "on", ">guest-guest-guest", "~guest:*", "+get")
    lab.redis.cli("ACL", "SETUSER", "shop", "+flushall", "~*")
    healed = lab.bring()
    assert healed["changed"] and healed["left"] == {"guest": "user"}
    assert len(differ(healed)) == 2 and "+flushall" in differ(healed)[0], "what was healed, and nothing else"
    assert "NOPERM" in lab.ask("shop", "shop-shop-shop", "FLUSHALL")
    lab.redis.stop()
    lab.redis.start()
    assert lab.ask("guest", "guest-guest-guest", "GET", "guest:1") == "" and not lab.bring()["changed"]
    assert lab.bring(step="finish", settle=5)["finished"] and "guest" not in lab.redis.cli("ACL", "USERS")


def test_one_that_does_not_run_finds_them_at_its_start(lab: Lab) -> None:
    lab.redis.stop()
    written = lab.bring()
    assert written["changed"] and not written["applied"]
    lab.redis.start()
    assert lab.ask("worker", OLD, "LLEN", "default") == "0" and not lab.bring()["changed"]


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"name": "default"}, "'default' is no name for a user"),
    ({"name": "a b"}, "'a b' is no name for a user"),
    ({"name": "beat"}, "two users are called beat"),
    ({"password": "p!"}, "the password of worker is missing, shorter than 12"),
    ({"rules": ["everything"]}, "worker has the rule 'everything'"),
    ({"keys": ["two words"]}, "'two words' must not be empty or hold blanks"),
    ({"rules": ["+nosuchcommand"]}, "nosuchcommand"),
]


def test_wrong_input_is_named(lab: Lab) -> None:
    asked = [lab.arguments([{**USERS[0], **change}, *USERS[1:]], ADMIN) for change, _words in WRONG]
    for refused, (_change, words) in zip(
        lab.ansible.play([{"celeryops.runbook.redis_users": one} for one in asked]), WRONG, strict=True
    ):
        assert refused["failed"] and words in refused["msg"]
    assert lab.file.read_text() == "user default on nopass ~* &* +@all\n" and lab.redis.cli("ACL", "USERS") == "default"


FORBIDDEN: dict[str, list[list[str]]] = {
    "worker": [["KEYS", "*"], ["SCAN", "0"], ["CLIENT", "LIST"], ["SELECT", "7"], ["RENAME", "a", "b"]],
    "beat": [["KEYS", "*"], ["LRANGE", "default", "0", "1"], ["RPOP", "default"], ["SELECT", "7"]],
    "shop": [
        ["LPUSH", "email", "x"], ["LRANGE", "default", "0", "-1"], ["RPOP", "default"], ["DEL", "default"],
        ["GET", "cart"], ["HGETALL", "unacked"], ["PUBLISH", "/0.celery.pidbox", "{}"],
        ["SET", "celeryops:lock:deploy:shop", "x"],
        ["SUBSCRIBE", "/0.celeryev/worker.*"], ["SELECT", "7"], ["KEYS", "*"], ["SCAN", "0"],
    ],
    "figures": [
        ["LRANGE", "default", "0", "-1"], ["GET", "celery-task-meta-1"], ["LPUSH", "default", "x"], ["DEL", "default"],
        ["PUBLISH", "/0.celery.pidbox", "{}"], ["SLOWLOG", "GET"], ["SELECT", "7"],
    ],
    "operator": [["SWAPDB", "0", "1"], ["CONFIG", "SET", "maxmemory", "1"], ["BGSAVE"], ["SELECT", "7"]],
}  # fmt: skip
NEVER = [
    ["FLUSHALL"], ["FLUSHDB"], ["CONFIG", "SET", "dir", "/"], ["DEBUG", "SLEEP", "0"], ["SHUTDOWN", "NOSAVE"],
    ["ACL", "LIST"], ["KEYS", "*"], ["MONITOR"], ["REPLICAOF", "NO", "ONE"], ["MODULE", "LIST"], ["SAVE"],
    ["SCRIPT", "FLUSH"],
    ["MIGRATE", "127.0.0.1", "1", "k", "0", "1"],
]  # fmt: skip
ALLOWED: dict[str, list[list[str]]] = {
    "worker": [["LPUSH", "any", "x"], ["HGETALL", "unacked"], ["SELECT", "1"]],
    "beat": [["LPUSH", "any", "x"], ["HSET", "celeryops:beat:shop", "tick", "1"]],
    "shop": [["LPUSH", "default", "x"], ["LPUSH", "default\x06\x169", "x"], ["GET", "celery-task-meta-1"]],
    "figures": [["LLEN", "default"], ["INFO", "memory"], ["DBSIZE"]],
    "operator": [["SCAN", "0"], ["LRANGE", "default", "0", "-1"], ["CLIENT", "LIST"], ["CONFIG", "GET", "maxclients"]],
}


def test_what_each_role_is_refused(lab: Lab) -> None:
    lab.bring()
    passwords = {user["name"]: user["password"] for user in USERS}
    for name, commands in FORBIDDEN.items():
        for command in [*commands, *NEVER]:
            said = lab.ask(name, passwords[name], *command)
            # A command that is unknown or wrong is no proof.
            assert said.startswith("NOPERM"), (name, command, said)
        for command in ALLOWED[name]:
            said = lab.ask(name, passwords[name], *command)
            assert "NOPERM" not in said and "ERR" not in said, (name, command, said)
    # Lua does no more than its user.
    said = lab.ask("shop", passwords["shop"], "EVAL", "return redis.call('LPUSH', 'email', 'x')", "0")
    assert "can't access" in said or "ACL failure" in said, said
    assert lab.redis.cli("ACL", "LOG") != ""


def test_a_prefix_keeps_applications_apart(lab: Lab) -> None:
    lab.bring(key_prefix="shop[1]:")
    assert lab.ask("worker", OLD, "LPUSH", "shop[1]:default", "x") == "1"
    assert lab.ask("shop", "shop-shop-shop", "LPUSH", "shop[1]:default", "x") == "2"
    for name, password in (("worker", OLD), ("shop", "shop-shop-shop"), ("operator", "operator-operator")):
        assert "NOPERM" in lab.ask(name, password, "LPUSH", "default", "x"), name
        assert "NOPERM" in lab.ask(name, password, "LPUSH", "shop1:default", "x"), name


def test_the_rules_of_a_role_are_understood_by_redis(lab: Lab) -> None:
    for role in acl.ROLES:
        words = acl.rules(role, acl.Layout("p:", ("q", "q*")), keys=["own:*"], extra=["+geoadd", "-get"])
        assert lab.redis.cli("ACL", "SETUSER", role, "reset", "on", *words) == "OK", role
        assert lab.redis.cli("ACL", "DRYRUN", role, "GEOADD", "own:1", "1", "1", "x") == "OK", role
        assert "no permissions" in lab.redis.cli("ACL", "DRYRUN", role, "GET", "own:1"), role


def test_who_connects_as_whom(ansible: Ansible, tmp_path: Path) -> None:
    """The URL names the place, the users who."""
    password = 'a/b@c:d%+e"f$g\\h'
    users = [{**user, "password": password + str(user["name"])} for user in USERS]
    role = ROOT / "roles" / "_unit"

    def template(source: str, target: str, **more: Any) -> dict[str, Any]:
        return {
            "ansible.builtin.template": {
                "src": str(role / "templates" / source), "dest": str(tmp_path / target), "mode": "0600"
            },
            "vars": {
                "celeryops_app_name": "shop", "celeryops_app": "shop:app", "celeryops_redis_users": users,
                "celeryops_config_dir": str(tmp_path),
                "celeryops_broker_url": "redis://:administrator@redis1:6379/0",
                "celeryops_result_backend": "redis://redis1:6379/1", **more,
            },
        }  # fmt: skip

    elsewhere = {"celeryops_result_backend": "db+postgresql://me:mine@db/results"}
    ansible.play(
        [
            {"ansible.builtin.include_vars": {"file": str(role / "defaults" / "main.yml")}},
            {"ansible.builtin.include_vars": {"file": str(role / "vars" / "main.yml")}},
            template("secret.env.j2", "secret.env"),
            template("user.env.j2", "operator.env", celery_unit_user_role="operator"),
            template("user.env.j2", "beat.env", celery_unit_user_role="beat", **elsewhere),
            template("secret.env.j2", "plain.env", celeryops_redis_users=[]),
        ]
    )
    secret = read_environment_file(str(tmp_path / "secret.env"))
    operator = read_operator_file(str(tmp_path / "secret.env"))
    beat = read_environment_file(str(tmp_path / "beat.env"))
    for values, name in ((secret, "worker"), (operator, "operator"), (beat, "beat")):
        url = urlsplit(values["CELERY_BROKER_URL"])
        assert (url.hostname, url.port, url.path, url.username) == ("redis1", 6379, "/0", name)
        assert unquote(url.password or "") == password + name
    result = urlsplit(secret["CELERY_RESULT_BACKEND"])
    assert (result.username, unquote(result.password or ""), result.path) == ("worker", password + "worker", "/1")
    assert beat["CELERY_RESULT_BACKEND"] == elsewhere["celeryops_result_backend"]
    plain = read_environment_file(str(tmp_path / "plain.env"))
    assert plain == {
        "CELERY_BROKER_URL": "redis://:administrator@redis1:6379/0", "CELERY_RESULT_BACKEND": "redis://redis1:6379/1"
    }  # fmt: skip
