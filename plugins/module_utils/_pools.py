# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Private to the collection: the pools of a host as the inventory has them, and as `scale` left them. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Pool = dict[str, Any]
SIZES = ("instances", "concurrency", "autoscale")
COUNTS = {
    "prefetch": 10_000,
    "max_tasks_per_child": 100_000_000,
    "max_memory_per_child": 1 << 40,
    "soft_time_limit": 10_000_000,
    "time_limit": 10_000_000,
}
LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")
LIMITS = ("rate_limits", "time_limits")
SETTINGS = (*COUNTS, "loglevel", *LIMITS)
# What `scale` and `tune` may change of a pool of the inventory.
FIELDS = (*SIZES, *SETTINGS)
PREFORK_ONLY = ("max_tasks_per_child", "max_memory_per_child", "soft_time_limit", "time_limit", "time_limits")
PROFILES = ("cpu_bound", "io_bound", "memory_bound")
GROWS = ("prefork", "processes", "gevent", "eventlet")
NAME = re.compile(r"[a-z][a-z0-9_]*(-[a-z0-9_]+)*")
MOST_INSTANCES = 64


class BadRequest(ValueError):
    """A request that names no pool or asks for what cannot be."""


@dataclass
class Merged:
    """The pools that count, what makes them differ from the inventory, and what can no longer be applied."""

    pools: list[Pool] = field(default_factory=list)
    differences: list[str] = field(default_factory=list)
    obsolete: list[str] = field(default_factory=list)


def instances_of(pool: Mapping[str, Any]) -> int:
    value = pool.get("instances")
    return 1 if value is None or value == "" else int(value)


def names_of(pool: Mapping[str, Any] | None) -> list[str]:
    return [f"{pool['name']}-{number}" for number in range(1, instances_of(pool) + 1)] if pool else []


def _with(pool: Mapping[str, Any], entry: Mapping[str, Any]) -> Pool:
    merged = {**pool, **entry}
    # A worker has a fixed size or an autoscaler, never both: the scaling wins.
    if "concurrency" in entry:
        merged.pop("autoscale", None)
    if "autoscale" in entry:
        merged.pop("concurrency", None)
    return merged


def merge(inventory: Sequence[Mapping[str, Any]], scaled: Mapping[str, Mapping[str, Any]]) -> Merged:
    result = Merged()
    known = {pool["name"] for pool in inventory}
    for pool in inventory:
        entry = scaled.get(pool["name"])
        merged = _with(pool, {key: entry[key] for key in FIELDS if key in entry}) if entry else dict(pool)
        for key in FIELDS if entry else ():
            if _value(merged, key) != _value(pool, key):
                result.differences.append(
                    f"pool {pool['name']}: {key} {_say(_value(merged, key))} (inventory: {_say(_value(pool, key))})"
                )
        if instances_of(merged):
            result.pools.append(merged)
    for name, entry in scaled.items():
        if name in known:
            continue
        if not entry.get("queues"):
            result.obsolete.append(name)
            continue
        result.pools.append({"name": name, **entry})
        result.differences.append(
            f"pool {name}: {instances_of(entry)} instances for {', '.join(entry['queues'])} (not in the inventory)"
        )
    return result


def _value(pool: Mapping[str, Any], key: str) -> Any:
    if key == "instances":
        return instances_of(pool)
    value = pool.get(key)
    if key in LIMITS:
        return _limits(key, value or {})
    if key == "loglevel":
        return str(value or "INFO").upper()
    if value in (None, ""):
        return None
    return {bound: int(value[bound]) for bound in ("min", "max")} if key == "autoscale" else int(value)


def _limits(key: str, limits: Mapping[str, Any]) -> dict[str, Any]:
    if key == "rate_limits":
        return {task: str(rate) for task, rate in limits.items()}
    return {task: {bound: float(pair[bound]) for bound in sorted(pair)} for task, pair in limits.items()}


def _say(value: Any) -> str:
    if value is None or value == {}:
        return "not set"
    if isinstance(value, dict):
        if set(value) == {"min", "max"}:
            return f"{value['min']} to {value['max']}"
        return ", ".join(
            f"{task} {' '.join(f'{key} {seconds:g} s' for key, seconds in limit.items())}"
            if isinstance(limit, dict)
            else f"{task} {limit}"
            for task, limit in sorted(value.items())
        )
    return str(value)


def check_request(request: Mapping[str, Any]) -> Pool:
    """The wanted fields of one pool, or BadRequest that names the variable."""
    wanted: Pool = {}
    name = request.get("name") or ""
    if not NAME.fullmatch(name) or name == "surge" or name.endswith("-surge"):
        raise BadRequest(
            f"celeryops_pool: {name!r} is no name of a pool: a lower-case letter, then letters, digits, _ and single -"
        )
    for key, least, most in (("instances", 0, MOST_INSTANCES), ("concurrency", 1, 10_000)):
        if request.get(key) is not None:
            value = request[key]
            if not least <= value <= most:
                raise BadRequest(f"celeryops_{key}: {value} is out of range, give {least} to {most}")
            wanted[key] = value
    scale = request.get("autoscale")
    if scale:
        if "concurrency" in wanted:
            raise BadRequest("celeryops_autoscale and celeryops_concurrency: give one of them")
        if not 1 <= scale["min"] <= scale["max"]:
            raise BadRequest(f"celeryops_autoscale: needs 1 <= min <= max, not {scale['min']} and {scale['max']}")
        wanted["autoscale"] = {"min": scale["min"], "max": scale["max"]}
    wanted.update(check_settings(request.get("settings") or {}))
    queues = request.get("queues") or []
    for queue in queues:
        if not queue or re.search(r"[\s,]", queue):
            raise BadRequest(f"celeryops_queues: {queue!r} must not be empty or hold blanks or commas")
    if queues:
        wanted["queues"] = list(dict.fromkeys(queues))
    if not wanted and not request.get("profile"):
        raise BadRequest("celeryops_instances, celeryops_concurrency, celeryops_autoscale: give at least one of them")
    return {"name": name, **wanted}


def check_settings(settings: Mapping[str, Any]) -> Pool:
    """What `tune` was asked for, or BadRequest that names the variable."""
    wanted: Pool = {}
    for key, most in COUNTS.items():
        value = settings.get(key)
        if value not in (None, ""):
            if not re.fullmatch("[0-9]+", str(value)) or int(value) > most:
                raise BadRequest(f"celeryops_{key}: {value} is no whole number from 0 (no limit) to {most}")
            wanted[key] = int(value)
    if settings.get("loglevel"):
        wanted["loglevel"] = str(settings["loglevel"]).upper()
        if wanted["loglevel"] not in LEVELS:
            raise BadRequest(f"celeryops_loglevel: {settings['loglevel']!r} is none of {', '.join(LEVELS)}")
    for key in LIMITS:
        limits = settings.get(key) or {}
        if not isinstance(limits, Mapping):
            raise BadRequest(f"celeryops_{key}: give a dictionary by task name, not {limits!r}")
        for task, limit in limits.items():
            if key == "rate_limits" and not re.fullmatch(r"[0-9]+(\.[0-9]+)?(/[smh])?", str(limit)):
                raise BadRequest(f"celeryops_rate_limits.{task}: {limit!r} is no rate; write 10/s, 10/m or 10/h, or 0")
            if key == "time_limits":
                _check_time_limit(task, limit)
        if limits:
            wanted[key] = _limits(key, limits)
    soft, hard = wanted.get("soft_time_limit"), wanted.get("time_limit")
    if soft and hard and soft > hard:
        raise BadRequest(f"celeryops_soft_time_limit: {soft} is above celeryops_time_limit, {hard}")
    return wanted


def _check_time_limit(task: str, limit: Any) -> None:
    place = f"celeryops_time_limits.{task}"
    if not isinstance(limit, Mapping) or not limit or set(limit) - {"soft", "hard"}:
        raise BadRequest(f"{place}: give soft, hard or both, in seconds, not {limit!r}")
    for bound, seconds in limit.items():
        if not re.fullmatch(r"[0-9]+(\.[0-9]+)?", str(seconds)) or float(seconds) <= 0:
            raise BadRequest(f"{place}.{bound}: {seconds!r} is no number of seconds above 0")
    if len(limit) == 2 and float(limit["soft"]) > float(limit["hard"]):
        raise BadRequest(f"{place}: soft {limit['soft']} is above hard {limit['hard']}")


def profile(name: str, pool: Mapping[str, Any], processors: int, memory_kib: int) -> Pool:
    """What suits a kind of work on a host of this size. All instances of the pool share the host."""
    instances = max(1, instances_of(pool))
    share = {"cpu_bound": 1.0, "io_bound": 4.0, "memory_bound": 0.5}[name]
    slots = max(1, int(processors * share) // instances)
    wanted: Pool = {"concurrency": slots, "prefetch": 4 if name == "io_bound" else 1}
    if name == "memory_bound":
        # Three fifths of the memory for all of them; the rest is for their main processes and the host.
        per_child = max(1, int(memory_kib * 0.6) // (slots * instances))
        wanted.update(max_tasks_per_child=100, max_memory_per_child=per_child)
    kind = kind_of(pool)
    # An autoscaler sets the size by itself, and a solo pool has one slot.
    if pool.get("autoscale") or kind == "solo":
        del wanted["concurrency"]
    if kind not in ("prefork", "processes"):
        wanted = {key: value for key, value in wanted.items() if key not in PREFORK_ONLY}
    return wanted


def kind_of(pool: Mapping[str, Any] | None) -> str:
    return str((pool or {}).get("pool") or "prefork")


def rescale(
    inventory: Sequence[Mapping[str, Any]], scaled: Mapping[str, Mapping[str, Any]], wanted: Mapping[str, Any]
) -> dict[str, Pool]:
    """What is to be remembered of the scalings after this one. What equals the inventory is not remembered."""
    after = {name: dict(entry) for name, entry in scaled.items()}
    name = wanted["name"]
    base = next((pool for pool in inventory if pool["name"] == name), None)
    asked = {key: value for key, value in wanted.items() if key != "name"}
    kind = kind_of(base)
    if kind == "solo" and "concurrency" in asked:
        raise BadRequest(f"celeryops_concurrency: pool {name} is solo and runs one task at a time; scale its instances")
    if "autoscale" in asked and kind not in GROWS:
        raise BadRequest(
            f"celeryops_autoscale: pool {name} is of kind {kind}, which does not grow; scale its instances"
        )
    if kind not in ("prefork", "processes"):
        for key in PREFORK_ONLY:
            if asked.get(key):
                raise BadRequest(f"celeryops_{key}: pool {name} is of kind {kind}; this works with prefork only")
    entry = after.get(name, {})
    for key in LIMITS:
        if key in asked:
            # By task: other tasks keep theirs.
            asked[key] = {**_value(_with(base or {}, entry), key), **asked[key]}
    if base is None:
        if asked.get("instances") == 0:
            after.pop(name, None)
            return after
        if not (asked.get("queues") or entry.get("queues")):
            known = ", ".join(sorted(pool["name"] for pool in inventory)) or "none"
            raise BadRequest(
                f"celeryops_pool: there is no pool {name!r} (there are: {known}). "
                "Correct the name, or give celeryops_queues to make a pool of its own for them"
            )
        after[name] = {"instances": 1, **_with(entry, asked)}
        return after
    if asked.get("queues") and list(asked["queues"]) != list(base["queues"]):
        raise BadRequest(
            f"celeryops_queues: pool {name} is in the inventory, which says its queues; give another celeryops_pool"
        )
    asked.pop("queues", None)
    merged = _with(entry, asked)
    after[name] = merged
    return tidy(inventory, after, only=name)


def tidy(
    inventory: Sequence[Mapping[str, Any]], scaled: Mapping[str, Mapping[str, Any]], only: str | None = None
) -> dict[str, Pool]:
    """Leave out what equals the inventory and, unless it is about one pool only, pools that are no longer in it."""
    bases = {pool["name"]: pool for pool in inventory}
    after: dict[str, Pool] = {}
    for name, entry in scaled.items():
        if only not in (None, name):
            after[name] = dict(entry)
        elif name in bases:
            base, whole = bases[name], _with(bases[name], entry)
            kept = {key: entry[key] for key in FIELDS if key in entry and _value(whole, key) != _value(base, key)}
            if kept:
                after[name] = kept
        elif entry.get("queues"):
            after[name] = dict(entry)
    return after


def resizable(pool: Mapping[str, Any]) -> bool:
    return kind_of(pool) in GROWS and not pool.get("autoscale")


def way(before: Mapping[str, Any] | None, after: Mapping[str, Any] | None) -> str:
    """How workers which go on running get the new figures: nothing to do, live, or by a restart.

    Limits of single tasks are always set live.
    """
    if not before or not after:
        return "none"
    changed = [
        key
        for key in {*before, *after} - {"instances", "name", *LIMITS}
        if (_value(before, key) != _value(after, key) if key in FIELDS else before.get(key) != after.get(key))
    ]
    if not changed:
        return "none"
    grows = kind_of(after) in GROWS
    # Only a worker that was started with an autoscaler has one; and one whose size was never given cannot go back live.
    if grows and changed == ["concurrency"] and not before.get("autoscale") and after.get("concurrency"):
        return "pool_size"
    if grows and changed == ["autoscale"] and before.get("autoscale") and after.get("autoscale"):
        return "autoscale"
    return "restart"
