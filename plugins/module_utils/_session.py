# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Private to the collection: a command of another user that leaves nothing behind, in time."""

from __future__ import annotations

import contextlib
import os
import pwd
import signal
import subprocess
from collections.abc import Mapping, Sequence
from typing import Any


def run_session(
    arguments: Sequence[str],
    user: pwd.struct_passwd,
    *,
    directory: str,
    environment: Mapping[str, str],
    data: bytes,
    timeout: float,
) -> subprocess.CompletedProcess[bytes]:
    """Run it in a session of its own with data on its stdin; after timeout seconds it is killed: TimeoutError.

    What the command started and left running is killed too.
    """
    who: dict[str, Any] = {}
    if user.pw_uid != os.geteuid():
        groups = os.getgrouplist(user.pw_name, user.pw_gid)
        who = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": groups}
    with subprocess.Popen(
        arguments,
        cwd=directory,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        **who,
    ) as process:
        try:
            out, errors = process.communicate(data, timeout=timeout)
        except subprocess.TimeoutExpired:
            raise TimeoutError from None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    return subprocess.CompletedProcess(arguments, process.returncode, out, errors)
