# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import base64
import contextlib
import dataclasses
import gc
import importlib.util
import io
import marshal
import os
import sys
import zipfile
from pathlib import Path

from ansible import constants
from ansible.executor import module_common
from ansible.plugins.callback import CallbackBase

DOCUMENTATION = """
name: celeryops_payloads
type: notification
short_description: Keeps the modules that ansible-playbook packs in the folder CELERYOPS_PAYLOADS, for its next runs
description:
  - Used by the tests, hundreds of playbooks. Each would pack every module it starts, with all that it imports.
  - With the Python of the test hosts, what is kept is bytecode. From source a host would compile all of it each time,
    which is half of what a module costs.
"""


HOSTS_PYTHON = (3, 11)  # Debian 12's; the bytecode of one minor version is that of all its patch levels


def compiled(payload: bytes) -> bytes:
    """The zip of a module (base64) with the bytecode of its files in place of their source."""
    packed = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(base64.b64decode(payload))) as plain,
        zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as quick,
    ):
        for info in plain.infolist():
            content = plain.read(info)
            # A module that starts itself again under another Python hands on the source of this one.
            if info.filename.endswith(".py") and not info.filename.endswith("/_respawn_wrapper.py"):
                code = marshal.dumps(compile(content, info.filename, "exec", dont_inherit=True))
                # Of the head a zip's importer looks at the magic number only.
                content = importlib.util.MAGIC_NUMBER + bytes(12) + code
                info = zipfile.ZipInfo(f"{info.filename}c", info.date_time)
            quick.writestr(info, content, zipfile.ZIP_DEFLATED)
    return base64.b64encode(packed.getvalue())


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
        if sys.version_info[:2] == HOSTS_PYTHON:
            module = module_common._CachedModule
            dump = module.dump

            def keep(made: module_common._CachedModule, path: str) -> None:
                dump(dataclasses.replace(made, zip_data=compiled(made.zip_data)), path)

            module.dump = keep
