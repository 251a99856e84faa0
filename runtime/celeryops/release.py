# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Inspect command celeryops_release: which release does this worker run."""

from __future__ import annotations

import os
from typing import Any

import celery
from celery.worker.control import inspect_command

from . import __version__
from ._environment import release


@inspect_command(name="celeryops_release")
def celeryops_release(state: Any) -> dict[str, Any]:
    return {"release": release(), "celery": celery.__version__, "celeryops": __version__, "pid": os.getpid()}
