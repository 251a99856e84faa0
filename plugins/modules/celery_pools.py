#!/usr/bin/python
# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: celery_pools
short_description: Which worker pools count on a host, the inventory's or those that were scaled
version_added: 0.1.0
author:
  - celeryops contributors (@celeryops)
description:
  - The inventory says which pools a host has. The playbooks C(scale) and C(tune) may have changed their size and
    settings since, and remember that in the file C(scale.json) in O(config_dir). This module puts both together, and
    writes that file.
  - What equals the inventory is not remembered.
  - It changes no worker. The role C(worker) does that.
extends_documentation_fragment:
  - celeryops.runbook.application
  - celeryops.runbook.attributes.host
options:
  pools:
    description: The pools of the inventory, as in C(celeryops_worker_pools).
    type: list
    elements: dict
    required: true
  pool:
    description: The pool to scale. One that is not in O(pools) needs O(queues).
    type: str
  instances:
    description: How many instances of it are to run on this host. 0 removes a pool that is not in O(pools).
    type: int
  concurrency:
    description: Pool slots of each instance.
    type: int
  autoscale:
    description: Bounds between which each instance grows and shrinks.
    type: dict
    suboptions:
      min:
        description: Fewest slots.
        type: int
        required: true
      max:
        description: Most slots.
        type: int
        required: true
  settings:
    description:
      - Other figures of O(pool), V(prefetch), V(max_tasks_per_child), V(max_memory_per_child), V(soft_time_limit),
        V(time_limit), V(loglevel), and by task name V(rate_limits) and V(time_limits).
      - 0 is no limit. An empty value leaves the setting as it is.
    type: dict
    default: {}
  profile:
    description:
      - Figures for a kind of work, from the processors and the memory of this host. O(concurrency) and O(settings) win.
      - V(cpu_bound) has a slot for each processor, V(io_bound) four and fetches more ahead, V(memory_bound) half a slot
        and replaces pool processes after 100 tasks or when they are above their share of three fifths of the memory.
    type: str
    choices: [cpu_bound, io_bound, memory_bound]
  queues:
    description: The queues of a pool that is not in O(pools).
    type: list
    elements: str
    default: []
  reset:
    description: Forget every scaling, so that only O(pools) counts.
    type: bool
    default: false
  tidy:
    description: Forget what no longer differs from O(pools), because the inventory caught up or dropped the pool.
    type: bool
    default: false
seealso:
  - module: celeryops.runbook.celery_control
"""

EXAMPLES = r"""
- name: Learn which pools count here
  celeryops.runbook.celery_pools:
    name: shop
    pools: "{{ celeryops_worker_pools }}"
  register: here

- name: Remember that the bulk pool has three instances here
  celeryops.runbook.celery_pools:
    name: shop
    pools: "{{ celeryops_worker_pools }}"
    pool: bulk
    instances: 3
"""

RETURN = r"""
pools:
  description: The pools that count, those without an instance left out.
  returned: success
  type: list
  elements: dict
  sample: [{name: bulk, queues: [bulk], instances: 3}]
differences:
  description: What differs from the inventory, in words.
  returned: success
  type: list
  elements: str
  sample: ["pool bulk: instances 3 (inventory: 1)"]
obsolete:
  description: Scaled pools which the inventory no longer has. They are left out.
  returned: success
  type: list
  elements: str
kept:
  description: Instances of O(pool) that run on.
  returned: success
  type: list
  elements: str
added:
  description: Instances of O(pool) that are new.
  returned: success
  type: list
  elements: str
removed:
  description: Instances of O(pool) that have to go.
  returned: success
  type: list
  elements: str
queues:
  description: The queues of O(pool).
  returned: success
  type: list
  elements: str
limits:
  description: Rate and time limits of single tasks in O(pool), which running instances can be given live.
  returned: success
  type: dict
  sample: {rate_limits: {shop.mail: 10/m}, time_limits: {}}
way:
  description: How the running instances get their new figures, V(none), V(pool_size), V(autoscale) or V(restart).
  returned: success
  type: str
"""

import json
import os
from typing import Any

from ansible.module_utils.basic import AnsibleModule

from ansible_collections.celeryops.runbook.plugins.module_utils import _pools


def read(path: str) -> tuple[str, dict[str, Any]]:
    try:
        with open(path, encoding="utf-8") as handle:
            text = handle.read()
    except FileNotFoundError:
        return "", {}
    scaled = json.loads(text)["pools"]
    if not isinstance(scaled, dict) or not all(isinstance(entry, dict) for entry in scaled.values()):
        raise ValueError("pools is no dictionary of pools")
    return text, scaled


def write(module: AnsibleModule, path: str, text: str) -> None:
    if not text:
        os.unlink(path)
        return
    temporary = os.path.join(module.tmpdir, "scale.json")
    with open(temporary, "w", encoding="utf-8") as handle:
        handle.write(text)
    os.chmod(temporary, 0o644)
    module.atomic_move(temporary, path)


def processors() -> int:
    return len(os.sched_getaffinity(0))


def memory_kib() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 1024


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "name": {"type": "str", "required": True},
            "pools": {"type": "list", "elements": "dict", "required": True},
            "pool": {"type": "str"},
            "instances": {"type": "int"},
            "concurrency": {"type": "int"},
            "autoscale": {
                "type": "dict",
                "options": {"min": {"type": "int", "required": True}, "max": {"type": "int", "required": True}},
            },
            "settings": {"type": "dict", "default": {}},
            "profile": {"type": "str", "choices": list(_pools.PROFILES)},
            "queues": {"type": "list", "elements": "str", "default": []},
            "reset": {"type": "bool", "default": False},
            "tidy": {"type": "bool", "default": False},
            "config_dir": {"type": "path"},
        },
        mutually_exclusive=[("pool", "reset")],
        supports_check_mode=True,
    )
    params = module.params
    path = os.path.join(params["config_dir"] or f"/etc/celeryops/{params['name']}", "scale.json")
    try:
        text, scaled = read(path)
    except (ValueError, KeyError, TypeError, OSError) as error:
        module.fail_json(msg=f"{path} cannot be read: {error}. Correct it, or remove it to return to the inventory.")
    nameless = [pool for pool in params["pools"] if not pool.get("name")]
    if nameless:
        module.fail_json(msg="pools: a pool has no name; give every pool of celeryops_worker_pools one")
    after: dict[str, Any] = {} if params["reset"] else scaled
    if params["tidy"]:
        after = _pools.tidy(params["pools"], after)
    if params["pool"] is not None:
        asked = ("instances", "concurrency", "autoscale", "queues", "settings", "profile")
        request = {"name": params["pool"], **{key: params[key] for key in asked}}
        try:
            wanted_here = _pools.check_request(request)
            if params["profile"]:
                counts = _pools.merge(params["pools"], scaled).pools
                pool = next((p for p in counts if p["name"] == params["pool"]), {})
                fitting = _pools.profile(params["profile"], {**pool, **wanted_here}, processors(), memory_kib())
                wanted_here = {**fitting, **wanted_here}
            after = _pools.rescale(params["pools"], scaled, wanted_here)
        except _pools.BadRequest as error:
            module.fail_json(msg=f"{error}.")
    before, now = (_pools.merge(params["pools"], entries) for entries in (scaled, after))
    wanted = json.dumps({"pools": after}, indent=2, sort_keys=True) + "\n" if after else ""
    # To look changes nothing.
    changed = (params["pool"] is not None or params["reset"] or params["tidy"]) and wanted != text
    if changed and not module.check_mode:
        write(module, path, wanted)
    old, new = (next((p for p in m.pools if p["name"] == params["pool"]), None) for m in (before, now))
    way = _pools.way(old, new)
    # Asked for by name, so a size that drifted away live is brought back too.
    sized = params["concurrency"] or params["profile"]
    if way == "none" and new and old and sized and new.get("concurrency") and _pools.resizable(new):
        way = "pool_size"
    old_names, new_names = _pools.names_of(old), _pools.names_of(new)
    module.exit_json(
        changed=changed,
        pools=now.pools,
        differences=now.differences,
        obsolete=now.obsolete,
        kept=[name for name in new_names if name in old_names],
        added=[name for name in new_names if name not in old_names],
        removed=[name for name in old_names if name not in new_names],
        queues=(new or old or {}).get("queues", []),
        limits={key: (new or {}).get(key) or {} for key in _pools.LIMITS},
        way=way,
        diff={
            "before_header": path,
            "after_header": path,
            "before": text,
            "after": wanted if changed else text,
        },
    )


if __name__ == "__main__":
    main()
