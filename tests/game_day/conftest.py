# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import scorecard
from fleet.story import Story
from fleet_support import installed


@pytest.fixture(scope="session")
def shop() -> Iterator[Story]:
    with installed("game") as story:
        yield story


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, exitstatus: int) -> None:
    """The scorecard; into GAME_DAY_TABLE only if everything ran and passed."""
    if not scorecard.ROWS:
        return
    terminalreporter.section("scorecard")
    terminalreporter.write_line(scorecard.table())
    everything = {path.name for path in Path(__file__).parent.glob("test_*.py")}
    asked = {Path(argument).name for argument in terminalreporter.config.args}
    table = os.environ.get("GAME_DAY_TABLE")
    if table and exitstatus == 0 and everything <= asked and not terminalreporter.config.option.keyword:
        scorecard.write(Path(table))
