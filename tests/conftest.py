# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from support import Ansible, RedisServer, celery_venv, link_collection

link_collection()


@pytest.fixture(scope="session")
def redis_server() -> Iterator[RedisServer]:
    """One scratch Redis for the whole run. Tests that need it empty take `broker`."""
    with RedisServer() as server:
        yield server


@pytest.fixture
def broker(redis_server: RedisServer) -> Iterator[RedisServer]:
    """The scratch Redis, empty before and after."""
    redis_server.cli("FLUSHALL")
    yield redis_server
    redis_server.cli("FLUSHALL")


@pytest.fixture(scope="session")
def venv() -> Path:
    """The virtual environment that holds Celery."""
    return celery_venv()


@pytest.fixture
def ansible(tmp_path: Path) -> Ansible:
    return Ansible(tmp_path)
