# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from ._module import CeleryModule, above_zero
from .engine.connection import Broker, read_operator_file
from .engine.control import Control
from .engine.errors import PreconditionFailed
from .engine.once import STATES, Choice, Locks, Store, ask_owners, look, open_stores, settings, store_broker


def lock_argument_spec() -> dict[str, Any]:
    return {
        "redis_url": {"type": "str", "no_log": True},
        "database": {"type": "str", "no_log": True},
        "task": {"type": "str"},
        "scope": {"type": "str"},
        "task_ids": {"type": "list", "elements": "str", "default": []},
        "states": {"type": "list", "elements": "str", "choices": list(STATES), "default": list(STATES)},
        "dead": {"type": "list", "elements": "str", "default": []},
        "timeout": {"type": "float", "default": 2.0},
    }


@contextlib.contextmanager
def find_locks(module: CeleryModule, most: int | None = None) -> Iterator[tuple[list[Store], Locks]]:
    """The locks that the module's options choose, and what their nodes say."""
    params = module.params
    above_zero(params, "timeout")
    scope = params["scope"] or ""
    if scope and scope != "global" and not (scope.startswith(("user=", "tenant=")) and scope.partition("=")[2]):
        raise PreconditionFailed(f"scope: {scope!r} is none of global, user=ID and tenant=ID.")
    spec = module.broker_spec()
    told = settings(read_operator_file(params["environment_file"]) if params["environment_file"] else {})
    redis_url, database = params["redis_url"] or told["redis"], params["database"] or told["database"]
    module.secrets = [*module.secrets, *(secret for secret in (redis_url, database) if secret)]
    choice = Choice(params["task"] or "", scope, params["states"], task_ids=params["task_ids"])
    with contextlib.ExitStack() as stack:
        broker = stack.enter_context(Broker(spec))
        holder = store_broker(spec, redis_url)
        if holder is not None:
            stack.enter_context(holder)
        stores = open_stores(holder, database)
        locks = look(stores, choice, most)
        with broker.guard(), Control(broker, timeout=params["timeout"]) as control:
            ask_owners(locks, control, params["dead"])
        yield stores, locks
