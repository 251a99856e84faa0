# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What is wrong with the Redis of this host, and what may be done about it without a decision."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from . import backup
from .errors import AuthenticationFailed, CeleryOpsError, ConnectionFailed, PreconditionFailed

# State -> (what is done by itself, what a person must do where nothing is).
CURES = {
    "healthy": ("", ""),
    "loading": ("wait", ""),
    "frozen": ("continue", ""),
    "down": ("start", ""),
    "aof_truncated": ("repair", ""),
    "aof_damaged": (
        "",
        "The append-only file is damaged in its midst, and a repair cuts off all that comes after. Restore a backup"
        " with redis_restore, or let it be cut with celeryops_confirm, the name of the host; a copy is kept.",
    ),
    "base_damaged": ("", "The base of the append-only file is damaged. Restore a backup with redis_restore."),
    "disk_full": (
        "",
        "The file system of {dir} is full: free space there; it then starts, or takes writes again by itself. A"
        " full disk is mostly logs, or old backups and before-restore-TIME directories beside the data.",
    ),
    "snapshot_failed": (
        "",
        "Redis refuses writes since its last snapshot failed, though the disk has room. Its log says why: no memory to"
        " fork (set vm.overcommit_memory=1) or a directory it may not write. Then run BGSAVE.",
    ),
    "out_of_memory": (
        "",
        "Redis is at its maxmemory of {maxmemory} bytes and refuses writes. Raise celery_redis_maxmemory and run site,"
        " or make room: results_prune, redis_clients -e celeryops_reply_idle=600, queue_purge.",
    ),
    "replica": (
        "",
        "This Redis is a replica of {master} and takes no writes. Under Sentinel that is as it should be: name another"
        " host with celeryops_redis_host, or use redis_failover. Otherwise: if the master is alive, point"
        " celeryops_broker_url at it; if it is lost for good, run REPLICAOF NO ONE here and on no other host.",
    ),
    "wrong_password": ("", "Correct the password in celeryops_broker_url, or that of Redis with site."),
    "max_clients": (
        "",
        "Redis takes no further client. Close connections where they come from (mostly one program leaks them), or"
        " raise celery_redis_maxclients and run site, which restarts Redis.",
    ),
    "busy": ("", "A script has kept Redis busy for seconds. SCRIPT KILL ends one that has not written yet."),
    "wedged": (
        "",
        "Redis runs (process {pid}), is not stopped by a signal, and does not answer. Look at what it does (perf, disk,"
        " swap); systemctl kill -s KILL redis-server loses a second at most, since it has an append-only file.",
    ),
}  # fmt: skip


@dataclass
class Finding:
    state: str
    text: str
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def cure(self) -> str:
        return CURES[self.state][0]

    @property
    def human(self) -> str:
        return CURES[self.state][1].format_map({"dir": "?", "maxmemory": "?", "master": "?", **self.facts})


def stopped(pid: int) -> bool:
    """Whether a signal has stopped the process."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8") as handle:
            return handle.read().rpartition(")")[2].split()[0] in ("T", "t")
    except OSError:
        return False


def diagnose(server: backup.Server, settings: Mapping[str, str], pid: int) -> Finding:
    """pid: the main process of the unit, 0 for none."""
    try:
        info = server.info("persistence", "replication", "memory", "server")
    except AuthenticationFailed as exc:
        return Finding("wrong_password", exc.msg)
    except backup.Wedged as exc:
        return Finding("frozen" if pid and stopped(pid) else "wedged", exc.msg, {"pid": pid})
    except backup.Refused as exc:
        states = {"LOADING": "loading", "MAXCLIENTS": "max_clients", "BUSY": "busy"}
        if exc.word not in states:
            raise
        return Finding(states[exc.word], exc.msg)
    except ConnectionFailed as exc:
        return _dead(settings, exc.msg)
    return judge(info, settings)


def judge(info: Mapping[str, str], settings: Mapping[str, str]) -> Finding:
    """One that answers."""
    if info.get("loading") == "1":
        share = info.get("loading_loaded_perc", "?")
        return Finding("loading", f"Redis is loading its data, {share} % are in.")
    if info.get("role") == "slave":
        master = f"{info.get('master_host')}:{info.get('master_port')}"
        link = info.get("master_link_status")
        return Finding("replica", f"Redis is a replica of {master} (link {link}).", {"master": master})
    most, used = int(info.get("maxmemory", 0)), int(info.get("used_memory", 0))
    if most and used >= most:
        return Finding("out_of_memory", f"Redis uses {used} bytes of its maxmemory, {most}.", {"maxmemory": most})
    broken = [name for name in ("aof_last_write_status", "rdb_last_bgsave_status") if info.get(name, "ok") != "ok"]
    if broken:
        state = "disk_full" if _full(settings["dir"]) else "snapshot_failed"
        if state == "disk_full" or "rdb_last_bgsave_status" in broken:
            return Finding(state, f"Redis says {broken[0]}: err.", {"dir": settings["dir"]})
    return Finding("healthy", "Redis answers, is a master, and takes writes.")


def _full(directory: str) -> bool:
    return shutil.disk_usage(directory).free < 4 * 2**20


def _dead(settings: Mapping[str, str], said: str) -> Finding:
    directory = settings["dir"]
    if os.path.isdir(directory) and _full(directory):
        return Finding("disk_full", f"{said} Its disk is full.", {"dir": directory})
    if backup.loads_aof(settings):
        checked = check_aof(settings)
        if checked["state"] != "whole":
            names = {"truncated": "aof_truncated", "damaged": "aof_damaged", "base": "base_damaged"}
            text = (
                f"{said} {checked['file']} is good up to byte {checked['good']} of {checked['size']}"
                if checked["state"] != "base"
                else f"{said} {checked['file']} is damaged"
            )
            return Finding(names[checked["state"]], text + ".", checked)
    return Finding("down", said)


def check_aof(settings: Mapping[str, str], *, fix: bool = False) -> dict[str, Any]:
    """What redis-check-aof says of the append-only file; with `fix` the last one is cut where it ceases to be sound."""
    names = backup.aof_files(settings)
    if not names:
        return {"state": "whole", "file": "", "good": 0, "size": 0}
    path = os.path.join(settings["dir"], names[0])
    command = ["redis-check-aof", *(["--fix"] if fix else []), path]
    try:
        done = subprocess.run(command, input="y\n", capture_output=True, text=True, errors="replace", check=False)
    except FileNotFoundError as exc:
        raise PreconditionFailed("redis-check-aof is missing on this host. Install redis-tools.") from exc
    text = done.stdout + done.stderr
    rows = re.findall(r"AOF analyzed: filename=(.+?), size=(\d+), ok_up_to=(\d+),.*diff=(\d+)", text)
    if done.returncode == 0:
        return {"state": "whole", "file": "", "good": 0, "size": 0}
    last = os.path.basename(names[-1])
    name, size, good, diff = rows[-1] if rows else ("", "0", "0", "0")
    if os.path.basename(name) != last or not int(diff):
        # Not the file that is appended to: a base, an earlier file, or the manifest.
        return {"state": "base", "file": name or names[0], "good": int(good), "size": int(size)}
    target = os.path.join(settings["dir"], names[-1])
    return {
        "state": "damaged" if _goes_on(target, int(good)) else "truncated",
        "file": target,
        "good": int(good),
        "size": int(size),
    }


def _goes_on(path: str, good: int) -> bool:
    """Whether whole commands follow the place where the file stops making sense: then it was not just cut off."""
    more = re.compile(rb"\n\*[1-9]\d*\r\n\$[1-9]\d*\r\n[A-Za-z]+\r\n")
    with open(path, "rb") as handle:
        handle.seek(good)
        handle.read(1)
        kept = b""
        while chunk := handle.read(1 << 20):
            if more.search(kept + chunk):
                return True
            kept = chunk[-128:]
    return False


def repair(settings: Mapping[str, str], finding: Finding) -> dict[str, Any]:
    """Cut the append-only file, after a copy of it all was put beside it."""
    moment = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    directory = settings["dir"]
    names = backup.aof_files(settings)
    needed = sum(os.path.getsize(os.path.join(directory, name)) for name in names)
    if shutil.disk_usage(directory).free < needed + 2**20:
        raise PreconditionFailed(
            f"{directory} has no room for a copy of {needed} bytes, which is kept before a repair. Free space."
        )
    copy = os.path.join(directory, f"before-repair-{moment}")
    owner = os.stat(directory)
    for name in names:
        target = os.path.join(copy, name)
        os.makedirs(os.path.dirname(target), mode=0o700, exist_ok=True)
        shutil.copy2(os.path.join(directory, name), target)
        os.chown(target, owner.st_uid, owner.st_gid)
    after = check_aof(settings, fix=True)
    if after["state"] != "whole" or check_aof(settings)["state"] != "whole":
        raise CeleryOpsError(
            f"redis-check-aof could not repair the append-only file; the copy is in {copy}. Restore a backup."
        )
    return {"copy": copy, "cut": int(finding.facts["size"]) - int(finding.facts["good"])}
