#!/usr/bin/python
# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: redis_backup
short_description: Back up the Redis of this host while it runs, verified
version_added: 0.1.0
description:
  - Waits for a snapshot that begins now, has it judged by C(redis-check-rdb), and puts it into one compressed file,
    with the append-only file where that is what Redis loads at a start.
  - The file is synced and read back before it gets its name; only then are the oldest ones removed.
author:
  - celeryops contributors (@celeryops)
extends_documentation_fragment:
  - celeryops.runbook.redis_server
  - celeryops.runbook.attributes.host
options:
  directory:
    description: Where backups lie on this host. It is made, mode 0700, if it is missing.
    type: path
    required: true
  name:
    description: Backups are called NAME-TIME.tar.gz. Only those of this name count for O(keep).
    type: str
    default: redis
  keep:
    description: So many stay, the new one counted.
    type: int
    default: 7
  timeout:
    description: Seconds that Redis may need for its snapshot.
    type: float
    default: 3600.0
attributes:
  idempotent:
    support: none
    details:
      - Each run makes a backup.
notes:
  - Redis forks for a snapshot, which can take as much memory again as changes meanwhile.
seealso:
  - module: celeryops.runbook.redis_restore
"""

EXAMPLES = r"""
- name: Back up, keep a fortnight
  celeryops.runbook.redis_backup:
    password: "{{ celery_redis_password }}"
    directory: /var/backups/celeryops/shop
    keep: 14
"""

RETURN = r"""
path:
  description: The backup; in check mode how it would be called about now.
  returned: success
  type: str
  sample: /var/backups/celeryops/shop/redis-20261121T123000Z.tar.gz
sha256:
  description: Checksum of the file. C(PATH.sha256) holds it too, as C(sha256sum -c) reads it. Empty in check mode.
  returned: success
  type: str
bytes:
  description: Size of the file.
  returned: success
  type: int
note:
  description: What the backup says of itself, C(host), C(redis), C(source) (V(aof) or V(rdb)), C(rdb.keys), C(files)
    and more.
  returned: success
  type: dict
removed:
  description: Older backups that were removed.
  returned: success
  type: list
  elements: str
seconds:
  description: How long it took.
  returned: success
  type: float
"""

from typing import Any

from ansible.module_utils.basic import AnsibleModule

from ansible_collections.celeryops.runbook.plugins.module_utils._redis import run
from ansible_collections.celeryops.runbook.plugins.module_utils.engine import backup
from ansible_collections.celeryops.runbook.plugins.module_utils.engine.errors import PreconditionFailed

ARGUMENT_SPEC = {
    "directory": {"type": "path", "required": True},
    "name": {"type": "str", "default": "redis"},
    "keep": {"type": "int", "default": 7},
    "timeout": {"type": "float", "default": 3600.0},
}


def back_up(module: AnsibleModule, server: backup.Server) -> dict[str, Any]:
    params = module.params
    if params["keep"] < 1:
        raise PreconditionFailed(f"keep: must be at least 1, not {params['keep']}.")
    if not params["name"] or "/" in params["name"]:
        raise PreconditionFailed(f"name: {params['name']!r} is no part of a file's name.")
    made = backup.make(
        server,
        params["directory"],
        name=params["name"],
        keep=params["keep"],
        timeout=params["timeout"],
        dry=module.check_mode,
    )
    return {
        "changed": True,
        "path": made.path,
        "sha256": made.sha256,
        "bytes": made.bytes,
        "note": made.note,
        "removed": made.removed,
        "seconds": round(made.seconds, 2),
        "diff": {"before": "".join(f"{path}\n" for path in made.removed), "after": f"{made.path}\n"},
    }


def main() -> None:
    run(back_up, ARGUMENT_SPEC)


if __name__ == "__main__":
    main()
