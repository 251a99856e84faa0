#!/usr/bin/python
# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: celery_signing_keys
short_description: The keys with which the Celery processes of a host sign tasks and judge them
version_added: 0.1.0
author:
  - celeryops contributors (@celeryops)
description:
  - Keeps the file C(signing.json) in O(config_dir), which the runtime package reads, again when it changes. It is
    readable for O(user) only. No secret is returned or shown in a diff.
  - A fleet changes its keys in three steps, each done on all hosts before the next begins, so that at no moment a host
    refuses what another one signs. The role C(_unit) does the first, the playbook C(rotate_signing_key) all of them.
extends_documentation_fragment:
  - celeryops.runbook.application
  - celeryops.runbook.attributes.host
options:
  keys:
    description:
      - The keys. The first signs, all are accepted.
      - Without a key the file is removed, if it does not refuse unsigned tasks any more.
    type: list
    elements: dict
    required: true
    suboptions:
      id:
        description: Name of the key in the header of every message, such as V(2026-11).
        type: str
        required: true
      secret:
        description: At least 32 characters. Another secret needs another O(keys[].id).
        type: str
        required: true
  require:
    description: Whether workers refuse what none of the keys signed.
    type: bool
    default: true
  step:
    description:
      - V(prepare) accepts the new keys and goes on signing as before. It never makes a host stricter, unless nothing
        has run there yet.
      - V(sign) signs with the first of O(keys). Former keys are still accepted.
      - V(finish) accepts nothing but O(keys), and refuses unsigned tasks if O(require) says so.
      - In check mode a step takes the ones before it for done.
    type: str
    choices: [prepare, sign, finish]
    default: prepare
  user:
    description: Who may read the file; the user of the application.
    type: str
    required: true
  root:
    description: Directory of the releases. An active one tells that the host is in use. Default C(/srv/NAME).
    type: path
seealso:
  - module: celeryops.runbook.celery_signing_info
"""

EXAMPLES = r"""
- name: Accept a second key
  celeryops.runbook.celery_signing_keys:
    name: shop
    user: shop
    keys:
      - {id: 2026-12, secret: "{{ vault_signing_2026_12 }}"}
      - {id: 2026-11, secret: "{{ vault_signing_2026_11 }}"}
"""

RETURN = r"""
path:
  description: The file.
  returned: success
  type: str
  sample: /etc/celeryops/shop/signing.json
signs:
  description: The key that signs from now on; null without keys.
  returned: success
  type: str
accepts:
  description: The keys that are accepted from now on.
  returned: success
  type: list
  elements: str
require:
  description: Whether unsigned tasks are refused from now on.
  returned: success
  type: bool
finished:
  description: Whether this is exactly what was asked for, with no step left.
  returned: success
  type: bool
"""

import contextlib
import os
import pwd
from typing import Any

from ansible.module_utils.basic import AnsibleModule

from ansible_collections.celeryops.runbook.plugins.module_utils.engine import signing


def read(path: str) -> signing.Keys | None:
    return signing.load(path) if os.path.exists(path) else None


def write(path: str, text: str, user: pwd.struct_passwd) -> None:
    """At once and whole: workers read the file whenever it changes."""
    temporary = f"{path}.{os.getpid()}"
    try:
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o400), "w", encoding="utf-8") as handle:
            os.fchown(handle.fileno(), user.pw_uid, user.pw_gid)
            handle.write(text)
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def fits(path: str, user: pwd.struct_passwd | None) -> bool:
    """Owner and mode."""
    found = os.stat(path)
    return found.st_mode & 0o777 == 0o400 and (user is None or found.st_uid == user.pw_uid)


def main() -> None:
    key = {
        "id": {"type": "str", "required": True},
        "secret": {"type": "str", "required": True, "no_log": True},
    }
    module = AnsibleModule(
        argument_spec={
            "name": {"type": "str", "required": True},
            "keys": {"type": "list", "elements": "dict", "required": True, "no_log": False, "options": key},
            "require": {"type": "bool", "default": True},
            "step": {"type": "str", "choices": list(signing.STEPS), "default": "prepare"},
            "user": {"type": "str", "required": True},
            "root": {"type": "path"},
            "config_dir": {"type": "path"},
        },
        supports_check_mode=True,
    )
    params = module.params
    path = os.path.join(params["config_dir"] or f"/etc/celeryops/{params['name']}", "signing.json")
    in_use = os.path.lexists(os.path.join(params["root"] or f"/srv/{params['name']}", "current"))
    try:
        user = pwd.getpwnam(params["user"])
    except KeyError:
        if not module.check_mode:  # there it is not made yet
            module.fail_json(msg=f"user: there is no user {params['user']} on this host; the role makes it")
        user = None
    try:
        wanted = signing.check(params["keys"], params["require"], "celeryops_signing_keys") if params["keys"] else None
        found = read(path)
        if module.check_mode:
            for earlier in signing.STEPS[: signing.STEPS.index(params["step"])]:
                found = signing.plan(found, wanted, earlier, in_use)
        after = signing.plan(found, wanted, params["step"], in_use)
    except signing.SigningError as error:
        module.fail_json(msg=error.msg, category=error.category)
    text = after.dump() if after else ""
    changed = (found.dump() if found else "") != text or bool(after and os.path.exists(path) and not fits(path, user))
    if changed and not module.check_mode:
        try:
            if after and user:
                write(path, text, user)
            else:
                os.unlink(path)
        except OSError as error:
            module.fail_json(msg=f"{path} cannot be written: {error.strerror}. Run as root (become).")
    result: dict[str, Any] = {
        "changed": changed,
        "path": path,
        "signs": after.signer if after else None,
        "accepts": after.ids if after else [],
        "require": bool(after and after.require),
        "finished": text == (wanted.dump() if wanted else ""),
        "diff": {
            "before_header": path,
            "after_header": path,
            "before": found.describe() if found else "",
            "after": after.describe() if after else "",
        },
    }
    module.exit_json(**result)


if __name__ == "__main__":
    main()
