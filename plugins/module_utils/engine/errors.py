# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

from typing import Any


class CeleryOpsError(Exception):
    """An expected failure: a message for people, a category and data for programs."""

    category = "error"

    def __init__(self, msg: str, **data: Any) -> None:
        super().__init__(msg)
        self.msg = msg
        self.data = data


class ConnectionFailed(CeleryOpsError):
    category = "connection"


class AuthenticationFailed(ConnectionFailed):
    category = "authentication"


class NoReply(CeleryOpsError):
    category = "no_reply"


class NodeUnknown(CeleryOpsError):
    category = "node_unknown"


class QueueUnknown(CeleryOpsError):
    category = "queue_unknown"


class PreconditionFailed(CeleryOpsError):
    category = "precondition"


class WaitTimeout(CeleryOpsError):
    category = "wait_timeout"


class UnknownLayout(CeleryOpsError):
    category = "unknown_layout"


class WrongType(CeleryOpsError):
    category = "wrong_type"


class BadMessage(CeleryOpsError):
    category = "bad_message"


class SaveFailed(CeleryOpsError):
    category = "save_failed"


class LockHeld(CeleryOpsError):
    category = "lock_held"
