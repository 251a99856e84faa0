#!/usr/bin/python
# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: redis_sentinel_info
short_description: Who is primary and who replica in a Redis under Sentinel
version_added: 0.1.0
description:
  - Asks all Sentinels of the broker's URL, then every Redis that they know.
author:
  - celeryops contributors (@celeryops)
extends_documentation_fragment:
  - celeryops.runbook.connection
  - celeryops.runbook.attributes.info
seealso:
  - module: celeryops.runbook.redis_failover
"""

EXAMPLES = r"""
- name: Who is the primary
  celeryops.runbook.redis_sentinel_info:
    environment_file: /etc/celeryops/shop/secret.env
    virtualenv: /srv/shop/current/venv
"""

RETURN = r"""
primary:
  description: Address of the primary, as the Sentinel with the newest configuration has it.
  returned: success
  type: str
alive:
  description: Whether it answers as a primary.
  returned: success
  type: bool
agreed:
  description: Whether all Sentinels that answer name it.
  returned: success
  type: bool
quorum:
  description: Why the Sentinels could not agree on a failover, empty if they could.
  returned: success
  type: str
sentinels:
  description: By address, what each Sentinel says.
  returned: success
  type: dict
nodes:
  description: By address, what each Redis says, and the C(problem) that keeps it from being promoted.
  returned: success
  type: dict
fit:
  description: Replicas that could be promoted, the best first.
  returned: success
  type: list
  elements: str
"""

from typing import Any

from ansible_collections.celeryops.runbook.plugins.module_utils._module import CeleryModule, run
from ansible_collections.celeryops.runbook.plugins.module_utils.engine import sentinel


def look(module: CeleryModule) -> dict[str, Any]:
    with module.broker() as broker, sentinel.Watch(broker) as watch:
        return {"changed": False, **sentinel.described(watch.look())}


def main() -> None:
    run(look, supports_check_mode=True)


if __name__ == "__main__":
    main()
