"""What a deploy has to do on one host. Nothing in here talks to anybody."""

# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from . import pauses
from .fleet import ANSWERED, consumed_queues

SURGES = ("auto", "always", "never")
SURGE_SUFFIX = "-surge"
FROZEN = ("T", "t")
# What a plan asks the fleet.
QUESTIONS: tuple[tuple[str, Mapping[str, Any]], ...] = (
    ("active_queues", {}),
    ("celeryops_pauses", {}),
    ("celeryops_release", {}),
)


@dataclass(frozen=True)
class Wanted:
    """An instance the host is to run."""

    instance: str
    pool: str
    node: str
    queues: tuple[str, ...]


@dataclass(frozen=True)
class Found:
    """An instance as the host shows it: state of its unit, release and state of its process."""

    state: str
    release: str = ""
    process: str = ""

    @classmethod
    def read(cls, here: Mapping[str, Any]) -> Found:
        return cls(str(here["state"]), str(here.get("release") or ""), str(here.get("process") or ""))


@dataclass(frozen=True)
class Heard:
    """What a node told the fleet. Its queues are those it consumes, now or once they are resumed."""

    answered: bool
    release: str = ""
    queues: tuple[str, ...] = ()

    @classmethod
    def read(cls, node: Mapping[str, Any]) -> Heard:
        """From an entry of `nodes` as celery_inspect returns it."""
        replies = node.get("replies") or {}
        told = replies.get("celeryops_release")
        return cls(
            answered=node.get("state") == ANSWERED,
            release=str(told.get("release") or "") if isinstance(told, dict) else "",
            queues=(*consumed_queues(replies), *pauses.withheld(replies)),
        )


@dataclass(frozen=True)
class Roll:
    """`todo`, the instances to replace; `silent`, who should have answered; `surge`, the pools that need an extra
    instance meanwhile; `left`, the pools of which an interrupted deploy left one that is of no use now."""

    release: str
    current: str
    todo: tuple[str, ...] = ()
    silent: tuple[str, ...] = ()
    surge: tuple[str, ...] = ()
    left: tuple[str, ...] = ()

    @property
    def acts(self) -> bool:
        return bool(self.todo or self.left) or self.current != self.release

    def __str__(self) -> str:
        if not self.acts:
            return f"nothing to do, all instances run {self.release}"
        extra = ", ".join(pool + SURGE_SUFFIX for pool in self.surge)
        return (
            f"would {f'start {extra} on {self.release}, ' if extra else ''}quiet, drain and stop "
            f"{', '.join(self.todo) or 'nothing'}, switch current from {self.current} to {self.release}, start and "
            f"prove them"
        )

    def as_dict(self) -> dict[str, Any]:
        lists = {key: list(getattr(self, key)) for key in ("todo", "silent", "surge", "left")}
        return {"from": self.current, "acts": self.acts, **lists}


def host_of(node: str) -> str:
    return node.rpartition("@")[2]


def covered(fleet: Mapping[str, Heard], batch: Iterable[str]) -> set[str]:
    """Queues that somebody outside the batch consumes. `batch`: nodes of the hosts that are replaced together."""
    hosts = {host_of(node) for node in batch}
    return {queue for node, heard in fleet.items() if host_of(node) not in hosts for queue in heard.queues}


def plan(
    wanted: Sequence[Wanted],
    found: Mapping[str, Found],
    fleet: Mapping[str, Heard],
    *,
    release: str,
    current: str,
    batch: Iterable[str],
    surge: str = "auto",
) -> Roll:
    """How this host gets to `release`. What an interrupted deploy has finished is not done again."""
    others = covered(fleet, batch)
    todo: list[str] = []
    silent: list[str] = []
    extra: list[str] = []
    for one in wanted:
        here = found[one.instance]
        heard = fleet.get(one.node, Heard(answered=False))
        if here.state == "active" and not heard.answered:
            silent.append(one.node + (" (its process is stopped)" if here.process in FROZEN else ""))
        on_release = (heard.release or here.release) == release
        if here.state == "active" and on_release and set(one.queues) <= set(heard.queues):
            continue
        todo.append(one.instance)
        needed = surge == "always" or (surge == "auto" and not set(one.queues) <= others)
        if needed and one.pool not in extra:
            extra.append(one.pool)
    left = [
        name.removesuffix(SURGE_SUFFIX)
        for name, here in found.items()
        if name.endswith(SURGE_SUFFIX)
        and here.state != "inactive"
        and (here.release != release or name.removesuffix(SURGE_SUFFIX) not in extra)
    ]
    return Roll(release, current, tuple(todo), tuple(silent), tuple(extra), tuple(left))
