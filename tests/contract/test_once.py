# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Idempotent tasks in real workers of the Celery this environment holds."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from typing import Any

import pytest
from once_support import drained, ids, lab, notes, records, worker

from support import TESTS, wait_until

__all__ = ["lab"]


@pytest.mark.parametrize("pool", ["prefork", "threads", "solo", "gevent", "eventlet"])
def test_done_once(lab: Any, pool: str) -> None:
    """Class and decorator, positional and keyword arguments, results of repetitions, scopes, chains and chords."""
    from celery import chain, chord, group

    with worker(lab.server, f"basic-{pool}", pool, pool=pool):
        first = lab.work.apply_async(args=[f"a-{pool}"], queue=pool).get(timeout=20)
        again = lab.work.apply_async(kwargs={"what": f"a-{pool}", "seconds": 0.0}, queue=pool)
        assert again.get(timeout=20) == first == f"a-{pool} done"
        assert lab.work.apply_async(args=[f"b-{pool}"], queue=pool).get(timeout=20) == f"b-{pool} done"
        assert len(ids(lab.server, f"a-{pool}")) == len(ids(lab.server, f"b-{pool}")) == 1
        # Each user has his own, whatever the other arguments are. A repetition has the result of a run that has ended.
        for user, seconds in ((1, 0.0), (2, 0.0), (1, 0.01)):
            sent = lab.mail.apply_async(args=[f"m-{pool}"], kwargs={"user_id": user, "seconds": seconds}, queue=pool)
            assert sent.get(timeout=20) == f"mail for {user}"
        assert len(ids(lab.server, f"m-{pool}")) == 2
        with pytest.raises(ValueError, match="sent without user_id"):
            lab.mail.apply_async(args=[f"m-{pool}"], queue=pool).get(timeout=20)
        # A chain and a chord go on with the result of the first run.
        route = {"queue": pool}
        result = chain(lab.work.si(f"a-{pool}").set(**route), lab.work.s().set(**route)).apply_async()
        assert result.get(timeout=20) == f"a-{pool} done done"
        if pool != "solo":  # where one waits for the other's end
            body = lab.collect.s().set(**route)
            members = group(lab.work.si(f"c-{pool}", 0.5).set(**route) for _number in range(3))
            assert sorted(chord(members)(body).get(timeout=30)) == [f"c-{pool} done"] * 3
            assert len(ids(lab.server, f"c-{pool}")) == 1
        # Its own message, handed out again after its end, is not run again; its result stays.
        sent_id = ids(lab.server, f"a-{pool}")[0]
        lab.work.apply_async(args=[f"a-{pool}"], queue=pool, task_id=sent_id)
        wait_until(lambda: drained(lab.server, pool), 20, "the queue")
        assert lab.app.AsyncResult(sent_id).get(timeout=5) == first
        assert len(ids(lab.server, f"a-{pool}")) == 1
        # In this process, too; a plain call is a plain call.
        assert lab.work.apply(args=[f"a-{pool}"]).get() == first
        assert len(ids(lab.server, f"a-{pool}")) == 1
    skipped = lab.server.cli("HGET", "celeryops:once-skipped", "once.work")
    assert int(skipped) >= 3


def test_killed_in_mid_run_is_run_again_once(lab: Any) -> None:
    """A pool process is killed, then a whole worker: the task runs again, once."""
    with worker(lab.server, "kill", "kill"):
        sent = lab.work.apply_async(args=["k", 2.0], queue="kill")
        wait_until(lambda: ids(lab.server, "k", "begin"), 15, "its begin")
        os.kill(int(notes(lab.server, "k", "begin")[0][1]), signal.SIGKILL)
        # The place of the dead process is free at once, not after the lease of 30 s.
        begun = time.monotonic()
        assert sent.get(timeout=20) == "k done"
        assert time.monotonic() - begun < 15
        assert (ids(lab.server, "k", "begin"), ids(lab.server, "k")) == ([sent.id] * 2, [sent.id])
        # One that kills its process each time is given up.
        with pytest.raises(Exception, match=r"GaveUp|3 times"):
            lab.killer.apply_async(args=["never"], queue="kill").get(timeout=60)
        assert len(ids(lab.server, "never", "begin")) == 3 and records(lab.server, "once.killer") == []
    with worker(lab.server, "dies", "dies", CELERYOPS_ONCE_LEASE="3") as dies:
        sent = lab.work.apply_async(args=["w", 2.0], queue="dies")
        wait_until(lambda: ids(lab.server, "w", "begin"), 15, "its begin")
        dies.kill()
        assert len(records(lab.server, "once.work")) >= 1
    # What the broker hands out after its visibility timeout is the same message.
    lab.server.cli("DEL", "unacked", "unacked_index")
    lab.work.apply_async(args=["w", 2.0], queue="dies", task_id=sent.id)
    with worker(lab.server, "comes", "dies"):
        assert lab.app.AsyncResult(sent.id).get(timeout=20) == "w done"
    assert ids(lab.server, "w") == [sent.id]


def test_retries_keep_their_place(lab: Any) -> None:
    with worker(lab.server, "retry", "retry"):
        sent = lab.stubborn.apply_async(args=["r", 2], queue="retry")
        wait_until(lambda: ids(lab.server, "r", "begin"), 15, "its begin")
        time.sleep(0.3)
        other = lab.stubborn.apply_async(args=["r", 2], queue="retry")
        assert other.get(timeout=10) is None
        assert sent.get(timeout=30) == "r"
        assert ids(lab.server, "r", "begin") == [sent.id] * 3
        # One that fails for good leaves nothing behind.
        with pytest.raises(RuntimeError):
            lab.stubborn.apply_async(args=["f", 4], queue="retry").get(timeout=30)
        assert len(records(lab.server, "once.stubborn")) == 1
        assert lab.stubborn.apply_async(args=["f", 4], queue="retry").get(timeout=10) == "f"


def test_classes(lab: Any) -> None:
    figures = {
        name: (task.max_retries, task.soft_time_limit, task.time_limit, getattr(task, "retry_backoff", None))
        for name, task in lab.app.tasks.items()
        if name in ("once.work", "once.email", "once.report", "once.maintenance", "once.api")
    }
    assert figures == {
        "once.work": (3, None, None, 2),
        "once.email": (5, 110, 120, True),
        "once.report": (2, 1740, 1800, 300),
        "once.maintenance": (0, None, None, None),
        "once.api": (3, 570, 600, 5),
    }
    assert lab.work.acks_late and lab.work.reject_on_worker_lost


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("@once(scope='user')\n@shared_task\ndef f(user_id): pass", "put @once below @shared_task"),
        ("@once()\n@app.task\ndef f(): pass", "put @once below @shared_task or @app.task"),
        ("@once(scope='team')\ndef f(): pass", "scope is 'team'; choose one of global, user, tenant"),
        ("@once(scope='tenant')\ndef f(user_id): pass", "f has no argument 'tenant_id'"),
        ("@once(ttl='4h')\ndef f(): pass", "ttl is '4h'; give seconds"),
        ("@once(category='soon')\ndef f(): pass", "category is 'soon'"),
        ("@once(by='a')\ndef f(a): pass", "by is 'a'; give a list"),
        ("@once(lost='maybe')\ndef f(a): pass", "lost is 'maybe'; choose one of run, refuse"),
        ("@app.task(base=IdempotentTask)\n@once()\ndef f(a): pass\napp.finalize()", "f is idempotent by its class"),
        ("class F(IdempotentTask):\n  once_scope = 'user'\n  def run(self, a): pass", "has no argument 'user_id'"),
    ],
)
def test_refused_at_import(code: str, words: str) -> None:
    head = "from celery import Celery, shared_task\nfrom celeryops.once import once\n"
    head += "from celeryops.tasks import IdempotentTask\napp = Celery()\n"
    done = subprocess.run([sys.executable, "-c", head + code], cwd=TESTS, capture_output=True, text=True, check=False)
    assert done.returncode and words in done.stderr.splitlines()[-1], done.stderr


def test_nothing_is_left_running(lab: Any) -> None:
    """After all of the above every record that is left is a marker."""
    states = {key: lab.server.cli("HGET", key, "state") for key in records(lab.server, "*")}
    # A marker that was kept for a second may have gone meanwhile.
    left = {key: state for key, state in states.items() if state != "done" and lab.server.cli("EXISTS", key) == "1"}
    assert "done" in states.values() and not left, left
