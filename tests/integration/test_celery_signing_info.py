# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""celery_signing_info run by Ansible against real workers that refuse what is not signed, and that do not care."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from ansible_collections.celeryops.runbook.plugins.module_utils.engine import signing
from support import Ansible, RedisServer, Worker, _in_celery, wait_until, workers

pytestmark = pytest.mark.ansible

LOOK, SEND = "celeryops.runbook.celery_signing_info", "celeryops.runbook.celery_task"
OLD, NEW = ({"id": name, "secret": f"{name}-" + "s" * 40} for name in ("old", "new"))
PLAIN = "plain@lab does not sign: run site, which gives it the keys and restarts it"


def test_keys_and_messages(ansible: Ansible, broker: RedisServer, venv: Path, tmp_path: Path) -> None:
    url, ring, secrets = broker.url(), tmp_path / "signing.json", tmp_path / "secret.env"

    def hold(*keys: dict[str, str]) -> None:
        fresh = tmp_path / "fresh"
        fresh.touch(mode=0o600)
        fresh.write_text(signing.check(keys, True, "test").dump())
        fresh.replace(ring)

    def play(*tasks: dict[str, Any]) -> list[dict[str, Any]]:
        found = ansible.play(list(tasks), defaults={"environment_file": str(secrets), "virtualenv": str(venv)})
        assert "ssss" not in ansible.output
        return found

    hold(OLD)
    secrets.write_text(f'CELERY_BROKER_URL="{url}"\n{signing.VARIABLE}="{ring}"\n')
    strict = Worker(
        url, "strict@lab", queues="jobs", pool="threads", concurrency=1,
        arguments=("--include", "celeryops.worker"), environment={signing.VARIABLE: str(ring)},
    )  # fmt: skip
    with workers(strict, Worker(url, "plain@lab", queues="other", pool="solo")):
        code = "for queue in a: labapp.app.send_task('lab.add', [1, 1], queue=queue)"
        _in_celery(url, code, "jobs", "idle", "idle")
        wait_until(lambda: broker.cli("LLEN", "jobs.dead") == "1", 20, "the dead letter of what was refused")
        _idle, _held, refused = play(
            {SEND: {"name": "lab.add", "args": [1, 1], "queue": "idle"}},
            {SEND: {"name": "lab.late", "args": [600], "queue": "jobs"}},
            {LOOK: {"wait_timeout": -1}},
        )
        assert refused["failed"] and refused["category"] == "precondition"
        assert "timeout: must be above 0 seconds, and wait_timeout not below" in refused["msg"]
        wait_until(lambda: broker.cli("HLEN", "unacked") == "1", 10, "the task that is held")

        old, new = play({LOOK: {"keys": ["old"]}, "check_mode": True}, {LOOK: {"keys": ["new"], "unsigned": False}})
        assert not old["changed"] and old["nodes"] == {
            "plain@lab": None,
            "strict@lab": {
                "accepts": ["old"], "signs": "old", "require": True, "refused": 1, "passed": 0, "problem": "",
                "pid": strict.pid,
            },
        }  # fmt: skip
        assert old["messages"] == new["messages"] == {"old": {"idle": 1, "": 1}, "unsigned": {"idle": 2}}
        assert (old["dead"], old["refused"]) == ({"unsigned": {"jobs.dead": 1}}, 1)
        # A worker takes the unsigned ones today; whoever accepts the new key only refuses what the old one signed.
        assert old["leaving"] == {"unsigned": {"idle": 2}} and old["not_ready"] == [PLAIN]
        assert new["leaving"] == {"old": {"idle": 1, "": 1}} and not new.get("failed"), new
        assert new["not_ready"] == [PLAIN, "strict@lab does not accept key new"]

        hold(NEW, OLD)
        broker.cli("CONFIG", "RESETSTAT")

        def drain() -> None:
            # Only the module reads what is held in one go: it has counted once, and waits.
            wait_until(lambda: "cmdstat_hscan:" in broker.cli("INFO", "commandstats"), 30, "the first count")
            broker.cli("DEL", "idle")

        draining = threading.Thread(target=drain)
        draining.start()
        (waited,) = play({LOOK: {"keys": ["old", "new"], "wait_timeout": 60}})
        draining.join()
        assert (waited["leaving"], waited["messages"]) == ({}, {"old": {"": 1}}) and not waited["changed"]
        assert waited["not_ready"] == [PLAIN]
        assert waited["nodes"]["strict@lab"]["accepts"] == ["new", "old"]
        assert waited["nodes"]["strict@lab"]["signs"] == "new"
        strict.kill()
