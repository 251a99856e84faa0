#!/usr/bin/env python3
# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Make a release of the shop: a copy of src/ with its own shop/version.py.

v1 lacks the loyalty module; every other release has it. --bad makes one that must not get through a deploy:
import        does not import
crash         imports, but the worker exits while it starts
unknown-task  lacks shop.send_receipt, of which messages may wait in a queue
canary        starts, but its self-test gives a wrong answer
"""

from __future__ import annotations

import argparse
import pathlib
import re
import shutil
import sys

SOURCE = pathlib.Path(__file__).resolve().parent / "src"
BAD = ("import", "crash", "unknown-task", "canary")

HEADER = """# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
from __future__ import annotations

"""

CRASH = (
    HEADER
    + """from typing import Any

from celery import bootsteps, current_app


class PriceList(bootsteps.StartStopStep):
    def create(self, worker: Any) -> None:
        raise RuntimeError("the price list is missing")


current_app.steps["worker"].add(PriceList)
"""
)


def make(release: str, destination: pathlib.Path, bad: str | None = None) -> None:
    shutil.copytree(SOURCE, destination, ignore=shutil.ignore_patterns("__pycache__"))
    package = destination / "shop"
    include = ["shop.tasks", "shop.receipts", "shop.loyalty"]
    if release == "v1":
        include.remove("shop.loyalty")
        (package / "loyalty.py").unlink()
    if bad == "unknown-task":
        include.remove("shop.receipts")
        (package / "receipts.py").unlink()
    if bad == "crash":
        include.append("shop.prices")
        (package / "prices.py").write_text(CRASH)
    (package / "version.py").write_text(
        HEADER
        + ("import shop_price_list  # noqa: F401  a module nobody installed\n\n" if bad == "import" else "")
        + f'VERSION = "{release}"\nINCLUDE = {include!r}\n'.replace("'", '"')
        + ("SELFTEST_ANSWER = None\n" if bad == "canary" else 'SELFTEST_ANSWER = "ok"\n')
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("id", help="release id, such as v2")
    parser.add_argument("destination", type=pathlib.Path, help="directory to make; must not exist")
    parser.add_argument("--bad", choices=BAD)
    options = parser.parse_args()
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", options.id):
        parser.error(f"id {options.id!r}: letters, digits, '.', '_' and '-' only, beginning with a letter or digit")
    if options.destination.exists():
        parser.error(f"destination {options.destination} exists; remove it or name another")
    make(options.id, options.destination, options.bad)
    return 0


if __name__ == "__main__":
    sys.exit(main())
