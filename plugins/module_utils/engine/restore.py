# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""A backup becomes the data of the Redis on this host; what was there is moved aside, in its own file system.

A Redis with an append-only file never looks at an RDB when it starts. So the snapshot is made the base of a new
append-only file, which is what Redis itself writes when it rewrites one: no start without it, nothing switched.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from . import backup
from .errors import CeleryOpsError, ConnectionFailed, PreconditionFailed

ASIDE = "before-restore"


@dataclass
class Plan:
    """A backup that has been judged fit for this Redis."""

    path: str
    source: str  # rdb or aof
    note: dict[str, Any]
    bytes: int


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".")[:2] if part.isdigit())


def judge(
    path: str, settings: Mapping[str, str], *, port: int, host: str, source: str = "rdb", accept: Sequence[str] = ()
) -> Plan:
    """Refuse what would not do, before anything is touched."""
    if backup.is_archive(path):
        note = backup.read(path).note
        names = {key: settings[key] for key in note["settings"]}
        if source == "aof" and note["source"] != "aof":
            raise PreconditionFailed(f"source: {path} holds no append-only file. Use source: rdb.")
        if source == "aof" and (not backup.loads_aof(settings) or names != note["settings"]):
            raise PreconditionFailed("source: this Redis has no append-only file, or of another name. Use source: rdb.")
        here = backup.server_version()
        if _version(note["redis"]) > _version(here):
            raise PreconditionFailed(
                f"file: {path} was written by Redis {note['redis']}, newer than the {here} of this host. Restore it"
                f" on a host with that Redis, or newer."
            )
        if (note["host"], note["port"]) != (host, port) and "origin" not in accept:
            raise PreconditionFailed(
                f"file: {path} is of the Redis on {note['host']}, port {note['port']}, not of this one ({host}, port"
                f" {port}). If that is meant, add origin to accept."
            )
        size = sum(one["bytes"] for one in note["files"].values())
    else:
        if source == "aof":
            raise PreconditionFailed("source: a single RDB holds no append-only file. Use source: rdb.")
        note = {"rdb": backup.check_rdb(path), "source": "rdb"}
        if "origin" not in accept:
            raise PreconditionFailed(
                f"file: {path} is a bare RDB that does not say which Redis it is of. If it is, add origin to accept."
            )
        size = os.path.getsize(path)
    directory = settings["dir"]
    if not os.path.isdir(directory) or not os.access(directory, os.W_OK) or os.statvfs(directory).f_flag & os.ST_RDONLY:
        raise PreconditionFailed(f"dir: {directory}, where this Redis keeps its data, is missing or not writable.")
    free = shutil.disk_usage(directory).free
    if free < size:
        raise PreconditionFailed(
            f"dir: {directory} has {free // 2**20} MiB free; the backup needs {-(-size // 2**20)} MiB beside the data"
            f" that is kept. Free space."
        )
    return Plan(path, source, note, size)


def put(
    plan: Plan,
    settings: Mapping[str, str],
    server: backup.Server,
    stop: Callable[[], None],
    start: Callable[[], None],
    *,
    timeout: float = 600.0,
) -> dict[str, Any]:
    """Stop, change places, start, prove. If the new data does not load, the old is put back."""
    directory = settings["dir"]
    moment = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    fresh = os.path.join(directory, f"restore-{moment}.partial")
    aside = os.path.join(directory, f"{ASIDE}-{moment}")
    try:
        os.mkdir(aside, 0o700)
        os.mkdir(fresh, 0o700)
    except FileExistsError as exc:
        raise PreconditionFailed(f"{exc.filename} exists: a restore was made this very second. Run again.") from exc
    stopped = cleared = False
    try:
        rdb = _unpack(plan, settings, fresh)
        stopped = True
        stop()
        moved = _swap(directory, aside, settings)
        cleared = True
        _swap(fresh, directory, settings)
        _owned(directory, aside)
    except BaseException:
        if cleared:
            _swap(directory, fresh, settings)
        _swap(aside, directory, settings)
        os.rmdir(aside)
        if stopped:
            start()
        shutil.rmtree(fresh, ignore_errors=True)
        raise
    shutil.rmtree(fresh)
    try:
        start()
        loaded = wait_loaded(server, timeout)
        least = rdb["keys"] - rdb["expires"] if plan.source == "rdb" else 0
        if loaded < least:
            raise CeleryOpsError(
                f"Redis loaded {loaded} keys of {rdb['keys']}, of which {rdb['expires']} may have expired."
            )
    except BaseException as exc:
        stop()
        failed = os.path.join(directory, f"failed-restore-{moment}")
        os.mkdir(failed, 0o700)
        _swap(directory, failed, settings)
        _swap(aside, directory, settings)
        os.rmdir(aside)
        start()
        text = exc.msg if isinstance(exc, CeleryOpsError) else str(exc)
        raise CeleryOpsError(
            f"the restored data did not load: {text} Redis runs with the data it had before; the other is in {failed}."
        ) from exc
    return {"aside": aside, "moved": moved, "rdb": rdb, "loaded": loaded}


def _unpack(plan: Plan, settings: Mapping[str, str], fresh: str) -> dict[str, int]:
    dump = os.path.join(fresh, backup.DUMP)
    if backup.is_archive(plan.path):
        backup.read(plan.path, into=fresh)
    else:
        shutil.copyfile(plan.path, dump)
    rdb = backup.check_rdb(dump, plan.path)
    if backup.loads_aof(settings) and plan.source == "rdb":
        name, folder = settings["appendfilename"], os.path.join(fresh, settings["appenddirname"])
        shutil.rmtree(folder, ignore_errors=True)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(os.path.join(fresh, name))
        if _version(backup.server_version()) >= (7, 0):
            os.mkdir(folder, 0o700)
            os.link(dump, os.path.join(folder, f"{name}.1.base.rdb"))
            with open(os.path.join(folder, f"{name}.manifest"), "w", encoding="utf-8") as manifest:
                manifest.write(f"file {name}.1.base.rdb seq 1 type b\n")
        else:
            os.link(dump, os.path.join(fresh, name))  # one file, whose preamble may be an RDB
    if settings["dbfilename"] != backup.DUMP:
        os.rename(dump, os.path.join(fresh, settings["dbfilename"]))
    _owned(settings["dir"], fresh)
    return rdb


def _owned(directory: str, place: str) -> None:
    """As the data directory, whose owner is the user of Redis."""
    owner = os.stat(directory)
    for folder, _folders, files in os.walk(place):
        for path in (folder, *(os.path.join(folder, one) for one in files)):
            if stat.S_ISLNK(os.lstat(path).st_mode):
                continue
            os.chown(path, owner.st_uid, owner.st_gid)


def _swap(source: str, target: str, settings: Mapping[str, str]) -> list[str]:
    """Rename what Redis loads from one directory to another of the same file system."""
    moved = []
    for name in dict.fromkeys((settings["dbfilename"], settings["appendfilename"], settings["appenddirname"])):
        if os.path.lexists(os.path.join(source, name)):
            os.rename(os.path.join(source, name), os.path.join(target, name))
            moved.append(name)
    return moved


def wait_loaded(server: backup.Server, timeout: float) -> int:
    """Keys in all databases, once Redis answers and is done with loading."""
    end = time.monotonic() + timeout
    while True:
        try:
            info = server.info("persistence", "keyspace")
            if info.get("loading", "0") == "0":
                rows = [value for key, value in info.items() if key.startswith("db") and key[2:].isdigit()]
                return sum(int(row.partition("keys=")[2].partition(",")[0]) for row in rows)
        except (ConnectionFailed, backup.Refused) as exc:
            if time.monotonic() > end:
                raise ConnectionFailed(f"Redis did not come up in {timeout:g} s: {exc.msg}") from exc
        if time.monotonic() > end:
            raise ConnectionFailed(f"Redis was not done with loading in {timeout:g} s.")
        time.sleep(0.1)
