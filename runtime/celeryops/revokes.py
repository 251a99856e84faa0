# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""This worker refuses the tasks that operators have revoked, also those revoked while it was down."""

from __future__ import annotations

from typing import Any

from celery.worker import state

from . import _records
from .engine import revokes

# Celery forgets an id after three hours; adding it again makes it young.
EVERY = 900.0


def _apply(consumer: Any, ids: list[str]) -> None:
    if ids:
        state.revoked.update(ids)


_records.keep(_records.Record("revoked tasks", revokes.load, _apply, EVERY))
