# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What a pool has been given."""

from __future__ import annotations

import weakref
from typing import Any

from celery.worker import state


def prefork(pool: Any) -> Any:
    """billiard's pool behind a pool of Celery, None if that is of another kind."""
    found = getattr(pool, "_pool", None)
    return found if hasattr(found, "_flush_writer") else None


def given(pool: Any) -> dict[int, Any]:
    """The jobs that a process of this prefork pool has or is just being written, written to their end."""
    found = {number: job for number, job in pool._cache.items() if job._accepted or job._write_to}
    for job in found.values():
        writer = getattr(job, "_writer", lambda: None)()
        if writer in pool._active_writers:
            pool._flush_writer(job._write_to, writer)
    return found


# Celery takes from its own lists at a loss what it has not heard to be begun, and a second loss may come before it has.
_known: weakref.WeakSet[Any] = weakref.WeakSet()


def begun(pool: Any) -> set[Any]:
    """The requests that run, or are sure to."""
    if (own := prefork(pool)) is not None:
        return {getattr(job._accept_callback, "__self__", None) for job in given(own).values()} - {None}
    requests = {*_known, *state.requests.values(), *state.reserved_requests, *state.active_requests}
    found = {request for request in requests if request in state.active_requests or request._apply_result is not None}
    _known.update(found)
    return found
