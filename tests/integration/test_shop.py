# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The example application with its load generator, ledger and sampler."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from support import ROOT, RedisServer, Worker, workers

SHOP = ROOT / "examples" / "shop"
MIX = ("--rate", "60", "--seconds", "6", "--slow", "0.01", "--seed", "1")


class ShopWorker(Worker):
    def __init__(self, url: str, name: str, release: Path, queues: str, environment: dict[str, str]) -> None:
        environment = {"PYTHONPATH": str(release), "CELERYOPS_RELEASE": release.name, **environment}
        arguments = ("--include", "celeryops.worker")
        super().__init__(url, name, queues=queues, app="shop:app", arguments=arguments, environment=environment)


def test_load_is_counted_by_id(tmp_path: Path) -> None:
    for release in ("v1", "v2"):
        subprocess.run([sys.executable, str(SHOP / "make_release.py"), release, str(tmp_path / release)], check=True)
    with RedisServer() as server:
        urls = {
            "CELERY_BROKER_URL": server.url(0),
            "CELERY_RESULT_BACKEND": server.url(1),
            "SHOP_LEDGER_URL": server.url(2),
        }
        fleet = (
            ShopWorker(server.url(), "fast@lab", tmp_path / "v1", "critical,default,email", urls),
            ShopWorker(server.url(), "bulk@lab", tmp_path / "v2", "reports,maintenance", urls),
        )
        environment = {**os.environ, **urls}
        with workers(*fleet) as (_fast, bulk):
            watch = subprocess.Popen(
                [sys.executable, str(SHOP / "watch.py"), "--interval", "0.2"],
                env=environment, stdout=subprocess.PIPE, text=True,
            )  # fmt: skip
            load = subprocess.run(
                [sys.executable, str(SHOP / "load.py"), *MIX],
                env=environment, check=True, capture_output=True, text=True,
            )  # fmt: skip
            ledger = subprocess.run(
                [sys.executable, str(SHOP / "ledger.py"), "--wait", "30"],
                env=environment, check=False, capture_output=True, text=True,
            )  # fmt: skip
            bulk.stop()
            time.sleep(1)
            watch.send_signal(signal.SIGTERM)
            samples = json.loads(watch.communicate(timeout=20)[0])
    sent, report = json.loads(load.stdout), json.loads(ledger.stdout)
    assert ledger.returncode == 0, ledger.stdout
    assert load.stderr == "" and sent["refused"] == 0
    assert sent["sent"] == report["sent"] == report["done"] >= 200
    assert report["lost"] == [] and report["run_twice"] == [] and report["not_from_load"] == 0
    assert set(report["wait_by_queue"]) == {"critical", "default", "email", "reports", "maintenance"}
    assert set(report["by_release"]) == {"v1", "v2"}
    # Every begin knows when its message was published, the chord's body included, whose sender is a worker.
    assert report["wait"]["count"] == report["sent"]
    assert samples["samples"] > 10 and samples["failed"] == 0
    assert set(samples["without_consumer"]) == {"reports", "maintenance"}
    assert samples["fewest_consumers"]["critical"] == 1
