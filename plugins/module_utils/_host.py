# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Private to the collection: units and processes of one application on this host, read only."""

from __future__ import annotations

import glob
import json
import os
import re
import shlex
import socket
from collections.abc import Callable, Iterable
from typing import Any

PROPERTIES = ("Id", "LoadState", "ActiveState", "SubState", "Result", "NRestarts", "MainPID", "UnitFileState")


def read_env(path: str) -> dict[str, str]:
    """A systemd EnvironmentFile, as far as the roles write it: KEY=value, with or without quotes."""
    found: dict[str, str] = {}
    with open(path, encoding="utf-8") as lines:
        for line in lines:
            key, equals, value = line.strip().partition("=")
            if not equals or key.startswith(("#", ";")):
                continue
            if len(value) > 1 and value[0] == value[-1] and value[0] in "\"'":
                value = value[1:-1]
            found[key] = value
    return found


def queues_of(options: str) -> list[str]:
    """The queues which a worker's command line names with -Q or --queues."""
    try:
        words = shlex.split(options)
    except ValueError:
        return []
    for position, word in enumerate(words):
        if word in ("-Q", "--queues") and position + 1 < len(words):
            return [queue for queue in words[position + 1].split(",") if queue]
        if word.startswith("--queues="):
            return [queue for queue in word.partition("=")[2].split(",") if queue]
    return []


def instances(config_dir: str, hostname: str | None = None) -> dict[str, dict[str, Any]]:
    """instance -> its node and queues, from the environment files of the worker role."""
    found: dict[str, dict[str, Any]] = {}
    for path in sorted(glob.glob(os.path.join(glob.escape(config_dir), "worker-*.env"))):
        environment = read_env(path)
        instance = os.path.basename(path)[len("worker-") : -len(".env")]
        node = environment.get("CELERYOPS_NODE", "")
        found[instance] = {
            "node": re.sub("%[Hh]", hostname or socket.gethostname(), node),
            "queues": queues_of(environment.get("CELERYOPS_WORKER_OPTIONS", "")),
        }
    return found


def parse_show(text: str) -> dict[str, dict[str, str]]:
    """unit -> properties, from `systemctl show` of several units."""
    found: dict[str, dict[str, str]] = {}
    for block in text.split("\n\n"):
        properties = dict(line.partition("=")[::2] for line in block.splitlines() if "=" in line)
        if properties.get("Id"):
            found[properties["Id"]] = properties
    return found


class Processes:
    """The process table, from /proc."""

    def __init__(self, proc: str = "/proc") -> None:
        self.proc = proc
        self.parent: dict[int, int] = {}
        self.state: dict[int, str] = {}
        self.rss: dict[int, int] = {}
        self.began: dict[int, int] = {}  # in the kernel's ticks: tells a process from a later one of its number
        page = os.sysconf("SC_PAGE_SIZE")
        for entry in os.listdir(proc):
            if not entry.isdigit():
                continue
            try:
                with open(os.path.join(proc, entry, "stat"), encoding="utf-8", errors="replace") as stat:
                    # The command, in brackets, may hold anything, brackets and blanks too.
                    fields = stat.read().rpartition(")")[2].split()
                pid = int(entry)
                self.state[pid], self.parent[pid], self.rss[pid] = fields[0], int(fields[1]), int(fields[21]) * page
                self.began[pid] = int(fields[19])
            except (OSError, ValueError, IndexError):
                continue  # it has ended meanwhile

    def tree(self, pid: int) -> list[int]:
        children: dict[int, list[int]] = {}
        for child, parent in self.parent.items():
            children.setdefault(parent, []).append(child)
        found, todo = [], [pid] if pid in self.parent else []
        while todo:
            one = todo.pop()
            found.append(one)
            todo.extend(children.get(one, ()))
        return found

    def tree_rss(self, pid: int) -> int:
        return sum(self.rss[one] for one in self.tree(pid))

    def arguments(self, pid: int) -> list[str]:
        try:
            with open(os.path.join(self.proc, str(pid), "cmdline"), "rb") as handle:
                return [word.decode(errors="replace") for word in handle.read().split(b"\0") if word]
        except OSError:
            return []

    def link(self, pid: int, name: str) -> str:
        try:
            return os.readlink(os.path.join(self.proc, str(pid), name))
        except OSError:
            return ""

    def service(self, pid: int) -> str:
        """The systemd unit it runs in: a service, or the scope of somebody's session."""
        try:
            with open(os.path.join(self.proc, str(pid), "cgroup"), encoding="utf-8") as handle:
                groups = {line.split(":")[1]: line.rstrip().split(":", 2)[2] for line in handle}
        except (OSError, IndexError):
            return ""
        # systemd's own hierarchy; the other one is all there is with cgroups of version 2.
        path = groups.get("name=systemd") or groups.get("", "")
        return next((part for part in reversed(path.split("/")) if part.endswith((".service", ".scope"))), "")

    def unit(self, pid: int) -> str:
        """The unit of a beat that the collection has installed, else nothing."""
        service = self.service(pid)
        return service if re.fullmatch(r"celery-[a-z0-9-]+-beat\.service", service) else ""

    def runs(self, pid: int) -> bool:
        """False for a process which is stopped or dead: it exists but does nothing."""
        return self.state.get(pid, "X") not in ("T", "t", "Z", "X", "x")


def is_beat(arguments: list[str]) -> bool:
    """A beat of its own, or a worker that carries one (-B)."""
    if arguments and arguments[0].startswith("[celery beat]"):
        return True
    celery = [n for n, word in enumerate(arguments[:4]) if os.path.basename(word) == "celery"]
    if not celery:
        return False
    rest = arguments[celery[0] + 1 :]
    if "beat" in rest and "worker" not in rest:
        return True
    return "worker" in rest and ("-B" in rest or "--beat" in rest)


def belongs(arguments: list[str], places: Iterable[str], app: str, root: str) -> bool:
    """Is it of this application? By where it runs, else by -A."""
    if any(place == root or place.startswith(root.rstrip("/") + "/") for place in places):
        return True
    for position, word in enumerate(arguments):
        if word in ("-A", "--app") and position + 1 < len(arguments):
            return bool(app) and _module(arguments[position + 1]) == _module(app)
        if word.startswith("--app="):
            return bool(app) and _module(word.partition("=")[2]) == _module(app)
    return False


def _module(app: str) -> str:
    """`shop`, `shop:app` and `shop.celery:app` are one to Celery."""
    return app.partition(":")[0].removesuffix(".celery")


def beats(processes: Processes, mains: dict[int, str], app: str, root: str) -> list[dict[str, Any]]:
    """Every beat of the application; mains: the main process of each unit."""
    found: list[dict[str, Any]] = []
    for pid in sorted(processes.parent):
        arguments = processes.arguments(pid)
        if not is_beat(arguments):
            continue
        if processes.parent[pid] in processes.parent and is_beat(processes.arguments(processes.parent[pid])):
            continue  # a pool child of a worker with -B
        places = [processes.link(pid, "exe"), processes.link(pid, "cwd"), *arguments[:2]]
        unit = mains.get(pid)
        if not unit and processes.unit(pid):
            continue  # another application's beat, under its own unit
        if unit or belongs(arguments, places, app, root):
            found.append(
                {
                    "pid": pid,
                    "began": processes.began[pid],
                    "unit": unit,
                    "running": processes.runs(pid),
                    "worker": "worker" in arguments,
                    "service": processes.service(pid),
                }
            )
    return found


def current_release(root: str) -> tuple[str | None, dict[str, Any]]:
    """The release that `current` points to, and what its release.json tells."""
    link = os.path.join(root, "current")
    if not os.path.islink(link):
        return None, {}
    target = os.path.realpath(link)
    try:
        with open(os.path.join(target, "release.json"), encoding="utf-8") as handle:
            described = json.load(handle)
    except (OSError, ValueError):
        described = {}
    return os.path.basename(target), described if isinstance(described, dict) else {}


def look(
    name: str, app: str, root: str, config_dir: str, systemctl: Callable[[list[str]], str], proc: str = "/proc"
) -> dict[str, Any]:
    configured = instances(config_dir)
    worker, beat = f"celery-{name}-worker@", f"celery-{name}-beat.service"
    listed = systemctl(["list-units", "--all", "--plain", "--no-legend", "--full", f"{worker}*.service", beat])
    names = {line.split()[0] for line in listed.splitlines() if line.split()}
    names |= {f"{worker}{instance}.service" for instance in configured}
    names.add(beat)
    shown = parse_show(systemctl(["show", "--property=" + ",".join(PROPERTIES), *sorted(names)]))
    processes = Processes(proc)
    units: list[dict[str, Any]] = []
    mains: dict[int, str] = {}
    for unit, properties in sorted(shown.items()):
        if properties.get("LoadState") == "not-found" and properties.get("ActiveState") == "inactive":
            continue
        pid = int(properties.get("MainPID") or 0)
        if pid:
            mains[pid] = unit
        instance = unit[len(worker) : -len(".service")] if unit.startswith(worker) else ""
        units.append(
            {
                "name": unit,
                "kind": "worker" if instance else "beat",
                "instance": instance,
                "node": configured.get(instance, {}).get("node", ""),
                "queues": configured.get(instance, {}).get("queues", []),
                "active": properties.get("ActiveState", ""),
                "sub": properties.get("SubState", ""),
                "result": properties.get("Result", ""),
                "restarts": int(properties.get("NRestarts") or 0),
                "enabled": properties.get("UnitFileState") in ("enabled", "enabled-runtime", "static", "linked"),
                "pid": pid,
                "processes": len(processes.tree(pid)) if pid else 0,
                "rss": processes.tree_rss(pid) if pid else 0,
            }
        )
    release, described = current_release(root)
    return {
        "units": units,
        "beats": beats(processes, mains, app, root),
        "hostname": socket.gethostname(),
        "release": release,
        "visibility_timeout": described.get("visibility_timeout"),
    }
