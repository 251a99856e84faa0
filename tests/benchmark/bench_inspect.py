# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Remote control against Celery's own inspect: warm in one process, as an Ansible task, and with 10,000 nodes.

Runs in the Celery environment.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import json
import resource
import select
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

TOP = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(TOP / "tests"), str(TOP / "tests" / "output" / "collections")]

from common import say, tell

from support import Ansible, RedisServer, Worker, celery_venv, link_collection, workers

link_collection()

from ansible_collections.celeryops.runbook.plugins.module_utils.engine.connection import (
    Broker,
    BrokerSpec,
)
from ansible_collections.celeryops.runbook.plugins.module_utils.engine.control import Control

NODES = 10_000
MUTE = 50


def milliseconds(call: Callable[[], Any]) -> float:
    started = time.perf_counter()
    call()
    return (time.perf_counter() - started) * 1000


def result(name: str, baseline: float, ours: float, conditions: str, unit: str = "ms") -> dict[str, Any]:
    entry = {
        "name": name,
        "baseline": round(baseline, 2),
        "ours": round(ours, 2),
        "ratio": round(baseline / ours, 1),
        "unit": unit,
        "conditions": conditions,
    }
    say(f"{name}: {entry['baseline']} -> {entry['ours']} {unit}, {entry['ratio']} x")
    return entry


def spread(values: list[float]) -> str:
    return f"median of {len(values)}, {min(values):.1f} to {max(values):.1f}"


def celery_app(url: str) -> Any:
    import celery

    return celery.Celery("bench", broker=url, set_as_current=False)


def fleet(server: RedisServer) -> list[Worker]:
    return [Worker(server.url(), f"w{number}@bench", concurrency=1) for number in range(4)]


def bench_engine(server: RedisServer) -> list[dict[str, Any]]:
    """Warm process, 4 live workers, all answers counted."""
    app = celery_app(server.url())
    results = []
    with Broker(BrokerSpec.build(url=server.url())) as broker, Control(broker) as control:
        for command in ("ping", "stats"):
            theirs: list[float] = []
            ours: list[float] = []

            def celerys(command: str = command) -> None:
                assert len(getattr(app.control.inspect(), command)()) == 4

            def engines(command: str = command) -> None:
                assert len(control.broadcast(command).replies) == 4

            celerys()
            engines()
            for _unused in range(7):
                theirs.append(milliseconds(celerys))
                ours += [milliseconds(engines) for _unused in range(20)]
            results.append(
                result(
                    "inspect-engine" if command == "ping" else f"inspect-engine-{command}",
                    statistics.median(theirs),
                    statistics.median(ours),
                    f"4 live workers, one warm process, {command} through app.control.inspect() with its default "
                    f"timeout ({spread(theirs)}) and the engine ({spread(ours)})",
                )
            )
    app.close()
    return results


def bench_task(server: RedisServer) -> list[dict[str, Any]]:
    """Slope between plays of 1 and of 5 tasks, so that the start of ansible-playbook cancels out."""
    more = 4
    venv = celery_venv()
    command = {
        "ansible.builtin.command": f"{venv}/bin/celery inspect ping",
        "environment": {"CELERY_BROKER_URL": server.url()},
        "changed_when": False,
    }
    ours_task = {"celeryops.runbook.celery_inspect": {"broker_url": server.url(), "virtualenv": str(venv)}}
    python = str(TOP / ".venv" / "bin" / "python")

    with tempfile.TemporaryDirectory() as directory:
        ansible = Ansible(Path(directory))

        def play(task: dict[str, Any], count: int) -> float:
            task = {**task, "vars": {"ansible_python_interpreter": python}}
            started = time.perf_counter()
            done = ansible.play([task] * count, diff=False)
            took = (time.perf_counter() - started) * 1000
            assert not any(item.get("failed") for item in done), done
            return took

        def slope(task: dict[str, Any]) -> float:
            return (play(task, 1 + more) - play(task, 1)) / more

        slope(ours_task)
        theirs, ours = [], []
        for _unused in range(3):
            theirs.append(slope(command))
            ours.append(slope(ours_task))
    return [
        result(
            "inspect-task",
            statistics.median(theirs),
            statistics.median(ours),
            f"one Ansible task on localhost, slope between 1 and {1 + more} tasks, 4 live workers: "
            f"ansible.builtin.command celery inspect ping ({spread(theirs)}), celery_inspect ({spread(ours)})",
        )
    ]


def bench_many(server: RedisServer) -> list[dict[str, Any]]:
    """10,000 real sockets subscribed as workers are; a second run with some that never answer."""
    app = celery_app(server.url())
    results = []
    with Broker(BrokerSpec.build(url=server.url())) as broker, Control(broker) as control:
        for mute in (0, MUTE):
            answering = NODES - mute
            deadline = 1.0 if mute else 30.0
            theirs: list[float] = []
            ours: list[float] = []

            def celerys(answering: int = answering) -> None:
                found = len(app.control.inspect().ping())
                assert found == answering, found

            def engines(answering: int = answering, deadline: float = deadline, mute: int = mute) -> None:
                replies = control.broadcast("ping", timeout=deadline)
                assert (len(replies.replies), replies.subscribed, replies.silent_count) == (answering, NODES, mute)

            with simulated(server, mute):
                engines()
                for _unused in range(3):
                    theirs.append(milliseconds(celerys))
                    ours += [milliseconds(engines) for _unused in range(2)]
            if mute:
                over = max(ours) - deadline * 1000
                assert over < 50, f"{over:.1f} ms over the deadline"
                text = f"{mute} of {NODES} never answer, deadline {deadline} s, worst {over:.1f} ms above it; "
                name = "inspect-10000-nodes-hung"
            else:
                text = f"{NODES} simulated nodes, each a real subscribed socket; "
                name = "inspect-10000-nodes"
            text += f"app.control.inspect().ping() ({spread(theirs)}), the engine ({spread(ours)})"
            results.append(result(name, statistics.median(theirs), statistics.median(ours), text))
    app.close()
    return results


@contextlib.contextmanager
def simulated(server: RedisServer, mute: int) -> Iterator[None]:
    process = subprocess.Popen(
        [sys.executable, __file__, "--simulate", str(server.port), str(NODES), str(mute)],
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        assert process.stdout
        if process.stdout.readline().strip() != b"ready":
            raise RuntimeError("the simulated nodes did not come up")
        yield
    finally:
        process.kill()
        process.wait()


def simulate(port: int, count: int, mute: int) -> None:
    """Nodes that subscribe as kombu's fanout does and answer every request; the last `mute` ones only listen."""
    raise_files(count + 100)
    subscribe = command("PSUBSCRIBE", "/0.celery.pidbox")
    poll = select.epoll()
    nodes: dict[int, tuple[int, socket.socket]] = {}
    for number in range(count):
        node = socket.create_connection(("127.0.0.1", port))
        node.sendall(subscribe)
        assert node.recv(1000).startswith(b"*3")
        node.setblocking(False)
        poll.register(node, select.EPOLLIN)
        nodes[node.fileno()] = (number, node)
    writer = socket.create_connection(("127.0.0.1", port))
    writer.setblocking(False)
    poll.register(writer, select.EPOLLIN)
    nodes[writer.fileno()] = (-1, writer)
    bodies = [body_of(number) for number in range(count)]
    known: dict[bytes, list[tuple[bytes, bytes]]] = {}
    rest: dict[int, bytes] = {}
    print("ready", flush=True)
    while True:
        out: list[bytes] = []
        for fd, _unused in poll.poll(-1, 512):
            number, node = nodes[fd]
            data = node.recv(1 << 16)
            if number < 0 or number >= count - mute:
                continue
            if rest:
                data = rest.pop(number, b"") + data
            requests = known.get(data)
            if requests is None:
                requests = parse(data)
                if requests is None:
                    rest[number] = data
                    continue
                known[data] = requests
            for head, tail in requests:
                out += (head, bodies[number], tail)
        send(writer, b"".join(out))
        if len(known) > 100:
            known.clear()


def body_of(number: int) -> bytes:
    return base64.b64encode(json.dumps({f"node{number:05}@bench": {"ok": "pong"}}).encode())


BODY = len(body_of(0))  # names are padded, so one message template fits every node


def send(writer: socket.socket, data: bytes) -> None:
    view = memoryview(data)
    while view:
        try:
            view = view[writer.send(view) :]
        except BlockingIOError:
            with contextlib.suppress(BlockingIOError):
                writer.recv(1 << 16)
            time.sleep(0.0002)


def command(*parts: str) -> bytes:
    return b"*%d\r\n" % len(parts) + b"".join(b"$%d\r\n%s\r\n" % (len(p.encode()), p.encode()) for p in parts)


def parse(data: bytes) -> list[tuple[bytes, bytes]] | None:
    """LPUSH commands that answer the requests in the data, cut where a node's own text goes; None if incomplete."""
    found = []
    while data:
        lines = data.split(b"\r\n", 8)
        if len(lines) < 9:
            return None
        length = int(lines[7][1:])
        payload, data = lines[8][:length], lines[8][length + 2 :]
        if len(payload) < length:
            return None
        body = json.loads(base64.b64decode(json.loads(payload)["body"]))
        to = body["reply_to"]
        message = {
            "body": "<BODY>",
            "content-encoding": "utf-8",
            "content-type": "application/json",
            "headers": {"clock": 7, "ticket": body["ticket"]},
            "properties": {
                "delivery_mode": 1,
                "delivery_info": {"exchange": to["exchange"], "routing_key": to["routing_key"]},
                "priority": 0,
                "body_encoding": "base64",
                "delivery_tag": "7f2ad3f8-b1c4-4d35-90a3-0a1b2c3d4e5f",
            },
        }
        text = json.dumps(message)
        head, tail = (part.encode() for part in text.split("<BODY>"))
        key = f"{to['routing_key']}.{to['exchange']}".encode()
        length = len(head) + BODY + len(tail)
        start = b"*3\r\n$5\r\nLPUSH\r\n$%d\r\n%s\r\n$%d\r\n" % (len(key), key, length)
        found.append((start + head, tail + b"\r\n"))
    return found


def raise_files(wanted: int) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < wanted:
        if hard != resource.RLIM_INFINITY and hard < wanted:
            raise SystemExit(f"this needs {wanted} open files, the hard limit is {hard}: raise it (ulimit -Hn)")
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=["engine", "task", "many"], action="append")
    parser.add_argument("--simulate", nargs=3, type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.simulate:
        simulate(*options.simulate)
        return
    parts = options.only or ["engine", "task", "many"]
    raise_files(NODES + 500)
    results: list[dict[str, Any]] = []
    with RedisServer("--maxclients", str(NODES + 200)) as server:
        if {"engine", "task"} & set(parts):
            with workers(*fleet(server)):
                results += bench_engine(server) if "engine" in parts else []
                results += bench_task(server) if "task" in parts else []
        if "many" in parts:
            results += bench_many(server)
    tell(results)


if __name__ == "__main__":
    main()
