# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""redis_sentinel_info against real Sentinels: a group that is well, and one whose primary is dead."""

from __future__ import annotations

from pathlib import Path

import pytest

from support import Ansible, SentinelSet, celery_venv

pytestmark = pytest.mark.ansible


def test_who_is_primary_and_who_could_be(ansible: Ansible, tmp_path: Path) -> None:
    with SentinelSet(tmp_path / "set") as servers:
        asked = {
            "broker_url": servers.url(), "transport_options": {"master_name": "lab"}, "virtualenv": str(celery_venv()),
        }  # fmt: skip
        primary, replica = (f"127.0.0.1:{port}" for port in servers.redis_ports)
        well = ansible.module("redis_sentinel_info", asked)
        assert (well["primary"], well["alive"], well["agreed"], well["quorum"]) == (primary, True, True, "")
        assert well["fit"] == [replica] and len(well["sentinels"]) == 3 and not well["changed"]
        assert servers.password not in ansible.output
        process = servers.processes[servers.redis_ports[0]]
        process.kill()
        process.wait()
        dead = ansible.module("redis_sentinel_info", asked)
        assert (dead["primary"], dead["alive"]) == (primary, False)
        assert "does not answer" in dead["nodes"][primary]["problem"]
