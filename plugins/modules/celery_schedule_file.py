#!/usr/bin/python
# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: celery_schedule_file
short_description: Move the file of beat's schedule aside
version_added: 0.1.0
description:
  - Moves all files of a schedule, whichever database made them, into a directory of their own below O(save_dir). Beat
    makes a new one when it starts.
  - What the old file tells of the last runs is first noted in Redis, as far as it can be read and nothing newer is
    there, so that beat goes on with it. No entry is sent at once because of the move, none is put off.
  - Beat must be stopped. The module fails while a process has one of the files open.
author:
  - celeryops contributors (@celeryops)
extends_documentation_fragment:
  - celeryops.runbook.schedule
  - celeryops.runbook.connection
  - celeryops.runbook.attributes
options:
  file:
    description: The file, without a suffix.
    type: path
    required: true
  save_dir:
    description: Where it is moved to. Created for root alone.
    type: path
    required: true
  ignore_open:
    description: With check mode, do not fail while beat runs.
    type: bool
    default: false
seealso:
  - module: celeryops.runbook.celery_schedule_info
"""

EXAMPLES = r"""
- name: Move a damaged schedule aside
  celeryops.runbook.celery_schedule_file:
    environment_file: /etc/celeryops/shop/secret.env
    virtualenv: /srv/shop/current/venv
    application: shop
    app: shop.celery:app
    app_dir: /srv/shop/current/src
    user: shop
    file: /var/lib/celery-shop-beat/schedule
    save_dir: /var/backups/celeryops/shop
"""

RETURN = r"""
moved:
  description: The files that were moved.
  returned: success
  type: list
  elements: str
  sample: [/var/lib/celery-shop-beat/schedule.db]
saved_to:
  description: The directory that has them now; null if there was nothing to move.
  returned: success
  type: str
  sample: /var/backups/celeryops/shop/schedule-20261121T120000Z
error:
  description: Why the old file could not be read; null if it could.
  returned: success
  type: str
noted:
  description: Entries whose last run was taken from the old file.
  returned: success
  type: list
  elements: str
"""

import os
import shutil
import time
from typing import Any

from ansible_collections.celeryops.runbook.plugins.module_utils import _schedule
from ansible_collections.celeryops.runbook.plugins.module_utils._module import CeleryModule, run
from ansible_collections.celeryops.runbook.plugins.module_utils.engine import schedule
from ansible_collections.celeryops.runbook.plugins.module_utils.engine.errors import PreconditionFailed, SaveFailed

ARGUMENT_SPEC = {
    **_schedule.ARGUMENT_SPEC,
    "file": {"type": "path", "required": True},
    "save_dir": {"type": "path", "required": True},
    "ignore_open": {"type": "bool", "default": False},
}


def note(module: CeleryModule, own: dict[str, schedule.Run]) -> list[str]:
    """Into Redis what only the file knows."""
    application = module.params["application"]
    with module.broker() as broker:
        if broker.kind != "redis":
            return []
        recorded = schedule.runs(broker, application)
        newer = {
            name: run for name, run in own.items() if schedule.later(recorded.get(name), run) != recorded.get(name)
        }
        if newer and not module.check_mode:
            schedule.keep_runs(broker, application, newer)
    return sorted(newer)


def move(files: list[str], place: str) -> None:
    """Copies first: the directories may lie on different disks, and a full one must leave everything as it was."""
    try:
        os.makedirs(os.path.dirname(place), mode=0o700, exist_ok=True)
        os.mkdir(place, 0o700)
    except OSError as exc:
        raise SaveFailed(f"save_dir: {place} could not be made: {exc}. Nothing was moved.") from exc
    try:
        for path in files:
            copy = os.path.join(place, os.path.basename(path))
            if os.path.isdir(path):
                shutil.copytree(path, copy, symlinks=True)
            else:
                shutil.copy2(path, copy)
    except OSError as exc:
        shutil.rmtree(place, ignore_errors=True)
        raise SaveFailed(f"save_dir: the files could not be saved in {place}: {exc}. Nothing was moved.") from exc
    for path in files:
        if os.path.isdir(path):
            shutil.rmtree(path)
        else:
            os.unlink(path)


def move_file(module: CeleryModule) -> dict[str, Any]:
    params = module.params
    files = _schedule.files(params["file"])
    holders = _schedule.holders(params["file"])
    if holders and not (module.check_mode and params["ignore_open"]):
        raise PreconditionFailed(
            f"file: {params['file']} is open in process {', '.join(map(str, holders))}. Stop beat first.",
            holders=holders,
        )
    own, error = _schedule.read(params, params["file"]) if files else ({}, "")
    noted = note(module, own)
    place = os.path.join(params["save_dir"], time.strftime("schedule-%Y%m%dT%H%M%SZ", time.gmtime()))
    if files and not module.check_mode:
        move(files, place)
    return {
        "changed": bool(files or noted),
        "moved": files,
        "saved_to": place if files else None,
        "error": error or None,
        "noted": noted,
        "diff": {"before": "".join(f"{path}\n" for path in files), "after": ""},
    }


def main() -> None:
    run(move_file, ARGUMENT_SPEC, supports_check_mode=True)


if __name__ == "__main__":
    main()
