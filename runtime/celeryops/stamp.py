# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Puts the time of publishing into the header celeryops_published; producers only need to import this module.

A retry is published anew and so stamped anew. A message that the broker hands out again keeps its first stamp.
"""

from __future__ import annotations

import time
from typing import Any

from celery.signals import before_task_publish

from ._environment import disabled

HEADER = "celeryops_published"


def _stamp(headers: dict[str, Any] | None = None, **_: Any) -> None:
    if headers is not None:
        headers[HEADER] = time.time()


if "stamp" not in disabled():
    before_task_publish.connect(_stamp)
