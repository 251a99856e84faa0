# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Loads the parts into a worker: celery worker --include celeryops.worker.

Importing a part switches it on. A part that fails is logged and left out; the worker goes on without it. One that is
told to refuse tasks and cannot judge them does not start.
"""

from __future__ import annotations

import importlib
import logging

from celery.exceptions import ImproperlyConfigured

from ._environment import PARTS, disabled

logger = logging.getLogger(__name__)


def load() -> list[str]:
    off = disabled()
    for name in sorted(off.difference(PARTS)):
        logger.warning("CELERYOPS_DISABLE names %r; the parts are %s", name, ", ".join(PARTS))
    loaded = []
    for name in PARTS:
        if name in off:
            continue
        try:
            importlib.import_module(f"celeryops.{name}")
        except ImproperlyConfigured as exc:
            # Without its keys a worker would have to run anything, or to refuse everything.
            raise SystemExit(f"celeryops: {exc}") from None
        except Exception:
            logger.exception("celeryops: part %r did not load; the worker runs without it", name)
        else:
            loaded.append(name)
    return loaded


load()
