# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What differs between releases; make_release.py writes this file."""

from __future__ import annotations

VERSION = "dev"
INCLUDE = ["shop.tasks", "shop.receipts", "shop.loyalty"]
SELFTEST_ANSWER = "ok"
