"""A task that does nothing, to measure what surrounds it."""

# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

from labapp import app

__all__ = ["app"]


@app.task(name="lab.noop", ignore_result=True)
def noop() -> None:
    pass
