#!/usr/bin/python
# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: celery_host_info
short_description: Look at the units and processes of a Celery application on a host
version_added: 0.1.0
author:
  - celeryops contributors (@celeryops)
description:
  - Reads the systemd units of the worker instances and of beat, the memory of each with all its children, and every
    beat process of the application, whether a unit runs it or not.
  - Needs no broker and no Celery, so it works where both are broken.
extends_documentation_fragment:
  - celeryops.runbook.application
  - celeryops.runbook.attributes.host_info
options:
  app:
    description:
      - The application as Celery's C(-A) takes it. A beat that was started by hand is known by it.
    type: str
    default: ""
  root:
    description: The directory of the releases. Default C(/srv/NAME).
    type: path
seealso:
  - module: celeryops.runbook.celery_health
"""

EXAMPLES = r"""
- name: Look at the application's units
  celeryops.runbook.celery_host_info:
    name: shop
    app: shop.celery:app
  register: seen

- name: Show the memory of each worker
  ansible.builtin.debug:
    msg: "{{ seen.units | items2dict(key_name='name', value_name='rss') }}"
"""

RETURN = r"""
units:
  description: The worker instances and beat.
  returned: success
  type: list
  elements: dict
  contains:
    name:
      description: The unit.
      type: str
      sample: celery-shop-worker@default-1.service
    kind:
      description: V(worker) or V(beat).
      type: str
    instance:
      description: The instance of a worker.
      type: str
      sample: default-1
    node:
      description: The worker's node name.
      type: str
      sample: shop-default-1@worker1
    queues:
      description: The queues the worker is configured to consume.
      type: list
      elements: str
    active:
      description: systemd's active state.
      type: str
      sample: active
    sub:
      description: systemd's sub state.
      type: str
      sample: running
    result:
      description: systemd's result of the last run.
      type: str
      sample: success
    restarts:
      description: How often systemd restarted it by itself.
      type: int
    enabled:
      description: Whether it is to run after a boot.
      type: bool
    pid:
      description: The main process, 0 if there is none.
      type: int
    processes:
      description: The main process and its descendants.
      type: int
    rss:
      description: Resident memory of all of them in bytes. Pages that processes share are counted for each.
      type: int
beats:
  description: Every beat process of the application.
  returned: success
  type: list
  elements: dict
  contains:
    pid:
      description: The process.
      type: int
    began:
      description: When it began, in the kernel's ticks since the boot. With the pid it names one process for good.
      type: int
    unit:
      description: The unit it is the main process of, if any.
      type: str
    running:
      description: False if the process is stopped or a zombie.
      type: bool
    worker:
      description: Whether it is a worker that carries a beat (C(-B)).
      type: bool
    service:
      description: The service or scope of systemd it runs in, whoever installed that.
      type: str
      sample: session-3.scope
hostname:
  description: The host's own name.
  returned: success
  type: str
release:
  description: The release which C(current) points to.
  returned: success
  type: str
visibility_timeout:
  description: The broker's visibility timeout in seconds as the release's application sets it, if it is known.
  returned: success
  type: float
"""

from ansible.module_utils.basic import AnsibleModule

from ansible_collections.celeryops.runbook.plugins.module_utils._host import look


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "name": {"type": "str", "required": True},
            "app": {"type": "str", "default": ""},
            "root": {"type": "path"},
            "config_dir": {"type": "path"},
        },
        supports_check_mode=True,
    )
    name = module.params["name"]

    def systemctl(arguments: list[str]) -> str:
        rc, out, err = module.run_command([module.get_bin_path("systemctl", required=True), *arguments])
        if rc:
            module.fail_json(msg=f"systemctl {arguments[0]} failed: {err.strip() or out.strip()}", rc=rc)
        return str(out)

    root = module.params["root"] or f"/srv/{name}"
    config_dir = module.params["config_dir"] or f"/etc/celeryops/{name}"
    module.exit_json(changed=False, **look(name, module.params["app"], root, config_dir, systemctl))


if __name__ == "__main__":
    main()
