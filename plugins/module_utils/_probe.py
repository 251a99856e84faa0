# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Private to the collection: where a host keeps the notes of probes."""

from __future__ import annotations

import glob
import os
from typing import Any

from ansible.module_utils.basic import AnsibleModule

from .engine import probes


def argument_spec() -> dict[str, Any]:
    return {
        "name": {"type": "str", "required": True},
        "run": {"type": "str", "required": True},
        "state_dir": {"type": "path"},
    }


def place(module: AnsibleModule) -> str:
    """The directory of the run."""
    state = module.params["state_dir"] or f"/var/lib/celery-{module.params['name']}"
    try:
        return probes.directory(state, module.params["run"])
    except ValueError as exc:
        module.fail_json(msg=str(exc))
        raise SystemExit from None  # for type checkers


def read(path: str) -> str:
    try:
        with open(path, encoding="ascii", errors="replace") as text:
            return text.read()
    except FileNotFoundError:
        return ""


def notes(directory: str) -> dict[str, list[tuple[str, int, float]]]:
    """What each instance of the host noted."""
    found = {}
    for path in sorted(glob.glob(os.path.join(directory, f"*{probes.NOTES}"))):
        found[os.path.basename(path).removesuffix(probes.NOTES)] = probes.parse(read(path))
    return found
