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
# What a scaling may change of a pool of the inventory.
FIELDS = ("instances", "concurrency", "autoscale")
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
    if value in (None, ""):
        return None
    return {bound: int(value[bound]) for bound in ("min", "max")} if key == "autoscale" else int(value)


def _say(value: Any) -> str:
    if value is None:
        return "not set"
    return f"{value['min']} to {value['max']}" if isinstance(value, dict) else str(value)


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
    queues = request.get("queues") or []
    for queue in queues:
        if not queue or re.search(r"[\s,]", queue):
            raise BadRequest(f"celeryops_queues: {queue!r} must not be empty or hold blanks or commas")
    if queues:
        wanted["queues"] = list(dict.fromkeys(queues))
    if not wanted:
        raise BadRequest("celeryops_instances, celeryops_concurrency, celeryops_autoscale: give at least one of them")
    return {"name": name, **wanted}


def rescale(
    inventory: Sequence[Mapping[str, Any]], scaled: Mapping[str, Mapping[str, Any]], wanted: Mapping[str, Any]
) -> dict[str, Pool]:
    """What is to be remembered of the scalings after this one. What equals the inventory is not remembered."""
    after = {name: dict(entry) for name, entry in scaled.items()}
    name = wanted["name"]
    base = next((pool for pool in inventory if pool["name"] == name), None)
    asked = {key: value for key, value in wanted.items() if key != "name"}
    kind = str((base or {}).get("pool") or "prefork")
    if kind == "solo" and "concurrency" in asked:
        raise BadRequest(f"celeryops_concurrency: pool {name} is solo and runs one task at a time; scale its instances")
    if "autoscale" in asked and kind not in GROWS:
        raise BadRequest(
            f"celeryops_autoscale: pool {name} is of kind {kind}, which does not grow; scale its instances"
        )
    entry = after.get(name, {})
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
    return str(pool.get("pool") or "prefork") in GROWS and not pool.get("autoscale")


def way(before: Mapping[str, Any] | None, after: Mapping[str, Any] | None) -> str:
    """How workers which go on running get the new size: nothing to do, live, or by a restart."""
    if not before or not after:
        return "none"
    changed = [
        key
        for key in {*before, *after} - {"instances", "name"}
        if (_value(before, key) != _value(after, key) if key in FIELDS else before.get(key) != after.get(key))
    ]
    if not changed:
        return "none"
    grows = str(after.get("pool") or "prefork") in GROWS
    # Only a worker that was started with an autoscaler has one; and one whose size was never given cannot go back live.
    if grows and changed == ["concurrency"] and not before.get("autoscale") and after.get("concurrency"):
        return "pool_size"
    if grows and changed == ["autoscale"] and before.get("autoscale") and after.get("autoscale"):
        return "autoscale"
    return "restart"
