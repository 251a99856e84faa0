# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""celery_upgrade_info run by Ansible on real Celery 5.6 and 5.7, and on messages that Celery wrote."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from support import ROOT, Ansible, RedisServer, _in_celery, celery_venv, send_task

pytestmark = pytest.mark.ansible

APP = "from celery import Celery\napp = Celery('some', broker='redis://:hidden@h/0')\n"


def release(folder: Path, minor: str, settings: str = "") -> str:
    """A release as the role leaves it: its environment, and what describe says of it there."""
    subprocess.run([str(ROOT / "scripts" / "venv"), minor], check=True, stdout=subprocess.DEVNULL)
    folder.mkdir()
    (folder / "venv").symlink_to(celery_venv(minor))
    (folder / "some.py").write_text(f"{APP}app.conf.update({settings})\n")
    done = subprocess.run(
        [str(folder / "venv" / "bin" / "python"), "-m", "celeryops.describe", "-A", "some:app"],
        cwd=folder, capture_output=True, text=True, check=True,
    )  # fmt: skip
    (folder / "release.json").write_text(done.stdout)
    return str(folder)


def asked(ansible: Ansible, broker: RedisServer, *pairs: tuple[str, str]) -> list[dict[str, Any]]:
    return ansible.play(
        [{"celeryops.runbook.celery_upgrade_info": {"running": old, "release": new, "queues": ["alpha", "beta"]}}
         for old, new in pairs],
        defaults={"broker_url": broker.url(), "virtualenv": str(celery_venv())},
    )  # fmt: skip


def found(result: dict[str, Any]) -> dict[str, str]:
    return {one["id"]: one["severity"] for one in result["findings"]}


def test_real_versions_and_settings(ansible: Ansible, broker: RedisServer, tmp_path: Path) -> None:
    old = release(tmp_path / "old", "5.6")
    new = release(tmp_path / "new", "5.7")
    durable = release(tmp_path / "durable", "5.7", "control_queue_durable=True")
    later = release(tmp_path / "later", "5.6", "task_retry_on_worker_lost=True")
    plain, down, breaks, gone = asked(ansible, broker, (old, new), (new, old), (old, durable), (new, later))
    assert plain["findings"] == [] and plain["refused"] is False and not plain["changed"]
    assert [plain[which]["celery"].rpartition(".")[0] for which in ("running", "new")] == ["5.6", "5.7"]
    assert {"python", "celery", "kombu", "billiard", "redis"} == set(plain["new"])
    assert found(down) == {"downgrade": "refuse"} and down["refused"] is True
    assert "celeryops.runbook.rollback" in down["findings"][0]["cure"]
    assert found(breaks) == {"control-queue-exclusive": "refuse"}
    assert all(breaks["findings"][0][key] for key in ("versions", "what", "cure", "source"))
    assert found(gone)["setting-removed"] == "refuse"
    assert any("task_retry_on_worker_lost" in one["what"] for one in gone["findings"])
    assert "hidden" not in (tmp_path / "new" / "release.json").read_text() + ansible.output


@pytest.mark.parametrize(
    ("setting", "use", "said"),
    [
        ("control_queue_durable", "app.control", "control_queue_exclusive"),
        # What a worker hears the others with.
        ("event_queue_durable", "app.events.Receiver(app.connection())", "both exclusive and durable"),
    ],
)
def test_celery_itself_says_the_same(tmp_path: Path, setting: str, use: str, said: str) -> None:
    """The rules of the exclusive queues are no guess: one version works with them, the next does not."""
    release(tmp_path / "r", "5.6")
    code = f"from celery import Celery\napp = Celery(broker='memory://')\napp.conf.{setting} = True\n{use}"
    told = {
        minor: subprocess.run(
            [str(celery_venv(minor) / "bin" / "python"), "-c", code], capture_output=True, text=True, check=False
        )
        for minor in ("5.6", "5.7")
    }
    assert told["5.6"].returncode == 0, told["5.6"].stderr
    assert told["5.7"].returncode == 1 and said in told["5.7"].stderr


def test_what_waits_must_be_accepted(ansible: Ansible, broker: RedisServer, tmp_path: Path) -> None:
    old = release(tmp_path / "old", "5.6", "accept_content=['json', 'pickle']")
    new = release(tmp_path / "new", "5.7")
    both = release(tmp_path / "both", "5.7", "accept_content=['pickle', 'json']")
    send_task(broker.url(), "lab.add", 1, 2, queue="alpha")
    _in_celery(broker.url(), "labapp.app.send_task('lab.add', args=(1, 2), queue='beta', serializer='pickle')")
    broker.cli("LPUSH", "beta", json.dumps({"body": "", "headers": {}, "properties": {}}))
    lost, kept = asked(ansible, broker, (old, new), (old, both))
    assert found(lost) == {"content-waiting": "refuse", "unreadable": "warn"}
    assert "1 of application/x-python-serialize" in lost["findings"][0]["what"]
    assert lost["waiting"] == {
        "content": {"application/json": 1, "application/x-python-serialize": 1},
        "protocols": {"2": 2}, "unreadable": 1, "held": 0,
    }  # fmt: skip
    assert found(kept) == {"unreadable": "warn"} and kept["refused"] is False


def test_wrong_input(ansible: Ansible, broker: RedisServer, tmp_path: Path) -> None:
    new = release(tmp_path / "new", "5.7")
    silent = release(tmp_path / "silent", "5.7")
    (tmp_path / "silent" / "release.json").write_text("{}")
    missing, mute, unknown = asked(ansible, broker, (str(tmp_path), new), (new, silent), (silent, new))
    assert missing["msg"].startswith("running: ") and "Build the release first" in missing["msg"]
    assert mute["msg"].startswith("release: ") and "Build it again under a new id" in mute["msg"]
    assert found(unknown) == {"running-unknown": "warn"}
