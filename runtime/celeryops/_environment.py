# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
from __future__ import annotations

import os

PARTS = (
    "notify", "watchdog", "release", "stamp", "canary", "ledger", "held", "finish", "revokes", "pause", "limits",
    "heartbeat", "deadletter", "signing", "once", "lead", "reconnect", "fetched", "carry", "shrink", "sentinel",
    "probe",
)  # fmt: skip


def disabled() -> frozenset[str]:
    """The parts named in CELERYOPS_DISABLE."""
    return frozenset(name.strip() for name in os.environ.get("CELERYOPS_DISABLE", "").split(",") if name.strip())


def release() -> str | None:
    return os.environ.get("CELERYOPS_RELEASE") or None
