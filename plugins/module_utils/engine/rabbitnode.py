# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What is wrong with the RabbitMQ of a host, and what cures it. Pure: what systemd and rabbitmqctl say comes in."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .errors import PreconditionFailed

HEALTHY = "healthy"
SHOWN = ("LoadState", "ActiveState", "SubState", "Result")  # of systemctl show
GIB = 1024**3
_NOT_RUNNING = ("requires the 'rabbit' app", "rabbit application is not running")
_NO_DISTRIBUTION = "TCP connection succeeded but Erlang distribution failed"
_COOKIE = "the connection is taken and nothing comes of it; see first whether both have the same .erlang.cookie"
_FULL = 0.98  # of the connections a node can take


@dataclass(frozen=True)
class Unit:
    """What systemd says."""

    name: str
    load: str
    active: str
    sub: str
    result: str
    frozen: tuple[int, ...] = ()  # processes that a signal has stopped

    @classmethod
    def of(cls, name: str, shown: Mapping[str, str], frozen: tuple[int, ...]) -> Unit:
        load, active, sub, result = (shown.get(key, "") for key in SHOWN)
        return cls(name, load, active, sub, result, frozen)


@dataclass(frozen=True)
class Finding:
    """`cure` is start, start_app, restart, continue, wait or nothing; `human` is what a person must decide."""

    state: str
    text: str
    cure: str = ""
    human: str = ""


def diagnose(unit: Unit, code: int | None, output: str) -> Finding:
    """`code` and `output`: of `rabbitmqctl --formatter json status`; None where it was not asked or did not end."""
    if unit.load == "not-found":
        raise PreconditionFailed(f"unit: this host has no {unit.name}. Name the unit of RabbitMQ, or another host.")
    if unit.load == "masked":
        return Finding(
            "masked", f"{unit.name} is masked.", human=f"Unmask it (systemctl unmask {unit.name}), if it is to run."
        )
    if unit.frozen:
        pids = ", ".join(map(str, unit.frozen))
        return Finding("frozen", f"process {pids} of RabbitMQ is stopped by a signal.", cure="continue")
    if unit.active == "activating" and unit.sub != "auto-restart":
        return Finding("starting", "RabbitMQ is starting.", cure="wait")
    if unit.active == "deactivating":
        return Finding("stopping", "RabbitMQ is stopping.", cure="start")
    if unit.active not in ("active", "reloading"):
        why = f" ({unit.result})" if unit.result not in ("", "success") else ""
        return Finding("down", f"{unit.name} does not run{why}.", cure="start")
    if code is None:
        return Finding("wedged", "RabbitMQ runs and does not answer rabbitmqctl.", cure="restart")
    if code:
        if any(words in output for words in _NOT_RUNNING):
            return Finding("app_stopped", "the node is up, its application rabbit is stopped.", cure="start_app")
        why = _COOKIE if _NO_DISTRIBUTION in output else _first(output)
        return Finding("wedged", f"RabbitMQ runs and does not answer rabbitmqctl: {why}.", cure="restart")
    return _of_status(read(output))


def read(output: str) -> dict[str, Any]:
    """The JSON of rabbitmqctl; warnings may stand before it."""
    try:
        value = json.loads(output[output.index("{") :])
    except ValueError as exc:
        raise PreconditionFailed(
            f"rabbitmqctl status answers no JSON: {_first(output)}. RabbitMQ 3.8 or newer does."
        ) from exc
    return dict(value)


def _first(output: str) -> str:
    return next((line.strip() for line in output.splitlines() if line.strip()), "no output")[:200].rstrip(".")


def _of_status(status: Mapping[str, Any]) -> Finding:
    alarms = {
        str(alarm.get("resource", "")) if isinstance(alarm, Mapping) else str(alarm) for alarm in status["alarms"]
    }
    if "disk" in alarms:
        free, least = status["disk_free"], status["disk_free_limit"]
        return Finding(
            "disk_alarm",
            f"disk alarm: {_gib(free)} are free, {_gib(least)} have to be; who publishes waits.",
            human=f"Free space where {status['data_directory']} lies; the alarm goes off by itself.",
        )
    if "memory" in alarms:
        return Finding(
            "memory_alarm",
            f"memory alarm: RabbitMQ uses {_gib(status['memory']['total']['rss'])} of the "
            f"{_gib(status['vm_memory_high_watermark_limit'])} it may; who publishes waits.",
            human="Let workers consume what waits (scale), or give it more (rabbitmqctl set_vm_memory_high_watermark); "
            "a restart would load the same messages again.",
        )
    if alarms:
        return Finding(
            "file_descriptors",
            f"alarm: {', '.join(sorted(alarms))}.",
            human="Raise LimitNOFILE of the unit and restart it, or end connections that are not needed.",
        )
    sockets = status["file_descriptors"]
    if sockets["sockets_used"] >= _FULL * sockets["sockets_limit"]:
        return Finding(
            "max_connections",
            f"{sockets['sockets_used']} of {sockets['sockets_limit']} connections are in use, no more are taken.",
            human="End those that are not needed (rabbitmqctl list_connections, close_all_user_connections), or "
            "raise LimitNOFILE of the unit.",
        )
    if not any(str(row.get("protocol", "")).startswith("amqp") for row in status["listeners"]):
        return Finding(
            "maintenance" if status.get("is_under_maintenance") else "no_listener",
            "RabbitMQ runs and listens on no port of AMQP.",
            human="Somebody has suspended it (maintenance): rabbitmqctl resume_listeners, or rabbitmq-upgrade revive.",
        )
    return Finding(HEALTHY, f"RabbitMQ {status['rabbitmq_version']} answers, no alarm is on.")


def _gib(size: float) -> str:
    return f"{size / GIB:.2f} GiB"
