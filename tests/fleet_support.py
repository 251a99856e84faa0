# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Real systemd hosts with the shop on them, for the tests of playbooks.

tests/integration and tests/game_day have a fleet each, their fixture `shop`. Each test leaves the fleet as it found it:
v1, all workers and beat running.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from fleet.story import BIN, NICE, SHOP, TOP, Story, wheelhouse

from support import wait_until

StoryT = TypeVar("StoryT", bound=Story)
HOSTS = ("worker1", "worker2")
LOCK = "celeryops:lock:deploy:shop"
# Nobody consumes this queue.
IDLE = "parked"
# Where the backups of Redis are, on its host.
KEPT = "/var/backups/celeryops/shop"
SEND = """
import sys
from shop.celery import app
from shop.book import SENT
import celeryops.stamp, json, os, redis
queue, task, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
arguments = json.loads(sys.argv[4])
book = redis.Redis.from_url(os.environ["SHOP_LEDGER_URL"])
for number in range(count):
    sent = app.send_task(task, args=[number, *arguments], queue=queue, priority=(0, 3)[number % 2])
    book.rpush(SENT, json.dumps({"id": sent.id, "task": task, "published": None, "eta": None}))
    print(sent.id)
"""


@contextlib.contextmanager
def installed(name: str, make: Callable[[str], StoryT] = Story) -> Iterator[StoryT]:  # type: ignore[assignment]
    """The fleet NAME with release v1 of the shop; it is removed at the end."""
    subprocess.run([str(TOP / "scripts" / "venv"), "5.7"], check=True, stdout=subprocess.DEVNULL)
    wheelhouse()
    story = make(name)
    try:
        for release in ("v1", "v2"):
            story.make_release(release)
        story.up()
        story.play("site", celeryops_release="v1")
        yield story
    finally:
        story.close()
        story.down()


def consumers(story: Story, queue: str) -> list[str]:
    """The nodes that consume a queue, asked with Celery's own tools."""
    asked = story.celery("answer = app.control.inspect(timeout=1).active_queues() or {}")
    return sorted(node for node, queues in asked.items() if queue in [one["name"] for one in queues])


def send(story: Story, queue: str, task: str, count: int, *arguments: Any) -> list[str]:
    done = subprocess.run(
        [str(story.venv / "bin" / "python"), "-c", SEND, queue, task, str(count), json.dumps(arguments)],
        cwd=SHOP / "src", env=story.client_environment(), capture_output=True, text=True, check=True,
    )  # fmt: skip
    return done.stdout.split()


def lists(queue: str) -> list[str]:
    """The keys of the priorities that SEND uses."""
    return [queue, f"{queue}\x06\x163"]


def waiting(story: Story, queue: str) -> list[str]:
    """Ids by priority, in the order of consumption."""
    found = []
    for key in lists(queue):
        lines = [line for line in story.redis("LRANGE", key, "0", "-1").splitlines() if line]
        found += [json.loads(line)["headers"]["id"] for line in reversed(lines)]
    return found


@contextlib.contextmanager
def marked_fleet(story: Story) -> Iterator[None]:
    """Its hosts are those of a test fleet."""
    mark = story.fleet / "group_vars" / "fleet.yml"
    mark.write_text("celeryops_game_day: true\n")
    try:
        yield
    finally:
        mark.unlink()


def backups(story: Story) -> list[str]:
    return story.ssh("redis1", f"ls {KEPT}/redis-*.tar.gz 2>/dev/null", check=False).split()


def drop_restored(story: Story) -> None:
    """What a restore parked, and what it kept aside."""
    story.ssh("redis1", f"rm -rf {KEPT}/* /var/lib/redis/before-restore-*")
    story.ssh("worker1", f"rm -f {KEPT}/*before-restore* {KEPT}/*.ids")
    story.redis("EVAL", "for _, k in ipairs(redis.call('KEYS', 'restored.*')) do redis.call('DEL', k) end", "0")


def verb(name: str, directory: Path) -> str:
    """A playbook in `directory` for a verb of role redis that has none of its own."""
    role = {"name": "celeryops.runbook.redis", "tasks_from": name}
    tasks = [{"name": "The verb", "ansible.builtin.include_role": role}]
    playbook = directory / f"{name}.yml"
    playbook.write_text(json.dumps([{"hosts": "redis", "gather_facts": False, "tasks": tasks}]))
    return str(playbook)


class Running:
    """A playbook that is still running, so that something can happen to it."""

    def __init__(self, story: Story, playbook: str, log: str, **variables: Any) -> None:
        self.log = story.output / f"{log}.log"
        command = [*NICE, str(BIN / "ansible-playbook"), f"celeryops.runbook.{playbook}", "-i", str(story.inventory)]
        with self.log.open("w") as out:
            self.process = subprocess.Popen(
                [*command, "-e", json.dumps(variables)], cwd=TOP, env=story.ansible_environment(),
                stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip

    @property
    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def reached(self, pattern: str, timeout: float = 120) -> None:
        wait_until(lambda: re.search(pattern, self.text) or self.process.poll() is not None, timeout, pattern)
        assert self.process.poll() is None, self.text[-3000:]

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def __enter__(self) -> Running:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.kill()


def processes(story: Story) -> dict[str, str]:
    """Main process of every unit of the application; '0' for one that does not run."""
    found = {}
    for host in HOSTS:
        shown = story.ssh(host, "systemctl show -p Id,MainPID 'celery-shop-*.service'")
        for block in shown.split("\n\n"):
            pairs = dict(line.split("=", 1) for line in block.splitlines())
            if pairs["MainPID"] != "0":
                found[f"{pairs['Id'].removesuffix('.service')}@{host}"] = pairs["MainPID"]
    return found


def releases(story: Story) -> dict[str, set[str]]:
    """host -> releases in use there: what `current` names and what each process was started from."""
    code = (
        "basename $(readlink /srv/shop/current); "
        "for pid in $(systemctl show -p MainPID --value 'celery-shop-*.service'); do "
        "[ $pid = 0 ] || tr '\\0\\n' '  ' </proc/$pid/cmdline | sed 's|.*/releases/\\([^/]*\\)/venv/.*|\\1|'; echo; "
        "done"
    )
    return {host: set(story.ssh(host, code).split()) for host in HOSTS}
