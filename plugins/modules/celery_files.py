#!/usr/bin/python
# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: celery_files
short_description: The files of an application on a host, all of them in one task
version_added: 0.1.0
author:
  - celeryops contributors (@celeryops)
description:
  - Makes directories, writes files and removes others. A task for each of them would cost the host the start of an
    interpreter or two; this is one.
  - A file is written beside its place with its owner and mode, judged by O(files[].validate), and then put there at
    once. None is put there and none is removed if one of them is refused.
extends_documentation_fragment:
  - celeryops.runbook.attributes.host
options:
  files:
    description: What is to be there, and what is not.
    type: list
    elements: dict
    required: true
    suboptions:
      path:
        description: Where.
        type: path
        required: true
      state:
        description:
          - V(file) has the O(files[].content) or the O(files[].secret), V(directory) is made with its parents,
            V(absent) is no file and no link.
        type: str
        choices: [file, directory, absent]
        default: file
      content:
        description: The whole of the file, shown in a diff.
        type: str
      secret:
        description: The whole of the file, never shown. Exactly one of this and O(files[].content) makes a file.
        type: str
      owner:
        description: Who owns it.
        type: str
        default: root
      group:
        description: Its group.
        type: str
        default: root
      mode:
        description: Its mode, in quotes. Default V("0755") for a directory, V("0644") for a file.
        type: str
      validate:
        description: A command that refuses a wrong file by its exit status. C(%s) is the new file, under another name.
        type: str
      keep_time:
        description: Whether the new file takes over when the old one was last written.
        type: bool
        default: false
  daemon_reload:
    description: Whether systemd reads its units again where any of O(files) has changed.
    type: bool
    default: false
"""

EXAMPLES = r"""
- name: Write the environments of two instances, forget a third
  celeryops.runbook.celery_files:
    files:
      - {path: /etc/celeryops/shop/worker-fast-1.env, content: "{{ fast_1 }}"}
      - {path: /etc/celeryops/shop/worker-fast-2.env, content: "{{ fast_2 }}"}
      - {path: /etc/celeryops/shop/worker-fast-3.env, state: absent}
"""

RETURN = r"""
paths:
  description: What was written, made, removed, or given another owner or mode.
  returned: success
  type: list
  elements: str
  sample: [/etc/celeryops/shop/worker-fast-1.env]
"""

import contextlib
import os
import tempfile
from typing import Any

from ansible.module_utils.basic import AnsibleModule


class Refused(Exception):
    pass


def read(path: str) -> bytes | None:
    """What a plain file holds. A link is replaced."""
    if os.path.islink(path) or not os.path.exists(path):
        return None
    with open(path, "rb") as handle:
        return handle.read()


class Files:
    def __init__(self, module: AnsibleModule) -> None:
        self.module = module
        self.changed: list[str] = []
        self.diff: list[dict[str, str]] = []
        self.temporary: dict[str, str] = {}

    def check(self, one: dict[str, Any]) -> None:
        path, state = one["path"], one["state"]
        given = [name for name in ("content", "secret") if one[name] is not None]
        if not os.path.isabs(path):
            raise Refused(f"files: {path!r} is no absolute path.")
        if len(given) != (state == "file"):
            one_of = "exactly one of content and secret" if state == "file" else f"no {given[0]}, since it is {state}"
            raise Refused(f"files: give {path} {one_of}.")
        if os.path.exists(path) and os.path.isdir(path) != (state == "directory"):
            raise Refused(f"{path} is {'a' if os.path.isdir(path) else 'no'} directory: move it out of the way.")

    def attributes(self, one: dict[str, Any], path: str) -> bool:
        mode = one["mode"] or ("0755" if one["state"] == "directory" else "0644")
        wanted = self.module.load_file_common_arguments({**one, "mode": mode, "attributes": None}, path)
        return bool(self.module.set_fs_attributes_if_different(wanted, False))

    def note(self, path: str, what: str) -> None:
        self.changed.append(path)
        self.diff.append({"prepared": f"{path}: {what}\n"})

    def make(self, one: dict[str, Any]) -> None:
        missing, path = [], one["path"]
        while not os.path.isdir(path):
            missing.append(path)
            path = os.path.dirname(path)
        if not self.module.check_mode:
            for part in reversed(missing):
                os.mkdir(part)
                self.attributes(one, part)
        if missing:
            self.note(one["path"], "made")
        elif self.attributes(one, one["path"]):
            self.note(one["path"], "other owner, group or mode")

    def prepare(self, one: dict[str, Any]) -> None:
        """The new file beside its place, and judged."""
        path, text = one["path"], one["content"] if one["secret"] is None else one["secret"]
        before = read(path)
        if before == text.encode():
            if self.attributes(one, path):
                self.note(path, "other owner, group or mode")
            return
        self.changed.append(path)
        if one["secret"] is None:
            old = (before or b"").decode(errors="replace")
            self.diff.append({"before_header": path, "after_header": path, "before": old, "after": text})
        if self.module.check_mode:
            return
        handle, temporary = tempfile.mkstemp(prefix=".celeryops-", dir=os.path.dirname(path))
        self.temporary[path] = temporary
        with open(handle, "wb") as out:
            out.write(text.encode())
        self.attributes(one, temporary)
        if one["keep_time"] and before is not None:
            found = os.stat(path)
            os.utime(temporary, ns=(found.st_atime_ns, found.st_mtime_ns))
        if one["validate"]:
            rc, told, err = self.module.run_command(one["validate"].replace("%s", temporary))
            if rc:
                raise Refused(f"{path} was refused: {(err.strip() or told.strip()) or f'exit status {rc}'}")

    def remove(self, path: str) -> None:
        if os.path.lexists(path):
            if not self.module.check_mode:
                os.unlink(path)
            self.note(path, "removed")

    def run(self, files: list[dict[str, Any]]) -> None:
        by_state: dict[str, list[dict[str, Any]]] = {"directory": [], "file": [], "absent": []}
        for one in files:
            self.check(one)
            by_state[one["state"]].append(one)
        try:
            for one in by_state["directory"]:
                self.make(one)
            for one in by_state["file"]:
                self.prepare(one)
            for path in list(self.temporary):
                os.replace(self.temporary[path], path)
                del self.temporary[path]
        finally:
            for temporary in self.temporary.values():
                with contextlib.suppress(OSError):
                    os.unlink(temporary)
        for one in by_state["absent"]:
            self.remove(one["path"])


def main() -> None:
    file = {
        "path": {"type": "path", "required": True},
        "state": {"type": "str", "choices": ["file", "directory", "absent"], "default": "file"},
        "content": {"type": "str"},
        "secret": {"type": "str", "no_log": True},
        "owner": {"type": "str", "default": "root"},
        "group": {"type": "str", "default": "root"},
        "mode": {"type": "str"},
        "validate": {"type": "str"},
        "keep_time": {"type": "bool", "default": False},
    }
    module = AnsibleModule(
        argument_spec={
            "files": {"type": "list", "elements": "dict", "required": True, "options": file},
            "daemon_reload": {"type": "bool", "default": False},
        },
        supports_check_mode=True,
    )
    files = Files(module)
    try:
        files.run(module.params["files"])
    except Refused as error:
        module.fail_json(msg=str(error))
    except OSError as error:
        module.fail_json(msg=f"{error.filename} cannot be written: {error.strerror}. Run as root (become).")
    if files.changed and module.params["daemon_reload"] and not module.check_mode:
        rc, out, err = module.run_command([module.get_bin_path("systemctl", required=True), "daemon-reload"])
        if rc:
            module.fail_json(msg=f"systemctl daemon-reload failed: {err.strip() or out.strip()}")
    module.exit_json(changed=bool(files.changed), paths=files.changed, diff=files.diff)


if __name__ == "__main__":
    main()
