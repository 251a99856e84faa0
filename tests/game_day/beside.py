# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A second application on the fleet of the shop, on worker2, with a broker of its own."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from fleet.story import Play, Story


class Beside(Story):
    """The same fleet seen from the application `app`. What it counts with stays in the Redis of the shop."""

    app: str
    ledger_db: int
    results_db: int

    def __init__(self, shop: Story) -> None:
        self.__dict__.update(shop.__dict__)
        self.groups, self.values = (self.fleet / f"{self.app}-{name}.json" for name in ("groups", "values"))

    def write(self, groups: Mapping[str, Sequence[str]], values: Mapping[str, Any]) -> None:
        """The inventory beside that of the shop, and the variables, which hold secrets."""
        common = {
            "celeryops_app_name": self.app,
            "celeryops_result_backend": self.url(self.address, self.results_db),
            "celeryops_environment": {"SHOP_LEDGER_URL": self.url(self.address, self.ledger_db)},
        }
        self.values.touch(mode=0o600)
        self.values.write_text(json.dumps({**common, **values}))
        self.groups.write_text(
            json.dumps({name: {"hosts": {host: {} for host in hosts}} for name, hosts in groups.items()})
        )

    @property
    def mine(self) -> tuple[str, ...]:
        """What a playbook needs beside the inventory."""
        return ("-e", f"@{self.values}")

    def play(self, playbook: str, *arguments: str, expect: bool | None = True, **variables: Any) -> Play:
        return super().play(playbook, "-i", str(self.groups), *self.mine, *arguments, expect=expect, **variables)

    def producer(self, broker: str, options: Mapping[str, Any]) -> dict[str, str]:
        """The environment of a program that sends."""
        return {
            "CELERY_BROKER_URL": broker,
            "CELERY_RESULT_BACKEND": self.url(self.address, self.results_db),
            "CELERYOPS_TRANSPORT_OPTIONS": json.dumps(options),
            "SHOP_LEDGER_URL": self.url(self.address, self.ledger_db),
        }

    @property
    def workers(self) -> list[str]:
        return [f"{self.app}-{instance}@worker2" for instance in ("bulk-1", "fast-1")]

    def mains(self) -> list[str]:
        """The main process of every worker."""
        units = [f"celery-{self.app}-worker@{instance}.service" for instance in ("bulk-1", "fast-1")]
        return self.ssh("worker2", f"systemctl show -P MainPID {' '.join(units)}").split()

    def remove(self) -> None:
        """The application; the broker is up to who made it."""
        for db in (self.ledger_db, self.results_db):
            self.redis("FLUSHDB", db=db)
        app = self.app
        self.ssh(
            "worker2",
            f"systemctl disable -q --now celery-{app}.target $(systemctl list-units --all --plain --no-legend"
            f" 'celery-{app}-*' | cut -d' ' -f1); rm -rf /etc/systemd/system/celery-{app}*"
            f" /etc/systemd/system/*.wants/celery-{app}* /srv/{app} /etc/celeryops/{app} /var/backups/celeryops/{app};"
            " systemctl daemon-reload; systemctl reset-failed",
            check=False,
        )
