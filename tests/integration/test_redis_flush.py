# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Removing all keys of a real Redis: only where it is meant."""

from __future__ import annotations

from typing import Any

import pytest

from support import Ansible, RedisServer

pytestmark = pytest.mark.ansible


def test_all_keys_go_and_are_counted(ansible: Ansible, broker: RedisServer) -> None:
    broker.cli("LPUSH", "default", "x")
    broker.cli("MSET", "a", "1", "b", "2", db=3)
    arguments: dict[str, Any] = {"port": broker.port, "confirm": "all keys"}
    refused = ansible.module("redis_flush", {**arguments, "confirm": "yes"})
    assert refused["failed"] and "confirm: must be 'all keys'" in refused["msg"]
    plan = ansible.module("redis_flush", arguments, check=True)
    assert plan["changed"] and plan["removed"] == 3 and "database 3: 2 keys" in plan["diff"]["before"]
    assert broker.keys() == ["default"]
    done, again = ansible.play([{"celeryops.runbook.redis_flush": arguments}] * 2)
    assert done["databases"] == {"0": 1, "3": 2} and done["removed"] == 3 and broker.keys(3) == broker.keys() == []
    assert not again["changed"] and again["removed"] == 0


def test_the_verb_wants_a_mark_of_the_inventory_and_the_name(ansible: Ansible, broker: RedisServer) -> None:
    broker.cli("LPUSH", "default", "x")
    include = {"name": "celeryops.runbook.redis", "tasks_from": "flush"}
    port = {"celery_redis_port": broker.port, "celeryops_app_name": "shop"}
    unmarked = ansible.play([{"ansible.builtin.include_role": include, "vars": port}], expected=3)[-1]
    assert unmarked["failed"] and "celeryops_redis_development: localhost is not marked" in unmarked["msg"]
    assert "celeryops_confirm: must equal the name of the host" in unmarked["msg"]
    assert broker.keys() == ["default"]
