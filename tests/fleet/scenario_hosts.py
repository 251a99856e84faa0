#!/usr/bin/env python
# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Hosts of the Molecule scenarios, with the example's variables, releases and wheels: scenario_hosts.py up | down"""

from __future__ import annotations

import sys
from pathlib import Path

sys.dont_write_bytecode = True
# Instead of this directory, where fleet.py would hide the package.
sys.path[0] = str(Path(__file__).resolve().parents[1])

from fleet.story import Story, StoryError, wheelhouse


def main() -> int:
    story = Story("molecule")
    try:
        if sys.argv[1:] == ["down"]:
            story.down()
            return 0
        for release in ("v1", "v2"):
            story.make_release(release)
        story.make_release("v3", "import")
        wheelhouse()
        story.up()
    except StoryError as error:
        print(f"{error}; see {error.log}" if error.log else error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
