# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Signed tasks on real hosts: introduced, rotated under load, and taken away, without a stop."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from fleet.story import Story
from fleet_support import HOSTS

from support import wait_until

pytestmark = pytest.mark.ansible

FILE = "/etc/celeryops/shop/signing.json"
OLD, NEW = ({"id": name, "secret": f"{name}-{'s' * 40}"} for name in ("old", "new"))


def play(story: Story, *arguments: str, keys: list[dict[str, str]], expect: bool = True, **variables: Any) -> Any:
    return story.play("rotate_signing_key", *arguments, expect=expect, celeryops_signing_keys=keys, **variables)


def held(story: Story) -> dict[str, str]:
    return {host: story.ssh(host, f"cat {FILE}", check=False) for host in HOSTS}


def pids(story: Story) -> dict[str, list[str]]:
    show = "systemctl show -p MainPID --value 'celery-shop-*.service'"
    return {host: sorted(story.ssh(host, show).split()) for host in HOSTS}


def send(story: Story, task: str, *args: Any, queue: str, **options: Any) -> str:
    """Sent by a process that signs if CELERYOPS_SIGNING_FILE is set."""
    code = (
        "import json, os, sys, celeryops.signing\nfrom celery import Celery\n"
        "app = Celery(broker=os.environ['CELERY_BROKER_URL'])\na = json.load(sys.stdin)\n"
        "print(app.send_task(a[0], args=a[1], queue=a[2], **a[3]).id)"
    )
    done = subprocess.run(
        [str(story.venv / "bin" / "python"), "-c", code],
        input=json.dumps([task, args, queue, options]), env={**os.environ, **story.client_environment()},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return done.stdout.strip()


def refusals(story: Story, identity: str) -> str:
    command = f"journalctl -o cat -u 'celery-shop-worker@*' --since -5min | grep -F '[{identity}] is refused' || true"
    return "".join(story.ssh(host, command) for host in HOSTS)


def hold(file: Path, *keys: dict[str, str]) -> None:
    fresh = file.with_suffix(".new")
    fresh.touch(mode=0o600)
    fresh.write_text(json.dumps({"require": True, "keys": keys}))
    fresh.replace(file)


@pytest.fixture
def file(shop: Story, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The keys of senders outside the fleet. Afterwards nobody signs."""
    path = tmp_path / "signing.json"
    hold(path, OLD)
    yield path
    monkeypatch.undo()
    # What site would do, a host after the other.
    secret = "/etc/celeryops/shop/secret.env"
    off = f"rm -f {FILE}; sed -i /^CELERYOPS_SIGNING_FILE=/d {secret}; systemctl restart 'celery-shop-*.service'"
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda host: shop.ssh(host, off), HOSTS))
    shop.redis("DEL", "default.dead")


def test_introduced_and_rotated_under_load(shop: Story, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    early = play(shop, keys=[OLD], expect=False)
    assert "does not sign: run site" in early.text and early.changed == 0
    # site gives the keys; what is unsigned is still run.
    shop.play("site", celeryops_release="v1", celeryops_signing_keys=[OLD])
    assert all(json.loads(text) == {"require": False, "keys": [OLD]} for text in held(shop).values())
    assert shop.ssh("worker1", f"stat -c '%a %U' {FILE}") == "400 shop"
    plan = play(shop, "--check", "--diff", keys=[OLD])
    assert plan.changed > 0 and "+unsigned: refused" in plan.text and OLD["secret"] not in plan.text
    assert all('"require": false' in text for text in held(shop).values()), "check mode touches nothing"

    before = pids(shop)
    monkeypatch.setenv("CELERYOPS_SIGNING_FILE", str(file))
    load = shop.start("load", "--rate", "20", "--slow", "0.02")
    try:
        assert play(shop, keys=[OLD]).changed > 0
        # Rotated, while workers, beat and a sender outside the fleet send. A task with an ETA still needs the old key.
        send(shop, "shop.selftest", queue="default", countdown=40)
        late = play(shop, "--diff", keys=[NEW], expect=False, celeryops_signing_timeout=2)
        assert "old stay accepted" in late.text and "celeryops_confirm=old" in late.text
        assert OLD["secret"] not in late.text and NEW["secret"] not in late.text
        assert all(json.loads(text)["keys"] == [NEW, OLD] for text in held(shop).values())
        hold(file, NEW)
        time.sleep(1.5)
        done = play(shop, keys=[NEW], celeryops_confirm="old")
        again = play(shop, keys=[NEW])
        assert done.changed > 0 and again.changed == 0
        # A module that sends takes the keys of its host.
        shop.play("task_send", celeryops_task="shop.selftest", celeryops_queue="default", celeryops_wait_timeout=20)
    finally:
        load.stop()
    nodes = again.stats["celeryops_rotate_signing_key"]["nodes"]
    assert len(nodes) == 4 and {tuple(node["accepts"]) for node in nodes.values()} == {("new",)}
    assert {(node["refused"], node["require"]) for node in nodes.values()} == {(0, True)}
    assert pids(shop) == before, "no process was restarted"
    ledger = shop.ledger("--wait", "60")
    assert (ledger["lost"], ledger["run_twice"]) == ([], [])

    monkeypatch.undo()
    unsigned = send(shop, "shop.selftest", queue="default")
    wait_until(lambda: "it is not signed" in refusals(shop, unsigned), 10, "the refusal")


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ([], ["celeryops_signing_keys: give the keys"]),
        ([{"id": "new", "secret": "short"}], ["secret of key new is missing or shorter than 32"]),
        ([{"id": "n w", "secret": "s" * 40}], ["celeryops_signing_keys: a key has no proper id"]),
        ([OLD, OLD], ["two keys have the same id"]),
    ],
)
def test_wrong_input_is_named(shop: Story, keys: list[dict[str, str]], words: list[str]) -> None:
    wrong = play(shop, keys=keys, expect=False)
    assert all(word in wrong.text for word in words) and wrong.changed == 0
    assert "s" * 40 not in wrong.text
    assert not any(held(shop).values())
