# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Facts about a fleet and thresholds in, one verdict out. No input or output of its own."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

OK, UNKNOWN, WARNING, CRITICAL = "ok", "unknown", "warning", "critical"
_RANK = {OK: 0, UNKNOWN: 1, WARNING: 2, CRITICAL: 3}
MIB = 1024 * 1024


@dataclass(frozen=True)
class Limit:
    """Warning from the first figure on, critical beyond the second; None: no such step."""

    warning: float | None
    critical: float | None
    unit: str = ""
    low_is_bad: bool = False

    def judge(self, value: float) -> str:
        sign = -1 if self.low_is_bad else 1
        if self.critical is not None and sign * value > sign * self.critical:
            return CRITICAL
        if self.warning is not None and sign * value >= sign * self.warning:
            return WARNING
        return OK

    def replaced(self, warning: float | None, critical: float | None) -> Limit:
        return Limit(warning, critical, self.unit, self.low_is_bad)


DEFAULTS: dict[str, Limit] = {
    "worker_count": Limit(1, 1, low_is_bad=True),
    "workers_missing": Limit(1, None),
    "workers_silent": Limit(1, None),
    "workers_without_queue": Limit(1, None),
    "workers_duplicate": Limit(1, None),
    "workers_unexpected": Limit(1, None),
    "worker_memory": Limit(2048, 3072, "MiB"),
    "queue_depth": Limit(50, 100, "messages"),
    "queue_latency": Limit(0.5, 2.5, "s"),
    "queue_consumers": Limit(None, 1, low_is_bad=True),
    "queue_paused": Limit(1, None, "s beyond the time it was meant to last"),
    "dead_letters": Limit(10, 100, "messages"),
    "unacked_age": Limit(80, 100, "% of the visibility timeout"),
    "task_success": Limit(95, 90, "%", low_is_bad=True),
    "task_retry": Limit(5, 10, "%"),
    "task_duration": Limit(None, None, "s"),
    "beat_entries": Limit(None, None),
    "beat_standby": Limit(1, None),
    "beat_missing": Limit(None, 0),
    "beat_duplicate": Limit(None, 0),
    "beat_silent": Limit(None, 300, "s"),
    "release_skew": Limit(1, None),
    "units_failed": Limit(None, 0),
    "units_inactive": Limit(1, None),
    "unit_restarts": Limit(3, 10),
    "hosts_unreachable": Limit(1, None),
    "broker_alarms": Limit(None, 0),
    "broker_nodes": Limit(None, 0),
    "broker_quorum": Limit(1, None, "queues"),
    "broker_disk": Limit(50, 95, "%"),
    "broker_memory": Limit(80, 95, "%"),
    "broker_clients": Limit(80, 95, "%"),
    "broker_rejected": Limit(1, None, "connections"),
    "broker_evicted": Limit(None, 0, "keys"),
    "broker_certificate": Limit(14, 2, "days", low_is_bad=True),
}

CURES: dict[str, str] = {
    "worker_count": "start",
    "workers_missing": "start",
    "workers_silent": "restart",
    "workers_without_queue": "redis_recover",
    "workers_duplicate": "site",
    "workers_unexpected": "site",
    "worker_memory": "restart",
    "queue_depth": "scale",
    "queue_latency": "scale",
    "queue_consumers": "start",
    "queue_paused": "queue_resume",
    "dead_letters": "dead_letter_report",
    "unacked_age": "restart",
    "task_success": "rollback",
    "task_retry": "rollback",
    "task_duration": "scale",
    "beat_entries": "beat_entry",
    "beat_standby": "start",
    "beat_missing": "start",
    "beat_duplicate": "beat_ensure_single",
    "beat_silent": "beat_ensure_single",
    "release_skew": "rolling_deploy",
    "units_failed": "restart",
    "units_inactive": "start",
    "unit_restarts": "rollback",
    "hosts_unreachable": "",
    "broker_reachable": "site",
    "broker_alarms": "broker_recover",
    "broker_nodes": "broker_recover",
    "broker_quorum": "broker_recover",
    "broker_disk": "",
    "broker_memory": "site",
    "broker_clients": "site",
    "broker_rejected": "site",
    "broker_certificate": "redis_rotate_secret",
    "broker_evicted": "site",
    "broker_eviction_policy": "site",
    "broker_persistence": "site",
    "broker_role": "site",
}


# Checks that only RabbitMQ has.
RABBITMQ = frozenset({"broker_alarms", "broker_nodes", "broker_quorum", "broker_disk"})


class BadThreshold(ValueError):
    """A threshold that names no check or is not a pair of figures."""


@dataclass(frozen=True)
class Check:
    name: str
    severity: str
    subject: str
    value: float | str | None
    warning: float | None
    critical: float | None
    unit: str
    message: str
    cure: str


@dataclass
class Facts:
    """What was seen. None means: could not be seen, so the checks on it say unknown."""

    broker: Mapping[str, Any] | None = None
    broker_error: str = ""
    hosts: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    fleet: Mapping[str, Any] | None = None
    queues: Mapping[str, Mapping[str, Any]] | None = None
    paused: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    dead: Mapping[str, int] | None = None
    unacked: Mapping[str, Any] | None = None
    queues_reason: str = "the broker does not answer"
    events: Mapping[str, Any] | None = None
    events_reason: str = "the event stream was not read"
    visibility_timeout: float = 3600.0
    beat_expected: bool = True
    standby: int = 0  # beats that are to stand by for the one
    disabled: Mapping[str, str] | None = None  # entries of the schedule, each in words
    heartbeat: Mapping[str, Any] | None = None
    events_minimum: int = 20


@dataclass
class Verdict:
    verdict: str
    checks: list[Check]

    def as_dict(self) -> dict[str, Any]:
        return {
            "verdict": self.verdict,
            "checks": [asdict(check) for check in self.checks],
            "counts": {level: sum(check.severity == level for check in self.checks) for level in _RANK},
        }

    @property
    def causes(self) -> list[str]:
        """The messages which decided the verdict, worst first."""
        bad = [check for check in self.checks if _RANK[check.severity] > _RANK[UNKNOWN]]
        return [check.message for check in sorted(bad, key=lambda check: -_RANK[check.severity])]


class Thresholds:
    """The defaults, replaced check by check, for single queues and for tasks by pattern."""

    def __init__(
        self,
        checks: Mapping[str, Any] | None = None,
        queues: Mapping[str, Any] | None = None,
        tasks: Mapping[str, Any] | None = None,
    ) -> None:
        self._checks = dict(DEFAULTS)
        for name, pair in (checks or {}).items():
            if name not in DEFAULTS:
                raise BadThreshold(f"thresholds: no check is called {name!r}; there are {', '.join(sorted(DEFAULTS))}")
            self._checks[name] = _limit(self._checks[name], pair, f"thresholds.{name}")
        self._queues: dict[tuple[str, str], Limit] = {}
        for queue, entries in (queues or {}).items():
            if not isinstance(entries, Mapping) or not entries:
                raise BadThreshold(
                    f"queue_thresholds.{queue}: give depth and/or latency, each with warning and critical"
                )
            for short, pair in entries.items():
                check = f"queue_{short}"
                if short not in ("depth", "latency", "consumers"):
                    raise BadThreshold(f"queue_thresholds.{queue}: {short!r} is none of depth, latency, consumers")
                self._queues[queue, check] = _limit(self._checks[check], pair, f"queue_thresholds.{queue}.{short}")
        self._tasks = {
            pattern: _limit(self._checks["task_duration"], pair, f"task_thresholds.{pattern}")
            for pattern, pair in (tasks or {}).items()
        }

    def of(self, name: str) -> Limit:
        return self._checks[name]

    def of_queue(self, name: str, queue: str) -> Limit:
        return self._queues.get((queue, name), self._checks[name])

    def of_task(self, task: str) -> Limit:
        for pattern, limit in self._tasks.items():
            if fnmatch.fnmatchcase(task, pattern):
                return limit
        return self._checks["task_duration"]


def _limit(base: Limit, pair: Any, where: str) -> Limit:
    if not isinstance(pair, Mapping) or not pair or set(pair) - {"warning", "critical"}:
        raise BadThreshold(f"{where}: give warning and/or critical, not {pair!r}")
    figures: dict[str, float | None] = {"warning": base.warning, "critical": base.critical}
    for key, value in pair.items():
        if value is None:
            figures[key] = None
            continue
        try:
            if isinstance(value, bool):
                raise ValueError
            figures[key] = float(value)
        except (TypeError, ValueError):
            raise BadThreshold(f"{where}.{key}: {value!r} is not a number") from None
    warning, critical = figures["warning"], figures["critical"]
    if warning is not None and critical is not None and (warning < critical if base.low_is_bad else warning > critical):
        order = "below" if base.low_is_bad else "above"
        raise BadThreshold(
            f"{where}: warning {warning:g} lies {order} critical {critical:g}, so it could never be seen"
        )
    return base.replaced(warning, critical)


class _Judge:
    def __init__(self, facts: Facts, thresholds: Thresholds) -> None:
        self.facts = facts
        self.thresholds = thresholds
        self.checks: list[Check] = []

    def add(
        self,
        name: str,
        severity: str,
        subject: str,
        value: float | str | None,
        message: str,
        limit: Limit | None = None,
    ) -> None:
        limit = limit or DEFAULTS.get(name) or Limit(None, None)
        cure = CURES.get(name, "") if severity in (WARNING, CRITICAL) else ""
        self.checks.append(
            Check(name, severity, subject, value, limit.warning, limit.critical, limit.unit, message, cure)
        )

    def unknown(self, name: str, reason: str) -> None:
        limit = self.thresholds.of(name) if name in DEFAULTS else None
        self.add(name, UNKNOWN, "", None, reason, limit)

    def figure(self, name: str, value: float, what: str, subject: str = "") -> None:
        limit = self.thresholds.of(name)
        self.add(name, limit.judge(value), subject, value, what, limit)

    def figures(self, name: str, entries: Iterable[tuple[str, float, Limit, str]], fine: str) -> None:
        """One entry for each subject that is not well, or one for all of them (its value: the worst)."""
        rows = list(entries)
        bad = [(limit.judge(value), subject, value, limit, text) for subject, value, limit, text in rows]
        bad = [row for row in bad if row[0] != OK]
        for severity, subject, value, limit, text in sorted(bad, key=lambda row: (-_RANK[row[0]], row[1])):
            self.add(name, severity, subject, value, text, limit)
        if not bad:
            limit = self.thresholds.of(name)
            pick = min if limit.low_is_bad else max
            worst = pick((row[1] for row in rows), default=None)
            self.add(name, OK, "", worst, fine, limit)


def judge(facts: Facts, thresholds: Thresholds, scope: str = "fleet") -> Verdict:
    """Of the whole fleet, or of the broker and its queues alone."""
    judging = _Judge(facts, thresholds)
    for part in _PARTS if scope == "fleet" else (_broker, _queues, _dead, _unacked):
        part(judging)
    worst = max((_RANK[check.severity] for check in judging.checks), default=_RANK[OK])
    name = {_RANK[CRITICAL]: "critical", _RANK[WARNING]: "warning"}.get(worst, "healthy")
    return Verdict(name, judging.checks)


def _names(names: Iterable[str], most: int = 8) -> str:
    listed = sorted(names)
    more = f" and {len(listed) - most} more" if len(listed) > most else ""
    return ", ".join(listed[:most]) + more


def _hosts(j: _Judge) -> None:
    gone = [name for name, host in j.facts.hosts.items() if not host.get("reachable", True)]
    text = f"cannot be reached over ssh: {_names(gone)}" if gone else f"all {len(j.facts.hosts)} hosts were reached"
    j.figure("hosts_unreachable", len(gone), text, _names(gone))


def _broker(j: _Judge) -> None:
    broker = j.facts.broker
    if broker is None:
        j.add("broker_reachable", CRITICAL, "", None, f"the broker does not answer: {j.facts.broker_error}")
        for name in ("broker_role", "broker_memory", "broker_eviction_policy", "broker_evicted"):
            j.unknown(name, "the broker does not answer")
        for name in ("broker_persistence", "broker_clients", "broker_rejected", "broker_certificate"):
            j.unknown(name, "the broker does not answer")
        return
    if broker.get("kind") != "redis":
        _rabbitmq(j, broker)
        return
    if broker.get("loading"):
        j.add("broker_reachable", CRITICAL, "", None, "Redis is still loading its data and refuses commands")
    else:
        j.add("broker_reachable", OK, "", None, "Redis answers")
    role = str(broker.get("role", "master"))
    j.add(
        "broker_role",
        OK if role == "master" else CRITICAL,
        "",
        role,
        "Redis is the master" if role == "master" else f"Redis is a {role}: nothing can be written to it",
    )
    _broker_memory(j, broker)
    _certificate(j, broker)
    policy = str(broker.get("maxmemory_policy") or "unknown")
    if policy == "unknown":
        j.unknown("broker_eviction_policy", "Redis does not tell its maxmemory-policy")
    else:
        well = policy == "noeviction"
        text = f"maxmemory-policy is {policy}" + ("" if well else ": Redis may drop waiting tasks; set noeviction")
        j.add("broker_eviction_policy", OK if well else CRITICAL, "", policy, text)
    evicted = int(broker.get("evicted_keys", 0))
    j.figure("broker_evicted", evicted, f"{evicted} keys were evicted since Redis started")
    _broker_persistence(j, broker)
    clients, most = int(broker.get("connected_clients", 0)), int(broker.get("maxclients", 0))
    if most:
        j.figure("broker_clients", round(100 * clients / most, 1), f"{clients} of {most} client connections in use")
    else:
        j.unknown("broker_clients", "Redis does not tell maxclients")
    rejected = int(broker.get("rejected_connections", 0))
    j.figure("broker_rejected", rejected, f"{rejected} connections were rejected since Redis started (maxclients)")


def _rabbitmq(j: _Judge, broker: Mapping[str, Any]) -> None:
    j.add("broker_reachable", OK, "", None, "RabbitMQ answers")
    alarms = [f"{alarm['resource']} alarm on {alarm['node']}" for alarm in broker.get("alarms") or ()]
    if broker.get("blocked") and not alarms:
        alarms = ["an alarm is on"]
    text = f"{_names(alarms)}: whoever publishes has to wait" if alarms else "no alarm, publishers are served"
    j.figure("broker_alarms", len(alarms), text)
    short = list(broker.get("short") or ())
    text = f"queues that have lost members: {_names(short)}" if short else "every quorum queue has its members"
    j.figure("broker_quorum", len(short), text)
    nodes: Mapping[str, Mapping[str, Any]] | None = broker.get("nodes")
    if nodes is None:
        reason = str(
            broker.get("unseen") or "the user has not the tag monitoring, so RabbitMQ tells nothing of its nodes"
        )
        for name in ("broker_nodes", "broker_memory", "broker_disk", "broker_clients"):
            j.unknown(name, reason)
        return
    bad = [f"{name} does not run" for name, node in nodes.items() if not node["running"]]
    bad += [
        f"{name} is cut off from {_names(node['partitions'])}" for name, node in nodes.items() if node["partitions"]
    ]
    j.figure("broker_nodes", len(bad), "; ".join(bad) or f"all {len(nodes)} nodes run", _names(bad))
    figures = (
        ("broker_memory", "mem_used", "mem_limit", "of the memory it may use"),
        ("broker_disk", "disk_free_limit", "disk_free", "of its free disk space are the least it needs"),
        ("broker_clients", "sockets_used", "sockets_total", "of its connections in use"),
    )
    for check, part, whole, what in figures:
        limit = j.thresholds.of(check)
        shares = {name: round(100 * node[part] / node[whole], 1) for name, node in nodes.items() if node.get(whole)}
        j.figures(
            check,
            ((name, share, limit, f"{name}: {share:g} % {what}") for name, share in shares.items()),
            f"at most {max(shares.values(), default=0):g} % {what}",
        )


def _certificate(j: _Judge, broker: Mapping[str, Any]) -> None:
    told = broker.get("certificate")
    if not told:
        j.add("broker_certificate", OK, "", None, "there is no certificate that could end: no TLS")
        return
    text = f"the certificate of Redis ends on {told['ends']}, in {told['days']:g} days"
    j.figure("broker_certificate", told["days"], text)


def _broker_memory(j: _Judge, broker: Mapping[str, Any]) -> None:
    used = int(broker.get("used_memory", 0))
    most = int(broker.get("maxmemory") or 0)
    of = "maxmemory"
    if not most:
        most, of = int(broker.get("total_system_memory") or 0), "the host's memory (no maxmemory is set)"
    if not most:
        j.unknown("broker_memory", "neither maxmemory nor the host's memory is known")
        return
    share = round(100 * used / most, 1)
    j.figure("broker_memory", share, f"Redis uses {used / MIB:.0f} MiB, {share:g} % of {of}")


def _broker_persistence(j: _Judge, broker: Mapping[str, Any]) -> None:
    aof = bool(int(broker.get("aof_enabled", 0)))
    failed = []
    if aof and broker.get("aof_last_write_status", "ok") != "ok":
        failed.append("the last write of the append-only file failed")
    if aof and broker.get("aof_last_bgrewrite_status", "ok") != "ok":
        failed.append("the last rewrite of the append-only file failed")
    if broker.get("rdb_last_bgsave_status", "ok") != "ok":
        failed.append("the last snapshot failed")
    if failed:
        j.add("broker_persistence", CRITICAL, "", "failed", "; ".join(failed) + ": look at the disk of the Redis host")
    elif aof:
        j.add("broker_persistence", OK, "", "aof", "the append-only file is on and was written")
    elif broker.get("save") is None:
        j.add("broker_persistence", WARNING, "", "unknown", "the append-only file is off, snapshots are unknown")
    elif broker.get("save"):
        j.add("broker_persistence", WARNING, "", "rdb", "snapshots only: a crash loses the tasks since the last one")
    else:
        j.add(
            "broker_persistence", WARNING, "", "none", "nothing is written to disk: a restart of Redis loses all tasks"
        )


def _expected(facts: Facts) -> dict[str, str]:
    """node -> host of every worker instance which a host has enabled."""
    return {
        unit["node"]: name
        for name, host in facts.hosts.items()
        for unit in host.get("units", [])
        if unit.get("kind") == "worker" and unit.get("node") and unit.get("enabled", True)
    }


def _fleet(j: _Judge) -> None:
    fleet = j.facts.fleet
    names = (
        "worker_count", "workers_missing", "workers_silent", "workers_without_queue", "workers_duplicate",
        "workers_unexpected",
    )  # fmt: skip
    if fleet is None:
        for name in (*names, "release_skew"):
            j.unknown(name, "the fleet could not be asked")
        return
    answered: Mapping[str, Any] = fleet.get("answered", {})
    expected = _expected(j.facts)
    j.figure("worker_count", len(answered), f"{len(answered)} workers answer, {len(expected)} are expected")
    missing = {node: host for node, host in expected.items() if node not in answered}
    text = f"all {len(expected)} expected workers answer"
    if missing:
        text = "no answer from " + _names(f"{node} (host {host})" for node, host in missing.items())
    j.figure("workers_missing", len(missing), text, _names(missing))
    silent = int(fleet.get("silent_count") or 0)
    text = "nobody is connected without answering"
    if silent:
        text = f"{silent} connected but silent (hung, or busy in a solo pool)"
        text += f"; of the expected ones {_names(missing)} did not answer" if missing else ""
    j.figure("workers_silent", silent, text, _names(missing) if silent else "")
    # While queues are paused a worker may rightly consume none.
    idle = [] if j.facts.paused else [node for node, reply in answered.items() if not reply.get("queues")]
    text = f"answer and consume no queue: {_names(idle)}" if idle else "every worker consumes a queue"
    j.figure("workers_without_queue", len(idle), text, _names(idle))
    duplicates = list(fleet.get("duplicates") or [])
    text = f"node names used twice: {_names(duplicates)}" if duplicates else "every node name is used once"
    j.figure("workers_duplicate", len(duplicates), text, _names(duplicates))
    every_host_seen = all(host.get("reachable", True) for host in j.facts.hosts.values())
    strangers = [node for node in answered if node not in expected]
    if not every_host_seen:
        j.unknown("workers_unexpected", "not every host could be reached")
    else:
        text = f"answer, but no host of the inventory has them enabled: {_names(strangers)}"
        j.figure("workers_unexpected", len(strangers), text if strangers else "no stranger answers", _names(strangers))
    _releases(j, answered)


def _releases(j: _Judge, answered: Mapping[str, Any]) -> None:
    by_release: dict[str, list[str]] = {}
    for node, reply in answered.items():
        release = reply.get("release")
        if release:
            by_release.setdefault(str(release), []).append(node)
    if not by_release:
        j.unknown("release_skew", "no worker tells its release (runtime package not loaded)")
        return
    extra = len(by_release) - 1
    text = f"every worker runs {next(iter(by_release))}"
    if extra:
        text = "different releases run: " + "; ".join(
            f"{name} on {_names(nodes)}" for name, nodes in sorted(by_release.items())
        )
    j.figure("release_skew", extra, text, _names(by_release))


def _queues(j: _Judge) -> None:
    queues = j.facts.queues
    if queues is None:
        for name in ("queue_depth", "queue_latency", "queue_consumers", "queue_paused"):
            j.unknown(name, j.facts.queues_reason)
        return
    limits = j.thresholds
    _paused(j, queues)
    # What waits in a paused queue waits because somebody wants it to.
    queues = {name: found for name, found in queues.items() if name not in j.facts.paused}
    j.figures(
        "queue_depth",
        (
            (name, q["depth"], limits.of_queue("queue_depth", name), f"queue {name}: {q['depth']} messages wait")
            for name, q in queues.items()
        ),
        f"{len(queues)} queues, {sum(q['depth'] for q in queues.values())} messages wait",
    )
    aged = {name: q["oldest_age"] for name, q in queues.items() if q.get("oldest_age") is not None}
    unstamped = [name for name, q in queues.items() if q["depth"] and q.get("oldest_age") is None]
    if unstamped and (j.facts.broker or {}).get("kind") != "redis":
        j.unknown("queue_latency", "in RabbitMQ nobody can look at a message without taking it out of its queue")
        unstamped = []
    elif aged or not unstamped:
        j.figures(
            "queue_latency",
            (
                (
                    name,
                    round(age, 3),
                    limits.of_queue("queue_latency", name),
                    f"queue {name}: the oldest waits {age:.1f} s",
                )
                for name, age in aged.items()
            ),
            f"the oldest message waits {max(aged.values()):.3f} s" if aged else "nothing waits",
        )
    if unstamped:
        j.unknown("queue_latency", f"messages without a publish time in {_names(unstamped)} (producer loads no stamp)")
    if j.facts.fleet is None:
        j.unknown("queue_consumers", "the fleet could not be asked")
        return
    answered: Mapping[str, Any] = j.facts.fleet.get("answered", {})
    # RabbitMQ counts them itself, and others than workers may consume there.
    consumers = {
        name: q.get("consumers", sum(name in reply.get("queues", ()) for reply in answered.values()))
        for name, q in queues.items()
    }
    j.figures(
        "queue_consumers",
        (
            (
                name,
                count,
                limits.of_queue("queue_consumers", name),
                f"queue {name}: {count} workers consume it, {queues[name]['depth']} messages wait",
            )
            for name, count in consumers.items()
        ),
        "every queue is consumed",
    )


def _paused(j: _Judge, queues: Mapping[str, Mapping[str, Any]]) -> None:
    """One entry for each pause: it is to be seen even while all is as it was meant."""
    limit = j.thresholds.of("queue_paused")
    for name, pause in j.facts.paused.items():
        text = f"{pause['text']}; {queues.get(name, {}).get('depth', 0)} messages wait"
        over = float(pause["over"])
        j.add("queue_paused", limit.judge(over) if over > 0 else OK, name, round(over, 1), text, limit)
    if not j.facts.paused:
        j.add("queue_paused", OK, "", 0, "no queue is paused", limit)


def _dead(j: _Judge) -> None:
    dead = j.facts.dead
    if dead is None:
        j.unknown("dead_letters", j.facts.queues_reason)
        return
    limit = j.thresholds.of("dead_letters")
    total = sum(dead.values())
    j.figures(
        "dead_letters",
        ((name, count, limit, f"{name}: {count} tasks failed for good") for name, count in dead.items()),
        f"{total} tasks failed for good" if total else "no dead letters",
    )


def _unacked(j: _Judge) -> None:
    unacked = j.facts.unacked
    if unacked is None:
        j.unknown("unacked_age", j.facts.queues_reason)
        return
    count, age = int(unacked.get("count", 0)), float(unacked.get("oldest_age") or 0.0)
    limit = max(j.facts.visibility_timeout, 1e-9)
    share = round(100 * age / limit, 1)
    text = f"{count} unacknowledged, the oldest for {age:.0f} s (visibility timeout {limit:.0f} s)"
    if j.thresholds.of("unacked_age").judge(share) != OK:
        text += ": it is or soon will be delivered a second time"
    j.figure("unacked_age", share, text)


def _memory(j: _Judge) -> None:
    sizes = {
        unit["node"]: int(unit["rss"]) / MIB
        for host in j.facts.hosts.values()
        for unit in host.get("units", [])
        if unit.get("kind") == "worker" and unit.get("rss") and unit.get("node")
    }
    if not sizes:
        j.unknown("worker_memory", "no running worker was found on a reachable host")
        return
    limit = j.thresholds.of("worker_memory")
    j.figures(
        "worker_memory",
        ((node, round(size, 1), limit, f"{node} and its children use {size:.0f} MiB") for node, size in sizes.items()),
        f"the largest worker with its children uses {max(sizes.values()):.0f} MiB",
    )


def _beat(j: _Judge) -> None:
    running = [
        f"{name} (pid {beat['pid']}, {beat.get('unit') or 'no unit'})"
        for name, host in j.facts.hosts.items()
        for beat in host.get("beats", [])
        if beat.get("running", True)
    ]
    unseen = [name for name, host in j.facts.hosts.items() if not host.get("reachable", True)]
    wanted = 1 if j.facts.beat_expected else 0
    if wanted and not running and unseen:
        j.unknown("beat_missing", f"beat runs on no reachable host, but {_names(unseen)} could not be looked at")
    else:
        text = (
            f"beat runs on {_names(running)}" if running else ("beat does not run" if wanted else "no beat is wanted")
        )
        j.figure("beat_missing", max(0, wanted - len(running)), text)
    ready = min(j.facts.standby, max(0, len(running) - 1))
    text = f"{ready} of {j.facts.standby} beats stand by" if j.facts.standby else "no beat is to stand by"
    j.figure("beat_standby", j.facts.standby - ready, text)
    extra = max(0, len(running) - wanted - j.facts.standby)
    text = f"beat runs {len(running)} times: {_names(running)}" if extra else "no second beat"
    j.figure("beat_duplicate", extra, text, _names(running) if extra else "")
    _entries(j)
    _heartbeat(j, wanted)


def _entries(j: _Judge) -> None:
    """One entry for each that is disabled: it is to be seen even while all is as it was meant."""
    limit = j.thresholds.of("beat_entries")
    if j.facts.disabled is None:
        j.unknown("beat_entries", j.facts.queues_reason)
        return
    for name, said in j.facts.disabled.items():
        j.add("beat_entries", OK, name, None, said, limit)
    if not j.facts.disabled:
        j.add("beat_entries", OK, "", None, "no entry of the schedule is disabled", limit)


def _heartbeat(j: _Judge, wanted: int) -> None:
    beat = j.facts.heartbeat
    answering = int((j.facts.fleet or {}).get("beats", 0))
    limit = j.thresholds.of("beat_silent")
    if not wanted:
        j.add("beat_silent", OK, "", None, "no beat is wanted", limit)
    elif beat:
        sent = f", sent {beat['task']} {beat['sent_ago']:.0f} s ago" if beat.get("task") else ", has sent nothing yet"
        where = f"{beat['host']} (pid {beat['pid']})"
        j.figure("beat_silent", round(float(beat["age"]), 1), f"beat on {where} ticked {beat['age']:.0f} s ago{sent}")
    elif answering:
        # Celery 5.7 with beat_enable_remote_control: silent by itself once it stops ticking.
        j.add("beat_silent", OK, "", None, "beat answers ping", limit)
    else:
        j.unknown("beat_silent", "beat left no heartbeat (runtime package not loaded, or it has not ticked yet)")


def _units(j: _Judge) -> None:
    seen = [(name, unit) for name, host in j.facts.hosts.items() for unit in host.get("units", [])]
    if not seen:
        for check in ("units_failed", "units_inactive", "unit_restarts"):
            j.unknown(check, "no unit of the application was found on a reachable host")
        return
    failed = [f"{unit['name']} on {name}" for name, unit in seen if unit.get("active") == "failed"]
    text = f"failed: {_names(failed)}" if failed else "no unit has failed"
    j.figure("units_failed", len(failed), text, _names(failed))
    down = [
        f"{unit['name']} on {name}"
        for name, unit in seen
        if unit.get("enabled", True) and unit.get("active") not in ("active", "reloading", "failed")
    ]
    text = f"enabled but not running: {_names(down)}" if down else "every enabled unit runs"
    j.figure("units_inactive", len(down), text, _names(down))
    limit = j.thresholds.of("unit_restarts")
    j.figures(
        "unit_restarts",
        (
            (
                f"{unit['name']} on {name}",
                int(unit.get("restarts") or 0),
                limit,
                f"{unit['name']} on {name} was restarted {unit.get('restarts')} times by systemd",
            )
            for name, unit in seen
        ),
        "systemd did not have to restart a unit again and again",
    )


def _tasks(j: _Judge) -> None:
    events = j.facts.events
    if events is None:
        for name in ("task_success", "task_retry"):
            j.unknown(name, j.facts.events_reason)
    else:
        succeeded, failed, retried = (int(events.get(key, 0)) for key in ("succeeded", "failed", "retried"))
        window = f"in {events.get('seconds', 0):g} s"
        ended, started = succeeded + failed, int(events.get("started", 0))
        if ended < j.facts.events_minimum:
            j.unknown("task_success", f"only {ended} tasks ended {window}, {j.facts.events_minimum} are needed")
        else:
            text = f"{succeeded} of {ended} tasks succeeded {window}"
            j.figure("task_success", round(100 * succeeded / ended, 2), text)
        if started < j.facts.events_minimum:
            j.unknown("task_retry", f"only {started} tasks started {window}, {j.facts.events_minimum} are needed")
        else:
            j.figure("task_retry", round(100 * retried / started, 2), f"{retried} retries, {started} starts {window}")
    if j.facts.fleet is None:
        j.unknown("task_duration", "the fleet could not be asked")
        return
    longest: dict[str, float] = dict(j.facts.fleet.get("running", {}))
    for task, seconds in (events or {}).get("runtimes", {}).items():
        longest[task] = max(float(seconds), longest.get(task, 0.0))
    slowest = max(longest, key=lambda task: longest[task], default=None)
    j.figures(
        "task_duration",
        (
            (task, round(seconds, 2), j.thresholds.of_task(task), f"task {task} runs for {seconds:.1f} s")
            for task, seconds in longest.items()
        ),
        f"the longest running task is {slowest} ({longest[slowest]:.1f} s)" if slowest else "no task is running",
    )


_PARTS = (_hosts, _broker, _fleet, _queues, _dead, _unacked, _memory, _beat, _units, _tasks)
