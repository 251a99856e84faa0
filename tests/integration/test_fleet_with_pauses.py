# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""rolling_deploy while queues are paused. The last of the fleet's files by its name: it leaves release v2."""

from __future__ import annotations

import pytest
from fleet.story import Story
from fleet_support import HOSTS, consumers

pytestmark = pytest.mark.ansible


def test_a_deploy_goes_on_with_a_paused_queue(released: Story) -> None:
    shop = released
    shop.play("queue_pause", celeryops_queues=["reports", "maintenance"], celeryops_why="month end")
    shop.play("restart", celeryops_hosts="worker1")
    done = shop.play("rolling_deploy", celeryops_release="v1")
    assert done.changed == 0, "what was paused is no reason to replace a worker"
    assert consumers(shop, "reports") == []
    # The bulk pool has nothing but paused queues: it is brought to the release and proved without a canary.
    shop.play("rolling_deploy", celeryops_release="v2", celeryops_release_src=str(shop.releases / "v2"))
    assert consumers(shop, "reports") == []
    shop.play("queue_resume", celeryops_queues="reports,maintenance")
    assert consumers(shop, "reports") == [f"shop-bulk-1@{host}" for host in HOSTS]
