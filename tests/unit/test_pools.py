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
