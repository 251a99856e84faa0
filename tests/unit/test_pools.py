# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
from __future__ import annotations

from typing import Any

import pytest

from ansible_collections.celeryops.runbook.plugins.module_utils import _pools

INVENTORY: list[dict[str, Any]] = [
    {"name": "default", "queues": ["default"], "concurrency": 4, "instances": 2},
    {"name": "bulk", "queues": ["bulk"], "autoscale": {"min": 1, "max": 4}},
    {"name": "io", "queues": ["io"], "pool": "threads", "concurrency": 10},
]


def scale(scaled: dict[str, Any], **request: Any) -> dict[str, Any]:
    return _pools.rescale(INVENTORY, scaled, _pools.check_request(request))


def test_nothing_scaled_is_the_inventory() -> None:
    merged = _pools.merge(INVENTORY, {})
    assert merged.pools == INVENTORY
    assert merged.differences == merged.obsolete == []


def test_a_scaling_is_remembered_and_told() -> None:
    scaled = scale({}, name="default", instances=3, concurrency=8)
    assert scaled == {"default": {"instances": 3, "concurrency": 8}}
    merged = _pools.merge(INVENTORY, scaled)
    assert merged.pools[0] == {"name": "default", "queues": ["default"], "concurrency": 8, "instances": 3}
    assert merged.differences == [
        "pool default: instances 3 (inventory: 2)",
        "pool default: concurrency 8 (inventory: 4)",
    ]


def test_the_second_time_changes_nothing_and_the_way_back_forgets() -> None:
    scaled = scale({}, name="default", instances=3)
    assert scale(scaled, name="default", instances=3) == scaled
    assert scale(scaled, name="default", instances=2) == {}
    both = scale(scaled, name="default", concurrency=8)
    assert scale(both, name="default", instances=2) == {"default": {"concurrency": 8}}


def test_an_inventory_that_catches_up_leaves_no_difference() -> None:
    caught_up = [{**INVENTORY[0], "instances": 3}, *INVENTORY[1:]]
    scaled = {"default": {"instances": 3}, "gone": {"instances": 2}, "own": {"queues": ["q"]}}
    assert _pools.merge(caught_up, {"default": {"instances": 3}}).differences == []
    assert _pools.tidy(caught_up, scaled) == {"own": {"queues": ["q"]}}
    assert _pools.tidy(INVENTORY, scaled) == {"default": {"instances": 3}, "own": {"queues": ["q"]}}


def test_size_and_autoscaler_replace_each_other() -> None:
    merged = _pools.merge(INVENTORY, scale({}, name="bulk", concurrency=6))
    assert merged.pools[1] == {"name": "bulk", "queues": ["bulk"], "concurrency": 6}
    scaled = scale(scale({}, name="default", concurrency=8), name="default", autoscale={"min": 2, "max": 6})
    assert scaled == {"default": {"autoscale": {"min": 2, "max": 6}}}


def test_a_pool_of_its_own_comes_and_goes() -> None:
    scaled = scale({}, name="emergency", queues=["bulk", "bulk"], concurrency=8)
    assert scaled == {"emergency": {"queues": ["bulk"], "concurrency": 8, "instances": 1}}
    merged = _pools.merge(INVENTORY, scaled)
    assert merged.pools[-1]["name"] == "emergency"
    assert merged.differences == ["pool emergency: 1 instances for bulk (not in the inventory)"]
    assert scale(scaled, name="emergency", instances=2)["emergency"]["queues"] == ["bulk"]
    assert scale(scaled, name="emergency", instances=0) == {}
    assert scale({}, name="emergency", instances=0) == {}


def test_no_instance_of_a_pool_of_the_inventory() -> None:
    scaled = scale({}, name="bulk", instances=0)
    merged = _pools.merge(INVENTORY, scaled)
    assert [pool["name"] for pool in merged.pools] == ["default", "io"]
    assert merged.differences == ["pool bulk: instances 0 (inventory: 1)"]


def test_a_scaled_pool_that_left_the_inventory_is_obsolete() -> None:
    merged = _pools.merge(INVENTORY, {"gone": {"instances": 3}})
    assert (merged.obsolete, merged.pools) == (["gone"], INVENTORY)


@pytest.mark.parametrize(
    ("before", "after", "way"),
    [
        ({"concurrency": 4}, {"concurrency": 8}, "pool_size"),
        ({"concurrency": 4, "instances": 1}, {"concurrency": 4, "instances": 3}, "none"),
        ({"concurrency": 4, "pool": "threads"}, {"concurrency": 8, "pool": "threads"}, "restart"),
        ({"autoscale": {"min": 1, "max": 2}}, {"autoscale": {"min": 1, "max": 9}}, "autoscale"),
        ({"autoscale": {"min": 1, "max": 2}}, {"concurrency": 8}, "restart"),
        ({"concurrency": 8}, {"autoscale": {"min": 1, "max": 2}}, "restart"),
        ({"concurrency": 8}, {}, "restart"),
        ({}, {"concurrency": 8}, "pool_size"),
        ({"queues": ["a"]}, {"queues": ["a", "b"]}, "restart"),
        ({"concurrency": "8"}, {"concurrency": 8}, "none"),
        (None, {"concurrency": 8}, "none"),
    ],
)
def test_way(before: dict[str, Any] | None, after: dict[str, Any], way: str) -> None:
    old = None if before is None else {"name": "p", **before}
    assert _pools.way(old, {"name": "p", **after}) == way


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        ({"name": "bulck", "instances": 2}, ["celeryops_pool", "bulck", "bulk, default, io", "celeryops_queues"]),
        ({"name": "Bulk", "instances": 2}, ["celeryops_pool"]),
        ({"name": "x-surge", "instances": 2}, ["celeryops_pool"]),
        ({"name": "bulk"}, ["celeryops_instances"]),
        ({"name": "bulk", "instances": -1}, ["celeryops_instances", "0 to 64"]),
        ({"name": "bulk", "concurrency": 0}, ["celeryops_concurrency"]),
        ({"name": "bulk", "concurrency": 2, "autoscale": {"min": 1, "max": 2}}, ["celeryops_autoscale", "one of them"]),
        ({"name": "bulk", "autoscale": {"min": 3, "max": 2}}, ["celeryops_autoscale", "min <= max"]),
        ({"name": "io", "autoscale": {"min": 1, "max": 2}}, ["celeryops_autoscale", "threads"]),
        ({"name": "bulk", "queues": ["other"], "instances": 1}, ["celeryops_queues", "inventory"]),
        ({"name": "x", "queues": ["a b"]}, ["celeryops_queues"]),
    ],
)
def test_a_bad_request_names_the_variable(request_: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(_pools.BadRequest) as caught:
        scale({}, **request_)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_solo_has_no_size() -> None:
    with pytest.raises(_pools.BadRequest, match="celeryops_concurrency"):
        wanted = _pools.check_request({"name": "one", "concurrency": 2})
        _pools.rescale([{"name": "one", "queues": ["q"], "pool": "solo"}], {}, wanted)


def tune(scaled: dict[str, Any], name: str, **settings: Any) -> dict[str, Any]:
    return scale(scaled, name=name, settings=settings)


def test_settings_are_remembered_told_and_forgotten() -> None:
    tuned = tune({}, "default", prefetch="4", loglevel="debug", rate_limits={"a": "10/m"})
    assert tuned == {"default": {"prefetch": 4, "loglevel": "DEBUG", "rate_limits": {"a": "10/m"}}}
    assert tune(tuned, "default", prefetch=4) == tuned
    more = tune(tuned, "default", rate_limits={"b": 5}, time_limits={"a": {"hard": 9, "soft": "5"}}, prefetch="")
    assert more["default"]["rate_limits"] == {"a": "10/m", "b": "5"}
    assert more["default"]["time_limits"] == {"a": {"hard": 9.0, "soft": 5.0}}
    assert _pools.merge(INVENTORY, more).differences == [
        "pool default: prefetch 4 (inventory: not set)",
        "pool default: loglevel DEBUG (inventory: INFO)",
        "pool default: rate_limits a 10/m, b 5 (inventory: not set)",
        "pool default: time_limits a hard 9 s soft 5 s (inventory: not set)",
    ]
    settings = {"prefetch": 4, "loglevel": "debug", "rate_limits": {"a": "10/m", "b": "5"}}
    caught_up = [{**INVENTORY[0], **settings, "time_limits": {"a": {"soft": 5, "hard": 9}}}, *INVENTORY[1:]]
    assert _pools.tidy(caught_up, more) == {} and _pools.merge(caught_up, more).differences == []


@pytest.mark.parametrize(
    ("change", "way"),
    [
        ({"rate_limits": {"a": "1/s"}, "time_limits": {"a": {"soft": 1}}}, "none"),
        ({"prefetch": 2}, "restart"),
        ({"loglevel": "DEBUG", "rate_limits": {"a": "1/s"}}, "restart"),
        ({"loglevel": "info"}, "none"),
        ({"max_memory_per_child": 1000}, "restart"),
    ],
)
def test_only_limits_of_tasks_change_live(change: dict[str, Any], way: str) -> None:
    assert _pools.way(INVENTORY[0], {**INVENTORY[0], **change}) == way


def test_size_and_limits_change_live_together() -> None:
    tuned = scale({}, name="default", concurrency=8, settings={"rate_limits": {"a": "1/s"}})
    before, after = (_pools.merge(INVENTORY, entries).pools[0] for entries in ({}, tuned))
    assert _pools.way(before, after) == "pool_size" and after["rate_limits"] == {"a": "1/s"}


@pytest.mark.parametrize(
    ("name", "pool", "expected"),
    [
        ("cpu_bound", {}, {"concurrency": 8, "prefetch": 1}),
        ("io_bound", {"instances": 2}, {"concurrency": 16, "prefetch": 4}),
        ("memory_bound", {"instances": 2}, {
            "concurrency": 2, "prefetch": 1, "max_tasks_per_child": 100, "max_memory_per_child": 600_000}),
        ("memory_bound", {"pool": "threads"}, {"concurrency": 4, "prefetch": 1}),
        ("cpu_bound", {"autoscale": {"min": 1, "max": 2}}, {"prefetch": 1}),
        ("cpu_bound", {"instances": 20}, {"concurrency": 1, "prefetch": 1}),
    ],
)  # fmt: skip
def test_a_profile_fits_the_host(name: str, pool: dict[str, Any], expected: dict[str, Any]) -> None:
    assert _pools.profile(name, pool, 8, 4_000_000) == expected


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("default", {"prefetch": "many"}, "celeryops_prefetch: many"),
        ("default", {"max_tasks_per_child": -1}, "celeryops_max_tasks_per_child: -1"),
        ("default", {"loglevel": "loud"}, "celeryops_loglevel: 'loud'"),
        ("default", {"rate_limits": {"a": "fast"}}, "celeryops_rate_limits.a: 'fast'"),
        ("default", {"rate_limits": "a=1"}, "celeryops_rate_limits: give a dictionary"),
        ("default", {"time_limits": {"a": 5}}, "celeryops_time_limits.a: give soft, hard"),
        ("default", {"time_limits": {"a": {"soft": 5, "hard": 4}}}, "soft 5 is above hard 4"),
        ("default", {"time_limits": {"a": {"soft": 0}}}, "celeryops_time_limits.a.soft"),
        ("default", {"soft_time_limit": 9, "time_limit": 5}, "celeryops_soft_time_limit: 9 is above"),
        ("io", {"max_memory_per_child": 5}, "celeryops_max_memory_per_child: pool io is of kind threads"),
    ],
)
def test_wrong_settings_are_named(name: str, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(_pools.BadRequest, match=words.replace("'", ".")):
        tune({}, name, **settings)
