# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""celery_silent_info run by Ansible: workers that are well, busy, stopped by a signal, and that consume nothing."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from support import Ansible, RedisServer, Worker, send_task, wait_until, workers

pytestmark = pytest.mark.ansible
RUNTIME = ("--include", "celeryops.worker")


def test_who_is_silent_and_who_is_only_busy(ansible: Ansible, broker: RedisServer, venv: Path) -> None:
    queues = {"well@lab": "well", "busy@lab": "busy", "frozen@lab": "frozen", "idle@lab": "idle"}
    fleet = [
        Worker(broker.url(), name, queues=queue, concurrency=1, arguments=RUNTIME) for name, queue in queues.items()
    ]
    asked = {
        "broker_url": broker.url(), "virtualenv": str(venv), "patience": 3,
        "workers": [{"node": name, "queues": [queue]} for name, queue in queues.items()],
    }  # fmt: skip
    cancel = {"consumers": [{"queue": "idle", "state": "absent"}], "destination": ["idle@lab"]}
    with workers(*fleet):
        assert ansible.module("celery_silent_info", asked)["silent"] == {}
        task = send_task(broker.url(), "lab.sleep", 60, queue="busy")
        wait_until(lambda: task in fleet[1].log.read_text(), what="it begins")
        fleet[2].signal(signal.SIGSTOP)
        connection = {key: asked[key] for key in ("broker_url", "virtualenv")}
        assert "failed" not in ansible.module("celery_control", {**connection, **cancel})
        found = ansible.module("celery_silent_info", asked)
        fleet[2].signal(signal.SIGCONT)
        fleet[1].kill()
    assert found["silent"] == {"frozen@lab": "does not answer", "idle@lab": "does not consume idle"}
    assert not found["changed"]
