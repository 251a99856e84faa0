# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Fixtures, and the sorting of test files by environment: see the head of the Makefile."""

from __future__ import annotations

import gc
import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest

from support import Ansible, RedisServer, celery_venv, link_collection, needs_ansible

link_collection()
HERE_IS_ANSIBLE = importlib.util.find_spec("ansible") is not None


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    if not collection_path.name.startswith("test_") or collection_path.suffix != ".py":
        return None
    return True if needs_ansible(collection_path) != HERE_IS_ANSIBLE else None


def pytest_collection_finish() -> None:
    """What is imported by now stays: no test need look through it (below)."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def collector() -> Iterator[None]:
    """Not in mid-test: a result of Celery that is collected while another subscribes waits for a lock that it holds."""
    gc.disable()
    yield
    gc.enable()
    gc.collect()


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
