# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Sentinels that are down, or say nothing, do not keep a worker and a module from the one that answers."""

from __future__ import annotations

import socket
import time
from pathlib import Path

from celeryops.engine import tasks
from celeryops.engine.connection import Broker, BrokerSpec
from support import SentinelSet, Worker, free_port, wait_until, workers


def test_sentinels_that_are_down_cost_no_minutes(tmp_path: Path) -> None:
    with SentinelSet(tmp_path, replicas=0, sentinels=1) as servers, socket.create_server(("127.0.0.1", 0)) as silent:
        # Nobody listens on two ports; one takes connections and says nothing.
        ports = [free_port(), free_port(), silent.getsockname()[1]]
        url = ";".join([*(f"sentinel://:{servers.password}@127.0.0.1:{port}/0" for port in ports), servers.url()])
        own = {"LABAPP_MASTER_NAME": "lab", "CELERY_RESULT_BACKEND": ""}
        began = time.monotonic()
        with workers(Worker(url, "s@lab", environment=own, arguments=("--include", "celeryops.worker"))) as (worker,):
            started = time.monotonic() - began
            spec = BrokerSpec.build(
                url=url, transport_options={"master_name": "lab"}, connect_timeout=1, socket_timeout=1
            )
            with Broker(spec) as broker:
                began = time.monotonic()
                tasks.send(broker, tasks.Order("lab.add", "celery", args=[1, 2]))
                sent = time.monotonic() - began
            wait_until(lambda: "succeeded in" in worker.log.read_text(), 20, "the task runs", 0.1)
    print(f"started in {started:.1f} s, sent in {sent:.1f} s")
    # One second for each connection; redis-py by itself takes four for each of two Sentinels.
    assert started < 15
    assert sent < 6
