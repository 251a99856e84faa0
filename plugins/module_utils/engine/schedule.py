# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What every beat of an application obeys and leaves: who of them may send, what was sent last, which entries rest.

A beat claims each run of an entry in the broker before it sends it. The claim succeeds only for the beat that leads, so
two beats never send the same run, and what one has claimed the next one knows of.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from .connection import RedisStore
from .pauses import now_of
from .records import time_text

# Seconds after which a beat that was not heard of may be followed by another.
LEASE = 30.0

SEND, REST, FOLLOW = "send", "rest", "follow"

# Free, ours, or that of a process known to be dead: it is ours from now on. Returns whose it is.
_LEAD = """
local held = redis.call('GET', KEYS[1])
if not held or held == ARGV[1] or held == ARGV[3] then
  redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
  return ARGV[1]
end
return held
"""

# A lead that is gone is not taken back here: who leads now, or led meanwhile, has sent what we do not know of.
_RENEW = """
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
redis.call('PEXPIRE', KEYS[1], ARGV[2])
return 1
"""

_CLAIM = """
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 'follow' end
redis.call('PEXPIRE', KEYS[1], ARGV[2])
if redis.call('HEXISTS', KEYS[3], ARGV[3]) == 1 then
  redis.call('HSET', KEYS[2], ARGV[3], ARGV[5])
  return 'rest'
end
redis.call('HSET', KEYS[2], ARGV[3], ARGV[4])
return 'send'
"""

# Only while we lead: what the next one has claimed must not be overwritten by one that slept over its lease.
_GO_ON = """
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
local last = 2 + 2 * tonumber(ARGV[2])
for at = 3, last, 2 do redis.call('HSET', KEYS[2], ARGV[at], ARGV[at + 1]) end
for at = last + 1, #ARGV do redis.call('HDEL', KEYS[2], ARGV[at]) end
return 1
"""

_LEAVE = """
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
return redis.call('DEL', KEYS[1])
"""


@dataclass(frozen=True)
class Leader:
    """The beat that leads. `machine` and `began` tell its process from a later one of the same number."""

    host: str
    pid: int
    machine: str = ""
    began: int = 0
    since: float = 0.0
    token: str = ""
    release: str = ""

    def __str__(self) -> str:
        return f"{self.host} (pid {self.pid})"


@dataclass(frozen=True)
class Run:
    """When an entry was sent last, or its clock was set; times are unix seconds of the host that sent it."""

    last: float
    count: int


@dataclass(frozen=True)
class Rest:
    """An entry that is not sent until it is enabled again."""

    entry: str
    by: str
    why: str
    since: float

    def __str__(self) -> str:
        if not self.since:
            return f"entry {self.entry} is disabled, {self.why}"
        return f"entry {self.entry} is disabled by {self.by} since {time_text(self.since)}: {self.why}"


def lead_key(key_prefix: str, application: str) -> str:
    return f"{key_prefix}celeryops:lock:beat:{application}"


def runs_key(key_prefix: str, application: str) -> str:
    return f"{key_prefix}celeryops:beat-runs:{application}"


def rests_key(key_prefix: str, application: str) -> str:
    return f"{key_prefix}celeryops:beat-rests:{application}"


class Lead:
    """One process's claim to be the beat of an application."""

    def __init__(self, store: RedisStore, application: str, lease: float = LEASE) -> None:
        self.store = store
        self.application = application
        self.milliseconds = int(lease * 1000)
        self.key = lead_key(store.key_prefix, application)

    def take(self, me: Leader, dead: bytes = b"") -> bytes:
        """Whose lead it is now: ours if it was free, ours or the one of `dead`."""
        ours = json.dumps(asdict(me))
        return bytes(self.store.redis.eval(_LEAD, 1, self.key, ours, self.milliseconds, dead))

    def renew(self, value: bytes) -> bool:
        return bool(self.store.redis.eval(_RENEW, 1, self.key, value, self.milliseconds))

    def claim(self, value: bytes, entry: str, now: float, count: int) -> str:
        """SEND: this run is ours, and noted; REST: the entry is disabled; FOLLOW: another beat leads."""
        runs, rests = (name(self.store.key_prefix, self.application) for name in (runs_key, rests_key))
        sent, skipped = (json.dumps(asdict(Run(now, number))) for number in (count + 1, count))
        found = self.store.redis.eval(_CLAIM, 3, self.key, runs, rests, value, self.milliseconds, entry, sent, skipped)
        return str(found.decode())

    def go_on(self, value: bytes, wanted: Mapping[str, Run], gone: Iterable[str]) -> bool:
        """Leave the times of the last runs from which this beat goes on; False if it does not lead any more."""
        key = runs_key(self.store.key_prefix, self.application)
        pairs = [text for name, run in wanted.items() for text in (name, json.dumps(asdict(run)))]
        return bool(self.store.redis.eval(_GO_ON, 2, self.key, key, value, len(wanted), *pairs, *gone))

    def leave(self, value: bytes) -> None:
        self.store.redis.eval(_LEAVE, 1, self.key, value)


def parse_leader(raw: bytes) -> Leader | None:
    try:
        value = json.loads(raw)
        known = {name: value[name] for name in Leader.__dataclass_fields__ if name in value}
        return Leader(**known)
    except (ValueError, TypeError, KeyError):
        return None


def leader(store: RedisStore, application: str) -> Leader | None:
    """Who leads; None where no beat does, or none that knows of this."""
    raw = store.redis.get(lead_key(store.key_prefix, application))
    return parse_leader(raw) if raw else None


def runs(store: RedisStore, application: str) -> dict[str, Run]:
    found: dict[str, Run] = {}
    for name, raw in store.redis.hgetall(runs_key(store.key_prefix, application)).items():
        try:
            value = json.loads(raw)
            found[name.decode(errors="replace")] = Run(float(value["last"]), int(value["count"]))
        except (ValueError, TypeError, KeyError):
            continue  # as good as none: the entry's own clock counts
    return found


def keep_runs(store: RedisStore, application: str, wanted: Mapping[str, Run]) -> None:
    values = {name: json.dumps(asdict(run)) for name, run in wanted.items()}
    store.redis.hset(runs_key(store.key_prefix, application), mapping=values)


def later(recorded: Run | None, own: Run) -> Run:
    """What counts: the record, which is written before a task is sent, unless the beat's own file has seen more."""
    return own if recorded is None or own.count > recorded.count else recorded


def rests(store: RedisStore, application: str) -> dict[str, Rest]:
    found = store.redis.hgetall(rests_key(store.key_prefix, application))
    return {name: parse_rest(name, raw) for name, raw in sorted((k.decode(errors="replace"), found[k]) for k in found)}


def parse_rest(entry: str, raw: bytes) -> Rest:
    """One that cannot be read rests too: beat looks only whether it is there."""
    try:
        value: Any = json.loads(raw)
        return Rest(entry, str(value["by"]), str(value["why"]), float(value["since"]))
    except (ValueError, TypeError, KeyError):
        return Rest(entry, "", "by a record that is none of this collection: disable it again, or enable it", 0.0)


def rest(store: RedisStore, application: str, entry: str, by: str, why: str) -> Rest:
    found = Rest(entry, by, why, round(now_of(store), 3))
    store.redis.hset(rests_key(store.key_prefix, application), entry, json.dumps(asdict(found)))
    return found


def wake(store: RedisStore, application: str, entry: str) -> None:
    store.redis.hdel(rests_key(store.key_prefix, application), entry)
