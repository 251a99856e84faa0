# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Private to the collection: the schedule of an application's beat, its file and its entries, for several modules."""

from __future__ import annotations

import contextlib
import glob
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any

from ._session import ask, the_user
from .engine import heartbeat, schedule
from .engine.connection import Broker
from .engine.errors import PreconditionFailed, WaitTimeout

# Seconds in which the application must have been imported.
PATIENCE = 60.0

ARGUMENT_SPEC: dict[str, Any] = {
    "application": {"type": "str", "required": True},
    "app": {"type": "str", "required": True},
    "virtualenv": {"type": "path", "required": True},
    "user": {"type": "str"},
}


def of_application(params: Mapping[str, Any], request: Mapping[str, Any]) -> dict[str, Any]:
    """What the program celeryops.schedule answers."""
    try:
        return ask(params, "schedule", request, PATIENCE)
    except TimeoutError:
        raise WaitTimeout(
            f"app: {params['app']} was not imported in {PATIENCE:g} s. Look why it takes so long."
        ) from None
    except PreconditionFailed as exc:
        if "No module named celeryops.schedule" not in exc.msg:
            raise
        raise PreconditionFailed(
            f"virtualenv: the runtime package in {params['virtualenv']} is older than this collection. Deploy a "
            f"release with this one (celeryops.runbook.rolling_deploy)."
        ) from None


def entries(params: Mapping[str, Any], broker: Broker) -> tuple[dict[str, Any], dict[str, schedule.Rest]]:
    """The schedule as the application has it, with last and next run, and which entries are disabled."""
    application = params["application"]
    redis = broker.kind == "redis"  # elsewhere nobody keeps last runs
    runs = schedule.runs(broker, application) if redis else {}
    rests = schedule.rests(broker, application) if redis else {}
    told = {name: {"last": run.last, "count": run.count} for name, run in runs.items()}
    found = of_application(params, {"do": "list", "runs": told})
    return found, rests


def known(found: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    entry = found["entries"].get(name)
    if entry is None:
        there = ", ".join(sorted(found["entries"])) or "none"
        raise PreconditionFailed(f"entry: the schedule has no entry {name}. Entries: {there}.", missing=[name])
    return dict(entry)


def demand_obeying(params: Mapping[str, Any], broker: Broker) -> schedule.Leader:
    """The beat that leads, which obeys what is disabled; others do not."""
    if broker.kind != "redis":
        raise PreconditionFailed("broker_url: is not Redis, where it is kept which entries are disabled.")
    leader = schedule.leader(broker, params["application"])
    if leader is not None:
        return leader
    beat = heartbeat.read(broker, params["application"])
    if beat is not None and beat["age"] < 60:
        raise PreconditionFailed(
            f"application: beat on {beat['host']} runs without the runtime part lead, and would not obey. Deploy a "
            f"release with this collection's runtime package, or take lead out of CELERYOPS_DISABLE."
        )
    raise PreconditionFailed(
        f"application: no beat of {params['application']} leads now, so nobody would obey. Start it "
        f"(celeryops.runbook.start), or check the name."
    )


def files(path: str) -> list[str]:
    """All files of a schedule, whichever database made them: the bare name, .db, .dat, .bak, .dir, -wal and so on."""
    return sorted(one for one in glob.glob(f"{glob.escape(path)}*") if not os.path.islink(one))


def holders(path: str) -> list[int]:
    """Processes that have one of the files open."""
    found = set()
    for link in glob.glob("/proc/[0-9]*/fd/*"):
        with contextlib.suppress(OSError):
            if os.readlink(link).startswith(path):
                found.add(int(link.split("/")[2]))
    return sorted(found)


@contextlib.contextmanager
def _copy(params: Mapping[str, Any], path: str) -> Iterator[str]:
    """A copy for the application's user: to open a database may change it."""
    user = the_user(params["user"])
    place = tempfile.mkdtemp(prefix="celeryops-")
    try:
        for one in files(path):
            copy = os.path.join(place, os.path.basename(one))
            if stat.S_ISREG(os.stat(one).st_mode):
                shutil.copyfile(one, copy)
                os.chown(copy, user.pw_uid, user.pw_gid)
        os.chown(place, user.pw_uid, user.pw_gid)
        yield os.path.join(place, os.path.basename(path))
    finally:
        shutil.rmtree(place)


def read(params: Mapping[str, Any], path: str) -> tuple[dict[str, schedule.Run], str]:
    """When each entry ran last according to the file, or why it cannot be read."""
    strange = [one for one in files(path) if not os.path.isfile(one)]
    if strange:
        return {}, f"{strange[0]} is no file"
    with _copy(params, path) as copy:
        told = of_application(params, {"do": "read", "path": copy})
    if "error" in told:
        return {}, str(told["error"])
    return {name: schedule.Run(run["last"], run["count"]) for name, run in told["runs"].items()}, ""
