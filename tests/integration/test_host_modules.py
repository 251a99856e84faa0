# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""celery_pools, celery_roll_plan and celery_signing_keys: what they need of the host is in files and arguments."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from support import Ansible, RedisServer, Worker

pytestmark = pytest.mark.ansible

POOLS = [
    {"name": "fast", "queues": ["orders"], "concurrency": 2},
    {"name": "bulk", "queues": ["bulk"], "concurrency": 4, "instances": 2},
]


@pytest.fixture
def pools(ansible: Ansible, tmp_path: Path) -> Any:
    def run(*tasks: dict[str, Any], **options: Any) -> list[dict[str, Any]]:
        common = {"name": "shop", "pools": POOLS, "config_dir": str(tmp_path)}
        return ansible.play([{"celeryops.runbook.celery_pools": {**common, **task}} for task in tasks], **options)

    return run


def test_a_scaling_is_kept_in_the_file_and_forgotten_on_request(pools: Any, tmp_path: Path) -> None:
    file = tmp_path / "scale.json"
    more = {"pool": "bulk", "instances": 3}
    looked, scaled, again, seen = pools({}, more, more, {})
    assert not looked["changed"] and looked["pools"] == POOLS and looked["differences"] == []
    assert scaled["changed"] and (scaled["kept"], scaled["added"]) == (["bulk-1", "bulk-2"], ["bulk-3"])
    assert (scaled["queues"], scaled["way"]) == (["bulk"], "none")
    assert not again["changed"] and again["kept"] == ["bulk-1", "bulk-2", "bulk-3"]
    assert seen["pools"][1]["instances"] == 3
    assert seen["differences"] == ["pool bulk: instances 3 (inventory: 2)"] and seen["obsolete"] == []
    assert json.loads(file.read_text()) == {"pools": {"bulk": {"instances": 3}}}
    assert file.stat().st_mode & 0o777 == 0o644
    gone, tidied, reset, nothing = pools(
        {"pools": POOLS[:1]}, {"pools": POOLS[:1], "tidy": True}, {"reset": True}, {"reset": True}
    )
    assert gone["obsolete"] == ["bulk"] and not gone["changed"]
    assert tidied["changed"] and not reset["changed"] and not nothing["changed"] and not file.exists()


def test_check_mode_is_truthful_and_writes_nothing(pools: Any, tmp_path: Path) -> None:
    (less,) = pools({"pool": "bulk", "instances": 1, "concurrency": 8}, check=True)
    assert less["changed"] and less["removed"] == ["bulk-2"] and less["way"] == "pool_size"
    assert less["diff"]["before"] == "" and '"concurrency": 8' in less["diff"]["after"]
    assert not (tmp_path / "scale.json").exists()


def test_what_cannot_be_is_refused_with_its_name(pools: Any, tmp_path: Path) -> None:
    unknown, nameless, both = pools(
        {"pool": "mail", "instances": 1}, {"pools": [{"queues": ["q"]}]}, {"pool": "bulk", "reset": True}
    )
    assert unknown["failed"] and "mail" in unknown["msg"] and "bulk, fast" in unknown["msg"]
    assert nameless["failed"] and "celeryops_worker_pools" in nameless["msg"]
    assert both["failed"] and "mutually exclusive" in both["msg"]
    file = tmp_path / "scale.json"
    file.write_text('{"pools": []}')
    (broken,) = pools({})
    assert broken["failed"] and str(file) in broken["msg"] and "remove it" in broken["msg"]


def test_roll_plan(ansible: Ansible, venv: Path) -> None:
    node = "shop-fast-1@worker1"
    facts = {
        "release": "v2",
        "current": "v1",
        "wanted": [{"instance": "fast-1", "pool": "fast", "node": node, "queues": ["orders"]}],
        "found": {"fast-1": {"state": "active", "pid": 7, "release": "v1", "process": "S"}},
        "batch": [node],
    }
    done = {**facts, "release": "v1"}
    gone = {**facts, "wanted": [{**facts["wanted"][0], "node": "shop-fast-1@away"}], "timeout": 0.5}
    tasks = [
        facts, done, gone, {**facts, "found": {}}, {**facts, "found": {"fast-1": "active"}}, {**facts, "surge": "maybe"}
    ]  # fmt: skip
    runtime = {"arguments": ("--include", "celeryops.worker"), "environment": {"CELERYOPS_RELEASE": "v1"}}
    with RedisServer() as server, Worker(server.url(), node, queues="orders", **runtime):
        defaults = {"broker_url": server.url(), "virtualenv": str(venv)}
        planned, nothing, silent, unseen, odd, choice = ansible.play(
            [{"celeryops.runbook.celery_roll_plan": task} for task in tasks], defaults=defaults
        )
    assert not planned["changed"]
    assert planned["roll"] == {
        "from": "v1", "acts": True, "todo": ["fast-1"], "silent": [], "surge": ["fast"], "left": []
    }  # fmt: skip
    assert planned["text"] == (
        "would start fast-surge on v2, quiet, drain and stop fast-1, switch current from v1 to v2, start and prove them"
    )
    assert not nothing["roll"]["acts"] and nothing["roll"]["todo"] == []
    assert silent["roll"]["silent"] == ["shop-fast-1@away"]
    assert unseen["failed"] and "found: says nothing of fast-1" in unseen["msg"]
    assert odd["failed"] and "found: give each entry" in odd["msg"]
    assert choice["failed"] and "surge" in choice["msg"]


OLD, NEW = ({"id": name, "secret": f"{name}-{'s' * 40}"} for name in ("old", "new"))


@pytest.fixture
def signing_keys(ansible: Ansible, tmp_path: Path) -> Any:
    def run(*tasks: dict[str, Any], **options: Any) -> list[dict[str, Any]]:
        common = {"name": "shop", "config_dir": str(tmp_path), "root": str(tmp_path), "user": "root"}
        module = "celeryops.runbook.celery_signing_keys"
        return ansible.play([{module: {**common, **task}} for task in tasks], **options)

    return run


def test_signing_keys_step_by_step(signing_keys: Any, ansible: Ansible, tmp_path: Path) -> None:
    file = tmp_path / "signing.json"
    rotated = {"keys": [NEW]}
    first, again, accept, sign, finish, twice, gone, lax, off, none = signing_keys(
        {"keys": [OLD]}, {"keys": [OLD]}, rotated, {**rotated, "step": "sign"}, {**rotated, "step": "finish"},
        {**rotated, "step": "finish"}, {"keys": []}, {**rotated, "require": False}, {"keys": []}, {"keys": []},
        verbosity=3,
    )  # fmt: skip
    assert first["changed"] and first["require"] and first["finished"] and not again["changed"]
    assert accept["changed"] and (accept["signs"], accept["accepts"]) == ("old", ["old", "new"])
    assert not accept["finished"]
    assert sign["changed"] and (sign["signs"], sign["accepts"]) == ("new", ["new", "old"])
    assert finish["changed"] and finish["accepts"] == ["new"] and finish["finished"] and not twice["changed"]
    assert gone["failed"] and "celeryops_signing_require to false" in gone["msg"]
    assert lax["changed"] and not lax["require"]
    assert off["changed"] and off["accepts"] == [] and not none["changed"] and not file.exists()
    assert OLD["secret"] not in ansible.output and NEW["secret"] not in ansible.output


def test_signing_keys_on_a_host_in_use(signing_keys: Any, ansible: Ansible, tmp_path: Path) -> None:
    file = tmp_path / "signing.json"
    (tmp_path / "current").symlink_to(tmp_path)
    (plan,) = signing_keys({"keys": [OLD], "step": "finish"}, check=True)
    assert plan["changed"] and not file.exists()
    assert plan["diff"]["after"] == "signs: old\naccepts: old\nunsigned: refused\n"
    first, finish = signing_keys({"keys": [OLD]}, {"keys": [OLD], "step": "finish"})
    assert not first["require"] and not first["finished"] and finish["require"]
    assert file.stat().st_mode & 0o777 == 0o400
    file.chmod(0o600)
    (mode,) = signing_keys({"keys": [OLD], "step": "finish"})
    assert mode["changed"] and file.stat().st_mode & 0o777 == 0o400
    short, twice, other, nobody = signing_keys(
        {"keys": [{"id": "x", "secret": "k" * 31}]}, {"keys": [OLD, OLD]}, {"keys": [{**OLD, "secret": "t" * 40}]},
        {"keys": [OLD], "user": "nosuchuser"},
    )  # fmt: skip
    for result, words in (
        (short, "secret of key x is missing or shorter than 32"),
        (twice, "two keys have the id old"),
        (other, "key old has another secret on this host"),
        (nobody, "there is no user nosuchuser"),
    ):
        assert result["failed"] and words in result["msg"]
    file.chmod(0o644)
    (open_,) = signing_keys({"keys": [OLD]})
    assert open_["failed"] and "others may read it" in open_["msg"]
    assert json.loads(file.read_text())["keys"] == [OLD] and OLD["secret"] not in ansible.output
