# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The catalogue of faults as data: every fault has its script, its end, a cure that exists, and a line in the docs."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from ansible_collections.celeryops.runbook.plugins.module_utils.engine.health import CURES

pytestmark = pytest.mark.ansible

TOP = Path(__file__).resolve().parents[2]
ROLE = TOP / "roles" / "game_day"
CATALOGUE: dict[str, dict[str, Any]] = yaml.safe_load((ROLE / "vars" / "main.yml").read_text())[
    "__celery_game_day_catalogue"
]
PLACES = {"redis", "redis_all", "rabbitmq", "worker", "workers", "beat", "elsewhere"}
CURED_BY = {"recover": ["redis_recover", "broker_recover"], "rescue": ["queue_rescue"], "end": [], "time": [], "": []}


@pytest.mark.parametrize("name", CATALOGUE)
def test_a_fault_is_whole(name: str) -> None:
    fault = CATALOGUE[name]
    assert fault["needs"] in ("", "redis", "rabbitmq", "sentinel", "beat") and fault["where"] in PLACES
    assert fault["proof"] in ("workers", "beat") and isinstance(fault["loses"], bool)
    assert (ROLE / "files" / f"{fault['way']}.sh").is_file()
    assert set(fault["says"]) <= set(CURES), "health_check has no such check"
    for playbook in CURED_BY.get(fault["cure"], [fault["cure"]]):
        assert (TOP / "playbooks" / f"{playbook}.yml").is_file()
    # Nobody has to notice what is over by itself, and what is not has to be noticed.
    goes = fault.get("signal") == "KILL" or fault["way"] in ("kill_child", "kill_primary")
    assert bool(fault["says"]) is not goes
    assert f"| `{name}`" in (page := (TOP / "docs/playbooks/game_day.md").read_text()) or f"`{name}` |" in page


@pytest.mark.parametrize("way", sorted(path.stem for path in (ROLE / "files").glob("*.sh")))
def test_a_way_of_causing_is_used_and_its_end_is_harmless_where_it_did_not_begin(way: str, tmp_path: Path) -> None:
    assert way in {fault["way"] for fault in CATALOGUE.values()}
    # Without systemd, Redis and routes at hand: what is called is noted.
    calls = tmp_path / "calls"
    for tool in ("systemctl", "redis-cli", "ip", "setpriv"):
        stub = tmp_path / "bin" / tool
        stub.parent.mkdir(exist_ok=True)
        stub.write_text(f'#!/bin/sh\necho {tool} "$@" >>{calls}\n')
        stub.chmod(0o755)
    place = tmp_path / "place"
    (tmp_path / "root" / "current" / "src").mkdir(parents=True)
    place.mkdir()
    environment = {"PATH": f"{tmp_path}/bin:/usr/bin:/bin", "UNITS": "a.service", "DATA": str(tmp_path), "PORT": "1"}
    environment |= {"NODE": "n", "QUEUES": "q", "ROOT": str(tmp_path / "root"), "CELERYOPS_APP": "shop:app"}
    environment |= {"AS_USER": "u", "AS_GROUP": "g", "TARGETS": ""}
    command = ["/bin/sh", "-eu", str(ROLE / "files" / f"{way}.sh"), "end"]
    done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    said = calls.read_text() if calls.exists() else ""
    assert not any(word in said for word in ("stop", "STOP", "KILL", "CONFIG SET", "route del", " mask")), said
    assert list(place.iterdir()) == []
