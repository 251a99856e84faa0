# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""May a release with other libraries run beside the one that runs, and take over its messages?

`CHANGES` is what the libraries' documents say, `judge` applies it and what can be seen for certain. Only `census` asks
anybody.
"""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .errors import BadMessage
from .message import Envelope
from .queues import RedisQueues

REFUSE, WARN = "refuse", "warn"
PACKAGES = ("celery", "kombu", "billiard", "redis")
# The newest whose documents are in CHANGES.
KNOWN = (5, 7)
CONFIGURATION = "Celery, User Guide, Configuration and defaults"
WHATS_NEW = "Celery, What's new in Celery"
JSON = "application/json"
ANNOUNCED = "Celery 5.7, warning at the start of a worker"

# Run by the interpreter of a release: which libraries are there, and which settings its Celery knows.
PROBE = f"""
import importlib.metadata, json, platform
from celery.app import defaults
wanted = {PACKAGES!r}
found = dict()
requires = []
for name in wanted:
    try:
        found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        continue
    requires += [[name, one] for one in importlib.metadata.requires(name) or ()]
known = sorted(defaults.SETTING_KEYS | defaults._OLD_SETTING_KEYS)
print(json.dumps(dict(python=platform.python_version(), packages=found, requires=requires, known=known)))
"""

_REQUIREMENT = re.compile(r"^([A-Za-z0-9._-]+)(?:\[[^]]*\])?\s*\(?([^;)]*)\)?\s*(?:;(.*))?$")
_CLAUSE = re.compile(r"(>=|<=|==|!=|~=|<|>)\s*([0-9][0-9.]*)")


def version(text: str) -> tuple[int, ...]:
    """The numbers a version begins with; what follows them (rc1, .post2) does not matter here."""
    found = re.match(r"\d+(\.\d+)*", text)
    return tuple(int(part) for part in found[0].split(".")) if found else ()


def _pair(one: str, other: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    left, right = version(one), version(other)
    width = max(len(left), len(right))
    return left + (0,) * (width - len(left)), right + (0,) * (width - len(right))


def older(one: str, other: str) -> bool:
    left, right = _pair(one, other)
    return left < right


def within(found: str, wanted: str) -> bool:
    """Whether a version is in a range such as '>=6.4,<9'."""
    for sign, bound in _CLAUSE.findall(wanted):
        left, right = _pair(found, bound)
        stem = version(bound)[:-1]
        if not {
            ">=": left >= right,
            "<=": left <= right,
            ">": left > right,
            "<": left < right,
            "==": left == right,
            "!=": left != right,
            "~=": left >= right and left[: len(stem)] == stem,
        }[sign]:
            return False
    return True


@dataclass(frozen=True)
class Release:
    """The libraries of one release, and the settings of its application; None where it was built without telling."""

    python: str
    packages: Mapping[str, str]
    requires: Sequence[Sequence[str]] = ()
    known: frozenset[str] = frozenset()
    names: frozenset[str] = frozenset()
    values: Mapping[str, Any] | None = None

    @classmethod
    def read(cls, probed: Mapping[str, Any], described: Mapping[str, Any]) -> Release:
        """From what PROBE prints and from release.json."""
        settings = described.get("settings") or {}
        return cls(
            python=str(probed["python"]),
            packages=dict(probed["packages"]),
            requires=list(probed["requires"]),
            known=frozenset(probed["known"]),
            names=frozenset(settings.get("names") or ()),
            values=settings.get("values"),
        )

    def has(self, package: str) -> str:
        return self.packages.get(package, "0")

    def value(self, name: str, default: Any = None) -> Any:
        found = (self.values or {}).get(name)
        return default if found is None else found

    def accepts(self, setting: str = "accept_content") -> set[str]:
        return set(self.value(setting) or self.value("accept_content", [JSON]))

    def writes(self, setting: str) -> str:
        return str(self.value(setting, JSON))


@dataclass
class Waiting:
    """What lies in the broker: messages by content type and by protocol, waiting or held by workers."""

    content: Counter[str] = field(default_factory=Counter)
    protocols: Counter[int] = field(default_factory=Counter)
    unreadable: int = 0
    held: int = 0
    complete: bool = True

    def add(self, document: Any) -> None:
        try:
            found = Envelope.of(document)
        except BadMessage:
            self.unreadable += 1
            return
        self.content[found.content_type] += 1
        self.protocols[found.protocol] += 1


@dataclass(frozen=True)
class Finding:
    """What would break here. `versions` is empty where no version of a library is the cause."""

    id: str
    severity: str
    what: str
    cure: str
    source: str
    versions: str = ""


@dataclass(frozen=True)
class Case:
    running: Release
    new: Release
    transport: str = "redis"
    waiting: Waiting = field(default_factory=Waiting)


@dataclass(frozen=True)
class Change:
    """A change in a library that breaks what worked, from `since` on. `applies`: whether it does here."""

    id: str
    package: str
    since: str
    severity: str
    what: str
    cure: str
    source: str
    applies: Callable[[Case], bool]


def _set(*names: str) -> Callable[[Case], bool]:
    return lambda case: not case.new.names.isdisjoint(names)


def _exclusive(kind: str) -> Callable[[Case], bool]:
    durable, exclusive = (f"{kind}_queue_{what}" for what in ("durable", "exclusive"))
    return lambda case: bool(case.new.value(durable) and case.new.value(exclusive, True))


CHANGES = (
    Change(
        "sentinel-fanout-topic", "kombu", "5.4", REFUSE,
        "remote control through Sentinel goes over another topic, so that each half of the fleet hears only its own",
        "set sentinel_fanout_compat in broker_transport_options of the release (kombu 5.7 or newer) until all run it",
        "kombu, Changelog 5.4.0 (#1986); kombu.transport.redis, transport options",
        lambda case: "sentinel" in case.transport
        and not (case.new.value("sentinel_fanout_compat") and not older(case.new.has("kombu"), "5.7")),
    ),
    Change(
        "polling-interval", "kombu", "5.6", WARN,
        "the transport options polling_interval and brpop_timeout have an effect on Redis for the first time",
        "make sure that they are meant, or drop them from broker_transport_options",
        "kombu, Changelog 5.6.0 (#2346)",
        lambda case: not {"polling_interval", "brpop_timeout"}.isdisjoint(case.new.value("transport_options", ())),
    ),
    Change(
        "control-queue-exclusive", "celery", "5.7", REFUSE,
        "control_queue_exclusive is on by default, and together with control_queue_durable it is an error",
        "drop control_queue_durable, or set control_queue_exclusive = False",
        f"{CONFIGURATION}, control_queue_exclusive", _exclusive("control"),
    ),
    Change(
        "event-queue-exclusive", "celery", "5.7", REFUSE,
        "event_queue_exclusive is on by default, and together with event_queue_durable it is an error",
        "drop event_queue_durable, or set event_queue_exclusive = False",
        f"{CONFIGURATION}, event_queue_exclusive", _exclusive("event"),
    ),
    Change(
        "acks-on-failure-or-timeout", "celery", "5.7", WARN,
        "task_acks_on_failure_or_timeout is deprecated and ends with Celery 7.0",
        "say it with task_acks_on_failure and task_acks_on_timeout",
        f"{CONFIGURATION}, task_acks_on_failure_or_timeout",
        _set("task_acks_on_failure_or_timeout", "CELERY_ACKS_ON_FAILURE_OR_TIMEOUT"),
    ),
    Change(
        "connection-retry-on-startup", "celery", "6.0", WARN,
        "broker_connection_retry no longer says whether a worker that starts waits for its broker",
        "set broker_connection_retry_on_startup too",
        ANNOUNCED,
        lambda case: case.new.value("broker_connection_retry") is False
        and "broker_connection_retry_on_startup" not in case.new.names,
    ),
    Change(
        "cancel-on-connection-loss", "celery", "6.0", WARN,
        "tasks that are acknowledged late are cancelled when the connection is lost, unless it is switched off",
        "set worker_cancel_long_running_tasks_on_connection_loss to what is meant",
        ANNOUNCED,
        lambda case: "worker_cancel_long_running_tasks_on_connection_loss" not in case.new.names,
    ),
    Change(
        "old-setting-names", "celery", "6.0", REFUSE,
        "the upper-case names of settings from before Celery 4 are gone",
        "rename them with `celery upgrade settings`",
        f"{WHATS_NEW} 5.6, Step 2: Update your configuration",
        lambda case: any(name.isupper() and name in case.running.known for name in case.new.names),
    ),
)  # fmt: skip
# The oldest Python of each Celery.
PYTHONS = (("5.7", "3.10"), ("5.6", "3.9"), ("5.3", "3.8"))


def census(queues: RedisQueues, names: Iterable[str], most: int) -> Waiting:
    """Read the outside of what waits in these queues and of what workers hold, `most` messages of each."""
    waiting = Waiting()
    for name in names:
        read = 0
        for raw in itertools.islice(queues.messages(name), most):
            read += 1
            waiting.add(_document(raw))
        waiting.complete = waiting.complete and read < most
    queues.check_unacked()
    for _tag, raw in itertools.islice(queues.client.hscan_iter(queues.unacked_key, count=200), most):
        held = _document(raw)
        waiting.held += 1
        waiting.add(held[0] if isinstance(held, list) and held else None)
    waiting.complete = waiting.complete and waiting.held < most
    return waiting


def _document(raw: bytes) -> Any:
    try:
        return json.loads(raw)
    except ValueError:
        return None


def judge(case: Case) -> list[Finding]:
    """Everything that speaks against the upgrade, or ought to be known before it; what refuses it first."""
    found = [*_versions(case), *_changes(case), *_settings(case), *_messages(case)]
    return sorted(found, key=lambda one: one.severity != REFUSE)


def _changes(case: Case) -> Iterable[Finding]:
    for change in CHANGES:
        before, after = case.running.has(change.package), case.new.has(change.package)
        if older(before, change.since) and not older(after, change.since) and change.applies(case):
            versions = f"{change.package} {before} -> {after}, since {change.since}"
            yield Finding(change.id, change.severity, change.what, change.cure, change.source, versions)


def _versions(case: Case) -> Iterable[Finding]:
    before, after = case.running.has("celery"), case.new.has("celery")
    versions = f"celery {before} -> {after}"
    lower = [name for name in ("celery", "kombu") if older(case.new.has(name), case.running.has(name))]
    if lower:
        told = ", ".join(f"{name} {case.running.has(name)} -> {case.new.has(name)}" for name in lower)
        yield Finding(
            "downgrade",
            REFUSE,
            f"the new release has older libraries ({told})",
            "go back with celeryops.runbook.rollback, or raise them in the requirements of the release",
            WHATS_NEW,
            told,
        )
    old, new = version(before)[:2], version(after)[:2]
    if new > KNOWN:
        yield Finding(
            "unknown-version",
            WARN,
            f"Celery {after} is newer than {KNOWN[0]}.{KNOWN[1]}, the last whose changes are known here",
            "read its What's new, and let the staging hosts soak for longer",
            WHATS_NEW,
            versions,
        )
    if new[:1] == old[:1] and new[1:] > (*(part + 1 for part in old[1:]),):
        between = ", ".join(f"{old[0]}.{minor}" for minor in range(old[1] + 1, new[1] + 1))
        yield Finding(
            "several-minors",
            WARN,
            f"the upgrade takes several steps at once ({between})",
            "read What's new of each, or deploy them one by one",
            WHATS_NEW,
            versions,
        )
    for celery, python in PYTHONS:
        if not older(after, celery):
            if older(case.new.python, python):
                yield Finding(
                    "python",
                    REFUSE,
                    f"Celery {celery} needs Python {python}, the release has {case.new.python}",
                    "build it with a newer celeryops_python",
                    f"{WHATS_NEW} {celery}, Supported Python Versions",
                    versions,
                )
            break
    for owner, requirement in case.new.requires:
        parts = _REQUIREMENT.match(requirement)
        if parts is None:
            continue
        name, wanted, marker = parts[1].lower(), parts[2], parts[3] or ""
        # Optional parts count where their library is there, as redis for kombu.
        if name not in case.new.packages or (marker and f'"{name}"' not in marker.replace("'", '"')):
            continue
        if not within(case.new.has(name), wanted):
            yield Finding(
                "requirements",
                REFUSE,
                f"{owner} {case.new.has(owner)} needs {name} {wanted.strip()}, the release has {case.new.has(name)}",
                f"correct {name} in the requirements of the release",
                f"metadata of {owner}",
                f"{name} {case.running.has(name)} -> {case.new.has(name)}",
            )


def _settings(case: Case) -> Iterable[Finding]:
    gone = sorted(name for name in case.new.names if name in case.running.known and name not in case.new.known)
    for name in gone:
        yield Finding(
            "setting-removed",
            REFUSE,
            f"the setting {name} is known to Celery {case.running.has('celery')} and not to {case.new.has('celery')}, "
            "which leaves it out without a word",
            "remove it, or use what took its place",
            "the settings of both Celery packages",
            f"celery {case.running.has('celery')} -> {case.new.has('celery')}",
        )
    upper = sorted(name for name in case.new.names if name.isupper() and name in case.new.known)
    if upper:
        yield Finding(
            "setting-names",
            WARN,
            f"settings with names which end with Celery 6: {', '.join(upper)}",
            "rename them with `celery upgrade settings`",
            f"{CONFIGURATION}, New lowercase settings",
        )


def _messages(case: Case) -> Iterable[Finding]:
    running, new, waiting = case.running, case.new, case.waiting
    lost = {kind: number for kind, number in waiting.content.items() if kind and kind not in new.accepts()}
    if lost:
        told = ", ".join(f"{number} of {kind}" for kind, number in sorted(lost.items()))
        yield Finding(
            "content-waiting",
            REFUSE,
            f"messages wait which the release does not accept and would throw away ({told})",
            "add their serializer to accept_content of the release, or wait until they are done",
            f"{CONFIGURATION}, accept_content",
        )
    if waiting.unreadable:
        yield Finding(
            "unreadable",
            WARN,
            f"{waiting.unreadable} message(s) are of no protocol that is known here",
            "look at them with redis_queue_info before a worker throws them away",
            "Celery, Internals, Message Protocol",
        )
    if running.values is None:
        yield Finding(
            "running-unknown",
            WARN,
            "the running release does not tell its settings: it was built by an older collection",
            "compare serializers, accept_content and visibility_timeout of both by hand",
            CONFIGURATION,
        )
        return
    pairs = (
        ("task_serializer", "accept_content", new, running, "sends tasks", "the running workers"),
        ("task_serializer", "accept_content", running, new, "sent tasks", "the new workers"),
        ("result_serializer", "result_accept_content", new, running, "writes results", "those of the running one"),
        ("result_serializer", "result_accept_content", running, new, "wrote results", "those of the new one"),
    )
    for setting, accepting, writer, reader, verb, who in pairs:
        kind = writer.writes(setting)
        if kind not in reader.accepts(accepting):
            yield Finding(
                "content-mixed",
                REFUSE,
                f"the {'new' if writer is new else 'running'} release {verb} as {kind}, which {who} refuse",
                "first deploy a release that accepts both, then one that writes the other",
                f"{CONFIGURATION}, {accepting}",
            )
    mine, theirs = running.value("visibility_timeout"), new.value("visibility_timeout")
    if mine != theirs:
        yield Finding(
            "visibility-timeout",
            WARN,
            f"visibility_timeout changes from {mine or 'the default'} to {theirs or 'the default'}; while both run the "
            "shorter one counts, and what takes longer is run twice",
            "change it in a release of its own, when no longer task runs",
            "Celery, Using Redis, Visibility timeout",
        )
