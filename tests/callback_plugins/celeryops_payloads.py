# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import contextlib
import gc
import os
from pathlib import Path

from ansible import constants
from ansible.plugins.callback import CallbackBase

DOCUMENTATION = """
name: celeryops_payloads
type: notification
short_description: Keeps the modules that ansible-playbook packs in the folder CELERYOPS_PAYLOADS, for its next runs
description: Used by the tests, hundreds of playbooks. Each would pack every module it starts, with all that it imports.
"""


class CallbackModule(CallbackBase):
    CALLBACK_VERSION = 2.0
    CALLBACK_TYPE = "notification"
    CALLBACK_NAME = "celeryops_payloads"
    CALLBACK_NEEDS_ENABLED = True

    def __init__(self, *arguments: object, **options: object) -> None:
        super().__init__(*arguments, **options)
        # What is loaded by now stays; to look through it again and again is a tenth of what a playbook costs.
        gc.freeze()
        gc.set_threshold(50_000, 20, 100)
        kept = Path(os.environ["CELERYOPS_PAYLOADS"])
        kept.mkdir(parents=True, exist_ok=True)
        # Ansible's own cache, of one run. It writes there under locks.
        with contextlib.suppress(FileExistsError):
            (Path(constants.DEFAULT_LOCAL_TMP) / "ansiballz_cache").symlink_to(kept)
