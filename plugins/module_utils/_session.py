# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Private to the collection: a command of another user that leaves nothing behind, in time.

`ask` runs a program of the runtime package so, which answers in JSON for the application.
"""

from __future__ import annotations

import contextlib
import json
import os
import pwd
import signal
import subprocess
from collections.abc import Mapping, Sequence
from typing import Any

from .engine.connection import read_environment_file
from .engine.errors import PreconditionFailed


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


def the_user(name: str | None) -> pwd.struct_passwd:
    """Whom to run something as; the user of this module where none is named."""
    try:
        user = pwd.getpwnam(name) if name else pwd.getpwuid(os.geteuid())
    except KeyError:
        raise PreconditionFailed(f"user: there is no user {name} on this host.") from None
    if user.pw_uid != os.geteuid() and os.geteuid() != 0:
        raise PreconditionFailed(f"user: only root can run it as {user.pw_name}. Use become.")
    return user


def ask(params: Mapping[str, Any], program: str, request: Mapping[str, Any], timeout: float) -> dict[str, Any]:
    """What celeryops.PROGRAM of the application's virtual environment answers. TimeoutError where it does not end."""
    if params["app_dir"] and not os.path.isdir(params["app_dir"]):
        raise PreconditionFailed(f"app_dir: {params['app_dir']} is not a directory on this host.")
    # Past links: a deploy that switches the release meanwhile does not mix two in one process.
    virtualenv = os.path.realpath(params["virtualenv"])
    user = the_user(params["user"])
    environment = {
        "PATH": f"{virtualenv}/bin:/usr/local/bin:/usr/bin:/bin",
        "VIRTUAL_ENV": virtualenv,
        "HOME": user.pw_dir,
        "USER": user.pw_name,
        "LOGNAME": user.pw_name,
        "LANG": "C.UTF-8",
        "PYTHONDONTWRITEBYTECODE": "1",
        **(read_environment_file(params["environment_file"]) if params["environment_file"] else {}),
    }
    if params["broker_url"]:
        environment["CELERY_BROKER_URL"] = params["broker_url"]
    done = run_session(
        [os.path.join(virtualenv, "bin", "python"), "-m", f"celeryops.{program}", "-A", params["app"]],
        user,
        directory=os.path.realpath(params["app_dir"] or "/"),
        environment=environment,
        data=json.dumps(request).encode(),
        timeout=timeout,
    )
    try:
        return dict(json.loads(done.stdout))
    except ValueError:
        tail = done.stderr.decode(errors="replace").strip()[-2000:]
        raise PreconditionFailed(
            f"app: the process for {params['app']} ended with {done.returncode} before it could answer: "
            f"{tail or 'no output'}"
        ) from None
