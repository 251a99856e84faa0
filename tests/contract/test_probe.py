# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Probes from their sender through real workers of the Celery this environment holds, counted on disk."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

from celeryops.engine import probes
from support import RedisServer, Worker, celery_venv, wait_until, workers

RUN = "lab1"


def notes(place: Path) -> dict[str, list[tuple[str, int, float]]]:
    return {path.stem: probes.parse(path.read_text()) for path in place.glob(f"*{probes.NOTES}")}


def test_probes_are_counted_without_the_broker(broker: RedisServer, tmp_path: Path, venv: Path) -> None:
    place = Path(probes.directory(str(tmp_path), RUN))
    place.mkdir()
    fleet = [
        Worker(
            broker.url(), f"{pool}@lab", queues=queues, pool=pool, arguments=("--include", "celeryops.worker"),
            environment={"STATE_DIRECTORY": str(tmp_path), "CELERYOPS_INSTANCE": pool},
        )
        for pool, queues in (("prefork", "a"), ("solo", "b"))
    ]  # fmt: skip
    command = [str(venv / "bin" / "python"), "-m", "celeryops.probe", "--run", RUN, "--directory", str(place)]
    with workers(*fleet):
        sender = subprocess.Popen(
            [*command, "--queues", "a,b", "--rate", "40"], env={**os.environ, "CELERY_BROKER_URL": broker.url()}
        )
        try:
            wait_until(lambda: len(notes(place)) == 2, 20, "both workers begin a probe")
            time.sleep(2)
        finally:
            sender.send_signal(signal.SIGTERM)
            assert sender.wait(10) == 0
        sent = {number: when for _phase, number, when in probes.parse((place / probes.SENT).read_text())}

        def counted() -> dict[str, object]:
            return probes.account(sent, int((place / probes.REFUSED).read_text()), [probes.summary(notes(place))])

        wait_until(lambda: not counted()["lost"], 20, "every probe is done")
        found = counted()
        assert found["sent"] == len(sent) > 60 and found["run_twice"] == [] and found["refused"] == 0
        # Both kinds go through both queues.
        for rows in notes(place).values():
            assert {probes.late(number) for _phase, number, _when in rows} == {True, False}
        assert "celery-task-meta" not in " ".join(broker.keys()), "results are ignored"


def test_a_worker_notes_nothing_where_nobody_counts(broker: RedisServer, tmp_path: Path) -> None:
    environment = {"STATE_DIRECTORY": str(tmp_path), "CELERYOPS_INSTANCE": "prefork"}
    arguments = ("--include", "celeryops.worker")
    with Worker(broker.url(), "one@lab", queues="a", arguments=arguments, environment=environment) as worker:
        code = "from celery import Celery; import sys; app = Celery(broker=sys.argv[1])\n"
        code += "for run in ('lab1', '../x', 7): app.send_task('celeryops.probe', args=[run, 0], queue='a')"
        subprocess.run([str(celery_venv() / "bin" / "python"), "-c", code, broker.url()], check=True)
        wait_until(lambda: worker.log.read_text().count("celeryops.probe[") >= 6, 20, "the probes end")
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
