# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Workers, beat, a producer, an exporter and the engine as users of Redis who may do no more than their role.

Redis notes each refusal in ACL LOG: what is allowed is enough if that is empty after all of them have worked.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ansible_collections.celeryops.runbook.plugins.module_utils.engine import acl, clients, survey
from ansible_collections.celeryops.runbook.plugins.module_utils.engine.connection import Broker, BrokerSpec
from ansible_collections.celeryops.runbook.plugins.module_utils.engine.control import Control
from ansible_collections.celeryops.runbook.plugins.module_utils.engine.queues import RedisQueues
from ansible_collections.celeryops.runbook.plugins.module_utils.engine.rescue import rescue
from support import TESTS, Beat, RedisServer, Worker, wait_until, workers

PRODUCER = """
import celery, celeryops.stamp, labapp
from celery import chain, chord, group
app = labapp.app
assert [app.send_task("lab.add", (1, 2), priority=p).get(timeout=20) for p in (0, 3, 6, 9)] == [3] * 4
assert app.send_task("lab.late", (0.1,), queue="second", countdown=0.5).get(timeout=20) == 0.1
assert app.send_task("lab.flaky", (1,)).get(timeout=20) == 1
try:
    app.send_task("lab.fail").get(timeout=20)
except ValueError:
    pass
many = group(labapp.add.s(1, 2), labapp.add.s(3, 4)).apply_async()
many.save()
assert many.get(timeout=20) == [3, 7]
many.forget()
assert chord([labapp.add.s(1, 2), labapp.add.s(3, 4)])(labapp.add.si(5, 5)).get(timeout=20) == 10
assert chain(labapp.add.s(1, 2), labapp.add.s(3)).apply_async().get(timeout=20) == 6
"""
EVENTS = """
import labapp
app, seen = labapp.app, []
with app.connection_for_read() as connection:
    receiver = app.events.Receiver(connection, handlers={"worker-heartbeat": seen.append})
    for _tick in receiver.itercapture(limit=None, timeout=20, wakeup=False):
        if seen:
            break
assert seen
"""


class Lab:
    def __init__(self, redis: RedisServer, prefix: str) -> None:
        self.redis = redis
        self.prefix = prefix
        layout = acl.Layout(prefix, ("celery", "second"), databases=(0, 1))
        for role in acl.ROLES[:5]:
            user = acl.User(role, acl.rules(role, layout), (acl.digest(role * 3),))
            assert redis.cli("ACL", "SETUSER", role, "reset", *user.words) == "OK"

    def url(self, role: str, db: int = 0) -> str:
        return f"redis://{role}:{role * 3}@127.0.0.1:{self.redis.port}/{db}"

    def environment(self, role: str) -> dict[str, str]:
        own = {"LABAPP_KEY_PREFIX": self.prefix} if self.prefix else {}
        return {
            **own, "CELERY_BROKER_URL": self.url(role), "CELERY_RESULT_BACKEND": self.url(role, 1),
            "CELERYOPS_APP_NAME": "lab", "LABAPP_EXTENDED": "1",
        }  # fmt: skip

    def refused(self) -> list[str]:
        """Words of ACL LOG: reason, what it was, by whom."""
        rows = self.redis.cli("ACL", "LOG", "100").splitlines()
        names = ("reason", "object", "username")
        return [f"{row}: {rows[index + 1]}" for index, row in enumerate(rows[:-1]) if row in names]

    def run(self, role: str, code: str) -> None:
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=TESTS, env={**os.environ, **self.environment(role)},
            capture_output=True, text=True, check=False, timeout=60,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        assert not (said := self.refused()), said


@pytest.fixture(params=["", "shop:"])
def lab(request: Any) -> Iterator[Lab]:
    with RedisServer() as redis:
        yield Lab(redis, request.param)


def test_each_role_can_do_its_work(lab: Lab, tmp_path: Path) -> None:
    import celery

    names = ("one", "two")
    fleet = [
        Worker(
            lab.url("worker"), name, queues="celery,second", environment=lab.environment("worker"),
            arguments=("-E", "--include", "celeryops.worker"),
        )
        for name in names
    ]  # fmt: skip
    for worker in fleet:
        # Gossip and mingle, too.
        worker.command = [word for word in worker.command if not word.startswith("--without")]
    with workers(*fleet):
        lab.run("producer", PRODUCER)
        lab.run("exporter", EVENTS)

        beat = Beat(lab.url("beat"), "beat", tmp_path / "schedule")
        beat.environment |= lab.environment("beat")
        remote = [word for word in beat.command[1:] if celery.VERSION >= (5, 7) or word != "--enable-remote-control"]
        code = (
            "import sys, celeryops.worker, labapp\n"
            "labapp.app.conf.beat_schedule = {'add': {'task': 'lab.add', 'schedule': 0.5, 'args': (1, 2)}}\n"
            "from celery.__main__ import main\nsys.exit(main())"
        )
        beat.command = [sys.executable, "-c", code, *remote]
        with beat:
            wait_until(lambda: beat.log.read_text().count("Sending due task") > 3, 20, "beat to send")
            heartbeat = f"{lab.prefix}celeryops:beat:lab"
            wait_until(lambda: lab.redis.cli("EXISTS", heartbeat) == "1", 20, "its heartbeat")
        assert "Error" not in beat.log.read_text()
        assert lab.refused() == []

        spec = BrokerSpec.build(
            url=lab.url("operator"),
            key_prefix=lab.prefix or None,
            environment={"CELERY_RESULT_BACKEND": lab.url("operator", 1)},
        )
        with Broker(spec) as broker:
            control = Control(broker)
            replies = control.broadcast("ping", expected=2)
            assert len(replies.replies) == 2
            control.broadcast("rate_limit", {"task_name": "lab.add", "rate_limit": "100/s"}, expected=2)
            queues = RedisQueues.of(broker)
            assert queues.depth(["celery", "second"])
            queues.unacked()
            queues.reply_keys(60)
            assert rescue(queues, control).count == 0
            assert clients.listed(broker.redis) and clients.limit(broker.redis)
            assert broker.redis.client_kill_filter(_id="999999999") == 0
            assert survey.broker_facts(broker)["maxmemory_policy"] == "noeviction"
            assert survey.queue_facts(broker, ["celery"]) and survey.beat_facts(broker, "lab")
            survey.unacked_facts(broker)
            survey.dead_facts(broker)
            survey.pause_facts(broker)
            survey.fleet_facts(broker, [], 2.0)
    assert lab.refused() == []
    assert not any("NOPERM" in worker.log.read_text() or "NoPermission" in worker.log.read_text() for worker in fleet)


def test_a_producer_controls_no_worker(lab: Lab) -> None:
    """Whoever may send work can neither read it nor stop who does it."""
    code = (
        "import labapp\nfrom kombu.exceptions import OperationalError\nfrom redis.exceptions import NoPermissionError\n"
        "def refused(call):\n    try:\n        call()\n    except Exception as exc:\n        cause = exc\n"
        "        while cause and 'permission' not in str(cause): cause = cause.__cause__ or cause.__context__\n"
        "        assert cause, repr(exc)\n    else:\n        raise AssertionError('it was not refused')\n"
        "refused(lambda: labapp.app.control.shutdown())\nrefused(lambda: labapp.app.control.revoke('1'))\n"
        "refused(lambda: labapp.app.control.purge())\n"
        "refused(lambda: labapp.app.send_task('lab.add', (1, 2), queue='third'))\n"
    )
    environment = lab.environment("worker")
    with Worker(lab.url("worker"), "alone", environment=environment) as worker:
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=TESTS, env={**os.environ, **lab.environment("producer")},
            capture_output=True, text=True, check=False, timeout=60,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        assert worker.process is not None and worker.process.poll() is None
