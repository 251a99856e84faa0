# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Which beats there are in a fleet, which one is the right one, and what has to be done about the others. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .schedule import Leader

# Seconds after which a heartbeat no longer proves that a beat lives: it ticks every 30 s and writes every 5 s.
FRESH = 60.0


@dataclass(frozen=True)
class Seen:
    """What was seen: by the process tables of the hosts, in the broker, and by asking."""

    hosts: Mapping[str, Mapping[str, Any]]
    wanted: Sequence[str]
    leader: Leader | None = None
    heartbeat: Mapping[str, Any] | None = None
    answered: Sequence[str] = ()  # nodes of beats that answered a ping (Celery 5.7)
    lost: Sequence[str] = ()
    moved_from: str = ""
    silent_after: float = 300.0


@dataclass
class Plan:
    """What each host has to do. Nothing of it may be done while there are problems."""

    problems: list[str] = field(default_factory=list)
    end: dict[str, list[dict[str, int]]] = field(default_factory=dict)  # processes without a unit of ours
    remove: list[str] = field(default_factory=list)  # hosts whose unit is stopped and disabled
    start: list[str] = field(default_factory=list)
    restart: list[str] = field(default_factory=list)
    found: list[str] = field(default_factory=list)  # every beat, in words

    @property
    def acts(self) -> list[str]:
        done = [f"end beat {one['pid']} on {host}" for host, some in self.end.items() for one in some]
        for verb, hosts in (("stop and disable", self.remove), ("start", self.start), ("restart", self.restart)):
            done += [f"{verb} the unit on {host}" for host in hosts]
        return done


def plan(seen: Seen) -> Plan:
    found = Plan()
    for host, facts in seen.hosts.items():
        for beat in facts.get("beats") or ():
            _process(seen, found, host, beat)
        unit = _unit(facts)
        if host in seen.wanted:
            _right(seen, found, host, facts, unit)
        elif unit and (unit["enabled"] or unit["active"] not in ("inactive", "failed")):
            found.remove.append(host)
    found.problems += [*_unseen(seen), *_elsewhere(seen)]
    return found


def _unit(facts: Mapping[str, Any]) -> Mapping[str, Any] | None:
    return next((unit for unit in facts.get("units") or () if unit["kind"] == "beat"), None)


def _process(seen: Seen, found: Plan, host: str, beat: Mapping[str, Any]) -> None:
    where = beat["unit"] or (f"by hand, in {beat['service']}" if beat.get("service") else "by hand")
    found.found.append(f"{host} (pid {beat['pid']}, {where}{'' if beat['running'] else ', frozen'})")
    if beat.get("worker"):
        found.problems.append(
            f"a worker on {host} (pid {beat['pid']}, {where}) carries a beat: take -B out of its arguments and "
            f"restart it"
        )
    elif not beat["unit"]:
        found.end.setdefault(host, []).append({"pid": int(beat["pid"]), "began": int(beat["began"])})


def _right(seen: Seen, found: Plan, host: str, facts: Mapping[str, Any], unit: Mapping[str, Any] | None) -> None:
    if not facts.get("reachable", True):
        return
    if not unit or unit["active"] not in ("active", "activating", "reloading") or not unit["enabled"]:
        found.start.append(host)
        return
    frozen = any(beat["unit"] and not beat["running"] for beat in facts.get("beats") or ())
    beat = seen.heartbeat
    silent = (
        beat is not None
        and beat["pid"] == unit["pid"]
        and beat["host"] == facts.get("hostname")
        and float(beat["age"]) > seen.silent_after
    )
    if frozen or silent:
        found.restart.append(host)


def _unseen(seen: Seen) -> Iterator[str]:
    """Hosts that could not be looked at."""
    for host, facts in seen.hosts.items():
        if facts.get("reachable", True):
            if host in seen.lost:
                yield f"celeryops_lost_hosts: {host} is not lost, it can be reached: leave it out"
        elif host not in seen.lost:
            yield (
                f"{host} could not be looked at ({facts.get('error') or 'unreachable'}), and a beat may run there: "
                f"make it reachable or, when it is surely down, name it in celeryops_lost_hosts"
            )
    for host in seen.lost:
        if host not in seen.hosts:
            yield f"celeryops_lost_hosts: {host} is no host of this inventory"
        elif _ticks(seen, host):
            yield f"celeryops_lost_hosts: {host} is not down, its beat ticks still. Make it reachable"
        elif host in seen.wanted and len(seen.wanted) == 1:
            yield (
                f"celeryops_beat_group: {host} is to run beat and is named in celeryops_lost_hosts: give the group "
                f"another host of the fleet"
            )


def _ticks(seen: Seen, host: str) -> bool:
    beat = seen.heartbeat
    if seen.leader is not None:
        return seen.leader.host == host
    return beat is not None and beat["host"] == host and float(beat["age"]) < FRESH


def _elsewhere(seen: Seen) -> Iterator[str]:
    """Beats that are in charge although this inventory does not say so, and beats which nobody has found."""
    leader = seen.leader
    if leader is not None and leader.host not in seen.wanted and leader.host not in seen.lost:
        wanted = ", ".join(seen.wanted)
        if leader.host not in seen.hosts:
            yield (
                f"celeryops_beat_group: beat leads on {leader}, which is no host of this inventory, and the group "
                f"names {wanted}: two inventories name two beats. Correct one of them; stop that beat with its own "
                f"inventory"
            )
        elif leader.host != seen.moved_from and not _stray(seen, leader):
            yield (
                f"celeryops_beat_group: beat leads on {leader}, and the group names {wanted}: two inventories name two "
                f"beats, or beat is to move. Correct the group, or, to move it, set celeryops_beat_from={leader.host}"
            )
    known: dict[str, int] = {}
    for host, facts in seen.hosts.items():
        name = str(facts.get("hostname") or host)
        known[name] = known.get(name, 0) + sum(bool(beat["running"]) for beat in facts.get("beats") or ())
    for node in sorted(set(seen.answered)):
        name = node.partition("@")[2]
        if seen.answered.count(node) > known.get(name, 0):
            yield (
                f"{node} answers a ping, and no process of it was found on a host of this inventory: look for it on "
                f"the host {name} (in a container, under another name), and stop it there"
            )
    beat = seen.heartbeat
    if leader is None and beat is not None and float(beat["age"]) < FRESH and beat["host"] not in known:
        yield (
            f"a beat on {beat['host']} (pid {beat['pid']}) ticked {beat['age']:.0f} s ago, which is no host of this "
            f"inventory: two inventories name two beats. Correct one of them; stop that beat with its own inventory"
        )


def _stray(seen: Seen, leader: Leader) -> bool:
    """Does a beat lead that no unit runs? It is ended like any other."""
    beats = seen.hosts[leader.host].get("beats") or ()
    return any(beat["pid"] == leader.pid and not beat["unit"] for beat in beats)


def lacking(seen: Seen) -> str:
    """Why the fleet does not have its one beat yet, or nothing: the right one must tick, and lead if it knows how."""
    pids = {unit["pid"]: host for host in seen.wanted if (unit := _unit(seen.hosts.get(host, {}))) and unit["pid"]}
    beat = seen.heartbeat
    if not pids:
        return f"no beat runs on {', '.join(seen.wanted)}"
    if beat is None or beat["pid"] not in pids or float(beat["age"]) > FRESH:
        told = f"the last tick came from {beat['host']} (pid {beat['pid']}) {beat['age']:.0f} s ago" if beat else ""
        return f"beat on {', '.join(pids.values())} has not ticked yet{f'; {told}' if told else ''}"
    if seen.leader is not None and seen.leader.host not in seen.wanted:
        return f"beat on {seen.leader} leads still"
    if seen.leader is None and len(seen.wanted) > 1:
        return "no beat leads, so that all of them send: the runtime part lead is off, or Redis forbids it"
    return ""
