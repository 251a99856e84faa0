# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What celeryops.runbook needs beside the application's Celery workers."""

from __future__ import annotations

__version__ = "0.1.0"
